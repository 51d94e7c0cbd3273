//! Sockets of every shape, made on order: what a process may try in order to speak or hear as a component that it is not.
//!
//! `lab-tool obey` reads one [`Order`] a line and writes one [`Answer`] a line ([`obey`]). A server that was ordered goes on in threads of that
//! process and keeps what reached it, so that an attempt is judged by what its target has seen and not by what the one who tried believes.
//! No code here is unsafe: the address by which a packet socket sends is the one by which it received.

use std::io::{self, BufRead, ErrorKind, Read, Write};
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use etherparse::{NetSlice, PacketBuilder, SlicedPacket};
use serde::{Deserialize, Serialize};
use socket2::{Domain, MsgHdr, Protocol, SockAddr, Socket, Type};

/// Bytes of a question: a word and the token, by which it is known again.
const QUESTION: usize = 16;

/// How long one waits with the next datagram of many.
const BETWEEN_DATAGRAMS: Duration = Duration::from_millis(20);
/// How long a connection, or an answer, is waited for.
const PATIENCE: Duration = Duration::from_millis(300);
/// How often a server looks whether it is to end.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Most that a server keeps of what reached it.
const MOST_SEEN: usize = 100_000;

/// What carries an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum By {
    /// A stream.
    Tcp,
    /// Datagrams.
    Udp,
}

/// What is particular about a socket; by default nothing.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Shape {
    /// What it is bound to.
    pub from: Option<SocketAddr>,
    /// `SO_BINDTODEVICE`.
    pub device: Option<String>,
    /// `SO_MARK`.
    pub mark: Option<u32>,
    /// `IP_FREEBIND`, `IPV6_FREEBIND`.
    pub freebind: bool,
    /// `IP_TRANSPARENT`, `IPV6_TRANSPARENT`.
    pub transparent: bool,
    /// `SO_REUSEADDR` and `SO_REUSEPORT`.
    pub reuse: bool,
    /// An IPv6 socket that speaks IPv4 by mapped addresses.
    pub mapped: bool,
    /// A stream of Multipath TCP.
    pub multipath: bool,
    /// The source of one datagram, without having bound to it: `IP_PKTINFO`, `IPV6_PKTINFO`.
    pub packet_source: Option<IpAddr>,
}

/// What is to be done.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Order {
    /// Sends a question, and waits for the answer.
    Ask(By, SocketAddr, Shape, u64),
    /// Sends it over a raw socket, with a header of its own: a UDP datagram from the address given first.
    Forge(SocketAddr, SocketAddr, u64),
    /// Sends it over a packet socket, on the interface on which a packet with the second address in it is seen first: a UDP datagram, or a SYN.
    Inject(By, SocketAddr, SocketAddr, u64),
    /// Writes so many bytes to a stream and closes it at once.
    Blast(SocketAddr, Shape, u64),
    /// Asks again and again, in the background, until [`Order::Stop`]; tokens count up.
    Keep(By, SocketAddr, Shape, u64),
    /// Answers questions with a name, in the background.
    Serve(By, SocketAddr, Shape, String),
    /// Listens and stops listening over and over, in the background: for whoever believes that it knows who listens.
    Flicker(SocketAddr, String),
    /// What has reached the servers.
    Seen,
    /// Ends all that goes on in the background.
    Stop,
    /// Writes a text to a file.
    Write(String, String),
}

/// What came of an order.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Answer {
    /// Why nothing did.
    pub error: Option<String>,
    /// The socket's own address.
    pub local: Option<SocketAddr>,
    /// Who answered.
    pub by: Option<String>,
    /// What reached the servers.
    pub seen: Vec<Seen>,
    /// Attempts in the background, when they are stopped.
    pub attempts: u64,
}

/// What reached a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// From where.
    pub peer: SocketAddr,
    /// The question's token; 0 for a stream that has only begun.
    pub token: u64,
    /// Bytes that came with a stream, when it has ended.
    pub bytes: u64,
}

#[derive(Debug, Default, Clone)]
struct Background {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<Seen>>>,
    attempts: Arc<AtomicU64>,
}

/// Carries out orders until there are no more.
///
/// # Errors
/// If an order cannot be read, or an answer not written.
pub fn obey(from: impl BufRead, mut to: impl Write) -> io::Result<()> {
    let mut background = Background::default();
    for line in from.lines() {
        let order: Order = serde_json::from_str(&line?).map_err(io::Error::other)?;
        let answer = background.carry_out(order).unwrap_or_else(|error| Answer {
            error: Some(told(&error)),
            ..Answer::default()
        });
        writeln!(to, "{}", serde_json::to_string(&answer)?)?;
        to.flush()?;
    }
    Ok(())
}

