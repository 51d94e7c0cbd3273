//! What a change of policy opens and closes, as its author is told: by pairs of components and ports, whatever rules say it.
//!
//! A rule that is split, renamed or prolonged changes nothing here; a port range that grows shows the ports that are new. Rules that have
//! expired open nothing. Where instances run does not matter: the verdict between two components follows from the documents.

use std::collections::{BTreeMap, BTreeSet};

use cloison_proto::label::ComponentName;
use cloison_proto::net::{PortRange, PortSpec, Protocol};
use cloison_proto::policy::{Expansion, Policy, Resolver};
use cloison_proto::version::MeshTime;

/// Most changes that are listed for each direction; the rest is counted.
pub const MAX_LISTED: usize = 1_000;

/// Most pairs of components that are compared. Beyond, the answer says that it is not complete.
const MAX_PAIRS: usize = 200_000;

/// One component may reach another on these ports.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Access {
    /// Who may begin.
    pub from: ComponentName,
    /// Whom they may reach.
    pub to: ComponentName,
    /// On what.
    pub ports: PortSpec,
}

/// What a change opens and closes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AccessDiff {
    /// What was not allowed before, by pair; at most [`MAX_LISTED`].
    pub added: Vec<Access>,
    /// What is not allowed afterwards, by pair; at most [`MAX_LISTED`].
    pub removed: Vec<Access>,
    /// How many changes are not listed.
    pub unlisted: usize,
    /// Whether every pair was compared.
    pub complete: bool,
}

/// Compares what two policies allow at `now`.
#[must_use]
pub fn diff(before: &Policy, after: &Policy, now: MeshTime) -> AccessDiff {
    let (before, after) = (Reach::of(before, now), Reach::of(after, now));
    let mut diff = AccessDiff {
        complete: true,
        ..AccessDiff::default()
    };
    let mut pairs = BTreeSet::new();
    let differing = before.differing(&after).chain(after.differing(&before));
    for (from, to) in differing.flat_map(|rule| rule.from.iter().flat_map(|from| rule.to.keys().map(|to| (*from, *to)))) {
        if pairs.len() == MAX_PAIRS {
            diff.complete = false;
            break;
        }
        pairs.insert((from, to));
    }
    for (from, to) in pairs {
        let (old, new) = (before.ports(from, to), after.ports(from, to));
        let access = |ports| Access {
            from: from.clone(),
            to: to.clone(),
            ports,
        };
        diff.unlisted += fill(&mut diff.added, new.without(&old).map(access));
        diff.unlisted += fill(&mut diff.removed, old.without(&new).map(access));
    }
    diff
}

/// Adds what there is room for, and returns how many there was none for.
fn fill(list: &mut Vec<Access>, more: impl Iterator<Item = Access>) -> usize {
    let mut more = more.peekable();
    list.extend(more.by_ref().take(MAX_LISTED.saturating_sub(list.len())));
    more.count()
}

/// The rules in force of one policy, spelled out.
struct Reach<'p> {
    rules: Vec<Expansion<'p>>,
    by_from: BTreeMap<&'p ComponentName, Vec<usize>>,
    by_to: BTreeMap<&'p ComponentName, Vec<usize>>,
    /// For comparison with another policy: by canonical arrow.
    by_arrow: BTreeMap<String, usize>,
}

impl<'p> Reach<'p> {
    fn of(policy: &'p Policy, now: MeshTime) -> Self {
        let resolver = Resolver::new(policy);
        let mut reach = Self {
            rules: Vec::new(),
            by_from: BTreeMap::new(),
            by_to: BTreeMap::new(),
            by_arrow: BTreeMap::new(),
        };
        for rule in policy.rules().iter().filter(|rule| now < rule.ends()) {
            let (index, rule_reach) = (reach.rules.len(), resolver.expand(rule));
            rule_reach
                .from
                .iter()
                .for_each(|from| reach.by_from.entry(from).or_default().push(index));
            rule_reach.to.keys().for_each(|to| reach.by_to.entry(to).or_default().push(index));
            reach.by_arrow.insert(rule.arrow(), index);
            reach.rules.push(rule_reach);
        }
        reach
    }

    /// The rules that do not stand in `other` with the same meaning.
    fn differing<'s>(&'s self, other: &'s Reach<'_>) -> impl Iterator<Item = &'s Expansion<'p>> {
        let same = |arrow: &str, rule: &Expansion<'_>| other.by_arrow.get(arrow).is_some_and(|twin| other.rules[*twin] == *rule);
        let rules = self.by_arrow.iter().map(|(arrow, index)| (arrow, &self.rules[*index]));
        rules.filter(move |(arrow, rule)| !same(arrow, rule)).map(|(_, rule)| rule)
    }

    fn ports(&self, from: &ComponentName, to: &ComponentName) -> Ports {
        let by_from = self.by_from.get(from).map_or(&[][..], Vec::as_slice);
        let by_to = self.by_to.get(to).map_or(&[][..], Vec::as_slice);
        let fewer = if by_from.len() < by_to.len() { by_from } else { by_to };
        let rules = fewer
            .iter()
            .map(|index| &self.rules[*index])
            .filter(|rule| rule.from.contains(from));
        Ports::of(rules.filter_map(|rule| rule.to.get(to)).flatten().map(|opening| opening.ports))
    }
}

