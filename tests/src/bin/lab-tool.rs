//! The lab's own small talker: streams and listeners that report as lines of JSON what reached them and when, and how they were cut.
//!
//! Each line has `t` (nanoseconds since 1970) and `event`. `failed` carries the error's `kind` (`ConnectionReset`, `PermissionDenied`, ...),
//! and its number `os`. Exit status: 0 when done, 1 when used wrongly, 2 when it could not connect, 3 when cut later.

#![forbid(unsafe_code)]

use std::io::{ErrorKind, Read, Write, stdin, stdout};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use clap::{Parser, Subcommand};
use cloison_tests::lab::{cleanup, sockets};
use etherparse::PacketBuilder;
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};

/// Bytes of one message of a stream.
const MESSAGE_LEN: usize = 64;

#[derive(Debug, Parser)]
#[command(about = "Streams and listeners for the lab, reporting as lines of JSON")]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Accepts TCP connections and echoes what comes.
    TcpListen {
        /// Where to listen.
        at: SocketAddr,
    },
    /// Connects over TCP, sends a message each interval, and reads the echoes.
    TcpStream {
        /// Where to connect to.
        to: SocketAddr,
        #[command(flatten)]
        pace: Pace,
        /// Sends one message, waits for its echo, and then only reads.
        #[arg(long)]
        idle: bool,
        /// The source address to bind; the kernel's choice by default.
        #[arg(long)]
        from: Option<IpAddr>,
    },
    /// Echoes UDP datagrams.
    UdpListen {
        /// Where to listen.
        at: SocketAddr,
    },
    /// Sends a UDP datagram each interval from one connected socket, reads the echoes, and goes on after errors.
    UdpStream {
        /// Where to send to.
        to: SocketAddr,
        #[command(flatten)]
        pace: Pace,
        /// The source address to bind; the kernel's choice by default.
        #[arg(long)]
        from: Option<IpAddr>,
    },
    /// Sends UDP datagrams, 10 ms apart, with any source: through a raw socket, which takes CAP_NET_RAW.
    Forge {
        /// The source to claim.
        from: SocketAddr,
        /// Where to send to.
        to: SocketAddr,
        /// How many.
        #[arg(long, default_value_t = 5)]
        count: u64,
    },
    /// Makes sockets of every shape as it is told: an order a line on its standard input, an answer a line on its output.
    Obey,
    /// Becomes another program, with the descriptors that a service manager of the lab keeps, numbered from 3 on.
    WithKept {
        /// The manager's socket.
        manager: PathBuf,
        /// The program and its arguments.
        #[arg(last = true, required = true)]
        line: Vec<String>,
    },
    /// Ends all labs on this machine, running, kept or left behind, and removes what they made.
    Clean,
}

#[derive(Debug, Clone, Copy, clap::Args)]
struct Pace {
    /// Milliseconds between messages.
    #[arg(long, default_value_t = 10)]
    every_ms: u64,
    /// How many messages to send; without end by default.
    #[arg(long, default_value_t = u64::MAX)]
    count: u64,
    /// How long to wait for the connection, in milliseconds.
    #[arg(long, default_value_t = 5000)]
    connect_ms: u64,
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().what {
        What::TcpListen { at } => tcp_listen(at),
        What::TcpStream { to, pace, idle, from } => tcp_stream(to, pace, idle, from),
        What::UdpListen { at } => udp_listen(at),
        What::UdpStream { to, pace, from } => udp_stream(to, pace, from),
        What::Forge { from, to, count } => forge(from, to, count),
        What::Obey => sockets::obey(stdin().lock(), stdout()).map(|()| ExitCode::SUCCESS),
        What::WithKept { manager, line } => Err(with_kept(&manager, &line)),
        What::Clean => clean(),
    };
    outcome.unwrap_or_else(|error| {
        report_failure("start", &error, 0);
        ExitCode::from(2)
    })
}

/// Returns only if it failed.
fn with_kept(manager: &Path, line: &[String]) -> std::io::Error {
    let become_it = || {
        let (names, fds) = cloison_tests::lab::manager::fetch(manager).map_err(std::io::Error::other)?;
        let mut numbered = Vec::new();
        for fd in fds {
            // The lowest free number from 3 on: those before it are taken.
            let low = rustix::io::fcntl_dupfd_cloexec(&fd, 3)?;
            rustix::io::fcntl_setfd(&low, rustix::io::FdFlags::empty())?;
            numbered.push(low);
        }
        let (program, arguments) = line.split_first().ok_or(ErrorKind::InvalidInput)?;
        let mut command = std::process::Command::new(program);
        command.args(arguments);
        if !numbered.is_empty() {
            command.env("LISTEN_PID", std::process::id().to_string());
            command.env("LISTEN_FDS", numbered.len().to_string()).env("LISTEN_FDNAMES", names);
        }
        Err(std::os::unix::process::CommandExt::exec(&mut command))
    };
    become_it().unwrap_or_else(|error| error)
}

