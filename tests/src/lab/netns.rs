//! One network namespace: making and removing it, and running programs and closures inside.
//!
//! Programs enter by `nsenter --net`, which, unlike `ip netns exec`, leaves `/sys/fs/cgroup` visible, and carry a parent-death signal, so
//! that even a killed test leaves no program behind. Closures run on a thread of their own that enters the namespace and ends there.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::Folder;
use super::process::{self, Finished, Process};

const NAMESPACES: &str = "/run/netns";
/// Bound for commands that a test waits for.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// A network namespace of the lab.
#[derive(Debug, Clone)]
pub struct Netns {
    name: String,
    /// The last part of the name, for logs.
    short: String,
    folder: Arc<Folder>,
    /// What its programs see as /etc/hosts.
    hosts: Option<PathBuf>,
}

impl Netns {
    /// Makes the namespace `PREFIX` + `short`, with nothing in it but a loopback interface that is up.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn create(prefix: &str, short: &str, folder: &Arc<Folder>) -> Result<Self> {
        let name = format!("{prefix}{short}");
        process::run(command("ip", &["netns", "add", &name]), COMMAND_LIMIT)?.ok()?;
        let netns = Self {
            name,
            short: short.to_owned(),
            folder: Arc::clone(folder),
            hosts: None,
        };
        netns.run(&["ip", "link", "set", "lo", "up"])?.ok()?;
        Ok(netns)
    }

    /// The same namespace, whose programs see this file as `/etc/hosts`: by a bind mount in a mount namespace of each program's own.
    #[must_use]
    pub fn with_hosts(mut self, file: PathBuf) -> Self {
        self.hosts = Some(file);
        self
    }

    /// The same namespace, whose programs see the machine's files as they are.
    #[must_use]
    pub fn with_all_files(mut self) -> Self {
        self.hosts = None;
        self
    }

    /// Its name, as `ip netns` shows it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for it.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new(NAMESPACES).join(&self.name)
    }

    /// A command that will run in this namespace as root.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        self.enter_command(None, program)
    }

    /// A command that will run in this namespace as another user, with no group but the one of the same name.
    #[must_use]
    pub fn command_as(&self, user: &str, program: &str) -> Command {
        self.enter_command(Some(user), program)
    }

    /// Runs a program to its end, for at most [`COMMAND_LIMIT`].
    ///
    /// # Errors
    /// If it cannot be started, or runs for longer.
    pub fn run(&self, line: &[&str]) -> Result<Finished> {
        self.run_within(line, COMMAND_LIMIT)
    }

    /// Runs a program to its end, for at most `within`.
    ///
    /// # Errors
    /// If it cannot be started, or runs for longer.
    pub fn run_within(&self, line: &[&str], within: Duration) -> Result<Finished> {
        let (program, arguments) = line.split_first().context("an empty command line")?;
        let mut command = self.command(program);
        command.args(arguments);
        process::run(command, within)
    }

    /// Starts a program that goes on until stopped; its output goes to `logs/HOST-NAME.out` and `.log`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(&self, name: &str, command: Command) -> Result<Process> {
        Process::start(&format!("{}-{name}", self.short), command, &self.folder)
    }

    /// Runs a closure on a thread inside this namespace and gives its result: sockets that it opens stay there.
    ///
    /// # Errors
    /// If the namespace cannot be entered, or the closure fails or panics.
    pub fn enter<T: Send + 'static>(&self, body: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        let path = self.path();
        let thread = std::thread::spawn(move || {
            let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                .with_context(|| format!("entering {}", path.display()))?;
            body()
        });
        thread.join().map_err(|_| anyhow!("a thread in namespace {} panicked", self.name))?
    }

    /// Sets a `net.*` sysctl, given by its path below `/proc/sys/net`.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set(&self, path: &str, value: &str) -> Result<()> {
        let (path, value) = (format!("/proc/sys/net/{path}"), value.to_owned());
        self.enter(move || std::fs::write(&path, value).with_context(|| format!("writing {path}")))
    }

    /// Loads nftables commands, as from a file.
    ///
    /// # Errors
    /// If `nft` refuses them.
    pub fn nft(&self, script: &str) -> Result<()> {
        self.run(&["nft", script])?.ok()?;
        Ok(())
    }

    fn enter_command(&self, user: Option<&str>, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg("--");
        if let Some(hosts) = &self.hosts {
            let script = "mount --bind \"$0\" /etc/hosts && exec \"$@\"";
            command.args(["unshare", "--mount", "--propagation", "slave", "--", "sh", "-c", script]);
            command.arg(hosts);
        }
        command.arg("setpriv");
        if !self.folder.keep() {
            command.args(["--pdeathsig", "KILL"]);
        }
        if let Some(user) = user {
            command.args(["--reuid", user, "--regid", user, "--clear-groups"]);
        } else if self.folder.keep() {
            // setpriv wants at least one thing to do.
            command.args(["--pdeathsig", "keep"]);
        }
        command.args(["--", program]).current_dir("/");
        command
    }
}

/// The names of all network namespaces.
///
/// # Errors
/// If the folder of namespaces is there and cannot be read.
pub fn list() -> Result<Vec<String>> {
    match std::fs::read_dir(NAMESPACES) {
        Ok(entries) => Ok(entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("reading {NAMESPACES}")),
    }
}

/// The inode by which the processes of a namespace are known.
///
/// # Errors
/// If there is no such namespace.
pub fn inode(name: &str) -> Result<u64> {
    let path = Path::new(NAMESPACES).join(name);
    Ok(std::fs::metadata(&path)
        .with_context(|| format!("looking at {}", path.display()))?
        .ino())
}

/// Removes a namespace, unless it is gone already.
///
/// # Errors
/// If `ip netns` cannot.
pub fn delete(name: &str) -> Result<()> {
    let deleted = process::run(command("ip", &["netns", "delete", name]), COMMAND_LIMIT)?;
    if Path::new(NAMESPACES).join(name).exists() {
        deleted.ok()?;
    }
    Ok(())
}

fn command(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments);
    command
}
