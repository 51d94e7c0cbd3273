//! Peers: other hosts, as this one sees them.
//!
//! A [`Peer`] lives as long as its host stands in the view, from one view to the next; what changes in it is behind one small mutex, never
//! held across anything that waits. Handshakes have a pace of their own: one initiation a second at most, over all endpoints and keys
//! together, and less when nobody answers.
//!
//! What this module does not do: judge packets, or send.

pub mod endpoint;
pub mod map;
pub mod sessions;
mod state;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cloison_proto::id::HostId;
use cloison_proto::version::Timestamp;
use parking_lot::{Mutex, MutexGuard};

pub use endpoint::{Endpoint, Endpoints};
pub use map::PeerMap;
pub use state::{Keys, PeerState};

use crate::wg::LocalKey;
use crate::wg::index::PeerPrefix;

/// Position of a peer in its view's map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerIndex(pub u32);

/// Another host.
pub struct Peer<K: LocalKey> {
    host: HostId,
    prefix: PeerPrefix,
    /// Whether it stands in the list of those that need ticks.
    awake: AtomicBool,
    state: Mutex<PeerState<K>>,
}

/// What `status` shows of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerStatus {
    /// The host.
    pub host: HostId,
    /// Where it was last seen.
    pub endpoint: Option<Endpoint>,
    /// How old the keys in use are; `None` without a session.
    pub session_age: Option<Duration>,
    /// How long the last handshake that we began took.
    pub round_trip: Option<Duration>,
    /// Bytes of inner packets sealed for it.
    pub sent_bytes: u64,
    /// Bytes of inner packets opened from it.
    pub received_bytes: u64,
    /// Packets that wait for a handshake with it.
    pub waiting: usize,
    /// When an inner packet last went either way.
    pub last_used: Option<Timestamp>,
}

impl<K: LocalKey> Peer<K> {
    /// A peer without keys or endpoints, whose session indices begin with `prefix`.
    pub(crate) fn new(host: HostId, prefix: PeerPrefix, state: PeerState<K>) -> Self {
        Self {
            host,
            prefix,
            awake: AtomicBool::new(false),
            state: Mutex::new(state),
        }
    }

    /// The host.
    #[must_use]
    pub const fn host(&self) -> HostId {
        self.host
    }

    /// What its session indices begin with.
    #[must_use]
    pub const fn prefix(&self) -> PeerPrefix {
        self.prefix
    }

    /// What changes. The lock is for a moment: nothing is waited for while it is held.
    pub(crate) fn lock(&self) -> MutexGuard<'_, PeerState<K>> {
        self.state.lock()
    }

    /// Notes that the peer needs ticks; whether that is news.
    pub(crate) fn wake(&self) -> bool {
        !self.awake.load(Ordering::Relaxed) && !self.awake.swap(true, Ordering::AcqRel)
    }

    /// Notes that it needs none for now. To be called with the state locked and nothing left in it to do.
    pub(crate) fn sleep(&self) {
        self.awake.store(false, Ordering::Release);
    }

    /// What `status` shows.
    #[must_use]
    pub fn status(&self, now: Timestamp) -> PeerStatus {
        self.lock().status(self.host, now)
    }
}
