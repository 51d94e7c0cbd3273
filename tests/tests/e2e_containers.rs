//! Components that are containers of a real Docker or Podman: attached when they start, isolated while they run, let go when they end.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cloison_tests::lab::docker::{Kind, Runtime};
use cloison_tests::lab::mesh::Mesh;
use cloison_tests::lab::tool::{Room, Tool};
use cloison_tests::lab::wait_for;
use serde_json::Value;

/// For what takes milliseconds on a quiet machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// For one attempt to connect.
const ATTEMPT: Duration = Duration::from_secs(3);

/// What the agent of a host says of a component: how it is enforced.
fn enforcement(mesh: &Mesh, host: &str, component: &str) -> Result<String> {
    let status = mesh.agent(host)?.status()?;
    let all = status.get("instances").and_then(Value::as_array).context("no instances")?;
    let found = all.iter().find(|i| i.get("component").and_then(Value::as_str) == Some(component));
    Ok(found
        .context("no such instance")?
        .get("enforcement")
        .context("not said")?
        .to_string())
}

/// Waits until the agent says this of how a component is enforced.
fn wait_until(mesh: &Mesh, host: &str, component: &str, says: &str) -> Result<String> {
    let mut last = String::new();
    wait_for(&format!("{component} on {host}: {says}"), PATIENCE, || {
        last = enforcement(mesh, host, component)?;
        Ok(last.contains(says).then_some(()))
    })
    .with_context(|| format!("last it was {last}"))?;
    Ok(last)
}

fn must_reach(from: &impl Room, to: std::net::SocketAddr) -> Result<()> {
    let event = Tool::tcp_attempt(from, to, ATTEMPT)?;
    ensure!(event.what == "received", "{to} was not reached: {event:?}");
    Ok(())
}

fn must_be_refused(from: &impl Room, to: std::net::SocketAddr) -> Result<()> {
    let event = Tool::tcp_attempt(from, to, ATTEMPT)?;
    ensure!(event.what == "failed" && event.kind() != "TimedOut", "{to}: {event:?}");
    Ok(())
}

#[test]
fn a_container_without_any_network_reaches_what_its_component_may_and_nothing_else() -> Result<()> {
    let mut mesh = Mesh::builder("e2e-docker", &["app-1", "db-1"]).start()?;
    let docker = Runtime::start(mesh.host("app-1")?, Kind::Docker)?;
    mesh.agent("app-1")?.add_settings(&docker.setting())?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(
        "version: 1\ncomponents:\n  \
           n8n:      {on: app-1, attach: {container: docker:n8n}}\n  \
           postgres: {on: db-1,  attach: host, services: {sql: tcp/5432}}\n\
         allow:\n  - n8n -> postgres:sql\n",
    )?;
    wait_until(&mesh, "app-1", "n8n", "docker has no running container n8n")?;
    let begin = Instant::now();
    let n8n = docker.run("n8n", &[])?;
    let started = begin.elapsed();
    let shown = wait_until(&mesh, "app-1", "n8n", "docker container n8n")?;
    eprintln!("started within {started:?}, seen attached within {:?}: {shown}", begin.elapsed());
    let postgres = mesh.instance("postgres", "db-1")?;
    for (open, shut) in postgres.sockets(5432).into_iter().zip(postgres.sockets(5433)) {
        let _listeners = [
            Tool::tcp_listen(mesh.host("db-1")?.net(), open)?,
            Tool::tcp_listen(mesh.host("db-1")?.net(), shut)?,
        ];
        must_reach(&n8n, open)?;
        must_be_refused(&n8n, shut)?;
    }
    drop(docker);
    mesh.finish()
}
