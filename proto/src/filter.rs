//! The compiled table: who may begin a conversation with whom, on what, by which rule.
//!
//! [`Table::check`] is **the** verdict of the project: the data plane, `explain` and the tests all call it on a table made from the same view.
//! An empty table, an unknown address and a rule without grants all deny. The table says nothing about who sent a packet (the session does)
//! nor which instances are of this host's TUNs (the engine does).

use std::net::IpAddr;

use foldhash::fast::FixedState;
use hashbrown::HashMap;

use crate::id::{HostId, RuleId};
use crate::label::{ComponentName, ServiceName};
use crate::net::{AddressPair, PortSpec, Protocol};
use crate::verdict::DropReason;
use crate::version::MeshTime;
use crate::view::View;

/// Position of an instance in its table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceIndex(pub u32);

/// Position of a rule in its table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleIndex(pub u32);

/// An instance as the table knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// The component.
    pub component: ComponentName,
    /// The host that it runs on.
    pub host: HostId,
    /// Whether that is this host.
    pub local: bool,
    /// Its addresses.
    pub addresses: AddressPair,
}

/// What [`Table::check`] finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// A rule in force allows it, until that rule's end.
    Allowed {
        /// The rule: the first of those that allow it, in the order of their ids.
        rule: RuleIndex,
        /// When it expires; [`MeshTime::NEVER`] if it does not.
        until: MeshTime,
    },
    /// Nothing allows it.
    Denied(DropReason),
}

impl Verdict {
    /// Whether it is allowed.
    #[must_use]
    pub const fn is_allowed(self) -> bool {
        matches!(self, Self::Allowed { .. })
    }
}

#[derive(Debug, Clone, Copy)]
struct Opening {
    ports: PortSpec,
    rule: RuleIndex,
    until: MeshTime,
}

/// The table of one view. `Default` is the empty one, which denies everything.
#[derive(Debug, Clone, Default)]
pub struct Table {
    instances: Vec<Instance>,
    by_address: HashMap<IpAddr, InstanceIndex, FixedState>,
    rules: Vec<RuleId>,
    /// Openings per (source, destination). Addresses and pairs come from a signed view, so that nobody can choose keys that collide.
    pairs: HashMap<(InstanceIndex, InstanceIndex), Vec<Opening>, FixedState>,
    services: Vec<(ComponentName, ServiceName, PortSpec)>,
}

impl Table {
    /// Compiles the rules of a view.
    #[must_use]
    pub fn new(view: &View) -> Self {
        let mut table = Self::default();
        let local = view
            .instances
            .values()
            .map(|i| (i.component.clone(), view.host.id, true, i.addresses));
        let remote = view.remotes.iter().map(|r| (r.component.clone(), r.host, false, r.addresses));
        for (component, host, local, addresses) in local.chain(remote) {
            table.add_instance(Instance {
                component,
                host,
                local,
                addresses,
            });
        }
        let instances = table.instances.clone();
        let mut members: HashMap<&ComponentName, Vec<InstanceIndex>, FixedState> = HashMap::default();
        for (position, instance) in instances.iter().enumerate() {
            members
                .entry(&instance.component)
                .or_default()
                .extend(u32::try_from(position).ok().map(InstanceIndex));
        }
        let mut rules: Vec<_> = view.rules.iter().collect();
        rules.sort_by(|a, b| (a.id, &a.from, &a.to).cmp(&(b.id, &b.from, &b.to)));
        for item in rules {
            let rule = table.rule_index(item.id);
            let openings = item.grants.iter().map(|g| Opening {
                ports: g.ports,
                rule,
                until: item.expires,
            });
            let openings: Vec<_> = openings.collect();
            for from in members.get(&item.from).into_iter().flatten() {
                for to in members.get(&item.to).into_iter().flatten() {
                    table.open(*from, *to, &openings);
                }
            }
            let named = item
                .grants
                .iter()
                .filter_map(|g| Some((item.to.clone(), g.service.clone()?, g.ports)));
            table.services.extend(named);
        }
        table.services.sort();
        table.services.dedup();
        table
    }

    fn add_instance(&mut self, instance: Instance) {
        let Ok(position) = u32::try_from(self.instances.len()) else {
            return;
        };
        for address in instance.addresses.both() {
            self.by_address.insert(address, InstanceIndex(position));
        }
        self.instances.push(instance);
    }

    fn rule_index(&mut self, id: RuleId) -> RuleIndex {
        if self.rules.last() != Some(&id) {
            self.rules.push(id);
        }
        RuleIndex(u32::try_from(self.rules.len().saturating_sub(1)).unwrap_or(u32::MAX))
    }

    /// Opens one pair. An instance towards itself stays in its kernel, and a pair of two other hosts is none of ours.
    fn open(&mut self, from: InstanceIndex, to: InstanceIndex, openings: &[Opening]) {
        let ours = [from, to].iter().any(|i| self.instance(*i).is_some_and(|i| i.local));
        if ours && from != to {
            self.pairs.entry((from, to)).or_default().extend_from_slice(openings);
        }
    }

    /// The verdict for the first packet of a conversation of `protocol` to `port` (ignored for ICMP echo), at mesh time `now`.
    #[must_use]
    pub fn check(&self, source: IpAddr, destination: IpAddr, protocol: Protocol, port: u16, now: MeshTime) -> Verdict {
        let Some(from) = self.lookup(source) else {
            return Verdict::Denied(DropReason::NoRule);
        };
        let Some(to) = self.lookup(destination) else {
            return Verdict::Denied(DropReason::UnknownDestination);
        };
        self.check_pair(from, to, protocol, port, now)
    }

    /// [`Table::check`] for instances that were looked up before.
    #[must_use]
    pub fn check_pair(&self, from: InstanceIndex, to: InstanceIndex, protocol: Protocol, port: u16, now: MeshTime) -> Verdict {
        let mut denied = DropReason::NoRule;
        for opening in self.pairs.get(&(from, to)).into_iter().flatten() {
            if opening.ports.covers(protocol, port) {
                if now < opening.until {
                    return Verdict::Allowed {
                        rule: opening.rule,
                        until: opening.until,
                    };
                }
                denied = DropReason::RuleExpired;
            }
        }
        Verdict::Denied(denied)
    }

    /// The instance of an address.
    #[must_use]
    pub fn lookup(&self, address: IpAddr) -> Option<InstanceIndex> {
        self.by_address.get(&address).copied()
    }

    /// An instance by its position.
    #[must_use]
    pub fn instance(&self, index: InstanceIndex) -> Option<&Instance> {
        self.instances.get(usize::try_from(index.0).ok()?)
    }

    /// All instances, in the order of their positions.
    #[must_use]
    pub fn instances(&self) -> &[Instance] {
        &self.instances
    }

    /// A rule by its position.
    #[must_use]
    pub fn rule(&self, index: RuleIndex) -> Option<RuleId> {
        self.rules.get(usize::try_from(index.0).ok()?).copied()
    }

    /// What a service of a component is, as far as a rule of this view names it.
    pub fn service<'a>(&'a self, component: &'a ComponentName, service: &'a ServiceName) -> impl Iterator<Item = PortSpec> + 'a {
        self.services
            .iter()
            .filter(move |(c, s, _)| c == component && s == service)
            .map(|(_, _, ports)| *ports)
    }

    /// Every ordered pair of instances between which something is open, whether expired or not.
    pub fn open_pairs(&self) -> impl Iterator<Item = (InstanceIndex, InstanceIndex)> + '_ {
        self.pairs.keys().copied()
    }
}
