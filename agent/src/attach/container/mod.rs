//! Containers: the network namespace of a container that a runtime runs now, found by the runtime's socket, and watched.
//!
//! A match of a view goes: [`watch`] keeps an answer for it, by the runtime's events and by the ends of processes; [`look`] makes the answer
//! out of what the runtime says over its [`api`]; [`found`] opens the namespace. The data plane asks for answers alone, which takes no more than
//! a lock and one system call, and is nudged when one changes. No runtime is spoken to before a view names one of its containers.
//!
//! Nothing is ever changed at a runtime, and nothing in a container: it needs no capability, no device and no network.

pub mod api;
pub mod found;
pub mod look;
pub mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use cloison_proto::policy::{ContainerMatch, Engine};

use super::nudge::Nudge;
use super::{Accepted, Unenforced};
use crate::sys::netns::{NetNs, NetNsId};
use found::Found;
use watch::{Answer, Watch};

/// Why a container's namespace cannot be had.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ContainerError {
    /// The runtime is not there.
    #[error(
        "{socket} does not exist: {engine} does not run, or listens elsewhere; start it, or set `{engine}_socket` in the agent's configuration"
    )]
    NoSocket {
        /// The runtime.
        engine: Engine,
        /// Where it should listen.
        socket: PathBuf,
    },
    /// The runtime is there, and does not do what it should.
    #[error("{engine} does not answer at {socket}: {why}; see whether its service runs, and whether the agent may use the socket")]
    Silent {
        /// The runtime.
        engine: Engine,
        /// Where it should listen.
        socket: PathBuf,
        /// What happened.
        why: String,
    },
    /// No container.
    #[error("{engine} has no running container {which}; it is attached as soon as it starts")]
    NoneRuns {
        /// The runtime.
        engine: Engine,
        /// Which was looked for.
        which: ContainerMatch,
    },
    /// More than one container.
    #[error("{engine} runs several containers with {which}: {}; a component is one container on each host, so stop the others or label them otherwise", names.join(", "))]
    SeveralRun {
        /// The runtime.
        engine: Engine,
        /// Which was looked for.
        which: ContainerMatch,
        /// Their names.
        names: Vec<String>,
    },
    /// The container shares the host's namespace.
    #[error(
        "{0} uses the host's network namespace; start it with one of its own (`--network none`), or attach the component by `unit`, `user` or `cgroup`"
    )]
    HostNetwork(String),
    /// It ended while it was looked at.
    #[error("{0} has just ended; it is attached as soon as it starts")]
    Ended(String),
    /// File and process disagree.
    #[error(
        "{container}: {file} is not the network namespace of its first process; a component needs a container that stays in the namespace that its runtime made"
    )]
    Disagree {
        /// Which container.
        container: String,
        /// What the runtime calls its namespace.
        file: PathBuf,
    },
    /// There is no way to the namespace.
    #[error(
        "{0}: its runtime keeps no file for its network namespace that can be seen from here, and the agent may not look at its processes; give the agent CAP_SYS_PTRACE (see systemd.md), or a container that owns its network namespace"
    )]
    Hidden(String),
    /// The process that the runtime names is in none of the container's cgroups.
    #[error("{0}: the process that its runtime names is in no cgroup of it; start it again, and not with `--cgroups=disabled`")]
    Foreign(String),
    /// The first process cannot be held.
    #[error("cannot hold the first process of a container: {0}; see the limits of the agent's unit")]
    Process(Arc<io::Error>),
    /// The watch cannot begin.
    #[error("cannot watch a container runtime: {0}; see the limits of the agent's unit")]
    Watch(Arc<io::Error>),
}

/// A container's network namespace.
#[derive(Debug)]
pub struct Sandbox {
    /// The namespace.
    pub namespace: NetNs,
    /// Who it is, for people: its name and id, its first process.
    pub shown: String,
}

/// The containers of this host, as far as views ask for them.
#[derive(Debug)]
pub struct Containers {
    accepted: Accepted,
    nudge: Nudge,
    watches: BTreeMap<Engine, Watch>,
    /// Whose namespaces were opened last.
    opened: BTreeMap<(Engine, ContainerMatch), (Arc<Found>, NetNsId)>,
}

impl Containers {
    /// Knows where the runtimes are that `accepted` names; `nudge` is given whenever a container that somebody asked for comes or goes.
    #[must_use]
    pub fn new(accepted: &Accepted, nudge: Nudge) -> Self {
        Self {
            accepted: accepted.clone(),
            nudge,
            watches: BTreeMap::new(),
            opened: BTreeMap::new(),
        }
    }

    /// Watches these containers from now on, and no others: a runtime of which none is wanted is left alone.
    pub fn watch_only(&mut self, wanted: &BTreeSet<(Engine, &ContainerMatch)>) {
        self.opened.retain(|(engine, which), _| wanted.contains(&(*engine, which)));
        self.watches.retain(|engine, _| wanted.iter().any(|(wanted, _)| wanted == engine));
        let engines: BTreeSet<Engine> = wanted.iter().map(|(engine, _)| *engine).collect();
        for engine in engines {
            let of_it = wanted.iter().filter(|(wanted, _)| *wanted == engine);
            // What cannot begin says so when a namespace is asked for.
            if let Ok(watch) = self.watch(engine) {
                watch.ask_for(&of_it.map(|(_, which)| *which).collect());
            }
        }
    }

    /// The namespace of the container that runs now. Waits for the runtime at the first time only, for two seconds at most.
    ///
    /// # Errors
    /// [`Unenforced`]: none runs, several do, or the runtime cannot be asked.
    pub fn open(&mut self, engine: Engine, which: &ContainerMatch) -> Result<Sandbox, Unenforced> {
        let found = self.watch(engine)?.answer(which)?;
        let namespace = found.namespace()?;
        let shown = found.shown();
        self.opened.insert((engine, which.clone()), (found, namespace.id()));
        Ok(Sandbox { namespace, shown })
    }

    /// Whether the container whose namespace `id` was [opened](Self::open) and is held still is the one that runs. Costs a lock and a system
    /// call.
    pub fn is_there(&mut self, engine: Engine, which: &ContainerMatch, id: NetNsId) -> bool {
        let current: Option<Answer> = self.watches.get(&engine).map(|watch| watch.answer(which));
        let opened = self.opened.get(&(engine, which.clone()));
        let (Some(Ok(current)), Some((found, opened))) = (current, opened) else {
            return false;
        };
        *opened == id && Arc::ptr_eq(&current, found) && !found.process().has_ended()
    }

    fn watch(&mut self, engine: Engine) -> Result<&Watch, ContainerError> {
        let socket = match engine {
            Engine::Docker => &self.accepted.docker_socket,
            Engine::Podman => &self.accepted.podman_socket,
        };
        match self.watches.entry(engine) {
            std::collections::btree_map::Entry::Occupied(known) => Ok(known.into_mut()),
            std::collections::btree_map::Entry::Vacant(empty) => {
                let watch = Watch::start(engine, socket, self.nudge.clone()).map_err(|e| ContainerError::Watch(Arc::new(e)))?;
                Ok(empty.insert(watch))
            }
        }
    }
}
