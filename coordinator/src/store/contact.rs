//! What the coordinator notes about its contact with hosts: when and as which incarnation they were seen, which view each has, which
//! certificates they use. Views and sightings are notes without leaf or revision; certificates are audited.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use cloison_proto::id::HostId;
use cloison_proto::key::IdentityKey;
use cloison_proto::version::MeshTime;

use super::Store;
use super::change::{Reach, Urgency};
use super::error::StoreError;
use super::hosts::{self, view_mark};
use super::model::{HostRefusal, Serial, ViewMark};
use super::row::{Table, number, time};
use crate::audit::{Action, Actor, Context, Object};
use crate::failpoint::failpoint;

/// How old `last_seen` may grow before it is written again: contact is constant, and each write waits for the disk.
const SEEN_GRAIN_SECONDS: i64 = 600;

/// How long after its last contact a host may renew by its identity key alone (DESIGN 5.3).
const RENEWAL_GRACE: Duration = Duration::from_secs(30 * 86_400);

impl Store {
    /// Notes that a host is in contact, and as which incarnation. Cheap when nothing is new; left out when the disk is full, because no link
    /// may end for want of room for a note.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn record_seen(&self, id: HostId, incarnation: u64) -> Result<(), StoreError> {
        match self.try_record_seen(id, incarnation).await {
            Err(StoreError::StorageFull | StoreError::ReadOnly(_)) => Ok(()),
            done => done,
        }
    }

    async fn try_record_seen(&self, id: HostId, incarnation: u64) -> Result<(), StoreError> {
        let mut change = self.begin_unjudged(Context::of(Actor::Host(id)), Urgency::CanWait).await?;
        let now = change.now_db();
        sqlx::query(
            "UPDATE host SET last_seen = $2, incarnation = $3 \
             WHERE id = $1 AND (last_seen IS NULL OR last_seen < $4 OR incarnation IS NULL OR incarnation <> $3)",
        )
        .bind(id.to_string())
        .bind(now)
        .bind(incarnation.cast_signed())
        .bind(now.saturating_sub(SEEN_GRAIN_SECONDS))
        .execute(change.db())
        .await?;
        change.commit_note().await
    }

    /// Audits that two links of one host were open at once with diverging incarnations: its keys may have been copied.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn record_cloned(&self, id: HostId) -> Result<(), StoreError> {
        let change = self.begin_unjudged(Context::of(Actor::Coordinator), Urgency::Urgent).await?;
        change
            .finish(Reach::Leaf, Action::HostCloned, &[Object::Host(id)])
            .await
            .map(|_| ())
    }

    /// Keeps at which revision these hosts' views last changed, in one transaction, before the views are sent: after a restart nobody's
    /// version goes back.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn record_view_marks(&self, marks: &[(HostId, ViewMark)]) -> Result<(), StoreError> {
        match self.try_record_view_marks(marks).await {
            Err(StoreError::StorageFull) if self.make_room() => self.try_record_view_marks(marks).await,
            done => done,
        }
    }

    async fn try_record_view_marks(&self, marks: &[(HostId, ViewMark)]) -> Result<(), StoreError> {
        if marks.is_empty() {
            return Ok(());
        }
        let mut change = self.begin_unjudged(Context::of(Actor::Coordinator), Urgency::Urgent).await?;
        for (id, mark) in marks {
            sqlx::query("UPDATE host SET view_revision = $2, view_hash = $3 WHERE id = $1")
                .bind(id.to_string())
                .bind(number(mark.revision))
                .bind(mark.state_hash.as_slice())
                .execute(change.db())
                .await?;
        }
        change.commit_note().await
    }

    /// The views' marks of all hosts that have one and are not revoked.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`].
    pub async fn view_marks(&self) -> Result<BTreeMap<HostId, ViewMark>, StoreError> {
        let rows: Vec<(String, Option<i64>, Option<Vec<u8>>)> =
            sqlx::query_as("SELECT id, view_revision, view_hash FROM host WHERE revoked_at IS NULL")
                .fetch_all(&self.0.readers)
                .await?;
        let mut marks = BTreeMap::new();
        for (id, revision, hash) in rows {
            if let Some(mark) = view_mark(revision, hash.as_deref())? {
                marks.insert(Table("host").parse(&id)?, mark);
            }
        }
        Ok(marks)
    }

    /// Keeps a certificate before it is given out. The one in use stays good until this one is used, so that a host that crashes between
    /// the two is locked out by neither.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Revoked`].
    pub async fn record_certificate(&self, id: HostId, serial: Serial, not_after: MeshTime) -> Result<(), StoreError> {
        match self.try_record_certificate(id, serial, not_after).await {
            Err(StoreError::StorageFull) if self.make_room() => self.try_record_certificate(id, serial, not_after).await,
            done => done,
        }
    }

    async fn try_record_certificate(&self, id: HostId, serial: Serial, not_after: MeshTime) -> Result<(), StoreError> {
        let mut change = self.begin_unjudged(Context::of(Actor::Host(id)), Urgency::Urgent).await?;
        if hosts::record(change.db(), id).await?.revoked_at.is_some() {
            return Err(StoreError::Revoked(id));
        }
        sqlx::query("UPDATE host SET next_serial = $2, next_not_after = $3 WHERE id = $1")
            .bind(id.to_string())
            .bind(serial.to_string())
            .bind(time(not_after))
            .execute(change.db())
            .await?;
        failpoint!(CertificateWritten);
        change
            .finish(Reach::Leaf, Action::CertificateIssue, &[Object::Host(id)])
            .await
            .map(|_| ())
    }

    /// Judges the certificate with which a link was opened, beyond what its chain says; the first use of an issued one retires the other.
    ///
    /// # Errors
    /// [`StoreError::Database`]; what the certificate lacks is the inner result.
    pub async fn admit_certificate(&self, id: HostId, serial: Serial) -> Result<Result<(), HostRefusal>, StoreError> {
        match self.try_admit_certificate(id, serial).await {
            Err(StoreError::StorageFull) if self.make_room() => self.try_admit_certificate(id, serial).await,
            done => done,
        }
    }

    async fn try_admit_certificate(&self, id: HostId, serial: Serial) -> Result<Result<(), HostRefusal>, StoreError> {
        let record = match self.host(id).await {
            Ok(record) => record,
            Err(StoreError::NotFound(_)) => return Ok(Err(HostRefusal::Unknown)),
            Err(error) => return Err(error),
        };
        if record.revoked_at.is_some() {
            return Ok(Err(HostRefusal::Revoked));
        }
        if record.certificates.current.is_some_and(|(current, _)| current == serial) {
            return Ok(Ok(()));
        }
        if self.inventory().read_only.is_some() {
            // Its certificate may be younger than this database. A link gives it nothing, but it can show what it knows.
            return Ok(Ok(()));
        }
        if record.certificates.next.is_none_or(|(next, _)| next != serial) {
            return Ok(Err(HostRefusal::Superseded));
        }
        let mut change = self.begin_unjudged(Context::of(Actor::Host(id)), Urgency::Urgent).await?;
        let promoted = sqlx::query(
            "UPDATE host SET cert_serial = next_serial, cert_not_after = next_not_after, next_serial = NULL, next_not_after = NULL \
             WHERE id = $1 AND next_serial = $2 AND revoked_at IS NULL",
        )
        .bind(id.to_string())
        .bind(serial.to_string())
        .execute(change.db())
        .await?
        .rows_affected();
        change.commit_note().await?;
        // Another link may have promoted it, or an operator revoked the host, since the record was read.
        if promoted == 1 {
            Ok(Ok(()))
        } else {
            self.admitted_meanwhile(id, serial).await
        }
    }

    async fn admitted_meanwhile(&self, id: HostId, serial: Serial) -> Result<Result<(), HostRefusal>, StoreError> {
        let record = self.host(id).await?;
        Ok(match (record.revoked_at, record.certificates.current) {
            (Some(_), _) => Err(HostRefusal::Revoked),
            (None, Some((current, _))) if current == serial => Ok(()),
            (None, _) => Err(HostRefusal::Superseded),
        })
    }

    /// Whose identity key this is, if that host may have a new certificate by it alone: it was in contact within the last 30 days and is
    /// not revoked.
    ///
    /// # Errors
    /// [`StoreError::Database`]; why it may not is the inner result.
    pub async fn renewable(&self, identity: &IdentityKey) -> Result<Result<HostId, HostRefusal>, StoreError> {
        let table = Table("host");
        let row: Option<(String, Option<i64>, i64, Option<i64>)> =
            sqlx::query_as("SELECT id, revoked_at, enrolled_at, last_seen FROM host WHERE identity = $1")
                .bind(identity.to_string())
                .fetch_optional(&self.0.readers)
                .await?;
        let Some((id, revoked_at, enrolled_at, last_seen)) = row else {
            return Ok(Err(HostRefusal::Unknown));
        };
        if revoked_at.is_some() {
            return Ok(Err(HostRefusal::Revoked));
        }
        let last = table.time(last_seen.unwrap_or(enrolled_at).max(enrolled_at))?;
        if last.plus(RENEWAL_GRACE) < self.now() {
            return Ok(Err(HostRefusal::TooLate));
        }
        table.parse(&id).map(Ok)
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

/// Not a serial number's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected 32 hexadecimal digits")]
pub struct BadSerial;

impl FromStr for Serial {
    type Err = BadSerial;
    fn from_str(text: &str) -> Result<Self, BadSerial> {
        let number = u128::from_str_radix(text, 16).map_err(|_| BadSerial)?;
        if text.len() == 32 {
            Ok(Self(number.to_be_bytes()))
        } else {
            Err(BadSerial)
        }
    }
}
