//! What `doctor` looks at, before anything is made of it.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use cloison_proto::label::ComponentName;
use cloison_proto::net::{PortSpec, Protocol};
use cloison_proto::policy::Attachment;
use cloison_proto::status::{PingOutcome, Status};

use super::path_mtu::Passes;
use crate::control::certificate::Window;

/// What was looked at. A text in place of a result says why there is none.
#[derive(Debug, Clone)]
pub struct Facts {
    /// What the running agent says of itself; or why there is no answer.
    pub agent: Result<Box<Status>, String>,
    /// Whether the TUN driver can be opened.
    pub tun: Result<(), String>,
    /// The configured port, and whether it is free; looked at while the agent does not run.
    pub port: (u16, Result<(), String>),
    /// How the host's base table is.
    pub table: Result<Table, String>,
    /// What the base table is called.
    pub table_name: String,
    /// Mesh time as well as it is known, and the wall clock, in seconds since 1970.
    pub clock: Option<(u64, u64)>,
    /// The state directory and what in it is open to others, or another user's.
    pub state_dir: (PathBuf, Result<Vec<Exposed>, String>),
    /// Whether the host is enrolled; `None` if that cannot be read.
    pub enrolled: Option<bool>,
    /// What on disk cannot be used, and keeps the agent from starting.
    pub unusable: Vec<Unusable>,
    /// What on disk cannot be used, and is fetched again.
    pub damaged: Vec<String>,
    /// The host's certificate.
    pub certificate: Result<Option<Window>, String>,
    /// What is left of the lease and how long it was, in seconds; `None` without one.
    pub lease: Option<(u64, u64)>,
    /// Coordinators by address: whether they answered, and showed that they are of this mesh.
    pub coordinators: Vec<(String, Result<(), String>)>,
    /// Handshakes with peers, by name.
    pub handshakes: Vec<(String, PingOutcome)>,
    /// Sizes that pass to peers.
    pub paths: Vec<PeerPath>,
    /// Overlay addresses on interfaces of others, with the interface; and a route of others into the overlay.
    pub foreign: Result<Foreign, String>,
    /// Settings of the kernel.
    pub kernel: Kernel,
    /// The hosts file: whether it is read and written, and how many blocks of other hosts are in it. `None` if there are to be no names.
    pub hosts: Option<(PathBuf, Result<usize, Unusable>)>,
    /// Ways to the components of this host.
    pub exposure: Exposure,
}

/// Ways to the components of this host, at ports that rules open.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Exposure {
    /// What rules open.
    pub offered: Vec<Offered>,
    /// What waits on such ports in the host's own namespace.
    pub listeners: Vec<Listener>,
    /// What Docker publishes of such components.
    pub published: Vec<Published>,
    /// The name of the TUN.
    pub interface: String,
}

/// What rules open at a component of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offered {
    /// The component.
    pub component: ComponentName,
    /// How its processes are known.
    pub attachment: Attachment,
    /// The number of the user, if it is a user who is known here.
    pub user: Option<u32>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// The ports.
    pub ports: Vec<PortSpec>,
    /// Whether loopback is guarded.
    pub guarded: bool,
}

/// A socket that waits for connections or datagrams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Where.
    pub at: SocketAddr,
    /// The number of the user who made it.
    pub user: u32,
    /// The path of the cgroup in which it was made, if that could be found.
    pub cgroup: Option<String>,
}

/// A port of a container that Docker publishes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// Whose it is.
    pub component: ComponentName,
    /// The container.
    pub container: String,
    /// Its port, as Docker writes it.
    pub port: String,
    /// Where it is to be had.
    pub at: SocketAddr,
}

/// How the base table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    /// As it was loaded.
    Whole,
    /// Somebody changed it.
    Altered,
    /// It is not there.
    Missing,
    /// There is no view yet that says what is in it.
    NotYet,
}

/// A file or directory that others can read or write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exposed {
    /// Which.
    pub path: PathBuf,
    /// Its mode.
    pub mode: u32,
    /// Its owner, if that is neither root nor this user.
    pub owner: Option<u32>,
}

/// Why a file cannot be used, and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unusable {
    /// Why.
    pub why: String,
    /// What to do.
    pub fix: String,
}

/// What passes to one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerPath {
    /// The peer.
    pub peer: String,
    /// Its endpoint.
    pub endpoint: SocketAddr,
    /// What was found.
    pub found: Result<Passes, String>,
}

/// What others do with the mesh's addresses.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Foreign {
    /// Addresses, each with its interface.
    pub addresses: Vec<(IpAddr, String)>,
    /// A route.
    pub route: Option<(IpAddr, u8)>,
}

/// Settings of the kernel that matter.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Kernel {
    /// Whether it forwards IPv4 or IPv6.
    pub forwards: bool,
    /// Interfaces on which it drops what did not come by the route back (`rp_filter` 1).
    pub strict: Vec<String>,
    /// How many interfaces have a way out.
    pub ways_out: usize,
    /// Whether IPv6 is switched off.
    pub no_ipv6: bool,
}
