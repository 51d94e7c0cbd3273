//! A policy and an inventory, joined: which components each rule means, where their instances are, and which rules concern which host.
//!
//! [`cloison_proto::policy::Resolver`] says which components a rule means; afterwards everything is a walk from a host to its components,
//! their rules and the rules' other ends. So the work for one view is proportional to that view, and the work for the whole plan to the sum
//! of the sizes of its rules' sides: never to hosts times rules.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use cloison_proto::id::{HostId, RuleId};
use cloison_proto::label::{ComponentName, HostName};
use cloison_proto::net::AddressPair;
use cloison_proto::policy::{Attachment, Component, Expansion, Opening, Policy, Resolver, Rule};
use cloison_proto::version::MeshTime;
use cloison_proto::view::Grant;

use super::compile::{Encoded, ViewLimit};
use crate::inventory::Inventory;

/// Position of a component in its plan.
pub(super) type MemberIndex = usize;

/// Position of a rule in its plan, and in its policy.
pub(super) type RuleIndex = usize;

/// Most components that the sides of all rules together may mean: what a plan may take of memory, some 200 MiB.
const MAX_ENDS: usize = 8_000_000;

/// A policy and an inventory, joined and indexed.
#[derive(Debug)]
pub struct Plan {
    pub(super) inventory: Arc<Inventory>,
    pub(super) policy: Arc<Policy>,
    /// The policy's components, by name.
    pub(super) members: Vec<Member>,
    /// The policy's rules, in its order.
    pub(super) rules: Vec<Resolved>,
    /// The components of each host that has any, by name.
    pub(super) local: BTreeMap<HostId, Vec<MemberIndex>>,
    /// What is the same in every view that has it, encoded once.
    pub(super) encoded: OnceLock<Encoded>,
}

/// A component with its instances and rules.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) name: ComponentName,
    pub(super) attachment: Attachment,
    /// Where it runs, by host id.
    pub(super) instances: Vec<(HostId, AddressPair)>,
    /// Rules that it may begin by.
    pub(super) outgoing: Vec<RuleIndex>,
    /// Rules by which it may be reached, and its place among their targets.
    pub(super) incoming: Vec<(RuleIndex, usize)>,
}

/// A rule with what it means: components and grants instead of selectors.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Resolved {
    pub(super) id: RuleId,
    pub(super) expires: MeshTime,
    /// Who may begin, sorted.
    pub(super) from: Vec<MemberIndex>,
    /// Whom they may reach, sorted, and on what. Never without a grant.
    pub(super) to: Vec<(MemberIndex, Vec<Grant>)>,
}

/// Two components of one host that claim the same processes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
#[error("{first} and {second} both attach as {attachment} on host {host}: a process can be one component only")]
pub struct Conflict {
    /// The host.
    pub host: HostName,
    /// What both claim.
    pub attachment: String,
    /// One of them.
    pub first: ComponentName,
    /// The other.
    pub second: ComponentName,
    /// Whether both claim the whole host: at most one component may (a change that makes two is refused).
    pub whole_host: bool,
}

impl Plan {
    /// Joins a policy and an inventory.
    ///
    /// # Errors
    /// [`ViewLimit::Ends`] if the rules mean more than a plan can hold.
    pub fn new(policy: Arc<Policy>, inventory: Arc<Inventory>) -> Result<Self, ViewLimit> {
        let mut members: Vec<_> = policy
            .components()
            .iter()
            .map(|(name, c)| Member::new(name, c, &inventory))
            .collect();
        let rules = resolve(&policy, &members)?;
        let mut local = BTreeMap::<HostId, Vec<MemberIndex>>::new();
        for (index, member) in members.iter().enumerate() {
            for (host, _) in &member.instances {
                local.entry(*host).or_default().push(index);
            }
        }
        for (index, rule) in rules.iter().enumerate() {
            // A rule without any grant opens nothing and concerns nobody.
            for from in rule.from.iter().filter(|_| !rule.to.is_empty()) {
                members[*from].outgoing.push(index);
            }
            for (place, (to, _)) in rule.to.iter().enumerate() {
                members[*to].incoming.push((index, place));
            }
        }
        Ok(Self {
            inventory,
            policy,
            members,
            rules,
            local,
            encoded: OnceLock::new(),
        })
    }

