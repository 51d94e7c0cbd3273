//! Opening the database, and what its errors mean.
//!
//! WAL with `synchronous=FULL`: a committed transaction is on the disk. One connection writes and checkpoints (two doing so at once could
//! corrupt a WAL database before SQLite 3.51.3); the others are opened read-only.

use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use sqlx::migrate::Migrator;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};

use super::error::{OpenError, StoreError};
#[cfg(feature = "failpoints")]
use crate::failpoint::failpoint;

static MIGRATOR: Migrator = sqlx::migrate!("./migrations");

/// How many reads run at once.
const READERS: u32 = 4;

/// How long a call waits for its turn before it fails.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(30);

/// Primary result codes of SQLite (<https://www.sqlite.org/rescode.html>).
const SQLITE_CORRUPT: i32 = 11;
const SQLITE_FULL: i32 = 13;
const SQLITE_NOTADB: i32 = 26;

/// The one writing connection, and the reading ones.
pub(super) struct Pools {
    pub(super) writer: SqlitePool,
    pub(super) readers: SqlitePool,
}

/// A new, empty database with the present schema. Its file can be read by its owner alone.
pub(super) async fn create(path: &Path) -> Result<Pools, OpenError> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let made = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    match made {
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(OpenError::Exists {
                path: path.display().to_string(),
            });
        }
        Err(e) => {
            return Err(OpenError::Open {
                path: path.display().to_string(),
                source: sqlx::Error::Io(e),
            });
        }
    }
    let writer = writer(path).await?;
    migrate(path, &writer).await?;
    Ok(Pools {
        readers: readers(path).await?,
        writer,
    })
}

/// The database at `path`, checked before anything in it is touched.
pub(super) async fn open(path: &Path) -> Result<Pools, OpenError> {
    if !path.is_file() {
        return Err(OpenError::Missing {
            path: path.display().to_string(),
        });
    }
    check_length(path)?;
    let writer = writer(path).await?;
    check_sound(path, &writer).await?;
    check_schema(path, &writer).await?;
    migrate(path, &writer).await?;
    Ok(Pools {
        readers: readers(path).await?,
        writer,
    })
}

/// A database in memory: one connection does everything.
pub(super) async fn in_memory() -> Result<Pools, OpenError> {
    let path = Path::new(":memory:");
    let options = SqliteConnectOptions::new().in_memory(true).foreign_keys(true);
    let writer = pool(1).connect_with(options).await.map_err(|source| failed(path, source))?;
    migrate(path, &writer).await?;
    Ok(Pools {
        readers: writer.clone(),
        writer,
    })
}

fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(false)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(Duration::from_secs(5))
}

pub(super) fn pool(connections: u32) -> SqlitePoolOptions {
    SqlitePoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .idle_timeout(None)
        .max_lifetime(None)
}

async fn writer(path: &Path) -> Result<SqlitePool, OpenError> {
    pool(1).connect_with(options(path)).await.map_err(|source| failed(path, source))
}

async fn readers(path: &Path) -> Result<SqlitePool, OpenError> {
    pool(READERS)
        .connect_with(options(path).read_only(true))
        .await
        .map_err(|source| failed(path, source))
}

async fn migrate(path: &Path, writer: &SqlitePool) -> Result<(), OpenError> {
    #[cfg(feature = "failpoints")]
    at_commit(writer, true).await.map_err(|source| failed(path, source))?;
    let migrated = run_migrations(path, writer).await;
    #[cfg(feature = "failpoints")]
    at_commit(writer, false).await.map_err(|source| failed(path, source))?;
    migrated
}

/// Has the engine say when a migration is written and about to be committed.
#[cfg(feature = "failpoints")]
async fn at_commit(writer: &SqlitePool, on: bool) -> sqlx::Result<()> {
    let mut connection = writer.acquire().await?;
    let mut handle = connection.lock_handle().await?;
    if on {
        handle.set_commit_hook(|| {
            failpoint!(Migrating);
            true
        });
    } else {
        handle.remove_commit_hook();
    }
    Ok(())
}

async fn run_migrations(path: &Path, writer: &SqlitePool) -> Result<(), OpenError> {
    MIGRATOR.run(writer).await.map_err(|source| OpenError::Migrate {
        path: path.display().to_string(),
        source,
    })
}

