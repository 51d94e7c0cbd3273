//! Clocks that are wrong, step, or stood still while the machine slept: nothing that is allowed stops because of it, nothing goes on beyond
//! its lease, and people are told. Also: two machines with one state folder.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use cloison_agent::state::{File, StateDir};
use cloison_tests::lab::agent::Agent;
use cloison_tests::lab::clock::Clock;
use cloison_tests::lab::mesh::{COORDINATOR, Mesh};
use cloison_tests::lab::stall::{POLICY, Streams};
use cloison_tests::lab::tool::Tool;
use cloison_tests::lab::wait_for;
use serde_json::Value;

const HOSTS: [&str; 2] = ["app-1", "db-1"];
const PATIENCE: Duration = Duration::from_secs(20);
const HOUR: i64 = 3600;
const YEAR: i64 = 365 * 24 * HOUR;
const SQL: u16 = 5432;
/// How long a stream may stand still because a clock stepped: not at all, but for tests that run side by side.
const NO_STALL: Duration = Duration::from_secs(2);
/// How soon a handshake must be there after a restart with a clock that was set back (and the stream with it).
const HEAL_LIMIT: Duration = Duration::from_secs(5);

/// A mesh whose agents have clocks of their own; nobody has joined yet.
fn mesh_with_clocks(name: &str) -> Result<(Mesh, [Clock; 2])> {
    let mut mesh = Mesh::builder(name, &HOSTS).start()?;
    let clocks = [
        Clock::new(&mesh.host("app-1")?.folder())?,
        Clock::new(&mesh.host("db-1")?.folder())?,
    ];
    for (agent, clock) in mesh.agents_mut().iter_mut().zip(&clocks) {
        agent.set_environment(clock.environment());
    }
    Ok((mesh, clocks))
}

fn offset(mesh: &Mesh, host: &str) -> Result<Option<i64>> {
    Ok(mesh.agent(host)?.status()?.get("clock_offset_secs").and_then(Value::as_i64))
}

fn warned_of_clock(mesh: &Mesh, host: &str) -> Result<bool> {
    let status = mesh.agent(host)?.status()?;
    let warnings = status.get("warnings").and_then(Value::as_array).context("no warnings")?;
    Ok(warnings.iter().any(|w| w.as_str().is_some_and(|w| w.contains("clock is"))))
}

#[test]
fn with_clocks_at_1970_and_2099_hosts_join_link_and_talk_and_say_so() -> Result<()> {
    let (mut mesh, [app, db]) = mesh_with_clocks("e2e-clock-wrong")?;
    app.wall_at(5 * HOUR)?;
    db.wall_at(129 * YEAR)?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(POLICY)?;
    let streams = Streams::open(&mesh)?;
    for (host, sign) in [("app-1", -1), ("db-1", 1)] {
        let off = offset(&mesh, host)?.context("no offset is shown")?;
        ensure!(off.signum() == sign && off.abs() > 50 * YEAR, "{host}: {off}");
        ensure!(warned_of_clock(&mesh, host)?);
        wait_for("the log to say so", PATIENCE, || {
            Ok(mesh.agent(host)?.log()?.contains("clock is").then_some(()))
        })?;
        let text = mesh.agent(host)?.command(&["status"])?.ok()?.stdout;
        ensure!(text.contains("the mesh's: set it"), "{text}");
    }
    // Restarts, with the clocks as they are.
    for host in HOSTS {
        mesh.agent_mut(host)?.kill()?;
        mesh.agent_mut(host)?.launch()?;
        streams.must_go_on()?;
    }
    // Somebody sets them.
    app.wall_off_by(0)?;
    db.wall_off_by(0)?;
    for host in HOSTS {
        wait_for("the warning to go", PATIENCE, || {
            Ok((mesh.agent(host)?.status().is_ok() && !warned_of_clock(&mesh, host)?).then_some(()))
        })?;
    }
    streams.must_go_on()?;
    mesh.finish()
}

