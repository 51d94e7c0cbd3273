//! API credentials: making, listing, revoking, and judging the one that a request shows. Of a secret only the hash is kept.

use std::collections::BTreeSet;
use std::time::Duration;

use cloison_proto::id::CredentialId;
use cloison_proto::key::Secret32;
use cloison_proto::version::MeshTime;
use sqlx::{FromRow, SqliteConnection};

use super::Store;
use super::change::{Change, Reach, Urgency};
use super::error::StoreError;
use super::model::{CredentialRecord, CredentialSpec, NewCredential};
use super::row::{Table, time, to_json};
use crate::audit::{Action, Actor, Context, Object};
use crate::credential::{CredentialText, Principal, Scope};
use crate::entropy::Environment;

/// Longest life of a credential: a year and a month, so that a yearly renewal has room.
pub(super) const MAX_LIFETIME: Duration = Duration::from_secs(400 * 86_400);

/// Longest time for which a credential that was replaced stays good.
const MAX_OVERLAP: Duration = Duration::from_secs(86_400);

/// Longest name, in characters.
const MAX_NAME_LEN: usize = 63;

/// How old `last_used` may grow before it is written again.
const USED_GRAIN: Duration = Duration::from_secs(300);

#[derive(FromRow)]
struct CredentialRow {
    id: String,
    secret_hash: Vec<u8>,
    name: String,
    scopes: String,
    created_at: i64,
    expires: i64,
    last_used: Option<i64>,
    revoked_at: Option<i64>,
}

impl Store {
    /// Makes a credential (scope `owner`). Its secret is in the answer and nowhere else.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for no scopes, a name or a lifetime outside the bounds.
    pub async fn create_credential(&self, context: Context, spec: CredentialSpec) -> Result<NewCredential, StoreError> {
        check(&spec)?;
        let mut change = self.begin(context, Scope::Owner).await?;
        let made = insert(&mut change, &self.0.env, &spec).await?;
        change
            .finish(Reach::Revision, Action::CredentialCreate, &[Object::Credential(made.text.id)])
            .await?;
        Ok(made)
    }

    /// Makes a credential that takes the place of another (scope `owner`): the same name, scopes and lifetime. The former ends after
    /// `overlap`, or earlier if it was to.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] for one that is not good any more; [`StoreError::Invalid`] for an overlap beyond a day.
    pub async fn rotate_credential(&self, context: Context, id: CredentialId, overlap: Duration) -> Result<NewCredential, StoreError> {
        if overlap > MAX_OVERLAP {
            let why = "must be at most a day: two secrets for one purpose are one too many".into();
            return Err(StoreError::Invalid { what: "overlap", why });
        }
        let mut change = self.begin(context, Scope::Owner).await?;
        let former = match find(change.db(), id).await? {
            Some(row) => row.read()?,
            None => return Err(StoreError::NotFound("credential")),
        };
        if former.revoked_at.is_some() || former.expires <= change.now {
            return Err(StoreError::NotFound("credential that is still good"));
        }
        let lifetime = Duration::from_secs(former.expires.0.saturating_sub(former.created_at.0));
        let spec = CredentialSpec {
            name: former.name,
            scopes: former.scopes,
            lifetime: lifetime.clamp(Duration::from_secs(1), MAX_LIFETIME),
        };
        let made = insert(&mut change, &self.0.env, &spec).await?;
        let ends = former.expires.min(change.now.plus(overlap));
        sqlx::query("UPDATE credential SET expires = $2 WHERE id = $1")
            .bind(id.to_string())
            .bind(time(ends))
            .execute(change.db())
            .await?;
        let objects = [Object::Credential(id), Object::Credential(made.text.id)];
        change.finish(Reach::Revision, Action::CredentialRotate, &objects).await?;
        Ok(made)
    }

    /// All credentials, the newest first.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`].
    pub async fn list_credentials(&self) -> Result<Vec<CredentialRecord>, StoreError> {
        let rows = sqlx::query_as::<_, CredentialRow>("SELECT * FROM credential ORDER BY created_at DESC, id")
            .fetch_all(&self.0.readers)
            .await?;
        rows.into_iter().map(CredentialRow::read).collect()
    }

    /// Revokes a credential (scope `owner`; its own holder may always).
    ///
    /// # Errors
    /// [`StoreError::NotFound`], also if it was revoked before.
    pub async fn revoke_credential(&self, context: Context, id: CredentialId) -> Result<(), StoreError> {
        match self.try_revoke_credential(context, id).await {
            Err(StoreError::StorageFull) if self.make_room() => self.try_revoke_credential(context, id).await,
            done => done,
        }
    }

    async fn try_revoke_credential(&self, context: Context, id: CredentialId) -> Result<(), StoreError> {
        let scope = if context.actor == Actor::Credential(id) {
            Scope::Read
        } else {
            Scope::Owner
        };
        let mut change = self.begin_withdrawal(context, scope).await?;
        let now = change.now_db();
        let revoked = sqlx::query("UPDATE credential SET revoked_at = $2 WHERE id = $1 AND revoked_at IS NULL")
            .bind(id.to_string())
            .bind(now)
            .execute(change.db())
            .await?;
        if revoked.rows_affected() == 0 {
            return Err(StoreError::NotFound("credential that could be revoked"));
        }
        change
            .finish(Reach::Revision, Action::CredentialRevoke, &[Object::Credential(id)])
            .await
            .map(|_| ())
    }

