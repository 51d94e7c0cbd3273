//! Reads the inventory out of the database.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use cloison_proto::id::HostId;
use cloison_proto::label::LabelSet;
use cloison_proto::net::OverlayRange;
use cloison_proto::version::Version;
use sqlx::{FromRow, SqliteConnection, SqlitePool};

use super::error::StoreError;
use super::row::Table;
use crate::inventory::{CoordinatorAddress, Host, Hosts, Instances, Inventory, NextKey, Placement, PolicyVersion, ReadOnly, StoredPolicy};

/// The inventory of a database that was just opened; `None` if no mesh was put into it.
pub(super) async fn load_first(pool: &SqlitePool) -> Result<Option<Inventory>, StoreError> {
    let mut connection = pool.acquire().await?;
    load(&mut connection, &BTreeMap::new()).await
}

/// The inventory as this transaction sees it. Keys of hosts that are `known` are not parsed again: checking a key costs more than all the
/// rest of its row.
pub(super) async fn load(db: &mut SqliteConnection, known: &Hosts) -> Result<Option<Inventory>, StoreError> {
    let Some(mesh) = sqlx::query_as::<_, MeshRow>("SELECT * FROM mesh WHERE id = 1")
        .fetch_optional(&mut *db)
        .await?
    else {
        return Ok(None);
    };
    let policy = sqlx::query_as::<_, PolicyRow>("SELECT * FROM policy ORDER BY version DESC LIMIT 1")
        .fetch_optional(&mut *db)
        .await?;
    let overlay = mesh.overlay()?;
    let table = Table("mesh");
    Ok(Some(Inventory {
        mesh: table.parse(&mesh.mesh)?,
        version: Version {
            generation: table.number(mesh.generation)?,
            revision: table.number(mesh.revision)?,
        },
        content_revision: table.number(mesh.content_revision)?,
        overlay,
        lease: Duration::from_secs(table.number(mesh.lease_seconds)?),
        addresses: table.json::<Vec<CoordinatorAddress>>(&mesh.addresses)?.into(),
        policy: policy.map(PolicyRow::read).transpose()?.map(Arc::new),
        read_only: mesh.read_only()?,
        hosts: Arc::new(hosts(db, known).await?),
        instances: Arc::new(instances(db, overlay).await?),
    }))
}

/// The two columns that say that nothing may change. A word that this program does not know is a doubt, too.
pub(super) fn read_only(why: Option<&str>, since: Option<i64>) -> Result<Option<ReadOnly>, StoreError> {
    let table = Table("mesh");
    let Some(why) = why else { return Ok(None) };
    Ok(Some(ReadOnly {
        why: table.parse(why)?,
        since: table.time(since.unwrap_or(0))?,
    }))
}

#[derive(FromRow)]
struct MeshRow {
    mesh: String,
    generation: i64,
    revision: i64,
    content_revision: i64,
    overlay_v4: String,
    overlay_v4_len: i64,
    overlay_v6: String,
    lease_seconds: i64,
    addresses: String,
    read_only: Option<String>,
    read_only_since: Option<i64>,
}

impl MeshRow {
    fn read_only(&self) -> Result<Option<ReadOnly>, StoreError> {
        read_only(self.read_only.as_deref(), self.read_only_since)
    }

    fn overlay(&self) -> Result<OverlayRange, StoreError> {
        let table = Table("mesh");
        let (v4, v6) = (table.parse(&self.overlay_v4)?, table.parse(&self.overlay_v6)?);
        OverlayRange::new(v4, table.number(self.overlay_v4_len)?, v6).map_err(|error| table.corrupt(error))
    }
}

#[derive(FromRow)]
pub(super) struct PolicyRow {
    version: i64,
    text: String,
    placements: String,
    applied_at: i64,
}

