//! Claims: which processes of the host's own namespace are a component.

use std::fmt;

use cloison_proto::policy::{CgroupPath, UnitName, User};

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
    /// Claims are not built yet.
    #[error("this version of the agent cannot enforce `{0}`")]
    NotBuilt(Claim),
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
