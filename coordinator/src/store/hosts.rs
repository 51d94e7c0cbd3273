//! Hosts as operators see and change them: lists, labels, names, revocation.

use std::sync::Arc;

use cloison_proto::id::HostId;
use cloison_proto::label::{HostName, LabelSet, MAX_LABELS};
use cloison_proto::version::MeshTime;
use sqlx::{FromRow, SqliteConnection};

use super::Store;
use super::change::{Change, Reach};
use super::error::StoreError;
use super::model::{Certificates, HostRecord, LabelChange, Serial, ViewMark};
use super::row::Table;
use super::snapshot::{self, HostRow};
use crate::audit::{Action, Context, Object};
use crate::credential::Scope;
use crate::failpoint::failpoint;

#[derive(FromRow)]
pub(super) struct RecordRow {
    #[sqlx(flatten)]
    host: HostRow,
    revoked_at: Option<i64>,
    last_seen: Option<i64>,
    incarnation: Option<i64>,
    view_revision: Option<i64>,
    view_hash: Option<Vec<u8>>,
    cert_serial: Option<String>,
    cert_not_after: Option<i64>,
    next_serial: Option<String>,
    next_not_after: Option<i64>,
}

impl RecordRow {
    fn read(self, labels: LabelSet) -> Result<HostRecord, StoreError> {
        let table = Table("host");
        let time = |value: Option<i64>| value.map(|v| table.time(v)).transpose();
        Ok(HostRecord {
            certificates: self.certificates()?,
            last_seen: time(self.last_seen)?,
            incarnation: self.incarnation.map(i64::cast_unsigned),
            view: view_mark(self.view_revision, self.view_hash.as_deref())?,
            revoked_at: time(self.revoked_at)?,
            host: Arc::new(self.host.read(labels, None)?),
        })
    }

    fn certificates(&self) -> Result<Certificates, StoreError> {
        let table = Table("host");
        let one = |serial: &Option<String>, not_after: Option<i64>| -> Result<Option<(Serial, MeshTime)>, StoreError> {
            let Some((serial, end)) = serial.as_deref().zip(not_after) else {
                return Ok(None);
            };
            Ok(Some((table.parse(serial)?, table.time(end)?)))
        };
        Ok(Certificates {
            current: one(&self.cert_serial, self.cert_not_after)?,
            next: one(&self.next_serial, self.next_not_after)?,
        })
    }
}

/// A view's mark from its two columns.
pub(super) fn view_mark(revision: Option<i64>, hash: Option<&[u8]>) -> Result<Option<ViewMark>, StoreError> {
    let table = Table("host");
    match (revision, hash) {
        (Some(revision), Some(hash)) => Ok(Some(ViewMark {
            revision: table.number(revision)?,
            state_hash: table.hash(hash)?,
        })),
        _ => Ok(None),
    }
}

impl Store {
    /// All hosts ordered by name; revoked ones, if asked for, behind the one that has their name now.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`].
    pub async fn list_hosts(&self, with_revoked: bool) -> Result<Vec<HostRecord>, StoreError> {
        let mut db = self.0.readers.acquire().await?;
        let mut labels = snapshot::labels(&mut db).await?;
        let rows = sqlx::query_as::<_, RecordRow>(
            "SELECT * FROM host WHERE revoked_at IS NULL OR $1 = 1 ORDER BY name, coalesce(revoked_at, 0), id",
        )
        .bind(i64::from(with_revoked))
        .fetch_all(&mut *db)
        .await?;
        let records = rows.into_iter().map(|row| {
            let record = row.read(LabelSet::new())?;
            let labels = labels.remove(&record.host.id).unwrap_or_default();
            let host = Arc::unwrap_or_clone(record.host);
            Ok(HostRecord {
                host: Arc::new(crate::inventory::Host { labels, ..host }),
                ..record
            })
        });
        records.collect()
    }

