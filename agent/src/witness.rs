//! The second check of whose a socket is, behind the kernel's own: asks sock_diag when a TCP stream begins on the host's TUN, and when a
//! datagram arrives for a component that is a user's.
//!
//! Per batch: owners in force, which tell whether there is anything to ask. Per packet: address -> the component that owns it; socket -> user
//! and cgroup -> the component that owns those. If they differ, or a stream has no socket, the engine drops the packet as `not_owner`. Whether
//! the base table still says what was loaded is looked at in each batch, because datagrams are its business alone.
//!
//! What it does not do: look at the TUNs of containers and namespaces, where the source address alone decides, at UDP and ICMP on their way
//! out, and at UDP for a cgroup's component, which are all the base table's. Between the answer and the delivery of a first packet another
//! process may take the listener's place; the base table has no such gap for cgroups.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwapOption;
use cloison_agent_core::TunId;
use cloison_agent_core::packet::{Parsed, Transport};
use cloison_agent_core::witness::Witness;
use cloison_proto::label::ComponentName;

use crate::attach::owners::{Owners, Shared};
use crate::netlink::NetlinkError;
use crate::netlink::monitor::RulesMonitor;
use crate::netlink::nftables::{Nftables, Rules};
use crate::netlink::sock_diag::{Found, Kind, SockDiag, State};
use crate::sys::with_causes;

/// The host's TUN: its number, and the index of its interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostTun {
    /// Its number among the TUNs.
    pub id: TunId,
    /// Its interface.
    pub interface: u32,
}

/// What all witnesses of a host go by, and what they tell.
#[derive(Debug, Default)]
pub struct Sockets {
    owners: Shared,
    /// Where the addresses of all owners are.
    pub tun: ArcSwapOption<HostTun>,
    /// The kernel cannot be asked about sockets.
    blind: AtomicBool,
    /// Questions that the kernel did not answer.
    unanswered: AtomicU64,
}

impl Sockets {
    /// Those that belong to `owners`.
    #[must_use]
    pub fn new(owners: Shared) -> Self {
        Self { owners, ..Self::default() }
    }

    /// Whose addresses and sockets are.
    #[must_use]
    pub fn owners(&self) -> Arc<Owners> {
        self.owners.load_full()
    }

    /// Whether there are claims and the kernel cannot be asked about sockets: what it enforces by itself is enforced, and components that
    /// are a user's receive nothing.
    #[must_use]
    pub fn is_blind(&self) -> bool {
        self.blind.load(Ordering::Relaxed)
    }

    /// Questions that the kernel did not answer; what they were about was dropped.
    #[must_use]
    pub fn unanswered(&self) -> u64 {
        self.unanswered.load(Ordering::Relaxed)
    }
}

/// One packet worker's witness.
pub struct HostWitness {
    sockets: Arc<Sockets>,
    /// The owners of this batch, and what follows from them.
    owners: Arc<Owners>,
    has_claims: bool,
    by_user: HashSet<IpAddr>,
    tun: Option<HostTun>,
    /// In the namespace of this worker, from the first claim on.
    diag: Option<SockDiag>,
    /// The base table, by which all is decided that is not asked about here.
    table: Option<Table>,
    /// Whether it was said that the table cannot be looked at.
    is_warned: bool,
}

/// Which rules the base table has, as of the last batch. Whoever follows the cgroups looks, too, and has it loaded again; but a thread that
/// has to be woken leaves datagrams the time to pass.
struct Table {
    news: RulesMonitor,
    nftables: Nftables,
    /// `None` if nobody can say.
    rules: Option<Rules>,
}

impl Table {
    fn open(name: &str) -> io::Result<Self> {
        Ok(Self {
            news: RulesMonitor::open()?,
            nftables: Nftables::open(name).map_err(io::Error::other)?,
            rules: None,
        })
    }

    /// Looks again if nftables changed, or could not be asked.
    fn look(&mut self) {
        if self.news.look() || self.rules.is_none() {
            self.rules = self.nftables.rules().ok();
        }
    }
}

impl HostWitness {
    /// A witness for a worker in the host's own namespace.
    #[must_use]
    pub fn new(sockets: Arc<Sockets>) -> Self {
        Self {
            sockets,
            owners: Arc::default(),
            has_claims: false,
            by_user: HashSet::new(),
            tun: None,
            diag: None,
            table: None,
            is_warned: false,
        }
    }

    /// Takes up other owners.
    fn follow(&mut self, owners: Arc<Owners>) {
        self.has_claims = owners.has_claims();
        let users: HashSet<&ComponentName> = owners.users.values().collect();
        let of_users = owners.addresses.iter().filter(|(_, component)| users.contains(component));
        self.by_user = of_users.map(|(address, _)| *address).collect();
        self.owners = owners;
        if self.has_claims && self.diag.is_none() {
            self.diag = open()
                .inspect_err(|error| tracing::warn!(error = with_causes(error), BLIND))
                .ok()
                .flatten();
        }
        self.sockets.blind.store(self.has_claims && self.diag.is_none(), Ordering::Relaxed);
    }

