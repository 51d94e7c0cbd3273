//! How long open streams stand still while an agent restarts: asked to (SIGTERM) and killed (SIGKILL), by turns at either end, under a
//! service manager that keeps the TUN and starts the agent again at once.
//!
//! A stall is the longest time without anything received, of a TCP stream in each direction and a UDP stream, with a message each ten
//! milliseconds; so a stall of ten milliseconds is none. A unit's `RestartSec=` comes on top after a kill.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use cloison_tests::lab::mesh::Mesh;
use cloison_tests::lab::stall::{POLICY, Streams};
use cloison_tests::lab::wait_for;
use serde::Serialize;

use crate::report::Times;
use crate::{NAME, machine};

const HOSTS: [&str; 2] = ["app-1", "db-1"];
/// When no further run begins.
const LIMIT: Duration = Duration::from_secs(840);
/// How long an agent may take to answer again.
const BACK_LIMIT: Duration = Duration::from_secs(20);
/// Streams are opened anew after so many runs: what they saw is read again and again.
const RUNS_PER_STREAM: usize = 20;
/// The interval of the service manager's watchdog; nothing bites here.
const WATCHDOG: Duration = Duration::from_secs(10);

/// Stalls, in milliseconds.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Restarts {
    pub(crate) machine: machine::Machine,
    /// After SIGTERM.
    pub(crate) asked: Times,
    /// After SIGKILL.
    pub(crate) killed: Times,
}

/// Restarts an agent `runs` times in either way; fewer, if time runs out.
pub(crate) fn measure(runs: usize) -> Result<Restarts> {
    let (begin, machine) = (Instant::now(), machine::describe()?);
    eprintln!("{} programs of {}, load {:.1}", machine.profile, machine.programs, machine.load);
    let mut mesh = Mesh::builder(NAME, &HOSTS).start()?;
    for agent in mesh.agents_mut() {
        agent.manage(WATCHDOG)?;
    }
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(POLICY)?;
    let (mut asked, mut killed) = (Vec::new(), Vec::new());
    while asked.len() < runs && begin.elapsed() < LIMIT {
        let streams = Streams::open(&mesh)?;
        for host in HOSTS.into_iter().cycle().take(RUNS_PER_STREAM.min(runs - asked.len())) {
            asked.push(restart(&mut mesh, &streams, host, false).with_context(|| format!("run {}", asked.len()))?);
            killed.push(restart(&mut mesh, &streams, host, true).with_context(|| format!("run {}", killed.len()))?);
        }
        eprintln!(
            "{} of {runs} restarts in either way, {:.0} s",
            asked.len(),
            begin.elapsed().as_secs_f64()
        );
    }
    mesh.finish()?;
    Ok(Restarts {
        machine,
        asked: Times::of(asked),
        killed: Times::of(killed),
    })
}

/// The longest stall of a restart, in milliseconds. No stream may be cut.
fn restart(mesh: &mut Mesh, streams: &Streams, host: &str, kill: bool) -> Result<f64> {
    let begin = SystemTime::now();
    let agent = mesh.agent_mut(host)?;
    if kill {
        agent.kill()?;
    } else {
        agent.stop()?;
    }
    agent.launch()?;
    streams.must_go_on()?;
    let stall = streams.stalls(begin)?.longest();
    wait_for("the agent to be back", BACK_LIMIT, || Ok(mesh.agent(host)?.status().ok().map(drop)))?;
    Ok(stall.as_secs_f64() * 1e3)
}

impl Restarts {
    /// One line a figure.
    pub(crate) fn table(&self) -> String {
        format!(
            "stall over a restart (SIGTERM)  {}\nstall over a kill (SIGKILL)     {}\n",
            self.asked.p50_and_p99(),
            self.killed.p50_and_p99()
        )
    }
}
