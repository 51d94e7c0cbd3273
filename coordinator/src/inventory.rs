//! What the mesh consists of at one revision: an immutable snapshot that the compiler, the publisher and the API read without touching the
//! store. The store makes a new one with every change, inside the transaction, and hands it out once the change is durable.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use cloison_proto::id::{HostId, MeshId};
use cloison_proto::key::{IdentityKey, WgPublicKey};
use cloison_proto::label::{ComponentName, HostName, LabelKey, LabelSet, LabelValue, has_labels};
use cloison_proto::net::{AddressPair, OverlayRange};
use cloison_proto::version::{MeshTime, Version};
use serde::{Deserialize, Serialize};

/// The mesh's state at one revision. Revoked hosts and vanished instances are not in it.
#[derive(Debug, Clone)]
pub struct Inventory {
    /// Which mesh.
    pub mesh: MeshId,
    /// Generation and revision of this snapshot.
    pub version: Version,
    /// The revision at which anything below last changed: two snapshots with the same one have the same content.
    pub content_revision: u64,
    /// Where addresses are drawn from.
    pub overlay: OverlayRange,
    /// How long a view may be used without contact with the coordinator.
    pub lease: Duration,
    /// Where agents reach the coordinator, each from its time on.
    pub addresses: Arc<[CoordinatorAddress]>,
    /// The policy in force, if any was ever applied.
    pub policy: Option<Arc<StoredPolicy>>,
    /// Whether this state may be older than what agents have: then nothing changes and nothing is published.
    pub read_only: Option<ReadOnly>,
    /// Every host that is enrolled and not revoked.
    pub hosts: Arc<Hosts>,
    /// Every instance: which component runs on which host, and its addresses.
    pub instances: Arc<Instances>,
}

/// Since when, and why, a coordinator changes and publishes nothing: agents may know better than its database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadOnly {
    /// Why.
    pub why: Doubt,
    /// Since when.
    pub since: MeshTime,
}

/// Why a database may be behind its own mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doubt {
    /// It came from a backup.
    Restored,
    /// An agent showed a view that this coordinator signed and does not know.
    Behind,
}

impl Doubt {
    /// The word that is kept.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Restored => "restored",
            Self::Behind => "behind",
        }
    }
}

impl FromStr for Doubt {
    type Err = UnknownDoubt;
    fn from_str(text: &str) -> Result<Self, UnknownDoubt> {
        [Self::Restored, Self::Behind]
            .into_iter()
            .find(|doubt| doubt.as_str() == text)
            .ok_or_else(|| UnknownDoubt(text.into()))
    }
}

/// Not one of the words for a doubt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no reason to be read-only")]
pub struct UnknownDoubt(String);

impl fmt::Display for ReadOnly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.why {
            Doubt::Restored => "this coordinator was restored from a backup, and agents may know better",
            Doubt::Behind => "an agent has a newer view than this coordinator remembers: its database is an old one",
        })?;
        f.write_str(": it changes, publishes and enrolls nothing until `cloison-coordinator recover` on its machine")
    }
}

/// Hosts by id.
pub type Hosts = BTreeMap<HostId, Arc<Host>>;

/// Components, the hosts they run on, and each instance's addresses.
pub type Instances = BTreeMap<ComponentName, BTreeMap<HostId, AddressPair>>;

impl Inventory {
    /// The host of this name.
    #[must_use]
    pub fn host_named(&self, name: &HostName) -> Option<&Arc<Host>> {
        self.hosts.values().find(|host| &host.name == name)
    }

    /// The instances on `host`.
    pub fn instances_on(&self, host: HostId) -> impl Iterator<Item = (&ComponentName, AddressPair)> {
        self.instances
            .iter()
            .filter_map(move |(component, on)| on.get(&host).map(|pair| (component, *pair)))
    }
}

/// One of the coordinator's addresses as agents are told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoordinatorAddress {
    /// Host name or IP address, and port.
    pub address: String,
    /// From when on agents may use it.
    pub not_before: MeshTime,
}

/// An enrolled host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// Drawn at enrollment.
    pub id: HostId,
    /// Unique among hosts that are not revoked.
    pub name: HostName,
    /// Whether a token or an operator gave the name. A made-up name is never matched by `on: NAME`.
    pub name_given: bool,
    /// Labels from the token or an operator.
    pub labels: LabelSet,
    /// Its WireGuard key: while it changes keys, the one to be retired.
    pub wg_key: WgPublicKey,
    /// The WireGuard key that is to take its place, while it changes keys.
    pub next: Option<NextKey>,
    /// What its certificates speak for.
    pub identity: IdentityKey,
    /// When it joined.
    pub enrolled_at: MeshTime,
    /// Somebody with another key tried to redeem this host's used-up token: one of the two is not who the operator meant.
    pub contested: bool,
}

/// The key that a host changes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NextKey {
    /// The key.
    pub key: WgPublicKey,
    /// Since when.
    pub since: MeshTime,
    /// Views of this revision and later name it.
    pub revision: u64,
}

impl Host {
    /// Its WireGuard keys, the newest first: one, or two while it changes keys.
    #[must_use]
    pub fn wg_keys(&self) -> Vec<WgPublicKey> {
        self.next.iter().map(|next| next.key).chain([self.wg_key]).collect()
    }
}

/// Number of a policy document: its ETag. It counts policies, not revisions, so that a join does not make an edit stale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PolicyVersion(pub u64);

/// A policy document as applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredPolicy {
    /// Its number.
    pub version: PolicyVersion,
    /// The document, as its author wrote it.
    pub text: Arc<str>,
    /// Where each of its components runs, as far as the store needs to know for giving addresses.
    pub placements: Arc<[Placement]>,
    /// When it was applied.
    pub applied_at: MeshTime,
}

/// On which hosts one component runs: the store's reading of `on`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// The component.
    pub component: ComponentName,
    /// Which hosts are meant. Any alternative suffices; none means no host.
    pub on: Vec<On>,
}

/// One way in which `on` picks hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum On {
    /// The host that was given this name.
    Name(HostName),
    /// Every host that has all of these labels. Empty means no host.
    Labels(Vec<(LabelKey, LabelValue)>),
}

impl Placement {
    /// Whether the component runs on `host`.
    #[must_use]
    pub fn covers(&self, host: &Host) -> bool {
        self.on.iter().any(|on| match on {
            On::Name(name) => host.name_given && name == &host.name,
            On::Labels(wanted) => !wanted.is_empty() && has_labels(wanted, &host.labels),
        })
    }
}
