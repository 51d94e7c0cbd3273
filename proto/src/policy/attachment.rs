//! How a host knows which processes are a component. Every value here has been parsed: what an agent reads out of a view has the shape
//! that this file allows, and nothing in it needs quoting, expanding or cleaning.
//!
//! Text form, in views and in API answers: `host`, `user:postgres`, `unit:n8n.service`, `cgroup:/system.slice/x`,
//! `container:docker:n8n`, `netns:/run/netns/x`. What an attachment *does* is the agent's business.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

/// Longest path of a cgroup or a network namespace, in bytes: an eighth of PATH_MAX, far above what systemd and container runtimes make.
const MAX_PATH: usize = 512;
/// Longest name of a unit, in bytes (systemd's UNIT_NAME_MAX is 256 with its final NUL).
const MAX_UNIT: usize = 255;
/// Longest name of a user, in bytes (LOGIN_NAME_MAX of useradd).
const MAX_USER: usize = 32;
/// Longest name, label key or label value of a container, in bytes.
const MAX_CONTAINER: usize = 128;

/// Why a text is not an attachment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AttachmentError {
    /// The kind is none of [`AttachmentKind::ALL`].
    #[error("there is no such kind of attachment; the kinds are host, user, unit, cgroup, container and netns")]
    Kind,
    /// `host` with a value, or another kind without one.
    #[error("`host` has no value, and every other kind has one")]
    Value,
    /// Neither a user's name nor a user id.
    #[error("a user is a name such as `postgres` or a number from 1 to 4294967294")]
    User,
    /// The superuser: root can be any component of its host, so a component cannot be root.
    #[error("root can be every component of its host, so a component cannot be root")]
    Root,
    /// Not the full name of a service unit.
    #[error("a unit is the full name of a service, such as `n8n.service` or `postgresql@15-main.service`")]
    Unit,
    /// A path that is relative, is `/`, has `.`, `..` or empty parts, is too long, or has blanks or characters outside ASCII.
    #[error("a path is absolute, has no `.`, `..` or empty parts, and at most 512 visible ASCII characters")]
    Path,
    /// Not a container.
    #[error("a container is `docker:NAME`, `podman:NAME`, `docker:label=KEY=VALUE` or `podman:label=KEY=VALUE`")]
    Container,
}

macro_rules! texts {
    ($($(#[$doc:meta])* $name:ident, $check:ident, $error:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Box<str>);

        impl $name {
            /// The value as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = AttachmentError;
            fn from_str(text: &str) -> Result<Self, AttachmentError> {
                if $check(text) { Ok(Self(text.into())) } else { Err(AttachmentError::$error) }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }
    )*};
}

texts! {
    /// A user's name: a letter or underscore, then letters, digits and `_.-`; never `root`.
    UserName, is_user, User;
    /// The full name of a systemd service, instances of templates included: `postgresql@15-main.service`.
    UnitName, is_unit, Unit;
    /// A cgroup below the root of the v2 hierarchy, as `/proc/PID/cgroup` shows it: `/system.slice/x.service`.
    CgroupPath, is_path, Path;
    /// The path of a network namespace: `/run/netns/x`.
    NetnsPath, is_path, Path;
    /// A container's name, as its runtime allows it.
    ContainerName, is_container, Container;
    /// The key of a container's label.
    ContainerLabelKey, is_label_key, Container;
    /// The value of a container's label: visible ASCII.
    ContainerLabelValue, is_label_value, Container;
}

/// Which user.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum User {
    /// By name, looked up on the host.
    Name(UserName),
    /// By number: neither 0 (root) nor the largest, which means "no user" to the kernel.
    Id(u32),
}

/// A container runtime that an agent can ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Engine {
    /// Docker.
    Docker,
    /// Podman.
    Podman,
}

/// Which containers of a runtime.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ContainerMatch {
    /// The one of this name.
    Name(ContainerName),
    /// Every one with this label.
    Label(ContainerLabelKey, ContainerLabelValue),
}

/// How a host knows which processes are a component.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Attachment {
    /// Every process of the host that is in no other component.
    Host,
    /// The processes of a user.
    User(User),
    /// The processes of a systemd service.
    Unit(UnitName),
    /// The processes in a cgroup and below it.
    Cgroup(CgroupPath),
    /// The processes in containers.
    Container(Engine, ContainerMatch),
    /// The processes in a network namespace.
    Netns(NetnsPath),
}

/// The kind of an attachment: what an agent's configuration accepts or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AttachmentKind {
    /// [`Attachment::Host`].
    Host,
    /// [`Attachment::User`].
    User,
    /// [`Attachment::Unit`].
    Unit,
    /// [`Attachment::Cgroup`].
    Cgroup,
    /// [`Attachment::Container`].
    Container,
    /// [`Attachment::Netns`].
    Netns,
}

