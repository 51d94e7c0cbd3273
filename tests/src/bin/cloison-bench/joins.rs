//! How long a join takes, on hosts that were never in the mesh, one after the other.
//!
//! The first time is that of the command `cloison-agent join`, from its start with a token in a file to its end with the host enrolled. The
//! second goes on from there: the agent is started at once, and the time ends when its status names the view in force and the instance in it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cloison_agent::status::ask;
use cloison_proto::status::{Answer, Request};
use cloison_tests::lab::agent::Agent;
use cloison_tests::lab::mesh::Mesh;
use serde::Serialize;

use crate::report::Times;

/// When no further host joins.
const LIMIT: Duration = Duration::from_secs(40);
const VIEW_LIMIT: Duration = Duration::from_secs(20);
/// How often the agent is asked: well below what is measured, and no load.
const ASK_EVERY: Duration = Duration::from_millis(2);

/// Times of joins.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Joins {
    /// From the token to enrolled.
    pub(crate) enrolled: Times,
    /// From enrolled to the first view in force, with the start of the agent.
    pub(crate) first_view: Times,
}

/// Lets these hosts join.
pub(crate) fn measure(mesh: &Mesh, hosts: &[String]) -> Result<Joins> {
    let (mut enrolled, mut first_view) = (Vec::new(), Vec::new());
    let begin = Instant::now();
    for host in hosts {
        if begin.elapsed() > LIMIT {
            eprintln!("only {} of {} joins in {} s", enrolled.len(), hosts.len(), LIMIT.as_secs());
            break;
        }
        let agent = mesh.agent(host)?;
        let joined = agent.join(&mesh.coordinator.token(host)?)?.ok()?;
        enrolled.push(joined.took.as_secs_f64() * 1e3);
        let start = Instant::now();
        let mut process = agent.spawn()?;
        while !has_a_view(agent) {
            if let Some(status) = process.ended()? {
                bail!("the agent of {host} ended with {status}:\n{}", process.log());
            }
            if start.elapsed() > VIEW_LIMIT {
                bail!("{host} has no view {VIEW_LIMIT:?} after it joined:\n{}", process.log());
            }
            std::thread::sleep(ASK_EVERY);
        }
        first_view.push(start.elapsed().as_secs_f64() * 1e3);
        process.stop().with_context(|| format!("stopping the agent of {host}"))?;
    }
    eprintln!("{} hosts joined", enrolled.len());
    Ok(Joins {
        enrolled: Times::of(enrolled),
        first_view: Times::of(first_view),
    })
}

/// Whether a view with an instance for this host is in force. An agent that does not answer yet has none.
fn has_a_view(agent: &Agent) -> bool {
    match ask(&agent.socket(), &Request::Status) {
        Ok(Answer::Status(status)) => status.version.is_some() && !status.instances.is_empty(),
        Ok(_) | Err(_) => false,
    }
}
