//! An agent that ends and comes back: open streams pause and go on, nothing passes in clear meanwhile, and what a service manager kept is
//! taken back only if it is ours.

use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use cloison_tests::lab::capture::Recording;
use cloison_tests::lab::clock::Clock;
use cloison_tests::lab::mesh::Mesh;
use cloison_tests::lab::postgres::{self, Postgres};
use cloison_tests::lab::stall::{POLICY, Streams};
use cloison_tests::lab::tool::Tool;
use cloison_tests::lab::wait_for;

const HOSTS: [&str; 2] = ["app-1", "db-1"];
const WATCHDOG: Duration = Duration::from_secs(2);
/// Goals are 300 ms and 1.5 s (p99, on a machine that does nothing else); tests run side by side, with unoptimised programs.
const STALL_LIMIT: Duration = Duration::from_secs(4);
const PATIENCE: Duration = Duration::from_secs(20);

/// How an agent ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// SIGTERM, as by `systemctl restart`.
    Asked,
    /// SIGKILL.
    Killed,
}

fn restart(mesh: &mut Mesh, host: &str, end: End) -> Result<()> {
    let agent = mesh.agent_mut(host)?;
    match end {
        End::Asked => agent.stop()?,
        End::Killed => agent.kill()?,
    }
    agent.launch()
}

fn must_not_mention_the_overlay(mesh: &Mesh, recording: &Recording) -> Result<()> {
    for instance in [mesh.instance("n8n", "app-1")?, mesh.instance("postgres", "db-1")?] {
        for address in instance.addresses() {
            ensure!(recording.with_address(address) == 0, "{address} passed the wire in clear");
        }
    }
    Ok(())
}

fn streams_pause_and_go_on(mesh: &mut Mesh) -> Result<()> {
    let streams = Streams::open(mesh)?;
    let wires = [mesh.host("app-1")?.capture_wire()?, mesh.host("db-1")?.capture_wire()?];
    for (host, end) in [
        ("app-1", End::Asked),
        ("db-1", End::Killed),
        ("app-1", End::Killed),
        ("db-1", End::Asked),
    ] {
        let begin = SystemTime::now();
        restart(mesh, host, end)?;
        streams.must_go_on()?;
        let stalls = streams.stalls(begin)?;
        println!("{host} {end:?}: {stalls:?}");
        ensure!(stalls.longest() < STALL_LIMIT, "{host}, {end:?}: {stalls:?}");
    }
    for wire in wires {
        must_not_mention_the_overlay(mesh, &wire.stop()?)?;
    }
    Ok(())
}

#[test]
fn open_streams_pause_and_go_on_when_a_service_manager_keeps_the_tun() -> Result<()> {
    let mut mesh = Mesh::builder("e2e-restart-kept", &HOSTS).start()?;
    for agent in mesh.agents_mut() {
        agent.manage(WATCHDOG)?;
    }
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(POLICY)?;
    wait_for("both TUNs to be kept", PATIENCE, || {
        let kept = [mesh.agent("app-1")?.manager()?.kept(), mesh.agent("db-1")?.manager()?.kept()];
        Ok((kept == [["tun-n8n"], ["tun-postgres"]]).then_some(()))
    })?;
    let index = interface(&mesh, "app-1")?;
    streams_pause_and_go_on(&mut mesh)?;
    ensure!(interface(&mesh, "app-1")? == index, "the interface was made anew");
    let manager = mesh.agent("app-1")?.manager()?;
    let said: Vec<String> = manager.said().into_iter().map(|(_, line)| line).collect();
    ensure!(said.iter().filter(|l| *l == "READY=1").count() == 3, "{said:?}");
    ensure!(said.iter().filter(|l| *l == "STOPPING=1").count() == 1, "{said:?}");
    ensure!(
        said.iter().any(|l| l.starts_with("STATUS=view ") && l.contains("linked with")),
        "{said:?}"
    );
    mesh.finish()
}

#[test]
fn open_streams_pause_and_go_on_without_a_service_manager() -> Result<()> {
    let mut mesh = Mesh::with_policy("e2e-restart-alone", &HOSTS, POLICY)?;
    let index = interface(&mesh, "app-1")?;
    streams_pause_and_go_on(&mut mesh)?;
    ensure!(interface(&mesh, "app-1")? == index, "the interface was made anew");
    mesh.finish()
}

/// The line of the host's TUN, with its index and addresses.
fn interface(mesh: &Mesh, host: &str) -> Result<String> {
    let shown = mesh.host(host)?.net().run(&["ip", "-br", "-o", "link", "show", "cloison0"])?.ok()?;
    let index = mesh.host(host)?.net().run(&["cat", "/proc/net/dev_mcast"])?.ok()?.stdout;
    let index = index
        .lines()
        .find(|l| l.contains("cloison0"))
        .map(|l| l.split_whitespace().next().unwrap_or_default().to_owned());
    Ok(format!("{} {index:?}", shown.stdout.split_whitespace().next().unwrap_or_default()))
}

#[test]
fn no_transaction_fails_while_both_agents_restart_again_and_again() -> Result<()> {
    let mut mesh = Mesh::with_policy("e2e-restart-pgbench", &HOSTS, POLICY)?;
    let instance = mesh.instance("postgres", "db-1")?;
    let _server = Postgres::start(mesh.host("db-1")?, &instance.addresses())?;
    let app = mesh.host("app-1")?.net().clone();
    postgres::fill(&app, IpAddr::V4(instance.v4), 1)?.ok()?;
    let running = std::thread::spawn(move || postgres::bench(&app, IpAddr::V6(instance.v6), 8, &["-c", "4"])?.ok());
    for (host, end) in [
        ("app-1", End::Asked),
        ("db-1", End::Asked),
        ("app-1", End::Killed),
        ("db-1", End::Killed),
    ] {
        restart(&mut mesh, host, end)?;
        wait_for("the agent to be back", PATIENCE, || Ok(mesh.agent(host)?.status().ok().map(drop)))?;
        std::thread::sleep(Duration::from_millis(500));
    }
    let report = running.join().ok().context("the thread of pgbench")??;
    ensure!(report.stdout.contains("number of failed transactions: 0"), "{}", report.stdout);
    mesh.finish()
}

