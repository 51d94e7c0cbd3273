//! What is published, and how far it got: each host's signed view, what the host said about it, and its link.
//!
//! The publisher puts views in; links take them out, and bring in what agents say. A link that has news waiting is woken without being told
//! what: it asks for the latest, so that a slow link skips what was outdated before it was sent. Nothing here waits, and no lock is held
//! while anything else happens.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use cloison_proto::control::agent::{Ack, Endpoint, Hello, InstanceReport, Nack, Report};
use cloison_proto::control::coordinator::PeerHint;
use cloison_proto::id::{HostId, MeshId};
use cloison_proto::label::ComponentName;
use cloison_proto::net::OverlayRange;
use cloison_proto::signed::Signed;
use cloison_proto::version::{MeshTime, Version};
use cloison_proto::view::{Header, Items, StateHash};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::endpoint::candidates;
use super::offer::Offer;
use super::slot::{Farewell, Slot};
use crate::policy::explain::{HostLive, LiveState};
use crate::trust::Roots;

/// What the hub tells a link that begins.
#[derive(Debug)]
pub struct Welcome {
    /// The link.
    pub slot: Arc<Slot>,
    /// The items of the view that the agent has in force, if they are still at hand: the base of a delta.
    pub base: Option<Arc<Items>>,
    /// The highest incarnation of the host so far.
    pub incarnation: u64,
    /// Whether another machine uses this host's keys, by all appearance, and this link is the first to show it.
    pub cloned: bool,
}

/// A refusal, as the agent put it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The view that was refused.
    pub version: Version,
    /// Stable code.
    pub code: String,
    /// For people.
    pub detail: String,
}

/// How far the views got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// The state that was compiled last.
    pub version: Version,
    /// How many hosts there are.
    pub hosts: usize,
    /// How many of them acknowledged the view compiled from that state.
    pub applied: usize,
    /// How many of them are linked.
    pub linked: usize,
}

#[derive(Debug, Default)]
struct Entry {
    offer: Option<Arc<Offer>>,
    /// The offer before this one: an acknowledgement or a link's base may still mean it.
    previous: Option<Arc<Offer>>,
    acked: Option<StateHash>,
    /// The items behind `acked`, if they are known.
    acked_items: Option<Arc<Items>>,
    refusal: Option<Refusal>,
    link: Option<Arc<Slot>>,
    said: Vec<Endpoint>,
    seen: Option<IpAddr>,
    incarnation: u64,
    cloned: bool,
    unenforced: BTreeMap<ComponentName, String>,
    /// How it said last that its instances are enforced.
    instances: Arc<BTreeMap<ComponentName, InstanceReport>>,
    /// An operator wants the host to change its WireGuard key, and its link has not been told yet.
    wants_key: bool,
}

impl Entry {
    fn is_applied(&self) -> bool {
        self.offer.as_ref().is_some_and(|offer| self.acked == Some(offer.header.state_hash))
    }

    /// The items of a view that this host may have.
    fn items(&self, state_hash: StateHash) -> Option<Arc<Items>> {
        let offered = [&self.offer, &self.previous]
            .into_iter()
            .flatten()
            .find(|offer| offer.header.state_hash == state_hash);
        let acked = self.acked_items.as_ref().filter(|_| self.acked == Some(state_hash));
        offered.map(|offer| &offer.items).or(acked).map(Arc::clone)
    }

    fn is_current(&self, slot: &Arc<Slot>) -> bool {
        self.link.as_ref().is_some_and(|link| Arc::ptr_eq(link, slot))
    }

    fn wake(&self) {
        if let Some(link) = &self.link {
            link.wake();
        }
    }
}

#[derive(Debug, Default)]
struct State {
    version: Version,
    /// A hash over the statements of trust in the views.
    trust: [u8; 32],
    hosts: HashMap<HostId, Entry>,
    closed: bool,
}

/// Views, acknowledgements and links of all hosts.
#[derive(Debug)]
pub struct Hub {
    roots: Arc<Roots>,
    overlay: Mutex<OverlayRange>,
    state: Mutex<State>,
    /// Changes whenever [`Hub::progress`] may.
    changed: watch::Sender<()>,
}

impl Hub {
    /// A hub without hosts.
    #[must_use]
    pub fn new(roots: Arc<Roots>, overlay: OverlayRange) -> Self {
        Self {
            roots,
            overlay: Mutex::new(overlay),
            state: Mutex::default(),
            changed: watch::Sender::new(()),
        }
    }

    /// The mesh.
    #[must_use]
    pub fn mesh(&self) -> MeshId {
        self.roots.mesh()
    }

    // What the publisher brings.

