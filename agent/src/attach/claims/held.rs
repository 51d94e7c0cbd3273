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
    /// Whether what agents before have left guarded was looked through.
    is_tidy: bool,
    /// Cgroups whose sockets are marked, by their ids.
    marked: BTreeMap<u64, Marked>,
    /// Cgroups that should be guarded and are not, and why.
    unguarded: BTreeMap<u64, String>,
}

/// A cgroup whose sockets are marked.
#[derive(Debug)]
struct Marked {
    cgroup: Cgroup,
    mark: u32,
    /// Why they cannot be.
    error: Option<String>,
}

impl Held {
    pub(super) const fn new(place: Option<PathBuf>) -> Self {
        Self {
            place,
            guard: None,
            is_tidy: false,
            marked: BTreeMap::new(),
            unguarded: BTreeMap::new(),
        }
    }

    /// Opens the guard where it is wanted, and lets go whom an agent before has left guarded where it is not.
    pub(super) fn take_up_guard(&mut self, wanted: bool) {
        let Some(place) = &self.place else { return };
        if !wanted {
            self.guard = None;
            warn_of(Guard::release(place));
        } else if !matches!(self.guard, Some(Ok(_))) {
            (self.guard, self.is_tidy) = (Some(Guard::open(place).map_err(Arc::new)), false);
        }
    }

    /// Why loopback cannot be guarded, though it should be.
    pub(super) fn guard_error(&self) -> Option<Arc<GuardError>> {
        self.guard.as_ref()?.as_ref().err().cloned()
    }

    /// Marks and guards these cgroups, as far as it is not done yet; each comes with its mark. The others are let go, if they may be.
    pub(super) fn hold<'a>(&mut self, tree: &Tree, claimed: impl Iterator<Item = (&'a Cgroup, u32)>, lets_go: bool) {
        let mut former = std::mem::take(&mut self.marked);
        self.unguarded.clear();
        for (found, mark) in claimed {
            let known = former.remove(&found.id).filter(|known| known.mark == mark && known.error.is_none());
            let marked = known.unwrap_or_else(|| {
                let done = tree.open(found).and_then(|directory| cgroup::mark_sockets(directory, mark));
                Marked {
                    cgroup: found.clone(),
                    mark,
                    error: done.err().map(|error| error.to_string()),
                }
            });
            self.marked.insert(found.id, marked);
            if let Some(Ok(guard)) = &mut self.guard
                && !guard.is_closed(found.id, mark)
                && let Err(error) = tree
                    .open(found)
                    .and_then(|directory| guard.close(found.id, directory.as_fd(), mark))
            {
                self.unguarded.insert(found.id, error.to_string());
            }
        }
        if !lets_go {
            self.marked.extend(former);
            return;
        }
        let left = match (&self.guard, &self.place) {
            (Some(Ok(guard)), Some(place)) if !self.is_tidy => {
                warn_of(Guard::end_others(place));
                self.is_tidy = true;
                tree.there(&guard.left())
            }
            _ => Vec::new(),
        };
        for cgroup in former.into_values().map(|marked| marked.cgroup).chain(left) {
            self.let_go(tree, &cgroup);
        }
        if let Some(Ok(guard)) = &mut self.guard {
            guard.make_room();
        }
    }

    /// Takes mark and guard away from a cgroup that nobody claims any more. Of one that is gone there may be sockets somewhere: they stay guarded.
    fn let_go(&mut self, tree: &Tree, cgroup: &Cgroup) {
        let opened = tree.open(cgroup);
        if let Ok(directory) = &opened {
            unmark(directory, &cgroup.path);
        }
        let Some(Ok(guard)) = &mut self.guard else { return };
        if opened.is_err() {
            guard.has_gone(cgroup.id);
        } else if let Err(error) = guard.open_again(cgroup.id) {
            tracing::warn!(cgroup = cgroup.path, %error, "loopback stays guarded for who is no component any more");
        }
    }

    /// Why the sockets of a cgroup cannot be marked.
    pub(super) fn unmarked(&self, id: u64) -> Option<&str> {
        self.marked.get(&id)?.error.as_deref()
    }

    /// Why a cgroup that should be guarded is not: it is nobody then.
    pub(super) fn unguarded(&self, id: u64) -> Option<&str> {
        self.unguarded.get(&id).map(String::as_str)
    }

    /// Takes everything away from these cgroups, whoever attached it, and the guard from all.
    pub(super) fn end<'a>(tree: &Tree, cgroups: impl Iterator<Item = &'a Cgroup>, place: &Path) {
        let mut directories = Vec::new();
        for cgroup in cgroups {
            // One that went meanwhile has nothing left.
            let Ok(directory) = tree.open(cgroup) else { continue };
            unmark(&directory, &cgroup.path);
            directories.push(directory);
        }
        warn_of(Guard::end(place, directories.iter().map(File::as_fd)));
    }
}

fn unmark(directory: &File, cgroup: &str) {
    if let Err(error) = cgroup::unmark_sockets(directory)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(cgroup, %error, "cannot take the mark of a cgroup's sockets away");
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
