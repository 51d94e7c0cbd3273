//! The engine: packets of TUNs and datagrams of the underlay come in, datagrams and packets go out.
//!
//! - [outbound]: TUN -> parse -> the source is an instance of this TUN -> peer by destination -> flow or filter -> seal -> datagram. What is
//!   denied is answered at once. A destination on this host goes straight to its TUN, through both halves of the same filter.
//! - [inbound]: datagram -> classify -> handshake (budget, then known key) or session -> open -> the endpoint roams -> parse -> the source is
//!   that peer's -> the destination is ours -> flow or filter -> TUN.
//! - [tick]: sessions, packets that wait too long, flows that end.
//! - [cut]: a new view comes into force, and what it no longer allows ends.
//!
//! The engine is shared by reference; each thread that moves packets has a [`Worker`]. It reads no clock and no entropy (I7): `now` and the
//! seed come in. Nothing here waits, except [`Engine::install`] for batches under way.

mod cut;
mod ecn;
mod inbound;
mod judge;
mod outbound;
mod tick;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use cloison_proto::id::HostId;
use cloison_proto::verdict::DropReason;
use cloison_proto::version::Timestamp;
use parking_lot::Mutex;

pub use inbound::Meta;

use crate::flow::limit::{AnswerLimit, MidStreamLimit};
use crate::flow::{FlowLimits, FlowTable, Moment};
use crate::install::{Hint, LeaseClock, LeaseTerm};
use crate::packet::Direction;
use crate::path_policy::PathPolicy;
use crate::peer::{PeerMap, PeerStatus};
use crate::stats::{self, Stats};
use crate::timer::Awake;
use crate::wg::LocalKey;
use crate::wg::index::Prefixes;
use crate::wg::limit::{Bucket, Budget};
use crate::wg::queue::Room;
use crate::witness::Witness;
use crate::worker::{FIRST_STAMP, Outputs, Parts, Seat, Worker};

/// What an engine is told once.
#[derive(Debug, Clone, Copy)]
pub struct EngineConfig {
    /// Random, from the shell: keeps hashes and indices from strangers.
    pub seed: u64,
    /// For how long after the first view no TCP reset is sent for a segment without a flow: after a restart, streams that are allowed need
    /// a moment to be known again.
    pub reset_grace: Duration,
    /// Flows of this host.
    pub max_flows: u32,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            reset_grace: Duration::from_secs(5),
            max_flows: FlowLimits::DEFAULT_TOTAL,
        }
    }
}

/// The state of a host's data plane.
pub struct Engine<P: PathPolicy, K: LocalKey> {
    snapshot: ArcSwapOption<Snapshot<P, K>>,
    flows: FlowTable,
    mid_stream: MidStreamLimit,
    answers: AnswerLimit,
    budget: Mutex<Budget>,
    /// Initiations of ours, over all peers.
    initiations: Mutex<Bucket>,
    awake: Awake<K>,
    room: Arc<Room>,
    seats: Mutex<Vec<Arc<Seat>>>,
    installing: Mutex<Installing>,
    /// Local ends of cut flows that there was no room to tell yet.
    cuts: Mutex<cut::Pending>,
    /// From when on resets are sent.
    resets_from: AtomicU64,
    config: EngineConfig,
}

/// What only installations use.
struct Installing {
    prefixes: Prefixes,
    /// The stamp of the next view.
    next_stamp: u64,
}

/// What is in force: of one view, and never changed (I4).
pub(crate) struct Snapshot<P, K: LocalKey> {
    pub(crate) stamp: u64,
    pub(crate) policy: P,
    pub(crate) locals: Vec<Arc<K>>,
    pub(crate) peers: PeerMap<K>,
    pub(crate) lease: LeaseClock,
}

/// One step of a worker: what a packet passes through.
struct Step<'a, P: PathPolicy, K: LocalKey> {
    engine: &'a Engine<P, K>,
    snapshot: &'a Snapshot<P, K>,
    out: &'a mut Outputs,
    stats: &'a Stats,
    witness: Option<&'a mut (dyn Witness + 'static)>,
    moment: Moment,
}