#[test]
fn a_clock_that_steps_by_hours_while_the_agent_runs_loses_nothing() -> Result<()> {
    let (mut mesh, [app, db]) = mesh_with_clocks("e2e-clock-steps")?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(POLICY)?;
    let streams = Streams::open(&mesh)?;
    let incarnation = |mesh: &Mesh| -> Result<u64> {
        let status = mesh.agent("app-1")?.status()?;
        status.get("incarnation").and_then(Value::as_u64).context("no incarnation")
    };
    let begin = SystemTime::now();
    let mut at = 0;
    // The clock is looked at each second.
    for (hours, says) in [
        (5, "5 h 0 min ahead"),
        (-7, "7 h 0 min behind"),
        (1, "60 min ahead"),
        (0, "agrees with the mesh's again"),
    ] {
        let before = incarnation(&mesh)?;
        app.wall_off_by(hours * HOUR)?;
        // Somebody else's clock, which nobody asks for.
        db.wall_off_by(-hours * HOUR)?;
        wait_for("the step to show", PATIENCE, || {
            Ok(mesh.agent("app-1")?.log()?.contains(says).then_some(()))
        })?;
        ensure!(warned_of_clock(&mesh, "app-1")? == (hours != 0));
        if hours < at {
            wait_for("the incarnation to be raised", PATIENCE, || {
                Ok((incarnation(&mesh)? > before).then_some(()))
            })?;
        }
        at = hours;
        streams.must_go_on()?;
    }
    let stalls = streams.stalls(begin)?;
    println!("{stalls:?}");
    ensure!(stalls.longest() < NO_STALL, "{stalls:?}");
    mesh.finish()
}

#[test]
fn after_a_restart_with_a_clock_that_was_set_back_the_incarnation_heals_the_handshake() -> Result<()> {
    let (mut mesh, [app, db]) = mesh_with_clocks("e2e-clock-restart")?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(POLICY)?;
    let streams = Streams::open(&mesh)?;
    for (host, clock, hours) in [("app-1", &app, -1), ("db-1", &db, -5), ("app-1", &app, 4), ("app-1", &app, 0)] {
        let begin = SystemTime::now();
        mesh.agent_mut(host)?.kill()?;
        clock.wall_off_by(hours * HOUR)?;
        mesh.agent_mut(host)?.launch()?;
        streams.must_go_on()?;
        let stalls = streams.stalls(begin)?;
        println!("{host} restarted, {hours} h off: {stalls:?}");
        ensure!(stalls.longest() < HEAL_LIMIT, "{host}, {hours} h: {stalls:?}");
    }
    mesh.finish()
}

