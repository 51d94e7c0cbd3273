//! What time the mesh was told last: noted without leaf or revision, so that after a restart no lease is older than one before it.

use std::time::Duration;

use sqlx::{FromRow, SqlitePool};

use super::Store;
use super::error::StoreError;
use super::log;
use super::row::{Table, number};
use crate::clock::{Mark, MeshClock};

/// How old the note may grow before it is written again.
const GRAIN: Duration = Duration::from_secs(60);

/// By how much the time may run ahead of the note before the wall clock must have been set forward.
const STEP: Duration = Duration::from_secs(1);

/// The note, if one was ever written.
#[derive(FromRow)]
struct Note {
    time_told: Option<i64>,
    time_slack: Option<i64>,
    time_boot: Option<String>,
    time_boot_at: Option<i64>,
}

impl Note {
    /// The mark, and how much later than it was told at most.
    fn read(self) -> Result<Option<(Mark, Duration)>, StoreError> {
        let span = |number| Table("mesh").number(number).map(Duration::from_millis);
        let (Some(told), Some(slack), Some(boot), Some(at)) = (self.time_told, self.time_slack, self.time_boot, self.time_boot_at) else {
            return Ok(None);
        };
        let mark = Mark {
            told: span(told)?,
            boot,
            at: span(at)?,
        };
        Ok(Some((mark, span(slack)?)))
    }
}

/// Sets the clock of a store that was just opened: it tells no time before the note, nor before the audit's last leaf.
pub(super) async fn resume(pool: &SqlitePool, clock: &MeshClock) -> Result<(), StoreError> {
    let note = sqlx::query_as::<_, Note>("SELECT time_told, time_slack, time_boot, time_boot_at FROM mesh WHERE id = 1")
        .fetch_one(pool)
        .await?;
    if let Some((mark, slack)) = note.read()? {
        clock.resume(&mark, slack);
    }
    if let Some(time) = log::last_time(pool).await? {
        clock.not_before(Duration::from_secs(time.0));
    }
    Ok(())
}

impl Store {
    /// Notes what time it is, if hosts are told it and the last note is a minute old, or the clock was set forward since. Left out when the
    /// disk is full, and by a database that may be an old one: no lease waits for room for a note.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn keep_time(&self) -> Result<(), StoreError> {
        let mark = self.0.env.clock.mark();
        let is_fresh = |noted: &Mark| {
            let since = mark.told.saturating_sub(noted.told);
            since < GRAIN && since < mark.at.saturating_sub(noted.at).saturating_add(STEP)
        };
        if self.inventory().hosts.is_empty() || self.0.noted.lock().as_ref().is_some_and(is_fresh) {
            return Ok(());
        }
        self.note_time(mark, GRAIN).await
    }

    /// Notes what time it is behind everything else: nothing later is told.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn leave_time(&self) -> Result<(), StoreError> {
        self.note_time(self.0.env.clock.mark(), Duration::ZERO).await
    }

    async fn note_time(&self, mark: Mark, slack: Duration) -> Result<(), StoreError> {
        if self.inventory().read_only.is_some() || self.is_short_of_room() {
            return Ok(());
        }
        let written = self.write_mark(&mark, slack).await;
        *self.0.noted.lock() = Some(mark);
        match written {
            Err(StoreError::StorageFull) => Ok(()),
            written => written,
        }
    }

    async fn write_mark(&self, mark: &Mark, slack: Duration) -> Result<(), StoreError> {
        let _turn = self.0.turn.lock().await;
        let mut transaction = self.transaction().await?;
        sqlx::query("UPDATE mesh SET time_told = $1, time_slack = $2, time_boot = $3, time_boot_at = $4 WHERE id = 1")
            .bind(millis(mark.told).saturating_add(1))
            .bind(millis(slack))
            .bind(&mark.boot)
            .bind(millis(mark.at))
            .execute(&mut *transaction)
            .await?;
        self.commit_plain(transaction).await
    }
}

/// Whole milliseconds, as the database keeps them.
fn millis(time: Duration) -> i64 {
    number(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}