#[test]
fn what_a_service_manager_kept_that_is_not_ours_is_closed() -> Result<()> {
    let mut mesh = Mesh::builder("e2e-restart-foreign", &HOSTS).start()?;
    mesh.agent_mut("app-1")?.manage(WATCHDOG)?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(POLICY)?;
    let streams = Streams::open(&mesh)?;
    mesh.agent_mut("app-1")?.kill()?;
    let manager = mesh.agent("app-1")?.manager()?;
    manager.keep("tun-other", std::fs::File::open("/dev/null")?.into());
    manager.keep("tun-other", std::fs::File::open("/dev/net/tun")?.into());
    manager.keep("something", std::fs::File::open("/etc/passwd")?.into());
    mesh.agent_mut("app-1")?.launch()?;
    streams.must_go_on()?;
    wait_for("what is not ours to be forgotten", PATIENCE, || {
        Ok((mesh.agent("app-1")?.manager()?.kept() == ["tun-n8n"]).then_some(()))
    })?;
    ensure!(mesh.agent("app-1")?.log()?.contains("closing what was kept"));

    // While the agent is away, its component goes; with it go the interface and what is kept.
    mesh.agent_mut("app-1")?.stop()?;
    let without = POLICY.replace("  n8n:      {on: app-1,", "  n8n:      {on: db-2,");
    mesh.coordinator.apply(&without)?;
    mesh.agent_mut("app-1")?.launch()?;
    wait_for("the interface to go", PATIENCE, || {
        let shown = mesh.host("app-1")?.net().run(&["ip", "link", "show", "dev", "cloison0"])?;
        Ok((!shown.status.success() && mesh.agent("app-1")?.manager()?.kept().is_empty()).then_some(()))
    })?;
    drop(streams);
    mesh.coordinator.apply_and_wait(POLICY)?;
    let streams = Streams::open(&mesh)?;

    // A stop of the unit closes what is kept; the interface stays nevertheless, and so do its addresses.
    mesh.agent_mut("app-1")?.stop()?;
    mesh.agent("app-1")?.manager()?.drop_kept();
    let shown = mesh
        .host("app-1")?
        .net()
        .run(&["ip", "address", "show", "dev", "cloison0"])?
        .ok()?
        .stdout;
    ensure!(shown.contains(&mesh.instance("n8n", "app-1")?.v4.to_string()), "{shown}");
    mesh.agent_mut("app-1")?.launch()?;
    streams.must_go_on()?;
    mesh.finish()
}

#[test]
fn a_tun_in_a_component_s_own_namespace_is_kept_too() -> Result<()> {
    let mut mesh = Mesh::builder("e2e-restart-netns", &["app-1", "db-1"]).start()?;
    let inner = mesh.host("app-1")?.component_namespace("n8n")?;
    mesh.agent_mut("app-1")?.manage(WATCHDOG)?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(&format!(
        "version: 1\ncomponents:\n  \
           n8n:      {{on: app-1, attach: {{netns: {}}}}}\n  \
           postgres: {{on: db-1,  attach: host, services: {{sql: tcp/5432}}}}\n\
         allow:\n  - n8n -> postgres:sql\n",
        inner.path().display()
    ))?;
    let at = (mesh.instance("postgres", "db-1")?.v6, 5432).into();
    let _listener = Tool::tcp_listen(mesh.host("db-1")?.net(), at)?;
    let stream = Tool::tcp_stream(&inner, at)?;
    let index = || {
        inner
            .run(&["ip", "-o", "link", "show", "cloison0"])
            .and_then(|shown| Ok(shown.ok()?.stdout))
    };
    let number = |line: String| line.split(':').next().map(str::to_owned);
    let before = number(index()?);
    for end in [End::Asked, End::Killed] {
        restart(&mut mesh, "app-1", end)?;
        stream.wait_for_more(640, PATIENCE)?;
        ensure!(number(index()?) == before, "the interface was made anew");
    }
    mesh.finish()
}

#[test]
fn the_watchdog_is_pinged_while_everything_moves_and_not_while_a_worker_stands_still() -> Result<()> {
    let mut mesh = Mesh::builder("e2e-watchdog", &["app-1"]).start()?;
    let clock = Clock::new(&mesh.host("app-1")?.folder())?;
    let agent = mesh.agent_mut("app-1")?;
    agent.manage(WATCHDOG)?;
    agent.set_environment(clock.environment());
    mesh.join_all()?;
    let pings = |since: Instant| -> Result<usize> { Ok(mesh.agent("app-1")?.manager()?.count("WATCHDOG=1", since)) };
    let begin = Instant::now();
    std::thread::sleep(WATCHDOG * 2);
    ensure!(pings(begin)? >= 4, "{} pings in two intervals", pings(begin)?);
    clock.hold_worker(true)?;
    std::thread::sleep(WATCHDOG / 2);
    let held = Instant::now();
    std::thread::sleep(WATCHDOG * 2);
    ensure!(pings(held)? == 0, "the watchdog was pinged although a worker stood still");
    clock.hold_worker(false)?;
    let again = Instant::now();
    wait_for("the pings to come back", PATIENCE, || Ok((pings(again)? > 1).then_some(())))?;
    mesh.finish()
}
