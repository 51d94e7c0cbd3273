//! A host's change of its WireGuard key: the next one is kept beside the one it has, until that one is retired. No key ever comes back,
//! for whichever host.

use std::collections::BTreeMap;

use cloison_proto::id::HostId;
use cloison_proto::key::{IdentityKey, WgPublicKey};

use super::Store;
use super::change::{Reach, Urgency};
use super::error::StoreError;
use super::hosts::living;
use super::row::{Table, number};
use crate::audit::{Action, Actor, Context, Object};
use crate::credential::Scope;
use crate::trust::Part;

/// What became of a new WireGuard key whose possession was proven.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyOffered {
    /// It is the host's next key, now or since an earlier offer.
    Taken,
    /// It belongs, or once belonged, to a host.
    Known,
    /// The identity key that proved it is not the host's.
    Foreign,
}

impl Store {
    /// Keeps a proven WireGuard key as the host's next one. It takes the place of a next key that the host lost; the same key again changes
    /// nothing. What the host has stays good until [`Store::retire_wg_key`]; a host that is `alone` with the new key has nothing else, and
    /// it takes its place at once.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Revoked`], and [`StoreError::Refused`] if a view would outgrow its limits.
    pub async fn offer_wg_key(&self, id: HostId, identity: &IdentityKey, key: &WgPublicKey, alone: bool) -> Result<KeyOffered, StoreError> {
        let urgency = if alone { Urgency::Urgent } else { Urgency::CanWait };
        let mut change = self.begin_unjudged(Context::of(Actor::Host(id)), urgency).await?;
        let record = living(&mut change, id).await?;
        if record.host.identity != *identity {
            return Ok(KeyOffered::Foreign);
        }
        let is_next = record.host.next.as_ref().is_some_and(|next| next.key == *key);
        if record.host.wg_key == *key || (is_next && !alone) {
            return Ok(KeyOffered::Taken);
        }
        let added = sqlx::query("INSERT INTO host_key (kind, key, host) VALUES ('wg', $1, $2) ON CONFLICT DO NOTHING")
            .bind(key.to_string())
            .bind(id.to_string())
            .execute(change.db())
            .await?;
        if added.rows_affected() == 0 && !is_next {
            return Ok(KeyOffered::Known);
        }
        if alone {
            sqlx::query("UPDATE host SET wg_key = $2, next_wg_key = NULL, next_wg_at = NULL, next_wg_revision = NULL WHERE id = $1")
                .bind(id.to_string())
                .bind(key.to_string())
                .execute(change.db())
                .await?;
            change.finish(Reach::Withdrawal, Action::HostKeyRetire, &[Object::Host(id)]).await?;
            return Ok(KeyOffered::Taken);
        }
        let (now, revision) = (change.now_db(), self.inventory().version.revision.saturating_add(1));
        sqlx::query("UPDATE host SET next_wg_key = $2, next_wg_at = coalesce(next_wg_at, $3), next_wg_revision = $4 WHERE id = $1")
            .bind(id.to_string())
            .bind(key.to_string())
            .bind(now)
            .bind(number(revision))
            .execute(change.db())
            .await?;
        change.finish(Reach::Inventory, Action::HostKeyOffer, &[Object::Host(id)]).await?;
        Ok(KeyOffered::Taken)
    }

    /// Writes down that an operator asks a host for a new WireGuard key (scope `operate`).
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Revoked`].
    pub async fn note_key_wish(&self, context: Context, id: HostId) -> Result<(), StoreError> {
        let mut change = self.begin(context, Scope::Operate).await?;
        living(&mut change, id).await?;
        change
            .finish(Reach::Leaf, Action::HostKeyWish, &[Object::Host(id)])
            .await
            .map(|_| ())
    }

    /// Makes the host's next WireGuard key its only one; whether there was anything to do. The former one never comes back.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn retire_wg_key(&self, id: HostId, next: &WgPublicKey) -> Result<bool, StoreError> {
        match self.try_retire_wg_key(id, next).await {
            Err(StoreError::StorageFull) if self.make_room() => self.try_retire_wg_key(id, next).await,
            done => done,
        }
    }

    async fn try_retire_wg_key(&self, id: HostId, next: &WgPublicKey) -> Result<bool, StoreError> {
        let mut change = self.begin_unjudged(Context::of(Actor::Coordinator), Urgency::Urgent).await?;
        let retired = sqlx::query(
            "UPDATE host SET wg_key = next_wg_key, next_wg_key = NULL, next_wg_at = NULL, next_wg_revision = NULL \
             WHERE id = $1 AND next_wg_key = $2 AND revoked_at IS NULL",
        )
        .bind(id.to_string())
        .bind(next.to_string())
        .execute(change.db())
        .await?;
        if retired.rows_affected() == 0 {
            return Ok(false);
        }
        change
            .finish(Reach::Withdrawal, Action::HostKeyRetire, &[Object::Host(id)])
            .await
            .map(|_| true)
    }

    /// Writes down that a part of the trust changes (scope `owner`, unless the coordinator does it by itself).
    ///
    /// # Errors
    /// [`StoreError::NotAuthorised`].
    pub async fn note_rotation(&self, context: Context, action: Action, part: Part) -> Result<(), StoreError> {
        let change = self.begin(context, Scope::Owner).await?;
        change.finish(Reach::Leaf, action, &[Object::Trust(part)]).await.map(|_| ())
    }

    /// Every WireGuard key that no host has any more, or only a revoked one, with the host that had it.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`].
    pub async fn dead_wg_keys(&self) -> Result<BTreeMap<WgPublicKey, HostId>, StoreError> {
        let table = Table("host_key");
        let rows: Vec<(String, String)> = sqlx::query_as(
            "SELECT k.key, k.host FROM host_key k JOIN host h ON h.id = k.host \
             WHERE k.kind = 'wg' AND (h.revoked_at IS NOT NULL OR (h.wg_key <> k.key AND (h.next_wg_key IS NULL OR h.next_wg_key <> k.key)))",
        )
        .fetch_all(&self.0.readers)
        .await?;
        rows.iter().map(|(key, host)| Ok((table.parse(key)?, table.parse(host)?))).collect()
    }
}