    /// Makes these the hosts of the mesh: the links of all others are closed, and what they said is forgotten.
    pub(super) fn set_hosts(&self, hosts: impl Iterator<Item = HostId>, overlay: OverlayRange) {
        *self.overlay.lock() = overlay;
        let mut state = self.state.lock();
        let mut before = std::mem::take(&mut state.hosts);
        state.hosts = hosts.map(|id| (id, before.remove(&id).unwrap_or_default())).collect();
        drop(state);
        before
            .values()
            .filter_map(|gone| gone.link.as_ref())
            .for_each(|link| link.dismiss(Farewell::Revoked));
        self.changed.send_replace(());
    }

    /// Offers views, and says which state all hosts' views are compiled from by now.
    pub(super) fn publish(&self, version: Version, trust: [u8; 32], offers: Vec<Offer>) {
        let mut state = self.state.lock();
        state.version = version;
        state.trust = trust;
        for offer in offers {
            let Some(entry) = state.hosts.get_mut(&offer.header.host) else {
                continue;
            };
            if entry.offer.as_ref().is_some_and(|current| current.header == offer.header) {
                continue;
            }
            entry.refusal = None;
            entry.previous = entry.offer.replace(Arc::new(offer));
            entry.wake();
        }
        drop(state);
        self.changed.send_replace(());
    }

    /// Takes back a host's view: it gets no lease until there is another.
    pub(super) fn withdraw(&self, host: HostId) {
        if let Some(entry) = self.state.lock().hosts.get_mut(&host) {
            entry.previous = entry.offer.take();
        }
        self.changed.send_replace(());
    }

    /// Takes back every view: hosts go on until their leases end, and are given nothing meanwhile. Their links stay.
    pub(super) fn suspend(&self) {
        let mut state = self.state.lock();
        state.version = Version::default();
        for entry in state.hosts.values_mut() {
            (entry.offer, entry.previous) = (None, None);
        }
        drop(state);
        self.changed.send_replace(());
    }

    /// Closes all links; no link begins any more.
    pub fn shut_down(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state
            .hosts
            .values()
            .filter_map(|entry| entry.link.as_ref())
            .for_each(|link| link.dismiss(Farewell::Shutdown));
    }

    // What links bring and take.

    /// A link of `host` from `seen` begins with `hello`; an older one ends. `None` for a host that the mesh does not have.
    #[must_use]
    pub fn attach(&self, host: HostId, seen: IpAddr, known_incarnation: Option<u64>, hello: &Hello) -> Option<Welcome> {
        let mut state = self.state.lock();
        if state.closed {
            return None;
        }
        let entry = state.hosts.get_mut(&host)?;
        let slot = Arc::new(Slot::default());
        // Incarnations of one machine only rise: a lower one is another machine's, or that of a copy of this one's disk.
        let known = entry.incarnation.max(known_incarnation.unwrap_or(0));
        let is_lower = hello.incarnation < known;
        let cloned = is_lower && !std::mem::replace(&mut entry.cloned, true);
        entry.incarnation = hello.incarnation.max(known);
        let incarnation = entry.incarnation;
        if is_lower && entry.link.is_some() {
            // The one that began later stays; this one is told at once that another has its place.
            slot.dismiss(Farewell::Replaced);
            return Some(Welcome {
                slot,
                base: None,
                incarnation,
                cloned,
            });
        }
        if let Some(older) = entry.link.replace(Arc::clone(&slot)) {
            older.dismiss(Farewell::Replaced);
        }
        entry.seen = Some(seen.to_canonical());
        entry.said.clone_from(&hello.endpoints);
        let base = hello.state_hash.and_then(|hash| entry.items(hash));
        entry.acked = hello.state_hash;
        entry.acked_items.clone_from(&base);
        let peers = peers_of(entry);
        wake_all(&state, &peers);
        drop(state);
        self.changed.send_replace(());
        Some(Welcome {
            slot,
            base,
            incarnation,
            cloned,
        })
    }

    /// The link comes from another address by now.
    pub fn seen(&self, host: HostId, slot: &Arc<Slot>, address: IpAddr) {
        let mut state = self.state.lock();
        let Some(entry) = state.hosts.get_mut(&host).filter(|entry| entry.is_current(slot)) else {
            return;
        };
        if entry.seen.replace(address.to_canonical()) != Some(address.to_canonical()) {
            let peers = peers_of(entry);
            wake_all(&state, &peers);
        }
    }

    /// The link is gone. What the host said stays: its peers may still find it there.
    pub fn detach(&self, host: HostId, slot: &Arc<Slot>) {
        self.with_current(host, slot, |entry| entry.link = None);
    }

