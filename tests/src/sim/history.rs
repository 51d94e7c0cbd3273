//! What was allowed at which version: the state of the mesh at each revision, judged by the naive evaluator.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use cloison_coordinator::inventory::{Instances, Inventory};
use cloison_proto::id::HostId;
use cloison_proto::label::ComponentName;
use cloison_proto::net::Protocol;
use cloison_proto::policy::Policy;
use cloison_proto::version::{MeshTime, Version};

use crate::model;

/// An instance: a component on a host.
pub type Instance = (ComponentName, HostId);

/// All states of one mesh.
#[derive(Default)]
pub struct History {
    states: BTreeMap<u64, State>,
    /// Who has an address, forever.
    owners: BTreeMap<IpAddr, Instance>,
}

/// The mesh at one revision.
pub struct State {
    policy: Arc<Policy>,
    instances: Arc<Instances>,
}

impl History {
    /// Takes down the mesh as it is now.
    ///
    /// # Errors
    /// If an address moved from one instance to another (DESIGN: addresses).
    pub fn note(&mut self, inventory: &Inventory, policy: &Arc<Policy>) -> Result<()> {
        for (component, on) in inventory.instances.iter() {
            for (host, pair) in on {
                for address in pair.both() {
                    let instance = (component.clone(), *host);
                    let owner = self.owners.entry(address).or_insert_with(|| instance.clone());
                    ensure!(*owner == instance, "{address} moved from {owner:?} to {instance:?}");
                }
            }
        }
        let state = State {
            policy: Arc::clone(policy),
            instances: Arc::clone(&inventory.instances),
        };
        self.states.insert(inventory.version.revision, state);
        Ok(())
    }

    /// The mesh at this version.
    ///
    /// # Errors
    /// If there was none.
    pub fn at(&self, version: Version) -> Result<&State> {
        let (_, state) = self
            .states
            .range(..=version.revision)
            .next_back()
            .context("a version before the first")?;
        Ok(state)
    }

    /// Whose address it is.
    #[must_use]
    pub fn owner(&self, address: IpAddr) -> Option<&Instance> {
        self.owners.get(&address)
    }
}

impl State {
    /// Whether `from` may begin a conversation with `to`.
    #[must_use]
    pub fn may(&self, from: &Instance, to: &Instance, packet: (Protocol, u16), now: MeshTime) -> bool {
        self.has(from) && self.has(to) && model::may(&self.policy, (&from.0, from.1), (&to.0, to.1), packet, now)
    }

    /// Every instance with its addresses of one family.
    #[must_use]
    pub fn instances(&self, v6: bool) -> Vec<(Instance, IpAddr)> {
        let all = self
            .instances
            .iter()
            .flat_map(|(component, on)| on.iter().map(move |(host, pair)| (component, host, pair)));
        let of = |(component, host, pair): (&ComponentName, &HostId, &cloison_proto::net::AddressPair)| {
            let address = if v6 { pair.v6.into() } else { pair.v4.into() };
            ((component.clone(), *host), address)
        };
        all.map(of).collect()
    }

    /// The hosts that have an instance.
    #[must_use]
    pub fn hosts(&self) -> BTreeSet<HostId> {
        self.instances.values().flat_map(BTreeMap::keys).copied().collect()
    }

    fn has(&self, instance: &Instance) -> bool {
        self.instances.get(&instance.0).is_some_and(|on| on.contains_key(&instance.1))
    }
}
