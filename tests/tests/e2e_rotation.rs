//! Keys, issuers, addresses and credentials change while PostgreSQL is under load: no transaction fails, and what was replaced is dead.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cloison_proto::api::HostSummary;
use cloison_tests::lab::mesh::{Instance, Mesh};
use cloison_tests::lab::postgres::{self, Postgres};
use cloison_tests::lab::wait_for;

const PAIR: &str = "\
version: 1
components:
  postgres: {on: db-1,  attach: host, services: {sql: tcp/5432}}
  n8n:      {on: app-1, attach: host}
allow:
  - n8n -> postgres:sql
";
const HOSTS: [&str; 2] = ["app-1", "db-1"];
/// A link whose other end was killed is given up after half a minute of silence.
const SOON: Duration = Duration::from_secs(60);

/// A mesh of app-1 and db-1, with these lines in the agents' configuration and a filled server on db-1.
fn pair(name: &str, agents: &str) -> Result<(Mesh, Postgres, Instance)> {
    let mut mesh = Mesh::builder(name, &HOSTS).agents(agents).start()?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(PAIR)?;
    let instance = mesh.instance("postgres", "db-1")?;
    let server = Postgres::start(mesh.host("db-1")?, &instance.addresses())?;
    postgres::fill(mesh.host("app-1")?.net(), IpAddr::V4(instance.v4), 1)?.ok()?;
    Ok((mesh, server, instance))
}

/// Runs `change` while transactions go on for that many seconds, and insists that none of them failed.
fn under_load(mesh: &mut Mesh, at: Instance, seconds: u32, change: impl FnOnce(&mut Mesh) -> Result<()>) -> Result<()> {
    let app = mesh.host("app-1")?.net().clone();
    std::thread::scope(|scope| {
        let load = scope.spawn(move || postgres::bench(&app, IpAddr::V6(at.v6), seconds, &["-c", "4"]));
        let changed = change(mesh);
        let report = load.join().map_err(|_| anyhow::anyhow!("the load panicked"))??.ok()?;
        changed?;
        ensure!(report.stdout.contains("number of failed transactions: 0"), "{}", report.stdout);
        Ok(())
    })
}

/// Waits until a host has another WireGuard key than this one, and that one only.
fn wait_for_other_key(mesh: &Mesh, host: &str, than: &HostSummary) -> Result<HostSummary> {
    wait_for(&format!("the former key of {host} to be retired"), SOON, || {
        let now = mesh.coordinator.host(host)?;
        Ok((now.wg_key != than.wg_key && now.next_wg_key.is_none() && now.applied).then_some(now))
    })
}

fn key_stage(mesh: &Mesh, host: &str) -> Result<String> {
    let status = mesh.agent(host)?.status()?;
    Ok(status["wg_key"]["stage"].as_str().context("no stage")?.to_owned())
}

#[test]
fn wireguard_keys_change_by_command_and_through_the_api_under_load() -> Result<()> {
    let (mut mesh, _server, instance) = pair("e2e-rotate-wg", "")?;
    under_load(&mut mesh, instance, 50, |mesh| {
        let before = HOSTS.map(|host| mesh.coordinator.host(host));
        let [app, db] = before;
        let (app, db) = (app?, db?);
        mesh.agent("app-1")?.command(&["rotate-key"])?.ok()?;
        mesh.coordinator.cli(&["host", "rotate-key", "db-1"])?.ok()?;
        wait_for("both hosts to have two keys", SOON, || {
            let two = |host: &HostSummary| host.next_wg_key.is_some();
            Ok((two(&mesh.coordinator.host("app-1")?) && two(&mesh.coordinator.host("db-1")?)).then_some(()))
        })?;
        // The coordinator is killed while both keys are good, and goes on from its disk.
        mesh.coordinator.kill()?;
        mesh.coordinator.serve()?;
        wait_for_other_key(mesh, "app-1", &app)?;
        wait_for_other_key(mesh, "db-1", &db)?;
        Ok(())
    })?;
    for host in HOSTS {
        wait_for("the agent to forget its former key", SOON, || {
            Ok((key_stage(&mesh, host)? == "settled").then_some(()))
        })?;
        let ours = mesh.agent(host)?.status()?["wg_key"]["current"].clone();
        ensure!(ours == mesh.coordinator.host(host)?.wg_key.to_string());
        ensure!(!mesh.agent(host)?.state().join("wireguard-key-next").exists());
    }
    mesh.finish()
}

#[test]
fn wireguard_keys_change_by_themselves_and_an_agent_that_is_killed_at_any_step_goes_on() -> Result<()> {
    let (mut mesh, _server, instance) = pair("e2e-rotate-kill", "")?;
    let works = |mesh: &Mesh, step: &str| {
        wait_for(&format!("the pair to talk: {step}"), SOON, || {
            let answer = postgres::query(mesh.host("app-1")?.net(), IpAddr::V4(instance.v4), "select 1", 2)?;
            Ok(answer.ok().ok())
        })
    };
    let before = mesh.coordinator.host("db-1")?;
    // A next key was made, and nobody was told.
    mesh.coordinator.kill()?;
    mesh.agent("db-1")?.command(&["rotate-key"])?.ok()?;
    ensure!(key_stage(&mesh, "db-1")? == "offered");
    mesh.agent_mut("db-1")?.kill()?;
    mesh.agent_mut("db-1")?.start()?;
    ensure!(key_stage(&mesh, "db-1")? == "offered");
    works(&mesh, "with the former key, without a coordinator")?;
    mesh.coordinator.serve()?;
    // Both are good.
    wait_for("the overlap", SOON, || Ok((key_stage(&mesh, "db-1")? == "overlap").then_some(())))?;
    mesh.agent_mut("db-1")?.kill()?;
    mesh.agent_mut("db-1")?.start()?;
    works(&mesh, "with both keys")?;
    // The former is gone in the mesh, and the agent was away when that happened: its peer went on without it for a lease at most.
    let after = wait_for_other_key(&mesh, "db-1", &before)?;
    mesh.agent_mut("db-1")?.kill()?;
    mesh.agent_mut("db-1")?.start()?;
    works(&mesh, "with the new key alone")?;
    ensure!(mesh.agent("db-1")?.status()?["wg_key"]["current"] == after.wg_key.to_string());

    // By itself: the configuration says how soon.
    let agent = mesh.agent_mut("app-1")?;
    let config = std::fs::read_to_string(agent.config())?;
    std::fs::write(agent.config(), format!("{config}key_lifetime = \"10s\"\n"))?;
    let app = mesh.coordinator.host("app-1")?;
    mesh.agent_mut("app-1")?.stop()?;
    mesh.agent_mut("app-1")?.start()?;
    wait_for_other_key(&mesh, "app-1", &app)?;
    works(&mesh, "with a key that changed by itself")?;
    mesh.finish()
}