/// An error by the name that its manual page has for it, where that is short.
fn told(error: &io::Error) -> String {
    let name = match error.raw_os_error() {
        Some(1) => "EPERM",
        Some(13) => "EACCES",
        Some(22) => "EINVAL",
        Some(98) => "EADDRINUSE",
        Some(99) => "EADDRNOTAVAIL",
        Some(101) => "ENETUNREACH",
        Some(104) => "ECONNRESET",
        Some(111) => "ECONNREFUSED",
        Some(113) => "EHOSTUNREACH",
        Some(_) | None if matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock) => "silence",
        Some(_) | None => return error.to_string(),
    };
    name.to_owned()
}

impl Background {
    fn carry_out(&mut self, order: Order) -> io::Result<Answer> {
        let mut answer = Answer::default();
        match order {
            Order::Ask(by, to, shape, token) => return ask(by, to, &shape, token),
            Order::Forge(from, to, token) => forge(from, to, token)?,
            Order::Inject(by, from, to, token) => inject(by, from, to, token)?,
            Order::Blast(to, shape, bytes) => blast(to, &shape, bytes)?,
            Order::Keep(by, to, shape, token) => self.keep(by, to, shape, token),
            Order::Serve(by, at, shape, name) => self.serve(by, at, &shape, name)?,
            Order::Flicker(at, name) => self.flicker(at, name),
            Order::Seen => answer.seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            Order::Stop => {
                self.stop.store(true, Ordering::Relaxed);
                std::thread::sleep(3 * LOOK_EVERY);
                answer.attempts = self.attempts.load(Ordering::Relaxed);
                let seen = Arc::clone(&self.seen);
                *self = Self { seen, ..Self::default() };
            }
            Order::Write(path, text) => std::fs::write(path, text)?,
        }
        Ok(answer)
    }

