//! What a person does on request that few programs do: sockets that the kernel finds by other ways than the usual.

use std::io::{IoSlice, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use socket2::{Domain, MsgHdr, Protocol, SockAddr, Socket, Type};

use super::{Attempt, Person};
use crate::Outcome;
use crate::claims::SILENCE;

/// How many streams this process has taken.
static TAKEN: AtomicU32 = AtomicU32::new(0);

/// How many ports are flooded: more than are remembered of a component.
const FLOOD: usize = 10_000;

/// IPPROTO_MPTCP (RFC 8684 as Linux has it) and IPPROTO_UDPLITE (RFC 3828).
const MPTCP: i32 = 262;
const UDP_LITE: i32 = 136;

impl Person {
    /// Listens, and greets everybody for good; by `plain` TCP, `mptcp`, or `bound:INTERFACE`.
    pub(crate) fn dismisses(&mut self, how: &str, at: SocketAddr) -> Outcome {
        Ok(self.attempt(&format!("dismiss:{how}"), at, None)?.map(drop)?)
    }

    /// How many streams it has taken.
    pub(crate) fn taken(&mut self) -> Outcome<u32> {
        let answer = self.attempt("taken", ([0; 4], 0).into(), None)?;
        match answer? {
            IpAddr::V4(number) => Ok(number.into()),
            IpAddr::V6(_) => Err("no number".into()),
        }
    }

    /// Connects from a port, also where the rest of a stream is in the way, and waits for the greeting.
    pub(crate) fn greeted_from(&mut self, to: SocketAddr, from: SocketAddr) -> Outcome<Attempt> {
        self.attempt(&format!("greeted:{}", from.port()), to, Some(from.ip()))
    }

    /// The same by an interface, from any port.
    pub(crate) fn greeted_by(&mut self, interface: &str, to: SocketAddr) -> Outcome<Attempt> {
        self.attempt(&format!("greetedby:{interface}"), to, None)
    }

    /// The same, with a word in the very first segment (RFC 7413), for which no answer is waited for.
    pub(crate) fn hurries_from(&mut self, to: SocketAddr, from: SocketAddr) -> Outcome<Attempt> {
        self.attempt(&format!("hurry:{}", from.port()), to, Some(from.ip()))
    }

    /// Answers each datagram: `late`, by a `child` for each who asks (which counts what comes then), or by a `plain` socket, a `lite` one, one that is
    /// `shared`, `foreign` (with any address), `marked:NUMBER`, `bound:INTERFACE`, or in a group, `joined:ADDRESS` of the interface.
    pub(crate) fn answers_by(&mut self, how: &str, at: SocketAddr) -> Outcome {
        Ok(self.attempt(&format!("answer:{how}"), at, None)?.map(drop)?)
    }

    /// Sends a datagram by a socket of this kind, at a port if one is said (`KIND@PORT`), which connects to nobody, and waits for its echo. Before
    /// it, `shadowed:` says that another one of its own shares the port that is asked, on `lo`.
    pub(crate) fn asks_by(&mut self, how: &str, to: SocketAddr, from: Option<IpAddr>) -> Outcome<Attempt> {
        self.attempt(&format!("ask:{how}"), to, from)
    }

    /// Sends a datagram to each of so many ports, from the port of `to` on.
    pub(crate) fn floods(&mut self, to: SocketAddr) -> Outcome {
        Ok(self.attempt("flood", to, None)?.map(drop)?)
    }

    /// Waits for datagrams of one peer, and counts them with the streams that it takes.
    pub(crate) fn waits_for(&mut self, at: u16, peer: SocketAddr) -> Outcome {
        Ok(self.attempt(&format!("wait:{at}"), peer, None)?.map(drop)?)
    }

    /// Counts all that a raw socket of protocol `how` hears from an address.
    pub(crate) fn overhears(&mut self, how: u8, from: IpAddr) -> Outcome {
        Ok(self.attempt(&format!("overhear:{how}"), (from, 0).into(), None)?.map(drop)?)
    }

    /// Sends a datagram to itself with the address `to` as its source, and answers it: to `to`. Waits for what comes back.
    pub(crate) fn forges_a_question_and_answers(&mut self, to: SocketAddr) -> Outcome<Attempt> {
        self.attempt("forge", to, None)
    }
}

/// Does `what`, if it is one of these.
pub(super) fn act(what: &str, at: SocketAddr, from: Option<IpAddr>) -> std::io::Result<IpAddr> {
    let (what, how) = what.split_once(':').unwrap_or((what, ""));
    let port = || from.zip(how.parse().ok()).map(SocketAddr::from);
    match what {
        "dismiss" => dismiss(at, how),
        "taken" => Ok(Ipv4Addr::from(TAKEN.load(Ordering::Acquire)).into()),
        "greeted" => greeted(at, port(), None, false),
        "hurry" => greeted(at, port(), None, true),
        "greetedby" => greeted(at, None, Some(how), false),
        "answer" => echo(at, how),
        "ask" => ask(at, from, how),
        "flood" => flood(at),
        "wait" => wait(at, how.parse().unwrap_or(0)),
        "overhear" => overhear(at, how.parse().unwrap_or(0)),
        "forge" => forge(at),
        _ => Err(std::io::Error::other(format!("what is `{what}`?"))),
    }
}

fn dismiss(at: SocketAddr, how: &str) -> std::io::Result<IpAddr> {
    let socket = Socket::new(
        Domain::for_address(at),
        Type::STREAM,
        (how == "mptcp").then(|| Protocol::from(MPTCP)),
    )?;
    socket.set_reuse_address(true)?;
    if let Some(interface) = how.strip_prefix("bound:") {
        socket.bind_device(Some(interface.as_bytes()))?;
    }
    socket.bind(&at.into())?;
    socket.listen(16)?;
    let listener = TcpListener::from(socket);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            TAKEN.fetch_add(1, Ordering::AcqRel);
            let _gone = stream.write_all(b"hello");
        }
    });
    Ok(at.ip())
}

