//! Redeeming a token: one transaction judges the attempt, consumes the token, creates the host, gives addresses and writes the leaf.
//!
//! From outside all refusals are one; the cause goes into the audit. A refusal is a leaf of its own, in a transaction of its own, because
//! the attempt's was rolled back.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use cloison_proto::id::{HostId, TokenId};
use cloison_proto::label::HostName;
use cloison_proto::version::MeshTime;
use sqlx::SqliteConnection;

use super::Store;
use super::change::{Change, Reach, Urgency};
use super::error::{RedeemError, StoreError};
use super::hosts::{self, holder_of, set_labels};
use super::model::{Redeemed, Redemption};
use super::row::{Table, number};
use super::tokens::TokenRow;
use crate::audit::{Action, Actor, Cause, Context, Entry, Object};
use crate::enrollment::token::{NameRule, SUFFIX_LEN, SourceRule};
use crate::failpoint::failpoint;
use crate::inventory::Host;

/// How long the very same attempt may be repeated: an answer got lost on the way.
const REPEATABLE: Duration = Duration::from_secs(600);

/// Most hosts in one mesh (DESIGN 5.13).
pub(super) const MAX_HOSTS: u64 = 10_000;

/// How often a made-up name is drawn before the pattern counts as exhausted: 32^6 names stand against 10,000 hosts.
const NAME_DRAWS: usize = 16;

/// What becomes of an attempt.
enum Verdict {
    /// It may join by this token.
    Join(TokenRow),
    /// It did join, a moment ago.
    Repeat(HostId),
    /// It may not.
    Deny(Cause),
    /// It may not, and it shows that this host's token is in other hands too.
    Contest(HostId),
}

impl Store {
    /// Consumes a token and creates its host, or answers a repeated attempt as before: all or nothing.
    ///
    /// # Errors
    /// [`RedeemError::Denied`] with a cause that only the audit may learn; [`RedeemError::Store`] if it could not be judged.
    pub async fn redeem_token(&self, attempt: &Redemption) -> Result<Redeemed, RedeemError> {
        let begun = self
            .begin_unjudged(Context::of(Actor::Joiner(attempt.token)), Urgency::CanWait)
            .await;
        let mut change = match begun {
            // From outside a refusal like all others; there is no leaf, because nothing is written.
            Err(StoreError::ReadOnly(_)) => return Err(RedeemError::Denied(Cause::ReadOnly)),
            begun => begun?,
        };
        let cause = match judge(&mut change, attempt).await? {
            Verdict::Join(token) => match self.join(change, attempt, token).await {
                Ok(redeemed) => return Ok(redeemed),
                Err(RedeemError::Denied(cause)) => cause,
                Err(other) => return Err(other),
            },
            Verdict::Repeat(id) => {
                let record = hosts::record(change.db(), id).await?;
                drop(change);
                return Ok(self.redeemed(record.host, true));
            }
            Verdict::Contest(host) => {
                contest(change, host).await?;
                Cause::Used
            }
            Verdict::Deny(cause) => {
                drop(change);
                cause
            }
        };
        self.record_refusal(attempt.token, attempt.source, cause).await?;
        Err(RedeemError::Denied(cause))
    }

    /// Whether anybody could still join by a token, with its secret and new keys: by the very judgement of a join.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`].
    pub async fn would_admit(&self, id: TokenId) -> Result<bool, StoreError> {
        let token = sqlx::query_as::<_, TokenRow>("SELECT * FROM token WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&self.0.readers)
            .await?;
        Ok(match token {
            Some(token) => dead(&token, self.now())?.is_none(),
            None => false,
        })
    }

    /// Writes down that an attempt to join was refused, within the budget for such leaves.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn record_refusal(&self, token: TokenId, source: IpAddr, cause: Cause) -> Result<(), StoreError> {
        tracing::info!(%token, %cause, "a join was refused");
        let Some(suppressed) = self.0.refusals.take(self.now()) else {
            return Ok(());
        };
        let mut objects = vec![Object::Token(token), Object::Source(source)];
        if suppressed > 0 {
            objects.push(Object::Suppressed(suppressed));
        }
        let context = Context::of(Actor::Joiner(token));
        let change = self.begin_unjudged(context, Urgency::CanWait).await?;
        change
            .finish_refused(Entry {
                context,
                action: Action::HostJoin,
                objects,
                refused: Some(cause),
            })
            .await
    }

