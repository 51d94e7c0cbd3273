//! Containers: the namespace of a container that a runtime runs now, found by the runtime's socket, and watched.

use cloison_proto::policy::{ContainerMatch, Engine};

use super::nudge::Nudge;
use super::{Accepted, Unenforced};
use crate::sys::netns::{NetNs, NetNsId};

/// Why a container's namespace cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// Containers are not built yet.
    #[error("this version of the agent cannot enforce `container` attachments")]
    NotBuilt,
}

/// A container's network namespace.
#[derive(Debug)]
pub struct Sandbox {
    /// The namespace.
    pub namespace: NetNs,
    /// Who it is, for people: its id, its first process.
    pub shown: String,
}

/// The containers of this host, as far as views ask for them.
#[derive(Debug)]
pub struct Containers {}

impl Containers {
    /// Watches the runtimes that `accepted` names; `nudge` is given whenever a container comes or goes.
    #[must_use]
    pub fn new(_accepted: &Accepted, _nudge: Nudge) -> Self {
        Self {}
    }

    /// The namespace of the container that runs now.
    ///
    /// # Errors
    /// [`Unenforced`]: none runs, several do, or the runtime cannot be asked.
    pub fn open(&mut self, _engine: Engine, _which: &ContainerMatch) -> Result<Sandbox, Unenforced> {
        Err(ContainerError::NotBuilt.into())
    }

    /// Whether the container whose namespace `id` is held still is the one that runs.
    pub fn is_there(&mut self, _engine: Engine, _which: &ContainerMatch, _id: NetNsId) -> bool {
        false
    }
}
