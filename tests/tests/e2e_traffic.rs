//! What a rule allows works: real programs, real PostgreSQL, both address families inside and outside, small and usual MTU.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cloison_tests::lab::agent;
use cloison_tests::lab::mesh::{Instance, Mesh};
use cloison_tests::lab::postgres::{self, Postgres};
use cloison_tests::lab::tool::Tool;
use cloison_tests::lab::{Underlay, wait_for};

const PAIR: &str = "\
version: 1
components:
  postgres: {on: db-1,  attach: host, services: {sql: tcp/5432, echo: udp/7000}}
  n8n:      {on: app-1, attach: host}
allow:
  - n8n -> postgres:sql
  - n8n -> postgres:echo
";
/// Occurs in a query, and nowhere else.
const SECRET: &str = "a-secret-that-the-wire-must-not-show";

/// A mesh of app-1 and db-1 on such a wire, with a server on db-1.
fn pair(name: &str, underlay: Underlay, mtu: u32) -> Result<(Mesh, Postgres, Instance)> {
    let mut mesh = Mesh::builder(name, &["app-1", "db-1"])
        .lab(|lab| lab.underlay(underlay).mtu(mtu))
        .start()?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(PAIR)?;
    let instance = mesh.instance("postgres", "db-1")?;
    let server = Postgres::start(mesh.host("db-1")?, &instance.addresses())?;
    Ok((mesh, server, instance))
}

fn queries_go_through_unseen(name: &str, underlay: Underlay) -> Result<()> {
    let (mesh, _server, instance) = pair(name, underlay, 1500)?;
    let n8n = mesh.instance("n8n", "app-1")?;
    let wire = mesh.host("db-1")?.capture_wire()?;
    for (address, own) in instance.addresses().into_iter().zip(n8n.addresses()) {
        let sql = format!("select host(inet_client_addr()) || ' {SECRET}'");
        let answer = postgres::query(mesh.host("app-1")?.net(), address, &sql, 5)?.ok()?;
        ensure!(answer.stdout == format!("{own} {SECRET}\n"), "{answer:?}");
    }
    let recording = wire.stop()?;
    ensure!(recording.containing(SECRET.as_bytes()) == 0, "a query passed the wire in clear");
    for address in instance.addresses().into_iter().chain(n8n.addresses()) {
        ensure!(recording.with_address(address) == 0, "{address} passed the wire in clear");
    }
    let sealed = recording.matching(|p| p.protocol == 17 && p.to_port == agent::PORT && p.from_port == agent::PORT);
    ensure!(sealed.len() > 10, "{} sealed datagrams", sealed.len());
    mesh.finish()
}

#[test]
fn queries_go_through_over_both_families_on_an_ipv4_underlay_and_nothing_is_in_clear() -> Result<()> {
    queries_go_through_unseen("e2e-underlay-v4", Underlay::V4)
}

#[test]
fn queries_go_through_over_both_families_on_an_ipv6_underlay_and_nothing_is_in_clear() -> Result<()> {
    queries_go_through_unseen("e2e-underlay-v6", Underlay::V6)
}

fn loads_of_data_go_through(name: &str, mtu: u32) -> Result<()> {
    let (mesh, _server, instance) = pair(name, Underlay::Both, mtu)?;
    let app = mesh.host("app-1")?.net();
    for address in instance.addresses() {
        let answer = postgres::query(app, address, "select repeat('cloison', 300000)", 5)?.ok()?;
        ensure!(answer.stdout.len() == 300_000 * 7 + 1, "{} bytes came", answer.stdout.len());
    }
    postgres::fill(app, IpAddr::V4(instance.v4), 1)?.ok()?;
    let report = postgres::bench(app, IpAddr::V6(instance.v6), 5, &["-c", "4"])?.ok()?;
    ensure!(report.stdout.contains("number of failed transactions: 0"), "{}", report.stdout);
    mesh.finish()
}

#[test]
fn pgbench_has_no_failed_transaction_and_long_answers_arrive_on_a_wire_of_1500_bytes() -> Result<()> {
    loads_of_data_go_through("e2e-mtu-1500", 1500)
}

#[test]
fn pgbench_has_no_failed_transaction_and_long_answers_arrive_on_a_wire_of_1280_bytes() -> Result<()> {
    loads_of_data_go_through("e2e-mtu-1280", 1280)
}

