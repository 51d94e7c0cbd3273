//! What the items of a view say. [`View::parse`] reads verified items; `put_in` of each item's type writes them, for the compiler.
//!
//! Nothing unknown widens: an item of an unknown section is ignored; an item with an unknown field, or that cannot be read, grants nothing
//! and is counted in [`View::ignored`]; so is an item that refers to one that is not there. What contradicts itself (an address twice) is an
//! error for the whole view.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use minicbor::{Decode, Encode};

use super::Items;
use crate::id::{HostId, RuleId};
use crate::key::WgPublicKey;
use crate::label::{ComponentName, HostName, ServiceName};
use crate::net::{AddressPair, OverlayRange, PortSpec, is_unicast_overlay};
use crate::policy::Attachment;
use crate::signed::Signed;
use crate::version::MeshTime;
use crate::wire;

/// Numbers of the sections. A number is never used twice.
pub mod section {
    /// The mesh's parameters: one item, empty key.
    pub const CONFIG: u16 = 1;
    /// The host itself: one item, empty key.
    pub const SELF: u16 = 2;
    /// Instances of this host: key is the component's name.
    pub const LOCAL: u16 = 3;
    /// Other hosts that a rule pairs this one with: key is the host id.
    pub const PEER: u16 = 4;
    /// Their instances that a rule pairs with one of ours: key is host id, then the component's name.
    pub const REMOTE: u16 = 5;
    /// Rules between instances of this view: key is rule id, then `from`, a zero byte, `to`.
    pub const RULE: u16 = 6;
    /// Trust items ([`crate::trust`]): key is the SHA-256 of the item.
    pub const TRUST: u16 = 7;
}

/// The mesh's parameters, as a host needs them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// The ranges of the overlay's addresses.
    pub overlay: OverlayRange,
    /// How long a lease of this mesh lasts.
    pub lease: Duration,
}

/// The host itself.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SelfHost {
    /// Its id.
    #[n(0)]
    pub id: HostId,
    /// Its name.
    #[n(1)]
    pub name: HostName,
    /// Its WireGuard keys as the mesh knows them: one, or two while it changes keys.
    #[n(2)]
    pub wg_keys: Vec<WgPublicKey>,
}

/// An instance of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalInstance {
    /// The component.
    pub component: ComponentName,
    /// How the host knows its processes.
    pub attachment: Attachment,
    /// Its addresses.
    pub addresses: AddressPair,
}

/// Another host.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Peer {
    /// Its id.
    #[n(0)]
    pub id: HostId,
    /// Its name.
    #[n(1)]
    pub name: HostName,
    /// Its WireGuard keys, the newest first: one, or two while it changes keys.
    #[n(2)]
    pub wg_keys: Vec<WgPublicKey>,
    /// Generation of the pairwise PSK; zero means none.
    #[n(3)]
    pub psk_generation: u32,
}

/// An instance of another host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteInstance {
    /// The component.
    pub component: ComponentName,
    /// The host that it runs on: its addresses belong to that host's key and to no other.
    pub host: HostId,
    /// Its addresses.
    pub addresses: AddressPair,
}

/// What a rule opens, and under which service's name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Grant {
    /// Protocol and ports.
    pub ports: PortSpec,
    /// The service, where the rule names one.
    pub service: Option<ServiceName>,
}

/// A rule between two components, as far as it concerns this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleItem {
    /// The rule.
    pub id: RuleId,
    /// Who may begin.
    pub from: ComponentName,
    /// Whom they may reach.
    pub to: ComponentName,
    /// On what. Empty opens nothing.
    pub grants: Vec<Grant>,
    /// Until when; [`MeshTime::NEVER`] for a rule without end.
    pub expires: MeshTime,
}

