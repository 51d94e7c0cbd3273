//! The WireGuard sockets: one per address family on one port, batches in and out, GRO and GSO where the kernel has them, and the local
//! address of each datagram, so that a reply leaves from the address at which its peer was heard.
//!
//! A datagram goes: kernel -> [`Receiver`]'s slab (many datagrams of one sender in one buffer) -> the caller, buffer by buffer; and back:
//! [`Sender`] gathers datagrams of one length to one endpoint and hands them to the kernel as one.
//!
//! The outer datagram may be fragmented: no DF bit is set, like in kernel WireGuard. Nothing here knows what a datagram contains.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use quinn_udp::{EcnCodepoint, RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use rustix::net::sockopt;
use socket2::{Domain, Protocol, Socket, Type};

use crate::sys::socket::allow_fragments;

/// Size of the kernel's buffers for each socket, in bytes: 30 ms of a 1 Gbit/s burst.
const KERNEL_BUFFER: usize = 4 * 1024 * 1024;

/// Size of one receive buffer: the longest train of datagrams that GRO makes.
const RECEIVE_BUFFER: usize = 64 * 1024;

/// How many receive buffers are offered at once. Together 1 MiB: more would push the packets out of the cache between reading and opening.
const RECEIVE_BUFFERS: usize = 16;

/// Longest train of datagrams sent as one: the largest UDP payload over IPv4.
const SEND_BUFFER: usize = 65_507;

/// IPv4 and UDP headers of an outer datagram, in bytes.
const V4_OVERHEAD: usize = 20 + 8;

/// IPv6 and UDP headers of an outer datagram, in bytes.
const V6_OVERHEAD: usize = 40 + 8;

/// Why there is no WireGuard socket.
#[derive(Debug, thiserror::Error)]
pub enum UdpError {
    /// Another process has the port.
    #[error(
        "cannot listen on UDP port {0}: another process does; stop it (`ss -lunp`), or set another `listen_port` in the agent's configuration"
    )]
    PortTaken(u16, #[source] io::Error),
    /// A port below 1024 without the privilege.
    #[error("cannot listen on UDP port {0}: not permitted; choose a port above 1023, or grant CAP_NET_BIND_SERVICE")]
    NotPermitted(u16, #[source] io::Error),
    /// Anything else.
    #[error("cannot listen on UDP port {0}")]
    Other(u16, #[source] io::Error),
}

/// Where a datagram came from or goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Path {
    /// The other end.
    pub remote: SocketAddr,
    /// Our own address: at which it was received, or from which it is to be sent. `None` leaves it to the kernel.
    pub local: Option<IpAddr>,
    /// The two ECN bits of the outer header.
    pub ecn: u8,
}

/// One family's socket.
#[derive(Debug)]
struct FamilySocket {
    socket: UdpSocket,
    state: UdpSocketState,
}

/// The WireGuard sockets of one worker: IPv4, and IPv6 where the host has it, on one port.
#[derive(Debug)]
pub struct Udp {
    v4: FamilySocket,
    v6: Option<FamilySocket>,
    port: u16,
}

/// How often, and how long, a port that we had alone is waited for until nobody has it.
const LET_GO_ATTEMPTS: usize = 50;
const LET_GO_PAUSE: Duration = Duration::from_millis(10);

impl Udp {
    /// Listens on `port` of all addresses, once for each of `workers`; 0 takes any free port. The kernel gives all datagrams of one sender to
    /// the same worker.
    ///
    /// # Errors
    /// [`UdpError`].
    pub fn listen(port: u16, workers: usize) -> Result<Vec<Self>, UdpError> {
        let alone = Self::bind(port, false)?;
        if workers <= 1 {
            return Ok(vec![alone]);
        }
        // A shared port is shared with every process of the same user. That nobody has it yet is found out by having it alone.
        let port = alone.port;
        drop(alone);
        let mut shared = Self::bind(port, true);
        for _ in 0..LET_GO_ATTEMPTS {
            if !matches!(shared, Err(UdpError::PortTaken(..))) {
                break;
            }
            // A program that is being started has a copy of all descriptors for a moment, that of the socket before among them.
            std::thread::sleep(LET_GO_PAUSE);
            shared = Self::bind(port, true);
        }
        std::iter::once(shared)
            .chain((1..workers).map(|_| Self::bind(port, true)))
            .collect()
    }

    fn bind(port: u16, share: bool) -> Result<Self, UdpError> {
        let why = |e: io::Error| match e.raw_os_error() {
            Some(libc::EADDRINUSE) => UdpError::PortTaken(port, e),
            Some(libc::EACCES | libc::EPERM) => UdpError::NotPermitted(port, e),
            _ => UdpError::Other(port, e),
        };
        let v4 = FamilySocket::bind((Ipv4Addr::UNSPECIFIED, port).into(), share).map_err(why)?;
        let port = v4.socket.local_addr().map_err(why)?.port();
        let v6 = match FamilySocket::bind((Ipv6Addr::UNSPECIFIED, port).into(), share) {
            Ok(v6) => Some(v6),
            // The kernel or the namespace has no IPv6.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => None,
            Err(e) => return Err(why(e)),
        };
        Ok(Self { v4, v6, port })
    }

    /// The port.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// The sockets to wait for, and the family to [`Receiver::receive`] from when one is ready.
    pub fn sockets(&self) -> impl Iterator<Item = (Family, BorrowedFd<'_>)> {
        let v6 = self.v6.iter().map(|s| (Family::V6, s.socket.as_fd()));
        std::iter::once((Family::V4, self.v4.socket.as_fd())).chain(v6)
    }

    fn of(&self, family: Family) -> Option<&FamilySocket> {
        match family {
            Family::V4 => Some(&self.v4),
            Family::V6 => self.v6.as_ref(),
        }
    }
}

/// An address family of the underlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl FamilySocket {
    fn bind(address: SocketAddr, share: bool) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_port(share)?;
        socket.bind(&address.into())?;
        let socket = UdpSocket::from(socket);
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        // quinn-udp forbids fragments, for QUIC.
        allow_fragments(&socket, address.is_ipv6())?;
        set_kernel_buffers(&socket)?;
        Ok(Self { socket, state })
    }
}

