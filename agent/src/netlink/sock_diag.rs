//! Whose a socket is: asks the kernel for one socket by its two ends (sock_diag(7), linux/inet_diag.h), in two system calls and without an
//! allocation, however many sockets there are.
//!
//! A question goes: the two ends -> a request of 72 bytes -> the kernel, which answers before `send` returns -> user, cgroup and state. The
//! user and the cgroup are those in which the socket was *made*; a socket that was accepted has its listener's. Raw and ICMP sockets are not
//! found here, and whether the answer is the right one is not judged here.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};

use netlink_sys::{Socket, SocketAddr as NetlinkAddr, protocols::NETLINK_SOCK_DIAG};

use super::NetlinkError;

/// Length of a request: the header, then `inet_diag_req_v2`.
const REQUEST: usize = 72;

/// Room for an answer: the header, `inet_diag_msg`, and its attributes, of which the kernel sends about 150 bytes unasked.
const ANSWER: usize = 2048;

/// Length of a netlink header.
const HEADER: usize = 16;

/// `SOCK_DIAG_BY_FAMILY` (linux/sock_diag.h).
const BY_FAMILY: u16 = 20;

/// `NLM_F_REQUEST` and `NLMSG_ERROR` (linux/netlink.h).
const FLAG_REQUEST: u16 = 1;
const ERROR: u16 = 2;

/// `INET_DIAG_CGROUP_ID` (linux/inet_diag.h), since Linux 5.8.
const ATTRIBUTE_CGROUP: u16 = 21;

/// Answers to earlier questions that are thrown away before one gives up.
const MOST_STRAYS: usize = 8;

const WHAT: &str = "ask whose a socket is";

/// Which sockets are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// TCP, with its listeners.
    Tcp,
    /// UDP, connected and not.
    Udp,
}

/// What the kernel says of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Whose it is, by the number of the user; of a request or a stream in TIME_WAIT, 0.
    pub user: u32,
    /// Its inode; 0 if no process holds it any more, or none holds it yet.
    pub inode: u32,
    /// The id of the cgroup in which it was made; `None` before Linux 5.8.
    pub cgroup: Option<u64>,
    /// Its state (net/tcp_states.h).
    pub state: State,
}

/// The state of a socket (net/tcp_states.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State(pub u8);

impl State {
    /// It is connected.
    pub const ESTABLISHED: Self = Self(1);
    /// It has asked for a connection.
    pub const SYN_SENT: Self = Self(2);
    /// It is connected to nobody: a UDP socket.
    pub const CLOSED: Self = Self(7);
    /// It waits for connections.
    pub const LISTEN: Self = Self(10);
}

/// A connection to the kernel's sockets in one network namespace.
pub struct SockDiag {
    socket: Socket,
    sequence: u32,
    answer: Box<[u8; ANSWER]>,
}

impl SockDiag {
    /// Opens a connection in the namespace of the calling thread.
    ///
    /// # Errors
    /// [`NetlinkError`].
    pub fn open() -> Result<Self, NetlinkError> {
        let open = || {
            let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
            socket.bind_auto()?;
            socket.connect(&NetlinkAddr::new(0, 0))?;
            socket.set_non_blocking(true)?;
            Ok(socket)
        };
        Ok(Self {
            socket: open().map_err(|e| NetlinkError::new("open a socket for questions about sockets", e))?,
            sequence: 0,
            answer: Box::new([0; ANSWER]),
        })
    }

    /// The socket that `local` and `remote` are the ends of: the one that the kernel would give a packet from `remote` to `local` that came
    /// by interface number `interface`, so that a listener is found, too. `None` if there is none, or none of this family.
    ///
    /// # Errors
    /// [`NetlinkError`].
    pub fn find(&mut self, kind: Kind, local: SocketAddr, remote: SocketAddr, interface: u32) -> Result<Option<Found>, NetlinkError> {
        let answered = self.exchange(kind, local, remote, interface);
        answered.map_err(|e| NetlinkError::new(WHAT, e))
    }

    /// Whether the kernel can answer at all: it finds a TCP and a UDP socket that are made for the purpose, on loopback. A kernel without
    /// this would say of every socket that there is none.
    ///
    /// # Errors
    /// [`NetlinkError`], also if there is no loopback to try it on.
    pub fn works(&mut self) -> Result<bool, NetlinkError> {
        let make = || {
            let udp = UdpSocket::bind("127.0.0.1:0")?;
            let tcp = TcpListener::bind("127.0.0.1:0")?;
            Ok((udp.local_addr()?, tcp.local_addr()?, udp, tcp))
        };
        let (udp_at, tcp_at, _udp, _tcp) = make().map_err(|e| NetlinkError::new("make a socket to ask about", e))?;
        let anybody = SocketAddr::from(([127, 0, 0, 1], 9));
        let udp = self.find(Kind::Udp, udp_at, anybody, 0)?;
        Ok(udp.is_some() && self.find(Kind::Tcp, tcp_at, anybody, 0)?.is_some())
    }

