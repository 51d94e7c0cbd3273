//! Keys, issuers, addresses and credentials change while PostgreSQL is under load: no transaction fails, and what was replaced is dead.

use std::net::IpAddr;
use std::os::unix::process::ExitStatusExt as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cloison_coordinator::failpoint::{Point, VARIABLE};
use cloison_proto::api::{AuditList, CredentialReport, HostSummary, RotationList};
use cloison_proto::token::EnrollmentToken;
use cloison_tests::lab::mesh::{COORDINATOR, Instance, Mesh};
use cloison_tests::lab::postgres::{self, Postgres};
use cloison_tests::lab::{Underlay, wait_for};
use rustix::process::Signal;

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
    let current = after.wg_key.to_string();
    wait_for("the former key to be forgotten", SOON, || {
        Ok((mesh.agent("db-1")?.status()?["wg_key"]["current"] == current).then_some(()))
    })?;

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

/// Kills the agent, and starts it again.
fn restart(mesh: &mut Mesh, host: &str) -> Result<()> {
    mesh.agent_mut(host)?.kill()?;
    mesh.agent_mut(host)?.start()
}

/// Starts a coordinator that dies when it comes to this place for the first time, and waits for that. The agent of `host` is killed as well, so
/// that it does not wait for the former link to fall silent.
fn dies_at(mesh: &mut Mesh, point: Point, host: &str) -> Result<()> {
    mesh.coordinator.kill()?;
    mesh.coordinator.set_environment([(VARIABLE.to_owned(), point.to_string())]);
    mesh.coordinator.launch()?;
    restart(mesh, host)?;
    let process = mesh.coordinator.process().context("no coordinator")?;
    let status = process.wait(SOON).with_context(|| format!("at {point}"))?;
    ensure!(status.signal() == Some(9), "at {point} it ended with {status}: {}", process.log());
    nobody_was_refused(mesh)
}

/// Of two certificates of a host, the older one is good until the younger one is used: whoever died in between shows one that is.
fn nobody_was_refused(mesh: &mut Mesh) -> Result<()> {
    let log = mesh.coordinator.process().context("no coordinator")?.log();
    ensure!(!log.contains("a link was refused"), "{log}");
    Ok(())
}

/// Starts a coordinator that lives, and the agent of `host` anew.
fn lives(mesh: &mut Mesh, host: &str) -> Result<()> {
    mesh.coordinator.kill()?;
    mesh.coordinator.set_environment([(VARIABLE.to_owned(), "None".to_owned())]);
    mesh.coordinator.serve()?;
    restart(mesh, host)
}

fn certificate(mesh: &Mesh, host: &str) -> Result<Vec<u8>> {
    Ok(std::fs::read(mesh.agent(host)?.state().join("certificate"))?)
}

fn wait_for_other_certificate(mesh: &Mesh, host: &str, than: &[u8]) -> Result<Vec<u8>> {
    wait_for(&format!("another certificate of {host}"), SOON, || {
        Ok(Some(certificate(mesh, host)?).filter(|now| now != than))
    })
}

