//! Namespaces named by a view, by a file of theirs or by one with the number of a process in them: opened as the agent's configuration
//! allows, told apart from the host's own, and watched: a path at which another namespace stands, or none, is no longer the place that was
//! attached.

use std::path::Path;

use super::{Accepted, Place, Unenforced};
use crate::sys::netns::{NetNs, NetNsError, NetNsId};

/// Opens the namespace at `path`; `home` is the host's own.
///
/// # Errors
/// [`Unenforced`].
pub fn open(path: &Path, accepted: &Accepted, home: NetNsId) -> Result<NetNs, Unenforced> {
    let namespace = find(path, accepted)?;
    if namespace.id() == home {
        return Err(Unenforced::OwnNamespace(Place::Netns(path.into())));
    }
    Ok(namespace)
}

/// Whether the namespace `id`, which is held open, still stands at `path`.
#[must_use]
pub fn is_at(path: &Path, accepted: &Accepted, id: NetNsId) -> bool {
    find(path, accepted).is_ok_and(|found| found.id() == id)
}

fn find(path: &Path, accepted: &Accepted) -> Result<NetNs, NetNsError> {
    match NetNs::open(path, &accepted.netns_dirs) {
        Err(NetNsError::NotNamespace(_)) => NetNs::of_pid_file(path, &accepted.netns_dirs),
        opened => opened,
    }
}
