//! The data directory: its files, who may read them, and the lock that keeps a second coordinator out.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// Why the data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// There is none.
    #[error("{path} does not exist: run `cloison-coordinator init --data {path}`, or name the directory of an existing mesh with --data")]
    Missing {
        /// The directory.
        path: String,
    },
    /// There is something else in it.
    #[error("{path} is not empty: init and restore take a directory of their own, and overwrite nothing")]
    NotEmpty {
        /// The directory.
        path: String,
    },
    /// It belongs to somebody else.
    #[error("{path} belongs to user {owner}, not to user {ours}, who runs this: run it as its owner")]
    NotOurs {
        /// The directory.
        path: String,
        /// Whose it is.
        owner: u32,
        /// Who we are.
        ours: u32,
    },
    /// Others may look into it.
    #[error("{path} has mode {mode:o}, and it holds the mesh's keys: make sure that nobody read them, then `chmod 700 {path}`")]
    TooOpen {
        /// The directory.
        path: String,
        /// Its permission bits.
        mode: u32,
    },
    /// A restore did not get to its end.
    #[error("{path} holds an interrupted restore: run `cloison-coordinator restore` again")]
    Unfinished {
        /// The directory.
        path: String,
    },
    /// Another process has it.
    #[error("{path} is in use by another cloison-coordinator: stop that one first")]
    Locked {
        /// The directory.
        path: String,
    },
    /// It cannot be read or written.
    #[error("{path}: {action} failed")]
    Io {
        /// The file or directory.
        path: String,
        /// What was tried.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A data directory that is ours alone. The lock ends with the value.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    _lock: Option<File>,
}

impl DataDir {
    /// Makes the directory of a new mesh, or takes an empty one, and locks it.
    ///
    /// # Errors
    /// [`DataDirError`].
    pub fn create(path: &Path) -> Result<Self, DataDirError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(io_error(path, "making the directory"))?;
        check_owner(path)?;
        check_empty(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(io_error(path, "setting its mode"))?;
        let data = Self::locked(path)?;
        // Another process may have filled it and left since.
        check_empty(path)?;
        Ok(data)
    }

    /// The directory for a backup to be restored into: a new or empty one, or one in which a restore was interrupted, which is cleared.
    /// [`DataDir::restoring`] is an empty folder then; as long as it is there, nothing but another restore takes the directory.
    ///
    /// # Errors
    /// [`DataDirError`]. A directory that holds anything else is left as it is.
    pub fn begin_restore(path: &Path) -> Result<Self, DataDirError> {
        let data = if path.join(RESTORING).is_dir() {
            check_owner(path)?;
            Self::locked(path)?
        } else if path.join(LOCK).exists() {
            // Whoever has it is told first: it is the mesh that runs here.
            drop(Self::locked(path)?);
            Self::create(path)?
        } else {
            Self::create(path)?
        };
        data.clear_restore()?;
        let folder = data.restoring();
        let made = fs::DirBuilder::new().mode(0o700).create(&folder);
        made.and_then(|()| File::open(path)?.sync_all())
            .map_err(io_error(&folder, "making the directory"))?;
        Ok(data)
    }

    /// Takes away what an interrupted restore put there: as long as its folder is there, everything is its work.
    fn clear_restore(&self) -> Result<(), DataDirError> {
        let folder = self.restoring();
        if !folder.is_dir() {
            return Ok(());
        }
        let remove = |path: &Path| match fs::symlink_metadata(path) {
            Ok(found) if found.is_dir() => fs::remove_dir_all(path),
            Ok(_) => fs::remove_file(path),
            Err(_) => Ok(()),
        };
        for path in [self.database(), self.config(), self.trust(), folder] {
            remove(&path).map_err(io_error(&path, "removing what an interrupted restore left"))?;
        }
        check_empty(&self.path)
    }

    /// Where a backup is unpacked before any of it counts.
    #[must_use]
    pub fn restoring(&self) -> PathBuf {
        self.path.join(RESTORING)
    }

