//! The applications of the measurements: threads of this program with sockets inside the hosts' namespaces.
//!
//! A receiver notes when its last byte came; nothing is written down per message, so that the measurement costs little.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use cloison_tests::lab::netns::Netns;

/// TCP port of the receiving component.
pub(crate) const STREAM_PORT: u16 = 7000;
/// UDP port of the receiving component.
pub(crate) const DATAGRAM_PORT: u16 = 7001;
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How often a thread that waits for the network looks whether it shall end.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// The rate of the streams that are cut: a message of [`MESSAGE`] each.
const EVERY: Duration = Duration::from_millis(1);
const MESSAGE: [u8; 64] = [b'.'; 64];
/// Bytes of one write of a stream that is to be fast.
const CHUNK: usize = 128 * 1024;

/// A stream between two hosts, until dropped.
#[derive(Debug)]
pub(crate) struct Stream {
    seen: Arc<Seen>,
    threads: Vec<JoinHandle<()>>,
}

/// What the receiving side has seen.
#[derive(Debug, Default)]
struct Seen {
    /// Nanoseconds since 1970.
    last: AtomicU64,
    bytes: AtomicU64,
    /// Whether the receiver's socket has ended, by a reset or in order.
    ended: AtomicBool,
    stop: AtomicBool,
}

/// How a TCP stream is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pace {
    /// One small message each millisecond.
    Constant,
    /// As fast as it goes.
    Full,
}

impl Stream {
    /// Opens a TCP connection and sends on it.
    ///
    /// # Errors
    /// If it is not established within 5 s.
    pub(crate) fn tcp(from: &Netns, to: &Netns, at: SocketAddr, pace: Pace) -> Result<Self> {
        let listener = to.enter(move || TcpListener::bind(at).with_context(|| format!("listening on {at}")))?;
        let sender = from.enter(move || TcpStream::connect_timeout(&at, CONNECT_LIMIT).with_context(|| format!("connecting to {at}")))?;
        let (receiver, _) = listener.accept()?;
        Self::of_pair(sender, receiver, pace)
    }

    /// Sends on a connection that is there.
    ///
    /// # Errors
    /// If the sockets refuse their settings.
    pub(crate) fn of_pair(sender: TcpStream, receiver: TcpStream, pace: Pace) -> Result<Self> {
        sender.set_nodelay(pace == Pace::Constant)?;
        sender.set_write_timeout(Some(LOOK_EVERY))?;
        receiver.set_read_timeout(Some(LOOK_EVERY))?;
        Ok(Self::of(
            move |seen| match pace {
                Pace::Constant => send(sender, &MESSAGE, EVERY, seen),
                Pace::Full => send(sender, &[0; CHUNK], Duration::ZERO, seen),
            },
            move |seen| receive(receiver, seen),
        ))
    }

    /// Sends datagrams at a constant rate, and goes on whatever happens to them.
    ///
    /// # Errors
    /// If a socket cannot be made.
    pub(crate) fn udp(from: &Netns, to: &Netns, at: SocketAddr) -> Result<Self> {
        let receiver = to.enter(move || UdpSocket::bind(at).with_context(|| format!("listening on {at}")))?;
        let any = match at.ip() {
            IpAddr::V4(_) => IpAddr::from([0; 4]),
            IpAddr::V6(_) => IpAddr::from([0; 16]),
        };
        let sender = from.enter(move || {
            let socket = UdpSocket::bind((any, 0))?;
            socket.connect(at).with_context(|| format!("connecting to {at}"))?;
            Ok(socket)
        })?;
        receiver.set_read_timeout(Some(LOOK_EVERY))?;
        Ok(Self::of(
            move |seen| {
                while !seen.stop.load(Ordering::Relaxed) {
                    // What is denied comes back as an error. The next datagram is sent all the same: it must not arrive either.
                    let _ = sender.send(&MESSAGE);
                    std::thread::sleep(EVERY);
                }
            },
            move |seen| receive(Datagrams(receiver), seen),
        ))
    }

    /// Bytes received so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.seen.bytes.load(Ordering::Relaxed)
    }

    /// When the last byte was received.
    ///
    /// # Errors
    /// If there was none.
    pub(crate) fn last(&self) -> Result<SystemTime> {
        let last = self.seen.last.load(Ordering::Relaxed);
        ensure!(last > 0, "nothing was received");
        Ok(SystemTime::UNIX_EPOCH + Duration::from_nanos(last))
    }

    /// Whether the receiver's socket has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.seen.ended.load(Ordering::Relaxed)
    }

    fn of(sender: impl FnOnce(&Seen) + Send + 'static, receiver: impl FnOnce(&Seen) + Send + 'static) -> Self {
        let seen = Arc::new(Seen::default());
        let (for_sender, for_receiver) = (Arc::clone(&seen), Arc::clone(&seen));
        let threads = vec![
            std::thread::spawn(move || sender(&for_sender)),
            std::thread::spawn(move || receiver(&for_receiver)),
        ];
        Self { seen, threads }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.seen.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Reads datagrams as if they were a stream.
struct Datagrams(UdpSocket);

impl Read for Datagrams {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.recv(buffer)
    }
}

fn send(mut stream: TcpStream, what: &[u8], pause: Duration, seen: &Seen) {
    while !seen.stop.load(Ordering::Relaxed) {
        match stream.write(what) {
            Ok(_) => {}
            Err(error) if is_a_pause(&error) => {}
            Err(_) => return,
        }
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
    }
}

fn receive(mut from: impl Read, seen: &Seen) {
    let mut buffer = vec![0; 2 * CHUNK];
    while !seen.stop.load(Ordering::Relaxed) {
        match from.read(&mut buffer) {
            Ok(count) if count > 0 => {
                let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                seen.last
                    .store(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
                seen.bytes.fetch_add(u64::try_from(count).unwrap_or(0), Ordering::Relaxed);
            }
            Err(error) if is_a_pause(&error) => {}
            Ok(_) | Err(_) => break,
        }
    }
    seen.ended.store(true, Ordering::Relaxed);
}

fn is_a_pause(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}
