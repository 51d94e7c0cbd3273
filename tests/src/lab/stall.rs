//! Open streams in every direction between two hosts, and how long they stood still: what a restart of an agent is judged by.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};

use super::mesh::Mesh;
use super::tool::{Event, Tool};
use super::wait_for;

/// The policy under which the streams run, between hosts `app-1` and `db-1`.
pub const POLICY: &str = "\
version: 1
components:
  postgres: {on: db-1,  attach: host, services: {sql: tcp/5432, stream: tcp/7001, echo: udp/7000}}
  n8n:      {on: app-1, attach: host, services: {api: tcp/8080}}
allow:
  - n8n -> postgres:sql
  - n8n -> postgres:stream
  - n8n -> postgres:echo
  - postgres -> n8n:api
";

const STREAM: u16 = 7001;
const ECHO: u16 = 7000;
const API: u16 = 8080;
/// How long a stream may take to open, and to go on.
const PATIENCE: Duration = Duration::from_secs(20);

/// A TCP stream from each of the two hosts to the other, one of them over IPv6, and a UDP stream; a message each ten milliseconds.
#[derive(Debug)]
pub struct Streams {
    listeners: Vec<Tool>,
    streams: Vec<(&'static str, Tool)>,
}

/// How long each stream of [`Streams`] stood still, in their order.
#[derive(Debug, Clone, Copy)]
pub struct Stalls {
    /// TCP, opened on `app-1`, over IPv4.
    pub tcp_out: Duration,
    /// TCP, opened on `db-1`, over IPv6.
    pub tcp_in: Duration,
    /// UDP, begun on `app-1`.
    pub udp: Duration,
}

impl Stalls {
    /// The longest of them.
    #[must_use]
    pub fn longest(&self) -> Duration {
        self.tcp_out.max(self.tcp_in).max(self.udp)
    }
}

impl Streams {
    /// Opens them, between components that stand on their hosts.
    ///
    /// # Errors
    /// If one does not open.
    pub fn open(mesh: &Mesh) -> Result<Self> {
        let (app, db) = (mesh.host("app-1")?.net(), mesh.host("db-1")?.net());
        let (n8n, postgres) = (mesh.instance("n8n", "app-1")?, mesh.instance("postgres", "db-1")?);
        let (out, back, echo) = ((postgres.v4, STREAM).into(), (n8n.v6, API).into(), (postgres.v4, ECHO).into());
        let listeners = vec![
            Tool::tcp_listen(db, out)?,
            Tool::tcp_listen(app, back)?,
            Tool::udp_listen(db, echo)?,
        ];
        let streams = vec![
            ("the TCP stream from app-1", Tool::tcp_stream(app, out)?),
            ("the TCP stream from db-1", Tool::tcp_stream(db, back)?),
            ("the UDP stream from app-1", Tool::udp_stream(app, echo)?),
        ];
        let streams = Self { listeners, streams };
        streams.must_go_on()?;
        Ok(streams)
    }

    /// Insists that each of them receives more, from now on.
    ///
    /// # Errors
    /// If one was cut, or stands still.
    pub fn must_go_on(&self) -> Result<()> {
        for (name, stream) in &self.streams {
            let now = SystemTime::now();
            wait_for(&format!("{name} to go on"), PATIENCE, || {
                let events = stream.events()?;
                ensure!(!was_cut(&events), "{name} was cut: {:?}", events.last());
                Ok(events.last().filter(|e| e.what == "received" && e.at > now).map(drop))
            })?;
        }
        Ok(())
    }

    /// When any of them received something for the last time.
    ///
    /// # Errors
    /// If a tool wrote something that is no event.
    pub fn last_received(&self) -> Result<SystemTime> {
        let mut last = SystemTime::UNIX_EPOCH;
        for (_, stream) in &self.streams {
            last = last.max(stream.last("received")?.map_or(last, |event| event.at));
        }
        Ok(last)
    }

    /// The longest time without anything received that ended after `since`, of each; insists that none was cut at either end.
    ///
    /// # Errors
    /// If one was cut.
    pub fn stalls(&self, since: SystemTime) -> Result<Stalls> {
        for listener in &self.listeners {
            ensure!(!was_cut(&listener.events()?), "a listener's end was cut");
        }
        let gap = |position: usize| -> Result<Duration> {
            let (_, stream) = self.streams.get(position).context("three streams")?;
            Ok(longest_gap(&stream.events()?, since))
        };
        Ok(Stalls {
            tcp_out: gap(0)?,
            tcp_in: gap(1)?,
            udp: gap(2)?,
        })
    }
}

/// TCP tells its end; for UDP a refusal while the agent was away is no end.
fn was_cut(events: &[Event]) -> bool {
    let ended = |e: &Event| {
        matches!(
            e.kind(),
            "ConnectionReset" | "BrokenPipe" | "ConnectionAborted" | "TimedOut" | "HostUnreachable"
        )
    };
    let is_tcp = events.iter().any(|e| e.what == "accepted" || e.fields.get("after_us").is_some());
    is_tcp && events.iter().any(|e| e.what == "closed" || e.what == "failed" && ended(e))
}

/// The longest time between two receipts of which the later is after `since`.
#[must_use]
pub fn longest_gap(events: &[Event], since: SystemTime) -> Duration {
    let times: Vec<SystemTime> = events.iter().filter(|e| e.what == "received").map(|e| e.at).collect();
    let pairs = times.iter().zip(times.iter().skip(1)).filter(|(_, later)| **later >= since);
    let gaps = pairs.filter_map(|(earlier, later)| later.duration_since(*earlier).ok());
    gaps.max().unwrap_or_default()
}
