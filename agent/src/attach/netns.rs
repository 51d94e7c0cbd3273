//! Namespaces named by a view: opened as the agent's configuration allows, told apart from the host's own, and watched: a path at which
//! another namespace stands, or none, is no longer the place that was attached.

use std::path::Path;

use super::{Accepted, Place, Unenforced};
use crate::sys::netns::{NetNs, NetNsId};

/// Opens the namespace at `path`; `home` is the host's own.
///
/// # Errors
/// [`Unenforced`].
pub fn open(path: &Path, accepted: &Accepted, home: NetNsId) -> Result<NetNs, Unenforced> {
    let namespace = NetNs::open(path, &accepted.netns_dirs)?;
    if namespace.id() == home {
        return Err(Unenforced::OwnNamespace(Place::Netns(path.into())));
    }
    Ok(namespace)
}

/// Whether the namespace `id`, which is held open, still stands at `path`.
#[must_use]
pub fn is_at(path: &Path, accepted: &Accepted, id: NetNsId) -> bool {
    NetNs::open(path, &accepted.netns_dirs).is_ok_and(|found| found.id() == id)
}
