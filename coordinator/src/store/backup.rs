//! A copy of the database while it is in use, and what a database says about itself.

use std::path::Path;

use cloison_proto::id::MeshId;
use cloison_proto::version::Version;
use sqlx::sqlite::{SqliteConnectOptions, SqlitePool};

use super::db;
use super::error::{OpenError, StoreError};
use super::row::Table;

/// What a database says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DatabaseFacts {
    /// Which mesh.
    pub mesh: MeshId,
    /// Its state.
    pub version: Version,
    /// The number of its schema.
    pub schema: i64,
}

/// The newest schema that this program knows.
#[must_use]
pub fn known_schema() -> i64 {
    db::known_schema()
}

/// Copies the database `from`, which a coordinator may be writing to, into the empty file `to`: one state of it, whole, without what was
/// deleted. Says what the copy holds. `from` is not changed, not even its schema.
///
/// # Errors
/// [`OpenError`].
pub async fn copy_database(from: &Path, to: &Path) -> Result<DatabaseFacts, OpenError> {
    if !from.is_file() {
        return Err(OpenError::Missing {
            path: from.display().to_string(),
        });
    }
    let source = open(from, false).await?;
    facts(from, &source).await?;
    // SQLite refuses a `to` that is not empty (https://www.sqlite.org/lang_vacuum.html).
    let copied = sqlx::query("VACUUM INTO $1").bind(to.display().to_string()).execute(&source).await;
    source.close().await;
    copied.map_err(|error| db::failed(to, error))?;
    database_facts(to).await
}

/// What the database at `path` says about itself. Nobody may be writing to it.
///
/// # Errors
/// [`OpenError`]; [`OpenError::Newer`] if this program cannot read it.
pub async fn database_facts(path: &Path) -> Result<DatabaseFacts, OpenError> {
    let pool = open(path, true).await?;
    let facts = facts(path, &pool).await;
    pool.close().await;
    facts
}

async fn open(path: &Path, alone: bool) -> Result<SqlitePool, OpenError> {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .read_only(true)
        .immutable(alone)
        .busy_timeout(std::time::Duration::from_secs(5));
    db::pool(1).connect_with(options).await.map_err(|source| db::failed(path, source))
}

async fn facts(path: &Path, pool: &SqlitePool) -> Result<DatabaseFacts, OpenError> {
    db::check_schema(path, pool).await?;
    let schema = sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations").fetch_one(pool);
    let schema: i64 = schema.await.map_err(|source| db::failed(path, source))?;
    let row = sqlx::query_as("SELECT mesh, generation, revision FROM mesh WHERE id = 1").fetch_optional(pool);
    let row: Option<(String, i64, i64)> = row.await.map_err(|source| db::failed(path, source))?;
    let Some((mesh, generation, revision)) = row else {
        return Err(OpenError::Unfinished {
            path: path.display().to_string(),
        });
    };
    let table = Table("mesh");
    let read = || -> Result<_, StoreError> {
        Ok(DatabaseFacts {
            mesh: table.parse(&mesh)?,
            version: Version {
                generation: table.number(generation)?,
                revision: table.number(revision)?,
            },
            schema,
        })
    };
    Ok(read()?)
}