#[test]
fn overlay_addresses_stay_off_the_wire_also_while_the_agent_is_down() -> Result<()> {
    let (mut mesh, _server, instance) = pair("e2e-agent-down", Underlay::Both, 1500)?;
    let n8n = mesh.instance("n8n", "app-1")?;
    let wire = mesh.host("app-1")?.capture_wire()?;
    mesh.agent_mut("app-1")?.kill()?;
    for address in instance.addresses() {
        postgres::query(mesh.host("app-1")?.net(), address, "select 1", 1)?.refused()?;
        let (echoes, _) = Tool::udp_attempt(mesh.host("app-1")?.net(), (address, 7000).into(), 5)?;
        ensure!(echoes == 0);
    }
    mesh.agent_mut("app-1")?.start()?;
    wait_for("the pair to talk again", Duration::from_secs(20), || {
        Ok(postgres::query(mesh.host("app-1")?.net(), IpAddr::V4(instance.v4), "select 1", 2)?
            .ok()
            .ok())
    })?;
    mesh.agent_mut("app-1")?.stop()?;
    postgres::query(mesh.host("app-1")?.net(), IpAddr::V4(instance.v4), "select 1", 1)?.refused()?;
    let recording = wire.stop()?;
    for address in instance.addresses().into_iter().chain(n8n.addresses()) {
        ensure!(recording.with_address(address) == 0, "{address} passed the wire in clear");
    }
    mesh.finish()
}

#[test]
fn a_pair_goes_on_while_the_coordinator_is_down_and_while_an_endpoint_moves() -> Result<()> {
    let (mut mesh, _server, instance) = pair("e2e-roaming", Underlay::V4, 1500)?;
    let _listener = Tool::udp_listen(mesh.host("db-1")?.net(), (instance.v4, 7000).into())?;
    let stream = Tool::udp_stream(mesh.host("app-1")?.net(), (instance.v4, 7000).into())?;
    mesh.coordinator.kill()?;
    stream.wait_for_more(100, Duration::from_secs(10))?;
    let app = mesh.host("app-1")?;
    let old = format!("{}/24", app.v4()?);
    app.net().run(&["ip", "address", "add", "198.51.100.77/24", "dev", "eth0"])?.ok()?;
    app.net().run(&["ip", "address", "delete", &old, "dev", "eth0"])?.ok()?;
    if !app
        .net()
        .run(&["ip", "address", "show", "dev", "eth0"])?
        .ok()?
        .stdout
        .contains("198.51.100.77")
    {
        // A secondary address goes with its primary one.
        app.net().run(&["ip", "address", "add", "198.51.100.77/24", "dev", "eth0"])?.ok()?;
    }
    stream.wait_for_more(200, Duration::from_secs(20))?;
    mesh.finish()
}

#[test]
fn components_in_namespaces_of_one_host_meet_through_the_same_filter() -> Result<()> {
    let mut mesh = Mesh::builder("e2e-namespaces", &["app-1"]).start()?;
    let app = mesh.host("app-1")?;
    let (front, back) = (app.component_namespace("front")?, app.component_namespace("back")?);
    let policy = format!(
        "version: 1\ncomponents:\n  \
           front: {{on: app-1, attach: {{netns: {}}}}}\n  \
           back:  {{on: app-1, attach: {{netns: {}}}, services: {{api: tcp/8080}}}}\n  \
           local: {{on: app-1, attach: host, services: {{log: tcp/514}}}}\n\
         allow:\n  - front -> back:api\n  - back -> local:log\n",
        front.path().display(),
        back.path().display()
    );
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(&policy)?;
    let (front_at, back_at, local_at) = (
        mesh.instance("front", "app-1")?,
        mesh.instance("back", "app-1")?,
        mesh.instance("local", "app-1")?,
    );
    let limit = Duration::from_secs(3);
    for family in [0, 1] {
        let to_back = *back_at.sockets(8080).get(family).context("two families")?;
        let to_other = *back_at.sockets(8081).get(family).context("two families")?;
        let to_local = *local_at.sockets(514).get(family).context("two families")?;
        let to_front = *front_at.sockets(8080).get(family).context("two families")?;
        let mut listeners = [
            Tool::tcp_listen(&back, to_back)?,
            Tool::tcp_listen(&back, to_other)?,
            Tool::tcp_listen(mesh.host("app-1")?.net(), to_local)?,
            Tool::tcp_listen(&front, to_front)?,
        ];
        ensure!(Tool::tcp_attempt(&front, to_back, limit)?.what == "received");
        ensure!(Tool::tcp_attempt(&back, to_local, limit)?.what == "received");
        for (from, to) in [(&front, to_other), (&front, to_local), (&back, to_front)] {
            let event = Tool::tcp_attempt(from, to, limit)?;
            ensure!(
                event.what == "failed" && event.kind() != "TimedOut",
                "{} -> {to}: {event:?}",
                from.name()
            );
        }
        listeners.iter_mut().try_for_each(|l| l.process().stop().map(drop))?;
    }
    mesh.finish()
}
