//! A database that may be older than what agents have: how it gets into that state, what is noted in it, and how it goes on.
//!
//! As long as it lasts, [`Inventory::read_only`](crate::inventory::Inventory::read_only) says so, nothing but the functions of this file
//! writes, and the publisher publishes nothing. It begins when a backup is restored, and when an agent shows a view that this coordinator
//! signed and does not know. It ends by [`Store::recover`] alone, which an operator calls: in one transaction, everything that the lost time
//! may have made invalid is withdrawn, and the generation rises above any that was proved, so that no agent is asked to step back (I12).

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use cloison_proto::id::{CredentialId, HostId, TokenId};
use cloison_proto::version::{MeshTime, Version};
use sqlx::FromRow;

use super::Store;
use super::change::{Change, Reach, Urgency};
use super::credentials;
use super::error::StoreError;
use super::model::{CredentialSpec, NewCredential};
use super::row::{Table, number, time};
use super::snapshot;
use crate::audit::{Action, Actor, Context, Object};
use crate::credential::Scope;
use crate::inventory::Doubt;

/// Most hosts that are noted: as many as a mesh may have, and some that it forgot.
const MAX_SIGHTINGS: i64 = 16_384;

/// How long the credential is good that is made in place of all others.
const OWNER_LIFETIME: Duration = Duration::from_secs(365 * 86_400);

/// What a host showed to a coordinator that changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sighting {
    /// The host, by a certificate of this mesh. The database may not know it.
    pub host: HostId,
    /// The newest view that it was given, proved by this coordinator's own signature.
    pub version: Option<Version>,
    /// Where it came from.
    pub source: IpAddr,
    /// When it was last there.
    pub seen_at: MeshTime,
}

/// What an operator decided.
#[derive(Debug, Clone, Default)]
pub struct Recovery {
    /// Hosts that must not come back.
    pub revoke: BTreeSet<HostId>,
    /// Leave the API credentials of the backup as they are.
    pub keep_credentials: bool,
}

/// How the mesh goes on.
#[derive(Debug)]
pub struct Recovered {
    /// Its version from now on.
    pub version: Version,
    /// Enrollment tokens that were revoked: they may have been used since.
    pub tokens: usize,
    /// API credentials that were revoked.
    pub credentials: usize,
    /// The owner's new credential, unless the old ones were kept.
    pub credential: Option<NewCredential>,
}

#[derive(FromRow)]
struct SightingRow {
    host: String,
    generation: Option<i64>,
    revision: Option<i64>,
    source: String,
    seen_at: i64,
}

impl SightingRow {
    fn read(&self) -> Result<Sighting, StoreError> {
        let table = Table("sighting");
        let version = match self.generation.zip(self.revision) {
            Some((generation, revision)) => Some(Version {
                generation: table.number(generation)?,
                revision: table.number(revision)?,
            }),
            None => None,
        };
        Ok(Sighting {
            host: table.parse(&self.host)?,
            version,
            source: table.parse(&self.source)?,
            seen_at: table.time(self.seen_at)?,
        })
    }
}

