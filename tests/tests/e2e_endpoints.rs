//! Where hosts are on the underlay: several addresses, addresses that change under open streams, an agent beside the coordinator, and hosts
//! of which one has a family that the other lacks.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cloison_tests::lab::agent;
use cloison_tests::lab::mesh::{COORDINATOR, Mesh};
use cloison_tests::lab::netns::Netns;
use cloison_tests::lab::tool::Tool;
use cloison_tests::lab::{Underlay, wait_for};

const POLICY: &str = "\
version: 1
components:
  postgres: {on: db-1,  attach: host, services: {sql: tcp/5432}}
  n8n:      {on: app-1, attach: host}
allow:
  - n8n -> postgres:sql
";
const SQL: u16 = 5432;
/// Long enough for one handshake that is lost and repeated (5 s), and a margin for a busy machine.
const MOVE_LIMIT: Duration = Duration::from_secs(15);

/// Gives a host's interface on the wire this IPv4 address in place of all others.
fn move_to(net: &Netns, address: Ipv4Addr) -> Result<()> {
    net.run(&["ip", "-4", "address", "flush", "dev", "eth0"])?.ok()?;
    net.run(&["ip", "address", "add", &format!("{address}/24"), "dev", "eth0"])?.ok()?;
    Ok(())
}

/// Where the agent of a host last heard its only peer.
fn endpoint(mesh: &Mesh, host: &str) -> Result<Option<IpAddr>> {
    let status = mesh.agent(host)?.status()?;
    let text = status["peers"][0]["endpoint"].as_str().map(str::to_owned);
    Ok(text.map(|text| text.parse::<std::net::SocketAddr>()).transpose()?.map(|at| at.ip()))
}

#[test]
fn a_host_with_several_addresses_answers_from_the_one_that_was_asked() -> Result<()> {
    let second = Ipv4Addr::new(198, 51, 100, 133);
    let mut mesh = Mesh::builder("e2e-multi-homed", &["app-1", "db-1"])
        .lab(|lab| lab.underlay(Underlay::V4))
        .start()?;
    let (app, db) = (mesh.host("app-1")?, mesh.host("db-1")?);
    db.net()
        .run(&["ip", "address", "add", &format!("{second}/24"), "dev", "eth0"])?
        .ok()?;
    // app-1 has no way to db-1's first address, which is the one that db-1's kernel would choose to answer from.
    let (first, app_at) = (db.v4()?, app.v4()?);
    app.net().nft(&format!(
        "add table inet lost; add chain inet lost out {{ type filter hook output priority 0; }}; \
         add rule inet lost out ip daddr {first} udp dport {0} drop; \
         add chain inet lost in {{ type filter hook input priority 0; }}; add rule inet lost in ip saddr {first} udp sport {0} drop;",
        agent::PORT
    ))?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(POLICY)?;
    let at = mesh.instance("postgres", "db-1")?;
    let _listener = Tool::tcp_listen(mesh.host("db-1")?.net(), (at.v4, SQL).into())?;
    wait_for("a session by the second address", MOVE_LIMIT, || {
        Ok((mesh.attempt("app-1", (at.v4, SQL).into())?.what == "received").then_some(()))
    })?;
    ensure!(endpoint(&mesh, "app-1")? == Some(second.into()));
    let wire = mesh.host("db-1")?.capture_wire()?;
    let stream = Tool::tcp_stream(mesh.host("app-1")?.net(), (at.v4, SQL).into())?;
    stream.wait_for_more(500, MOVE_LIMIT)?;
    let recording = wire.stop()?;
    let sealed =
        |from: Ipv4Addr| recording.matching(|p| p.from == IpAddr::V4(from) && p.to == IpAddr::V4(app_at) && p.from_port == agent::PORT);
    ensure!(!sealed(second).is_empty(), "nothing came from the address that was asked");
    ensure!(
        sealed(first).is_empty(),
        "{} datagrams came from another address",
        sealed(first).len()
    );
    mesh.finish()
}

