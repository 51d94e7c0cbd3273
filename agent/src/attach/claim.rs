//! Claims: which processes of the host's own namespace are a component.

use std::fmt;
use std::sync::Arc;

use super::guard::GuardError;
use super::selftest::TrialError;
use cloison_proto::label::ComponentName;
use cloison_proto::policy::{CgroupPath, UnitName, User, UserName};

/// Which processes of the host's own namespace are a component.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Claim {
    /// Those whose sockets are a user's.
    User(User),
    /// Those of a service of systemd.
    Unit(UnitName),
    /// Those in a cgroup and below it.
    Cgroup(CgroupPath),
}

/// Why a claim cannot be enforced on this host.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// There is no such user.
    #[error("this host has no user `{0}`; create it, or name the user that the component runs as")]
    NoUser(UserName),
    /// Users cannot be looked up.
    #[error("the user `{0}` cannot be looked up: {1}")]
    Lookup(UserName, String),
    /// The superuser by another name.
    #[error("the user `{0}` is root by another name; root can be every component of its host, so a component cannot be root")]
    Root(UserName),
    /// Two components claim the same processes.
    #[error("the component {0} claims the same processes; two components cannot share them")]
    Shared(ComponentName),
    /// Cgroups of version 2 are not mounted.
    #[error("cgroups of version 2 are not mounted on this host; attach the component by `user`, `container` or `netns`")]
    NoCgroups,
    /// The kernel does not keep cgroups apart.
    #[error("this kernel does not bind addresses to cgroups; attach the component by `user`, `container` or `netns`")]
    Cgroups(#[source] TrialError),
    /// The kernel does not keep users apart.
    #[error("this kernel does not bind addresses to users; attach the component by `container` or `netns`")]
    Users(#[source] TrialError),
    /// Loopback is to be guarded, and cannot be.
    #[error("loopback cannot be guarded, as `loopback_guard` in agent.toml wants it (docs/attachments.md says what it takes)")]
    Guard(#[source] Arc<GuardError>),
}

impl Claim {
    /// Whether processes are claimed by their cgroup.
    #[must_use]
    pub const fn is_by_cgroup(&self) -> bool {
        match self {
            Self::Unit(_) | Self::Cgroup(_) => true,
            Self::User(_) => false,
        }
    }
}

/// The number of a user, as this host knows it (getpwnam(3)).
///
/// # Errors
/// [`ClaimError`]: there is none, or it is root.
pub fn number_of(user: &User) -> Result<u32, ClaimError> {
    let name = match user {
        User::Id(id) => return Ok(*id),
        User::Name(name) => name,
    };
    match nix::unistd::User::from_name(name.as_str()) {
        Ok(Some(found)) if found.uid.is_root() => Err(ClaimError::Root(name.clone())),
        Ok(Some(found)) => Ok(found.uid.as_raw()),
        Ok(None) => Err(ClaimError::NoUser(name.clone())),
        Err(error) => Err(ClaimError::Lookup(name.clone(), error.desc().to_owned())),
    }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(User::Name(name)) => write!(f, "user:{name}"),
            Self::User(User::Id(id)) => write!(f, "user:{id}"),
            Self::Unit(unit) => write!(f, "unit:{unit}"),
            Self::Cgroup(path) => write!(f, "cgroup:{path}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_name_and_root_is_none() -> Result<(), Box<dyn std::error::Error>> {
        assert_eq!(number_of(&"1".parse()?)?, 1);
        assert!(number_of(&"nobody".parse()?)? > 0);
        let unknown = number_of(&"no-such-user-here".parse()?);
        assert!(matches!(unknown, Err(ClaimError::NoUser(_))), "{unknown:?}");
        Ok(())
    }
}