    fn keep(&self, by: By, to: SocketAddr, shape: Shape, token: u64) {
        let (stop, attempts) = (Arc::clone(&self.stop), Arc::clone(&self.attempts));
        std::thread::spawn(move || {
            for token in token.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let _judged_by_who_was_asked = match by {
                    By::Tcp => ask(by, to, &shape, token).map(drop),
                    By::Udp => {
                        // Each is a flow of its own for half a minute, and a component may have so many only.
                        std::thread::sleep(BETWEEN_DATAGRAMS);
                        tell(to, &shape, token).map(drop)
                    }
                };
                attempts.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
    }

    fn serve(&self, by: By, at: SocketAddr, shape: &Shape, name: String) -> io::Result<()> {
        let shape = Shape {
            from: Some(at),
            ..shape.clone()
        };
        let socket = make(by, at, &shape)?;
        let background = self.clone();
        match by {
            By::Tcp => {
                socket.listen(128)?;
                std::thread::spawn(move || background.accept(&socket, &name, &AtomicBool::new(false)));
            }
            By::Udp => {
                socket.set_read_timeout(Some(LOOK_EVERY))?;
                std::thread::spawn(move || background.answer(&socket.into(), &name));
            }
        }
        Ok(())
    }

    fn flicker(&self, at: SocketAddr, name: String) {
        let background = self.clone();
        std::thread::spawn(move || {
            let shape = Shape {
                from: Some(at),
                reuse: true,
                ..Shape::default()
            };
            while !background.stop.load(Ordering::Relaxed) {
                let over = Arc::new(AtomicBool::new(false));
                if let Ok(socket) = make(By::Tcp, at, &shape)
                    && socket.listen(16).is_ok()
                {
                    std::thread::sleep(Duration::from_micros(150));
                    over.store(true, Ordering::Relaxed);
                    background.accept(&socket, &name, &over);
                }
                std::thread::sleep(Duration::from_micros(50));
            }
        });
    }

    fn note(&self, peer: SocketAddr, token: u64, bytes: u64) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() < MOST_SEEN {
            seen.push(Seen { peer, token, bytes });
        }
    }

    /// Takes what waits at a listener; ends when it is over and nothing waits.
    fn accept(&self, listener: &Socket, name: &str, over: &AtomicBool) {
        let _ = listener.set_nonblocking(true);
        while !self.stop.load(Ordering::Relaxed) {
            match listener.accept() {
                Ok((stream, peer)) => {
                    let Some(peer) = peer.as_socket() else { continue };
                    self.note(peer, 0, 0);
                    let (background, name) = (self.clone(), name.to_owned());
                    std::thread::spawn(move || background.read(&stream, peer, &name));
                }
                Err(_) if over.load(Ordering::Relaxed) => return,
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    fn read(&self, mut stream: &Socket, peer: SocketAddr, name: &str) {
        let _ = stream.set_nonblocking(false);
        let _ = stream.set_read_timeout(Some(Duration::from_secs(10)));
        let (mut buffer, mut bytes) = ([0; 65_536], 0);
        while let Ok(length) = stream.read(&mut buffer)
            && length > 0
        {
            if let Some(token) = token_of(buffer.get(..length).unwrap_or_default()).filter(|_| bytes == 0) {
                self.note(peer, token, 0);
                let _gone = stream.write_all(name.as_bytes());
            }
            bytes += u64::try_from(length).unwrap_or(0);
        }
        self.note(peer, 0, bytes);
    }

    fn answer(&self, socket: &std::net::UdpSocket, name: &str) {
        let mut buffer = [0; 2048];
        while !self.stop.load(Ordering::Relaxed) {
            let Ok((length, peer)) = socket.recv_from(&mut buffer) else {
                continue;
            };
            let token = token_of(buffer.get(..length).unwrap_or_default()).unwrap_or(0);
            self.note(peer, token, 0);
            let _refused = socket.send_to(name.as_bytes(), peer);
        }
    }
}

fn question(token: u64) -> [u8; QUESTION] {
    let mut question = [b' '; QUESTION];
    question
        .iter_mut()
        .zip(format!("ask {token:>12}").bytes())
        .for_each(|(to, from)| *to = from);
    question
}

fn token_of(question: &[u8]) -> Option<u64> {
    std::str::from_utf8(question).ok()?.strip_prefix("ask ")?.trim().parse().ok()
}

fn mapped(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) => (v4.ip().to_ipv6_mapped(), v4.port()).into(),
        SocketAddr::V6(_) => address,
    }
}

/// A socket of this shape for this destination, bound to what it is to be bound to.
fn make(by: By, to: SocketAddr, shape: &Shape) -> io::Result<Socket> {
    let kind = match by {
        By::Tcp => Type::STREAM,
        By::Udp => Type::DGRAM,
    };
    let seen_as = |address| if shape.mapped { mapped(address) } else { address };
    // IPPROTO_MPTCP.
    let protocol = (shape.multipath && by == By::Tcp).then(|| Protocol::from(262));
    let socket = Socket::new(Domain::for_address(seen_as(to)), kind, protocol)?;
    let is_v4 = seen_as(to).is_ipv4();
    if shape.reuse {
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
    }
    if shape.freebind && is_v4 {
        socket.set_freebind_v4(true)?;
    } else if shape.freebind {
        socket.set_freebind_v6(true)?;
    }
    if shape.transparent && is_v4 {
        socket.set_ip_transparent_v4(true)?;
    } else if shape.transparent {
        socket.set_ip_transparent_v6(true)?;
    }
    if let Some(mark) = shape.mark {
        socket.set_mark(mark)?;
    }
    if let Some(device) = &shape.device {
        socket.bind_device(Some(device.as_bytes()))?;
    }
    if !is_v4 && !shape.mapped {
        socket.set_only_v6(true)?;
    }
    if let Some(from) = shape.from {
        socket.bind(&seen_as(from).into())?;
    }
    Ok(socket)
}

fn ask(by: By, to: SocketAddr, shape: &Shape, token: u64) -> io::Result<Answer> {
    let socket = match by {
        By::Tcp => {
            let socket = make(by, to, shape)?;
            socket.connect_timeout(&if shape.mapped { mapped(to) } else { to }.into(), PATIENCE)?;
            (&socket).write_all(&question(token))?;
            socket
        }
        By::Udp => tell(to, shape, token)?,
    };
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut buffer = [0; 64];
    let length = (&socket).read(&mut buffer)?;
    Ok(Answer {
        local: socket.local_addr()?.as_socket(),
        by: Some(String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned()),
        ..Answer::default()
    })
}

/// Sends one datagram.
fn tell(to: SocketAddr, shape: &Shape, token: u64) -> io::Result<Socket> {
    let socket = make(By::Udp, to, shape)?;
    let target: SockAddr = if shape.mapped { mapped(to) } else { to }.into();
    if let Some(source) = shape.packet_source {
        let (question, control) = (question(token), packet_info(source));
        let buffers = [io::IoSlice::new(&question)];
        let message = MsgHdr::new().with_addr(&target).with_buffers(&buffers).with_control(&control);
        socket.sendmsg(&message, 0)?;
        return Ok(socket);
    }
    socket.connect(&target)?;
    socket.send(&question(token))?;
    Ok(socket)
}

/// A control message with `struct in_pktinfo` (ip(7)) or `struct in6_pktinfo` (ipv6(7)), which names the source.
fn packet_info(source: IpAddr) -> Vec<u8> {
    let (level, kind, data): (i32, i32, Vec<u8>) = match source {
        IpAddr::V4(source) => (0, 8, [[0; 4], source.octets(), [0; 4]].concat()),
        IpAddr::V6(source) => (41, 50, [source.octets().as_slice(), &[0; 4]].concat()),
    };
    let length = size_of::<usize>() + 8 + data.len();
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(level.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(data);
    message.resize(length.next_multiple_of(size_of::<usize>()), 0);
    message
}

fn packet(by: By, from: SocketAddr, to: SocketAddr, token: u64) -> io::Result<Vec<u8>> {
    let ip = match (from, to) {
        (SocketAddr::V4(from), SocketAddr::V4(to)) => PacketBuilder::ipv4(from.ip().octets(), to.ip().octets(), 64),
        (SocketAddr::V6(from), SocketAddr::V6(to)) => PacketBuilder::ipv6(from.ip().octets(), to.ip().octets(), 64),
        (SocketAddr::V4(_), SocketAddr::V6(_)) | (SocketAddr::V6(_), SocketAddr::V4(_)) => return Err(ErrorKind::InvalidInput.into()),
    };
    let mut packet = Vec::new();
    match by {
        By::Tcp => ip.tcp(from.port(), to.port(), 1, 65_535).syn().write(&mut packet, &[]),
        By::Udp => ip.udp(from.port(), to.port()).write(&mut packet, &question(token)),
    }
    .map_err(io::Error::other)?;
    Ok(packet)
}

fn forge(from: SocketAddr, to: SocketAddr, token: u64) -> io::Result<()> {
    // IPPROTO_RAW: the packet has its header already.
    let socket = Socket::new(Domain::for_address(to), Type::RAW, Some(Protocol::from(255)))?;
    let mut target = to;
    target.set_port(0);
    socket.send_to(&packet(By::Udp, from, to, token)?, &target.into()).map(drop)
}

fn inject(by: By, from: SocketAddr, to: SocketAddr, token: u64) -> io::Result<()> {
    // ETH_P_ALL in the byte order of the wire.
    let everything = Protocol::from(i32::from(3_u16.to_be()));
    let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(everything))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let start = Instant::now();
    let mut buffer = [MaybeUninit::new(0_u8); 2048];
    while start.elapsed() < 8 * PATIENCE {
        // Once for its address, once for its bytes.
        let Ok((_, interface)) = socket.peek_from(&mut buffer) else {
            continue;
        };
        let mut bytes = [0; 2048];
        let count = (&socket).read(&mut bytes)?;
        if !mentions(bytes.get(..count).unwrap_or_default(), to.ip()) {
            continue;
        }
        return socket.send_to(&packet(by, from, to, token)?, &interface).map(drop);
    }
    Err(io::Error::other("nothing passed by which the interface could be known"))
}

fn mentions(packet: &[u8], address: IpAddr) -> bool {
    let Ok(sliced) = SlicedPacket::from_ip(packet) else { return false };
    let ends: [IpAddr; 2] = match &sliced.net {
        Some(NetSlice::Ipv4(ip)) => [ip.header().source_addr(), ip.header().destination_addr()].map(IpAddr::V4),
        Some(NetSlice::Ipv6(ip)) => [ip.header().source_addr(), ip.header().destination_addr()].map(IpAddr::V6),
        Some(NetSlice::Arp(_)) | None => return false,
    };
    ends.contains(&address)
}

fn blast(to: SocketAddr, shape: &Shape, bytes: u64) -> io::Result<()> {
    let socket = make(By::Tcp, to, shape)?;
    socket.connect_timeout(&to.into(), PATIENCE)?;
    let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
    // All of it waits in the kernel when the socket is closed: nothing has been acknowledged yet that matters.
    socket.set_send_buffer_size(2 * bytes)?;
    (&socket).write_all(&vec![b'.'; bytes])
}

/// The unspecified address of the family of `address`, at a port.
#[must_use]
pub fn any_like(address: IpAddr, port: u16) -> SocketAddr {
    match address {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, port).into(),
        IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, port).into(),
    }
}
