//! What systemd is told (sd_notify(3)), if it started us and wants to know: that we serve, how the mesh does, and that we are alive.
//!
//! The watchdog is told only after a look at what makes a coordinator: the runtime came back to this task, the store answered a read, and the
//! writing transaction could be begun. A coordinator that hangs in any of them falls silent, and systemd starts it anew. Outside systemd all
//! of this does nothing.

use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::publish::Hub;
use crate::store::Store;

/// How often the line of `systemctl status` is brought up to date.
const STATUS_PERIOD: Duration = Duration::from_secs(10);

/// Tells systemd something; that it could not be told stops nobody.
pub fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "systemd could not be told how the coordinator does");
    }
}

/// One line about the mesh for `systemctl status`.
#[must_use]
pub fn line(store: &Store, hub: &Hub) -> String {
    let (inventory, progress) = (store.inventory(), hub.progress());
    format!(
        "{}: version {}, {} hosts, {} linked, {} have their view",
        inventory.mesh,
        inventory.version,
        inventory.hosts.len(),
        progress.linked,
        progress.applied
    )
}

/// Keeps the line of `systemctl status` current, for ever.
pub async fn keep_status(store: Store, hub: Arc<Hub>) {
    let mut told = line(&store, &hub);
    let mut period = interval(STATUS_PERIOD);
    period.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        period.tick().await;
        let now = line(&store, &hub);
        if now != told {
            tell(&[NotifyState::Status(&now)]);
            told = now;
        }
    }
}

/// Feeds the watchdog for ever, if systemd keeps one.
pub async fn feed_watchdog(store: Store) {
    match sd_notify::watchdog_enabled() {
        Some(limit) => feed(limit, &store, || tell(&[NotifyState::Watchdog])).await,
        None => std::future::pending().await,
    }
}

/// Looks four times within `limit`, each time for at most half of it: a sound coordinator is never late.
async fn feed(limit: Duration, store: &Store, alive: impl Fn()) {
    let mut period = interval((limit / 4).max(Duration::from_millis(1)));
    period.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        period.tick().await;
        match timeout(limit / 2, store.probe()).await {
            Ok(Ok(())) => alive(),
            Ok(Err(error)) => tracing::error!(%error, "the store does not do its work; the watchdog is not told that all is well"),
            Err(_) => tracing::error!("the store does not answer in time; the watchdog is not told that all is well"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::store::testing::{TestResult, on_disk};

    const LIMIT: Duration = Duration::from_millis(200);

    /// How often the watchdog is told within two of its times that all is well.
    async fn fed(store: &Store) -> usize {
        let count = AtomicUsize::new(0);
        let alive = || {
            count.fetch_add(1, Ordering::SeqCst);
        };
        let _ = timeout(LIMIT * 2, feed(LIMIT, store, alive)).await;
        count.into_inner()
    }

    #[tokio::test]
    async fn the_watchdog_hears_of_a_store_that_reads_and_writes() -> TestResult {
        let dir = tempfile::tempdir()?;
        let (store, _) = on_disk(&dir.path().join("db")).await?;
        assert!(fed(&store).await >= 2);
        Ok(())
    }

    #[tokio::test]
    async fn the_watchdog_hears_nothing_while_the_writer_hangs_or_the_store_is_closed() -> TestResult {
        let dir = tempfile::tempdir()?;
        let (store, _) = on_disk(&dir.path().join("db")).await?;
        let hanging = store.hang().await?;
        assert_eq!(fed(&store).await, 0);
        drop(hanging);
        assert!(fed(&store).await >= 1);
        store.close().await;
        assert_eq!(fed(&store).await, 0);
        Ok(())
    }
}