/// A set of ports: ranges that neither overlap nor touch, in order.
struct Ports(Vec<(Protocol, u16, u16)>);

impl Ports {
    fn of(specs: impl Iterator<Item = PortSpec>) -> Self {
        let mut ranges: Vec<_> = specs.map(range).collect();
        ranges.sort_unstable();
        let mut merged: Vec<(Protocol, u16, u16)> = Vec::new();
        for (protocol, first, last) in ranges {
            match merged.last_mut() {
                Some(open) if open.0 == protocol && first <= open.2.saturating_add(1) => open.2 = open.2.max(last),
                Some(_) | None => merged.push((protocol, first, last)),
            }
        }
        Self(merged)
    }

    /// What is in here and not in `other`.
    fn without(&self, other: &Self) -> impl Iterator<Item = PortSpec> {
        let mut left = self.0.clone();
        for (protocol, first, last) in &other.0 {
            left = left.into_iter().flat_map(|range| cut(range, (*protocol, *first, *last))).collect();
        }
        left.into_iter().filter_map(spec)
    }
}

/// What is left of a range beside another: at most a part below and a part above.
fn cut(whole: (Protocol, u16, u16), hole: (Protocol, u16, u16)) -> impl Iterator<Item = (Protocol, u16, u16)> {
    let (protocol, first, last) = whole;
    let apart = protocol != hole.0 || hole.2 < first || last < hole.1;
    let below = (!apart && first < hole.1).then(|| (protocol, first, hole.1 - 1));
    let above = (!apart && hole.2 < last).then(|| (protocol, hole.2 + 1, last));
    [apart.then_some(whole), below, above].into_iter().flatten()
}

fn range(ports: PortSpec) -> (Protocol, u16, u16) {
    match ports {
        PortSpec::Tcp(range) | PortSpec::Udp(range) => (ports.protocol(), range.first(), range.last()),
        PortSpec::Icmp => (Protocol::Icmp, 1, 1),
    }
}

fn spec((protocol, first, last): (Protocol, u16, u16)) -> Option<PortSpec> {
    match protocol {
        Protocol::Tcp => PortRange::new(first, last).ok().map(PortSpec::Tcp),
        Protocol::Udp => PortRange::new(first, last).ok().map(PortSpec::Udp),
        Protocol::Icmp => Some(PortSpec::Icmp),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cloison_proto::policy::parse;

    fn changes(before: &str, after: &str) -> Result<(Vec<String>, Vec<String>), String> {
        let policy = |rules: &str| {
            let components =
                "a: {on: h1, attach: host, labels: {t: x}}\n  b: {on: h2, attach: host, labels: {t: x}, services: {s: [tcp/80-90, icmp]}}";
            parse(&format!("version: 1\ncomponents:\n  {components}\nallow:\n{rules}")).map_err(|e| format!("{e:?}"))
        };
        let found = diff(&policy(before)?, &policy(after)?, MeshTime(1_700_000_000));
        let lines = |list: &[Access]| list.iter().map(|a| format!("{} {} {}", a.from, a.to, a.ports)).collect();
        Ok((lines(&found.added), lines(&found.removed)))
    }

    #[test]
    fn a_new_rule_adds_and_a_dropped_one_removes() -> Result<(), String> {
        let (rule, none) = ("- a -> b:s", "  []");
        assert_eq!(changes(none, rule)?.0, ["a b tcp/80-90", "a b icmp"]);
        assert_eq!(changes(rule, none)?.1, ["a b tcp/80-90", "a b icmp"]);
        assert_eq!(changes(rule, rule)?, (vec![], vec![]));
        Ok(())
    }

    #[test]
    fn saying_the_same_otherwise_changes_nothing() -> Result<(), String> {
        let same = changes("- a -> b:s", "- a -> b:icmp\n- a -> b:tcp/80-84, b:tcp/83-90")?;
        assert_eq!(same, (vec![], vec![]));
        let prolonged = changes("- {from: a, to: b:s, expires: 2030-01-01T00:00:00Z}", "- a -> b:s")?;
        assert_eq!(prolonged, (vec![], vec![]));
        Ok(())
    }

    #[test]
    fn only_the_ports_that_differ_are_named() -> Result<(), String> {
        assert_eq!(
            changes("- a -> b:tcp/100-200", "- a -> b:tcp/90-150, b:tcp/160-210")?,
            (
                vec!["a b tcp/90-99".into(), "a b tcp/201-210".into()],
                vec!["a b tcp/151-159".into()]
            )
        );
        Ok(())
    }

    #[test]
    fn an_expired_rule_opens_nothing() -> Result<(), String> {
        assert_eq!(
            changes("  []", "- {from: a, to: b:s, expires: 2001-01-01T00:00:00Z}")?,
            (vec![], vec![])
        );
        Ok(())
    }

    #[test]
    fn labels_are_spelled_out() -> Result<(), String> {
        let added = changes("  []", "- t=x -> t=x:tcp/1")?.0;
        assert_eq!(added, ["a a tcp/1", "a b tcp/1", "b a tcp/1", "b b tcp/1"]);
        Ok(())
    }
}
