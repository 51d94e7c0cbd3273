//! The mesh itself: its beginning, and its settings.

use std::time::Duration;

use sqlx::{SqliteConnection, SqlitePool};

use super::change::Reach;
use super::error::{OpenError, StoreError};
use super::model::{MeshChange, NewMesh};
use super::row::{Table, number, time, to_json};
use super::{Store, log, snapshot};
use crate::audit::{Action, Actor, Context, Entry, Object};
use crate::config::HostPort;
use crate::credential::Scope;
use crate::entropy::Environment;
use crate::inventory::{CoordinatorAddress, Inventory};

/// How long a lease may be: at least some tries of reaching the coordinator, at most what a lost host may keep.
const LEASE_BOUNDS: std::ops::RangeInclusive<Duration> = Duration::from_secs(10)..=Duration::from_secs(90 * 86_400);

/// Most addresses that agents are told.
const MAX_ADDRESSES: usize = 8;

/// Writes the new mesh's row and the first leaf, and returns its inventory.
pub(super) async fn insert(pool: &SqlitePool, env: &Environment, mesh: NewMesh) -> Result<Inventory, OpenError> {
    mesh.check()?;
    let now = env.clock.now();
    let mut transaction = pool.begin_with("BEGIN IMMEDIATE").await.map_err(StoreError::from)?;
    let (v4, v4_len) = mesh.overlay.v4();
    sqlx::query(
        "INSERT INTO mesh (id, mesh, generation, revision, content_revision, overlay_v4, overlay_v4_len, overlay_v6, lease_seconds, \
         addresses, next_slot) VALUES (1, $1, $2, 1, 1, $3, $4, $5, $6, $7, 0)",
    )
    .bind(mesh.mesh.to_string())
    .bind(time(now))
    .bind(v4.to_string())
    .bind(i64::from(v4_len))
    .bind(mesh.overlay.v6().0.to_string())
    .bind(number(mesh.lease.as_secs()))
    .bind(to_json(&mesh.addresses)?)
    .execute(&mut *transaction)
    .await
    .map_err(StoreError::from)?;
    log::append(
        &mut transaction,
        &Entry::done(Context::of(Actor::Local), Action::MeshInit, &[Object::Mesh]),
        now,
    )
    .await?;
    let inventory = snapshot::load(&mut transaction, &Default::default()).await?;
    transaction.commit().await.map_err(StoreError::from)?;
    inventory.ok_or_else(|| {
        StoreError::Corrupt {
            table: "mesh",
            problem: "no row".into(),
        }
        .into()
    })
}

impl NewMesh {
    /// Whether the mesh can be made.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for a value outside its bounds.
    pub fn check(&self) -> Result<(), StoreError> {
        check_lease(self.lease)?;
        check_addresses(&self.addresses)
    }
}

impl Store {
    /// Changes the mesh's settings (scope `owner`), and returns the new revision.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for a value outside its bounds, and for another range while instances have addresses of the present one.
    pub async fn set_mesh(&self, context: Context, change: MeshChange) -> Result<u64, StoreError> {
        let mut writing = self.begin(context, Scope::Owner).await?;
        if let Some(lease) = change.lease {
            check_lease(lease)?;
            sqlx::query("UPDATE mesh SET lease_seconds = $1 WHERE id = 1")
                .bind(number(lease.as_secs()))
                .execute(writing.db())
                .await?;
        }
        if let Some(addresses) = change.addresses {
            check_addresses(&addresses)?;
            sqlx::query("UPDATE mesh SET addresses = $1 WHERE id = 1")
                .bind(to_json(&addresses)?)
                .execute(writing.db())
                .await?;
        }
        if let Some(overlay) = change.overlay {
            clear_range(writing.db()).await?;
            let (v4, v4_len) = overlay.v4();
            sqlx::query("UPDATE mesh SET overlay_v4 = $1, overlay_v4_len = $2, overlay_v6 = $3, next_slot = 0 WHERE id = 1")
                .bind(v4.to_string())
                .bind(i64::from(v4_len))
                .bind(overlay.v6().0.to_string())
                .execute(writing.db())
                .await?;
        }
        writing.finish(Reach::Inventory, Action::MeshSet, &[Object::Mesh]).await
    }

    /// Adds an address at which hosts find the coordinator (scope `owner`); one that is there stays. The revision is returned.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] beyond the eighth.
    pub async fn add_address(&self, context: Context, address: &HostPort) -> Result<u64, StoreError> {
        let mut change = self.begin(context, Scope::Owner).await?;
        let mut addresses = addresses(change.db()).await?;
        let text = address.to_string();
        if addresses.iter().any(|known| known.address == text) {
            return Ok(self.inventory().version.revision);
        }
        addresses.push(CoordinatorAddress {
            address: text,
            not_before: change.now,
        });
        put_addresses(change.db(), &addresses).await?;
        change.finish(Reach::Inventory, Action::AddressAdd, &[Object::Mesh]).await
    }

    /// Removes an address of the coordinator (scope `owner`). The revision is returned.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Invalid`] for the last one.
    pub async fn remove_address(&self, context: Context, address: &HostPort) -> Result<u64, StoreError> {
        let mut change = self.begin(context, Scope::Owner).await?;
        let (mut addresses, text) = (addresses(change.db()).await?, address.to_string());
        let before = addresses.len();
        addresses.retain(|known| known.address != text);
        if addresses.len() == before {
            return Err(StoreError::NotFound("address of the coordinator"));
        }
        put_addresses(change.db(), &addresses).await?;
        change.finish(Reach::Inventory, Action::AddressRemove, &[Object::Mesh]).await
    }
}

async fn addresses(db: &mut SqliteConnection) -> Result<Vec<CoordinatorAddress>, StoreError> {
    let text: String = sqlx::query_scalar("SELECT addresses FROM mesh WHERE id = 1").fetch_one(db).await?;
    Table("mesh").json(&text)
}

async fn put_addresses(db: &mut SqliteConnection, addresses: &[CoordinatorAddress]) -> Result<(), StoreError> {
    check_addresses(addresses)?;
    sqlx::query("UPDATE mesh SET addresses = $1 WHERE id = 1")
        .bind(to_json(&addresses)?)
        .execute(db)
        .await?;
    Ok(())
}

/// Forgets the addresses of vanished instances; refuses if there is any other.
async fn clear_range(db: &mut SqliteConnection) -> Result<(), StoreError> {
    let live: i64 = sqlx::query_scalar("SELECT count(*) FROM instance WHERE gone_at IS NULL")
        .fetch_one(&mut *db)
        .await?;
    if live > 0 {
        let why =
            format!("cannot change while {live} instances have addresses of the present one: apply a policy without components first");
        return Err(StoreError::Invalid { what: "overlay", why });
    }
    sqlx::query("DELETE FROM instance").execute(db).await?;
    Ok(())
}

fn check_lease(lease: Duration) -> Result<(), StoreError> {
    if LEASE_BOUNDS.contains(&lease) {
        Ok(())
    } else {
        Err(StoreError::Invalid {
            what: "lease",
            why: "must be between 10 seconds and 90 days".into(),
        })
    }
}

fn check_addresses(addresses: &[CoordinatorAddress]) -> Result<(), StoreError> {
    let good = |one: &CoordinatorAddress| one.address.parse::<HostPort>().is_ok();
    if (1..=MAX_ADDRESSES).contains(&addresses.len()) && addresses.iter().all(good) {
        Ok(())
    } else {
        Err(StoreError::Invalid {
            what: "addresses",
            why: format!("must be 1 to {MAX_ADDRESSES} of the form host:port"),
        })
    }
}
