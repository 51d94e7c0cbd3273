//! Who is who in one view: peers by key, by session index and by host. Immutable; a new view brings a new map.

use std::sync::Arc;

use cloison_proto::id::HostId;
use cloison_proto::key::WgPublicKey;
use foldhash::fast::FixedState;
use hashbrown::HashMap;

use super::{Peer, PeerIndex};
use crate::wg::LocalKey;
use crate::wg::index::PeerPrefix;

/// The peers of one view.
pub struct PeerMap<K: LocalKey> {
    peers: Vec<Arc<Peer<K>>>,
    by_key: HashMap<WgPublicKey, PeerIndex, FixedState>,
    by_prefix: HashMap<PeerPrefix, PeerIndex, FixedState>,
    by_host: HashMap<HostId, PeerIndex, FixedState>,
}

impl<K: LocalKey> PeerMap<K> {
    /// The map of `peers`, each with its keys, in the order of the plan.
    pub fn new<'a>(peers: impl IntoIterator<Item = (Arc<Peer<K>>, &'a [WgPublicKey])>) -> Self {
        let mut map = Self {
            peers: Vec::new(),
            by_key: HashMap::default(),
            by_prefix: HashMap::default(),
            by_host: HashMap::default(),
        };
        for (peer, keys) in peers {
            let index = PeerIndex(u32::try_from(map.peers.len()).unwrap_or(u32::MAX));
            map.by_key.extend(keys.iter().map(|key| (*key, index)));
            map.by_prefix.entry(peer.prefix()).or_insert(index);
            map.by_host.insert(peer.host(), index);
            map.peers.push(peer);
        }
        map
    }

    /// A peer by its position.
    #[must_use]
    pub fn get(&self, index: PeerIndex) -> Option<&Arc<Peer<K>>> {
        self.peers.get(usize::try_from(index.0).ok()?)
    }

    /// The peer that a static key belongs to.
    #[must_use]
    pub fn by_key(&self, key: &WgPublicKey) -> Option<PeerIndex> {
        self.by_key.get(key).copied()
    }

    /// The peer that a session index belongs to.
    #[must_use]
    pub fn by_prefix(&self, prefix: PeerPrefix) -> Option<PeerIndex> {
        self.by_prefix.get(&prefix).copied()
    }

    /// The peer that is this host.
    #[must_use]
    pub fn by_host(&self, host: HostId) -> Option<&Arc<Peer<K>>> {
        self.get(*self.by_host.get(&host)?)
    }

    /// All peers, in the order of the plan.
    #[must_use]
    pub fn all(&self) -> &[Arc<Peer<K>>] {
        &self.peers
    }
}
