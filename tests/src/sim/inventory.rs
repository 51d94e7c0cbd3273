//! Views of a mesh that stands still, by the real compiler, without a store.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, anyhow};
use cloison_coordinator::inventory::{Host, Instances, Inventory};
use cloison_coordinator::policy::Plan;
use cloison_proto::id::{HostId, MeshId};
use cloison_proto::key::{SigningKey, WgPrivateKey};
use cloison_proto::label::LabelSet;
use cloison_proto::net::{AddressPair, OverlayRange};
use cloison_proto::policy::Policy;
use cloison_proto::version::Version;
use cloison_proto::view::View;

use super::clock::MESH_START;

/// A lease of every mesh here.
pub const LEASE: Duration = Duration::from_secs(86_400);

/// A policy and its hosts.
pub struct Mesh {
    plan: Plan,
    hosts: BTreeMap<String, HostId>,
    instances: Instances,
}

/// The key of the host of this name.
#[must_use]
pub fn key_of(name: &str) -> WgPrivateKey {
    WgPrivateKey::from_bytes(seed_of(name))
}

/// The addresses that every mesh here draws from.
///
/// # Errors
/// Never.
pub fn overlay() -> Result<OverlayRange> {
    Ok(OverlayRange::new([10, 77, 0, 0].into(), 16, "fd12:3456:789a::".parse()?)?)
}

/// Reads a policy.
///
/// # Errors
/// What is wrong with it.
pub fn policy(text: &str) -> Result<Arc<Policy>> {
    let policy = cloison_proto::policy::parse(text).map_err(|findings| anyhow!("{findings:#?}"))?;
    Ok(Arc::new(policy))
}

impl Mesh {
    /// The mesh of these hosts under the policy of this text.
    ///
    /// # Errors
    /// If the policy is none.
    pub fn new(text: &str, hosts: &[&str]) -> Result<Self> {
        Self::of(&policy(text)?, hosts.iter().map(|name| (*name, LabelSet::new())))
    }

    /// The mesh of these hosts, with their labels, under this policy.
    ///
    /// # Errors
    /// If a host's name is none, or the mesh is too large.
    pub fn of<'a>(policy: &Arc<Policy>, hosts: impl IntoIterator<Item = (&'a str, LabelSet)>) -> Result<Self> {
        let hosts: BTreeMap<_, _> = hosts.into_iter().map(|(name, labels)| host(name, labels)).collect::<Result<_>>()?;
        let (mut instances, mut next) = (Instances::new(), 0);
        for (name, component) in policy.components() {
            for host in hosts.values().filter(|host| component.on.matches(&host.name, &host.labels)) {
                let pair = overlay()?.nth(next).ok_or_else(|| anyhow!("no addresses left"))?;
                instances.entry(name.clone()).or_default().insert(host.id, pair);
                next += 1;
            }
        }
        let inventory = Inventory {
            mesh: MeshId([9; 16]),
            version: Version {
                generation: MESH_START.0,
                revision: 1,
            },
            content_revision: 1,
            overlay: overlay()?,
            lease: LEASE,
            addresses: Arc::new([]),
            policy: None,
            read_only: None,
            hosts: Arc::new(hosts.values().map(|host| (host.id, host.clone())).collect()),
            instances: Arc::new(instances.clone()),
        };
        let plan = Plan::new(Arc::clone(policy), Arc::new(inventory))?;
        let hosts = hosts.into_iter().map(|(name, host)| (name, host.id)).collect();
        Ok(Self { plan, hosts, instances })
    }

    /// The policy and the mesh, joined.
    #[must_use]
    pub const fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The name of a host.
    #[must_use]
    pub fn name(&self, id: HostId) -> Option<&str> {
        self.hosts.iter().find(|(_, host)| **host == id).map(|(name, _)| name.as_str())
    }

    /// The id of a host.
    ///
    /// # Errors
    /// If there is no such host.
    pub fn id(&self, host: &str) -> Result<HostId> {
        self.hosts.get(host).copied().ok_or_else(|| anyhow!("no host {host}"))
    }

    /// The view of a host.
    ///
    /// # Errors
    /// If there is no such host.
    pub fn view(&self, host: &str) -> Result<View> {
        let id = self.id(host)?;
        let items = self.plan.items(id, &[])?.ok_or_else(|| anyhow!("no view for {host}"))?;
        Ok(View::parse(&items, id)?)
    }

    /// The addresses of the first instance of a component.
    ///
    /// # Errors
    /// If there is none.
    pub fn addresses(&self, component: &str) -> Result<AddressPair> {
        let on = self.instances.get(component);
        let first = on.and_then(|on| on.values().next());
        first.copied().ok_or_else(|| anyhow!("no instance of {component}"))
    }
}

fn host(name: &str, labels: LabelSet) -> Result<(String, Arc<Host>)> {
    let seed = seed_of(name);
    let mut id = [0xb7; 16];
    id.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from);
    let host = Host {
        id: HostId(id),
        name: name.parse()?,
        name_given: true,
        labels,
        wg_key: WgPrivateKey::from_bytes(seed).public(),
        next: None,
        identity: SigningKey::from_seed(&seed).identity(),
        enrolled_at: MESH_START,
        contested: false,
    };
    Ok((name.to_owned(), Arc::new(host)))
}

fn seed_of(name: &str) -> [u8; 32] {
    let mut seed = [0x5a; 32];
    seed.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from);
    seed
}
