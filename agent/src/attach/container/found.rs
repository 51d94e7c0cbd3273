//! A container that runs: which one it is, its first process, and from these its network namespace.
//!
//! A container is known by its id, and by its first process, which is held by a descriptor: a restart is another process and another
//! namespace, even if the kernel gives the same numbers again. The namespace is opened by the file that the runtime keeps for it, where there is
//! one: that takes CAP_SYS_ADMIN alone. To look at another's process takes CAP_SYS_PTRACE, too; where the agent has that, both ways must lead
//! to one namespace, and a container without such a file has the other way only. Then its process must be in its cgroup.

use std::path::PathBuf;
use std::sync::Arc;

use cloison_proto::policy::Engine;

use super::ContainerError;
use super::api::{ContainerId, Inspected};
use crate::attach::Unenforced;
use crate::sys::netns::{NetNs, NetNsError};
use crate::sys::process::Process;

/// A container that ran when it was looked at.
#[derive(Debug)]
pub struct Found {
    engine: Engine,
    id: ContainerId,
    name: String,
    started_at: String,
    uses_host: bool,
    sandbox: PathBuf,
    process: Arc<Process>,
}

impl Found {
    /// The container that a runtime described, if its process is there. It is only what it seems to be if the runtime says the
    /// [same](Self::is) again behind this.
    ///
    /// # Errors
    /// ESRCH: the process is not there; EMFILE.
    pub fn new(engine: Engine, told: &Inspected) -> std::io::Result<Self> {
        let pid = rustix::process::Pid::from_raw(told.state.pid).filter(|_| told.state.running && told.state.pid > 0);
        let process = Arc::new(Process::open(pid.ok_or(rustix::io::Errno::SRCH)?)?);
        Ok(Self {
            engine,
            id: told.id.clone(),
            name: told.plain_name().to_owned(),
            started_at: told.state.started_at.clone(),
            uses_host: told.host_config.network_mode == "host",
            sandbox: told.network_settings.sandbox_key.clone(),
            process,
        })
    }

    /// Whether a runtime describes this very container, in this very run of it.
    #[must_use]
    pub fn is(&self, told: &Inspected) -> bool {
        told.state.running
            && told.state.pid == self.process.pid().as_raw_nonzero().get()
            && (&self.id, &self.started_at) == (&told.id, &told.state.started_at)
            && (self.name.as_str(), &self.sandbox) == (told.plain_name(), &told.network_settings.sandbox_key)
            && self.uses_host == (told.host_config.network_mode == "host")
    }

    /// Its first process.
    #[must_use]
    pub const fn process(&self) -> &Arc<Process> {
        &self.process
    }

    /// Who it is, for people.
    #[must_use]
    pub fn shown(&self) -> String {
        let pid = self.process.pid().as_raw_nonzero();
        format!("{} container {} ({}), pid {pid}", self.engine, self.name, self.id.short())
    }

    /// Its network namespace, which is its own.
    ///
    /// # Errors
    /// [`Unenforced`].
    pub fn namespace(&self) -> Result<NetNs, Unenforced> {
        let container = || format!("{} container {}", self.engine, self.name);
        if self.uses_host {
            return Err(ContainerError::HostNetwork(container()).into());
        }
        let by_file = self.by_file()?;
        let namespace = match (by_file, NetNs::of_process(&self.process)) {
            (_, Err(NetNsError::Ended(_))) => return Err(ContainerError::Ended(container()).into()),
            (Some(by_file), Ok(by_process)) if by_file.id() != by_process.id() => {
                let (container, file) = (container(), self.sandbox.clone());
                return Err(ContainerError::Disagree { container, file }.into());
            }
            (None, Err(NetNsError::Hidden(..))) => return Err(ContainerError::Hidden(container()).into()),
            (None, Ok(_)) if !self.is_in_its_cgroup() => return Err(ContainerError::Foreign(container()).into()),
            (Some(by_file), _) => by_file,
            (None, by_process) => by_process?,
        };
        // The file was that of the run which was looked at only if that run goes on.
        if self.process.has_ended() {
            return Err(ContainerError::Ended(container()).into());
        }
        if namespace.id() == NetNs::current()?.id() {
            return Err(ContainerError::HostNetwork(container()).into());
        }
        Ok(namespace)
    }

    /// By the runtime's file, if there is one that can be seen from here.
    fn by_file(&self) -> Result<Option<NetNs>, NetNsError> {
        let Some(folder) = self.sandbox.parent().filter(|_| self.sandbox.is_absolute()) else {
            return Ok(None);
        };
        match NetNs::open(&self.sandbox, &[folder.into()]) {
            Ok(namespace) => Ok(Some(namespace)),
            // Another mount namespace: the file is there, and what is mounted on it is not.
            Err(NetNsError::Missing(_) | NetNsError::NotNamespace(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether the process is in a cgroup of the container, all of which have its id in their names. That a number was another's before the
    /// runtime knew of an end is seen here, where no file of the runtime's would show it.
    fn is_in_its_cgroup(&self) -> bool {
        let cgroups = std::fs::read_to_string(format!("/proc/{}/cgroup", self.process.pid().as_raw_nonzero()));
        cgroups.is_ok_and(|cgroups| cgroups.contains(self.id.as_str()))
    }
}

impl Inspected {
    /// The container's name without the slash before it.
    #[must_use]
    pub fn plain_name(&self) -> &str {
        self.name.strip_prefix('/').unwrap_or(&self.name)
    }
}
