//! What it costs that a component is a part of its host: the same conversations between two hosts that are one component each and between
//! two whose components are users, by turns; and on one machine, between two users through the mesh and on plain loopback.
//!
//! Each way is measured with streams as fast as they go, with messages that wait for their echo, and with new connections one behind the
//! other. Whose a socket is follows from the thread that makes it: it takes on the user first.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cloison_tests::lab::Underlay;
use cloison_tests::lab::mesh::Mesh;
use cloison_tests::lab::netns::Netns;
use cloison_tests::lab::wait_for;
use rustix::thread::{Uid, set_thread_res_uid};
use serde::Serialize;

use crate::attached::{self, Attached};
use crate::report::{Times, median};
use crate::talk::{self, Pace, Stream};
use crate::{NAME, machine};

/// Hosts that are one component each, hosts with users as components, and one machine with two of them.
const HOSTS: [&str; 6] = ["whole-1", "whole-2", "users-1", "users-2", "all-1", attached::HOST];
const SENDER: u32 = 2001;
const RECEIVER: u32 = 2002;
const PORT: u16 = talk::STREAM_PORT;
const ECHO_PORT: u16 = 7002;
/// Messages and connections of one round.
const MESSAGES: usize = 1_000;
const CONNECTIONS: usize = 200;
const MESSAGE: [u8; 64] = [b'.'; 64];
const WARM_UP: Duration = Duration::from_millis(500);
const START_LIMIT: Duration = Duration::from_secs(10);

/// All ways, side by side.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Components {
    pub(crate) machine: machine::Machine,
    /// In the order of [`WAYS`].
    pub(crate) ways: Vec<Figures>,
    /// And of what a component is.
    pub(crate) attached: Attached,
}

/// What one way did.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Figures {
    pub(crate) way: &'static str,
    /// Median megabits per second of one stream.
    pub(crate) mbit_s: f64,
    /// Median over the rounds of its throughput by that of the first way in the same round.
    pub(crate) by_first: f64,
    /// A message and its echo, in milliseconds.
    pub(crate) round_trip: Times,
    /// A new connection, in milliseconds.
    pub(crate) connection: Times,
}

const WAYS: [&str; 4] = [
    "two hosts, a component each",
    "two hosts, components that are users",
    "one machine, components that are users",
    "one machine, plain loopback",
];

/// One end of a conversation.
#[derive(Clone)]
struct End {
    net: Netns,
    user: Option<u32>,
}

/// What the rounds of one way gave.
#[derive(Default)]
struct Measured {
    streams: Vec<f64>,
    round_trips: Vec<f64>,
    connections: Vec<f64>,
}

struct Way {
    from: End,
    to: End,
    address: IpAddr,
}

/// Measures `rounds` rounds of all ways by turns, `span` of each stream.
pub(crate) fn measure(rounds: usize, span: Duration) -> Result<Components> {
    let machine = machine::describe()?;
    let mut mesh = Mesh::builder(NAME, &HOSTS).lab(|lab| lab.underlay(Underlay::V4)).start()?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(&policy())?;
    let ways = ways(&mesh)?;
    let mut all: Vec<Measured> = ways.iter().map(|_| Measured::default()).collect();
    for round in 0..rounds {
        // Who begins changes from round to round: what drifts meets all alike.
        for number in (0..ways.len()).map(|n| (n + round) % ways.len()) {
            if let (Some(way), Some(name), Some(measured)) = (ways.get(number), WAYS.get(number), all.get_mut(number)) {
                way.measure(span, measured).context(*name)?;
            }
        }
        eprintln!("round {} of {rounds}", round + 1);
    }
    let attached = attached::measure(&mut mesh, &policy())?;
    mesh.finish()?;
    let first = all.first().map(|measured| measured.streams.clone()).unwrap_or_default();
    let figures = WAYS.iter().zip(all).map(|(way, measured)| Figures {
        way,
        by_first: median(measured.streams.iter().zip(&first).map(|(own, first)| own / first).collect()),
        mbit_s: median(measured.streams),
        round_trip: Times::of(measured.round_trips),
        connection: Times::of(measured.connections),
    });
    Ok(Components {
        machine,
        ways: figures.collect(),
        attached,
    })
}

fn policy() -> String {
    let services = format!("services: {{talk: [tcp/{PORT}, tcp/{ECHO_PORT}]}}");
    format!(
        "version: 1\n\
         components:\n  \
           whole-from: {{on: whole-1, attach: host}}\n  \
           whole-to:   {{on: whole-2, attach: host, {services}}}\n  \
           user-from:  {{on: users-1, attach: {{user: {SENDER}}}}}\n  \
           user-to:    {{on: users-2, attach: {{user: {RECEIVER}}}, {services}}}\n  \
           here-from:  {{on: all-1, attach: {{user: {SENDER}}}}}\n  \
           here-to:    {{on: all-1, attach: {{user: {RECEIVER}}}, {services}}}\n\
         allow:\n  - whole-from -> whole-to:talk\n  - user-from -> user-to:talk\n  - here-from -> here-to:talk\n"
    )
}

