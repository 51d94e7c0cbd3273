//! Room on the disk that is held back: when the disk is full, it makes way for what must not wait, which is revocations, the certificates of
//! hosts that are members, and what the publisher keeps before it sends. Until somebody has freed some space and it is held again, nothing
//! else is changed, so that nothing else uses it up.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, fallocate, statvfs};

use super::Store;

/// How much is held back: thousands of revocations, and the views that change with them.
const RESERVE_BYTES: u64 = 16 * 1024 * 1024;

/// How much must be free before the room is held back again, so that holding it does not fill the disk anew.
const FREE_BYTES: u64 = 2 * RESERVE_BYTES;

/// The file that holds it.
#[derive(Debug)]
pub(super) struct Reserve {
    path: PathBuf,
    /// Nothing is held: what can wait has to.
    given_up: AtomicBool,
}

impl Reserve {
    fn take(&self) -> io::Result<()> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&self.path)?;
        let taken = fallocate(&file, FallocateFlags::empty(), 0, RESERVE_BYTES).map_err(io::Error::from);
        let taken = taken.and_then(|()| file.sync_all());
        if taken.is_err() {
            // A part of it would only be missing elsewhere.
            let _ = fs::remove_file(&self.path);
        }
        self.given_up
            .store(matches!(&taken, Err(e) if e.kind() == io::ErrorKind::StorageFull), Ordering::SeqCst);
        taken
    }

    fn has_room(&self) -> bool {
        let folder = self.path.parent().unwrap_or(&self.path);
        statvfs(folder).is_ok_and(|disk| disk.f_bavail.saturating_mul(disk.f_frsize) >= FREE_BYTES)
    }
}

impl Store {
    /// Holds room back from now on, in a file of its own on the database's disk. A disk that has none left keeps nobody from starting.
    pub fn hold_room(&self, path: PathBuf) {
        let reserve = Reserve {
            path,
            given_up: AtomicBool::new(false),
        };
        if let Err(error) = reserve.take() {
            tracing::warn!(file = %reserve.path.display(), %error, "no room could be held back for revocations on a full disk");
        }
        self.0.reserve.store(Some(Arc::new(reserve)));
    }

    /// Holds room back again once somebody has freed some: from then on, what can wait is done again.
    pub fn hold_room_again(&self) {
        let reserve = self.0.reserve.load_full();
        let Some(reserve) = reserve.filter(|reserve| reserve.given_up.load(Ordering::SeqCst) && reserve.has_room()) else {
            return;
        };
        match reserve.take() {
            Ok(()) => tracing::info!("the disk has room again: everything can be changed"),
            Err(error) => tracing::warn!(%error, "no room could be held back again for revocations on a full disk"),
        }
    }

    /// Whether the room that is held back was given up, so that only what must not wait may use what is left.
    pub(super) fn is_short_of_room(&self) -> bool {
        self.0
            .reserve
            .load()
            .as_ref()
            .is_some_and(|reserve| reserve.given_up.load(Ordering::SeqCst))
    }

    /// Gives up what is held back, and says whether there was any: then what must not wait is tried once more.
    pub(super) fn make_room(&self) -> bool {
        let reserve = self.0.reserve.load_full();
        let Some(reserve) = reserve else { return false };
        reserve.given_up.store(true, Ordering::SeqCst);
        let made = fs::remove_file(&reserve.path).is_ok();
        if made {
            tracing::error!("the disk is full, and the last room on it is kept for revocations from now on: free some space");
        }
        made
    }
}