/// Why the content of a view contradicts itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ContentError {
    /// The mesh's parameters or the host's own item are missing or unreadable.
    #[error("the view lacks a readable {0}")]
    Missing(&'static str),
    /// An address belongs to two instances.
    #[error("the address {0} belongs to two instances")]
    AddressTwice(IpAddr),
    /// An address that no instance may have.
    #[error("the address {0} lies outside the mesh's ranges")]
    AddressOutside(IpAddr),
    /// A WireGuard key belongs to two hosts.
    #[error("a WireGuard key belongs to two hosts: {0}")]
    KeyTwice(WgPublicKey),
}

impl ContentError {
    /// Stable code for the Nack.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Missing(_) => "incomplete",
            Self::AddressTwice(_) | Self::AddressOutside(_) => "address_conflict",
            Self::KeyTwice(_) => "key_conflict",
        }
    }
}

/// The content of a view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// The mesh's parameters.
    pub config: Config,
    /// The host itself.
    pub host: SelfHost,
    /// Its instances.
    pub instances: BTreeMap<ComponentName, LocalInstance>,
    /// The hosts it is paired with.
    pub peers: BTreeMap<HostId, Peer>,
    /// Their instances.
    pub remotes: Vec<RemoteInstance>,
    /// The rules that pair them.
    pub rules: Vec<RuleItem>,
    /// Trust items, not verified here.
    pub trust: Vec<Signed>,
    /// Items that grant nothing because something in them is unknown, unreadable or not there.
    pub ignored: usize,
}

impl View {
    /// Reads the items of a view for the host `us`.
    ///
    /// # Errors
    /// [`ContentError`].
    pub fn parse(items: &Items, us: HostId) -> Result<Self, ContentError> {
        let mut raw = Raw::default();
        for (at, bytes) in items.iter() {
            raw.read(at.section, bytes);
        }
        let mut view = Self {
            config: raw.config.ok_or(ContentError::Missing("configuration"))?,
            host: raw
                .host
                .filter(|h| h.id == us)
                .ok_or(ContentError::Missing("item about this host"))?,
            instances: raw.instances.into_iter().map(|i| (i.component.clone(), i)).collect(),
            peers: raw.peers.into_iter().map(|p| (p.id, p)).collect(),
            remotes: raw.remotes,
            rules: raw.rules,
            trust: raw.trust,
            ignored: raw.ignored,
        };
        view.drop_dangling();
        view.check_keys()?;
        view.check_addresses()?;
        Ok(view)
    }

    /// An instance of a host that is no peer, and a rule between components of which none is here, grant nothing.
    fn drop_dangling(&mut self) {
        let before = self.remotes.len().saturating_add(self.rules.len());
        let (peers, instances) = (&self.peers, &self.instances);
        self.remotes.retain(|r| peers.contains_key(&r.host));
        self.rules
            .retain(|r| instances.contains_key(&r.from) || instances.contains_key(&r.to));
        let dangling = before.saturating_sub(self.remotes.len()).saturating_sub(self.rules.len());
        self.ignored = self.ignored.saturating_add(dangling);
    }

    fn check_keys(&self) -> Result<(), ContentError> {
        let mut seen = BTreeSet::new();
        let all = self.peers.values().flat_map(|p| &p.wg_keys).chain(&self.host.wg_keys);
        all.copied()
            .find(|key| !seen.insert(*key))
            .map_or(Ok(()), |key| Err(ContentError::KeyTwice(key)))
    }