/// In the order of [`WAYS`].
fn ways(mesh: &Mesh) -> Result<Vec<Way>> {
    let end = |host: &str, user| -> Result<End> {
        let net = mesh.host(host)?.net().clone();
        Ok(End { net, user })
    };
    Ok(vec![
        Way {
            from: end("whole-1", None)?,
            to: end("whole-2", None)?,
            address: mesh.instance("whole-to", "whole-2")?.v4.into(),
        },
        Way {
            from: end("users-1", Some(SENDER))?,
            to: end("users-2", Some(RECEIVER))?,
            address: mesh.instance("user-to", "users-2")?.v4.into(),
        },
        Way {
            from: end("all-1", Some(SENDER))?,
            to: end("all-1", Some(RECEIVER))?,
            address: mesh.instance("here-to", "all-1")?.v4.into(),
        },
        Way {
            from: end("all-1", None)?,
            to: end("all-1", None)?,
            address: Ipv4Addr::LOCALHOST.into(),
        },
    ])
}

impl End {
    /// Runs a closure inside the namespace as the user: sockets that it makes are the user's.
    fn enter<T: Send + 'static>(&self, body: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        let user = self.user;
        self.net.enter(move || {
            if let Some(user) = user.map(Uid::from_raw) {
                // Of this thread alone, which ends with the closure.
                set_thread_res_uid(user, user, user)?;
            }
            body()
        })
    }
}

impl Way {
    fn measure(&self, span: Duration, into: &mut Measured) -> Result<()> {
        into.streams.push(self.stream(span)?);
        into.round_trips.extend(self.round_trips()?);
        into.connections.extend(self.connections()?);
        Ok(())
    }

    fn pair(&self, port: u16) -> Result<(TcpStream, TcpStream)> {
        let at = SocketAddr::new(self.address, port);
        let listener = self
            .to
            .enter(move || TcpListener::bind(at).with_context(|| format!("listening on {at}")))?;
        let sender = self.from.enter(move || connect(at))?;
        // Who takes a connection has its socket: it must be the same user who listens.
        let receiver = self.to.enter(move || Ok(listener.accept()?.0))?;
        Ok((sender, receiver))
    }

    /// Megabits per second of one stream.
    fn stream(&self, span: Duration) -> Result<f64> {
        let (sender, receiver) = self.pair(PORT)?;
        let stream = Stream::of_pair(sender, receiver, Pace::Full)?;
        wait_for("the stream to flow", START_LIMIT, || Ok((stream.bytes() > 0).then_some(())))?;
        std::thread::sleep(WARM_UP);
        let (start, before) = (Instant::now(), stream.bytes());
        std::thread::sleep(span);
        let (took, bytes) = (start.elapsed(), stream.bytes() - before);
        ensure!(bytes > 0, "the stream stood still");
        Ok(f64::from(u32::try_from(bytes / 1000)?) * 8e-3 / took.as_secs_f64())
    }

    /// Milliseconds of each message and its echo.
    fn round_trips(&self) -> Result<Vec<f64>> {
        let (mut sender, mut receiver) = self.pair(ECHO_PORT)?;
        sender.set_nodelay(true)?;
        receiver.set_nodelay(true)?;
        sender.set_read_timeout(Some(START_LIMIT))?;
        let echo = std::thread::spawn(move || {
            let mut buffer = MESSAGE;
            while receiver.read_exact(&mut buffer).is_ok() && receiver.write_all(&buffer).is_ok() {}
        });
        let mut times = Vec::with_capacity(MESSAGES);
        let mut buffer = MESSAGE;
        for _ in 0..MESSAGES {
            let start = Instant::now();
            sender.write_all(&MESSAGE)?;
            sender.read_exact(&mut buffer)?;
            times.push(milliseconds(start.elapsed()));
        }
        drop(sender);
        let _ = echo.join();
        Ok(times)
    }

    /// Milliseconds of each new connection.
    fn connections(&self) -> Result<Vec<f64>> {
        let at = SocketAddr::new(self.address, PORT);
        let listener = self
            .to
            .enter(move || TcpListener::bind(at).with_context(|| format!("listening on {at}")))?;
        let to = self.to.clone();
        let accepting = std::thread::spawn(move || {
            to.enter(move || {
                listener.incoming().take(CONNECTIONS).for_each(drop);
                Ok(())
            })
        });
        let times = self.from.enter(move || {
            let mut times = Vec::with_capacity(CONNECTIONS);
            for _ in 0..CONNECTIONS {
                let start = Instant::now();
                let stream = connect(at)?;
                times.push(milliseconds(start.elapsed()));
                drop(stream);
            }
            Ok(times)
        });
        let _ended = accepting.join();
        times
    }
}

fn connect(at: SocketAddr) -> Result<TcpStream> {
    TcpStream::connect_timeout(&at, START_LIMIT).with_context(|| format!("connecting to {at}"))
}

fn milliseconds(span: Duration) -> f64 {
    span.as_secs_f64() * 1e3
}

impl Components {
    /// One line a way.
    pub(crate) fn table(&self) -> String {
        let line = |figures: &Figures| {
            format!(
                "{:40} {:8.0} Mbit/s ({:.2} of the first)   round trip {}   connection {}\n",
                figures.way,
                figures.mbit_s,
                figures.by_first,
                figures.round_trip.p50_and_p99(),
                figures.connection.p50_and_p99()
            )
        };
        self.ways.iter().map(line).collect::<String>() + &self.attached.table()
    }
}
