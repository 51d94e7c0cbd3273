//! Names and labels, and the one place in the project where a selector meets them.
//!
//! Every name is 1 to 63 characters of `[a-z0-9-]`, neither starting nor ending with a hyphen: it can stand in a DNS label, a file name and
//! an interface's alias without quoting.

use std::borrow::{Borrow, Cow};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Longest name, in characters: a DNS label (RFC 1035 section 2.3.4).
pub const MAX_NAME_LEN: usize = 63;

/// Most labels that one component or host may have.
pub const MAX_LABELS: usize = 32;

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// No characters, or more than [`MAX_NAME_LEN`].
    #[error("a name has 1 to 63 characters")]
    Length,
    /// A character outside `[a-z0-9-]`.
    #[error("a name has only a-z, 0-9 and hyphens, not {0:?}")]
    Character(char),
    /// A hyphen at either end.
    #[error("a name neither starts nor ends with a hyphen")]
    Hyphen,
}

fn check_name(text: &str) -> Result<(), NameError> {
    if text.is_empty() || text.len() > MAX_NAME_LEN {
        return Err(NameError::Length);
    }
    let allowed = |c: &char| matches!(c, 'a'..='z' | '0'..='9' | '-');
    if let Some(other) = text.chars().find(|c| !allowed(c)) {
        return Err(NameError::Character(other));
    }
    if text.starts_with('-') || text.ends_with('-') {
        return Err(NameError::Hyphen);
    }
    Ok(())
}

macro_rules! names {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Box<str>);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
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

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                check_name(text).map(|()| Self(text.into()))
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = Cow::<'de, str>::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }

        crate::wire::text_codec!($name);
    )*};
}

names! {
    /// A host's name, bound by its token or made by the coordinator; never claimed by the host.
    HostName;
    /// A component's name: the unit of segmentation.
    ComponentName;
    /// A service's name within its component, like `sql` in `postgres:sql`.
    ServiceName;
    /// A label's key, like `tier`.
    LabelKey;
    /// A label's value, like `data`.
    LabelValue;
}

/// Labels of one component or host, ordered by key.
pub type LabelSet = BTreeMap<LabelKey, LabelValue>;

/// What picks components out of a policy: a name, or one or more labels that must all be there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Selector {
    /// The component of this name.
    Name(ComponentName),
    /// Every component that has all of these labels. Never empty: the parser makes at least one.
    Labels(Vec<(LabelKey, LabelValue)>),
}

impl Selector {
    /// Whether the component `name` with `labels` is meant. An empty list of labels means nobody.
    #[must_use]
    pub fn matches(&self, name: &ComponentName, labels: &LabelSet) -> bool {
        match self {
            Self::Name(wanted) => wanted == name,
            Self::Labels(wanted) => !wanted.is_empty() && has_labels(wanted, labels),
        }
    }
}

/// Whether `labels` holds every pair of `wanted`. True for an empty `wanted`: callers decide what emptiness means to them.
pub fn has_labels<'a>(wanted: impl IntoIterator<Item = &'a (LabelKey, LabelValue)>, labels: &LabelSet) -> bool {
    wanted.into_iter().all(|(key, value)| labels.get(key) == Some(value))
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => name.fmt(f),
            Self::Labels(pairs) => {
                for (i, (key, value)) in pairs.iter().enumerate() {
                    let and = if i == 0 { "" } else { " & " };
                    write!(f, "{and}{key}={value}")?;
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Result<ComponentName, NameError> {
        text.parse()
    }

    #[test]
    fn names_are_dns_labels() {
        assert!(name("n8n").is_ok() && name(&"a".repeat(63)).is_ok());
        assert_eq!(name(""), Err(NameError::Length));
        assert_eq!(name(&"a".repeat(64)), Err(NameError::Length));
        assert_eq!(name("N8n"), Err(NameError::Character('N')));
        assert_eq!(name("a_b"), Err(NameError::Character('_')));
        assert_eq!(name("-a"), Err(NameError::Hyphen));
        assert_eq!(name("a-"), Err(NameError::Hyphen));
    }

    #[test]
    fn a_selector_without_labels_matches_nobody() -> Result<(), NameError> {
        let n8n = name("n8n")?;
        assert!(!Selector::Labels(Vec::new()).matches(&n8n, &LabelSet::new()));
        assert!(Selector::Name(n8n.clone()).matches(&n8n, &LabelSet::new()));
        Ok(())
    }

    #[test]
    fn every_label_of_a_selector_must_be_there() -> Result<(), NameError> {
        let pair = |k: &str, v: &str| Ok::<_, NameError>((k.parse()?, v.parse()?));
        let labels: LabelSet = [pair("tier", "app")?, pair("env", "prod")?].into();
        let n8n = name("n8n")?;
        assert!(Selector::Labels(vec![pair("tier", "app")?]).matches(&n8n, &labels));
        assert!(Selector::Labels(vec![pair("tier", "app")?, pair("env", "prod")?]).matches(&n8n, &labels));
        assert!(!Selector::Labels(vec![pair("tier", "app")?, pair("env", "test")?]).matches(&n8n, &labels));
        Ok(())
    }
}
