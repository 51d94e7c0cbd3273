//! Keeps rotations going: what was announced long enough takes over, and what was replaced long enough is retired.
//!
//! It looks once a second and has no memory: how far a rotation is stands in the store and on the disk, who has taken it up in the hub. So it
//! can be killed anywhere, and goes on where it was.

use std::sync::Arc;
use std::time::Duration;

use cloison_proto::id::HostId;
use cloison_proto::version::MeshTime;
use tokio::time::{MissedTickBehavior, interval};

use crate::inventory::NextKey;
use crate::publish::Hub;
use crate::store::{Store, StoreError};

/// How often it looks.
const PERIOD: Duration = Duration::from_secs(1);

/// How long peers have for making sessions with a new WireGuard key before the old one goes, however fast all of them took it up: some
/// handshakes with their retransmissions.
const SETTLING: Duration = Duration::from_secs(5);

/// Moves rotations on.
#[derive(Debug)]
pub struct Keeper {
    store: Store,
    hub: Arc<Hub>,
}

impl Keeper {
    /// A keeper of the mesh in `store`, whose hosts are linked to `hub`.
    #[must_use]
    pub const fn new(store: Store, hub: Arc<Hub>) -> Self {
        Self { store, hub }
    }

    /// Looks after rotations, for ever.
    pub async fn run(self) {
        let mut period = interval(PERIOD);
        period.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            period.tick().await;
            if let Err(error) = self.pass().await {
                tracing::error!(%error, "a rotation could not be moved on; trying again");
            }
        }
    }

    /// Looks once, and moves on what is due.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn pass(&self) -> Result<(), StoreError> {
        self.retire_wg_keys().await
    }

    /// A host's former WireGuard key goes when the host and all its peers work with the new one, or after one lease: who did not hear of it
    /// by then is not allowed anything any more.
    async fn retire_wg_keys(&self) -> Result<(), StoreError> {
        let (inventory, now) = (self.store.inventory(), self.store.now());
        if inventory.read_only.is_some() {
            return Ok(());
        }
        let changing = inventory.hosts.values().filter_map(|host| Some((host.id, host.next?)));
        let due: Vec<_> = changing
            .filter(|(host, next)| self.is_due(*host, next, inventory.lease, now))
            .collect();
        for (host, next) in due {
            if self.store.retire_wg_key(host, &next.key).await? {
                tracing::info!(%host, key = %next.key, "a host's former WireGuard key is retired");
            }
        }
        Ok(())
    }

    fn is_due(&self, host: HostId, next: &NextKey, lease: Duration, now: MeshTime) -> bool {
        // Either way: a clock that was set back must not keep a key alive that nobody needs.
        let settled = now.0.abs_diff(next.since.0) >= SETTLING.as_secs();
        now >= next.since.plus(lease) || (settled && self.hub.is_taken_up(host, next.revision))
    }
}