    /// The inventory that was joined.
    #[must_use]
    pub const fn inventory(&self) -> &Arc<Inventory> {
        &self.inventory
    }

    /// The policy that was joined.
    #[must_use]
    pub const fn policy(&self) -> &Arc<Policy> {
        &self.policy
    }

    /// Components that claim the same processes of a host, in the order of the hosts' ids.
    #[must_use]
    pub fn conflicts(&self) -> Vec<Conflict> {
        let mut found = Vec::new();
        for (host, local) in &self.local {
            let Some(host) = self.inventory.hosts.get(host) else { continue };
            let mut claims = BTreeMap::<String, &Member>::new();
            for member in local.iter().map(|m| &self.members[*m]) {
                let attachment = member.attachment.to_string();
                match claims.get(&attachment) {
                    None => drop(claims.insert(attachment, member)),
                    Some(first) => found.push(Conflict {
                        host: host.name.clone(),
                        first: first.name.clone(),
                        second: member.name.clone(),
                        whole_host: member.attachment == Attachment::Host,
                        attachment,
                    }),
                }
            }
        }
        found
    }

    pub(super) fn member(&self, name: &ComponentName) -> Option<MemberIndex> {
        self.members.binary_search_by(|m| m.name.cmp(name)).ok()
    }

    /// Every rule that opens something from one component to another, and what.
    pub(super) fn openings(&self, from: MemberIndex, to: MemberIndex) -> impl Iterator<Item = (&Resolved, &[Grant])> {
        let incoming = self.members[to].incoming.iter();
        let opened = incoming.map(|(rule, place)| (&self.rules[*rule], *place));
        let opened = opened.filter(move |(rule, _)| rule.from.binary_search(&from).is_ok());
        opened.map(|(rule, place)| (rule, rule.to[place].1.as_slice()))
    }
}

impl Member {
    fn new(name: &ComponentName, component: &Component, inventory: &Inventory) -> Self {
        let on = inventory.instances.get(name).into_iter().flatten();
        Self {
            name: name.clone(),
            attachment: component.attach.clone(),
            instances: on
                .filter(|(host, _)| inventory.hosts.contains_key(host))
                .map(|(host, pair)| (*host, *pair))
                .collect(),
            outgoing: Vec::new(),
            incoming: Vec::new(),
        }
    }

    /// The addresses of its instance on `host`.
    pub(super) fn on(&self, host: HostId) -> Option<AddressPair> {
        let found = self.instances.binary_search_by(|(on, _)| on.cmp(&host));
        found.ok().map(|place| self.instances[place].1)
    }

    /// Whether it has an instance on another host than `host`.
    pub(super) fn runs_elsewhere(&self, host: HostId) -> bool {
        self.instances.iter().any(|(on, _)| *on != host)
    }
}

/// The rules with components instead of selectors.
fn resolve(policy: &Policy, members: &[Member]) -> Result<Vec<Resolved>, ViewLimit> {
    let index = |name: &ComponentName| members.binary_search_by(|m| m.name.cmp(name)).ok();
    let resolver = Resolver::new(policy);
    let mut ends = 0_usize;
    let resolved = policy.rules().iter().map(|rule: &Rule| {
        let Expansion { from, to } = resolver.expand(rule);
        ends = ends.saturating_add(from.len()).saturating_add(to.values().map(Vec::len).sum());
        if ends > MAX_ENDS {
            return Err(ViewLimit::Ends { limit: MAX_ENDS });
        }
        let to = to
            .into_iter()
            .filter_map(|(to, opens)| Some((index(to)?, opens.iter().map(grant).collect())));
        Ok(Resolved {
            id: rule.id,
            expires: rule.ends(),
            from: from.into_iter().filter_map(index).collect(),
            to: to.collect(),
        })
    });
    resolved.collect()
}

fn grant(opening: &Opening<'_>) -> Grant {
    Grant {
        ports: opening.ports,
        service: opening.service.cloned(),
    }
}
