//! The lab: machines in network namespaces on one wire, running the real programs.
//!
//! A [`Lab`] is built from a name and a list of hosts. Each host is a network namespace; a further one holds a bridge, the *wire*, to which
//! every host hangs by a veth pair named `eth0` on its side. Nothing gets an interface or an address outside these namespaces. Programs run
//! inside by `nsenter`, write to logs in the lab's own folder, and die with the test. [`Lab`] takes everything away when it is dropped; what
//! a killed run left behind is removed when a lab of the same name is built again.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use cloison_tests::lab::Lab;
//! let lab = Lab::builder("two-machines").host("app-1").host("db-1").build()?;
//! let db = lab.host("db-1")?;
//! lab.host("app-1")?.net().run(&["ping", "-c1", &db.v4()?.to_string()])?.ok()?;
//! lab.finish()
//! # }
//! ```
//!
//! Needs root, and says so instead of skipping. It does not build the programs: see [`programs`].

pub mod agent;
pub mod by_hand;
pub mod capture;
pub mod cgroup;
pub mod cleanup;
pub mod clock;
pub mod coordinator;
pub mod disk;
pub mod dns;
pub mod docker;
pub mod host;
pub mod manager;
pub mod mesh;
pub mod netns;
pub mod person;
pub mod postgres;
pub mod process;
pub mod programs;
pub mod shim;
pub mod sockets;
pub mod solo;
pub mod stall;
pub mod tool;
pub mod wire;
pub mod wireguard;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use cleanup::Claim;
use host::Host;
use wire::Wire;

/// MTU of the wire unless a test sets another.
pub const DEFAULT_MTU: u32 = 1500;
/// Lines of each log that are printed when a test fails.
const LOG_TAIL_LINES: usize = 60;
/// Set to anything, keeps the namespaces, the programs and the folder of every lab when it ends.
pub const KEEP_VARIABLE: &str = "CLOISON_LAB_KEEP";

/// Which address families the wire carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Underlay {
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
    /// Both.
    Both,
}

impl Underlay {
    /// Whether hosts have IPv4 addresses.
    #[must_use]
    pub fn has_v4(self) -> bool {
        self != Self::V6
    }

    /// Whether hosts have IPv6 addresses.
    #[must_use]
    pub fn has_v6(self) -> bool {
        self != Self::V4
    }
}

/// What a lab shall look like.
#[derive(Debug, Clone)]
pub struct LabBuilder {
    name: String,
    hosts: Vec<String>,
    underlay: Underlay,
    mtu: u32,
    keep: bool,
}

/// A running lab. See the module documentation.
#[derive(Debug)]
pub struct Lab {
    wire: Wire,
    hosts: Vec<Host>,
    folder: Arc<Folder>,
    finished: bool,
    /// Last, so that the name is given back after everything else is gone.
    claim: Claim,
}

/// The folder of a lab: state of its programs and their logs.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    keep: bool,
}

impl Lab {
    /// A lab of this name (lower-case letters, digits and `-`; unique among the tests, best the name of the test).
    #[must_use]
    pub fn builder(name: &str) -> LabBuilder {
        LabBuilder {
            name: name.to_owned(),
            hosts: Vec::new(),
            underlay: Underlay::Both,
            mtu: DEFAULT_MTU,
            keep: std::env::var_os(KEEP_VARIABLE).is_some(),
        }
    }

    /// The host of this name.
    ///
    /// # Errors
    /// If the lab has no such host.
    pub fn host(&self, name: &str) -> Result<&Host> {
        self.hosts
            .iter()
            .find(|h| h.name() == name)
            .with_context(|| format!("the lab has no host `{name}`"))
    }

    /// Ends a host as a power cut would, and boots it again: of its machine, nothing is left but the folder of its programs. They must have
    /// been killed before.
    ///
    /// # Errors
    /// If it does not come back.
    pub fn reboot(&self, host: &str) -> Result<()> {
        self.host(host)?.reboot(&self.wire).with_context(|| format!("rebooting {host}"))
    }

    /// All hosts, in the order in which they were named.
    #[must_use]
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The wire between the hosts.
    #[must_use]
    pub fn wire(&self) -> &Wire {
        &self.wire
    }

    /// The lab's own folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder.path
    }

    /// The lab's own folder, shared with what outlives a borrow of the lab.
    pub(crate) fn shared_folder(&self) -> &Arc<Folder> {
        &self.folder
    }

    /// The prefix that all namespaces of this lab carry.
    #[must_use]
    pub fn prefix(&self) -> &str {
        self.claim.prefix()
    }

    /// Ends a test that went well: nothing is printed, everything is removed.
    ///
    /// # Errors
    /// If something could not be removed.
    pub fn finish(mut self) -> Result<()> {
        self.finished = true;
        if self.folder.keep {
            return Ok(());
        }
        cleanup::end_cgroups(self.claim.prefix())?;
        cleanup::remove_namespaces(self.claim.prefix())
    }
}

