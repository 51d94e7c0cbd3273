//! Meshes made by hand, for tests of what is compiled out of them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use cloison_coordinator::inventory::{Host, Instances, Inventory};
use cloison_proto::id::{HostId, MeshId};
use cloison_proto::key::{SigningKey, WgPrivateKey};
use cloison_proto::label::LabelSet;
use cloison_proto::net::OverlayRange;
use cloison_proto::policy::Policy;
use cloison_proto::version::{MeshTime, Version};

pub type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// The policy of a text.
pub fn policy(text: &str) -> Outcome<Arc<Policy>> {
    Ok(Arc::new(
        cloison_proto::policy::parse(text).map_err(|findings| format!("{findings:#?}"))?,
    ))
}

/// The host number `number`: id, keys and name follow from it.
pub fn host(number: u32, name: &str, labels: LabelSet) -> Outcome<Host> {
    let mut seed = [0x5a; 32];
    seed[..4].copy_from_slice(&number.to_be_bytes());
    let mut id = [0xb7; 16];
    id[..4].copy_from_slice(&number.to_be_bytes());
    Ok(Host {
        id: HostId(id),
        name: name.parse()?,
        name_given: true,
        labels,
        wg_key: WgPrivateKey::from_bytes(seed).public(),
        next: None,
        identity: SigningKey::from_seed(&seed).identity(),
        enrolled_at: MeshTime(1_700_000_000),
        contested: false,
    })
}

/// These hosts, with an instance of each component of the policy wherever it belongs.
pub fn inventory(policy: &Policy, hosts: impl IntoIterator<Item = Host>) -> Outcome<Arc<Inventory>> {
    let hosts: BTreeMap<_, _> = hosts.into_iter().map(|host| (host.id, Arc::new(host))).collect();
    let overlay = OverlayRange::new([10, 77, 0, 0].into(), 16, "fd12:3456:789a::".parse()?)?;
    let (mut instances, mut slot) = (Instances::new(), 0);
    for (name, component) in policy.components() {
        for host in hosts.values().filter(|host| component.on.matches(&host.name, &host.labels)) {
            let pair = overlay.nth(slot).ok_or("the range is too small for this test")?;
            instances.entry(name.clone()).or_default().insert(host.id, pair);
            slot += 1;
        }
    }
    Ok(Arc::new(Inventory {
        mesh: MeshId([9; 16]),
        version: Version {
            generation: 1_700_000_000,
            revision: 7,
        },
        content_revision: 7,
        overlay,
        lease: Duration::from_secs(86_400),
        addresses: Arc::new([]),
        policy: None,
        read_only: None,
        hosts: Arc::new(hosts),
        instances: Arc::new(instances),
    }))
}
