//! Drives `lab-tool`: streams and listeners inside a namespace or a container, and what they saw, with times.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::netns::Netns;
use super::process::Process;
use super::{programs, wait_for};

const START_LIMIT: Duration = Duration::from_secs(10);

/// Where `lab-tool` can run.
pub trait Room {
    /// Starts it there with these arguments.
    ///
    /// # Errors
    /// If it has not been built.
    fn start_tool(&self, name: &str, arguments: &[&str]) -> Result<Process>;
}

impl Room for Netns {
    fn start_tool(&self, name: &str, arguments: &[&str]) -> Result<Process> {
        let mut command = self.command(&programs::find("lab-tool")?.display().to_string());
        command.args(arguments);
        self.start(name, command)
    }
}

/// A running `lab-tool`.
#[derive(Debug)]
pub struct Tool {
    process: Process,
}

/// One line that it wrote.
#[derive(Debug, Clone)]
pub struct Event {
    /// When.
    pub at: SystemTime,
    /// What: `listening`, `accepted`, `connected`, `received`, `closed`, `failed`, `done`.
    pub what: String,
    /// Everything else in that line.
    pub fields: Value,
}

impl Event {
    /// For `failed`: the kind of the error, as `std::io::ErrorKind` names it; else empty.
    #[must_use]
    pub fn kind(&self) -> &str {
        self.fields.get("kind").and_then(Value::as_str).unwrap_or_default()
    }

    /// Bytes (TCP) or datagrams (UDP) received up to this event.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.fields.get("total").and_then(Value::as_u64).unwrap_or(0)
    }
}

impl Tool {
    /// Starts `lab-tool` with these arguments in a namespace or a container.
    ///
    /// # Errors
    /// If it has not been built.
    pub fn start(net: &impl Room, name: &str, arguments: &[&str]) -> Result<Self> {
        Ok(Self {
            process: net.start_tool(name, arguments)?,
        })
    }

    /// A TCP listener that echoes, once it listens.
    ///
    /// # Errors
    /// If it cannot listen there.
    pub fn tcp_listen(net: &impl Room, at: SocketAddr) -> Result<Self> {
        let mut tool = Self::start(net, "tcp-listen", &["tcp-listen", &at.to_string()])?;
        tool.wait_for("listening", START_LIMIT)?;
        Ok(tool)
    }

    /// A TCP stream that sends a message every 10 ms, once it is connected.
    ///
    /// # Errors
    /// If it cannot connect.
    pub fn tcp_stream(net: &impl Room, to: SocketAddr) -> Result<Self> {
        let mut tool = Self::start(net, "tcp-stream", &["tcp-stream", &to.to_string()])?;
        tool.wait_for("received", START_LIMIT)?;
        Ok(tool)
    }

    /// A TCP stream that has sent one message, has its echo, and only listens from then on.
    ///
    /// # Errors
    /// If it cannot connect.
    pub fn tcp_idle(net: &impl Room, to: SocketAddr) -> Result<Self> {
        let mut tool = Self::start(net, "tcp-idle", &["tcp-stream", &to.to_string(), "--idle"])?;
        tool.wait_for("received", START_LIMIT)?;
        Ok(tool)
    }

    /// A UDP listener that echoes, once it listens.
    ///
    /// # Errors
    /// If it cannot listen there.
    pub fn udp_listen(net: &impl Room, at: SocketAddr) -> Result<Self> {
        let mut tool = Self::start(net, "udp-listen", &["udp-listen", &at.to_string()])?;
        tool.wait_for("listening", START_LIMIT)?;
        Ok(tool)
    }

    /// A UDP stream that sends a datagram every 10 ms, once the first echo is back.
    ///
    /// # Errors
    /// If no echo comes.
    pub fn udp_stream(net: &impl Room, to: SocketAddr) -> Result<Self> {
        let mut tool = Self::start(net, "udp-stream", &["udp-stream", &to.to_string()])?;
        tool.wait_for("received", START_LIMIT)?;
        Ok(tool)
    }

    /// One attempt to connect over TCP and have one message echoed: the event that decided it (`received`, or `failed` with its kind).
    ///
    /// # Errors
    /// If the tool cannot be started.
    pub fn tcp_attempt(net: &impl Room, to: SocketAddr, within: Duration) -> Result<Event> {
        let within = within.as_millis().to_string();
        let to = to.to_string();
        let mut tool = Self::start(net, "tcp-attempt", &["tcp-stream", &to, "--count", "1", "--connect-ms", &within])?;
        tool.process.wait(START_LIMIT + Duration::from_secs(60))?;
        let events = tool.events()?;
        events
            .into_iter()
            .find(|e| e.what == "received" || e.what == "failed")
            .context("the attempt reported nothing")
    }

    /// Sends this many datagrams, 10 ms apart, and gives the number of echoes and of errors.
    ///
    /// # Errors
    /// If the tool cannot be started.
    pub fn udp_attempt(net: &impl Room, to: SocketAddr, count: u32) -> Result<(u64, u64)> {
        let (to, count) = (to.to_string(), count.to_string());
        let mut tool = Self::start(net, "udp-attempt", &["udp-stream", &to, "--count", &count])?;
        let done = tool.wait_for("done", START_LIMIT + Duration::from_secs(60))?;
        let number = |name| done.fields.get(name).and_then(Value::as_u64).unwrap_or(0);
        Ok((number("received"), number("failures")))
    }

    /// All events so far.
    ///
    /// # Errors
    /// If it wrote something else.
    pub fn events(&self) -> Result<Vec<Event>> {
        let output = self.process.output();
        // A last line without its end is still being written.
        let complete = output.rsplit_once('\n').map_or("", |(lines, _)| lines);
        complete.lines().map(parse).collect()
    }

    /// The last event of this kind so far.
    ///
    /// # Errors
    /// If it wrote something that is no event.
    pub fn last(&self, what: &str) -> Result<Option<Event>> {
        Ok(self.events()?.into_iter().rfind(|e| e.what == what))
    }

    /// Waits for the first event of this kind.
    ///
    /// # Errors
    /// If it does not come in time, or the tool ends without it.
    pub fn wait_for(&mut self, what: &str, within: Duration) -> Result<Event> {
        wait_for(&format!("`{what}` from lab-tool"), within, || {
            let ended = self.process.ended()?;
            let events = self.events()?;
            let found = events.iter().find(|e| e.what == what).cloned();
            ensure!(found.is_some() || ended.is_none(), "lab-tool ended without `{what}`: {events:?}");
            Ok(found)
        })
    }

    /// Waits until more has been received than had been at the call, by `more`.
    ///
    /// # Errors
    /// If it does not come in time.
    pub fn wait_for_more(&self, more: u64, within: Duration) -> Result<()> {
        let before = self.last("received")?.map_or(0, |e| e.total());
        wait_for("the stream to go on", within, || {
            Ok(self.last("received")?.filter(|e| e.total() >= before + more).map(drop))
        })
    }

    /// The process, to signal or stop it.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

fn parse(line: &str) -> Result<Event> {
    let fields: Value = serde_json::from_str(line).with_context(|| format!("`{line}` is no event"))?;
    let t = fields.get("t").and_then(Value::as_u64).context("an event without a time")?;
    let what = fields
        .get("event")
        .and_then(Value::as_str)
        .context("an event without a name")?
        .to_owned();
    Ok(Event {
        at: SystemTime::UNIX_EPOCH + Duration::from_nanos(t),
        what,
        fields,
    })
}