impl AttachmentKind {
    /// Every kind.
    pub const ALL: &'static [Self] = &[Self::Host, Self::User, Self::Unit, Self::Cgroup, Self::Container, Self::Netns];

    /// The kind as the policy language writes it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::User => "user",
            Self::Unit => "unit",
            Self::Cgroup => "cgroup",
            Self::Container => "container",
            Self::Netns => "netns",
        }
    }
}

impl fmt::Display for AttachmentKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for AttachmentKind {
    type Err = AttachmentError;
    fn from_str(text: &str) -> Result<Self, AttachmentError> {
        Self::ALL.iter().copied().find(|k| k.as_str() == text).ok_or(AttachmentError::Kind)
    }
}

impl Attachment {
    /// The kind.
    #[must_use]
    pub const fn kind(&self) -> AttachmentKind {
        match self {
            Self::Host => AttachmentKind::Host,
            Self::User(_) => AttachmentKind::User,
            Self::Unit(_) => AttachmentKind::Unit,
            Self::Cgroup(_) => AttachmentKind::Cgroup,
            Self::Container(..) => AttachmentKind::Container,
            Self::Netns(_) => AttachmentKind::Netns,
        }
    }

    /// The attachment of this kind and value; `host` has no value, the others have one.
    ///
    /// # Errors
    /// [`AttachmentError`], by what the kind asks of its value.
    pub fn new(kind: AttachmentKind, value: Option<&str>) -> Result<Self, AttachmentError> {
        match (kind, value) {
            (AttachmentKind::Host, None) => Ok(Self::Host),
            (AttachmentKind::User, Some(text)) => text.parse().map(Self::User),
            (AttachmentKind::Unit, Some(text)) => text.parse().map(Self::Unit),
            (AttachmentKind::Cgroup, Some(text)) => text.parse().map(Self::Cgroup),
            (AttachmentKind::Container, Some(text)) => container(text),
            (AttachmentKind::Netns, Some(text)) => text.parse().map(Self::Netns),
            (_, _) => Err(AttachmentError::Value),
        }
    }

    /// The part behind the kind; `None` for `host`.
    #[must_use]
    pub fn value(&self) -> Option<String> {
        match self {
            Self::Host => None,
            Self::User(User::Name(name)) => Some(name.to_string()),
            Self::User(User::Id(id)) => Some(id.to_string()),
            Self::Unit(unit) => Some(unit.to_string()),
            Self::Cgroup(path) => Some(path.to_string()),
            Self::Container(engine, which) => Some(format!("{engine}:{which}")),
            Self::Netns(path) => Some(path.to_string()),
        }
    }
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.value() {
            None => f.pad(self.kind().as_str()),
            Some(value) => write!(f, "{}:{value}", self.kind()),
        }
    }
}

impl FromStr for Attachment {
    type Err = AttachmentError;
    fn from_str(text: &str) -> Result<Self, AttachmentError> {
        match text.split_once(':') {
            None => Self::new(text.parse()?, None),
            Some((kind, value)) => Self::new(kind.parse()?, Some(value)),
        }
    }
}

crate::wire::text_codec!(Attachment);

impl Serialize for Attachment {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Attachment {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Docker => "docker",
            Self::Podman => "podman",
        })
    }
}

impl fmt::Display for ContainerMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => name.fmt(f),
            Self::Label(key, value) => write!(f, "label={key}={value}"),
        }
    }
}

impl FromStr for User {
    type Err = AttachmentError;
    fn from_str(text: &str) -> Result<Self, AttachmentError> {
        if text == "root" || text == "0" {
            return Err(AttachmentError::Root);
        }
        if !text.starts_with(|c: char| c.is_ascii_digit()) {
            return text.parse().map(Self::Name);
        }
        let id: u32 = text.parse().map_err(|_| AttachmentError::User)?;
        if text.starts_with('0') || id == u32::MAX {
            return Err(AttachmentError::User);
        }
        Ok(Self::Id(id))
    }
}

fn container(text: &str) -> Result<Attachment, AttachmentError> {
    let (engine, which) = text.split_once(':').ok_or(AttachmentError::Container)?;
    let engine = match engine {
        "docker" => Engine::Docker,
        "podman" => Engine::Podman,
        _ => return Err(AttachmentError::Container),
    };
    let which = match which.strip_prefix("label=") {
        None => ContainerMatch::Name(which.parse()?),
        Some(label) => {
            let (key, value) = label.split_once('=').ok_or(AttachmentError::Container)?;
            ContainerMatch::Label(key.parse()?, value.parse()?)
        }
    };
    Ok(Attachment::Container(engine, which))
}

/// Whether `text` has 1 to `max` bytes, begins with a `first` and goes on with `rest`.
fn is_word(text: &str, max: usize, first: fn(char) -> bool, rest: fn(char) -> bool) -> bool {
    text.len() <= max && text.starts_with(first) && text.chars().all(rest)
}