/// Connects from `from` and reads the greeting; to its end, unless it is in a hurry: then the server has closed first, and the rest of the stream
/// is his.
fn greeted(to: SocketAddr, from: Option<SocketAddr>, by: Option<&str>, in_a_hurry: bool) -> std::io::Result<IpAddr> {
    let begun = Instant::now();
    let socket = loop {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        match begin(&socket, to, from, by, in_a_hurry) {
            Ok(()) => break socket,
            // Until the last segments of a stream before are exchanged, the port is still its own.
            Err(error) if is_taken(&error) && begun.elapsed() < SILENCE => std::thread::sleep(SILENCE / 50),
            Err(error) => return Err(error),
        }
    };
    socket.set_read_timeout(Some(2 * SILENCE))?;
    let mut stream = TcpStream::from(socket);
    let mut text = [0; 5];
    stream.read_exact(&mut text)?;
    if !in_a_hurry {
        let _nothing_more = stream.read(&mut [0])?;
    }
    if &text == b"hello" {
        Ok(stream.local_addr()?.ip())
    } else {
        Err(std::io::Error::other(format!("greeted with {text:?}")))
    }
}

fn is_taken(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::AddrInUse | std::io::ErrorKind::AddrNotAvailable)
}

fn begin(socket: &Socket, to: SocketAddr, from: Option<SocketAddr>, by: Option<&str>, in_a_hurry: bool) -> std::io::Result<()> {
    socket.set_reuse_address(true)?;
    if let Some(interface) = by {
        socket.bind_device(Some(interface.as_bytes()))?;
    }
    if let Some(from) = from {
        socket.bind(&from.into())?;
    }
    if in_a_hurry {
        socket.set_write_timeout(Some(2 * SILENCE))?;
        socket.send_to_with_flags(b"word", &to.into(), libc::MSG_FASTOPEN).map(drop)
    } else {
        socket.connect_timeout(&to.into(), 2 * SILENCE)
    }
}

/// A socket for datagrams, of this kind.
fn datagrams(how: &str, at: SocketAddr) -> std::io::Result<Socket> {
    let (how, interface) = how.split_once(':').unwrap_or((how, ""));
    let socket = Socket::new(
        Domain::for_address(at),
        Type::DGRAM,
        (how == "lite").then(|| Protocol::from(UDP_LITE)),
    )?;
    socket.set_reuse_address(how == "shared")?;
    match how {
        "bound" => socket.bind_device(Some(interface.as_bytes()))?,
        "foreign" => socket.set_freebind_v6(true)?,
        "marked" => socket.set_mark(interface.parse().unwrap_or(0))?,
        "shared" if !interface.is_empty() => socket.bind_device(Some(interface.as_bytes()))?,
        _ => {}
    }
    socket.bind(&at.into())?;
    if let ("joined", IpAddr::V4(group), Ok(interface)) = (how, at.ip(), interface.parse()) {
        socket.join_multicast_v4(&group, &interface)?;
    }
    Ok(socket)
}