    fn check_addresses(&self) -> Result<(), ContentError> {
        let mut seen = BTreeSet::new();
        let local = self.instances.values().map(|i| i.addresses);
        for address in local.chain(self.remotes.iter().map(|r| r.addresses)).flat_map(AddressPair::both) {
            if !self.config.overlay.contains(address) || !is_unicast_overlay(address) {
                return Err(ContentError::AddressOutside(address));
            }
            if !seen.insert(address) {
                return Err(ContentError::AddressTwice(address));
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Raw {
    config: Option<Config>,
    host: Option<SelfHost>,
    instances: Vec<LocalInstance>,
    peers: Vec<Peer>,
    remotes: Vec<RemoteInstance>,
    rules: Vec<RuleItem>,
    trust: Vec<Signed>,
    ignored: usize,
}

impl Raw {
    fn read(&mut self, section: u16, bytes: &[u8]) {
        let known = match section {
            section::CONFIG => keep_one(
                &mut self.config,
                whole::<ConfigWire>(bytes, ConfigWire::FIELDS).and_then(ConfigWire::parse),
            ),
            section::SELF => keep_one(&mut self.host, whole(bytes, 3)),
            section::LOCAL => keep(
                &mut self.instances,
                whole::<LocalWire>(bytes, LocalWire::FIELDS).map(LocalWire::parse),
            ),
            section::PEER => keep(
                &mut self.peers,
                whole::<Peer>(bytes, 4).filter(|p| matches!(p.wg_keys.len(), 1..=2)),
            ),
            section::REMOTE => keep(
                &mut self.remotes,
                whole::<RemoteWire>(bytes, RemoteWire::FIELDS).map(RemoteWire::parse),
            ),
            section::RULE => keep(
                &mut self.rules,
                whole::<RuleWire>(bytes, RuleWire::FIELDS).and_then(RuleWire::parse),
            ),
            section::TRUST => keep(&mut self.trust, Signed::from_bytes(bytes).ok()),
            _ => true,
        };
        if !known {
            self.ignored = self.ignored.saturating_add(1);
        }
    }
}

fn keep<T>(all: &mut Vec<T>, one: Option<T>) -> bool {
    let known = one.is_some();
    all.extend(one);
    known
}

fn keep_one<T>(place: &mut Option<T>, one: Option<T>) -> bool {
    let known = one.is_some();
    *place = one;
    known
}

/// The item, if it can be read whole and has no field numbered `fields` or higher.
fn whole<'b, T: Decode<'b, ()>>(bytes: &'b [u8], fields: u32) -> Option<T> {
    match wire::has_later_fields(bytes, fields) {
        Ok(false) => wire::decode_all(bytes).ok(),
        Ok(true) | Err(_) => None,
    }
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct ConfigWire {
    #[cbor(n(0), with = "minicbor::bytes")]
    v4: [u8; 4],
    #[n(1)]
    v4_len: u8,
    #[cbor(n(2), with = "minicbor::bytes")]
    v6: [u8; 16],
    #[n(3)]
    lease_secs: u64,
}

impl ConfigWire {
    const FIELDS: u32 = 4;

    fn parse(self) -> Option<Config> {
        let overlay = OverlayRange::new(self.v4.into(), self.v4_len, self.v6.into()).ok()?;
        Some(Config {
            overlay,
            lease: Duration::from_secs(self.lease_secs),
        })
    }
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct LocalWire {
    #[n(0)]
    component: ComponentName,
    #[n(1)]
    attachment: Attachment,
    #[cbor(n(2), with = "minicbor::bytes")]
    v4: [u8; 4],
    #[cbor(n(3), with = "minicbor::bytes")]
    v6: [u8; 16],
}

impl LocalWire {
    const FIELDS: u32 = 4;

    fn parse(self) -> LocalInstance {
        LocalInstance {
            component: self.component,
            attachment: self.attachment,
            addresses: pair(self.v4, self.v6),
        }
    }
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct RemoteWire {
    #[n(0)]
    component: ComponentName,
    #[n(1)]
    host: HostId,
    #[cbor(n(2), with = "minicbor::bytes")]
    v4: [u8; 4],
    #[cbor(n(3), with = "minicbor::bytes")]
    v6: [u8; 16],
}

impl RemoteWire {
    const FIELDS: u32 = 4;

    fn parse(self) -> RemoteInstance {
        RemoteInstance {
            component: self.component,
            host: self.host,
            addresses: pair(self.v4, self.v6),
        }
    }
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct RuleWire {
    #[n(0)]
    id: RuleId,
    #[n(1)]
    from: ComponentName,
    #[n(2)]
    to: ComponentName,
    /// Ports and, in the same order, the services' names; an empty text stands for none.
    #[n(3)]
    ports: Vec<PortSpec>,
    #[n(4)]
    services: Vec<String>,
    #[n(5)]
    expires: MeshTime,
}

impl RuleWire {
    const FIELDS: u32 = 6;

    fn parse(self) -> Option<RuleItem> {
        if self.ports.len() != self.services.len() {
            return None;
        }
        let name = |text: String| if text.is_empty() { Some(None) } else { text.parse().ok().map(Some) };
        let grants = self.ports.into_iter().zip(self.services);
        let grants = grants
            .map(|(ports, service)| {
                Some(Grant {
                    ports,
                    service: name(service)?,
                })
            })
            .collect::<Option<_>>()?;
        Some(RuleItem {
            id: self.id,
            from: self.from,
            to: self.to,
            grants,
            expires: self.expires,
        })
    }
}

const fn pair(v4: [u8; 4], v6: [u8; 16]) -> AddressPair {
    AddressPair {
        v4: Ipv4Addr::from_octets(v4),
        v6: Ipv6Addr::from_octets(v6),
    }
}

impl Config {
    /// Writes the item.
    pub fn put_in(&self, items: &mut Items) {
        let ((v4, v4_len), (v6, _)) = (self.overlay.v4(), self.overlay.v6());
        let wire = ConfigWire {
            v4: v4.octets(),
            v4_len,
            v6: v6.octets(),
            lease_secs: self.lease.as_secs(),
        };
        items.put(section::CONFIG, [], wire::encode(&wire));
    }
}

impl SelfHost {
    /// Writes the item.
    pub fn put_in(&self, items: &mut Items) {
        items.put(section::SELF, [], wire::encode(self));
    }
}

impl LocalInstance {
    /// Writes the item.
    pub fn put_in(&self, items: &mut Items) {
        let wire = LocalWire {
            component: self.component.clone(),
            attachment: self.attachment.clone(),
            v4: self.addresses.v4.octets(),
            v6: self.addresses.v6.octets(),
        };
        items.put(section::LOCAL, self.component.as_str(), wire::encode(&wire));
    }
}

impl Peer {
    /// Writes the item.
    pub fn put_in(&self, items: &mut Items) {
        items.put(section::PEER, self.id.0, wire::encode(self));
    }
}

impl RemoteInstance {
    /// Writes the item.
    pub fn put_in(&self, items: &mut Items) {
        let wire = RemoteWire {
            component: self.component.clone(),
            host: self.host,
            v4: self.addresses.v4.octets(),
            v6: self.addresses.v6.octets(),
        };
        let key = [&self.host.0, self.component.as_str().as_bytes()].concat();
        items.put(section::REMOTE, key, wire::encode(&wire));
    }
}

impl RuleItem {
    /// Writes the item.
    pub fn put_in(&self, items: &mut Items) {
        let service = |g: &Grant| g.service.as_ref().map_or_else(String::new, ToString::to_string);
        let wire = RuleWire {
            id: self.id,
            from: self.from.clone(),
            to: self.to.clone(),
            ports: self.grants.iter().map(|g| g.ports).collect(),
            services: self.grants.iter().map(service).collect(),
            expires: self.expires,
        };
        let key = [&self.id.0, self.from.as_str().as_bytes(), &[0], self.to.as_str().as_bytes()].concat();
        items.put(section::RULE, key, wire::encode(&wire));
    }
}

/// Writes a trust item.
pub(crate) fn put_trust(items: &mut Items, item: &Signed) {
    use sha2::Digest as _;
    let bytes = item.to_bytes();
    items.put(section::TRUST, sha2::Sha256::digest(&bytes).to_vec(), bytes);
}
