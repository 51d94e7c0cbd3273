//! `backup` and `restore`: the whole coordinator in one file, and back.
//!
//! A backup holds everything that a data directory needs: a copy of the database at one moment, the trust roots as they are found by listing
//! their directory, the configuration, and a manifest that says which mesh, which version and which schema. **It holds the mesh's private
//! keys**: whoever has it can be the coordinator.
//!
//! [`mod@format`] is the file, [`mod@write`] makes one beside a running coordinator, [`mod@restore`] makes a data directory out of one: in a folder of
//! its own first, and put into place only when all of it is proven. A restored coordinator changes nothing until `recover`
//! ([`crate::recover`]).

pub mod format;
pub mod restore;
pub mod write;

use std::io;
use std::path::Path;

use crate::data_dir::DataDirError;
use crate::store::{OpenError, StoreError};
use crate::trust::RootsError;

pub use restore::{Restored, restore};
pub use write::{Written, backup};

/// Why there is no backup, or why it was not restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The data directory.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The database.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A change in it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The trust roots.
    #[error(transparent)]
    Roots(#[from] RootsError),
    /// The backup's file exists.
    #[error("{path} exists already, and a backup overwrites nothing: name another file")]
    Exists {
        /// The file.
        path: String,
    },
    /// The keys changed each time that they were read.
    #[error("the keys below {path} changed while they were copied: try again when their rotation is over")]
    Changing {
        /// The directory.
        path: String,
    },
    /// Something in the data directory that is no part of a mesh.
    #[error("{path} is neither a file nor a folder of keys that a backup can hold ({problem})")]
    Foreign {
        /// What.
        path: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Not a backup, or not a whole one.
    #[error("{path} is no sound backup ({problem}): nothing was restored")]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A newer program made it.
    #[error("{path} has schema {found}, this program knows {known}: restore it with the cloison-coordinator that made it, or a newer one")]
    Newer {
        /// The file.
        path: String,
        /// The backup's.
        found: i64,
        /// The newest one known here.
        known: i64,
    },
    /// The data directory has another mesh.
    #[error("{data} holds {there}, and the backup is of {backup}: a mesh is never overwritten, least of all by another one")]
    OtherMesh {
        /// The data directory.
        data: String,
        /// Its mesh.
        there: String,
        /// The backup's mesh.
        backup: String,
    },
    /// The data directory has this mesh.
    #[error("{data} holds this mesh already: to go back to the backup, stop the coordinator, move {data} away and restore again")]
    Occupied {
        /// The data directory.
        data: String,
    },
    /// A file cannot be read or written.
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

fn io_error(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> BackupError {
    let path = path.display().to_string();
    move |source| BackupError::Io { path, action, source }
}

#[cfg(test)]
mod tests;
