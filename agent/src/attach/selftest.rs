//! Whether this kernel keeps users and cgroups apart, tried out before anything relies on it: an owner sends, and one who is not sends.
//!
//! The trial has a table of its own, which concerns nothing but datagrams to one port of this host's loopback: with the element that names us,
//! what we send has to arrive, at the sending and at the receiving side; with the element of somebody else, it must not. What a kernel, a
//! `nft` and their versions can do together shows by that, and by no list of versions.

use std::fmt::Write as _;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use parking_lot::Mutex;
use socket2::SockRef;

use super::base_table::{BaseTableError, TableName, run_nft};
use super::cgroups::{Cgroup, Tree};
use super::claim_table::TRIAL;
use crate::netlink::NetlinkError;
use crate::netlink::nftables::{Change, Key, Nftables, Operation};
use crate::sys::netns::{NetNs, NetNsError};

/// How long a datagram that may not arrive is waited for: loopback takes microseconds.
const WAIT: Duration = Duration::from_millis(30);

/// Why something cannot be relied on.
#[derive(Debug, thiserror::Error)]
pub enum TrialError {
    /// A datagram of the owner was refused.
    #[error("what the owner sends is refused")]
    OwnerRefused,
    /// A datagram of somebody else passed.
    #[error("what somebody else sends passes")]
    OtherPassed,
    /// The trial could not be made.
    #[error("it cannot be tried out: {0}")]
    Impossible(String),
}

/// What is tried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Subject {
    Users,
    /// Cgroups, by the id and the level of our own.
    Cgroups(u64, u8),
}

/// Where trials take place.
#[derive(Debug)]
pub struct Trial {
    namespace: NetNs,
    table: TableName,
}

impl Trial {
    /// Trials in this namespace, beside the base table of that name.
    #[must_use]
    pub const fn new(namespace: NetNs, table: TableName) -> Self {
        Self { namespace, table }
    }

    /// Whether a socket's user is known when it sends.
    ///
    /// # Errors
    /// [`TrialError`].
    pub fn of_users(&self) -> Result<(), TrialError> {
        self.run(Subject::Users, || Ok(()))
    }

    /// Whether a socket's cgroup is known when it sends and when it receives.
    ///
    /// # Errors
    /// [`TrialError`].
    pub fn of_cgroups(&self, tree: &Tree) -> Result<(), TrialError> {
        // A process is in one cgroup at a time, whoever of it tries something out.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _turn = ONE_AT_A_TIME.lock();
        let own = tree.own().map_err(|e| impossible("our own cgroup is not found", &e))?;
        if own.level > 0 {
            return self.run(Subject::Cgroups(own.id, own.level), || Ok(()));
        }
        // The root is no cgroup that a set could name: for a moment we are elsewhere.
        let guest = Guest::enter(tree).map_err(|e| impossible("no cgroup can be made", &e))?;
        self.run(Subject::Cgroups(guest.cgroup.id, guest.cgroup.level), || guest.leave())
    }

    /// Loads the table of the trial, opens the sockets, and compares.
    fn run(&self, subject: Subject, leave: impl FnOnce() -> io::Result<()> + Send) -> Result<(), TrialError> {
        let tried = self.namespace.run(|| {
            let sockets = Sockets::open();
            leave().map_err(|e| impossible("the cgroup of the trial stays", &e))?;
            let sockets = sockets.map_err(|e| impossible("loopback cannot be used", &e))?;
            let result = self.compare(subject, &sockets);
            let removed = self.nft(&format!("delete table inet {}_trial\n", self.table));
            result.and(removed)
        });
        tried.map_err(|e: NetNsError| impossible("the namespace cannot be entered", &e))?
    }

    fn compare(&self, subject: Subject, sockets: &Sockets) -> Result<(), TrialError> {
        self.nft(&self.text(subject, sockets.to.port(), true))?;
        self.name(subject, Operation::Add)?;
        if !sockets.pass() {
            return Err(TrialError::OwnerRefused);
        }
        self.name(subject, Operation::Remove)?;
        self.nft(&self.text(subject, sockets.to.port(), false))?;
        if sockets.pass() {
            return Err(TrialError::OtherPassed);
        }
        Ok(())
    }