/// Moves a host under an open stream from app-1 to db-1, and gives how long the stream stood still.
fn stall_of_a_move(name: &str, who: &str, coordinator: bool) -> Result<Duration> {
    let mut mesh = Mesh::builder(name, &["app-1", "db-1"])
        .lab(|lab| lab.underlay(Underlay::V4))
        .start()?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(POLICY)?;
    let at = mesh.instance("postgres", "db-1")?;
    let _listener = Tool::tcp_listen(mesh.host("db-1")?.net(), (at.v4, SQL).into())?;
    let mut stream = Tool::tcp_stream(mesh.host("app-1")?.net(), (at.v4, SQL).into())?;
    stream.wait_for_more(200, MOVE_LIMIT)?;
    if !coordinator {
        mesh.coordinator.kill()?;
    }
    let moved = Ipv4Addr::new(198, 51, 100, 177);
    move_to(mesh.host(who)?.net(), moved)?;
    let began = Instant::now();
    stream.wait_for_more(200, MOVE_LIMIT)?;
    let stall = began.elapsed();
    ensure!(stream.process().ended()?.is_none(), "the stream has ended");
    let other = if who == "app-1" { "db-1" } else { "app-1" };
    ensure!(
        endpoint(&mesh, other)? == Some(moved.into()),
        "{other} does not know where {who} is"
    );
    if coordinator {
        // What peers are told that come later.
        wait_for("the coordinator to know the new address", Duration::from_secs(45), || {
            let known = mesh.coordinator.host(who)?;
            let known = serde_json::to_string(&known)?;
            Ok(known.contains(&moved.to_string()).then_some(()))
        })?;
    }
    mesh.finish()?;
    Ok(stall)
}

#[test]
fn a_stream_outlives_that_the_host_which_sends_gets_another_address() -> Result<()> {
    let stall = stall_of_a_move("e2e-move-sender", "app-1", false)?;
    println!("the stream went on after {stall:?}");
    Ok(())
}

#[test]
fn a_stream_outlives_that_the_host_which_is_sent_to_gets_another_address_without_a_coordinator() -> Result<()> {
    let stall = stall_of_a_move("e2e-move-receiver", "db-1", false)?;
    println!("the stream went on after {stall:?}");
    Ok(())
}

#[test]
fn the_coordinator_learns_that_a_host_got_another_address() -> Result<()> {
    stall_of_a_move("e2e-move-hint", "db-1", true).map(drop)
}

#[test]
fn an_agent_beside_the_coordinator_on_one_machine_is_a_host_like_any_other() -> Result<()> {
    let mut mesh = Mesh::builder("e2e-beside", &[COORDINATOR, "app-1"]).start()?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(&POLICY.replace("db-1", COORDINATOR))?;
    let at = mesh.instance("postgres", COORDINATOR)?;
    for to in at.sockets(SQL) {
        let mut listener = Tool::tcp_listen(mesh.host(COORDINATOR)?.net(), to)?;
        mesh.must_reach("app-1", to)?;
        listener.process().stop()?;
    }
    // The coordinator goes and comes back, and the agent beside it goes on.
    let to = (at.v4, SQL).into();
    let _listener = Tool::tcp_listen(mesh.host(COORDINATOR)?.net(), to)?;
    let stream = Tool::tcp_stream(mesh.host("app-1")?.net(), to)?;
    mesh.coordinator.kill()?;
    stream.wait_for_more(200, MOVE_LIMIT)?;
    mesh.coordinator.serve()?;
    let linked = |host: &str| -> Result<bool> { Ok(mesh.agent(host)?.status()?["link"]["state"] == "linked") };
    wait_for("both links", Duration::from_secs(60), || {
        Ok((linked(COORDINATOR)? && linked("app-1")?).then_some(()))
    })?;
    stream.wait_for_more(200, MOVE_LIMIT)?;
    mesh.finish()
}

#[test]
fn a_host_with_both_families_meets_one_that_has_ipv4_alone_and_one_that_has_ipv6_alone() -> Result<()> {
    let mut mesh = Mesh::builder("e2e-families", &["both", "old", "new"]).start()?;
    let old = mesh.host("old")?.net();
    old.set("ipv6/conf/eth0/disable_ipv6", "1")?;
    let new = mesh.host("new")?.net();
    new.run(&["ip", "-4", "address", "flush", "dev", "eth0"])?.ok()?;
    mesh.join_all()?;
    let policy = "\
version: 1
components:
  server: {on: both, attach: host, services: {sql: tcp/5432}}
  client: {on: [old, new], attach: host, services: {sql: tcp/5432}}
allow:
  - client -> server:sql
  - server -> client:sql
";
    mesh.coordinator.apply_and_wait(policy)?;
    let server = mesh.instance("server", "both")?;
    let both = mesh.host("both")?.net();
    let _listeners = server
        .sockets(SQL)
        .into_iter()
        .map(|at| Tool::tcp_listen(both, at))
        .collect::<Result<Vec<_>>>()?;
    for (host, is_v4) in [("old", true), ("new", false)] {
        for to in server.sockets(SQL) {
            mesh.must_reach(host, to)?;
        }
        let at = endpoint(&mesh, host)?.context("an endpoint")?;
        ensure!(at.is_ipv4() == is_v4, "{host} reaches both by {at}");
        let client = mesh.instance("client", host)?;
        let mut listener = Tool::tcp_listen(mesh.host(host)?.net(), (client.v4, SQL).into())?;
        mesh.must_reach("both", (client.v4, SQL).into())?;
        listener.process().stop()?;
    }
    mesh.finish()
}