    fn exchange(&mut self, kind: Kind, local: SocketAddr, remote: SocketAddr, interface: u32) -> io::Result<Option<Found>> {
        self.sequence = self.sequence.wrapping_add(1);
        self.socket.send(&request(self.sequence, kind, local, remote, interface), 0)?;
        for _ in 0..=MOST_STRAYS {
            let mut room = self.answer.as_mut_slice();
            let length = self.socket.recv(&mut room, 0)?;
            let answer = self.answer.get(..length).unwrap_or_default();
            if number(answer, 8) == Some(self.sequence) {
                return parse(answer);
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }
}

/// The request: all numbers in the host's order, except ports and addresses.
fn request(sequence: u32, kind: Kind, local: SocketAddr, remote: SocketAddr, interface: u32) -> [u8; REQUEST] {
    // For UDP the kernel wants the ends as a packet that arrives has them.
    let (protocol, source, destination) = match kind {
        Kind::Tcp => (libc::IPPROTO_TCP, local, remote),
        Kind::Udp => (libc::IPPROTO_UDP, remote, local),
    };
    let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let byte = |number: i32| u8::try_from(number).unwrap_or_default();
    let mut request = Bytes([0; REQUEST]);
    request.put(0, u32::try_from(REQUEST).unwrap_or_default().to_ne_bytes());
    request.put(4, BY_FAMILY.to_ne_bytes());
    request.put(6, FLAG_REQUEST.to_ne_bytes());
    request.put(8, sequence.to_ne_bytes());
    request.put(16, [byte(family), byte(protocol), 0, 0]);
    // Every state.
    request.put(20, u32::MAX.to_ne_bytes());
    request.put(24, source.port().to_be_bytes());
    request.put(26, destination.port().to_be_bytes());
    request.put(28, address(source.ip()));
    request.put(44, address(destination.ip()));
    request.put(60, interface.to_ne_bytes());
    // Any cookie: it tells sockets apart that had the same ends one after the other.
    request.put(64, u64::MAX.to_ne_bytes());
    request.0
}

struct Bytes([u8; REQUEST]);

impl Bytes {
    fn put<const N: usize>(&mut self, at: usize, bytes: [u8; N]) {
        if let Some(room) = self.0.get_mut(at..).and_then(|rest| rest.first_chunk_mut()) {
            *room = bytes;
        }
    }
}

/// An address in the field that both families share: IPv4 in front.
fn address(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(v4) => {
            let [a, b, c, d] = v4.octets();
            [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        }
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// What an answer says: the socket, that there is none, or the kernel's error.
fn parse(answer: &[u8]) -> io::Result<Option<Found>> {
    let kind = chunk(answer, 4).map(u16::from_ne_bytes);
    if kind == Some(ERROR) {
        let code = chunk(answer, HEADER).map_or(-libc::EPROTO, i32::from_ne_bytes);
        // No error at all means that there will be no other answer.
        return match code.saturating_neg() {
            0 | libc::ENOENT => Ok(None),
            code => Err(io::Error::from_raw_os_error(code)),
        };
    }
    let found = || {
        Some(Found {
            state: State(*answer.get(17)?),
            user: number(answer, 80)?,
            inode: number(answer, 84)?,
            cgroup: attribute(answer.get(88..)?, ATTRIBUTE_CGROUP).map(u64::from_ne_bytes),
        })
    };
    let found = if kind == Some(BY_FAMILY) { found() } else { None };
    found.map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The value of an attribute of N bytes (linux/rtnetlink.h).
fn attribute<const N: usize>(mut attributes: &[u8], wanted: u16) -> Option<[u8; N]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(chunk(attributes, 0)?));
        let kind = u16::from_ne_bytes(chunk(attributes, 2)?);
        if kind == wanted {
            return attributes.get(4..length)?.try_into().ok();
        }
        attributes = attributes.get(length.max(4).next_multiple_of(4)..)?;
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    chunk(bytes, at).map(u32::from_ne_bytes)
}

fn chunk<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_a_udp_socket_are_asked_for_the_other_way_round() -> Result<(), std::net::AddrParseError> {
        let (local, remote) = ("10.77.1.0:5353".parse()?, "10.77.1.9:4000".parse()?);
        let tcp = request(7, Kind::Tcp, local, remote, 3);
        let udp = request(7, Kind::Udp, local, remote, 3);
        assert_eq!(
            tcp.get(24..28),
            udp.get(26..28).zip(udp.get(24..26)).map(|(a, b)| [a, b].concat()).as_deref()
        );
        assert_eq!(
            (tcp.get(28..32), udp.get(44..48)),
            (Some(&[10, 77, 1, 0][..]), Some(&[10, 77, 1, 0][..]))
        );
        assert_eq!(number(&tcp, 60), Some(3));
        Ok(())
    }

    #[test]
    fn whatever_is_cut_short_is_an_error_and_no_socket() {
        let mut whole = vec![0; 100];
        for (at, bytes) in [(4, BY_FAMILY.to_ne_bytes()), (88, 12u16.to_ne_bytes()), (90, 21u16.to_ne_bytes())] {
            whole.splice(at..at + 2, bytes);
        }
        assert!(parse(&whole).is_ok_and(|found| found.is_some_and(|found| found.cgroup.is_some())));
        assert!(parse(whole.get(..94).unwrap_or_default()).is_ok_and(|found| found.is_some_and(|found| found.cgroup.is_none())));
        for length in 0..88 {
            assert!(parse(whole.get(..length).unwrap_or_default()).is_err(), "{length} bytes");
        }
        assert_eq!(
            attribute::<8>(&[0, 0, 0, 0], 21),
            None,
            "an attribute without a length ends the search"
        );
    }
}
