//! Without the coordinator: what was allowed goes on, over restarts and reboots, for as long as the lease lasts and not a second longer; and
//! when the coordinator is back, everything finds together by itself.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use cloison_agent::state::{StateDir, view_cache};
use cloison_tests::lab::mesh::Mesh;
use cloison_tests::lab::stall::{POLICY, Streams};
use cloison_tests::lab::tool::Tool;
use cloison_tests::lab::wait_for;

const HOSTS: [&str; 2] = ["app-1", "db-1"];
const PATIENCE: Duration = Duration::from_secs(20);
const SQL: u16 = 5432;

/// What is left of a host's lease, in seconds.
fn lease_left(mesh: &Mesh, host: &str) -> Result<u64> {
    let status = mesh.agent(host)?.status()?;
    status
        .pointer("/lease/left_secs")
        .and_then(serde_json::Value::as_u64)
        .context("a status without a lease")
}

fn back(mesh: &Mesh, host: &str) -> Result<()> {
    wait_for("the agent to be back", PATIENCE, || Ok(mesh.agent(host)?.status().ok().map(drop)))
}

#[test]
fn agents_restart_without_a_coordinator_and_all_ends_with_the_lease_and_comes_back_with_it() -> Result<()> {
    let mut mesh = Mesh::builder("e2e-outage", &HOSTS).init(&["--lease", "30s"]).start()?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(POLICY)?;
    let streams = Streams::open(&mesh)?;
    mesh.coordinator.kill()?;
    mesh.agent_mut("app-1")?.stop()?;
    mesh.agent_mut("app-1")?.launch()?;
    mesh.agent_mut("db-1")?.kill()?;
    mesh.agent_mut("db-1")?.launch()?;
    streams.must_go_on()?;
    HOSTS.iter().try_for_each(|host| back(&mesh, host))?;

    // A restart never lengthens the lease, and costs a second of it at most.
    let (asked, left) = (SystemTime::now(), HOSTS.map(|host| lease_left(&mesh, host)));
    let [app, db] = left;
    let left = Duration::from_secs(app?.min(db?));
    // What is shown is cut to whole seconds: the lease ends within a second behind this, counted from the answer.
    let (first_end, latest_end) = (asked + left, SystemTime::now() + left + Duration::from_secs(1));
    std::thread::sleep(first_end.duration_since(SystemTime::now()).unwrap_or_default() + Duration::from_secs(3));
    let last = streams.last_received()?;
    ensure!(
        last <= latest_end + Duration::from_secs(1),
        "something passed {:?} after the lease",
        last.duration_since(latest_end)
    );
    ensure!(
        last + Duration::from_secs(3) >= first_end,
        "everything ended {:?} before the lease",
        first_end.duration_since(last)
    );
    // A restart behind the lease opens nothing.
    mesh.agent_mut("app-1")?.kill()?;
    mesh.agent_mut("app-1")?.launch()?;
    back(&mesh, "app-1")?;
    ensure!(lease_left(&mesh, "app-1")? == 0);
    let at = (mesh_instance(&mesh)?, SQL).into();
    let _listener = Tool::tcp_listen(mesh.host("db-1")?.net(), at)?;
    ensure!(mesh.attempt("app-1", at)?.what == "failed");

    mesh.coordinator.serve()?;
    wait_for("the pair to talk again", PATIENCE * 2, || {
        Ok((mesh.attempt("app-1", at)?.what == "received").then_some(()))
    })?;
    // And what is decided now reaches both.
    mesh.coordinator.apply_and_wait(&POLICY.replace("  - n8n -> postgres:sql\n", ""))?;
    mesh.must_be_refused("app-1", at)?;
    mesh.finish()
}

/// The overlay address of the database, as its host knows it: the coordinator may be away.
fn mesh_instance(mesh: &Mesh) -> Result<std::net::IpAddr> {
    let status = mesh.agent("db-1")?.status()?;
    let address = status.pointer("/instances/0/addresses/0").and_then(serde_json::Value::as_str);
    Ok(address.context("an instance without an address")?.parse()?)
}

#[test]
fn after_a_reboot_without_a_coordinator_the_mesh_is_back_from_the_state_folder_alone() -> Result<()> {
    let mut mesh = Mesh::with_policy("e2e-reboot", &HOSTS, POLICY)?;
    let (n8n, postgres) = (mesh.instance("n8n", "app-1")?, mesh.instance("postgres", "db-1")?);
    let at = (postgres.v4, SQL).into();
    {
        let _listener = Tool::tcp_listen(mesh.host("db-1")?.net(), at)?;
        mesh.must_reach("app-1", at)?;
    }
    for host in HOSTS {
        let state = StateDir::open(mesh.agent(host)?.state())?;
        wait_for("the peer to be on disk", PATIENCE, || {
            Ok(view_cache::load_live(&state)?.filter(|live| live.len() == 1).map(drop))
        })?;
        ensure!(view_cache::load_endpoints(&state)?.len() == 1);
    }
    mesh.coordinator.kill()?;
    for host in HOSTS {
        mesh.agent_mut(host)?.kill()?;
        mesh.lab().reboot(host)?;
        let shown = mesh.host(host)?.net().run(&["ip", "-br", "link"])?.ok()?.stdout;
        ensure!(!shown.contains("cloison0"), "{shown}");
        let wire = mesh.host(host)?.capture_wire()?;
        mesh.agent(host)?.command(&["prepare"])?.ok()?;
        // Between the boot and the agent: every address of the mesh leads nowhere, whatever other routes there are.
        let net = mesh.host(host)?.net();
        net.run(&["ip", "route", "add", "default", "dev", "eth0"])?.ok()?;
        net.run(&["ip", "-6", "route", "add", "default", "dev", "eth0"])?.ok()?;
        for address in postgres.addresses().into_iter().chain(n8n.addresses()) {
            let event = Tool::tcp_attempt(net, (address, SQL).into(), Duration::from_secs(2))?;
            ensure!(event.what == "failed", "{address} was reached without an agent: {event:?}");
            let _ = Tool::udp_attempt(net, (address, 7000).into(), 3)?;
        }
        mesh.agent_mut(host)?.start()?;
        let recording = wire.stop()?;
        for address in postgres.addresses().into_iter().chain(n8n.addresses()) {
            ensure!(!recording.mentions(address), "{address} was seen on the wire of {host}");
        }
    }
    let _listener = Tool::tcp_listen(mesh.host("db-1")?.net(), at)?;
    mesh.must_reach("app-1", at)?;
    mesh.must_be_refused("app-1", (postgres.v4, 22).into())?;
    mesh.coordinator.serve()?;
    mesh.wait_until_applied()?;
    mesh.finish()
}
