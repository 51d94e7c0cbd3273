//! One change: the writing transaction from its first read to the moment when everybody may know.
//!
//! Nothing is visible before the commit, and a change that is dropped on the way never was. The commit runs as a task of its own, so that
//! a caller who goes away in the middle (a request that timed out) cannot separate what is on the disk from the inventory in memory.

use std::sync::Arc;

use cloison_proto::version::MeshTime;
use sqlx::{Sqlite, SqliteConnection, Transaction};
use tokio::sync::OwnedMutexGuard;

use super::error::StoreError;
use super::model::GateRefusal;
use super::row::{Table, time};
use super::{EXIT_IO, Store, addresses, log, snapshot};
use crate::audit::{Action, Actor, Context, Entry, Object};
use crate::credential::{Scope, includes};
use crate::failpoint::failpoint;
use crate::inventory::Inventory;

/// How far a change reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// What the inventory shows: addresses are brought up to date, the gate judges, the revision rises.
    Inventory,
    /// As `Inventory`, but nobody is asked: taking away is never refused, whatever else is wrong with the mesh.
    Withdrawal,
    /// The revision rises; views stay as they are.
    Revision,
    /// A leaf in the audit, and an inventory that is read anew: something about the mesh as a whole changed, no version.
    Reload,
    /// A leaf in the audit and nothing else.
    Leaf,
}

/// What a change is held up by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Urgency {
    /// By a full disk, as soon as the room held back is in use, and by a database that may be an old one.
    CanWait,
    /// By a database that may be an old one.
    Urgent,
    /// By nothing: it is about that very state.
    Always,
}

/// A change under way. It holds the only writing connection.
pub(super) struct Change {
    /// Held until the change's inventory is out: the next change begins with it.
    turn: OwnedMutexGuard<()>,
    store: Store,
    transaction: Transaction<'static, Sqlite>,
    context: Context,
    /// The time of the whole change.
    pub(super) now: MeshTime,
}

impl Store {
    /// Begins a change that needs `scope`. The credential is judged inside the transaction: one that was revoked a moment ago is too late.
    pub(super) async fn begin(&self, context: Context, scope: Scope) -> Result<Change, StoreError> {
        self.begin_judged(context, scope, Urgency::CanWait).await
    }

    /// Begins a change that takes something away, and needs `scope`: the room that is held back is there for it.
    pub(super) async fn begin_withdrawal(&self, context: Context, scope: Scope) -> Result<Change, StoreError> {
        self.begin_judged(context, scope, Urgency::Urgent).await
    }

    async fn begin_judged(&self, context: Context, scope: Scope, urgency: Urgency) -> Result<Change, StoreError> {
        let mut change = self.begin_unjudged(context, urgency).await?;
        change.authorise(scope).await?;
        Ok(change)
    }

    /// Begins a change that brings its own proof: a join, or the coordinator's own bookkeeping.
    pub(super) async fn begin_unjudged(&self, context: Context, urgency: Urgency) -> Result<Change, StoreError> {
        let turn = self.0.turn.clone().lock_owned().await;
        if let Some(read_only) = self.inventory().read_only
            && urgency != Urgency::Always
        {
            return Err(StoreError::ReadOnly(read_only));
        }
        if urgency == Urgency::CanWait && self.is_short_of_room() {
            return Err(StoreError::StorageFull);
        }
        failpoint!(BeforeBegin);
        let transaction = self.transaction().await?;
        failpoint!(Begun);
        Ok(Change {
            turn,
            store: self.clone(),
            transaction,
            context,
            now: self.now(),
        })
    }

    /// Whether the store reads, and could write: what a watchdog asks. Nothing is changed.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn probe(&self) -> Result<(), StoreError> {
        self.audit_head().await?;
        let change = self.begin_unjudged(Context::of(Actor::Coordinator), Urgency::Always).await?;
        Ok(change.transaction.rollback().await?)
    }

    /// The writing transaction. SQLite itself ends one in which the disk was full or failed (<https://www.sqlite.org/lang_transaction.html>,
    /// section 3); sqlx goes on counting it, so that its connection can begin no other: it makes way for a new one.
    pub(super) async fn transaction(&self) -> Result<Transaction<'static, Sqlite>, StoreError> {
        const BEGIN: &str = "BEGIN IMMEDIATE";
        match self.0.writer.begin_with(BEGIN).await {
            Err(sqlx::Error::InvalidSavePointStatement) => {
                self.0.writer.acquire().await?.close().await?;
                Ok(self.0.writer.begin_with(BEGIN).await?)
            }
            begun => Ok(begun?),
        }
    }
}

impl Change {
    /// The connection, inside the transaction.
    pub(super) fn db(&mut self) -> &mut SqliteConnection {
        &mut self.transaction
    }

    async fn authorise(&mut self, scope: Scope) -> Result<(), StoreError> {
        let id = match self.context.actor {
            Actor::Local | Actor::Coordinator => return Ok(()),
            Actor::Credential(id) => id,
            Actor::Host(_) | Actor::Joiner(_) => return Err(StoreError::NotAuthorised),
        };
        let now = self.now;
        match super::credentials::live(self.db(), id, now).await? {
            Some(principal) if includes(&principal.scopes, scope) => Ok(()),
            _ => Err(StoreError::NotAuthorised),
        }
    }

