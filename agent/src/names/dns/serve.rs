//! The sockets of one namespace and who works on them: UDP and TCP on port 53 of the resolver's addresses, opened by a thread inside the
//! namespace, served by tasks of the agent's runtime.
//!
//! A question goes: socket -> who asks ([`may_ask`]) -> [`answer`] of the zone in force -> the same socket. The zone is
//! one pointer that is swapped as a whole. When a [`Server`] is dropped, its tasks end and its sockets with them, so that they keep no
//! namespace alive.
//!
//! What one namespace can cost is bounded here: questions a second, streams, their length and their time. Who asks more waits, and what the
//! kernel cannot hold of that is lost, which a stub resolver takes for a lost datagram.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use cloison_proto::net::{AddressPair, OverlayRange};
use parking_lot::Mutex;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::answer::{Transport, answer};
use super::zone::Zone;
use crate::sys::clock;
use crate::sys::netns::{NetNs, NetNsError};

/// The port of DNS.
pub const PORT: u16 = 53;

/// Questions a second that one socket answers: a busy program that keeps nothing asks some hundred times a second, and an answer takes some
/// ten microseconds, so that a flood costs a few percent of one processor.
const PER_SECOND: u32 = 2_000;

/// Questions at once, before the rate counts.
const BURST: u32 = 500;

/// What the kernel holds of questions that wait, in bytes: half a second at the rate, at the kernel's price of some 800 bytes for a short one.
const WAITING_BYTES: usize = 512 * 1024;

/// Longest question in a datagram, in bytes; a name has at most 255, and longer ones are malformed by that.
const LONGEST_QUESTION: usize = 1232;

/// Streams at once, on one socket: TCP is for the rare answer that is too long for UDP.
const STREAMS: usize = 16;

/// How long a stream may say nothing, in the middle of a question too, or take nothing.
const IDLE: Duration = Duration::from_secs(3);

/// How long a stream may last: nobody holds the few there are for good.
const STREAM_LASTS: Duration = Duration::from_secs(20);

/// How long a socket rests that reports an error: out of files, out of memory.
const REST: Duration = Duration::from_millis(200);

/// Why a namespace is not served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The namespace cannot be entered.
    #[error(transparent)]
    Namespace(#[from] NetNsError),
    /// Another program has the port.
    #[error("another program uses port {PORT} of {0}, or of all addresses")]
    Taken(IpAddr),
    /// The agent lacks a privilege.
    #[error("not permitted to use port {PORT} of {0}")]
    NotPermitted(IpAddr),
    /// The kernel refused.
    #[error("cannot use port {PORT} of {0}: {1}")]
    Socket(IpAddr, #[source] io::Error),
    /// The agent's runtime refused.
    #[error("cannot serve: {0}")]
    Runtime(#[source] io::Error),
}

impl ServeError {
    fn new(address: IpAddr, error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EADDRINUSE) => Self::Taken(address),
            Some(libc::EACCES | libc::EPERM) => Self::NotPermitted(address),
            Some(_) | None => Self::Socket(address, error),
        }
    }

    /// What to do about it.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::Namespace(_) | Self::Socket(..) | Self::Runtime(_) => {
                "it is tried again every few seconds; `resolver = false` does without"
            }
            Self::Taken(_) => {
                "have the other DNS server listen on its own addresses alone (`bind-interfaces`, `listen-on`), or set `resolver = false`"
            }
            Self::NotPermitted(_) => "give the agent's unit CAP_NET_BIND_SERVICE, or set `resolver = false`",
        }
    }
}

/// A namespace that is served.
#[derive(Debug)]
pub struct Server {
    zone: Arc<ArcSwap<Zone>>,
    /// Ends with this value.
    _tasks: JoinSet<()>,
}

impl Server {
    /// Opens the sockets in the namespace, whose TUN must have the resolver's addresses, and serves `zone` on them.
    ///
    /// # Errors
    /// [`ServeError`]; no socket is open then.
    pub fn start(namespace: &NetNs, zone: Zone, runtime: &Handle) -> Result<Self, ServeError> {
        let (resolver, range, has_ipv6) = (zone.range().resolver(), zone.range(), zone.has_ipv6());
        let sockets = namespace.run(|| open_all(resolver, has_ipv6))??;
        let zone = Arc::new(ArcSwap::from_pointee(zone));
        let mut tasks = JoinSet::new();
        let _inside = runtime.enter();
        for (datagrams, streams) in sockets {
            let datagrams = UdpSocket::from_std(datagrams).map_err(ServeError::Runtime)?;
            let streams = TcpListener::from_std(streams).map_err(ServeError::Runtime)?;
            tasks.spawn(serve_datagrams(datagrams, zone.clone(), range));
            tasks.spawn(serve_streams(streams, zone.clone(), range));
        }
        Ok(Self { zone, _tasks: tasks })
    }

    /// Answers from this zone from now on.
    pub fn tell(&self, zone: Zone) {
        self.zone.store(Arc::new(zone));
    }

    /// The zone that is told.
    #[must_use]
    pub fn zone(&self) -> Arc<Zone> {
        self.zone.load_full()
    }
}

