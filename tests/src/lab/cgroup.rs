//! Cgroups (v2) of a lab's host: what systemd would make for a service, made by hand. A program that enters one before it begins is that
//! service's, as far as the kernel and an agent can tell.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::host::Host;
use super::netns::Netns;

/// A cgroup. It is removed with its lab, and at the start of the next one of the same name.
#[derive(Debug, Clone)]
pub struct Cgroup {
    net: Netns,
    place: PathBuf,
    path: String,
}

impl Cgroup {
    /// Makes a cgroup on a host.
    ///
    /// # Errors
    /// If version 2 is not mounted.
    pub fn create(host: &Host, name: &str) -> Result<Self> {
        let path = format!("/{}.{name}", host.net().name());
        let place = root()?.join(path.trim_start_matches('/'));
        std::fs::create_dir_all(&place).with_context(|| format!("making {}", place.display()))?;
        let net = host.net().clone();
        Ok(Self { net, place, path })
    }

    /// Its path, as a policy names it.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// A command that will run in it, on its host, as root.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = self.net.command("sh");
        command.args(["-c", "echo $$ >\"$0/cgroup.procs\" && exec \"$@\""]);
        command.arg(&self.place).arg(program);
        command
    }

    /// Removes it; nothing may be left in it.
    ///
    /// # Errors
    /// If something is.
    pub fn remove(self) -> Result<()> {
        std::fs::remove_dir(&self.place).with_context(|| format!("removing {}", self.place.display()))
    }
}

/// Where cgroups of version 2 are.
fn root() -> Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let of_version_2 = mounts.lines().filter(|line| line.contains(" - cgroup2 "));
    let mut places = of_version_2.filter_map(|line| line.split(' ').nth(4));
    places.next().map(PathBuf::from).context("cgroups of version 2 are not mounted")
}