impl<P: PathPolicy, K: LocalKey> Engine<P, K> {
    /// An engine without a view: nothing passes.
    #[must_use]
    pub fn new(config: EngineConfig) -> Self {
        let seed = |n| config.seed.rotate_left(n);
        Self {
            snapshot: ArcSwapOption::empty(),
            flows: FlowTable::new(FlowLimits::divided(config.max_flows, 1), seed(7)),
            mid_stream: MidStreamLimit::mid_stream(seed(14)),
            answers: AnswerLimit::answers(seed(21)),
            budget: Mutex::new(Budget::new(seed(28))),
            initiations: Mutex::default(),
            awake: Awake::new(),
            room: Arc::default(),
            seats: Mutex::default(),
            installing: Mutex::new(Installing {
                prefixes: Prefixes::new(seed(35)),
                next_stamp: FIRST_STAMP,
            }),
            cuts: Mutex::default(),
            resets_from: AtomicU64::new(u64::MAX),
            config,
        }
    }

    /// A worker for one more thread.
    #[must_use]
    pub fn worker(&self) -> Worker<P, K> {
        let mut seats = self.seats.lock();
        if let Some(seat) = seats.iter().find(|seat| seat.take()) {
            return Worker::new(seat.clone());
        }
        let seat = Arc::<Seat>::default();
        seats.push(seat.clone());
        Worker::new(seat)
    }

    /// Renews the lease of the view in force; whether there is one.
    pub fn renew(&self, term: LeaseTerm) -> bool {
        let snapshot = self.current();
        snapshot.inspect(|snapshot| snapshot.lease.renew(term)).is_some()
    }

    /// Takes a hint about a peer of the view in force; whether there is such a peer.
    pub fn hint(&self, host: HostId, hint: &Hint) -> bool {
        self.with_peer(host, |state| {
            state.endpoints.set_candidates(hint.candidates.iter().copied());
            state.set_incarnation(hint.incarnation);
        })
        .is_some()
    }

    /// Takes the last authenticated endpoint of a peer from before a restart; whether there is such a peer.
    pub fn remember(&self, host: HostId, endpoint: SocketAddr) -> bool {
        self.with_peer(host, |state| state.endpoints.remember(endpoint)).is_some()
    }

    /// Has a handshake with a peer begin at the next tick, for `ping` and after a restart; whether there is such a peer. Its success shows
    /// in [`Engine::peer`].
    pub fn want_handshake(&self, host: HostId) -> bool {
        self.with_peer(host, crate::peer::PeerState::want_handshake).is_some()
    }

    /// What is known of a peer.
    #[must_use]
    pub fn peer(&self, host: HostId, now: Timestamp) -> Option<PeerStatus> {
        Some(self.current()?.peers.by_host(host)?.status(now))
    }

    /// What is known of all peers, in no order that means anything.
    #[must_use]
    pub fn peers(&self, now: Timestamp) -> Vec<PeerStatus> {
        let snapshot = self.current();
        let peers = snapshot.iter().flat_map(|snapshot| snapshot.peers.all());
        peers.map(|peer| peer.status(now)).collect()
    }

    /// All counters, of all workers.
    #[must_use]
    pub fn stats(&self) -> stats::Snapshot {
        let mut sum = stats::Snapshot::default();
        self.seats.lock().iter().for_each(|seat| sum += seat.stats.snapshot());
        sum
    }

    /// The flows, for `status`.
    #[must_use]
    pub const fn flows(&self) -> &FlowTable {
        &self.flows
    }

    /// How many packets wait for handshakes.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.room.taken()
    }

    pub(crate) fn current(&self) -> Option<Arc<Snapshot<P, K>>> {
        self.snapshot.load_full()
    }

    fn with_peer<R>(&self, host: HostId, f: impl FnOnce(&mut crate::peer::PeerState<K>) -> R) -> Option<R> {
        let snapshot = self.current()?;
        let peer = snapshot.peers.by_host(host)?;
        let result = f(&mut peer.lock());
        self.awake.wake(peer);
        Some(result)
    }

    /// The worker's next step; `None` while there is no view.
    fn step<'a>(&'a self, worker: &'a mut Worker<P, K>, now: Timestamp) -> Option<Step<'a, P, K>> {
        let Parts {
            snapshot,
            out,
            stats,
            witness,
        } = worker.parts()?;
        let moment = Moment {
            now,
            mesh: snapshot.lease.mesh_time(now),
            stamp: snapshot.stamp,
        };
        Some(Step {
            engine: self,
            snapshot,
            out,
            stats,
            witness,
            moment,
        })
    }
}

impl<P: PathPolicy, K: LocalKey> Step<'_, P, K> {
    /// Counts a packet that ends here.
    fn dropped(&self, direction: Direction, reason: DropReason) {
        self.stats.dropped(direction, reason, 1);
    }

    fn now(&self) -> Timestamp {
        self.moment.now
    }
}
