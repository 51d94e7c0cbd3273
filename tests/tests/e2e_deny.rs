//! What no rule names does not happen: at the sender, at the receiver, and around both.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use cloison_tests::lab::agent;
use cloison_tests::lab::mesh::Mesh;
use cloison_tests::lab::tool::Tool;
use cloison_tests::lab::wireguard::{Peer, WireGuard};

const POLICY: &str = "\
version: 1
components:
  postgres: {on: db-1,  attach: host, services: {sql: tcp/5432, echo: udp/7000}}
  n8n:      {on: app-1, attach: host}
  rogue:    {on: app-2, attach: host}
allow:
  - n8n -> postgres:sql
  - n8n -> postgres:echo
";
const HOSTS: [&str; 3] = ["app-1", "app-2", "db-1"];
const SQL: u16 = 5432;
const OTHER: u16 = 6000;

#[test]
fn unpaired_ports_directions_and_hosts_are_refused_at_once_and_nothing_reaches_the_other_side() -> Result<()> {
    let mesh = Mesh::with_policy("e2e-deny", &HOSTS, POLICY)?;
    let (postgres, n8n) = (mesh.instance("postgres", "db-1")?, mesh.instance("n8n", "app-1")?);
    let mut listeners = Vec::new();
    for at in postgres.sockets(SQL).into_iter().chain(postgres.sockets(OTHER)) {
        listeners.push(Tool::tcp_listen(mesh.host("db-1")?.net(), at)?);
    }
    for at in n8n.sockets(SQL) {
        listeners.push(Tool::tcp_listen(mesh.host("app-1")?.net(), at)?);
    }
    for at in postgres.sockets(SQL) {
        mesh.must_reach("app-1", at)?;
    }
    let inside = mesh.host("db-1")?.capture(agent::INTERFACE)?;
    let wire = mesh.host("db-1")?.capture_wire()?;
    let before = mesh.drops("app-2", "no_rule")? + mesh.drops("app-2", "unknown_destination")?;
    for at in postgres.sockets(OTHER) {
        mesh.must_be_refused("app-1", at)?;
    }
    for at in postgres.sockets(SQL) {
        mesh.must_be_refused("app-2", at)?;
        let (echoes, errors) = Tool::udp_attempt(mesh.host("app-2")?.net(), (at.ip(), 7000).into(), 5)?;
        ensure!(echoes == 0 && errors > 0, "UDP of app-2: {echoes} echoes, {errors} errors");
    }
    let after = mesh.drops("app-2", "no_rule")? + mesh.drops("app-2", "unknown_destination")?;
    ensure!(after >= before + 4, "app-2 counted {before}, then {after} denials");
    for at in n8n.sockets(SQL) {
        mesh.must_be_refused("db-1", at)?;
    }
    let (inside, wire) = (inside.stop()?, wire.stop()?);
    ensure!(
        inside.matching(|p| p.to_port == OTHER && p.to != IpAddr::V4(n8n.v4)).is_empty(),
        "a denied packet came out on db-1"
    );
    for address in mesh.host("app-2")?.addresses() {
        ensure!(wire.with_address(address) == 0, "a datagram of app-2 reached db-1");
    }
    listeners.iter_mut().try_for_each(|l| l.process().stop().map(drop))?;
    mesh.finish()
}