    async fn join(&self, mut change: Change, attempt: &Redemption, token: TokenRow) -> Result<Redeemed, RedeemError> {
        let rule: NameRule = Table("token").parse(&token.name_rule)?;
        let name = self
            .free_name(change.db(), &rule)
            .await?
            .ok_or(RedeemError::Denied(Cause::NameTaken))?;
        let host = Host {
            id: HostId(self.0.env.random().map_err(StoreError::from)?),
            name,
            name_given: matches!(rule, NameRule::Exact(_)),
            labels: Table("token").json(&token.labels)?,
            wg_key: attempt.wg_key,
            next: None,
            identity: attempt.identity,
            enrolled_at: change.now,
            contested: false,
        };
        consume(change.db(), &token).await?;
        failpoint!(TokenConsumed);
        insert(change.db(), &host, &token).await?;
        let objects = [Object::Token(attempt.token), Object::Host(host.id), Object::Source(attempt.source)];
        match change.finish(Reach::Inventory, Action::HostJoin, &objects).await {
            Ok(_) => Ok(self.redeemed(Arc::new(host), false)),
            Err(StoreError::PoolExhausted { .. }) => Err(RedeemError::Denied(Cause::PoolExhausted)),
            Err(StoreError::Refused(_)) => Err(RedeemError::Denied(Cause::ViewLimit)),
            Err(other) => Err(other.into()),
        }
    }

    fn redeemed(&self, host: Arc<Host>, repeated: bool) -> Redeemed {
        let inventory = self.inventory();
        let instances = inventory
            .instances_on(host.id)
            .map(|(component, pair)| (component.clone(), pair))
            .collect();
        Redeemed { host, repeated, instances }
    }

    /// A name by `rule` that no living host has.
    async fn free_name(&self, db: &mut SqliteConnection, rule: &NameRule) -> Result<Option<HostName>, StoreError> {
        for _ in 0..NAME_DRAWS {
            let name = rule.name(&self.suffix()?).map_err(|error| Table("token").corrupt(error))?;
            if holder_of(db, &name).await?.is_none() {
                return Ok(Some(name));
            }
            if matches!(rule, NameRule::Exact(_)) {
                break;
            }
        }
        Ok(None)
    }

    /// Six characters out of 32 that are not mistaken for each other.
    fn suffix(&self) -> Result<String, StoreError> {
        const ALPHABET: &[u8; 32] = b"abcdefghjkmnpqrstuvwxyz023456789";
        let random: [u8; SUFFIX_LEN] = self.0.env.random()?;
        Ok(random.iter().map(|byte| char::from(ALPHABET[usize::from(byte % 32)])).collect())
    }
}

/// Judges an attempt, cheapest and most telling cause first. A cause behind the secret is met only by who knows the secret.
async fn judge(change: &mut Change, attempt: &Redemption) -> Result<Verdict, StoreError> {
    let now = change.now;
    let table = Table("token");
    let token = sqlx::query_as::<_, TokenRow>("SELECT * FROM token WHERE id = $1")
        .bind(attempt.token.to_string())
        .fetch_optional(change.db())
        .await?;
    let Some(token) = token else {
        return Ok(Verdict::Deny(Cause::Unknown));
    };
    if !attempt.secret.matches(&table.hash(&token.secret_hash)?) {
        return Ok(Verdict::Deny(Cause::WrongSecret));
    }
    if let Some(verdict) = earlier_join(change, attempt).await? {
        return Ok(verdict);
    }
    match dead(&token, now)? {
        Some(Cause::Used) => return used_up(change, &token).await,
        Some(cause) => return Ok(Verdict::Deny(cause)),
        None => {}
    }
    if let Some(source) = &token.source
        && !table.parse::<SourceRule>(source)?.contains(attempt.source)
    {
        return Ok(Verdict::Deny(Cause::Source));
    }
    let hosts: i64 = sqlx::query_scalar("SELECT count(*) FROM host WHERE revoked_at IS NULL")
        .fetch_one(change.db())
        .await?;
    if hosts >= number(MAX_HOSTS) {
        return Ok(Verdict::Deny(Cause::HostLimit));
    }
    Ok(Verdict::Join(token))
}

