//! For tests, in this crate and others (feature `testing`): arbitrary policies, and the body of the fuzz target.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::sample::{Index, select, subsequence};

use super::attachment::Attachment;
use super::model::{Component, Note, On, Policy, Rule, Services, Target, What};
use crate::id::RuleId;
use crate::label::{ComponentName, LabelKey, LabelSet, LabelValue, Selector};
use crate::net::{PortRange, PortSpec};
use crate::version::MeshTime;

/// What any bytes must do: never panic, and if they are a policy, have one canonical text that means the same.
///
/// # Panics
/// If they do not.
pub fn fuzz_policy(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match super::parse(text) {
        Err(diagnostics) => assert!(!diagnostics.is_empty(), "refused without a reason"),
        Ok(policy) => {
            let printed = super::print(&policy);
            assert_eq!(
                super::parse(&printed).as_ref(),
                Ok(&policy),
                "the canonical text means something else:\n{printed}"
            );
            assert_eq!(
                super::parse(&printed).map(|p| super::print(&p)),
                Ok(printed),
                "the canonical text is not canonical"
            );
            policy
                .grants()
                .take(10_000)
                .for_each(|g| assert!(!g.opens.is_empty(), "a grant of nothing: {g:?}"));
        }
    }
}

/// Any policy with up to 8 components, on up to 6 hosts named `h0` to `h5` with labels `role`, `zone`; the labels of components are
/// `tier`, `env` and `team`. Every kind of selector, target, attachment and remark occurs.
pub fn policies() -> impl Strategy<Value = Policy> {
    let components = proptest::collection::vec(component(), 0..8);
    (components, proptest::collection::vec(rule(), 0..8)).prop_map(|(components, rules)| build(components, &rules))
}

/// A component without its name.
type Parts = (On, Attachment, LabelSet, Services);

/// A rule as choices, to be applied to the components that there are.
#[derive(Debug, Clone)]
struct Choices {
    from: Vec<(Index, bool)>,
    to: Vec<(Index, bool, u8, Index)>,
    why: Option<Note>,
    owner: Option<Note>,
    expires: Option<u32>,
    id: Option<[u8; 16]>,
}

/// Names that are also words of YAML or look like numbers are part of the trade.
const NAMES: [&str; 8] = ["n8n", "postgres", "null", "true", "no", "8080", "1e3", "a-b-c"];

fn component() -> impl Strategy<Value = Parts> {
    (on(), attachment(), labels(&["tier", "env", "team"]), services())
}

fn on() -> impl Strategy<Value = On> {
    let hosts: Vec<_> = (0..6).filter_map(|i| format!("h{i}").parse().ok()).collect();
    prop_oneof![
        subsequence(hosts, 1..=3).prop_map(|names| On::Hosts(names.into_iter().collect())),
        labels(&["role", "zone"]).prop_filter_map("a component needs a host", |l| (!l.is_empty())
            .then(|| On::Labels(l.into_iter().collect()))),
    ]
}

fn attachment() -> impl Strategy<Value = Attachment> {
    select(vec![
        "host",
        "user:postgres",
        "user:1000",
        "unit:n8n.service",
        r"unit:a\x2db@1.service",
        "cgroup:/system.slice/x{y}:",
        "container:docker:n8n",
        "container:podman:label=a.b/c=d\"e#",
        "netns:/run/netns/x",
    ])
    .prop_filter_map("an attachment", |text| text.parse().ok())
}

fn labels(keys: &'static [&'static str]) -> impl Strategy<Value = LabelSet> {
    let label = (select(keys), select(vec!["app", "data", "null", "1"]));
    proptest::collection::vec(label, 0..3).prop_map(|pairs| {
        let parse = |(k, v): (&str, &str)| Some((k.parse::<LabelKey>().ok()?, v.parse::<LabelValue>().ok()?));
        pairs.into_iter().filter_map(parse).collect()
    })
}

fn services() -> impl Strategy<Value = Services> {
    let ports = proptest::collection::btree_set(port_spec(), 1..3).prop_map(|set| set.into_iter().collect());
    let service = (select(vec!["sql", "web", "80", "null"]), ports);
    proptest::collection::vec(service, 0..3)
        .prop_map(|services: Vec<(&str, Vec<PortSpec>)>| services.into_iter().filter_map(|(n, p)| Some((n.parse().ok()?, p))).collect())
}