#[test]
fn a_paired_host_that_obeys_no_rules_is_dropped_at_the_receiver_with_the_reason_counted() -> Result<()> {
    let mut mesh = Mesh::with_policy("e2e-lawless", &HOSTS, POLICY)?;
    let (postgres, n8n) = (mesh.instance("postgres", "db-1")?, mesh.instance("n8n", "app-1")?);
    let rogue = mesh.instance("rogue", "app-2")?;
    let key = wireguard_key(&mesh.agent("app-1")?.state())?;
    // Root on app-1 puts our agent out of the way and takes its key to another WireGuard, which filters nothing.
    mesh.agent_mut("app-1")?.stop()?;
    mesh.host("app-1")?.net().nft("flush ruleset")?;
    let db = mesh.host("db-1")?;
    let peer = Peer {
        key: public_key(&mesh, "db-1")?,
        endpoint: Some(SocketAddr::new(IpAddr::V4(db.v4()?), agent::PORT)),
        addresses: postgres.addresses().to_vec(),
    };
    let own: Vec<IpAddr> = n8n.addresses().into_iter().chain(rogue.addresses()).collect();
    let mut lawless = WireGuard::start(mesh.host("app-1")?, &key, agent::PORT, &own, &peer)?;
    let mut listeners = Vec::new();
    for at in postgres.sockets(SQL).into_iter().chain(postgres.sockets(OTHER)) {
        listeners.push(Tool::tcp_listen(db.net(), at)?);
    }
    let inside = db.capture(agent::INTERFACE)?;
    let reach = |at, from| db_reached_from(&mesh, at, from);
    for (at, from) in postgres.sockets(SQL).into_iter().zip(n8n.addresses()) {
        ensure!(
            reach(at, from)?,
            "the rule's own port should work from {from} to {at}, whoever speaks WireGuard"
        );
    }
    let before = mesh.drops("db-1", "no_rule")?;
    for (at, from) in postgres.sockets(OTHER).into_iter().zip(n8n.addresses()) {
        ensure!(!reach(at, from)?, "{at} was reached against the rules");
    }
    ensure!(
        mesh.drops("db-1", "no_rule")? > before,
        "db-1 did not count what it dropped: {:?}",
        mesh.agent("db-1")?.status()?
    );
    let before = mesh.drops("db-1", "source_not_peer")?;
    for (at, from) in postgres.sockets(SQL).into_iter().zip(rogue.addresses()) {
        ensure!(!reach(at, from)?, "app-1 was taken for {from}");
    }
    ensure!(mesh.drops("db-1", "source_not_peer")? > before, "db-1 did not count forged sources");
    let inside = inside.stop()?;
    ensure!(
        inside.matching(|p| p.to_port == OTHER).is_empty(),
        "a packet against the rules came out on db-1"
    );
    ensure!(
        rogue.addresses().into_iter().all(|a| inside.with_address(a) == 0),
        "a forged source came out on db-1"
    );
    lawless.stop()?;
    listeners.iter_mut().try_for_each(|l| l.process().stop().map(drop))?;
    mesh.finish()
}

#[test]
fn a_neighbour_that_routes_overlay_addresses_to_a_host_gets_nothing_and_leaves_no_trace_inside() -> Result<()> {
    let mut mesh = Mesh::builder("e2e-neighbour", &HOSTS).lab(|lab| lab.host("neighbour")).start()?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(POLICY)?;
    let postgres = mesh.instance("postgres", "db-1")?;
    let (db, neighbour) = (mesh.host("db-1")?, mesh.host("neighbour")?);
    let mut listeners = Vec::new();
    for at in postgres.sockets(SQL) {
        listeners.push(Tool::tcp_listen(db.net(), at)?);
    }
    let (v4, v6) = (postgres.v4.to_string(), postgres.v6.to_string());
    neighbour
        .net()
        .run(&["ip", "route", "add", &v4, "via", &db.v4()?.to_string()])?
        .ok()?;
    neighbour
        .net()
        .run(&["ip", "route", "add", &v6, "via", &db.v6()?.to_string()])?
        .ok()?;
    let wire = db.capture_wire()?;
    for at in postgres.sockets(SQL) {
        let event = Tool::tcp_attempt(neighbour.net(), at, Duration::from_secs(2))?;
        ensure!(event.what == "failed", "a neighbour reached {at}: {event:?}");
    }
    for at in postgres.sockets(7000) {
        ensure!(Tool::udp_attempt(neighbour.net(), at, 5)?.0 == 0);
    }
    // The other way round: a process of the component's own host that binds its overlay address and dials the LAN.
    let outside = Tool::udp_listen(neighbour.net(), (neighbour.v4()?, OTHER).into())?;
    let mut dialling = Tool::start(
        db.net(),
        "bound",
        &[
            "udp-stream",
            &SocketAddr::new(IpAddr::V4(neighbour.v4()?), OTHER).to_string(),
            "--count",
            "10",
            "--from",
            &v4,
        ],
    )?;
    dialling.process().wait(Duration::from_secs(10))?;
    ensure!(outside.last("received")?.is_none(), "a packet with an overlay source left in clear");
    let recording = wire.stop()?;
    let answers = recording.matching(|p| postgres.addresses().contains(&p.from));
    ensure!(answers.is_empty(), "{} packets with an overlay source on the wire", answers.len());
    for listener in &listeners {
        ensure!(listener.last("accepted")?.is_none());
    }
    drop(listeners);
    mesh.finish()
}

