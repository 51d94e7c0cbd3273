//! From a view to what the engine needs of it: paths, peers and the lease, installed together or not at all (I4, I5).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cloison_proto::id::HostId;
use cloison_proto::key::Secret32;
use cloison_proto::version::{MeshTime, Timestamp};
use cloison_proto::view::{LocalInstance, Peer, View};

use crate::TunId;
use crate::path_policy::Mesh;
use crate::peer::{Keys, PeerIndex};
use crate::wg::LocalKey;

/// What is to be installed.
pub struct Plan<P, K> {
    /// Where packets may go.
    pub policy: P,
    /// Our keys: handshakes begin with the first, and are accepted for all.
    pub locals: Vec<Arc<K>>,
    /// The peers, in the order in which `policy` names them.
    pub peers: Vec<PeerPlan<K>>,
    /// How long all this may be used; `None`: not at all, until it is [renewed](crate::engine::Engine::renew).
    pub lease: Option<LeaseTerm>,
}

/// One peer of a plan.
pub struct PeerPlan<K> {
    /// The host.
    pub host: HostId,
    /// The keys between us.
    pub keys: Keys<K>,
}

/// How long a view may be used, on this host's clock, and what time it is in the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseTerm {
    /// A moment of this host's clock ...
    pub at: Timestamp,
    /// ... and what the mesh's clock showed then.
    pub mesh: MeshTime,
    /// When the lease ends, on this host's clock.
    pub ends: Timestamp,
}

/// What is known of a peer beside the view, unsigned: it only says where and how to try.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Hint {
    /// Endpoints to try.
    pub candidates: Vec<SocketAddr>,
    /// The peer's incarnation; zero if it is not known.
    pub incarnation: u64,
}

/// What an installation did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Installed {
    /// Peers carried over from the view before.
    pub kept_peers: usize,
    /// Peers that are new.
    pub new_peers: usize,
    /// Peers that are gone.
    pub gone_peers: usize,
    /// Flows that go on.
    pub kept_flows: usize,
    /// Flows that were cut.
    pub cut_flows: usize,
}

impl<K: LocalKey> Plan<Mesh, K> {
    /// The plan for `view`. `tun` names the TUN of each instance of this host, or `None` if it cannot be enforced. `psk` gives the
    /// pre-shared key with a host of a generation above zero; a peer whose key is not known is not spoken to.
    #[must_use]
    pub fn from_view(
        view: &View,
        locals: Vec<Arc<K>>,
        lease: Option<LeaseTerm>,
        tun: impl Fn(&LocalInstance) -> Option<TunId>,
        psk: impl Fn(HostId, u32) -> Option<Secret32>,
    ) -> Self {
        let positions: BTreeMap<_, _> = view.peers.keys().copied().zip((0..).map(PeerIndex)).collect();
        let policy = Mesh::new(view, tun, |host| positions.get(&host).copied());
        let peers = view.peers.values().map(|peer| PeerPlan {
            host: peer.id,
            keys: keys(peer, &locals, &psk),
        });
        let peers = peers.collect();
        Self {
            policy,
            locals,
            peers,
            lease,
        }
    }
}

fn keys<K>(peer: &Peer, locals: &[Arc<K>], psk: impl Fn(HostId, u32) -> Option<Secret32>) -> Keys<K> {
    let secret = if peer.psk_generation == 0 {
        None
    } else {
        psk(peer.id, peer.psk_generation)
    };
    let usable = peer.psk_generation == 0 || secret.is_some();
    Keys {
        locals: locals.to_vec(),
        remotes: if usable { peer.wg_keys.clone() } else { Vec::new() },
        psk: secret,
        psk_generation: peer.psk_generation,
    }
}

/// The lease of the view in force. It is renewed in place, without an installation.
#[derive(Debug)]
pub(crate) struct LeaseClock {
    /// Nanoseconds of mesh time at the zero of the host's clock, modulo 2^64.
    offset: AtomicU64,
    ends: AtomicU64,
}

impl LeaseClock {
    pub(crate) fn new(term: Option<LeaseTerm>) -> Self {
        let clock = Self {
            offset: AtomicU64::new(0),
            ends: AtomicU64::new(0),
        };
        if let Some(term) = term {
            clock.renew(term);
        }
        clock
    }

    pub(crate) fn renew(&self, term: LeaseTerm) {
        let mesh = Duration::from_secs(term.mesh.0).as_nanos();
        let mesh = u64::try_from(mesh).unwrap_or(u64::MAX);
        self.offset.store(mesh.wrapping_sub(term.at.0), Ordering::Relaxed);
        self.ends.store(term.ends.0, Ordering::Release);
    }

    /// Mesh time, as far as the last lease tells it.
    pub(crate) fn mesh_time(&self, now: Timestamp) -> MeshTime {
        let nanos = now.0.wrapping_add(self.offset.load(Ordering::Relaxed));
        MeshTime(Duration::from_nanos(nanos).as_secs())
    }

    /// Whether the view may be used at `now` (I13).
    pub(crate) fn holds(&self, now: Timestamp) -> bool {
        now.0 < self.ends.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mesh_time_runs_on_from_what_the_lease_said() {
        let at = Timestamp(5_000_000_000);
        let term = LeaseTerm {
            at,
            mesh: MeshTime(1_800_000_000),
            ends: at + Duration::from_secs(60),
        };
        let clock = LeaseClock::new(Some(term));
        assert_eq!(clock.mesh_time(at + Duration::from_secs(7)), MeshTime(1_800_000_007));
        assert!(clock.holds(at + Duration::from_secs(59)) && !clock.holds(at + Duration::from_secs(60)));
        assert!(!LeaseClock::new(None).holds(Timestamp(0)));
    }
}
