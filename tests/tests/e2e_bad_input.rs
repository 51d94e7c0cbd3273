//! What is missing, taken or damaged gets a clear error, and never means that more is allowed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cloison_tests::lab::agent::{self, Agent};
use cloison_tests::lab::coordinator::{self, Coordinator};
use cloison_tests::lab::mesh::Mesh;
use cloison_tests::lab::process::Process;
use cloison_tests::lab::tool::Tool;
use cloison_tests::lab::{Lab, programs, wait_for};

const POLICY: &str = "\
version: 1
components:
  postgres: {on: db-1,  attach: host, services: {sql: tcp/5432}}
  n8n:      {on: app-1, attach: host}
allow:
  - n8n -> postgres:sql
";
const SQL: u16 = 5432;
const OTHER: u16 = 6000;
/// How long a program may take to refuse.
const REFUSAL_LIMIT: Duration = Duration::from_secs(15);

/// One way to damage a file's content, and its name.
type Damage = (&'static str, fn(&[u8]) -> Vec<u8>);

/// Ways to damage a file: its new content, from what it was.
const DAMAGE: [Damage; 5] = [
    ("empty", |_| Vec::new()),
    ("half of it", |bytes| bytes.iter().take(bytes.len() / 2).copied().collect()),
    ("all but the last byte", |bytes| {
        bytes.iter().take(bytes.len().saturating_sub(1)).copied().collect()
    }),
    ("one bit flipped", |bytes| {
        let mut bytes = bytes.to_vec();
        let middle = bytes.len() / 2;
        bytes.iter_mut().skip(middle).take(1).for_each(|b| *b ^= 1);
        bytes
    }),
    ("all zero", |bytes| vec![0; bytes.len()]),
];

#[test]
fn an_agent_with_any_damaged_file_of_state_neither_panics_nor_allows_more() -> Result<()> {
    let mut mesh = Mesh::with_policy("e2e-agent-state", &["app-1", "db-1"], POLICY)?;
    let postgres = mesh.instance("postgres", "db-1")?;
    let _listeners = (
        Tool::tcp_listen(mesh.host("db-1")?.net(), (postgres.v4, SQL).into())?,
        Tool::tcp_listen(mesh.host("db-1")?.net(), (postgres.v4, OTHER).into())?,
    );
    mesh.must_reach("app-1", (postgres.v4, SQL).into())?;
    mesh.agent_mut("app-1")?.stop()?;
    let files = files_below(&mesh.agent("app-1")?.state())?;
    ensure!(files.len() >= 4, "{files:?}");
    // With the coordinator away, an agent has nothing but what it finds on its disk.
    mesh.coordinator.stop()?;
    for file in &files {
        let before = std::fs::read(file)?;
        for (how, damage) in DAMAGE {
            std::fs::write(file, damage(&before))?;
            let mut process = mesh.agent("app-1")?.spawn()?;
            let ended = settle(mesh.agent("app-1")?, &mut process)?;
            let log = process.log() + &process.output();
            let case = format!("{} ({how})", file.display());
            ensure!(!log.contains("panicked"), "{case}:\n{log}");
            ensure!(!ended || !log.trim().is_empty(), "{case}: the agent ended without a word");
            let event = mesh.attempt("app-1", (postgres.v4, OTHER).into())?;
            ensure!(event.what == "failed", "{case}: more is allowed than the policy says");
            if !ended {
                process.stop()?;
            }
            std::fs::write(file, &before)?;
        }
    }
    // What was lost beside the damaged files (where peers were last seen) comes back from the coordinator.
    mesh.coordinator.serve()?;
    mesh.agent_mut("app-1")?.start()?;
    wait_for("the pair to talk again", REFUSAL_LIMIT, || {
        Ok((mesh.attempt("app-1", (postgres.v4, SQL).into())?.what == "received").then_some(()))
    })?;
    mesh.finish()
}

#[test]
fn a_coordinator_with_any_damaged_file_neither_panics_nor_takes_the_policy_for_empty() -> Result<()> {
    let mut mesh = Mesh::with_policy("e2e-coordinator-state", &["app-1", "db-1"], POLICY)?;
    let shown = mesh.coordinator.cli(&["policy", "show"])?.ok()?.stdout;
    mesh.coordinator.stop()?;
    let data = mesh.coordinator.data();
    let files = files_below(&data)?;
    ensure!(files.len() >= 3, "{files:?}");
    for file in &files {
        let before = std::fs::read(file)?;
        for (how, damage) in DAMAGE {
            std::fs::write(file, damage(&before))?;
            let case = format!("{} ({how})", file.display());
            match mesh.coordinator.serve() {
                Ok(()) => {
                    let now = mesh.coordinator.cli(&["policy", "show"])?;
                    // It serves what it had, or refuses to; it never serves something else.
                    ensure!(
                        !now.status.success() || now.stdout == shown,
                        "{case}: another policy than before: {now:?}"
                    );
                    mesh.coordinator.stop()?;
                }
                Err(error) => {
                    let text = format!("{error:#}");
                    ensure!(!text.contains("panicked"), "{case}: {text}");
                }
            }
            restore(&data, &files, file, &before)?;
        }
    }
    mesh.coordinator.serve()?;
    ensure!(mesh.coordinator.cli(&["policy", "show"])?.ok()?.stdout == shown);
    mesh.finish()
}

#[test]
fn programs_say_what_they_lack() -> Result<()> {
    let mut mesh = Mesh::with_policy("e2e-lacking", &["app-1", "db-1"], POLICY)?;
    mesh.agent_mut("app-1")?.stop()?;
    let agent = mesh.agent("app-1")?;

    let holder = Tool::udp_listen(agent.net(), ([0, 0, 0, 0], agent::PORT).into())?;
    let holder_v6 = Tool::udp_listen(agent.net(), (std::net::Ipv6Addr::UNSPECIFIED, agent::PORT).into());
    refuses(agent.spawn()?, &[&agent::PORT.to_string()])?;
    drop((holder, holder_v6));

    let shell = |script: &str| -> Result<Process> {
        let mut command = agent.net().command("sh");
        command
            .args(["-c", script, "sh"])
            .arg(programs::find("cloison-agent")?)
            .args(["run", "--config"])
            .arg(agent.config());
        agent.net().start("agent", command)
    };
    refuses(
        shell("exec unshare --mount --propagation private sh -c 'mount -t tmpfs none /dev/net && exec \"$@\"' sh \"$@\"")?,
        &["/dev/net/tun"],
    )?;
    refuses(
        shell("exec setpriv --bounding-set=-net_admin --inh-caps=-net_admin -- \"$@\"")?,
        &["CAP_NET_ADMIN"],
    )?;

    mesh.agent_mut("app-1")?.start()?;
    let second = mesh.agent("app-1")?.spawn()?;
    refuses(second, &[])?;
    mesh.finish()
}

#[test]
fn a_coordinator_whose_port_is_taken_or_whose_data_is_missing_says_so() -> Result<()> {
    let lab = Lab::builder("e2e-port-taken").host("coordinator").build()?;
    let host = lab.host("coordinator")?;
    let mut coordinator = Coordinator::init(host, &[])?;
    let again = Coordinator::init(host, &[]);
    ensure!(again.is_err(), "a second init over the first");
    let any = std::net::Ipv6Addr::UNSPECIFIED;
    for listen in [Tool::tcp_listen, Tool::udp_listen] {
        let mut holder = listen(host.net(), (any, coordinator::PORT).into())?;
        let refused = coordinator.serve().err().context("it serves on a port that is taken")?.to_string();
        ensure!(refused.contains(&coordinator::PORT.to_string()), "{refused}");
        holder.process().stop()?;
    }
    let mut command: Command = host.net().command(&programs::find("cloison-coordinator")?.display().to_string());
    command.args(["serve", "--data"]).arg(host.folder().join("nothing-here"));
    refuses(host.net().start("coordinator", command)?, &["nothing-here"])?;
    coordinator.serve()?;
    coordinator.stop()?;
    lab.finish()
}

/// Insists that a program ends by itself, with an error that contains these words and no panic.
fn refuses(mut process: Process, words: &[&str]) -> Result<()> {
    let status = process.wait(REFUSAL_LIMIT)?;
    let said = process.output() + &process.log();
    ensure!(!status.success() && !said.contains("panicked"), "{status}: {said}");
    for word in words {
        ensure!(said.contains(word), "no word of `{word}`: {said}");
    }
    Ok(())
}

/// Waits until an agent answers on its socket, or has ended; whether it has ended.
fn settle(agent: &Agent, process: &mut Process) -> Result<bool> {
    wait_for("the agent to run or to refuse", REFUSAL_LIMIT, || {
        if process.ended()?.is_some() {
            return Ok(Some(true));
        }
        Ok(agent.command(&["status"])?.ok().ok().map(|_| false))
    })
}

fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            files.extend(files_below(&entry.path())?);
        } else if entry.file_type()?.is_file() {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

/// Puts a file back, and takes away what a program made beside it (a database's journal, which belongs to the damaged file).
fn restore(folder: &Path, known: &[PathBuf], file: &Path, content: &[u8]) -> Result<()> {
    for found in files_below(folder)? {
        if !known.contains(&found) {
            std::fs::remove_file(&found)?;
        }
    }
    Ok(std::fs::write(file, content)?)
}