/// Finds a file that was cut inside its last page, whose missing end SQLite reads as zeros. Where a log lies beside the file, the log may
/// hold what the file does not have yet.
fn check_length(path: &Path) -> Result<(), OpenError> {
    let failed = |source| OpenError::Open {
        path: path.display().to_string(),
        source: sqlx::Error::Io(source),
    };
    let mut log = path.as_os_str().to_owned();
    log.push("-wal");
    if std::fs::metadata(log).is_ok_and(|log| log.len() > 0) {
        return Ok(());
    }
    let mut file = std::fs::File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    // Database header (https://www.sqlite.org/fileformat2.html section 1.3): the page size at offset 16, where 1 stands for 65,536.
    let mut header = [0; 18];
    if length < 512 || file.read_exact(&mut header).is_err() {
        // An empty file is a database without tables; for any other, SQLite finds the words.
        return Ok(());
    }
    let page = match u64::from(u16::from_be_bytes([header[16], header[17]])) {
        1 => 65_536,
        size => size,
    };
    if header.starts_with(b"SQLite format 3\0") && page >= 512 && length % page != 0 {
        let problem = format!("its {length} bytes are no whole number of pages: its end is missing");
        return Err(OpenError::Damaged {
            path: path.display().to_string(),
            problem,
        });
    }
    Ok(())
}

/// Reads through the whole file once: a damaged database is found at the start, not at the change that needs the damaged page.
async fn check_sound(path: &Path, writer: &SqlitePool) -> Result<(), OpenError> {
    let found: String = sqlx::query_scalar("PRAGMA quick_check(1)")
        .fetch_one(writer)
        .await
        .map_err(|source| failed(path, source))?;
    if found == "ok" {
        Ok(())
    } else {
        Err(OpenError::Damaged {
            path: path.display().to_string(),
            problem: found,
        })
    }
}

/// Refuses a database that a newer program wrote, and one that is none of ours.
pub(super) async fn check_schema(path: &Path, writer: &SqlitePool) -> Result<(), OpenError> {
    let tables: i64 = sqlx::query_scalar("SELECT count(*) FROM sqlite_master WHERE name IN ('_sqlx_migrations', 'mesh')")
        .fetch_one(writer)
        .await
        .map_err(|source| failed(path, source))?;
    if tables != 2 {
        return Err(OpenError::Unfinished {
            path: path.display().to_string(),
        });
    }
    let found: Option<i64> = sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations")
        .fetch_one(writer)
        .await
        .map_err(|source| failed(path, source))?;
    let known = known_schema();
    match found {
        Some(found) if found > known => Err(OpenError::Newer { found, known }),
        _ => Ok(()),
    }
}

/// The newest schema that this program knows.
pub(super) fn known_schema() -> i64 {
    MIGRATOR.iter().map(|migration| migration.version).max().unwrap_or(0)
}

/// What it means that the database at `path` cannot be opened or read.
pub(super) fn failed(path: &Path, source: sqlx::Error) -> OpenError {
    let path = path.display().to_string();
    match result_code(&source) {
        Some(SQLITE_CORRUPT | SQLITE_NOTADB) => OpenError::Damaged {
            path,
            problem: source.to_string(),
        },
        _ => OpenError::Open { path, source },
    }
}

/// SQLite's primary result code, if that is where the error comes from.
fn result_code(error: &sqlx::Error) -> Option<i32> {
    let code: i32 = error.as_database_error()?.code()?.parse().ok()?;
    Some(code & 0xff)
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        match result_code(&error) {
            Some(SQLITE_FULL) => Self::StorageFull,
            Some(SQLITE_CORRUPT | SQLITE_NOTADB) => Self::Corrupt {
                table: "the file",
                problem: error.to_string(),
            },
            _ => Self::Database(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_bundled_sqlite_has_the_wal_reset_fix() -> Result<(), Box<dyn std::error::Error>> {
        let pools = in_memory().await?;
        let version: String = sqlx::query_scalar("SELECT sqlite_version()").fetch_one(&pools.writer).await?;
        let parts = version.split('.').map(str::parse).collect::<Result<Vec<u32>, _>>()?;
        assert!(parts >= vec![3, 51, 3], "{version}");
        Ok(())
    }

    #[tokio::test]
    async fn a_commit_waits_for_the_disk_and_readers_cannot_write() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let pools = create(&dir.path().join("db")).await?;
        let mode: String = sqlx::query_scalar("PRAGMA journal_mode").fetch_one(&pools.writer).await?;
        let synchronous: i64 = sqlx::query_scalar("PRAGMA synchronous").fetch_one(&pools.writer).await?;
        let foreign_keys: i64 = sqlx::query_scalar("PRAGMA foreign_keys").fetch_one(&pools.writer).await?;
        assert_eq!((mode.as_str(), synchronous, foreign_keys), ("wal", 2, 1));
        assert!(sqlx::query("DELETE FROM audit").execute(&pools.readers).await.is_err());
        Ok(())
    }
}