fn ask(to: SocketAddr, from: Option<IpAddr>, how: &str) -> std::io::Result<IpAddr> {
    // Another socket that the kernel may take for the one that is asked.
    let shadow = how.strip_prefix("shadowed:");
    let _shadow = shadow
        .map(|_| datagrams("shared:lo", SocketAddr::from(([0; 4], to.port()))))
        .transpose()?;
    let how = shadow.unwrap_or(how);
    let any = if to.is_ipv4() {
        IpAddr::from([0; 4])
    } else {
        IpAddr::from([0; 16])
    };
    let (how, port) = how.split_once('@').map_or((how, 0), |(how, port)| (how, port.parse().unwrap_or(0)));
    let socket = datagrams(how, SocketAddr::from((from.unwrap_or(any), port)))?;
    socket.set_read_timeout(Some(SILENCE))?;
    socket.send_to(b"question", &to.into())?;
    let mut buffer = [MaybeUninit::uninit(); 64];
    let (_, answered_by) = socket.recv_from(&mut buffer)?;
    answered_by
        .as_socket()
        .map(|address| address.ip())
        .ok_or_else(|| std::io::ErrorKind::Other.into())
}

fn echo(at: SocketAddr, how: &str) -> std::io::Result<IpAddr> {
    let (is_late, has_children) = (how == "late", how == "child");
    let socket = UdpSocket::from(datagrams(if has_children { "shared" } else { how }, at)?);
    let answer_by_child = move |answer: &[u8], to: SocketAddr| -> std::io::Result<()> {
        let child = datagrams("shared", at)?;
        child.connect(&to.into())?;
        child.send(answer)?;
        count(child);
        Ok(())
    };
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        loop {
            // An error is what became of an answer.
            let Ok((length, from)) = socket.recv_from(&mut buffer) else {
                continue;
            };
            if is_late {
                std::thread::sleep(SILENCE / 2);
            }
            let _gone = if has_children {
                answer_by_child(&buffer[..length], from)
            } else {
                socket.send_to(&buffer[..length], from).map(drop)
            };
        }
    });
    Ok(at.ip())
}

fn flood(to: SocketAddr) -> std::io::Result<IpAddr> {
    let socket = datagrams("plain", SocketAddr::from(([0; 4], 0)))?;
    for port in (to.port()..).take(FLOOD) {
        let _closed = socket.send_to(b"flood", &SocketAddr::from((to.ip(), port)).into());
    }
    Ok(to.ip())
}

/// Counts what this socket receives.
fn count(socket: Socket) {
    std::thread::spawn(move || {
        while socket.recv(&mut [MaybeUninit::uninit(); 256]).is_ok() {
            TAKEN.fetch_add(1, Ordering::AcqRel);
        }
    });
}

fn wait(peer: SocketAddr, at: u16) -> std::io::Result<IpAddr> {
    let socket = datagrams("plain", SocketAddr::from(([0u16; 8], at)))?;
    socket.connect(&peer.into())?;
    count(socket);
    Ok(peer.ip())
}

fn overhear(from: SocketAddr, protocol: u8) -> std::io::Result<IpAddr> {
    let socket = Socket::new(Domain::for_address(from), Type::RAW, Some(Protocol::from(i32::from(protocol))))?;
    socket.connect(&from.into())?;
    count(socket);
    Ok(from.ip())
}

/// See [`Person::forges_a_question_and_answers`].
fn forge(to: SocketAddr) -> std::io::Result<IpAddr> {
    let own = UdpSocket::bind((to.ip(), 0))?;
    own.set_read_timeout(Some(SILENCE))?;
    // The same port at another address of loopback, and the address of the other in a control message (ip(7)).
    let sender = Socket::from(UdpSocket::bind((Ipv4Addr::new(127, 0, 0, 2), to.port()))?);
    let IpAddr::V4(source) = to.ip() else {
        return Err(std::io::ErrorKind::Unsupported.into());
    };
    let info = [[0u8; 4], source.octets(), [0; 4]].concat();
    let length: usize = 16 + info.len();
    let mut control = length.to_ne_bytes().to_vec();
    control.extend(libc::IPPROTO_IP.to_ne_bytes());
    control.extend(libc::IP_PKTINFO.to_ne_bytes());
    control.extend(info);
    control.resize(control.len().next_multiple_of(8), 0);
    let (target, question) = (SockAddr::from(own.local_addr()?), [IoSlice::new(b"question")]);
    sender.sendmsg(&MsgHdr::new().with_addr(&target).with_buffers(&question).with_control(&control), 0)?;
    let (_, asked_by) = own.recv_from(&mut [0; 16])?;
    assert_eq!(asked_by, to, "the question is not forged");
    own.send_to(b"answer", to)?;
    let mut buffer = [0; 16];
    let (length, _) = own.recv_from(&mut buffer)?;
    assert_eq!(&buffer[..length], b"answer");
    Ok(to.ip())
}