    /// The view offered to `host`, with a lease that is not older than a 24th of its time.
    #[must_use]
    pub fn offer(&self, host: HostId, now: MeshTime) -> Option<Arc<Offer>> {
        let offer = self.state.lock().hosts.get(&host)?.offer.clone()?;
        if now < offer.lease_due() && offer.leased_at <= now {
            return Some(offer);
        }
        let renewed = Arc::new(offer.leased_anew(&self.roots, now));
        let mut state = self.state.lock();
        let entry = state.hosts.get_mut(&host)?;
        match &entry.offer {
            Some(current) if Arc::ptr_eq(current, &offer) => entry.offer = Some(Arc::clone(&renewed)),
            // Replaced or withdrawn in between: that one wakes the link.
            Some(current) => return Some(Arc::clone(current)),
            None => return None,
        }
        Some(renewed)
    }

    /// What is known of where the peers of `host` are, in the order of their ids.
    #[must_use]
    pub fn hints(&self, host: HostId) -> Vec<PeerHint> {
        let overlay = *self.overlay.lock();
        let state = self.state.lock();
        let Some(offer) = state.hosts.get(&host).and_then(|entry| entry.offer.as_ref()) else {
            return Vec::new();
        };
        let hint = |peer: &HostId| {
            let entry = state.hosts.get(peer)?;
            let endpoints = candidates(&entry.said, entry.seen, overlay);
            (entry.incarnation > 0 || !endpoints.is_empty()).then_some(PeerHint {
                host: *peer,
                endpoints,
                incarnation: entry.incarnation,
            })
        };
        offer.peers.iter().filter_map(hint).collect()
    }

    /// The host has a view in force.
    pub fn acked(&self, host: HostId, slot: &Arc<Slot>, ack: &Ack) {
        self.with_current(host, slot, |entry| {
            entry.acked_items = entry.items(ack.state_hash);
            entry.acked = Some(ack.state_hash);
            if entry.is_applied() {
                entry.refusal = None;
                // Both hold the same: the one before is not needed any more.
                entry.previous = None;
            }
        });
    }

    /// The version of the view that a host shows, if this coordinator signed it, for this host.
    #[must_use]
    pub fn held(&self, host: HostId, view: &Signed) -> Option<Version> {
        let header = Header::open(view, &self.roots.view_key().verifying()).ok()?;
        ((header.mesh, header.host) == (self.mesh(), host)).then_some(header.version)
    }

    /// The host refused a view.
    pub fn nacked(&self, host: HostId, slot: &Arc<Slot>, nack: &Nack) {
        self.with_current(host, slot, |entry| {
            entry.refusal = Some(Refusal {
                version: nack.version,
                code: nack.code.clone(),
                detail: nack.detail.clone(),
            });
        });
    }

    /// The host says anew where it may be reached.
    pub fn moved(&self, host: HostId, slot: &Arc<Slot>, endpoints: Vec<Endpoint>) {
        let peers = self.with_current(host, slot, |entry| {
            entry.said = endpoints;
            peers_of(entry)
        });
        wake_all(&self.state.lock(), &peers.unwrap_or_else(|| Arc::new([])));
    }

    /// The host says anew how it does.
    pub fn reported(&self, host: HostId, slot: &Arc<Slot>, report: Report) {
        self.with_current(host, slot, |entry| {
            let instances = report.instances.into_iter().flatten();
            entry.instances = Arc::new(instances.map(|instance| (instance.component.clone(), instance)).collect());
            entry.unenforced = report.unenforced.into_iter().map(|u| (u.component, u.reason)).collect();
        });
    }

    /// Does something to a host's entry if `slot` is its link; an older link has nothing to say any more.
    fn with_current<T>(&self, host: HostId, slot: &Arc<Slot>, action: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        let done = {
            let mut state = self.state.lock();
            state.hosts.get_mut(&host).filter(|entry| entry.is_current(slot)).map(action)
        };
        self.changed.send_replace(());
        done
    }

    // What people ask.