#[test]
fn a_mesh_that_sleeps_makes_new_sessions_and_certificates_and_its_leases_run_on() -> Result<()> {
    let (mut mesh, agents) = mesh_with_clocks("e2e-clock-suspend")?;
    let coordinator = Clock::new(&mesh.host(COORDINATOR)?.folder())?;
    mesh.coordinator.stop()?;
    mesh.coordinator.set_environment(coordinator.environment());
    mesh.coordinator.serve()?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(POLICY)?;
    let streams = Streams::open(&mesh)?;
    let sleep = |clock: &Clock, hours: u64| -> Result<()> {
        clock.wall_off_by(i64::try_from(hours)? * HOUR)?;
        clock.suspended_for(Duration::from_secs(hours * 3600))
    };
    // One host sleeps for a while: its sessions are over, its lease and certificate are not.
    let begin = SystemTime::now();
    let [app, _db] = &agents;
    app.wall_off_by(600)?;
    app.suspended_for(Duration::from_secs(600))?;
    streams.must_go_on()?;
    let stalls = streams.stalls(begin)?;
    println!("one host slept for 10 minutes: {stalls:?}");
    ensure!(stalls.longest() < HEAL_LIMIT, "{stalls:?}");

    // All sleep for more than half the life of a certificate.
    sleep(&coordinator, 13)?;
    agents.iter().try_for_each(|clock| sleep(clock, 13))?;
    streams.must_go_on()?;
    for host in HOSTS {
        wait_for("the certificate to be renewed", PATIENCE * 2, || {
            Ok(mesh.agent(host)?.log()?.contains("certificate renewed").then_some(()))
        })?;
    }
    streams.must_go_on()?;

    // And for more than a lease, while the coordinator is away. Sessions that end are made anew without it.
    mesh.coordinator.kill()?;
    app.wall_off_by(13 * HOUR + 600)?;
    app.suspended_for(Duration::from_secs(13 * 3600 + 600))?;
    streams.must_go_on()?;
    agents.iter().try_for_each(|clock| sleep(clock, 13 + 25))?;
    let at = (mesh_instance(&mesh)?, SQL).into();
    let _listener = Tool::tcp_listen(mesh.host("db-1")?.net(), at)?;
    wait_for("the leases to be over", PATIENCE, || {
        Ok((mesh.attempt("app-1", at)?.what == "failed").then_some(()))
    })?;
    for host in HOSTS {
        let left = lease_left(&mesh, host)?;
        ensure!(left == Some(0), "{host} has {left:?} s left");
    }
    let last = streams.last_received()?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(streams.last_received()? == last, "something passes behind the lease");
    sleep(&coordinator, 13 + 25)?;
    mesh.coordinator.serve()?;
    wait_for("the pair to talk again", PATIENCE * 4, || {
        Ok((mesh.attempt("app-1", at)?.what == "received").then_some(()))
    })?;
    mesh.finish()
}

#[test]
fn a_coordinator_whose_clock_was_hours_ahead_goes_on_with_leases_when_it_is_set_right() -> Result<()> {
    let mut mesh = Mesh::builder("e2e-clock-coordinator", &HOSTS).init(&["--lease", "20s"]).start()?;
    let clock = Clock::new(&mesh.host(COORDINATOR)?.folder())?;
    mesh.coordinator.stop()?;
    mesh.coordinator.set_environment(clock.environment());
    clock.wall_off_by(3 * HOUR)?;
    mesh.coordinator.serve()?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(POLICY)?;
    let streams = Streams::open(&mesh)?;
    ensure!(coordinator_warning(&mesh)?.is_none());

    // The clock is set right before the next start.
    mesh.coordinator.stop()?;
    clock.wall_off_by(0)?;
    mesh.coordinator.serve()?;
    goes_on_beyond_the_lease(&mesh, &streams)?;
    let warning = coordinator_warning(&mesh)?.context("no warning")?;
    ensure!(warning.contains("behind the mesh's time"), "{warning}");

    // It is ahead for a while, and set right while the coordinator runs.
    clock.wall_off_by(5 * HOUR)?;
    wait_for("the warning to go", PATIENCE, || {
        Ok(coordinator_warning(&mesh)?.is_none().then_some(()))
    })?;
    for host in HOSTS {
        wait_for("a lease of five hours ahead", PATIENCE * 2, || {
            Ok(offset(&mesh, host)?.is_some_and(|off| off < -4 * HOUR).then_some(()))
        })?;
    }
    clock.wall_off_by(0)?;
    goes_on_beyond_the_lease(&mesh, &streams)?;
    ensure!(coordinator_warning(&mesh)?.is_some());

    // A power cut in that state: hosts find out when their links have been idle for longer than a lease lasts.
    mesh.coordinator.kill()?;
    mesh.coordinator.serve()?;
    std::thread::sleep(PATIENCE);
    for host in HOSTS {
        wait_for("a lease after the power cut", PATIENCE * 4, || {
            Ok(lease_left(&mesh, host)?.is_some_and(|left| left > 10).then_some(()))
        })?;
    }
    takes_every_lease(&mesh)?;
    mesh.finish()
}