fn is_user(text: &str) -> bool {
    let first = |c: char| c.is_ascii_alphabetic() || c == '_';
    text != "root" && is_word(text, MAX_USER, first, |c| c.is_ascii_alphanumeric() || "_.-".contains(c))
}

/// systemd.unit(5): "valid unit names consist of a unit name prefix, and a suffix ... ASCII letters, digits, `:-_.\`", and `@` once,
/// before the instance; a template without instance never runs.
fn is_unit(text: &str) -> bool {
    let Some(name) = text.strip_suffix(".service") else { return false };
    let allowed = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
    let template = name
        .split_once('@')
        .is_none_or(|(prefix, instance)| !prefix.is_empty() && !instance.is_empty());
    template && is_word(name, MAX_UNIT, allowed, allowed) && text.len() <= MAX_UNIT
}

fn is_path(text: &str) -> bool {
    let part = |p: &str| !matches!(p, "" | "." | "..");
    let visible = text.len() <= MAX_PATH && text.chars().all(|c| c.is_ascii_graphic());
    visible && text.strip_prefix('/').is_some_and(|rest| rest.split('/').all(part))
}

fn is_container(text: &str) -> bool {
    is_word(
        text,
        MAX_CONTAINER,
        |c| c.is_ascii_alphanumeric(),
        |c| c.is_ascii_alphanumeric() || "_.-".contains(c),
    )
}

fn is_label_key(text: &str) -> bool {
    is_word(
        text,
        MAX_CONTAINER,
        |c| c.is_ascii_alphanumeric(),
        |c| c.is_ascii_alphanumeric() || "_.-/".contains(c),
    )
}

fn is_label_value(text: &str) -> bool {
    is_word(text, MAX_CONTAINER, |c| c.is_ascii_graphic(), |c| c.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_text_that_round_trips() -> Result<(), Box<dyn std::error::Error>> {
        for text in [
            "host",
            "user:postgres",
            "user:_apt",
            "user:1000",
            "user:4294967294",
            "unit:n8n.service",
            "unit:postgresql@15-main.service",
            r"unit:a\x2db.service",
            "cgroup:/system.slice/n8n.service",
            "cgroup:/a:b/{c}",
            "container:docker:n8n-runner",
            "container:podman:web",
            "container:docker:label=com.example/app=web=1",
            "netns:/run/netns/x",
        ] {
            let attachment: Attachment = text.parse().map_err(|e| format!("{text}: {e}"))?;
            assert_eq!(attachment.to_string(), text);
            assert_eq!(
                serde_json::from_str::<Attachment>(&serde_json::to_string(&attachment)?)?,
                attachment
            );
            assert_eq!(minicbor::decode::<Attachment>(&minicbor::to_vec(&attachment)?)?, attachment);
        }
        Ok(())
    }

    #[test]
    fn what_could_mean_something_else_is_refused() {
        use AttachmentError as E;
        let long = |prefix: &str, n: usize| format!("{prefix}{}", "a".repeat(n));
        for (text, want) in [
            ("", E::Kind),
            ("hosts", E::Kind),
            ("Host", E::Kind),
            ("host:", E::Value),
            ("user", E::Value),
            ("user:", E::User),
            ("user:0", E::Root),
            ("user:root", E::Root),
            ("user:00", E::User),
            ("user:01", E::User),
            ("user:+1", E::User),
            ("user:1a", E::User),
            ("user:4294967295", E::User),
            ("user:-x", E::User),
            ("user:a b", E::User),
            (&long("user:", 33), E::User),
            ("unit:n8n", E::Unit),
            ("unit:.service", E::Unit),
            ("unit:n8n.socket", E::Unit),
            ("unit:a/b.service", E::Unit),
            ("unit:x@.service", E::Unit),
            ("unit:@x.service", E::Unit),
            ("unit:*.service", E::Unit),
            ("cgroup:system.slice", E::Path),
            ("cgroup:/", E::Path),
            ("cgroup:/a/", E::Path),
            ("cgroup:/a//b", E::Path),
            ("cgroup:/a/../b", E::Path),
            ("cgroup:/a/.", E::Path),
            ("cgroup:/a b", E::Path),
            (&long("netns:/", 512), E::Path),
            ("netns:/run/netns/é", E::Path),
            ("netns:run/netns/x", E::Path),
            ("netns:/run/netns/..", E::Path),
            ("netns:/run/netns/\n", E::Path),
            ("container:n8n", E::Container),
            ("container:lxc:n8n", E::Container),
            ("container:docker:", E::Container),
            ("container:docker:-n8n", E::Container),
            ("container:docker:label=a", E::Container),
            ("container:docker:label==b", E::Container),
            ("container:docker:label=a=", E::Container),
            ("container:docker:label=a=b c", E::Container),
        ] {
            assert_eq!(text.parse::<Attachment>(), Err(want), "{text:?}");
        }
    }
}