    /// Completes the change: addresses, revision, inventory, gate, leaf, commit. The revision at which it came into force is returned.
    pub(super) async fn finish(mut self, reach: Reach, action: Action, objects: &[Object]) -> Result<u64, StoreError> {
        let before = self.store.inventory();
        let after = match reach {
            Reach::Inventory | Reach::Withdrawal => Some(self.next_inventory(&before, reach).await?),
            Reach::Revision => {
                let mut after = Inventory::clone(&before);
                self.raise_revision(&mut after, reach).await?;
                Some(after)
            }
            Reach::Reload => snapshot::load(self.db(), &before.hosts).await?,
            Reach::Leaf => None,
        };
        let entry = Entry::done(self.context, action, objects);
        self.commit(entry, after.map(Arc::new)).await
    }

    /// Writes a leaf of its own for one part of a change that has several.
    pub(super) async fn leaf(&mut self, action: Action, objects: &[Object]) -> Result<(), StoreError> {
        let (entry, now) = (Entry::done(self.context, action, objects), self.now);
        log::append(self.db(), &entry, now).await
    }

    /// Completes a change that is only a refusal's leaf.
    pub(super) async fn finish_refused(self, entry: Entry) -> Result<(), StoreError> {
        self.commit(entry, None).await.map(|_| ())
    }

    async fn next_inventory(&mut self, before: &Inventory, reach: Reach) -> Result<Inventory, StoreError> {
        let now = self.now;
        let Some(mut after) = snapshot::load(self.db(), &before.hosts).await? else {
            return Err(StoreError::Corrupt {
                table: "mesh",
                problem: "no row".into(),
            });
        };
        after.instances = Arc::new(addresses::reconcile(self.db(), &after, now).await?);
        failpoint!(AddressesGiven);
        self.raise_revision(&mut after, reach).await?;
        let gate = self.store.0.gate.load_full().filter(|_| reach == Reach::Inventory);
        match gate {
            None => Ok(after),
            // Compiling a large mesh takes long enough to keep a thread from everybody else.
            Some(gate) => judge(move || gate.check(&after).map(|()| after)).await,
        }
    }

    /// Raises the revision in the database, which is right even if another process (`cloison-coordinator credential`) raised it meanwhile.
    async fn raise_revision(&mut self, after: &mut Inventory, reach: Reach) -> Result<(), StoreError> {
        let raised: i64 = sqlx::query_scalar("UPDATE mesh SET revision = revision + 1 WHERE id = 1 RETURNING revision")
            .fetch_one(self.db())
            .await?;
        after.version.revision = Table("mesh").number(raised)?;
        if reach != Reach::Revision {
            after.content_revision = after.version.revision;
            sqlx::query("UPDATE mesh SET content_revision = revision WHERE id = 1")
                .execute(self.db())
                .await?;
        }
        failpoint!(RevisionRaised);
        Ok(())
    }

    async fn commit(mut self, entry: Entry, after: Option<Arc<Inventory>>) -> Result<u64, StoreError> {
        let now = self.now;
        log::append(self.db(), &entry, now).await?;
        failpoint!(LeafWritten);
        let Self {
            turn, store, transaction, ..
        } = self;
        let committed = tokio::spawn(async move {
            failpoint!(BeforeCommit);
            let result = transaction.commit().await.map_err(StoreError::from);
            failpoint!(Committed);
            match (&result, after) {
                (Ok(()), Some(after)) => {
                    store.0.inventory.send_replace(after);
                }
                (Ok(()), None) | (Err(StoreError::StorageFull), _) => {}
                (Err(error), _) => store.fatal(error),
            }
            let revision = store.inventory().version.revision;
            drop(turn);
            failpoint!(Unanswered);
            result.map(|()| revision)
        });
        committed
            .await
            .unwrap_or_else(|_| Err(StoreError::Database(sqlx::Error::WorkerCrashed)))
    }

    /// Commits what needs neither leaf nor revision: notes about contact with hosts.
    pub(super) async fn commit_note(self) -> Result<(), StoreError> {
        let result = self.store.commit_plain(self.transaction).await;
        failpoint!(NoteCommitted);
        result
    }

    /// A time as the database keeps it, for this change.
    pub(super) fn now_db(&self) -> i64 {
        time(self.now)
    }
}

/// Runs the gate where it may take its time.
async fn judge(check: impl FnOnce() -> Result<Inventory, GateRefusal> + Send + 'static) -> Result<Inventory, StoreError> {
    match tokio::task::spawn_blocking(check).await {
        Ok(judged) => judged.map_err(StoreError::Refused),
        // A gate that panicked has allowed nothing.
        Err(_) => Err(StoreError::Refused(GateRefusal {
            code: "internal",
            detail: "the mesh's limits could not be checked".into(),
        })),
    }
}

impl Store {
    /// Commits what nobody has to be told of.
    pub(super) async fn commit_plain(&self, transaction: Transaction<'static, Sqlite>) -> Result<(), StoreError> {
        let result = transaction.commit().await.map_err(StoreError::from);
        if let Err(error) = &result
            && !matches!(error, StoreError::StorageFull)
        {
            self.fatal(error);
        }
        result
    }

    /// A commit failed on IO. Whether it is on the disk nobody can say, and a later fsync would not tell (a kernel reports a lost write
    /// once): the process ends, and the next one reads what is really there.
    fn fatal(&self, error: &StoreError) {
        let source = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
        let message = format!("a change could not be made durable ({error}: {source}); stopping, so that nothing unsaved is acknowledged");
        tracing::error!("{message}");
        match self.0.fatal.load_full() {
            Some(hook) => hook(&message),
            None => std::process::exit(EXIT_IO),
        }
    }
}