#[test]
fn certificates_of_hosts_are_renewed_under_load_with_either_side_killed_at_each_step() -> Result<()> {
    let mut mesh = Mesh::builder("e2e-rotate-cert", &HOSTS).start()?;
    mesh.coordinator.stop()?;
    std::fs::write(
        mesh.coordinator.data().join("coordinator.toml"),
        "host_certificate_lifetime = \"10s\"\n",
    )?;
    mesh.coordinator.serve()?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(PAIR)?;
    let instance = mesh.instance("postgres", "db-1")?;
    let _server = Postgres::start(mesh.host("db-1")?, &instance.addresses())?;
    postgres::fill(mesh.host("app-1")?.net(), IpAddr::V4(instance.v4), 1)?.ok()?;
    under_load(&mut mesh, instance, 40, |mesh| {
        // The coordinator notes the next certificate and gives it out: it dies at each step of that, and the agent with it.
        let first = certificate(mesh, "db-1")?;
        for point in [
            Point::CertificateWritten,
            Point::LeafWritten,
            Point::BeforeCommit,
            Point::Committed,
            Point::Unanswered,
        ] {
            dies_at(mesh, point, "db-1")?;
        }
        lives(mesh, "db-1")?;
        let unused = wait_for_other_certificate(mesh, "db-1", &first)?;
        // It is on the agent's disk and was never used: both die, and the coordinator dies anew behind the first use.
        dies_at(mesh, Point::NoteCommitted, "db-1")?;
        lives(mesh, "db-1")?;
        let used = wait_for_other_certificate(mesh, "db-1", &unused)?;
        // The agent has asked, nobody answered, and it dies.
        let coordinator = mesh.coordinator.process().context("no coordinator")?;
        coordinator.signal(Signal::STOP)?;
        std::thread::sleep(Duration::from_secs(6));
        mesh.agent_mut("db-1")?.kill()?;
        mesh.coordinator.process().context("no coordinator")?.signal(Signal::CONT)?;
        mesh.agent_mut("db-1")?.start()?;
        wait_for_other_certificate(mesh, "db-1", &used)?;
        // At any moment.
        for host in ["db-1", "app-1", "db-1"] {
            std::thread::sleep(Duration::from_millis(700));
            restart(mesh, host)?;
        }
        // Nobody dies: one follows the other.
        let [app, db] = HOSTS.map(|host| certificate(mesh, host));
        let (app, db) = (
            wait_for_other_certificate(mesh, "app-1", &app?)?,
            wait_for_other_certificate(mesh, "db-1", &db?)?,
        );
        wait_for_other_certificate(mesh, "app-1", &app)?;
        wait_for_other_certificate(mesh, "db-1", &db)?;
        Ok(())
    })?;
    wait_for("both hosts to be linked", SOON, || {
        Ok((mesh.coordinator.status()?.linked == 2).then_some(()))
    })?;
    nobody_was_refused(&mut mesh)?;
    let page: AuditList = mesh.coordinator.ask(&["audit"])?;
    let issued = page.entries.iter().filter(|leaf| leaf.action == "certificate.issue").count();
    ensure!(issued >= 12, "only {issued} certificates");
    mesh.finish()
}

#[test]
fn a_coordinator_that_moves_is_found_and_credentials_change_under_load() -> Result<()> {
    let mut mesh = Mesh::builder("e2e-rotate-move", &HOSTS)
        .lab(|lab| lab.underlay(Underlay::V4))
        .start()?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(PAIR)?;
    let instance = mesh.instance("postgres", "db-1")?;
    let _server = Postgres::start(mesh.host("db-1")?, &instance.addresses())?;
    postgres::fill(mesh.host("app-1")?.net(), IpAddr::V4(instance.v4), 1)?.ok()?;
    let home = mesh.host(COORDINATOR)?.net().clone();
    let old = mesh.host(COORDINATOR)?.v4()?.to_string();
    let (from, to) = (format!("{old}:7443"), "198.51.100.77:7443");
    under_load(&mut mesh, instance, 40, |mesh| {
        // Announced, and acknowledged by all, before the move.
        home.run(&["ip", "address", "add", "198.51.100.77/24", "dev", "eth0"])?.ok()?;
        mesh.coordinator.cli(&["coordinator", "address", "add", to])?.ok()?;
        mesh.wait_until_applied()?;
        mesh.coordinator.kill()?;
        home.run(&["ip", "address", "delete", &format!("{old}/24"), "dev", "eth0"])?.ok()?;
        if !home
            .run(&["ip", "address", "show", "dev", "eth0"])?
            .ok()?
            .stdout
            .contains("198.51.100.77")
        {
            // A secondary address goes with its primary one.
            home.run(&["ip", "address", "add", "198.51.100.77/24", "dev", "eth0"])?.ok()?;
        }
        let config = mesh.coordinator.cli_config();
        std::fs::write(&config, std::fs::read_to_string(&config)?.replace(&from, to))?;
        mesh.coordinator.serve()?;
        wait_for("both agents to find the coordinator", SOON, || {
            Ok((mesh.coordinator.status()?.linked == 2).then_some(()))
        })?;
        mesh.coordinator.cli(&["coordinator", "address", "remove", &from])?.ok()?;
        mesh.wait_until_applied()
    })?;
    let token: EnrollmentToken = mesh.coordinator.token("new-1")?.parse()?;
    ensure!(token.addresses == [to], "{:?}", token.addresses);
    let refused = mesh.coordinator.cli(&["coordinator", "address", "remove", to])?;
    ensure!(!refused.status.success(), "the last address stays");
    // An agent that begins anew has the address on disk.
    mesh.agent_mut("app-1")?.stop()?;
    mesh.agent_mut("app-1")?.start()?;
    wait_for("the agent to link from its disk", SOON, || {
        Ok((mesh.coordinator.status()?.linked == 2).then_some(()))
    })?;

    // The operator's own credential, in two phases; the former is dead at once.
    let config = mesh.coordinator.cli_config();
    let former = std::fs::read_to_string(&config)?;
    mesh.coordinator.cli(&["credential", "rotate"])?.ok()?;
    let changed = std::fs::read_to_string(&config)?;
    ensure!(changed != former);
    mesh.coordinator.status()?;
    std::fs::write(&config, &former)?;
    let refused = mesh.coordinator.cli(&["status"])?;
    ensure!(refused.status.code() == Some(3), "the former credential still works: {refused:?}");
    std::fs::write(&config, &changed)?;
    mesh.finish()
}