fn tcp_listen(at: SocketAddr) -> std::io::Result<ExitCode> {
    let listener = TcpListener::bind(at)?;
    report("listening", json!({ "at": listener.local_addr()? }));
    loop {
        let (stream, peer) = listener.accept()?;
        report("accepted", json!({ "peer": peer }));
        std::thread::spawn(move || echo_tcp(stream, peer));
    }
}

fn echo_tcp(mut stream: TcpStream, peer: SocketAddr) {
    let _ = stream.set_nodelay(true);
    let (mut buffer, mut total) = ([0; 65_536], 0);
    loop {
        let outcome = match stream.read(&mut buffer) {
            Ok(0) => {
                report("closed", json!({ "peer": peer, "total": total }));
                return;
            }
            Ok(count) => {
                total += count;
                report("received", json!({ "peer": peer, "total": total }));
                stream.write_all(buffer.get(..count).unwrap_or_default())
            }
            Err(error) => Err(error),
        };
        if let Err(error) = outcome {
            report_failure("stream", &error, total);
            return;
        }
    }
}

fn tcp_stream(to: SocketAddr, pace: Pace, idle: bool, from: Option<IpAddr>) -> std::io::Result<ExitCode> {
    let start = Instant::now();
    let mut stream = match connect(to, from, Duration::from_millis(pace.connect_ms)) {
        Ok(stream) => stream,
        Err(error) => {
            report_failure("connect", &error, 0);
            report("gave_up", json!({ "after_us": start.elapsed().as_micros() }));
            return Ok(ExitCode::from(2));
        }
    };
    stream.set_nodelay(true)?;
    report(
        "connected",
        json!({ "local": stream.local_addr()?, "after_us": start.elapsed().as_micros() }),
    );
    let reader = stream.try_clone()?;
    let cut = Arc::new(AtomicBool::new(false));
    let wanted = if idle {
        u64::MAX
    } else {
        pace.count.saturating_mul(MESSAGE_LEN.try_into().unwrap_or(u64::MAX))
    };
    let reading = {
        let cut = Arc::clone(&cut);
        std::thread::spawn(move || read_echoes(reader, wanted, &cut))
    };
    let messages = if idle { 1 } else { pace.count };
    for number in 0..messages {
        if cut.load(Ordering::Relaxed) {
            break;
        }
        if let Err(error) = stream.write_all(&message(number)) {
            // The reader names the cause; a socket reports a reset once, to whoever asks first.
            report_failure("write", &error, number);
            cut.store(true, Ordering::Relaxed);
            break;
        }
        std::thread::sleep(Duration::from_millis(pace.every_ms));
    }
    let _ = reading.join();
    if cut.load(Ordering::Relaxed) {
        return Ok(ExitCode::from(3));
    }
    report("done", json!({}));
    Ok(ExitCode::SUCCESS)
}

fn connect(to: SocketAddr, from: Option<IpAddr>, within: Duration) -> std::io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    if let Some(from) = from {
        socket.bind(&SocketAddr::new(from, 0).into())?;
    }
    socket.connect_timeout(&to.into(), within)?;
    Ok(socket.into())
}

fn read_echoes(mut stream: TcpStream, wanted: u64, cut: &AtomicBool) {
    let (mut buffer, mut total) = ([0; 65_536], 0_u64);
    while total < wanted {
        match stream.read(&mut buffer) {
            Ok(0) => {
                report("closed", json!({ "total": total }));
                cut.store(true, Ordering::Relaxed);
                return;
            }
            Ok(count) => {
                total += u64::try_from(count).unwrap_or(0);
                report("received", json!({ "total": total }));
            }
            Err(error) => {
                report_failure("read", &error, total);
                cut.store(true, Ordering::Relaxed);
                return;
            }
        }
    }
}