type Sockets = (std::net::UdpSocket, std::net::TcpListener);

fn open_all(resolver: AddressPair, has_ipv6: bool) -> Result<Vec<Sockets>, ServeError> {
    let usable = resolver.both().into_iter().filter(|address| address.is_ipv4() || has_ipv6);
    usable
        .map(|address| open(address).map_err(|error| ServeError::new(address, error)))
        .collect()
}

fn open(address: IpAddr) -> io::Result<Sockets> {
    let (at, domain) = (SocketAddr::new(address, PORT), Domain::for_address(SocketAddr::new(address, PORT)));
    let socket = |kind, protocol| {
        let socket = Socket::new(domain, kind, Some(protocol))?;
        socket.set_nonblocking(true)?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        Ok::<_, io::Error>(socket)
    };
    // Never with SO_REUSEADDR on UDP, by which another socket could share the address.
    let datagrams = socket(Type::DGRAM, Protocol::UDP)?;
    datagrams.set_recv_buffer_size(WAITING_BYTES)?;
    datagrams.bind(&at.into())?;
    let streams = socket(Type::STREAM, Protocol::TCP)?;
    // On TCP it means: past the rests of streams that ended.
    streams.set_reuse_address(true)?;
    streams.bind(&at.into())?;
    streams.listen(i32::try_from(STREAMS).unwrap_or(i32::MAX))?;
    Ok((datagrams.into(), streams.into()))
}

/// Whether somebody with this address may ask. The sockets' address is on no wire, and the base table drops what comes for it from there;
/// should that be gone for a moment, nobody else can be answered: nothing leaves the machine towards these addresses.
fn may_ask(range: OverlayRange, from: SocketAddr) -> bool {
    range.contains(from.ip()) || from.ip().is_loopback()
}

async fn serve_datagrams(socket: UdpSocket, zone: Arc<ArcSwap<Zone>>, range: OverlayRange) {
    let rate = Rate::default();
    // A datagram that fills it was longer, perhaps.
    let mut buffer = [0; LONGEST_QUESTION + 1];
    loop {
        rate.wait().await;
        let (length, from) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                tracing::debug!(%error, "a question was lost");
                sleep(REST).await;
                continue;
            }
        };
        let Some(question) = buffer.get(..length).filter(|q| q.len() <= LONGEST_QUESTION && may_ask(range, from)) else {
            continue;
        };
        if let Some(answer) = answer(question, &zone.load(), Transport::Udp, clock::now()) {
            // Who asked may be gone.
            let _ = socket.send_to(&answer, from).await;
        }
    }
}

async fn serve_streams(listener: TcpListener, zone: Arc<ArcSwap<Zone>>, range: OverlayRange) {
    let (rate, places) = (Arc::new(Rate::default()), Arc::new(Semaphore::new(STREAMS)));
    let mut streams = JoinSet::new();
    // The semaphore is never closed.
    while let Ok(place) = places.clone().acquire_owned().await {
        while streams.try_join_next().is_some() {}
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "a stream was lost");
                sleep(REST).await;
                continue;
            }
        };
        if !may_ask(range, from) {
            continue;
        }
        let (zone, rate) = (zone.clone(), rate.clone());
        streams.spawn(async move {
            // However it ends, the stream is closed.
            let _ = timeout(STREAM_LASTS, converse(stream, &zone, &rate)).await;
            drop(place);
        });
    }
}

/// One question after the other, each behind its length (RFC 7766).
async fn converse(mut stream: TcpStream, zone: &ArcSwap<Zone>, rate: &Rate) -> io::Result<()> {
    loop {
        let length = timeout(IDLE, stream.read_u16()).await??;
        let mut question = vec![0; usize::from(length)];
        if question.len() > LONGEST_QUESTION {
            return Ok(());
        }
        timeout(IDLE, stream.read_exact(&mut question)).await??;
        rate.wait().await;
        let answer = answer(&question, &zone.load(), Transport::Tcp, clock::now());
        let Some(answer) = answer else { return Ok(()) };
        let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
        let framed = [&length.to_be_bytes()[..], &answer].concat();
        timeout(IDLE, stream.write_all(&framed)).await??;
    }
}

/// How many questions may be answered: [`BURST`], and [`PER_SECOND`] more each second.
#[derive(Debug)]
struct Rate {
    /// When the burst would be whole again.
    whole_at: Mutex<Instant>,
}

impl Default for Rate {
    fn default() -> Self {
        Self {
            whole_at: Mutex::new(Instant::now()),
        }
    }
}

impl Rate {
    /// Takes one question, when there is one to take.
    async fn wait(&self) {
        let each = Duration::from_secs(1) / PER_SECOND;
        let (now, until) = (Instant::now(), {
            let mut whole_at = self.whole_at.lock();
            *whole_at = (*whole_at).max(Instant::now()) + each;
            *whole_at
        });
        let ahead = until.saturating_duration_since(now);
        if let Some(too_far) = ahead.checked_sub(each * BURST) {
            sleep(too_far).await;
        }
    }
}
