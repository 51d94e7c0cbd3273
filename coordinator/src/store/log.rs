//! The audit as the store keeps it: leaves in a chain, one behind the other.

use cloison_proto::version::MeshTime;
use parking_lot::Mutex;
use sqlx::{SqliteConnection, SqlitePool};

use super::Store;
use super::error::StoreError;
use super::model::AuditPage;
use super::row::{Table, number};
use crate::audit::{Entry, Leaf, leaf_hash};

/// Most leaves in one page.
pub(super) const MAX_PAGE: u32 = 500;

/// Most leaves about refused joins in a minute; the rest is counted in the next leaf. Strangers cannot fill the disk.
const REFUSALS_PER_MINUTE: u32 = 60;

/// Writes the next leaf.
pub(super) async fn append(db: &mut SqliteConnection, entry: &Entry, now: MeshTime) -> Result<(), StoreError> {
    let last: Option<(i64, Vec<u8>)> = sqlx::query_as("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1")
        .fetch_optional(&mut *db)
        .await?;
    let table = Table("audit");
    let (seq, previous) = match last {
        Some((seq, hash)) => (table.number::<u64>(seq)?.saturating_add(1), table.hash(&hash)?),
        None => (1, [0; 32]),
    };
    let bytes = minicbor::to_vec(entry.leaf(seq, now, previous)).map_err(|error| table.corrupt(error))?;
    let hash = leaf_hash(&bytes);
    sqlx::query("INSERT INTO audit (seq, leaf, hash) VALUES ($1, $2, $3)")
        .bind(number(seq))
        .bind(bytes)
        .bind(hash.as_slice())
        .execute(db)
        .await?;
    Ok(())
}

/// When the last leaf was written, if it can be read.
pub(super) async fn last_time(pool: &SqlitePool) -> Result<Option<MeshTime>, StoreError> {
    let last: Option<Vec<u8>> = sqlx::query_scalar("SELECT leaf FROM audit ORDER BY seq DESC LIMIT 1")
        .fetch_optional(pool)
        .await?;
    Ok(last.and_then(|bytes| decode(&bytes).ok()).map(|leaf| leaf.time))
}

impl Store {
    /// Leaves with a position above `after`, in order; at most `limit` of them, and never more than [`MAX_PAGE`].
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if a leaf cannot be read.
    pub async fn audit_page(&self, after: u64, limit: u32) -> Result<AuditPage, StoreError> {
        let limit = limit.clamp(1, MAX_PAGE);
        let rows: Vec<Vec<u8>> = sqlx::query_scalar("SELECT leaf FROM audit WHERE seq > $1 ORDER BY seq LIMIT $2")
            .bind(number(after))
            .bind(i64::from(limit))
            .fetch_all(&self.0.readers)
            .await?;
        let leaves = rows.iter().map(|bytes| decode(bytes)).collect::<Result<Vec<Leaf>, _>>()?;
        let full = u32::try_from(leaves.len()).is_ok_and(|len| len == limit);
        Ok(AuditPage {
            next: leaves.last().filter(|_| full).map(|leaf| leaf.seq),
            leaves,
        })
    }

    /// The position of the last leaf.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn audit_head(&self) -> Result<u64, StoreError> {
        let head: Option<i64> = sqlx::query_scalar("SELECT max(seq) FROM audit").fetch_one(&self.0.readers).await?;
        Table("audit").number(head.unwrap_or(0))
    }

    /// Walks the whole chain: how many leaves hold, and whether that is all of them.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] naming the first leaf that does not follow from the one before it.
    pub async fn verify_audit(&self) -> Result<u64, StoreError> {
        let table = Table("audit");
        let (mut seq, mut previous) = (0_u64, [0; 32]);
        loop {
            let rows: Vec<(i64, Vec<u8>, Vec<u8>)> =
                sqlx::query_as("SELECT seq, leaf, hash FROM audit WHERE seq > $1 ORDER BY seq LIMIT $2")
                    .bind(number(seq))
                    .bind(i64::from(MAX_PAGE))
                    .fetch_all(&self.0.readers)
                    .await?;
            if rows.is_empty() {
                return Ok(seq);
            }
            for (position, bytes, hash) in rows {
                let leaf = decode(&bytes)?;
                let follows = leaf.seq == seq.saturating_add(1) && number(leaf.seq) == position && leaf.previous == previous;
                if !follows || leaf_hash(&bytes).as_slice() != hash {
                    return Err(table.corrupt(format_args!("leaf {position}, which does not follow from the one before")));
                }
                (seq, previous) = (leaf.seq, leaf_hash(&bytes));
            }
        }
    }
}

fn decode(bytes: &[u8]) -> Result<Leaf, StoreError> {
    minicbor::decode(bytes).map_err(|error| Table("audit").corrupt(format_args!("an unreadable leaf ({error})")))
}

/// How many refusals may still be written down in this minute.
#[derive(Debug, Default)]
pub(super) struct RefusalBudget(Mutex<Window>);

#[derive(Debug, Default)]
struct Window {
    minute: u64,
    written: u32,
    suppressed: u64,
}

impl RefusalBudget {
    /// Whether a refusal at `now` gets a leaf: with how many before it did not.
    pub(super) fn take(&self, now: MeshTime) -> Option<u64> {
        let mut window = self.0.lock();
        let minute = now.0 / 60;
        if window.minute != minute {
            (window.minute, window.written) = (minute, 0);
        }
        if window.written >= REFUSALS_PER_MINUTE {
            window.suppressed = window.suppressed.saturating_add(1);
            return None;
        }
        window.written = window.written.saturating_add(1);
        Some(std::mem::take(&mut window.suppressed))
    }
}