/// Any port specification.
pub fn port_spec() -> impl Strategy<Value = PortSpec> {
    let edge = prop_oneof![select(vec![1u16, 2, 80, 65_534, 65_535]), 1u16..];
    let range = (edge.clone(), edge).prop_filter_map("a port range", |(a, b)| PortRange::new(a.min(b), a.max(b)).ok());
    prop_oneof![
        range.clone().prop_map(PortSpec::Tcp),
        range.prop_map(PortSpec::Udp),
        Just(PortSpec::Icmp)
    ]
}

fn note() -> impl Strategy<Value = Option<Note>> {
    proptest::option::of("[ -~é-ü😀-😆]{1,20}".prop_filter_map("a note", |t| t.parse().ok()))
}

fn rule() -> impl Strategy<Value = Choices> {
    let from = proptest::collection::vec(any::<(Index, bool)>(), 1..3);
    let to = proptest::collection::vec(any::<(Index, bool, u8, Index)>(), 1..3);
    let id = proptest::option::weighted(0.2, any::<[u8; 16]>());
    (from, to, note(), note(), any::<Option<u32>>(), id).prop_map(|(from, to, why, owner, expires, id)| Choices {
        from,
        to,
        why,
        owner,
        expires,
        id,
    })
}

/// A policy out of the choices: those that would be refused are left out.
fn build(parts: Vec<Parts>, choices: &[Choices]) -> Policy {
    let mut policy = Policy::default();
    let mut claimed = BTreeSet::new();
    for (name, (on, attach, labels, services)) in NAMES.iter().zip(parts) {
        let taken = match &on {
            On::Hosts(hosts) => hosts.iter().any(|h| !claimed.insert((h.clone(), attach.clone()))),
            On::Labels(_) => false,
        };
        if let (false, Ok(name)) = (taken, name.parse()) {
            policy.components.insert(
                name,
                Component {
                    on,
                    attach,
                    labels,
                    services,
                },
            );
        }
    }
    let rules: BTreeMap<_, _> = choices
        .iter()
        .filter_map(|c| c.rule(&policy))
        .map(|r| ((r.from.clone(), r.to.clone()), r))
        .collect();
    let mut ids = BTreeSet::new();
    policy.rules = rules.into_values().filter(|r| ids.insert(r.id)).collect();
    policy
}

impl Choices {
    fn rule(&self, policy: &Policy) -> Option<Rule> {
        if policy.components.is_empty() {
            return None;
        }
        let from: BTreeSet<_> = self.from.iter().map(|(i, by_label)| selector(policy, *i, *by_label).1).collect();
        let to: Option<BTreeSet<_>> = self.to.iter().map(|choice| target(policy, *choice)).collect();
        let mut rule = Rule {
            id: RuleId([0; 16]),
            from: from.into_iter().collect(),
            to: to?.into_iter().collect(),
            why: self.why.clone(),
            owner: self.owner.clone(),
            expires: self.expires.map(|s| MeshTime(s.into())),
        };
        rule.id = self.id.map_or_else(|| Rule::id_of(&rule.arrow()), RuleId);
        Some(rule)
    }
}

/// One of the components, and a selector that means it.
fn selector(policy: &Policy, which: Index, by_label: bool) -> (&Component, Selector) {
    let all: Vec<(&ComponentName, &Component)> = policy.components.iter().collect();
    let (name, component) = *which.get(&all);
    let selector = match by_label && !component.labels.is_empty() {
        true => Selector::Labels(component.labels.iter().map(|(k, v)| (k.clone(), v.clone())).collect()),
        false => Selector::Name(name.clone()),
    };
    (component, selector)
}

fn target(policy: &Policy, (which, by_label, kind, service): (Index, bool, u8, Index)) -> Option<Target> {
    let (component, selector) = selector(policy, which, by_label);
    let names: Vec<_> = component.services.keys().collect();
    let what = match (kind % 4, names.as_slice()) {
        (0, _) | (_, []) => What::Ports(PortSpec::Tcp(PortRange::new(80, 81 + u16::from(kind)).ok()?)),
        (1, _) => What::Ports(PortSpec::Icmp),
        (2, _) => What::AllServices,
        (_, names) => What::Service((*service.get(names)).clone()),
    };
    Some(Target { selector, what })
}