    /// The table: with us as the owner, or with somebody else.
    fn text(&self, subject: Subject, port: u16, ours: bool) -> String {
        let name = &self.table;
        let us = rustix::process::geteuid().as_raw();
        let mut text = format!("table inet {name}_trial\ndelete table inet {name}_trial\ntable inet {name}_trial {{\n");
        let (speaks, hears) = match subject {
            Subject::Users => {
                let user = if ours { us } else { us.wrapping_add(1) };
                (format!("meta skuid {user} ip saddr 127.0.0.1"), "udp dport != 0".to_owned())
            }
            Subject::Cgroups(_, level) => {
                let cgroup = format!("socket cgroupv2 level {level}");
                let _ = writeln!(text, "  set own {{ typeof {cgroup} . ip saddr; }}");
                (format!("{cgroup} . ip saddr @own"), format!("{cgroup} . ip daddr @own"))
            }
        };
        for (hook, owner) in [("output", speaks), ("input", hears)] {
            let _ = writeln!(
                text,
                "  chain {hook} {{\n    type filter hook {hook} priority 0; policy accept;\n    ip daddr != 127.0.0.1 accept\n    udp dport != {port} accept\n    {owner} accept\n    drop\n  }}"
            );
        }
        text + "}\n"
    }

    /// Puts us into the set of the trial, or takes us out: whoever is in there then is somebody else.
    fn name(&self, subject: Subject, operation: Operation) -> Result<(), TrialError> {
        let Subject::Cgroups(id, _) = subject else { return Ok(()) };
        let change = Change {
            operation,
            set: "own".into(),
            key: Key::CgroupAt(id, Ipv4Addr::LOCALHOST.into()),
        };
        Nftables::open(&format!("{}_trial", self.table))
            .and_then(|mut nftables| nftables.change(&[change]))
            .map_err(|e: NetlinkError| impossible("a set cannot be filled", &e))
    }

    fn nft(&self, text: &str) -> Result<(), TrialError> {
        let loaded = run_nft(&self.table, &["-f", "-"], text);
        loaded.map(drop).map_err(|e: BaseTableError| TrialError::Impossible(e.to_string()))
    }
}

fn impossible(what: &str, error: &dyn std::error::Error) -> TrialError {
    TrialError::Impossible(format!("{what}: {}", crate::sys::with_causes(error)))
}

/// Two sockets on loopback.
struct Sockets {
    from: UdpSocket,
    at: UdpSocket,
    to: SocketAddr,
}

impl Sockets {
    fn open() -> io::Result<Self> {
        let (from, at) = (
            UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?,
            UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?,
        );
        at.set_read_timeout(Some(WAIT))?;
        SockRef::from(&from).set_mark(TRIAL)?;
        let to = at.local_addr()?;
        Ok(Self { from, at, to })
    }

    /// Whether a datagram arrives.
    fn pass(&self) -> bool {
        // A refusal at the sending side is an error of this very call.
        self.from.send_to(b"?", self.to).is_ok() && self.at.recv(&mut [0; 1]).is_ok()
    }
}

/// How often a cgroup is emptied before it stays.
const ATTEMPTS: usize = 20;

/// A cgroup that this process is in for a moment.
struct Guest {
    cgroup: Cgroup,
    place: PathBuf,
    root: PathBuf,
}

impl Guest {
    fn enter(tree: &Tree) -> io::Result<Self> {
        let path = format!("/cloison-trial-{}", std::process::id());
        let (root, place) = (tree.place(""), tree.place(&path));
        std::fs::create_dir(&place)?;
        join(&place).inspect_err(|_| drop(std::fs::remove_dir(&place)))?;
        let cgroup = tree.own()?;
        Ok(Self { cgroup, place, root })
    }

    fn leave(self) -> io::Result<()> {
        join(&self.root)?;
        let mut removed = std::fs::remove_dir(&self.place);
        for _ in 0..ATTEMPTS {
            if removed.as_ref().err().and_then(io::Error::raw_os_error) != Some(libc::EBUSY) {
                break;
            }
            // Programs that we started meanwhile were born there.
            for born in std::fs::read_to_string(self.place.join("cgroup.procs"))?.lines() {
                let _ended = std::fs::write(self.root.join("cgroup.procs"), born);
            }
            removed = std::fs::remove_dir(&self.place);
        }
        removed
    }
}

fn join(cgroup: &Path) -> io::Result<()> {
    std::fs::write(cgroup.join("cgroup.procs"), "0")
}