/// Why nobody joins by a token any more, whatever secret and keys they show.
fn dead(token: &TokenRow, now: MeshTime) -> Result<Option<Cause>, StoreError> {
    Ok(if token.revoked_at.is_some() {
        Some(Cause::Revoked)
    } else if token.uses_left == 0 {
        Some(Cause::Used)
    } else if Table("token").time(token.expires)? <= now {
        Some(Cause::Expired)
    } else {
        None
    })
}

/// What it means if one of the joiner's keys belongs, or ever belonged, to a host: the same join again, or none.
async fn earlier_join(change: &mut Change, attempt: &Redemption) -> Result<Option<Verdict>, StoreError> {
    let now = change.now;
    let table = Table("host");
    let same: Option<(String, i64, Option<i64>)> =
        sqlx::query_as("SELECT id, enrolled_at, revoked_at FROM host WHERE token = $1 AND identity = $2 AND wg_key = $3")
            .bind(attempt.token.to_string())
            .bind(attempt.identity.to_string())
            .bind(attempt.wg_key.to_string())
            .fetch_optional(change.db())
            .await?;
    if let Some((id, enrolled_at, None)) = same
        && table.time(enrolled_at)?.plus(REPEATABLE) >= now
    {
        return Ok(Some(Verdict::Repeat(table.parse(&id)?)));
    }
    let known: i64 =
        sqlx::query_scalar("SELECT count(*) FROM host_key WHERE (kind = 'wg' AND key = $1) OR (kind = 'identity' AND key = $2)")
            .bind(attempt.wg_key.to_string())
            .bind(attempt.identity.to_string())
            .fetch_one(change.db())
            .await?;
    Ok((known > 0).then_some(Verdict::Deny(Cause::KeyKnown)))
}

/// Somebody else knows the secret of a token that was used up. If it was for one host, one of the two is not who the operator meant.
async fn used_up(change: &mut Change, token: &TokenRow) -> Result<Verdict, StoreError> {
    if token.uses != 1 {
        return Ok(Verdict::Deny(Cause::Used));
    }
    let first: Option<String> = sqlx::query_scalar("SELECT id FROM host WHERE token = $1 AND revoked_at IS NULL AND contested = 0")
        .bind(&token.id)
        .fetch_optional(change.db())
        .await?;
    match first {
        Some(id) => Ok(Verdict::Contest(Table("host").parse(&id)?)),
        None => Ok(Verdict::Deny(Cause::Used)),
    }
}

async fn contest(mut change: Change, host: HostId) -> Result<(), StoreError> {
    sqlx::query("UPDATE host SET contested = 1 WHERE id = $1")
        .bind(host.to_string())
        .execute(change.db())
        .await?;
    change
        .finish(Reach::Withdrawal, Action::HostContest, &[Object::Host(host)])
        .await
        .map(|_| ())
}

async fn consume(db: &mut SqliteConnection, token: &TokenRow) -> Result<(), RedeemError> {
    let consumed = sqlx::query("UPDATE token SET uses_left = uses_left - 1 WHERE id = $1 AND uses_left > 0")
        .bind(&token.id)
        .execute(db)
        .await
        .map_err(StoreError::from)?;
    if consumed.rows_affected() == 1 {
        Ok(())
    } else {
        Err(RedeemError::Denied(Cause::Used))
    }
}

async fn insert(db: &mut SqliteConnection, host: &Host, token: &TokenRow) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO host (id, name, name_given, wg_key, identity, token, enrolled_at, last_seen) VALUES ($1, $2, $3, $4, $5, $6, $7, $7)",
    )
    .bind(host.id.to_string())
    .bind(host.name.as_str())
    .bind(i64::from(host.name_given))
    .bind(host.wg_key.to_string())
    .bind(host.identity.to_string())
    .bind(&token.id)
    .bind(number(host.enrolled_at.0))
    .execute(&mut *db)
    .await?;
    failpoint!(HostWritten);
    for (kind, key) in [("wg", host.wg_key.to_string()), ("identity", host.identity.to_string())] {
        sqlx::query("INSERT INTO host_key (kind, key, host) VALUES ($1, $2, $3)")
            .bind(kind)
            .bind(key)
            .bind(host.id.to_string())
            .execute(&mut *db)
            .await?;
    }
    set_labels(db, host.id, &host.labels).await
}