    /// How far the views got.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let state = self.state.lock();
        Progress {
            version: state.version,
            hosts: state.hosts.len(),
            applied: state.hosts.values().filter(|entry| entry.is_applied()).count(),
            linked: state.hosts.values().filter(|entry| entry.link.is_some()).count(),
        }
    }

    /// Whether the host and every peer of its have in force what was published at `revision` or later: nobody works with less any more.
    #[must_use]
    pub fn is_taken_up(&self, host: HostId, revision: u64) -> bool {
        let state = self.state.lock();
        let applied = |id: &HostId| state.hosts.get(id).is_none_or(Entry::is_applied);
        let Some(entry) = state.hosts.get(&host).filter(|_| state.version.revision >= revision) else {
            return false;
        };
        entry.is_applied() && peers_of(entry).iter().all(applied)
    }

    /// Whether every host has a view in force with the statements of trust that hash to `trust`.
    #[must_use]
    pub fn is_trusted_by_all(&self, trust: [u8; 32]) -> bool {
        let state = self.state.lock();
        state.trust == trust && state.hosts.values().all(Entry::is_applied)
    }

    /// Wakes every link: what it depends on besides views may have changed.
    pub fn wake_links(&self) {
        self.state.lock().hosts.values().for_each(Entry::wake);
    }

    /// The items of the view that each host has in force, as far as that is known; `None` for a host that was not heard of yet, or that has
    /// a view which is not at hand.
    #[must_use]
    pub fn in_force(&self) -> Vec<(HostId, Option<Arc<Items>>)> {
        let state = self.state.lock();
        let held = |entry: &Entry| {
            if entry.is_applied() {
                entry.offer.as_ref().map(|offer| Arc::clone(&offer.items))
            } else {
                entry.acked_items.clone()
            }
        };
        state.hosts.iter().map(|(host, entry)| (*host, held(entry))).collect()
    }

    /// Has a host's agent be asked for a new WireGuard key; whether it is linked, so that it can be.
    #[must_use]
    pub fn wish_for_key(&self, host: HostId) -> bool {
        let mut state = self.state.lock();
        let Some(entry) = state.hosts.get_mut(&host).filter(|entry| entry.link.is_some()) else {
            return false;
        };
        entry.wants_key = true;
        entry.wake();
        true
    }

    /// Whether the host's link has to ask for a new WireGuard key; only once.
    #[must_use]
    pub fn take_key_wish(&self, host: HostId, slot: &Arc<Slot>) -> bool {
        let mut state = self.state.lock();
        let entry = state.hosts.get_mut(&host).filter(|entry| entry.is_current(slot));
        entry.is_some_and(|entry| std::mem::take(&mut entry.wants_key))
    }

    /// Waits until the hub knows of `host`, which joined a moment ago, or until `timeout`; says whether it does.
    pub async fn knows(&self, host: HostId, timeout: Duration) -> bool {
        let mut changed = self.watch();
        let known = async {
            while !self.state.lock().hosts.contains_key(&host) {
                if changed.changed().await.is_err() {
                    return false;
                }
            }
            true
        };
        tokio::time::timeout(timeout, known).await.unwrap_or(false)
    }

    /// Wakes whenever [`Hub::progress`] may have changed.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Waits until every host has acknowledged its view of `revision` or later, or until `timeout`; says how far it got.
    pub async fn wait_applied(&self, revision: u64, timeout: Duration) -> Progress {
        let mut changed = self.watch();
        let all = async {
            loop {
                let progress = self.progress();
                if progress.version.revision >= revision && progress.applied == progress.hosts {
                    return;
                }
                if changed.changed().await.is_err() {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(timeout, all).await;
        self.progress()
    }

    /// The view that a host refused last, if it has accepted none since.
    #[must_use]
    pub fn refusal(&self, host: HostId) -> Option<Refusal> {
        self.state.lock().hosts.get(&host)?.refusal.clone()
    }

    /// Where a host may be reached.
    #[must_use]
    pub fn endpoints(&self, host: HostId) -> Vec<Endpoint> {
        let overlay = *self.overlay.lock();
        let state = self.state.lock();
        state
            .hosts
            .get(&host)
            .map_or_else(Vec::new, |entry| candidates(&entry.said, entry.seen, overlay))
    }

    /// Whether another machine uses a host's keys, by all appearance.
    #[must_use]
    pub fn is_cloned(&self, host: HostId) -> bool {
        self.state.lock().hosts.get(&host).is_some_and(|entry| entry.cloned)
    }
}

impl LiveState for Hub {
    fn live(&self, host: HostId) -> HostLive {
        let state = self.state.lock();
        state.hosts.get(&host).map_or_else(HostLive::default, |entry| HostLive {
            linked: entry.link.is_some(),
            applied: entry.is_applied(),
            unenforced: entry.unenforced.clone(),
            instances: entry.instances.clone(),
        })
    }
}

fn peers_of(entry: &Entry) -> Arc<[HostId]> {
    entry
        .offer
        .as_ref()
        .map_or_else(|| Arc::new([]) as Arc<[HostId]>, |offer| Arc::clone(&offer.peers))
}

/// Being a peer is mutual: who has this host in its view is in this host's view.
fn wake_all(state: &State, peers: &[HostId]) {
    peers.iter().filter_map(|peer| state.hosts.get(peer)).for_each(Entry::wake);
}
