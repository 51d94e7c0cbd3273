//! A view comes into force, and what it no longer allows ends.
//!
//! [`Engine::install`] puts the new snapshot in place of the old one, waits until no worker is in a batch that began before, and sweeps
//! the flows. When it returns, no packet of a flow that is denied now passes in either direction (I6). Local TCP sockets of flows that were
//! cut get one reset each, as results of the installing worker; what does not fit its slab is told by the following ticks.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use cloison_proto::verdict::DropReason;
use cloison_proto::version::Timestamp;

use super::judge::judge_flow;
use super::{Engine, Installing, Snapshot, Step};
use crate::TunId;
use crate::flow::{Entry, FlowKind, FlowLimits, Grant, Kept, Moment, Swept, cut};
use crate::install::{Installed, LeaseClock, PeerPlan, Plan};
use crate::packet::Direction;
use crate::path_policy::PathPolicy;
use crate::peer::{Keys, Peer, PeerMap, PeerState};
use crate::wg::LocalKey;
use crate::wg::index::PeerPrefix;
use crate::worker::{Outputs, Worker};

/// Local ends of cut TCP flows that are yet to be told, and the TUNs on which they hang.
#[derive(Default)]
pub(super) struct Pending(VecDeque<(Entry, TunId)>);

/// As many as there can be flows (I9). Whoever is not told learns it from the answer to its next segment.
const MAX_PENDING: usize = 65_536;

impl<P: PathPolicy, K: LocalKey> Engine<P, K> {
    /// Puts a plan in force: paths, filter and peers at once. Ends the worker's batch first; what it then holds is to be sent as always.
    pub fn install(&self, worker: &mut Worker<P, K>, plan: Plan<P, K>, now: Timestamp) -> Installed {
        let mut installing = self.installing.lock();
        worker.end();
        let Plan {
            policy,
            locals,
            peers,
            lease,
        } = plan;
        let old = self.current();
        let peers = self.peer_map(old.as_deref(), peers, &mut installing);
        let kept = |peer: &&Arc<Peer<K>>| peers.iter().any(|(other, _)| Arc::ptr_eq(other, peer));
        let before = old.as_ref().map_or(0, |old| old.peers.all().len());
        let kept_peers = old.iter().flat_map(|old| old.peers.all()).filter(kept).count();
        let map = PeerMap::new(peers.iter().map(|(peer, keys)| (peer.clone(), keys.remotes.as_slice())));
        let stamp = installing.next_stamp();
        let limits = FlowLimits::divided(self.config.max_flows, policy.local_instances());
        let new = Arc::new(Snapshot {
            stamp,
            policy,
            locals,
            peers: map,
            lease: LeaseClock::new(lease),
        });
        let new_peers = peers.len().saturating_sub(kept_peers);
        self.snapshot.store(Some(new.clone()));
        peers.into_iter().for_each(|(peer, keys)| peer.lock().set_keys(keys));
        self.wait_for_workers(stamp);
        self.retire(worker, old.as_deref(), Some(&new));
        self.flows.set_limits(limits);
        let first = (now + self.config.reset_grace).0;
        let _ = self
            .resets_from
            .compare_exchange(u64::MAX, first, Ordering::Relaxed, Ordering::Relaxed);
        let swept = self.cut(worker, old.as_deref(), Some(&new), stamp, now);
        let kept_flows = swept.seen.saturating_sub(swept.idle).saturating_sub(swept.dropped);
        Installed {
            kept_peers,
            new_peers,
            gone_peers: before.saturating_sub(kept_peers),
            kept_flows,
            cut_flows: swept.dropped,
        }
    }

    /// Takes the view out of force: nothing passes, every flow is cut, every session ends.
    pub fn withdraw(&self, worker: &mut Worker<P, K>, now: Timestamp) -> Installed {
        let mut installing = self.installing.lock();
        worker.end();
        let old = self.current();
        let stamp = installing.next_stamp();
        self.snapshot.store(None);
        self.wait_for_workers(stamp);
        self.retire(worker, old.as_deref(), None);
        let swept = self.cut(worker, old.as_deref(), None, stamp, now);
        let gone_peers = old.map_or(0, |old| old.peers.all().len());
        Installed {
            gone_peers,
            cut_flows: swept.dropped,
            ..Installed::default()
        }
    }

    /// Whether segments without a flow are answered by resets.
    pub(super) fn resets_are_sent(&self, now: Timestamp) -> bool {
        now.0 >= self.resets_from.load(Ordering::Relaxed)
    }

    /// The peers of a plan: those of the view before, and new ones.
    fn peer_map(&self, old: Option<&Snapshot<P, K>>, plan: Vec<PeerPlan<K>>, installing: &mut Installing) -> Vec<(Arc<Peer<K>>, Keys<K>)> {
        let mut drawn = BTreeSet::new();
        let peer = |PeerPlan { host, keys }| {
            if let Some(known) = old.and_then(|old| old.peers.by_host(host)) {
                return (known.clone(), keys);
            }
            let taken = |prefix| drawn.contains(&prefix) || old.is_some_and(|old| old.peers.by_prefix(prefix).is_some());
            let none = |psk_generation| Keys {
                locals: Vec::new(),
                remotes: Vec::new(),
                psk: None,
                psk_generation,
            };
            // A view has 16,384 peers at most and there are a million prefixes. Should the draw fail all the same, the peer keeps its
            // position and gets no keys: nobody is mistaken for it.
            let (prefix, keys) = match installing.prefixes.draw(taken) {
                Some(prefix) => (prefix, keys),
                None => (PeerPrefix::default(), none(keys.psk_generation)),
            };
            drawn.insert(prefix);
            let state = PeerState::new(prefix, none(keys.psk_generation), self.room.clone());
            (Arc::new(Peer::new(host, prefix, state)), keys)
        };
        plan.into_iter().map(peer).collect()
    }

