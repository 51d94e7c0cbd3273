//! Which instance has which pair of addresses.
//!
//! A pair belongs to (component, host) forever. It is given in the transaction that makes the two come together, kept when they part,
//! given again when they meet again, and free for others 30 days after they parted. Slots are handed out in a circle, so that a freed pair
//! is the last one to be given again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use cloison_proto::id::HostId;
use cloison_proto::label::ComponentName;
use cloison_proto::version::MeshTime;
use sqlx::{FromRow, SqliteConnection};

use super::error::StoreError;
use super::row::{Table, time};
use crate::inventory::{Instances, Inventory};

/// How long a pair of addresses is kept for an instance that is gone, or as long as the mesh's lease, if that is longer: no peer still knows
/// the old owner when another one gets it.
pub(super) const KEPT: Duration = Duration::from_secs(30 * 86_400);

/// An instance's name in the plan.
type Key = (ComponentName, HostId);

#[derive(FromRow)]
struct SlotRow {
    component: String,
    host: String,
    slot: i64,
    gone_at: Option<i64>,
}

/// Brings the table of addresses in line with the policy and the hosts of `inventory`, and returns all live instances.
pub(super) async fn reconcile(db: &mut SqliteConnection, inventory: &Inventory, now: MeshTime) -> Result<Instances, StoreError> {
    let kept = KEPT.max(inventory.lease);
    let mut missing = wanted(inventory);
    let mut used = BTreeSet::new();
    let mut live = BTreeMap::<Key, u32>::new();
    let rows = sqlx::query_as::<_, SlotRow>("SELECT component, host, slot, gone_at FROM instance")
        .fetch_all(&mut *db)
        .await?;
    for row in rows {
        let table = Table("instance");
        let key: Key = (table.parse(&row.component)?, table.parse(&row.host)?);
        let slot: u32 = table.number(row.slot)?;
        let wanted = missing.remove(&key);
        match row.gone_at {
            Some(gone_at) if !wanted && table.time(gone_at)?.plus(kept) <= now => {
                forget(db, &key).await?;
                continue;
            }
            Some(_) if wanted => set_gone(db, &key, None).await?,
            None if !wanted => set_gone(db, &key, Some(now)).await?,
            _ => {}
        }
        used.insert(slot);
        if wanted {
            live.insert(key, slot);
        }
    }
    if !missing.is_empty() {
        live.extend(give(db, inventory, missing, &mut used, now).await?);
    }
    Ok(pairs(inventory, live))
}

/// Every (component, host) that the policy brings together.
fn wanted(inventory: &Inventory) -> BTreeSet<Key> {
    let placements = inventory.policy.iter().flat_map(|policy| policy.placements.iter());
    let keys = placements.flat_map(|placement| {
        let hosts = inventory.hosts.values().filter(|host| placement.covers(host));
        hosts.map(|host| (placement.component.clone(), host.id))
    });
    keys.collect()
}

/// Gives each of `missing` the next free slot behind the last one given.
async fn give(
    db: &mut SqliteConnection,
    inventory: &Inventory,
    missing: BTreeSet<Key>,
    used: &mut BTreeSet<u32>,
    now: MeshTime,
) -> Result<Vec<(Key, u32)>, StoreError> {
    let capacity = inventory.overlay.capacity();
    let start: i64 = sqlx::query_scalar("SELECT next_slot FROM mesh WHERE id = 1")
        .fetch_one(&mut *db)
        .await?;
    let start: u32 = Table("mesh").number(start)?;
    let mut candidates = (start..capacity).chain(0..start.min(capacity));
    let mut given = Vec::with_capacity(missing.len());
    let mut next = start;
    for key in missing {
        let Some(slot) = candidates.find(|slot| !used.contains(slot)) else {
            return Err(StoreError::PoolExhausted {
                range: inventory.overlay.to_string(),
                component: key.0.to_string(),
            });
        };
        sqlx::query("INSERT INTO instance (component, host, slot, given_at) VALUES ($1, $2, $3, $4)")
            .bind(key.0.as_str())
            .bind(key.1.to_string())
            .bind(i64::from(slot))
            .bind(time(now))
            .execute(&mut *db)
            .await?;
        used.insert(slot);
        next = slot.saturating_add(1);
        given.push((key, slot));
    }
    sqlx::query("UPDATE mesh SET next_slot = $1 WHERE id = 1")
        .bind(i64::from(next))
        .execute(&mut *db)
        .await?;
    Ok(given)
}

async fn set_gone(db: &mut SqliteConnection, key: &Key, gone_at: Option<MeshTime>) -> Result<(), StoreError> {
    sqlx::query("UPDATE instance SET gone_at = $3 WHERE component = $1 AND host = $2")
        .bind(key.0.as_str())
        .bind(key.1.to_string())
        .bind(gone_at.map(time))
        .execute(db)
        .await?;
    Ok(())
}

async fn forget(db: &mut SqliteConnection, key: &Key) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM instance WHERE component = $1 AND host = $2")
        .bind(key.0.as_str())
        .bind(key.1.to_string())
        .execute(db)
        .await?;
    Ok(())
}

fn pairs(inventory: &Inventory, live: BTreeMap<Key, u32>) -> Instances {
    let mut instances = Instances::new();
    for ((component, host), slot) in live {
        // A slot beyond the range was ruled out when it was given, and when the snapshot was read.
        if let Some(pair) = inventory.overlay.nth(slot) {
            instances.entry(component).or_default().insert(host, pair);
        }
    }
    instances
}