impl PolicyRow {
    pub(super) fn read(self) -> Result<StoredPolicy, StoreError> {
        let table = Table("policy");
        Ok(StoredPolicy {
            version: PolicyVersion(table.number(self.version)?),
            placements: table.json::<Vec<Placement>>(&self.placements)?.into(),
            applied_at: table.time(self.applied_at)?,
            text: self.text.into(),
        })
    }
}

#[derive(FromRow)]
pub(super) struct HostRow {
    id: String,
    name: String,
    name_given: i64,
    wg_key: String,
    next_wg_key: Option<String>,
    next_wg_at: Option<i64>,
    next_wg_revision: Option<i64>,
    identity: String,
    enrolled_at: i64,
    contested: i64,
}

impl HostRow {
    fn next(&self, known: Option<&Host>) -> Result<Option<NextKey>, StoreError> {
        let table = Table("host");
        let (Some(key), Some(since), Some(revision)) = (&self.next_wg_key, self.next_wg_at, self.next_wg_revision) else {
            return Ok(None);
        };
        let known = known.and_then(|known| known.next).filter(|known| known.key.to_string() == *key);
        Ok(Some(NextKey {
            key: match known {
                Some(known) => known.key,
                None => table.parse(key)?,
            },
            since: table.time(since)?,
            revision: table.number(revision)?,
        }))
    }

    /// The host of this row; its keys are taken from `known` if they are the same.
    pub(super) fn read(self, labels: LabelSet, known: Option<&Host>) -> Result<Host, StoreError> {
        let table = Table("host");
        let known = known.filter(|known| known.wg_key.to_string() == self.wg_key && known.identity.to_string() == self.identity);
        let (wg_key, identity) = match known {
            Some(known) => (known.wg_key, known.identity),
            None => (table.parse(&self.wg_key)?, table.parse(&self.identity)?),
        };
        Ok(Host {
            id: table.parse(&self.id)?,
            name: table.parse(&self.name)?,
            name_given: self.name_given != 0,
            labels,
            wg_key,
            next: self.next(known)?,
            identity,
            enrolled_at: table.time(self.enrolled_at)?,
            contested: self.contested != 0,
        })
    }
}

async fn hosts(db: &mut SqliteConnection, known: &Hosts) -> Result<Hosts, StoreError> {
    let mut labels = labels(db).await?;
    let rows = sqlx::query_as::<_, HostRow>("SELECT * FROM host WHERE revoked_at IS NULL")
        .fetch_all(db)
        .await?;
    let hosts = rows.into_iter().map(|row| {
        let id = Table("host").parse(&row.id)?;
        let host = row.read(labels.remove(&id).unwrap_or_default(), known.get(&id).map(|known| &**known))?;
        Ok((host.id, Arc::new(host)))
    });
    hosts.collect()
}

/// Every host's labels, of revoked ones too.
pub(super) async fn labels(db: &mut SqliteConnection) -> Result<BTreeMap<HostId, LabelSet>, StoreError> {
    let table = Table("host_label");
    let rows: Vec<(String, String, String)> = sqlx::query_as("SELECT host, key, value FROM host_label").fetch_all(db).await?;
    let mut labels = BTreeMap::<HostId, LabelSet>::new();
    for (host, key, value) in rows {
        labels
            .entry(table.parse(&host)?)
            .or_default()
            .insert(table.parse(&key)?, table.parse(&value)?);
    }
    Ok(labels)
}

async fn instances(db: &mut SqliteConnection, overlay: OverlayRange) -> Result<Instances, StoreError> {
    let table = Table("instance");
    let rows: Vec<(String, String, i64)> = sqlx::query_as("SELECT component, host, slot FROM instance WHERE gone_at IS NULL")
        .fetch_all(db)
        .await?;
    let mut instances = Instances::new();
    for (component, host, slot) in rows {
        let pair = overlay
            .nth(table.number(slot)?)
            .ok_or_else(|| table.corrupt(format_args!("slot {slot} beyond the range")))?;
        instances
            .entry(table.parse(&component)?)
            .or_default()
            .insert(table.parse(&host)?, pair);
    }
    Ok(instances)
}
