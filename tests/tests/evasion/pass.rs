//! Packets that the host only forwards: a bridge with containers on it, as Docker makes one, neither leads into the mesh nor is disturbed by it.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use anyhow::{Context, Result};
use cloison_tests::lab::mesh::Mesh;
use cloison_tests::lab::netns::Netns;
use cloison_tests::lab::person::{Person, Who};
use cloison_tests::lab::sockets::{By, Order, Shape, any_like};
use cloison_tests::lab::wait_for;

use crate::stage::{BOTH, ECHO, Expected, HOOK, HOSTS, Matrix, PATIENCE, Stage, way};

/// The published port of the container on app-1, and a server on all of app-1's addresses.
const PUBLISHED: u16 = 8080;
const TRUSTING: u16 = 9000;
const CONTAINER: [&str; 2] = ["172.30.0.2", "fd00:30::2"];
const BRIDGE: [&str; 2] = ["172.30.0.1", "fd00:30::1"];

/// A bridge on app-1 with a container namespace, published by DNAT and masqueraded, as Docker does it.
fn bridge(mesh: &Mesh) -> Result<Netns> {
    let host = mesh.host("app-1")?;
    let (app, container) = (host.net(), host.component_namespace("container")?);
    for line in [
        "ip link add docker0 type bridge",
        "ip link set docker0 up",
        "ip address add 172.30.0.1/24 dev docker0",
        "ip address add fd00:30::1/64 dev docker0 nodad",
    ] {
        app.run(&line.split(' ').collect::<Vec<_>>())?.ok()?;
    }
    app.run(&[
        "ip",
        "link",
        "add",
        "veth1",
        "type",
        "veth",
        "peer",
        "name",
        "eth0",
        "netns",
        container.name(),
    ])?
    .ok()?;
    for line in ["ip link set veth1 master docker0", "ip link set veth1 up"] {
        app.run(&line.split(' ').collect::<Vec<_>>())?.ok()?;
    }
    for line in [
        "ip link set eth0 up",
        "ip address add 172.30.0.2/24 dev eth0",
        "ip address add fd00:30::2/64 dev eth0 nodad",
        "ip route add default via 172.30.0.1",
        "ip -6 route add default via fd00:30::1",
    ] {
        container.run(&line.split(' ').collect::<Vec<_>>())?.ok()?;
    }
    for (setting, value) in [
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        // So that it is not the kernel's guess at forged sources that stops them.
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/docker0/rp_filter", "0"),
    ] {
        app.set(setting, value)?;
    }
    for (family, net, container) in [("ip", "172.30.0.0/24", CONTAINER[0]), ("ip6", "fd00:30::/64", "[fd00:30::2]")] {
        app.nft(&format!(
            "table {family} docker {{
               chain prerouting {{ type nat hook prerouting priority -100; meta l4proto {{ tcp, udp }} fib daddr type local th dport {PUBLISHED} \
                 dnat to {container}:80; }}
               chain postrouting {{ type nat hook postrouting priority 100; {family} saddr {net} oifname != \"docker0\" masquerade; }}
             }}"
        ))?;
    }
    Ok(container)
}

fn published(mesh: &Mesh, matrix: &mut Matrix, client: &mut Person, when: &str) -> Result<()> {
    for address in mesh.host("app-1")?.addresses() {
        for by in BOTH {
            let to: SocketAddr = (address, PUBLISHED).into();
            let answer = wait_for("the published container to answer", PATIENCE, || {
                let answer = client.order(&Order::Ask(by, to, Shape::default(), 1))?;
                Ok(answer.by.is_some().then_some(answer))
            });
            let holds = answer.as_ref().is_ok_and(|answer| answer.by.as_deref() == Some("container"));
            let attempt = format!("published container, {when}, {}", way(by, address));
            matrix.state(
                "a client on the wire",
                &attempt,
                Expected::Arrives,
                if holds { "answered" } else { "SILENT" }.to_owned(),
                holds,
            );
        }
    }
    Ok(())
}

#[test]
fn what_the_host_forwards_neither_comes_into_the_mesh_nor_is_disturbed() -> Result<()> {
    let mut mesh = Mesh::builder("e2e-evade-pass", &HOSTS).start()?;
    let mut matrix = Matrix::default();
    let container = bridge(&mesh)?;
    let mut inside = Person::start(&container, &Who::default())?;
    for address in CONTAINER {
        for by in BOTH {
            inside.serve(by, (address.parse::<std::net::IpAddr>()?, 80).into(), Shape::default(), "container")?;
        }
    }
    let mut client = Person::start(mesh.host("db-1")?.net(), &Who::default())?;
    published(&mesh, &mut matrix, &mut client, "before")?;
    mesh.join_all()?;
    let mut stage = Stage::over(mesh)?;
    published(&stage.mesh, &mut matrix, &mut client, "with the mesh")?;
    let mut trusting = stage.person(&Who::default())?;
    let mut heard = BTreeSet::new();
    for to in stage.at.n8n.addresses() {
        for by in BOTH {
            trusting.serve(by, any_like(to, TRUSTING), Shape::default(), "trusting")?;
            stage.n8n.serve(by, any_like(to, HOOK), Shape::default(), "n8n")?;
        }
    }
    from_the_bridge(&mut stage, &mut matrix, &mut inside)?;
    for person in [&mut trusting, &mut stage.n8n] {
        heard.extend(person.seen()?.iter().map(|seen| seen.token));
    }
    heard.extend(stage.seen()?);
    stage.mesh.agent_mut("app-1")?.stop()?;
    published(&stage.mesh, &mut matrix, &mut client, "when the agent stopped")?;
    stage.mesh.agent_mut("app-1")?.start()?;
    stage.must_talk(2_000_000)?;
    published(&stage.mesh, &mut matrix, &mut client, "when it is back")?;
    matrix.conclude("What is only forwarded", &heard)?;
    stage.mesh.finish()
}

fn from_the_bridge(stage: &mut Stage, matrix: &mut Matrix, inside: &mut Person) -> Result<()> {
    let who = "root in a container on a bridge";
    let at = stage.at;
    let lan = stage.mesh.host("app-1")?.addresses();
    for number in [0, 1] {
        let n8n = at.n8n.addresses()[number];
        let forged: SocketAddr = (n8n, 40_003).into();
        let bridge: std::net::IpAddr = BRIDGE[number].parse()?;
        let lan = *lan.get(number).context("two families")?;
        for (what, to) in [
            ("to postgres in the mesh", (at.postgres.addresses()[number], ECHO)),
            ("to n8n's own address", (n8n, HOOK)),
            ("to the bridge's address", (bridge, TRUSTING)),
            ("to the host's address", (lan, TRUSTING)),
        ] {
            let token = matrix.next();
            let answer = inside.order(&Order::Forge(forged, to.into(), token))?;
            matrix.note(
                who,
                format!("n8n: forged source {what}, {}", way(By::Udp, n8n)),
                Expected::Nothing,
                token,
                &answer,
            );
        }
        for (what, to) in [
            ("postgres in the mesh", (at.postgres.addresses()[number], ECHO)),
            ("n8n's overlay address", (n8n, HOOK)),
            ("worker's overlay address", (at.worker.addresses()[number], TRUSTING)),
            ("the rest's overlay address", (at.rest.addresses()[number], TRUSTING)),
        ] {
            for by in BOTH {
                let attempt = format!("its own source, masqueraded, to {what}");
                matrix.ask(who, inside, &attempt, (by, to.into()), &Shape::default(), Expected::Nothing)?;
            }
        }
    }
    Ok(())
}