    /// Looks at the base table that the owners go by, if they go by one.
    fn look_at_table(&mut self) {
        let Some((name, _)) = self.owners.table.as_ref() else { return };
        if self.table.is_none() {
            match Table::open(name) {
                Ok(table) => self.table = Some(table),
                Err(error) if !self.is_warned => {
                    self.is_warned = true;
                    tracing::warn!(%error, "the base table cannot be looked at: nothing passes this host's TUN until it can");
                }
                Err(_) => {}
            }
        }
        self.table.iter_mut().for_each(Table::look);
    }

    /// Whether `found` is a socket of the component that has `address`.
    fn is_owners(&self, found: Found, owner: &ComponentName) -> bool {
        self.owners.of_socket(found.user, found.cgroup) == Some(owner)
    }

    fn find(&mut self, kind: Kind, local: SocketAddr, remote: SocketAddr) -> Result<Option<Found>, Unknown> {
        let (Some(diag), Some(tun)) = (&mut self.diag, self.tun) else {
            return Err(Unknown);
        };
        diag.find(kind, local, remote, tun.interface).map_err(|_| {
            self.sockets.unanswered.fetch_add(1, Ordering::Relaxed);
            Unknown
        })
    }

    /// The socket that a packet from `remote` opens: not the rest of an older stream with the same ends, which the kernel passes over.
    fn find_receiver(&mut self, kind: Kind, local: SocketAddr, remote: SocketAddr) -> Result<Option<Found>, Unknown> {
        match self.find(kind, local, remote)? {
            Some(found) if kind == Kind::Tcp && found.inode == 0 && found.state != State::LISTEN => {
                let anybody: IpAddr = if local.is_ipv4() {
                    Ipv4Addr::UNSPECIFIED.into()
                } else {
                    Ipv6Addr::UNSPECIFIED.into()
                };
                self.find(kind, local, (anybody, 0).into())
            }
            found => Ok(found),
        }
    }
}

/// Nobody can say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Unknown;

const BLIND: &str = "this kernel does not tell whose sockets are: components that are a user's receive nothing, nor does a `host` component beside them by UDP";

fn open() -> Result<Option<SockDiag>, NetlinkError> {
    let mut diag = SockDiag::open()?;
    let works = diag.works()?;
    if !works {
        tracing::warn!(BLIND);
    }
    Ok(works.then_some(diag))
}

impl Witness for HostWitness {
    fn begin(&mut self) -> bool {
        let owners = self.sockets.owners.load();
        if !Arc::ptr_eq(&owners, &self.owners) {
            let owners = Arc::clone(&owners);
            self.follow(owners);
        }
        if self.has_claims {
            self.tun = self.sockets.tun.load().as_deref().copied();
            self.look_at_table();
        }
        self.has_claims
    }

    fn is_open(&self, tun: TunId) -> bool {
        // A table that nobody can look at is taken for gone.
        let is_as_loaded = |(_, rules): &(Box<str>, Rules)| {
            let found = self.table.as_ref().and_then(|table| table.rules.as_ref());
            !rules.is_empty() && found == Some(rules)
        };
        let is_gone = self.owners.closed || !self.owners.table.as_ref().is_none_or(is_as_loaded);
        !is_gone || self.tun.is_some_and(|host| host.id != tun)
    }

    fn is_senders(&mut self, tun: TunId, packet: &Parsed) -> bool {
        let owners = self.owners.clone();
        let Some(owner) = owners.of_address(packet.src) else {
            return self.tun.is_some_and(|host| host.id != tun);
        };
        if self.diag.is_none() {
            return true;
        }
        let (kind, local, remote) = ends(packet);
        let found = self.find(kind, local, remote);
        found.is_ok_and(|found| found.is_some_and(|found| self.is_owners(found, owner)))
    }

    fn is_receivers(&mut self, tun: TunId, packet: &Parsed) -> bool {
        let owners = self.owners.clone();
        let Some(owner) = owners.of_address(packet.dst) else {
            return self.tun.is_some_and(|host| host.id != tun);
        };
        // A user's socket that listens on all addresses hears the rest's datagrams, too: nftables knows no users of those who hear.
        let is_beside_users = !owners.users.is_empty() && owners.host.as_ref() == Some(owner);
        let is_users = self.by_user.contains(&packet.dst) || is_beside_users && matches!(packet.transport, Transport::Udp { .. });
        if !is_users && (self.diag.is_none() || matches!(packet.transport, Transport::Udp { .. })) {
            return true;
        }
        let (kind, remote, local) = ends(packet);
        let found = self.find_receiver(kind, local, remote);
        found.is_ok_and(|found| found.is_none_or(|found| self.is_owners(found, owner)))
    }
}

/// What kind of socket a packet is for, its source and its destination.
fn ends(packet: &Parsed) -> (Kind, SocketAddr, SocketAddr) {
    let (from, to) = packet.ports();
    let kind = if matches!(packet.transport, Transport::Udp { .. }) {
        Kind::Udp
    } else {
        Kind::Tcp
    };
    (kind, (packet.src, from).into(), (packet.dst, to).into())
}
