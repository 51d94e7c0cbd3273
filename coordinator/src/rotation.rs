//! Keeps rotations going: what was announced long enough takes over, and what was replaced long enough is retired.
//!
//! It looks once a second and has no memory: how far a rotation is stands in the store and on the disk, who has taken it up in the hub. So it
//! can be killed anywhere, and goes on where it was. A part whose files cannot be written rests for longer after each failure, because each
//! attempt is audited before it is made.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use cloison_proto::id::HostId;
use cloison_proto::version::MeshTime;
use parking_lot::Mutex;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::audit::{Action, Actor, Context};
use crate::inventory::NextKey;
use crate::publish::{Hub, trust_digest};
use crate::store::{Store, StoreError};
use crate::trust::{Part, Roots, RootsError, ServerError, ServerIdentity, Stage};

/// How often it looks.
const PERIOD: Duration = Duration::from_secs(1);

/// How long peers have for making sessions with a new WireGuard key before the old one goes, however fast all of them took it up: some
/// handshakes with their retransmissions.
const SETTLING: Duration = Duration::from_secs(5);

/// How long a part rests when it could not be moved on; twice as long after each further time, up to [`LONGEST_REST`].
const REST: Duration = Duration::from_secs(2);

const LONGEST_REST: Duration = Duration::from_secs(3600);

/// Why a rotation was not moved on. It is tried again.
#[derive(Debug, thiserror::Error)]
pub enum RotationError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The keys' files.
    #[error(transparent)]
    Roots(#[from] RootsError),
    /// The certificate that hosts are shown.
    #[error(transparent)]
    Server(#[from] ServerError),
}

/// Moves rotations on.
#[derive(Debug)]
pub struct Keeper {
    store: Store,
    hub: Arc<Hub>,
    roots: Arc<Roots>,
    identity: Arc<ServerIdentity>,
    rests: Mutex<Rests>,
}

impl Keeper {
    /// A keeper of the mesh in `store`, whose hosts are linked to `hub`, with its keys and the certificate that they are shown.
    #[must_use]
    pub fn new(store: Store, hub: Arc<Hub>, roots: Arc<Roots>, identity: Arc<ServerIdentity>) -> Self {
        Self {
            store,
            hub,
            roots,
            identity,
            rests: Mutex::default(),
        }
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

    /// Looks once, and moves on what is due. What fails stops nothing else.
    ///
    /// # Errors
    /// The first [`RotationError`].
    pub async fn pass(&self) -> Result<(), RotationError> {
        if self.store.inventory().read_only.is_some() {
            return Ok(());
        }
        let mut outcome = self.retire_wg_keys().await.map_err(RotationError::from);
        for part in Part::ALL {
            if self.rests.lock().has(part, Instant::now()) {
                continue;
            }
            let moved = self.move_on(part).await;
            self.rests.lock().note(part, moved.is_err(), Instant::now());
            outcome = outcome.and(moved);
        }
        outcome
    }

    /// An announced key is used when every host trusts it, or after one lease: who did not hear of it by then is not allowed anything any more,
    /// and is told when it comes back. A former key is trusted for one more lease.
    async fn move_on(&self, part: Part) -> Result<(), RotationError> {
        let (inventory, now) = (self.store.inventory(), self.store.now());
        match self.roots.stage(part) {
            Stage::Settled => return Ok(()),
            Stage::Announced(since) => {
                let settled = now.0.abs_diff(since.0) >= SETTLING.as_secs();
                let digest = || trust_digest(&self.roots.statements(&inventory.addresses));
                if now < since.plus(inventory.lease) && !(settled && self.hub.is_trusted_by_all(digest())) {
                    return Ok(());
                }
                self.store
                    .note_rotation(Context::of(Actor::Coordinator), Action::TrustSwitch, part)
                    .await?;
                self.change(move |roots| roots.switch(part, now)).await?;
                tracing::info!(%part, "the announced key is in use");
            }
            Stage::Switched(since) => {
                if now < since.plus(inventory.lease) {
                    return Ok(());
                }
                self.store
                    .note_rotation(Context::of(Actor::Coordinator), Action::TrustRetire, part)
                    .await?;
                self.change(move |roots| roots.retire(part, now)).await?;
                tracing::info!(%part, "the former key is retired");
            }
        }
        self.identity.renew()?;
        self.hub.wake_links();
        Ok(())
    }

    /// Changes the keys where it may wait for the disk.
    async fn change(&self, change: impl FnOnce(&Roots) -> Result<bool, RootsError> + Send + 'static) -> Result<bool, RotationError> {
        let roots = Arc::clone(&self.roots);
        match tokio::task::spawn_blocking(move || change(&roots)).await {
            Ok(changed) => Ok(changed?),
            Err(_) => Ok(false),
        }
    }

    /// A host's former WireGuard key goes when the host and all its peers work with the new one, or after one lease: who did not hear of it
    /// by then is not allowed anything any more.
    async fn retire_wg_keys(&self) -> Result<(), StoreError> {
        let (inventory, now) = (self.store.inventory(), self.store.now());
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

/// The parts that could not be moved on: how long each rests, and until when.
#[derive(Debug, Default)]
struct Rests(BTreeMap<Part, (Duration, Instant)>);

impl Rests {
    /// Whether the part rests.
    fn has(&self, part: Part, now: Instant) -> bool {
        self.0.get(&part).is_some_and(|(_, until)| now < *until)
    }

    /// Notes how an attempt went.
    fn note(&mut self, part: Part, failed: bool, now: Instant) {
        if failed {
            let before = self.0.get(&part).map(|(rest, _)| *rest);
            let rest = before.map_or(REST, |rest| (rest * 2).min(LONGEST_REST));
            self.0.insert(part, (rest, now + rest));
        } else {
            self.0.remove(&part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_again_and_again_is_tried_ever_less_often_and_alone() {
        let (mut rests, mut now) = (Rests::default(), Instant::now());
        let mut times = 0;
        let end = now + Duration::from_secs(86_400);
        while now < end {
            if !rests.has(Part::SigningKey, now) {
                times += 1;
                rests.note(Part::SigningKey, true, now);
            }
            assert!(!rests.has(Part::HostIssuer, now));
            now += PERIOD;
        }
        assert!((24..40).contains(&times), "{times} times a day");
        rests.note(Part::SigningKey, false, now);
        assert!(!rests.has(Part::SigningKey, now), "what went well does not rest");
        rests.note(Part::SigningKey, true, now);
        assert!(!rests.has(Part::SigningKey, now + REST), "and begins anew");
    }
}
