//! The naive evaluator: what a policy means, said as simply as possible.
//!
//! It reads the policy rule by rule and component by component for each question, knows no index, no view and no table, and shares no code
//! with the compiler, not even the evaluation of labels. Tests compare everything else with it.

use cloison_proto::id::{HostId, RuleId};
use cloison_proto::label::{ComponentName, Selector};
use cloison_proto::net::{PortSpec, Protocol};
use cloison_proto::policy::{Component, Policy, Rule, What};
use cloison_proto::version::MeshTime;

/// An instance: a component on a host.
pub type Instance<'a> = (&'a ComponentName, HostId);

/// The first packet of a conversation: protocol, and port unless it is ICMP.
pub type Packet = (Protocol, u16);

/// Whether the policy lets `from` begin a conversation with `to` at `now`.
#[must_use]
pub fn may(policy: &Policy, from: Instance<'_>, to: Instance<'_>, packet: Packet, now: MeshTime) -> bool {
    allowing(policy, from, to, packet)
        .iter()
        .any(|rule| rule.expires.is_none_or(|end| now < end))
}

/// The rules, expired or not, that let `from` begin this conversation with `to`.
#[must_use]
pub fn allowing<'p>(policy: &'p Policy, from: Instance<'_>, to: Instance<'_>, packet: Packet) -> Vec<&'p Rule> {
    let covers = |ports: &PortSpec| match (ports, packet.0) {
        (PortSpec::Tcp(r), Protocol::Tcp) | (PortSpec::Udp(r), Protocol::Udp) => r.first() <= packet.1 && packet.1 <= r.last(),
        (PortSpec::Icmp, Protocol::Icmp) => true,
        _ => false,
    };
    let rules = policy.rules().iter();
    rules
        .filter(|rule| from != to && opened(policy, rule, from.0, to.0).iter().any(covers))
        .collect()
}

/// The rules, expired or not, that let `from` begin any conversation at all with `to`.
#[must_use]
pub fn pairing(policy: &Policy, from: Instance<'_>, to: Instance<'_>) -> Vec<RuleId> {
    let rules = policy.rules().iter();
    rules
        .filter(|rule| from != to && !opened(policy, rule, from.0, to.0).is_empty())
        .map(|rule| rule.id)
        .collect()
}

/// All that one rule opens from one component to another.
fn opened(policy: &Policy, rule: &Rule, from: &ComponentName, to: &ComponentName) -> Vec<PortSpec> {
    let mut ports = Vec::new();
    let (Some(source), Some(destination)) = (policy.components().get(from), policy.components().get(to)) else {
        return ports;
    };
    if !rule.from.iter().any(|selector| means(selector, from, source)) {
        return ports;
    }
    for target in &rule.to {
        if means(&target.selector, to, destination) {
            for (name, of_service) in &destination.services {
                let wanted = match &target.what {
                    What::AllServices => true,
                    What::Service(service) => service == name,
                    What::Ports(_) => false,
                };
                if wanted {
                    ports.extend(of_service);
                }
            }
            if let What::Ports(given) = &target.what {
                ports.push(*given);
            }
        }
    }
    ports
}

fn means(selector: &Selector, name: &ComponentName, component: &Component) -> bool {
    match selector {
        Selector::Name(wanted) => wanted.as_str() == name.as_str(),
        Selector::Labels(wanted) => {
            let has = |key: &str, value: &str| component.labels.iter().any(|(k, v)| k.as_str() == key && v.as_str() == value);
            !wanted.is_empty() && wanted.iter().all(|(key, value)| has(key.as_str(), value.as_str()))
        }
    }
}