    /// Returns when no packet is judged by a view before the one with this stamp.
    fn wait_for_workers(&self, stamp: u64) {
        // Pairs with the fence in `Worker::begin`: either the worker sees the new snapshot, or this sees that it is awake.
        fence(Ordering::SeqCst);
        let seats = self.seats.lock().clone();
        for seat in seats {
            while !seat.has_passed(stamp) {
                std::thread::yield_now();
            }
        }
    }

    /// Ends the peers that the new view does not have; what waited for them is dropped.
    fn retire(&self, worker: &Worker<P, K>, old: Option<&Snapshot<P, K>>, new: Option<&Arc<Snapshot<P, K>>>) {
        let stays = |peer: &Peer<K>| new.is_some_and(|new| new.peers.by_host(peer.host()).is_some());
        for peer in old.iter().flat_map(|old| old.peers.all()).filter(|peer| !stays(peer)) {
            let mut state = peer.lock();
            state.retire();
            while state.queue.pop().is_some() {
                worker.stats().unqueued(Direction::Outbound, 1);
                worker.stats().dropped(Direction::Outbound, DropReason::Withdrawn, 1);
            }
        }
    }

    /// Sweeps all flows by the new view, and tells the local ends of those that are cut.
    fn cut(
        &self,
        worker: &mut Worker<P, K>,
        old: Option<&Snapshot<P, K>>,
        new: Option<&Arc<Snapshot<P, K>>>,
        stamp: u64,
        now: Timestamp,
    ) -> Swept {
        let lease = new.filter(|new| new.lease.holds(now)).map(|new| &new.lease);
        let moment = Moment {
            now,
            mesh: lease.map(|lease| lease.mesh_time(now)).unwrap_or_default(),
            stamp,
        };
        let table = new.filter(|_| lease.is_some()).and_then(|new| new.policy.filter());
        let mut pending = self.cuts.lock();
        let tun_of = |entry: &Entry| {
            let local = entry.key().local;
            new.and_then(|new| new.policy.tun_of(local)).or_else(|| old?.policy.tun_of(local))
        };
        let swept = self
            .flows
            .sweep_all(&moment, |entry| match table.map(|table| judge_flow(table, entry, &moment)) {
                Some(Ok(grant)) => keep(entry, grant),
                Some(Err(_)) | None => {
                    pending.add(entry, tun_of(entry));
                    Kept::Drop
                }
            });
        pending.tell(&mut worker.out);
        swept
    }
}

impl<P: PathPolicy, K: LocalKey> Step<'_, P, K> {
    /// One step of the sweep: ends flows that are idle, that an older view allowed, whose rule has expired, or all, when the lease ends.
    pub(super) fn sweep(&mut self) {
        let Some(table) = self.snapshot.policy.filter() else { return };
        let holds = self.snapshot.lease.holds(self.now());
        let moment = if holds {
            self.moment
        } else {
            Moment {
                stamp: NEVER,
                ..self.moment
            }
        };
        let mut pending = self.engine.cuts.lock();
        self.engine
            .flows
            .sweep_step(&moment, |entry| match judge_flow(table, entry, &self.moment) {
                Ok(grant) if holds => keep(entry, grant),
                Ok(_) | Err(_) => {
                    pending.add(entry, self.snapshot.policy.tun_of(entry.key().local));
                    Kept::Drop
                }
            });
        pending.tell(self.out);
    }

    /// Tells what an earlier cut had no room to tell.
    pub(super) fn tell_pending_cuts(&mut self) {
        self.engine.cuts.lock().tell(self.out);
    }
}

/// The stamp of no view: no verdict is current.
const NEVER: u64 = u64::MAX;

impl Installing {
    fn next_stamp(&mut self) -> u64 {
        let stamp = self.next_stamp;
        self.next_stamp = stamp.saturating_add(1);
        stamp
    }
}

fn keep(entry: &mut Entry, grant: Grant) -> Kept {
    entry.regrant(grant);
    Kept::Keep
}

impl Pending {
    fn add(&mut self, entry: &Entry, tun: Option<TunId>) {
        let to_be_told = entry.key().kind == FlowKind::Tcp && !entry.is_closed() && self.0.len() < MAX_PENDING;
        self.0.extend(tun.filter(|_| to_be_told).map(|tun| (*entry, tun)));
    }

    /// Writes resets as far as there is room.
    fn tell(&mut self, out: &mut Outputs) {
        while out.tun.has_room()
            && let Some((entry, tun)) = self.0.pop_front()
        {
            if let Some(len) = cut::reset(&entry, out.tun.space()) {
                out.tun.commit(len, tun);
            }
        }
    }
}