    /// Who shows this bearer text. `None` for every kind of wrong one: malformed, unknown, another secret, expired, revoked.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn authenticate(&self, bearer: &str) -> Result<Option<Principal>, StoreError> {
        let Ok(shown) = bearer.parse::<CredentialText>() else {
            return Ok(None);
        };
        let mut db = self.0.readers.acquire().await?;
        let Some(row) = find(&mut db, shown.id).await? else {
            return Ok(None);
        };
        drop(db);
        if !shown.secret.matches(&Table("credential").hash(&row.secret_hash)?) {
            return Ok(None);
        }
        let record = row.read()?;
        let now = self.now();
        if record.last_used.is_none_or(|at| at.plus(USED_GRAIN) <= now) {
            match self.note_used(record.id).await {
                // A full disk keeps nobody out, above all not whoever comes to revoke; it is noted at the next call.
                Ok(()) | Err(StoreError::StorageFull | StoreError::ReadOnly(_)) => {}
                Err(other) => return Err(other),
            }
        }
        Ok(record.principal(now))
    }

    /// Whether a credential would authorise anything at this moment, whoever shows it.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`].
    pub async fn is_live(&self, id: CredentialId) -> Result<bool, StoreError> {
        let mut db = self.0.readers.acquire().await?;
        Ok(live(&mut db, id, self.now()).await?.is_some())
    }

    async fn note_used(&self, id: CredentialId) -> Result<(), StoreError> {
        let mut change = self.begin_unjudged(Context::of(Actor::Credential(id)), Urgency::CanWait).await?;
        let now = change.now_db();
        sqlx::query("UPDATE credential SET last_used = $2 WHERE id = $1")
            .bind(id.to_string())
            .bind(now)
            .execute(change.db())
            .await?;
        change.commit_note().await
    }
}

/// Draws a credential and keeps its hash.
pub(super) async fn insert(change: &mut Change, env: &Environment, spec: &CredentialSpec) -> Result<NewCredential, StoreError> {
    let text = CredentialText {
        id: CredentialId(env.random()?),
        secret: Secret32::from_bytes(env.random()?),
    };
    let expires = change.now.plus(spec.lifetime);
    let now = change.now_db();
    sqlx::query("INSERT INTO credential (id, secret_hash, name, scopes, created_at, expires) VALUES ($1, $2, $3, $4, $5, $6)")
        .bind(text.id.to_string())
        .bind(text.secret.hash().as_slice())
        .bind(&spec.name)
        .bind(to_json(&spec.scopes)?)
        .bind(now)
        .bind(time(expires))
        .execute(change.db())
        .await?;
    Ok(NewCredential { text, expires })
}

/// The holder of a credential that is good at `now`, as this transaction sees it.
pub(super) async fn live(db: &mut SqliteConnection, id: CredentialId, now: MeshTime) -> Result<Option<Principal>, StoreError> {
    match find(db, id).await? {
        Some(row) => Ok(row.read()?.principal(now)),
        None => Ok(None),
    }
}

async fn find(db: &mut SqliteConnection, id: CredentialId) -> Result<Option<CredentialRow>, StoreError> {
    Ok(sqlx::query_as("SELECT * FROM credential WHERE id = $1")
        .bind(id.to_string())
        .fetch_optional(db)
        .await?)
}

impl CredentialRow {
    fn read(self) -> Result<CredentialRecord, StoreError> {
        let table = Table("credential");
        let time = |value: Option<i64>| value.map(|v| table.time(v)).transpose();
        Ok(CredentialRecord {
            id: table.parse(&self.id)?,
            scopes: table.json::<BTreeSet<Scope>>(&self.scopes)?,
            created_at: table.time(self.created_at)?,
            expires: table.time(self.expires)?,
            last_used: time(self.last_used)?,
            revoked_at: time(self.revoked_at)?,
            name: self.name,
        })
    }
}

impl CredentialRecord {
    /// What the credential allows at `now`; nothing once it is expired or revoked.
    fn principal(self, now: MeshTime) -> Option<Principal> {
        let good = self.revoked_at.is_none() && self.expires > now;
        good.then_some(Principal {
            id: self.id,
            name: self.name,
            scopes: self.scopes,
            expires: self.expires,
        })
    }
}

fn check(spec: &CredentialSpec) -> Result<(), StoreError> {
    let invalid = |what, why: &str| Err(StoreError::Invalid { what, why: why.into() });
    if spec.scopes.is_empty() {
        return invalid("scopes", "are none: a credential that allows nothing is of no use");
    }
    if spec.lifetime < Duration::from_secs(1) || spec.lifetime > MAX_LIFETIME {
        return invalid("lifetime", "must be between a second and 400 days");
    }
    let good = |c: char| c.is_ascii_graphic() || c == ' ';
    if spec.name.is_empty() || spec.name.len() > MAX_NAME_LEN || !spec.name.chars().all(good) {
        return invalid("name", "must be 1 to 63 printable ASCII characters");
    }
    Ok(())
}