fn udp_listen(at: SocketAddr) -> std::io::Result<ExitCode> {
    let socket = UdpSocket::bind(at)?;
    report("listening", json!({ "at": socket.local_addr()? }));
    let (mut buffer, mut total) = ([0; 65_536], 0_u64);
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((count, peer)) => {
                total += 1;
                report("received", json!({ "peer": peer, "bytes": count, "total": total }));
                if let Err(error) = socket.send_to(buffer.get(..count).unwrap_or_default(), peer) {
                    report_failure("write", &error, total);
                }
            }
            Err(error) => report_failure("read", &error, total),
        }
    }
}

fn udp_stream(to: SocketAddr, pace: Pace, from: Option<IpAddr>) -> std::io::Result<ExitCode> {
    let any = if to.is_ipv4() {
        IpAddr::from([0; 4])
    } else {
        IpAddr::from([0; 16])
    };
    let socket = UdpSocket::bind((from.unwrap_or(any), 0))?;
    if let Err(error) = socket.connect(to) {
        report_failure("connect", &error, 0);
        report("done", json!({ "received": 0, "failures": 1 }));
        return Ok(ExitCode::from(2));
    }
    report("connected", json!({ "local": socket.local_addr()? }));
    let interval = Duration::from_millis(pace.every_ms.max(1));
    let (mut buffer, mut total, mut failures) = ([0; 65_536], 0_u64, 0_u64);
    for number in 0..pace.count {
        if let Err(error) = socket.send(&message(number)) {
            failures += 1;
            report_failure("write", &error, number);
        }
        let next = Instant::now() + interval;
        while let Some(left) = next.checked_duration_since(Instant::now()).filter(|d| !d.is_zero()) {
            socket.set_read_timeout(Some(left))?;
            match socket.recv(&mut buffer) {
                Ok(count) => {
                    total += 1;
                    report("received", json!({ "bytes": count, "total": total }));
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => {
                    failures += 1;
                    report_failure("read", &error, total);
                }
            }
        }
    }
    report("done", json!({ "received": total, "failures": failures }));
    Ok(ExitCode::SUCCESS)
}

fn forge(from: SocketAddr, to: SocketAddr, count: u64) -> std::io::Result<ExitCode> {
    let ip = match (from, to) {
        (SocketAddr::V4(from), SocketAddr::V4(to)) => PacketBuilder::ipv4(from.ip().octets(), to.ip().octets(), 64),
        (SocketAddr::V6(from), SocketAddr::V6(to)) => PacketBuilder::ipv6(from.ip().octets(), to.ip().octets(), 64),
        (SocketAddr::V4(_), SocketAddr::V6(_)) | (SocketAddr::V6(_), SocketAddr::V4(_)) => return Err(ErrorKind::InvalidInput.into()),
    };
    let mut packet = Vec::new();
    let udp = ip.udp(from.port(), to.port());
    udp.write(&mut packet, &message(0)).map_err(std::io::Error::other)?;
    // IPPROTO_RAW: the packet has its header already.
    let socket = Socket::new(Domain::for_address(to), Type::RAW, Some(Protocol::from(255)))?;
    let mut target = to;
    target.set_port(0);
    let mut failures = 0_u64;
    for number in 0..count {
        if let Err(error) = socket.send_to(&packet, &target.into()) {
            failures += 1;
            report_failure("write", &error, number);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    report("done", json!({ "sent": count - failures, "failures": failures }));
    Ok(ExitCode::SUCCESS)
}

fn clean() -> std::io::Result<ExitCode> {
    let outcome = cleanup::remove_all();
    if let Err(error) = &outcome {
        eprintln!("{error:#}");
    }
    Ok(if outcome.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A message whose number can be read in a capture.
fn message(number: u64) -> [u8; MESSAGE_LEN] {
    let mut message = [b'.'; MESSAGE_LEN];
    let text = format!("lab-tool message {number:>20}");
    message.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
    message
}

fn report_failure(at: &str, error: &std::io::Error, total: impl Into<Value>) {
    report(
        "failed",
        json!({ "at": at, "kind": format!("{:?}", error.kind()), "os": error.raw_os_error(), "total": total.into() }),
    );
}

/// Writes one line in one piece, so that threads do not mix theirs.
fn report(event: &str, mut fields: Value) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    if let Some(fields) = fields.as_object_mut() {
        fields.insert("t".to_owned(), json!(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)));
        fields.insert("event".to_owned(), json!(event));
    }
    let _ = stdout().lock().write_all(format!("{fields}\n").as_bytes());
}
