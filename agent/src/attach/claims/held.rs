//! What is attached to the claimed cgroups: the mark of their sockets, and the guard of loopback where it is wanted.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::attach::cgroups::{Cgroup, Tree};
use crate::attach::guard::{Guard, GuardError};
use crate::sys::{cgroup, with_causes};

/// What is attached to the claimed cgroups.
#[derive(Debug)]
pub(super) struct Held {
    /// Where the guard is pinned; without a place there is none.
    place: Option<PathBuf>,
    /// The guard, if it is wanted.
    guard: Option<Result<Guard, Arc<GuardError>>>,
    /// The mark of each cgroup's sockets, and why they cannot be marked.
    marked: BTreeMap<u64, (u32, Option<String>)>,
    /// Cgroups that should be guarded and are not, and why.
    unguarded: BTreeMap<u64, String>,
}

impl Held {
    pub(super) const fn new(place: Option<PathBuf>) -> Self {
        Self {
            place,
            guard: None,
            marked: BTreeMap::new(),
            unguarded: BTreeMap::new(),
        }
    }

    /// Opens the guard where it is wanted, and lets go whom an agent before has left guarded where it is not.
    pub(super) fn take_up_guard(&mut self, wanted: bool) {
        let Some(place) = &self.place else { return };
        if !wanted {
            self.guard = None;
            warn_of(Guard::release(place).map(drop));
        } else if !matches!(self.guard, Some(Ok(_))) {
            self.guard = Some(Guard::open(place).map_err(Arc::new));
        }
    }

    /// Why loopback cannot be guarded, though it should be.
    pub(super) fn guard_error(&self) -> Option<Arc<GuardError>> {
        self.guard.as_ref()?.as_ref().err().cloned()
    }

    /// Marks and guards these cgroups, as far as it is not done yet; each comes with its mark. The others are let go, if they may be.
    pub(super) fn hold<'a>(&mut self, tree: &Tree, claimed: impl Iterator<Item = (&'a Cgroup, u32)>, lets_go: bool) {
        let (mut marked, mut unguarded) = (BTreeMap::new(), BTreeMap::new());
        for (found, mark) in claimed {
            let known = self.marked.remove(&found.id).filter(|known| *known == (mark, None));
            let outcome = known.unwrap_or_else(|| {
                let done = tree.open(found).and_then(|directory| cgroup::mark_sockets(directory, mark));
                (mark, done.err().map(|error| error.to_string()))
            });
            marked.insert(found.id, outcome);
            if let Some(Ok(guard)) = &mut self.guard
                && !guard.is_closed(found.id, mark)
                && let Err(error) = tree
                    .open(found)
                    .and_then(|directory| guard.close(found.id, directory.as_fd(), mark))
            {
                unguarded.insert(found.id, error.to_string());
            }
        }
        if let (true, Some(Ok(guard))) = (lets_go, &mut self.guard)
            && let Err(error) = guard.keep(&marked.keys().copied().collect(), |ids| tree.there(ids))
        {
            tracing::warn!(%error, "loopback stays guarded for who is no component any more");
        }
        (self.marked, self.unguarded) = (marked, unguarded);
    }

    /// Why the sockets of a cgroup cannot be marked.
    pub(super) fn unmarked(&self, id: u64) -> Option<&str> {
        self.marked.get(&id)?.1.as_deref()
    }

    /// Why a cgroup that should be guarded is not: it is nobody then.
    pub(super) fn unguarded(&self, id: u64) -> Option<&str> {
        self.unguarded.get(&id).map(String::as_str)
    }

    /// Takes everything away from these cgroups, whoever attached it, and the guard from all.
    pub(super) fn end(cgroups: impl Iterator<Item = File>, place: &Path) {
        let cgroups: Vec<File> = cgroups.collect();
        for directory in &cgroups {
            if let Err(error) = cgroup::unmark_sockets(directory)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(?directory, %error, "cannot take the mark of a cgroup's sockets away");
            }
        }
        warn_of(Guard::end(place, cgroups.iter().map(File::as_fd)));
    }
}

fn warn_of(ended: Result<(), GuardError>) {
    if let Err(error) = ended {
        tracing::warn!(
            error = with_causes(&error),
            "cannot take the guard of loopback away; it ends with the units that it is for"
        );
    }
}
