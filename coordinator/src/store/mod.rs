//! The store: the mesh's whole state, as use cases. All SQL of the project is in this folder.
//!
//! A change goes: begin the one writing transaction (`change.rs`) -> judge and write -> addresses, revision + 1, new inventory, gate, audit
//! leaf -> commit, fsync -> hand the new inventory to whoever waits. What is not committed was never seen by anybody; a commit that fails
//! on IO ends the process, because nobody can say what is on the disk then.
//!
//! The files: `db` opens the database and maps its errors; `change` is the transaction; `snapshot` reads an inventory; `addresses` gives
//! instances their addresses; `mesh`, `policy`, `hosts`, `contact`, `tokens`, `redeem`, `credentials` and `log` are the use cases; `reserve` is
//! room for those of them that cannot wait; `told` keeps what time it was; `backup` copies the database while it is in use, and `recover` is
//! the way back from a copy.
//!
//! SQL stays portable between SQLite and Postgres: `$1`, `ON CONFLICT`, `RETURNING`, ids as text, times as integers.

mod addresses;
mod backup;
mod change;
mod contact;
mod credentials;
mod db;
mod error;
mod hosts;
mod log;
mod mesh;
mod model;
mod policy;
mod publish;
mod recover;
mod redeem;
mod reserve;
mod rotate;
mod row;
mod snapshot;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod tokens;
mod told;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use cloison_proto::version::MeshTime;
use sqlx::SqlitePool;
use tokio::sync::{Mutex, watch};

pub use backup::{DatabaseFacts, copy_database, database_facts, known_schema};
pub use error::{OpenError, RedeemError, StoreError};
pub use model::*;
pub use recover::{Recovered, Recovery, Sighting};
pub use rotate::KeyOffered;

use crate::clock::Mark;
use crate::entropy::Environment;
use crate::inventory::Inventory;

/// The mesh's state. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

/// What happens when a commit fails on IO.
pub type FatalHook = Arc<dyn Fn(&str) + Send + Sync>;

struct Inner {
    /// Whose turn it is to write. Held from a change's begin until its inventory is out.
    turn: Arc<Mutex<()>>,
    /// One connection: there is one writer.
    writer: SqlitePool,
    readers: SqlitePool,
    env: Environment,
    /// What was last committed.
    inventory: watch::Sender<Arc<Inventory>>,
    gate: ArcSwapOption<Box<dyn Gate>>,
    fatal: ArcSwapOption<FatalHook>,
    refusals: log::RefusalBudget,
    reserve: ArcSwapOption<reserve::Reserve>,
    /// What was noted last of the time, by this process.
    noted: parking_lot::Mutex<Option<Mark>>,
}

/// Exit code when a commit fails on IO (sysexits.h: `EX_IOERR`).
pub const EXIT_IO: i32 = 74;

impl Store {
    /// Makes the database of a new mesh at `path`, which must not exist.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn create(path: &Path, env: Environment, mesh: NewMesh) -> Result<Self, OpenError> {
        let pools = db::create(path).await?;
        Self::begin_mesh(pools, env, mesh).await
    }

    /// Opens the database at `path`, brings its schema up to date and checks that it is sound.
    ///
    /// # Errors
    /// [`OpenError`]. What it cannot use, it leaves as it is.
    pub async fn open(path: &Path, env: Environment) -> Result<Self, OpenError> {
        let pools = db::open(path).await?;
        let Some(inventory) = snapshot::load_first(&pools.writer).await? else {
            return Err(OpenError::Unfinished {
                path: path.display().to_string(),
            });
        };
        told::resume(&pools.writer, &env.clock).await?;
        Ok(Self::with(pools, env, inventory))
    }

    /// A new mesh in memory, for tests and the simulation: the same code on the same engine.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn in_memory(env: Environment, mesh: NewMesh) -> Result<Self, OpenError> {
        let pools = db::in_memory().await?;
        Self::begin_mesh(pools, env, mesh).await
    }

    async fn begin_mesh(pools: db::Pools, env: Environment, mesh: NewMesh) -> Result<Self, OpenError> {
        let inventory = mesh::insert(&pools.writer, &env, mesh).await?;
        Ok(Self::with(pools, env, inventory))
    }

    fn with(pools: db::Pools, env: Environment, inventory: Inventory) -> Self {
        Self(Arc::new(Inner {
            turn: Arc::default(),
            writer: pools.writer,
            readers: pools.readers,
            env,
            inventory: watch::Sender::new(Arc::new(inventory)),
            gate: ArcSwapOption::empty(),
            fatal: ArcSwapOption::empty(),
            refusals: log::RefusalBudget::default(),
            reserve: ArcSwapOption::empty(),
            noted: parking_lot::Mutex::default(),
        }))
    }

    /// Sets who judges every change of policy, hosts, labels and settings from now on: the compiler's limits.
    pub fn set_gate(&self, gate: Box<dyn Gate>) {
        self.0.gate.store(Some(Arc::new(gate)));
    }

    /// Sets what happens when a commit fails on IO. Unset, the process ends with [`EXIT_IO`].
    pub fn set_fatal_hook(&self, hook: FatalHook) {
        self.0.fatal.store(Some(Arc::new(hook)));
    }

    /// The mesh as of the last committed change. Costs nothing.
    #[must_use]
    pub fn inventory(&self) -> Arc<Inventory> {
        self.0.inventory.borrow().clone()
    }

    /// Wakes with each committed change: the publisher's alarm. It holds the inventory, and skips to the last one.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Arc<Inventory>> {
        self.0.inventory.subscribe()
    }

    /// The mesh's time, by which the store judges tokens, credentials and contact. It never goes back.
    #[must_use]
    pub fn now(&self) -> MeshTime {
        self.0.env.clock.now()
    }

    /// Where the store's time and randomness come from.
    #[must_use]
    pub fn environment(&self) -> &Environment {
        &self.0.env
    }

    /// Closes the database behind the last change. Later calls fail.
    pub async fn close(&self) {
        self.0.readers.close().await;
        self.0.writer.close().await;
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Store({})", self.inventory().version)
    }
}