    /// A host, revoked or not.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn host(&self, id: HostId) -> Result<HostRecord, StoreError> {
        let mut db = self.0.readers.acquire().await?;
        record(&mut db, id).await
    }

    /// Changes a host's labels (scope `operate`), and with them which components run on it. The new revision is returned.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Revoked`], and what [`Store::put_policy`] says about the mesh as a whole.
    pub async fn label_host(&self, context: Context, id: HostId, labels: LabelChange) -> Result<u64, StoreError> {
        let mut change = self.begin(context, Scope::Operate).await?;
        let record = living(&mut change, id).await?;
        let mut after = record.host.labels.clone();
        after.retain(|key, _| !labels.remove.contains(key));
        after.extend(labels.set);
        set_labels(change.db(), id, &after).await?;
        change.finish(Reach::Inventory, Action::HostLabel, &[Object::Host(id)]).await
    }

    /// Gives a host another name (scope `operate`). From then on the name counts as given. The new revision is returned.
    ///
    /// # Errors
    /// [`StoreError::NameTaken`], [`StoreError::NotFound`], [`StoreError::Revoked`], and what [`Store::put_policy`] says.
    pub async fn rename_host(&self, context: Context, id: HostId, name: HostName) -> Result<u64, StoreError> {
        let mut change = self.begin(context, Scope::Operate).await?;
        living(&mut change, id).await?;
        if let Some(holder) = holder_of(change.db(), &name).await?
            && holder != id
        {
            return Err(StoreError::NameTaken { name, holder });
        }
        sqlx::query("UPDATE host SET name = $2, name_given = 1 WHERE id = $1")
            .bind(id.to_string())
            .bind(name.as_str())
            .execute(change.db())
            .await?;
        change.finish(Reach::Inventory, Action::HostRename, &[Object::Host(id)]).await
    }

    /// Revokes a host (scope `operate`). It is final: the name is free at once, the addresses after 30 days, the keys never. The new
    /// revision is returned.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], and [`StoreError::Revoked`] if it was revoked before.
    pub async fn revoke_host(&self, context: Context, id: HostId) -> Result<u64, StoreError> {
        match self.try_revoke_host(context, id).await {
            Err(StoreError::StorageFull) if self.make_room() => self.try_revoke_host(context, id).await,
            done => done,
        }
    }

    async fn try_revoke_host(&self, context: Context, id: HostId) -> Result<u64, StoreError> {
        let mut change = self.begin_withdrawal(context, Scope::Operate).await?;
        withdraw(&mut change, id).await?;
        change.finish(Reach::Withdrawal, Action::HostRevoke, &[Object::Host(id)]).await
    }

    /// Clears a host's `contested` mark (scope `operate`): the operator knows that it is the right one. The new revision is returned.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Revoked`].
    pub async fn settle_host(&self, context: Context, id: HostId) -> Result<u64, StoreError> {
        let mut change = self.begin(context, Scope::Operate).await?;
        living(&mut change, id).await?;
        sqlx::query("UPDATE host SET contested = 0 WHERE id = $1")
            .bind(id.to_string())
            .execute(change.db())
            .await?;
        change.finish(Reach::Inventory, Action::HostSettle, &[Object::Host(id)]).await
    }
}

/// Makes a living host a revoked one.
pub(super) async fn withdraw(change: &mut Change, id: HostId) -> Result<(), StoreError> {
    living(change, id).await?;
    let now = change.now_db();
    sqlx::query("UPDATE host SET revoked_at = $2 WHERE id = $1")
        .bind(id.to_string())
        .bind(now)
        .execute(change.db())
        .await?;
    failpoint!(HostRevoked);
    Ok(())
}

/// The record of a host that is not revoked.
pub(super) async fn living(change: &mut Change, id: HostId) -> Result<HostRecord, StoreError> {
    let record = record(change.db(), id).await?;
    if record.revoked_at.is_some() {
        Err(StoreError::Revoked(id))
    } else {
        Ok(record)
    }
}

pub(super) async fn record(db: &mut SqliteConnection, id: HostId) -> Result<HostRecord, StoreError> {
    let row = sqlx::query_as::<_, RecordRow>("SELECT * FROM host WHERE id = $1")
        .bind(id.to_string())
        .fetch_optional(&mut *db)
        .await?;
    let row = row.ok_or(StoreError::NotFound("host"))?;
    let table = Table("host_label");
    let pairs: Vec<(String, String)> = sqlx::query_as("SELECT key, value FROM host_label WHERE host = $1")
        .bind(id.to_string())
        .fetch_all(db)
        .await?;
    let labels = pairs.iter().map(|(key, value)| Ok((table.parse(key)?, table.parse(value)?)));
    row.read(labels.collect::<Result<LabelSet, StoreError>>()?)
}

/// Which living host has this name.
pub(super) async fn holder_of(db: &mut SqliteConnection, name: &HostName) -> Result<Option<HostId>, StoreError> {
    let holder: Option<String> = sqlx::query_scalar("SELECT id FROM host WHERE name = $1 AND revoked_at IS NULL")
        .bind(name.as_str())
        .fetch_optional(db)
        .await?;
    holder.map(|id| Table("host").parse(&id)).transpose()
}

/// Makes `labels` all that the host has.
pub(super) async fn set_labels(db: &mut SqliteConnection, id: HostId, labels: &LabelSet) -> Result<(), StoreError> {
    check_labels(labels)?;
    sqlx::query("DELETE FROM host_label WHERE host = $1")
        .bind(id.to_string())
        .execute(&mut *db)
        .await?;
    for (key, value) in labels {
        sqlx::query("INSERT INTO host_label (host, key, value) VALUES ($1, $2, $3)")
            .bind(id.to_string())
            .bind(key.as_str())
            .bind(value.as_str())
            .execute(&mut *db)
            .await?;
    }
    failpoint!(LabelsWritten);
    Ok(())
}

pub(super) fn check_labels(labels: &LabelSet) -> Result<(), StoreError> {
    if labels.len() > MAX_LABELS {
        return Err(StoreError::Invalid {
            what: "labels",
            why: format!("are more than {MAX_LABELS}"),
        });
    }
    Ok(())
}