/// Leases of 20 s are renewed for longer than one lasts, and everything passes.
fn goes_on_beyond_the_lease(mesh: &Mesh, streams: &Streams) -> Result<()> {
    std::thread::sleep(Duration::from_secs(25));
    for host in HOSTS {
        let left = lease_left(mesh, host)?;
        ensure!(left.is_some_and(|left| left > 10), "{host} has {left:?} s left");
    }
    takes_every_lease(mesh)?;
    streams.must_go_on()
}

/// No host was given a lease older than its last one.
fn takes_every_lease(mesh: &Mesh) -> Result<()> {
    for host in HOSTS {
        let log = mesh.agent(host)?.log()?;
        ensure!(!log.contains("older than the last one"), "{host}: {log}");
    }
    Ok(())
}

fn lease_left(mesh: &Mesh, host: &str) -> Result<Option<u64>> {
    Ok(mesh.agent(host)?.status()?.pointer("/lease/left_secs").and_then(Value::as_u64))
}

/// What `cloison status` says of the coordinator's clock.
fn coordinator_warning(mesh: &Mesh) -> Result<Option<String>> {
    let warnings = mesh.coordinator.status()?.warnings;
    Ok(warnings.into_iter().find(|warning| warning.contains("wall clock")))
}

/// The overlay address of the database, as its host knows it: the coordinator may be away.
fn mesh_instance(mesh: &Mesh) -> Result<std::net::IpAddr> {
    let status = mesh.agent("db-1")?.status()?;
    let address = status.pointer("/instances/0/addresses/0").and_then(Value::as_str);
    Ok(address.context("an instance without an address")?.parse()?)
}

#[test]
fn of_two_machines_with_one_state_folder_the_newer_one_stays_and_people_are_told() -> Result<()> {
    let mut mesh = Mesh::builder("e2e-clones", &["app-1", "db-1", "copy"]).start()?;
    for host in HOSTS {
        let token = mesh.coordinator.token(host)?;
        mesh.agent(host)?.join(&token)?.ok()?;
        mesh.agent_mut(host)?.start()?;
    }
    mesh.coordinator.apply_and_wait(POLICY)?;
    mesh.agent_mut("app-1")?.stop()?;
    copy_state(mesh.agent("app-1")?, mesh.agent("copy")?)?;
    // Later than any start of the first one in this test.
    StateDir::open(mesh.agent("copy")?.state())?.write(File::Incarnation, b"99999999999")?;
    mesh.agent_mut("copy")?.start()?;
    let linked = |host: &str| -> Result<bool> {
        let status = mesh.agent(host)?.status()?;
        Ok(status.pointer("/link/state").and_then(Value::as_str) == Some("linked"))
    };
    wait_for("the copy to link", PATIENCE, || Ok(linked("copy")?.then_some(())))?;
    let list = || -> Result<String> { Ok(mesh.coordinator.cli(&["host", "list"])?.ok()?.stdout) };
    ensure!(!list()?.contains("cloned?"), "{}", list()?);

    let mut first = mesh.agent("app-1")?.spawn()?;
    first.wait_for_line("second machine", PATIENCE)?;
    ensure!(linked("copy")?, "the older one took the newer one's place");
    ensure!(list()?.contains("cloned?"), "{}", list()?);
    let audit = mesh.coordinator.cli(&["audit"])?.ok()?.stdout;
    ensure!(audit.matches("host.cloned").count() == 1, "{audit}");
    first.stop()?;
    mesh.finish()
}

fn copy_state(from: &Agent, to: &Agent) -> Result<()> {
    let source = StateDir::open(from.state())?;
    let target = StateDir::open(to.state())?;
    for file in File::ALL {
        if let Some(body) = source.read(file)? {
            target.write(file, &body)?;
        }
    }
    Ok(())
}