    /// The directory of an existing mesh, locked.
    ///
    /// # Errors
    /// [`DataDirError`].
    pub fn open(path: &Path) -> Result<Self, DataDirError> {
        Self::check(path)?;
        Self::locked(path)
    }

    /// The directory of an existing mesh, which a running coordinator may have: for commands that change one thing in the database.
    ///
    /// # Errors
    /// [`DataDirError`].
    pub fn share(path: &Path) -> Result<Self, DataDirError> {
        Self::check(path)?;
        Ok(Self {
            path: path.to_owned(),
            _lock: None,
        })
    }

    /// The database.
    #[must_use]
    pub fn database(&self) -> PathBuf {
        self.path.join("cloison.db")
    }

    /// The trust roots.
    #[must_use]
    pub fn trust(&self) -> PathBuf {
        self.path.join("trust")
    }

    /// What holds room back for a full disk.
    #[must_use]
    pub fn reserve(&self) -> PathBuf {
        self.path.join("reserve")
    }

    /// The configuration that is read if no other is named.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.path.join("coordinator.toml")
    }

    fn check(path: &Path) -> Result<(), DataDirError> {
        if !path.is_dir() {
            return Err(DataDirError::Missing { path: shown(path) });
        }
        check_owner(path)?;
        if path.join(RESTORING).exists() {
            return Err(DataDirError::Unfinished { path: shown(path) });
        }
        let mode = metadata(path)?.mode() & 0o777;
        if mode & 0o077 == 0 {
            Ok(())
        } else {
            Err(DataDirError::TooOpen { path: shown(path), mode })
        }
    }

    fn locked(path: &Path) -> Result<Self, DataDirError> {
        let file = path.join(LOCK);
        let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&file);
        let lock = lock.map_err(io_error(&file, "opening the lock"))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self {
                path: path.to_owned(),
                _lock: Some(lock),
            }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(DataDirError::Locked { path: shown(path) }),
            Err(error) => Err(io_error(&file, "locking")(error.into())),
        }
    }
}

/// The lock's file. It stays when the process ends; the lock does not.
const LOCK: &str = "lock";

/// The folder of a restore under way.
const RESTORING: &str = "restoring";

fn check_empty(path: &Path) -> Result<(), DataDirError> {
    let mut entries = fs::read_dir(path).map_err(io_error(path, "reading the directory"))?;
    if entries.any(|entry| entry.map_or(true, |e| e.file_name() != LOCK)) {
        return Err(DataDirError::NotEmpty { path: shown(path) });
    }
    Ok(())
}

fn check_owner(path: &Path) -> Result<(), DataDirError> {
    let (owner, ours) = (metadata(path)?.uid(), rustix::process::geteuid().as_raw());
    if owner == ours {
        Ok(())
    } else {
        Err(DataDirError::NotOurs {
            path: shown(path),
            owner,
            ours,
        })
    }
}

fn metadata(path: &Path) -> Result<fs::Metadata, DataDirError> {
    fs::metadata(path).map_err(io_error(path, "looking at it"))
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn io_error(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> DataDirError {
    let path = shown(path);
    move |source| DataDirError::Io { path, action, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_process_is_kept_out_while_the_first_lives() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("data");
        let first = DataDir::create(&path)?;
        assert!(matches!(DataDir::open(&path), Err(DataDirError::Locked { .. })));
        assert!(DataDir::share(&path).is_ok());
        drop(first);
        DataDir::open(&path)?;
        Ok(())
    }

    #[test]
    fn missing_open_and_used_directories_are_refused() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("data");
        assert!(matches!(DataDir::open(&path), Err(DataDirError::Missing { .. })));
        drop(DataDir::create(&path)?);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o750))?;
        assert!(matches!(DataDir::open(&path), Err(DataDirError::TooOpen { mode: 0o750, .. })));
        fs::write(path.join("other"), "")?;
        assert!(matches!(DataDir::create(&path), Err(DataDirError::NotEmpty { .. })));
        Ok(())
    }
}
