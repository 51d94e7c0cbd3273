//! Which peers need ticks: those with a session, something that waits, or a handshake to be made. The others cost nothing.
//!
//! The list is taken out for a round and joined again behind it, so that its lock is never held together with a peer's.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::peer::Peer;
use crate::wg::LocalKey;

/// How often [`on_tick`](crate::engine::Engine::on_tick) wants to be called: sessions count in these steps.
pub const TICK: Duration = Duration::from_millis(100);

/// The peers that are awake.
pub(crate) struct Awake<K: LocalKey>(Mutex<Vec<Arc<Peer<K>>>>);

impl<K: LocalKey> Awake<K> {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// Has `peer` ticked from now on.
    pub(crate) fn wake(&self, peer: &Arc<Peer<K>>) {
        if peer.wake() {
            self.0.lock().push(peer.clone());
        }
    }

    /// Shows every peer that is awake to `tick`, which says whether it stays so.
    pub(crate) fn round(&self, mut tick: impl FnMut(&Arc<Peer<K>>) -> bool) {
        let mut awake = std::mem::take(&mut *self.0.lock());
        awake.retain(|peer| tick(peer));
        let mut list = self.0.lock();
        awake.append(&mut list);
        *list = awake;
    }
}