/// Past the system's limits where the agent may (CAP_NET_ADMIN), up to them otherwise.
fn set_kernel_buffers(socket: &UdpSocket) -> io::Result<()> {
    if sockopt::set_socket_recv_buffer_size_force(socket, KERNEL_BUFFER).is_err() {
        sockopt::set_socket_recv_buffer_size(socket, KERNEL_BUFFER)?;
    }
    if sockopt::set_socket_send_buffer_size_force(socket, KERNEL_BUFFER).is_err() {
        sockopt::set_socket_send_buffer_size(socket, KERNEL_BUFFER)?;
    }
    Ok(())
}

/// The slab that datagrams are received into.
#[derive(Debug)]
pub struct Receiver {
    slab: Box<[u8]>,
    metas: [RecvMeta; RECEIVE_BUFFERS],
    count: usize,
}

impl Default for Receiver {
    fn default() -> Self {
        Self {
            slab: vec![0; RECEIVE_BUFFER * RECEIVE_BUFFERS].into(),
            metas: [RecvMeta::default(); RECEIVE_BUFFERS],
            count: 0,
        }
    }
}

impl Receiver {
    /// Receives what waits at one of the sockets, up to the slab's size; what was received before is gone.
    ///
    /// # Errors
    /// The kernel's; none in ordinary operation.
    pub fn receive(&mut self, udp: &Udp, family: Family) -> io::Result<()> {
        self.count = 0;
        let Some(FamilySocket { socket, state }) = udp.of(family) else {
            return Ok(());
        };
        let mut chunks = self.slab.chunks_exact_mut(RECEIVE_BUFFER);
        let mut buffers: [IoSliceMut<'_>; RECEIVE_BUFFERS] = std::array::from_fn(|_| IoSliceMut::new(chunks.next().unwrap_or_default()));
        match state.recv(UdpSockRef::from(socket), &mut buffers, &mut self.metas) {
            Ok(count) => self.count = count,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// What was received, buffer by buffer: datagrams of so many bytes one behind the other from one sender, the last one possibly shorter.
    pub fn received(&mut self) -> impl Iterator<Item = (&mut [u8], usize, Path)> {
        let buffers = self.slab.chunks_exact_mut(RECEIVE_BUFFER).zip(&self.metas).take(self.count);
        buffers.filter_map(|(buffer, meta)| {
            let ecn = meta.ecn.map_or(0, |e| e as u8);
            let path = Path {
                remote: meta.addr,
                local: meta.dst_ip,
                ecn,
            };
            Some((buffer.get_mut(..meta.len)?, meta.stride, path))
        })
    }
}

/// What became of the datagrams handed to a [`Sender`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SendCounts {
    /// Taken by the kernel.
    pub sent: u64,
    /// Refused by the kernel: its queue was full, or there is no way to the endpoint.
    pub refused: u64,
    /// Among those sent: longer than the underlay's MTU, so that the kernel makes fragments of them.
    pub fragmented: u64,
}

/// Gathers datagrams and sends those that belong together as one.
#[derive(Debug)]
pub struct Sender {
    train: Vec<u8>,
    path: Option<Path>,
    segment: usize,
    count: usize,
    closed: bool,
    underlay_mtu: usize,
    counts: SendCounts,
}

impl Default for Sender {
    fn default() -> Self {
        Self {
            train: Vec::with_capacity(SEND_BUFFER),
            path: None,
            segment: 0,
            count: 0,
            closed: false,
            underlay_mtu: usize::MAX,
            counts: SendCounts::default(),
        }
    }
}

impl Sender {
    /// Tells the MTU of the underlay in bytes; it serves to count fragmented datagrams alone.
    pub fn set_underlay_mtu(&mut self, bytes: usize) {
        self.underlay_mtu = bytes;
    }

    /// Takes one datagram; what was gathered before goes out if it does not fit to it.
    pub fn push(&mut self, udp: &Udp, datagram: &[u8], path: Path) {
        if !self.fits(udp, datagram.len(), path) {
            self.flush(udp);
        }
        if self.count == 0 {
            (self.path, self.segment, self.closed) = (Some(path), datagram.len(), false);
        }
        // A shorter datagram ends a train.
        self.closed |= datagram.len() < self.segment;
        self.train.extend_from_slice(datagram);
        self.count += 1;
    }

    /// Sends what was gathered.
    pub fn flush(&mut self, udp: &Udp) {
        if let Some(path) = self.path.take() {
            self.send(udp, path);
        }
        self.train.clear();
        (self.segment, self.count) = (0, 0);
    }

    /// What became of the datagrams since the last call.
    pub fn take_counts(&mut self) -> SendCounts {
        std::mem::take(&mut self.counts)
    }

    fn fits(&self, udp: &Udp, length: usize, path: Path) -> bool {
        if self.count == 0 {
            return true;
        }
        let most = udp.of(family(path.remote)).map_or(1, |s| s.state.max_gso_segments());
        self.path == Some(path) && !self.closed && length <= self.segment && self.count < most && self.train.len() + length <= SEND_BUFFER
    }

    fn send(&mut self, udp: &Udp, path: Path) {
        let count = self.count as u64;
        let Some(socket) = udp.of(family(path.remote)) else {
            self.counts.refused += count;
            return;
        };
        let Err(error) = socket.send(&self.train, self.segment, path) else {
            return self.count_sent(self.segment, path, count);
        };
        // The kernel does not fragment a train, and some interfaces take none: once more, one by one.
        if count == 1 || error.kind() == io::ErrorKind::WouldBlock {
            self.counts.refused += count;
            return;
        }
        for datagram in self.train.chunks(self.segment.max(1)) {
            match socket.send(datagram, datagram.len(), path) {
                Ok(()) => {
                    self.counts.sent += 1;
                    self.counts.fragmented += u64::from(is_fragmented(datagram.len(), path, self.underlay_mtu));
                }
                Err(_) => self.counts.refused += 1,
            }
        }
    }

    fn count_sent(&mut self, length: usize, path: Path, count: u64) {
        self.counts.sent += count;
        if is_fragmented(length, path, self.underlay_mtu) {
            self.counts.fragmented += count;
        }
    }
}

impl FamilySocket {
    fn send(&self, contents: &[u8], segment: usize, path: Path) -> io::Result<()> {
        let transmit = Transmit {
            destination: path.remote,
            ecn: EcnCodepoint::from_bits(path.ecn),
            contents,
            segment_size: Some(segment),
            src_ip: path.local,
        };
        match self.state.try_send(UdpSockRef::from(&self.socket), &transmit) {
            // The address is no longer ours: any other will do, the peer learns it.
            Err(e) if path.local.is_some() && matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EADDRNOTAVAIL | libc::ENETUNREACH)) => {
                self.state
                    .try_send(UdpSockRef::from(&self.socket), &Transmit { src_ip: None, ..transmit })
            }
            result => result,
        }
    }
}

const fn family(remote: SocketAddr) -> Family {
    match remote {
        SocketAddr::V4(_) => Family::V4,
        SocketAddr::V6(_) => Family::V6,
    }
}

const fn is_fragmented(length: usize, path: Path, underlay_mtu: usize) -> bool {
    let overhead = match path.remote {
        SocketAddr::V4(_) => V4_OVERHEAD,
        SocketAddr::V6(_) => V6_OVERHEAD,
    };
    length + overhead > underlay_mtu
}
