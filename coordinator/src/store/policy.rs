//! The policy: the document in force, and a few before it.

use sha2::{Digest as _, Sha256};
use sqlx::SqliteConnection;

use super::Store;
use super::change::Reach;
use super::error::StoreError;
use super::model::{IfMatch, PolicyWrite, PolicyWritten};
use super::row::{Table, number, to_json};
use super::snapshot::PolicyRow;
use crate::audit::{Action, Context, Object};
use crate::credential::Scope;
use crate::failpoint::failpoint;
use crate::inventory::{PolicyVersion, StoredPolicy};

/// Longest document, in bytes (DESIGN's limit for a policy body).
const MAX_POLICY_BYTES: usize = 4 << 20;

/// How many documents are kept, the one in force included. The audit keeps the hash of each for good.
const KEPT_POLICIES: u64 = 32;

impl Store {
    /// Brings a policy into force (scope `policy`): document, addresses of the instances that it makes, audit, revision.
    ///
    /// # Errors
    /// [`StoreError::PolicyChanged`] if another one is in force than the writer believes; [`StoreError::PoolExhausted`] and
    /// [`StoreError::Refused`] if the mesh may not look like that.
    pub async fn put_policy(&self, context: Context, write: PolicyWrite, if_match: IfMatch) -> Result<PolicyWritten, StoreError> {
        if write.text.len() > MAX_POLICY_BYTES {
            return Err(StoreError::Invalid {
                what: "policy",
                why: "is longer than 4 MiB".into(),
            });
        }
        let mut change = self.begin(context, Scope::Policy).await?;
        let current = current(change.db()).await?;
        let expected = match if_match {
            IfMatch::Any => current,
            IfMatch::Absent => None,
            IfMatch::Version(version) => Some(version),
        };
        if expected != current {
            return Err(StoreError::PolicyChanged { current });
        }
        let version = PolicyVersion(current.map_or(1, |v| v.0.saturating_add(1)));
        let now = change.now_db();
        sqlx::query("INSERT INTO policy (version, text, placements, applied_at) VALUES ($1, $2, $3, $4)")
            .bind(number(version.0))
            .bind(&write.text)
            .bind(to_json(&write.placements)?)
            .bind(now)
            .execute(change.db())
            .await?;
        sqlx::query("DELETE FROM policy WHERE version <= $1")
            .bind(number(version.0).saturating_sub(number(KEPT_POLICIES)))
            .execute(change.db())
            .await?;
        failpoint!(PolicyWritten);
        let digest = Object::Digest(Sha256::digest(&write.text).into());
        let revision = change
            .finish(Reach::Inventory, Action::PolicyApply, &[Object::Policy(version), digest])
            .await?;
        Ok(PolicyWritten { version, revision })
    }

    /// One of the last 32 policies.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn policy(&self, version: PolicyVersion) -> Result<StoredPolicy, StoreError> {
        let row = sqlx::query_as::<_, PolicyRow>("SELECT * FROM policy WHERE version = $1")
            .bind(number(version.0))
            .fetch_optional(&self.0.readers)
            .await?;
        row.ok_or(StoreError::NotFound("policy"))?.read()
    }
}

async fn current(db: &mut SqliteConnection) -> Result<Option<PolicyVersion>, StoreError> {
    let version: Option<i64> = sqlx::query_scalar("SELECT max(version) FROM policy").fetch_one(db).await?;
    version.map(|v| Table("policy").number(v).map(PolicyVersion)).transpose()
}
