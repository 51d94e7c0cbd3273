//! How a host knows which processes are a component: each attachment of a view becomes addresses on a TUN in some network namespace, or is
//! shown as unenforced with the reason. What cannot be enforced is not configured.
//!
//! A view goes: [`plan`] says where each instance belongs; [`site::Site`] makes the TUN, its addresses and routes there; [`host`], [`netns`] and
//! [`container`] know what is particular to the places. Components of the host's own namespace share its TUN: a [`claim`] says which processes
//! each of them is. Nothing in a view is executed, expanded, or used as the name of a file to write.

pub mod base_table;
pub mod cgroups;
pub mod claim;
pub mod claim_table;
pub mod claims;
pub mod container;
pub mod guard;
pub mod host;
pub mod netns;
pub mod nudge;
pub mod owners;
mod resolver_table;
pub mod selftest;
pub mod site;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use cloison_proto::label::ComponentName;
use cloison_proto::policy::{Attachment, AttachmentKind, ContainerMatch, Engine};
use cloison_proto::view::{LocalInstance, View};

use crate::netlink::NetlinkError;
use crate::sys::netns::NetNsError;
use crate::sys::tun::TunError;
use base_table::BaseTableError;
use claim::{Claim, ClaimError};
use container::ContainerError;

/// What this agent's own configuration accepts of the attachments that views name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    /// Kinds of attachments.
    pub kinds: BTreeSet<AttachmentKind>,
    /// Directories below which namespaces may lie.
    pub netns_dirs: Vec<PathBuf>,
    /// Docker's socket.
    pub docker_socket: PathBuf,
    /// Podman's socket.
    pub podman_socket: PathBuf,
}

impl Default for Accepted {
    /// Every kind; namespaces where `ip netns` puts them, container runtimes where their packages put them.
    fn default() -> Self {
        Self {
            kinds: AttachmentKind::ALL.iter().copied().collect(),
            netns_dirs: vec!["/run/netns".into()],
            docker_socket: "/run/docker.sock".into(),
            podman_socket: "/run/podman/podman.sock".into(),
        }
    }
}

/// Why an instance is not enforced. Nothing reaches it and it reaches nothing.
#[derive(Debug, thiserror::Error)]
pub enum Unenforced {
    /// The agent's configuration does not accept the kind.
    #[error("this agent's configuration does not accept `{0}` attachments; add the kind to `attachments`")]
    NotAccepted(AttachmentKind),
    /// Another component has the place.
    #[error("the component {0} is attached there already; two components cannot share a network namespace")]
    Taken(ComponentName),
    /// Another component has the namespace, by another path.
    #[error("{0} is the same network namespace as {1}; two components cannot share one")]
    SameNamespace(Place, Place),
    /// The TUN went while it was made.
    #[error("the TUN is gone")]
    NoTun,
    /// The namespace is the agent's own.
    #[error("{0} is in the host's own network namespace; use `host`, `unit`, `user` or `cgroup`")]
    OwnNamespace(Place),
    /// The host's own namespace cannot be made safe for overlay addresses, so nothing is attached anywhere.
    #[error("this host cannot be made safe for the mesh's addresses: {0}")]
    Host(Arc<Unenforced>),
    /// Which processes the component is cannot be said on this host.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// The container is not there, or cannot be asked for.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// The namespace cannot be used.
    #[error(transparent)]
    Namespace(#[from] NetNsError),
    /// The namespace has another use for the overlay's addresses.
    #[error(transparent)]
    Conflict(#[from] AddressConflict),
    /// The TUN cannot be made.
    #[error(transparent)]
    Tun(#[from] TunError),
    /// Addresses or routes cannot be set.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The base table cannot be loaded.
    #[error(transparent)]
    BaseTable(#[from] BaseTableError),
    /// A setting of the TUN cannot be written.
    #[error("cannot write {0}")]
    Setting(PathBuf, #[source] std::io::Error),
}

impl Unenforced {
    /// Whether the reason may pass without another view or configuration: it is worth trying again.
    #[must_use]
    pub const fn may_pass(&self) -> bool {
        !matches!(self, Self::NotAccepted(_) | Self::Taken(_) | Self::OwnNamespace(_))
    }
}

/// The overlay's ranges are in use for something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "this host has a route to {address}/{length}, which is in the mesh's address range; remove the route, or give the mesh another range"
)]
pub struct AddressConflict {
    /// Network address of the route.
    pub address: IpAddr,
    /// Its prefix length.
    pub length: u8,
}

/// Where an instance's processes are, and with that its TUN.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// In the host's own namespace: all that nobody else there claims.
    Host,
    /// In the host's own namespace: those that are claimed.
    Claimed(Claim),
    /// In the namespace at this path.
    Netns(PathBuf),
    /// In the namespace of a container.
    Container(Engine, ContainerMatch),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("the host"),
            Self::Claimed(claim) => claim.fmt(f),
            Self::Netns(path) => path.display().fmt(f),
            Self::Container(engine, which) => write!(f, "{engine} container {which}"),
        }
    }
}

/// Where each instance of a view belongs.
#[derive(Debug, Default)]
pub struct Plan<'v> {
    /// Instances that get a TUN, by component.
    pub sites: BTreeMap<&'v ComponentName, (Place, &'v LocalInstance)>,
    /// The others.
    pub unenforced: BTreeMap<&'v ComponentName, Unenforced>,
}

impl Plan<'_> {
    /// The containers that are wanted.
    #[must_use]
    pub fn containers(&self) -> BTreeSet<(Engine, &ContainerMatch)> {
        let places = self.sites.values().map(|(place, _)| place);
        let of_container = places.filter_map(|place| match place {
            Place::Container(engine, which) => Some((*engine, which)),
            Place::Host | Place::Claimed(_) | Place::Netns(_) => None,
        });
        of_container.collect()
    }
}

/// Says where each instance of `view` belongs, within what is `accepted`.
#[must_use]
pub fn plan<'v>(view: &'v View, accepted: &Accepted) -> Plan<'v> {
    let mut plan = Plan::default();
    let mut owners: BTreeMap<Place, &'v ComponentName> = BTreeMap::new();
    for (component, instance) in &view.instances {
        let place = match place(&instance.attachment, accepted) {
            Ok(place) => place,
            Err(why) => {
                plan.unenforced.insert(component, why);
                continue;
            }
        };
        if let Some(owner) = owners.get(&place) {
            plan.unenforced.insert(component, Unenforced::Taken((*owner).clone()));
            continue;
        }
        owners.insert(place.clone(), component);
        plan.sites.insert(component, (place, instance));
    }
    plan
}

fn place(attachment: &Attachment, accepted: &Accepted) -> Result<Place, Unenforced> {
    let kind = attachment.kind();
    if !accepted.kinds.contains(&kind) {
        return Err(Unenforced::NotAccepted(kind));
    }
    match attachment {
        Attachment::Host => Ok(Place::Host),
        Attachment::Netns(path) => Ok(Place::Netns(path.as_str().into())),
        Attachment::User(user) => Ok(Place::Claimed(Claim::User(user.clone()))),
        Attachment::Unit(unit) => Ok(Place::Claimed(Claim::Unit(unit.clone()))),
        Attachment::Cgroup(path) => Ok(Place::Claimed(Claim::Cgroup(path.clone()))),
        Attachment::Container(engine, which) => Ok(Place::Container(*engine, which.clone())),
    }
}