impl LabBuilder {
    /// Adds a host (its name is that of its port on the wire too: at most 15 bytes).
    #[must_use]
    pub fn host(mut self, name: &str) -> Self {
        self.hosts.push(name.to_owned());
        self
    }

    /// Which address families the wire carries; both by default.
    #[must_use]
    pub fn underlay(mut self, underlay: Underlay) -> Self {
        self.underlay = underlay;
        self
    }

    /// MTU of the wire and of all hosts on it.
    #[must_use]
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = mtu;
        self
    }

    /// Leaves everything running when the lab, and even when this process, ends.
    #[must_use]
    pub fn keep(mut self, keep: bool) -> Self {
        self.keep = self.keep || keep;
        self
    }

    /// Builds it, after removing what an earlier lab of this name left behind.
    ///
    /// # Errors
    /// If this is not root, a tool is missing (`tests/scripts/setup.sh` installs them), or a lab of this name is running.
    pub fn build(self) -> Result<Lab> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "the lab makes network namespaces: run this as root"
        );
        let mut claim = Claim::take(&self.name)?;
        let path = claim.make_folder()?;
        let folder = Arc::new(Folder { path, keep: self.keep });
        let wire = Wire::build(claim.prefix(), &folder, self.underlay, self.mtu)?;
        let mut lab = Lab {
            wire,
            hosts: Vec::new(),
            folder,
            finished: false,
            claim,
        };
        for (position, name) in self.hosts.iter().enumerate() {
            let number = u8::try_from(position + 1).context("a lab has at most 250 hosts")?;
            let host = Host::build(lab.claim.prefix(), &lab.folder, &lab.wire, name, number)?;
            lab.hosts.push(host);
        }
        Ok(lab)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.finished && !cleanup::interrupted() {
            self.folder.print_logs(self.claim.prefix());
        }
        if self.folder.keep {
            eprintln!(
                "lab `{}` is kept; its files are in {}; `make clean-lab` removes it",
                self.claim.prefix(),
                self.folder.path.display()
            );
            self.claim.keep();
        } else if let Err(error) = cleanup::end_cgroups(self.claim.prefix()).and_then(|()| cleanup::remove_namespaces(self.claim.prefix()))
        {
            eprintln!("{error:#}");
        }
    }
}

impl Folder {
    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether programs outlive this process.
    #[must_use]
    pub fn keep(&self) -> bool {
        self.keep
    }

    /// A fresh path `logs/NAME`, numbered if taken.
    ///
    /// # Errors
    /// If the folder of logs cannot be made.
    pub fn log_path(&self, name: &str) -> Result<PathBuf> {
        let logs = self.path.join("logs");
        std::fs::create_dir_all(&logs).with_context(|| format!("making {}", logs.display()))?;
        for number in 1..10_000_u32 {
            let path = logs.join(if number == 1 { name.to_owned() } else { format!("{name}.{number}") });
            match std::fs::OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(_) => return Ok(path),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).with_context(|| format!("making {}", path.display())),
            }
        }
        bail!("too many logs named {name}")
    }

    fn print_logs(&self, prefix: &str) {
        let Ok(entries) = std::fs::read_dir(self.path.join("logs")) else {
            return;
        };
        let mut paths: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
        paths.sort();
        for path in paths {
            let text = String::from_utf8_lossy(&std::fs::read(&path).unwrap_or_default()).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            if lines.is_empty() {
                continue;
            }
            let skipped = lines.len().saturating_sub(LOG_TAIL_LINES);
            eprintln!(
                "--- {prefix}: {} ({skipped} earlier lines not shown)",
                path.file_name().unwrap_or_default().display()
            );
            for line in lines.iter().skip(skipped) {
                eprintln!("    {line}");
            }
        }
    }
}

/// Calls `check` every 20 ms until it gives a value, for at most `within`; `what` names what was waited for.
///
/// # Errors
/// If the time is over, or `check` fails.
pub fn wait_for<T>(what: &str, within: Duration, mut check: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = check()? {
            return Ok(value);
        }
        ensure!(start.elapsed() < within, "waited {within:?} in vain for: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The IPv4 address of host number `number` on the wire (RFC 5737).
pub(crate) fn wire_v4(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 51, 100, number)
}

/// The IPv6 address of host number `number` on the wire (RFC 3849).
fn wire_v6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 0xc1, 0, 0, 0, 0, u16::from(number))
}
