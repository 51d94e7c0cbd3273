//! Enrollment tokens: making, listing, revoking. Of a token's secret only the hash is kept.

use std::collections::BTreeMap;
use std::time::Duration;

use cloison_proto::id::{HostId, TokenId};
use cloison_proto::key::Secret32;
use cloison_proto::version::MeshTime;
use sqlx::{FromRow, SqliteConnection};

use super::Store;
use super::change::Reach;
use super::error::StoreError;
use super::hosts::{check_labels, holder_of};
use super::model::{NewToken, TokenRecord, TokenSpec};
use super::row::{Table, time, to_json};
use crate::audit::{Action, Context, Object};
use crate::credential::Scope;
use crate::enrollment::token::NameRule;
use crate::failpoint::failpoint;

/// Most hosts that may join by one token.
pub(super) const MAX_USES: u32 = 100;

/// Longest life of a token.
pub(super) const MAX_LIFETIME: Duration = Duration::from_secs(30 * 86_400);

/// How long tokens that can do nothing any more stay in the list, counted from their end.
const LISTED_SECONDS: i64 = 30 * 86_400;

#[derive(FromRow)]
pub(super) struct TokenRow {
    pub(super) id: String,
    pub(super) secret_hash: Vec<u8>,
    pub(super) uses: i64,
    pub(super) uses_left: i64,
    pub(super) expires: i64,
    pub(super) name_rule: String,
    pub(super) labels: String,
    pub(super) source: Option<String>,
    pub(super) created_at: i64,
    pub(super) revoked_at: Option<i64>,
}

impl Store {
    /// Makes a token (scope `enroll`). Its secret is in the answer and nowhere else.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] outside the bounds; [`StoreError::NameTaken`] if the name belongs to a living host: the join would fail.
    pub async fn create_token(&self, context: Context, spec: TokenSpec) -> Result<NewToken, StoreError> {
        check(&spec)?;
        let mut change = self.begin(context, Scope::Enroll).await?;
        if let NameRule::Exact(name) = &spec.name
            && let Some(holder) = holder_of(change.db(), name).await?
        {
            return Err(StoreError::NameTaken {
                name: name.clone(),
                holder,
            });
        }
        let (id, secret) = (TokenId(self.0.env.random()?), Secret32::from_bytes(self.0.env.random()?));
        let expires = change.now.plus(spec.lifetime);
        let now = change.now_db();
        sqlx::query(
            "INSERT INTO token (id, secret_hash, uses, uses_left, expires, name_rule, labels, source, created_at) \
             VALUES ($1, $2, $3, $3, $4, $5, $6, $7, $8)",
        )
        .bind(id.to_string())
        .bind(secret.hash().as_slice())
        .bind(i64::from(spec.uses))
        .bind(time(expires))
        .bind(spec.name.to_string())
        .bind(to_json(&spec.labels)?)
        .bind(spec.source.map(|source| source.to_string()))
        .bind(now)
        .execute(change.db())
        .await?;
        failpoint!(TokenWritten);
        change.finish(Reach::Revision, Action::TokenCreate, &[Object::Token(id)]).await?;
        Ok(NewToken { id, secret, expires })
    }

    /// Tokens, the newest first. Those that ended more than 30 days ago are left out.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`].
    pub async fn list_tokens(&self) -> Result<Vec<TokenRecord>, StoreError> {
        let mut db = self.0.readers.acquire().await?;
        let mut redeemed = redeemed(&mut db).await?;
        let rows = sqlx::query_as::<_, TokenRow>("SELECT * FROM token WHERE expires > $1 ORDER BY created_at DESC, id")
            .bind(time(self.now()).saturating_sub(LISTED_SECONDS))
            .fetch_all(&mut *db)
            .await?;
        let records = rows.into_iter().map(|row| {
            let id = Table("token").parse(&row.id)?;
            row.read(redeemed.remove(&id).unwrap_or_default())
        });
        records.collect()
    }

    /// Revokes a token (scope `enroll`): nobody joins by it any more. Hosts that did stay.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], also if it was revoked before.
    pub async fn revoke_token(&self, context: Context, id: TokenId) -> Result<(), StoreError> {
        match self.try_revoke_token(context, id).await {
            Err(StoreError::StorageFull) if self.make_room() => self.try_revoke_token(context, id).await,
            done => done,
        }
    }

    async fn try_revoke_token(&self, context: Context, id: TokenId) -> Result<(), StoreError> {
        let mut change = self.begin_withdrawal(context, Scope::Enroll).await?;
        let now = change.now_db();
        let revoked = sqlx::query("UPDATE token SET revoked_at = $2 WHERE id = $1 AND revoked_at IS NULL")
            .bind(id.to_string())
            .bind(now)
            .execute(change.db())
            .await?;
        if revoked.rows_affected() == 0 {
            return Err(StoreError::NotFound("token that could be revoked"));
        }
        failpoint!(TokenRevoked);
        change
            .finish(Reach::Revision, Action::TokenRevoke, &[Object::Token(id)])
            .await
            .map(|_| ())
    }
}

impl TokenRow {
    fn read(self, redeemed: Vec<(HostId, MeshTime)>) -> Result<TokenRecord, StoreError> {
        let table = Table("token");
        Ok(TokenRecord {
            id: table.parse(&self.id)?,
            uses_left: table.number(self.uses_left)?,
            expires: table.time(self.expires)?,
            name: table.parse(&self.name_rule)?,
            labels: table.json(&self.labels)?,
            source: self.source.map(|source| table.parse(&source)).transpose()?,
            created_at: table.time(self.created_at)?,
            revoked_at: self.revoked_at.map(|at| table.time(at)).transpose()?,
            redeemed,
        })
    }
}

fn check(spec: &TokenSpec) -> Result<(), StoreError> {
    let invalid = |what, why: String| Err(StoreError::Invalid { what, why });
    if !(1..=MAX_USES).contains(&spec.uses) {
        return invalid("uses", format!("must be 1 to {MAX_USES}"));
    }
    if spec.lifetime < Duration::from_secs(1) || spec.lifetime > MAX_LIFETIME {
        return invalid("lifetime", "must be between a second and 30 days".into());
    }
    if spec.uses > 1 && matches!(spec.name, NameRule::Exact(_)) {
        return invalid(
            "name",
            "names one host, but the token has several uses: write a pattern like db-*".into(),
        );
    }
    check_labels(&spec.labels)
}

/// Who joined by which token.
async fn redeemed(db: &mut SqliteConnection) -> Result<BTreeMap<TokenId, Vec<(HostId, MeshTime)>>, StoreError> {
    let table = Table("host");
    let rows: Vec<(String, String, i64)> = sqlx::query_as("SELECT token, id, enrolled_at FROM host ORDER BY enrolled_at, id")
        .fetch_all(db)
        .await?;
    let mut redeemed = BTreeMap::<_, Vec<_>>::new();
    for (token, host, at) in rows {
        redeemed
            .entry(table.parse(&token)?)
            .or_default()
            .push((table.parse(&host)?, table.time(at)?));
    }
    Ok(redeemed)
}