#[test]
fn a_host_holds_no_byte_about_hosts_that_no_rule_pairs_it_with() -> Result<()> {
    let mut mesh = Mesh::builder("e2e-need-to-know", &HOSTS).start()?;
    for agent in mesh.agents_mut() {
        agent.set_log_filter("trace");
    }
    mesh.join_all()?;
    // Names that cannot turn up by chance.
    let policy = POLICY.replace("n8n", "workflow-engine").replace("rogue", "unpaired-rogue");
    mesh.coordinator.apply_and_wait(&policy)?;
    let postgres = mesh.instance("postgres", "db-1")?;
    let _listener = Tool::tcp_listen(mesh.host("db-1")?.net(), (postgres.v4, SQL).into())?;
    mesh.must_reach("app-1", (postgres.v4, SQL).into())?;
    mesh.agent("app-2")?.command(&["explain", "postgres:sql"])?.refused()?;
    // app-2 is paired with nobody; app-1 and db-1 with each other. (What app-2 is asked about is its own business, so it is not searched
    // for the name in the question.)
    for (reader, stranger, component) in [
        ("app-2", "db-1", ""),
        ("app-2", "app-1", "workflow-engine"),
        ("app-1", "app-2", "unpaired-rogue"),
        ("db-1", "app-2", "unpaired-rogue"),
    ] {
        let secrets = facts_about(&mesh, stranger, component)?;
        let mut held = vec![("log".to_owned(), mesh.agent(reader)?.log()?.into_bytes())];
        read_folder(&mesh.agent(reader)?.state(), &mut held)?;
        ensure!(held.len() > 4, "{reader} holds only {} files", held.len());
        for (place, bytes) in &held {
            for (what, fact) in &secrets {
                let found = bytes.windows(fact.len()).any(|w| w == fact.as_slice());
                ensure!(!found, "{reader}: {place} holds {what} of {stranger}");
            }
        }
    }
    // The search itself works: app-1 does hold what it must know about db-1.
    let mut held = Vec::new();
    read_folder(&mesh.agent("app-1")?.state(), &mut held)?;
    let key = public_key(&mesh, "db-1")?;
    ensure!(
        held.iter().any(|(_, bytes)| bytes.windows(32).any(|w| w == key)),
        "app-1 does not hold the key of its own peer"
    );
    mesh.finish()
}

/// Whether the echo of one message comes back, from a source address of our choice.
fn db_reached_from(mesh: &Mesh, at: SocketAddr, from: IpAddr) -> Result<bool> {
    let (at, from) = (at.to_string(), from.to_string());
    let arguments = ["tcp-stream", &at, "--count", "1", "--connect-ms", "1500", "--from", &from];
    let mut tool = Tool::start(mesh.host("app-1")?.net(), "lawless", &arguments)?;
    tool.process().wait(Duration::from_secs(20))?;
    Ok(tool.last("received")?.is_some())
}

/// Keys, addresses, id and names of a host, raw, in hexadecimal and in base64.
fn facts_about(mesh: &Mesh, host: &str, component: &str) -> Result<Vec<(String, Vec<u8>)>> {
    let summary = mesh.coordinator.host(host)?;
    let mut raw: Vec<(&str, Vec<u8>)> = vec![
        ("the WireGuard key", public_key(mesh, host)?.to_vec()),
        ("the id", summary.id.0.to_vec()),
    ];
    let mut texts = vec![("the name", host.to_owned()), ("the id", summary.id.to_string())];
    if !component.is_empty() {
        texts.push(("the component", component.to_owned()));
    }
    for instance in &summary.instances {
        raw.push(("the IPv6 address", instance.v6.octets().to_vec()));
        texts.extend([
            ("the IPv4 address", instance.v4.to_string()),
            ("the IPv6 address", instance.v6.to_string()),
        ]);
    }
    for address in mesh.host(host)?.addresses() {
        texts.push(("the underlay address", address.to_string()));
    }
    let mut facts: Vec<(String, Vec<u8>)> = texts.into_iter().map(|(what, text)| (what.to_owned(), text.into_bytes())).collect();
    for (what, bytes) in raw {
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        facts.push((format!("{what} (hexadecimal)"), hex.to_uppercase().into_bytes()));
        facts.push((format!("{what} (hexadecimal)"), hex.into_bytes()));
        for engine in [
            &base64::engine::general_purpose::STANDARD_NO_PAD,
            &base64::engine::general_purpose::URL_SAFE_NO_PAD,
        ] {
            facts.push((format!("{what} (base64)"), engine.encode(&bytes).into_bytes()));
        }
        facts.push((what.to_owned(), bytes));
    }
    Ok(facts)
}

fn read_folder(folder: &Path, into: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            read_folder(&path, into)?;
        } else {
            into.push((path.display().to_string(), std::fs::read(&path)?));
        }
    }
    Ok(())
}

/// The private WireGuard key in a state folder: the last 32 bytes of its file.
fn wireguard_key(state: &Path) -> Result<[u8; 32]> {
    let bytes = std::fs::read(state.join("wireguard-key"))?;
    Ok(*bytes.last_chunk().context("the key file is too short")?)
}

fn public_key(mesh: &Mesh, host: &str) -> Result<[u8; 32]> {
    Ok(*mesh.coordinator.host(host)?.wg_key.as_bytes())
}
