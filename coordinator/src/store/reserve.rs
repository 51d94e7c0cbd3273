//! Room on the disk that is held back: when the disk is full, it makes way for what must not wait, which is revocations, the certificates of
//! hosts that are members, and what the publisher keeps before it sends. It is held again from the next start on, when somebody has freed
//! some space.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate};

use super::Store;

/// How much is held back: thousands of revocations, and the views that change with them.
const RESERVE_BYTES: u64 = 16 * 1024 * 1024;

/// The file that holds it.
#[derive(Debug)]
pub(super) struct Reserve(PathBuf);

impl Reserve {
    fn take(&self) -> io::Result<()> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&self.0)?;
        fallocate(&file, FallocateFlags::empty(), 0, RESERVE_BYTES)?;
        file.sync_all()
    }
}

impl Store {
    /// Holds room back from now on, in a file of its own on the database's disk. A disk that has none left keeps nobody from starting.
    pub fn hold_room(&self, path: PathBuf) {
        let reserve = Reserve(path);
        if let Err(error) = reserve.take() {
            tracing::warn!(file = %reserve.0.display(), %error, "no room could be held back for revocations on a full disk");
        }
        self.0.reserve.store(Some(Arc::new(reserve)));
    }

    /// Gives up what is held back, and says whether there was any: then what must not wait is tried once more.
    pub(super) fn make_room(&self) -> bool {
        let made = self
            .0
            .reserve
            .load()
            .as_ref()
            .is_some_and(|reserve| fs::remove_file(&reserve.0).is_ok());
        if made {
            tracing::error!("the disk is full, and the last room on it is used up for revocations: free some space, then restart");
        }
        made
    }
}