#[test]
fn signing_key_and_issuers_change_under_load_and_a_host_that_was_away_heals() -> Result<()> {
    let hosts = ["app-1", "db-1", "away-1"];
    let mut mesh = Mesh::builder("e2e-rotate-trust", &hosts).init(&["--lease", "20s"]).start()?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(PAIR)?;
    let instance = mesh.instance("postgres", "db-1")?;
    let _server = Postgres::start(mesh.host("db-1")?, &instance.addresses())?;
    postgres::fill(mesh.host("app-1")?.net(), IpAddr::V4(instance.v4), 1)?.ok()?;
    mesh.agent_mut("away-1")?.stop()?;
    // The disk of app-1 takes no new statements for a while: a folder stands where the file is written.
    let state = mesh.agent("app-1")?.state();
    let (file, in_the_way) = (state.join("membership"), state.join(".membership.new"));
    let before = std::fs::read(&file)?;
    std::fs::create_dir(&in_the_way)?;
    under_load(&mut mesh, instance, 60, |mesh| {
        for part in ["signing-key", "host-issuer", "coordinator-issuer"] {
            mesh.coordinator.cli(&["rotate", part])?.ok()?;
            ensure!(!mesh.coordinator.cli(&["rotate", part])?.status.success(), "{part}: one at a time");
        }
        wait_for("the rotations to be over", SOON * 2, || {
            let all: RotationList = mesh.coordinator.ask(&["rotate", "status"])?;
            Ok(all.rotations.iter().all(|rotation| rotation.stage == "settled").then_some(()))
        })
    })?;
    let warnings = mesh.agent("app-1")?.status()?["warnings"].to_string();
    ensure!(warnings.contains("whom to trust could not be written"), "{warnings}");
    ensure!(std::fs::read(&file)? == before, "it was written after all");
    std::fs::remove_dir(&in_the_way)?;
    wait_for("whom to trust to be written", SOON, || {
        Ok((std::fs::read(&file)? != before).then_some(()))
    })?;
    restart(&mut mesh, "app-1")?;
    // It was away while all of it changed: it trusts neither the coordinator's issuer nor the views' signer, but the root.
    mesh.agent_mut("away-1")?.start()?;
    wait_for("the host that was away to come back", SOON, || {
        let status = mesh.coordinator.status()?;
        Ok((status.linked == 3 && status.applied == 3).then_some(()))
    })?;
    let proof = mesh.coordinator.cli(&["verify", "credentials"])?;
    ensure!(proof.status.code() == Some(0), "{proof:?}");
    let report: CredentialReport = mesh.coordinator.ask(&["verify", "credentials"])?;
    ensure!(
        report
            .checks
            .iter()
            .filter(|check| check.what.contains("issuer") || check.what == "signing-key")
            .count()
            == 3
    );
    ensure!(report.checks.iter().any(|check| check.what == "token" && check.state == "dead"));
    mesh.finish()
}
