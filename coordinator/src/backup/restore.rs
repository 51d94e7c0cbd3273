//! `restore`: a data directory out of a backup, all of it or nothing.
//!
//! The whole file is proven first. Then everything is unpacked into a folder inside the new data directory, the database is brought up to the
//! present schema there and marked as restored, keys and database are held against each other, and only then the parts get their places, the
//! database last. A restore that was interrupted leaves that folder; no coordinator starts on it, and the next restore begins anew.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

use super::format::{CONFIG, DATABASE, Entry, Manifest, Proven, TRUST};
use super::{BackupError, io_error};
use crate::args::RestoreArgs;
use crate::data_dir::{DataDir, DataDirError};
use crate::entropy::Environment;
use crate::run::RunError;
use crate::store::{self, Store};
use crate::trust::Roots;

/// What was restored.
#[derive(Debug)]
pub struct Restored {
    /// What the backup said about itself.
    pub manifest: Manifest,
}

/// Makes the data directory `args.data` out of a backup.
///
/// # Errors
/// [`BackupError`]; the directory is as it was then, or holds nothing but an interrupted restore.
pub async fn restore(args: &RestoreArgs, env: &Environment) -> Result<Restored, BackupError> {
    let file = File::open(&args.file).map_err(io_error(&args.file, "opening"))?;
    let damaged = |problem| BackupError::Damaged {
        path: args.file.display().to_string(),
        problem,
    };
    let proven = Proven::read(file).map_err(damaged)?;
    let manifest = proven.manifest.clone();
    if manifest.schema > store::known_schema() {
        return Err(BackupError::Newer {
            path: args.file.display().to_string(),
            found: manifest.schema,
            known: store::known_schema(),
        });
    }
    let data = match DataDir::begin_restore(&args.data) {
        Err(DataDirError::NotEmpty { .. }) => return Err(occupied(&args.data, &manifest).await),
        begun => begun?,
    };
    let staging = data.restoring();
    proven
        .unpack(|entry, content| unpack(&staging, entry, content))
        .map_err(damaged)??;
    judge(&staging, &manifest, env).await.map_err(|error| match error {
        Judged::Problem(problem) => damaged(problem),
        Judged::Error(error) => error,
    })?;
    sync_tree(&staging)?;
    for name in [CONFIG, TRUST, DATABASE] {
        let (from, to) = (staging.join(name), args.data.join(name));
        if from.exists() {
            fs::rename(&from, &to).map_err(io_error(&to, "putting it into place"))?;
            sync(&args.data)?;
        }
    }
    fs::remove_dir_all(&staging).map_err(io_error(&staging, "removing the folder that it was unpacked into"))?;
    sync(&args.data)?;
    Ok(Restored { manifest })
}

/// Which mesh is in the way.
async fn occupied(data: &Path, manifest: &Manifest) -> BackupError {
    let shown = data.display().to_string();
    match store::database_facts(&data.join(DATABASE)).await {
        Ok(facts) if facts.mesh != manifest.mesh => BackupError::OtherMesh {
            data: shown,
            there: facts.mesh.to_string(),
            backup: manifest.mesh.to_string(),
        },
        Ok(_) => BackupError::Occupied { data: shown },
        Err(_) => DataDirError::NotEmpty { path: shown }.into(),
    }
}

fn unpack(staging: &Path, entry: &Entry, content: &mut dyn Read) -> Result<(), BackupError> {
    let path = staging.join(&entry.name);
    if let Some(folder) = path.parent() {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.map_err(io_error(folder, "making the directory"))?;
    }
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    let mut file = file.map_err(io_error(&path, "creating"))?;
    io::copy(content, &mut file)
        .and_then(|_| file.sync_all())
        .map_err(io_error(&path, "writing"))
}

/// What speaks against what was unpacked.
enum Judged {
    Problem(String),
    Error(BackupError),
}

impl<E: Into<BackupError>> From<E> for Judged {
    fn from(error: E) -> Self {
        Self::Error(error.into())
    }
}

/// Brings the database up to date, marks it, and holds it against the manifest and the keys.
async fn judge(staging: &Path, manifest: &Manifest, env: &Environment) -> Result<(), Judged> {
    let store = Store::open(&staging.join(DATABASE), env.clone()).await?;
    let marked = match store.verify_audit().await {
        Ok(_) => store.mark_restored().await,
        Err(error) => Err(error),
    };
    let inventory = store.inventory();
    store.close().await;
    marked?;
    // Only the database itself is put into place: what closing it left in the log beside it, the mark first of all, would be lost.
    let log = staging.join(format!("{DATABASE}-wal"));
    if fs::metadata(&log).is_ok_and(|found| found.len() > 0) {
        return Err(Judged::Error(io_error(&log, "bringing it into the database")(io::Error::other(
            "SQLite could not: is the disk full?",
        ))));
    }
    if (inventory.mesh, inventory.version) != (manifest.mesh, manifest.version) {
        return Err(Judged::Problem("its manifest speaks of another database".into()));
    }
    let roots = Roots::load(&staging.join(TRUST))?;
    if roots.mesh() != inventory.mesh {
        let mixed = RunError::Mixed {
            roots: roots.mesh().to_string(),
            database: inventory.mesh.to_string(),
        };
        return Err(Judged::Problem(mixed.to_string()));
    }
    Ok(())
}

fn sync_tree(folder: &Path) -> Result<(), BackupError> {
    for entry in fs::read_dir(folder).map_err(io_error(folder, "listing"))? {
        let path = entry.map_err(io_error(folder, "listing"))?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            sync(&path)?;
        }
    }
    sync(folder)
}

fn sync(path: &Path) -> Result<(), BackupError> {
    File::open(path).and_then(|f| f.sync_all()).map_err(io_error(path, "syncing"))
}
