//! `backup`: one file out of a data directory, which a coordinator may be using meanwhile.
//!
//! The file has its name only when all of it is on the disk. What a backup that was killed leaves behind begins with a dot, ends in `.part`,
//! and is removed by the next one to the same place.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Cursor, Read};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, OFlags, RenameFlags, flock, renameat_with};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use super::format::{self, CONFIG, DATABASE, Entry, MAX_FILES, MAX_SMALL_FILE, Manifest, TRUST, hex, is_fine_name};
use super::{BackupError, io_error};
use crate::args::BackupArgs;
use crate::data_dir::DataDir;
use crate::entropy::Environment;
use crate::store;

/// How often the keys are read again if they changed while the database was copied.
const TRIES: usize = 3;

/// A backup that was made.
#[derive(Debug)]
pub struct Written {
    /// Where.
    pub path: PathBuf,
    /// What it says about itself.
    pub manifest: Manifest,
    /// Its length in bytes.
    pub length: u64,
}

/// A file of the data directory with its name in the backup.
type Small = (String, Zeroizing<Vec<u8>>);

/// Makes a backup beside a coordinator that may be running.
///
/// # Errors
/// [`BackupError`]; there is no file then.
pub async fn backup(args: &BackupArgs, env: &Environment) -> Result<Written, BackupError> {
    let data = DataDir::share(&args.data)?;
    let path = std::path::absolute(&args.to).map_err(io_error(&args.to, "finding its place"))?;
    if fs::symlink_metadata(&path).is_ok() {
        return Err(BackupError::Exists {
            path: path.display().to_string(),
        });
    }
    remove_leftovers(&path);
    let mark = hex(&env.random::<8>().map_err(store::StoreError::from)?);
    let copy = Part::create(&path, &format!("{mark}.db"))?;
    let (facts, small) = consistent(&data, &copy).await?;
    let mut database = File::open(&copy.path).map_err(io_error(&copy.path, "opening"))?;
    let mut files = vec![entry(DATABASE, &mut database).map_err(io_error(&copy.path, "reading"))?];
    for (name, content) in &small {
        files.push(entry(name, &mut content.as_slice()).map_err(io_error(&copy.path, "reading"))?);
    }
    let manifest = Manifest {
        mesh: facts.mesh,
        version: facts.version,
        schema: facts.schema,
        software: env!("CARGO_PKG_VERSION").into(),
        made_at: env.clock.now(),
        files,
    };
    let part = Part::create(&path, &mark)?;
    let database = File::open(&copy.path).map_err(io_error(&copy.path, "opening"))?;
    let contents = small
        .iter()
        .map(|(_, content)| -> Box<dyn Read> { Box::new(Cursor::new(content.as_slice())) });
    let contents = std::iter::once(Box::new(database) as Box<dyn Read>).chain(contents);
    let length = format::write(&part.file, &manifest, contents).map_err(io_error(&part.path, "writing"))?;
    part.into_place(&path)?;
    Ok(Written { path, manifest, length })
}

/// The database's copy and the small files, all of one moment: if the keys changed meanwhile, everything is copied anew.
async fn consistent(data: &DataDir, copy: &Part) -> Result<(store::DatabaseFacts, Vec<Small>), BackupError> {
    for _ in 0..TRIES {
        let before = small_files(data)?;
        copy.file.set_len(0).map_err(io_error(&copy.path, "emptying"))?;
        let facts = store::copy_database(&data.database(), &copy.path).await?;
        if small_files(data)? == before {
            return Ok((facts, before));
        }
    }
    Err(BackupError::Changing {
        path: data.trust().display().to_string(),
    })
}

fn small_files(data: &DataDir) -> Result<Vec<Small>, BackupError> {
    let mut found = Vec::new();
    if let Ok(content) = fs::read(data.config()) {
        found.push((CONFIG.to_owned(), Zeroizing::new(content)));
    }
    list(&data.trust(), TRUST, &mut found)?;
    Ok(found)
}

/// Everything below a folder of keys, in the order of names.
fn list(folder: &Path, name: &str, found: &mut Vec<Small>) -> Result<(), BackupError> {
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let mut entries = entries.map_err(io_error(folder, "listing"))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let foreign = |problem| BackupError::Foreign {
            path: path.display().to_string(),
            problem,
        };
        let kind = entry.file_type().map_err(io_error(&path, "looking at it"))?;
        let name = entry
            .file_name()
            .to_str()
            .map(|own| format!("{name}/{own}"))
            .ok_or_else(|| foreign("its name"))?;
        if kind.is_dir() {
            if name.split('/').count() > 3 {
                return Err(foreign("too deep"));
            }
            list(&path, &name, found)?;
            continue;
        }
        let length = entry.metadata().map_err(io_error(&path, "looking at it"))?.len();
        if !kind.is_file() || !is_fine_name(&name) || length > MAX_SMALL_FILE || found.len() >= MAX_FILES {
            return Err(foreign("its kind, name or length, or there are too many"));
        }
        let content = fs::read(&path).map_err(io_error(&path, "reading"))?;
        found.push((name, Zeroizing::new(content)));
    }
    Ok(())
}

fn entry(name: &str, content: &mut dyn Read) -> io::Result<Entry> {
    let mut hash = Sha256::new();
    let length = io::copy(content, &mut hash)?;
    Ok(Entry {
        name: name.to_owned(),
        length,
        sha256: hex(&hash.finalize()),
    })
}

/// A file on the way. It vanishes unless it is put into place; the lock shows that somebody is writing it.
#[derive(Debug)]
struct Part {
    path: PathBuf,
    file: File,
}

impl Part {
    fn create(target: &Path, mark: &str) -> Result<Self, BackupError> {
        let path = target.with_file_name(part_name(target, mark));
        let options = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let file = options.map_err(io_error(&path, "creating"))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|e| io_error(&path, "locking")(e.into()))?;
        Ok(Self { path, file })
    }

    fn into_place(self, target: &Path) -> Result<(), BackupError> {
        // Both ways fail if there is such a file by now: nothing is overwritten. Not every file system has the first, or the second.
        let moved = renameat_with(CWD, &self.path, CWD, target, RenameFlags::NOREPLACE);
        let placed = match moved {
            Err(Errno::INVAL | Errno::NOSYS) => fs::hard_link(&self.path, target),
            moved => moved.map_err(io::Error::from),
        };
        placed.map_err(io_error(target, "putting the finished backup into place"))?;
        let folder = target.parent().unwrap_or(target);
        File::open(folder)
            .and_then(|f| f.sync_all())
            .map_err(io_error(folder, "syncing the directory"))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next backup.
        let _ = fs::remove_file(&self.path);
    }
}

fn part_name(target: &Path, mark: &str) -> OsString {
    let mut name = OsString::from(".");
    name.push(target.file_name().unwrap_or_default());
    name.push(format!(".{mark}.part"));
    name
}

/// Removes what earlier backups to the same place left when they were killed: they hold keys.
fn remove_leftovers(target: &Path) {
    let prefix = format!(".{}.", target.file_name().unwrap_or_default().to_string_lossy());
    let Some(entries) = target.parent().and_then(|folder| fs::read_dir(folder).ok()) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with(&prefix) || !name.ends_with(".part") {
            continue;
        }
        let flags = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0);
        let Ok(file) = OpenOptions::new().write(true).custom_flags(flags).open(entry.path()) else {
            continue;
        };
        let ours = file.metadata().is_ok_and(|m| m.uid() == rustix::process::geteuid().as_raw());
        if ours && flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = fs::remove_file(entry.path());
        }
    }
}
