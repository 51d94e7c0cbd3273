//! What a policy says, once it has been parsed: components, and rules between them.
//!
//! A [`Policy`] comes from [`super::parse`] alone, so whoever holds one knows that every selector meets a component, every service
//! exists and every name is a name. It has one form: components by name, rules by arrow, selectors and labels sorted; two documents
//! that say the same are equal. Positions are not part of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

use super::attachment::Attachment;
use crate::id::RuleId;
use crate::label::{ComponentName, HostName, LabelKey, LabelSet, LabelValue, Selector, ServiceName, has_labels};
use crate::net::PortSpec;
use crate::version::MeshTime;

/// Longest `why` or `owner`, in characters.
pub const MAX_NOTE: usize = 500;

/// Who may talk to whom. The default policy has no component and no rule: nothing is allowed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    pub(super) components: BTreeMap<ComponentName, Component>,
    pub(super) rules: Vec<Rule>,
}

impl Policy {
    /// The components, by name.
    #[must_use]
    pub const fn components(&self) -> &BTreeMap<ComponentName, Component> {
        &self.components
    }

    /// The rules, in the order of their arrows.
    #[must_use]
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }
}

/// Services of a component: each has at least one port specification, sorted and without repetition.
pub type Services = BTreeMap<ServiceName, Vec<PortSpec>>;

/// A program or group of programs with a name: the unit of segmentation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Component {
    /// The hosts that it runs on.
    pub on: On,
    /// How each of these hosts knows its processes.
    pub attach: Attachment,
    /// Its labels, which selectors in rules speak of.
    pub labels: LabelSet,
    /// Its named ports.
    pub services: Services,
}

/// The hosts that a component runs on. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum On {
    /// The hosts of these names.
    Hosts(BTreeSet<HostName>),
    /// Every host that has all of these labels, sorted by key.
    Labels(Vec<(LabelKey, LabelValue)>),
}

impl On {
    /// Whether the host `name` with `labels` is meant. The only place where host labels decide anything.
    #[must_use]
    pub fn matches(&self, name: &HostName, labels: &LabelSet) -> bool {
        match self {
            Self::Hosts(names) => names.contains(name),
            Self::Labels(wanted) => !wanted.is_empty() && has_labels(wanted, labels),
        }
    }
}

/// An allow arrow: components on the left may open flows to services of components on the right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Given by the author, or [`Rule::id_of`] its arrow.
    pub id: RuleId,
    /// Who may: at least one selector, sorted.
    pub from: Vec<Selector>,
    /// What: at least one target, sorted.
    pub to: Vec<Target>,
    /// Why the rule exists. Stays at the coordinator.
    pub why: Option<Note>,
    /// Who answers for it. Stays at the coordinator.
    pub owner: Option<Note>,
    /// When it ends, by mesh time; never, if absent.
    pub expires: Option<MeshTime>,
}

impl Rule {
    /// The rule's canonical text, `n8n, tier=app -> postgres:sql`: what its id is made from.
    #[must_use]
    pub fn arrow(&self) -> String {
        format!("{} -> {}", Joined(&self.from), Joined(&self.to))
    }

    /// The id of a rule with this canonical arrow that was not given one: the first 128 bits of SHA-256. `why`, `owner` and `expires`
    /// do not count, so that a rule which is prolonged or explained better remains the same rule.
    #[must_use]
    pub fn id_of(arrow: &str) -> RuleId {
        let digest = Sha256::new_with_prefix(b"cloison/rule/v1\n").chain_update(arrow).finalize();
        let mut id = [0; RuleId::LEN];
        id.iter_mut().zip(digest).for_each(|(to, from)| *to = from);
        RuleId(id)
    }

    /// When the rule ends; [`MeshTime::NEVER`] if it does not.
    #[must_use]
    pub fn ends(&self) -> MeshTime {
        self.expires.unwrap_or(MeshTime::NEVER)
    }
}

/// The right side of an arrow: services of the components that `selector` means.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    /// Which components.
    pub selector: Selector,
    /// What is open on them.
    pub what: What,
}

/// What a target opens.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum What {
    /// Every service that the component declares (`*`).
    AllServices,
    /// One named service; members without it are not meant.
    Service(ServiceName),
    /// Ports, whether declared or not.
    Ports(PortSpec),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.selector, self.what)
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AllServices => f.write_str("*"),
            Self::Service(name) => name.fmt(f),
            Self::Ports(ports) => ports.fmt(f),
        }
    }
}

/// A list as the arrow grammar writes it.
pub(super) struct Joined<'a, T>(pub(super) &'a [T]);

impl<T: fmt::Display> fmt::Display for Joined<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, item) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{item}")?;
        }
        Ok(())
    }
}

/// Why a text is not a [`Note`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoteError {
    /// Nothing but blanks, or more than [`MAX_NOTE`] characters.
    #[error("it must have 1 to {MAX_NOTE} characters")]
    Length,
    /// A line break, a control character, or one that changes the direction of what follows.
    #[error("it must be one line without control characters")]
    Character,
}

/// A remark for people, on one line.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Note(Box<str>);

impl Note {
    /// The remark as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for Note {
    type Err = NoteError;
    fn from_str(text: &str) -> Result<Self, NoteError> {
        let text = text.trim();
        // U+202A to U+202E and U+2066 to U+2069 reorder what is shown, U+2028 and U+2029 break lines, U+FEFF is invisible.
        let hidden = |c: char| c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}');
        if text.is_empty() || text.chars().count() > MAX_NOTE {
            return Err(NoteError::Length);
        }
        if text.contains(hidden) {
            return Err(NoteError::Character);
        }
        Ok(Self(text.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_id_is_pinned_to_its_arrow() {
        // printf 'cloison/rule/v1\nn8n -> postgres:sql' | sha256sum
        assert_eq!(
            Rule::id_of("n8n -> postgres:sql").to_string(),
            "rule_2e7dc63fc5860832a8373fa6d9b2038c"
        );
    }

    #[test]
    fn a_component_on_no_host_labels_runs_nowhere() -> Result<(), crate::label::NameError> {
        assert!(!On::Labels(Vec::new()).matches(&"db-1".parse()?, &LabelSet::new()));
        Ok(())
    }

    #[test]
    fn notes_are_one_line() {
        assert_eq!("  nightly dump\n".parse::<Note>().map(|n| n.to_string()), Ok("nightly dump".into()));
        assert_eq!(" ".parse::<Note>(), Err(NoteError::Length));
        assert_eq!("x".repeat(501).parse::<Note>(), Err(NoteError::Length));
        assert_eq!("a\nb".parse::<Note>(), Err(NoteError::Character));
        assert_eq!("a\u{202e}b".parse::<Note>(), Err(NoteError::Character));
    }
}