impl Store {
    /// Makes a database that came from a backup one that changes nothing.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn mark_restored(&self) -> Result<(), StoreError> {
        self.doubt(Doubt::Restored, Context::of(Actor::Local), Action::MeshRestore, &[Object::Mesh])
            .await
    }

    /// Takes note of a host in contact. One that proves a version which this database does not know puts an end to all changes, if there were
    /// any so far.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn record_sighting(&self, host: HostId, version: Option<Version>, source: IpAddr) -> Result<(), StoreError> {
        let inventory = self.inventory();
        if inventory.read_only.is_none() {
            if version.is_none_or(|version| version <= inventory.version) {
                return Ok(());
            }
            tracing::error!(%host, version = version.map(tracing::field::display), ours = %inventory.version,
                "a host has a newer view than this database knows: it is an old one; nothing is changed or published until `cloison-coordinator recover`");
            let objects = [Object::Mesh, Object::Host(host)];
            self.doubt(Doubt::Behind, Context::of(Actor::Coordinator), Action::MeshBehind, &objects)
                .await?;
        }
        match self.note_sighting(host, version, source).await {
            Err(StoreError::StorageFull) => Ok(()),
            noted => noted,
        }
    }

    async fn doubt(&self, doubt: Doubt, context: Context, action: Action, objects: &[Object]) -> Result<(), StoreError> {
        let mut change = self.begin_unjudged(context, Urgency::Always).await?;
        if change.read_only().await?.is_some() {
            return Ok(());
        }
        let now = change.now_db();
        sqlx::query("UPDATE mesh SET read_only = $1, read_only_since = $2 WHERE id = 1")
            .bind(doubt.as_str())
            .bind(now)
            .execute(change.db())
            .await?;
        change.finish(Reach::Reload, action, objects).await.map(|_| ())
    }

    async fn note_sighting(&self, host: HostId, version: Option<Version>, source: IpAddr) -> Result<(), StoreError> {
        let mut change = self.begin_unjudged(Context::of(Actor::Host(host)), Urgency::Always).await?;
        let now = change.now_db();
        sqlx::query(
            "INSERT INTO sighting (host, generation, revision, source, seen_at) SELECT $1, $2, $3, $4, $5 \
             WHERE (SELECT count(*) FROM sighting) < $6 OR EXISTS (SELECT 1 FROM sighting WHERE host = $1) \
             ON CONFLICT (host) DO UPDATE SET generation = coalesce(excluded.generation, sighting.generation), \
             revision = coalesce(excluded.revision, sighting.revision), source = excluded.source, seen_at = excluded.seen_at",
        )
        .bind(host.to_string())
        .bind(version.map(|v| number(v.generation)))
        .bind(version.map(|v| number(v.revision)))
        .bind(source.to_string())
        .bind(now)
        .bind(MAX_SIGHTINGS)
        .execute(change.db())
        .await?;
        change.commit_note().await
    }

    /// Who was in contact since nothing changes any more, by id.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`].
    pub async fn sightings(&self) -> Result<Vec<Sighting>, StoreError> {
        let rows = sqlx::query_as::<_, SightingRow>("SELECT * FROM sighting ORDER BY host")
            .fetch_all(&self.0.readers)
            .await?;
        rows.iter().map(SightingRow::read).collect()
    }

    /// Ends the state in which nothing changes: revokes these hosts, every enrollment token and (unless told otherwise) every API credential,
    /// and raises the generation above every one that was seen. All of it, or nothing.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] for a host that there is not, [`StoreError::Revoked`] for one that was revoked before, and
    /// [`StoreError::Invalid`] if there is nothing to recover from.
    pub async fn recover(&self, recovery: &Recovery) -> Result<Recovered, StoreError> {
        let mut change = self.begin_unjudged(Context::of(Actor::Local), Urgency::Always).await?;
        if change.read_only().await?.is_none() {
            return Err(StoreError::Invalid {
                what: "recover",
                why: "has nothing to do: this coordinator was not restored from a backup, and no agent knows better".into(),
            });
        }
        for host in &recovery.revoke {
            super::hosts::withdraw(&mut change, *host).await?;
            change.leaf(Action::HostRevoke, &[Object::Host(*host)]).await?;
        }
        let tokens = withdraw_tokens(&mut change).await?;
        let (credentials, credential) = if recovery.keep_credentials {
            (0, None)
        } else {
            let revoked = withdraw_credentials(&mut change).await?;
            (revoked, Some(self.owner(&mut change).await?))
        };
        let generation = next_generation(&mut change).await?;
        sqlx::query("UPDATE mesh SET generation = $1, read_only = NULL, read_only_since = NULL WHERE id = 1")
            .bind(number(generation))
            .execute(change.db())
            .await?;
        sqlx::query("DELETE FROM sighting").execute(change.db()).await?;
        let revision = change.finish(Reach::Withdrawal, Action::MeshRecover, &[Object::Mesh]).await?;
        Ok(Recovered {
            version: Version { generation, revision },
            tokens,
            credentials,
            credential,
        })
    }

    async fn owner(&self, change: &mut Change) -> Result<NewCredential, StoreError> {
        let spec = CredentialSpec {
            name: "owner, made by recover".into(),
            scopes: BTreeSet::from([Scope::Owner]),
            lifetime: OWNER_LIFETIME,
        };
        let made = credentials::insert(change, &self.0.env, &spec).await?;
        change.leaf(Action::CredentialCreate, &[Object::Credential(made.text.id)]).await?;
        Ok(made)
    }

    /// Looks whether another process has recovered the mesh meanwhile, and takes up its state if so.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn look_for_recovery(&self) -> Result<(), StoreError> {
        if self.inventory().read_only.is_none() {
            return Ok(());
        }
        let mut change = self.begin_unjudged(Context::of(Actor::Coordinator), Urgency::Always).await?;
        if change.read_only().await?.is_some() {
            return Ok(());
        }
        let before = self.inventory();
        if let Some(after) = snapshot::load(change.db(), &before.hosts).await? {
            tracing::info!(version = %after.version, "recovered: views are published again");
            self.0.inventory.send_replace(after.into());
        }
        Ok(())
    }
}

impl Change {
    /// What the database says, whatever this process believes.
    async fn read_only(&mut self) -> Result<Option<crate::inventory::ReadOnly>, StoreError> {
        let (why, since): (Option<String>, Option<i64>) = sqlx::query_as("SELECT read_only, read_only_since FROM mesh WHERE id = 1")
            .fetch_one(self.db())
            .await?;
        snapshot::read_only(why.as_deref(), since)
    }
}

/// A token of the backup may have been used since: no single-use token makes a second host (I11).
async fn withdraw_tokens(change: &mut Change) -> Result<usize, StoreError> {
    let now = change.now_db();
    let open: Vec<String> =
        sqlx::query_scalar("UPDATE token SET revoked_at = $1 WHERE revoked_at IS NULL AND uses_left > 0 AND expires > $1 RETURNING id")
            .bind(now)
            .fetch_all(change.db())
            .await?;
    for id in &open {
        let id: TokenId = Table("token").parse(id)?;
        change.leaf(Action::TokenRevoke, &[Object::Token(id)]).await?;
    }
    Ok(open.len())
}

/// A credential of the backup may have been revoked since.
async fn withdraw_credentials(change: &mut Change) -> Result<usize, StoreError> {
    let now = change.now_db();
    let open: Vec<String> =
        sqlx::query_scalar("UPDATE credential SET revoked_at = $1 WHERE revoked_at IS NULL AND expires > $1 RETURNING id")
            .bind(now)
            .fetch_all(change.db())
            .await?;
    for id in &open {
        let id: CredentialId = Table("credential").parse(id)?;
        change.leaf(Action::CredentialRevoke, &[Object::Credential(id)]).await?;
    }
    Ok(open.len())
}

/// Above our own and every one that a host proved; by the clock, also above those of hosts that nobody has seen.
async fn next_generation(change: &mut Change) -> Result<u64, StoreError> {
    let seen: i64 =
        sqlx::query_scalar("SELECT max(generation) FROM (SELECT generation FROM mesh UNION ALL SELECT generation FROM sighting) AS g")
            .fetch_one(change.db())
            .await?;
    let seen: u64 = Table("mesh").number(seen)?;
    Ok(seen.saturating_add(1).max(u64::try_from(time(change.now)).unwrap_or(0)))
}
