//! The evasion matrix: whoever is not a component's process and tries to speak or to hear as that component, on a host with real coordinator,
//! agents and PostgreSQL. Each row names who tries what, what is expected, and what was observed; a row is judged by what the target has seen.
//!
//! What root on the host can do is a row like the others: it can be any component of that host, and of no other. So can whoever has
//! CAP_NET_RAW in the host's own namespace, as a container with the host's network has.

#[path = "evasion/away.rs"]
mod away;
#[path = "evasion/hear.rs"]
mod hear;
#[path = "evasion/pass.rs"]
mod pass;
#[path = "evasion/stage.rs"]
mod stage;

use std::net::IpAddr;

use anyhow::{Context, Result};
use cloison_tests::lab::agent::INTERFACE;
use cloison_tests::lab::person::{Person, Who};
use cloison_tests::lab::postgres::{self, Postgres};
use cloison_tests::lab::sockets::{By, Order, Shape};
use cloison_tests::lab::{process, wait_for};

use stage::{BOTH, ECHO, Expected, Matrix, N8N, PATIENCE, Stage, bound, mark, through, way};

/// What a container has by default, but for the right to make packets of its own.
const CONTAINER: &str = "-all,+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,+setpcap,+net_bind_service,+sys_chroot,+mknod";
/// What is tried of a user's component; all else is tried of a cgroup's.
const OF_USERS: [&str; 4] = [
    "binds to its address",
    "SO_MARK of its mark alone",
    "Multipath TCP from its address",
    "IP_PKTINFO with its address",
];

/// Sockets by which a process may try to speak from `from`, and what they are called.
fn shapes(from: IpAddr, by: By, mark: u32) -> Vec<(&'static str, Shape)> {
    let plain = bound(from);
    let with = |change: &dyn Fn(&mut Shape)| {
        let mut shape = plain.clone();
        change(&mut shape);
        shape
    };
    let mut shapes = vec![
        ("binds to its address", plain.clone()),
        ("and SO_BINDTODEVICE of the TUN", with(&|s| s.device = Some(INTERFACE.to_owned()))),
        ("and SO_BINDTODEVICE of lo", with(&|s| s.device = Some("lo".to_owned()))),
        ("and IP_FREEBIND", with(&|s| s.freebind = true)),
        ("and IP_TRANSPARENT", with(&|s| s.transparent = true)),
        ("and SO_REUSEADDR, SO_REUSEPORT", with(&|s| s.reuse = true)),
        ("and SO_MARK of its mark", with(&|s| s.mark = Some(mark))),
        (
            "SO_MARK of its mark alone",
            Shape {
                mark: Some(mark),
                ..Shape::default()
            },
        ),
    ];
    match by {
        By::Tcp => shapes.push(("Multipath TCP from its address", with(&|s| s.multipath = true))),
        By::Udp => shapes.push((
            "IP_PKTINFO with its address",
            Shape {
                packet_source: Some(from),
                ..Shape::default()
            },
        )),
    }
    if from.is_ipv4() {
        shapes.push(("binds to its address, mapped into IPv6", with(&|s| s.mapped = true)));
    }
    shapes
}

#[test]
fn nobody_but_its_processes_speaks_as_a_component() -> Result<()> {
    let mut stage = Stage::new("e2e-evade-speak")?;
    let mut matrix = Matrix::default();
    let at = stage.at;
    for (name, who) in stage.attackers() {
        let mut person = stage.person(&who)?;
        for (of, component) in [("n8n", at.n8n), ("worker", at.worker)] {
            for (to, from) in at.postgres.sockets(ECHO).into_iter().zip(component.addresses()) {
                for by in BOTH {
                    for (what, shape) in shapes(from, by, mark(component)) {
                        if of == "worker" && !OF_USERS.contains(&what) {
                            continue;
                        }
                        let expected = if what.contains("lo") {
                            Expected::Nothing
                        } else {
                            Expected::Refused
                        };
                        matrix.ask(name, &mut person, &format!("{of}: {what}"), (by, to), &shape, expected)?;
                    }
                }
            }
        }
    }
    // Components of one host do not speak as each other either, and n8n not as the rest.
    for (name, person, others) in [
        ("n8n itself", &mut stage.n8n, [("worker", at.worker), ("rest", at.rest)]),
        ("worker itself", &mut stage.worker, [("n8n", at.n8n), ("rest", at.rest)]),
    ] {
        for (of, component) in others {
            for (to, from) in at.postgres.sockets(ECHO).into_iter().zip(component.addresses()) {
                for by in BOTH {
                    matrix.ask(
                        name,
                        person,
                        &format!("{of}: binds to its address"),
                        (by, to),
                        &bound(from),
                        Expected::Refused,
                    )?;
                }
            }
        }
    }
    raw_and_packet_sockets(&mut stage, &mut matrix)?;
    from_inside_a_namespace(&mut stage, &mut matrix)?;
    databases(&mut stage, &mut matrix)?;
    let seen = stage.seen()?;
    matrix.conclude("Speaking as another component", &seen)?;
    stage.mesh.finish()
}

/// Packets with a header of the sender's own making.
fn raw_and_packet_sockets(stage: &mut Stage, matrix: &mut Matrix) -> Result<()> {
    let at = stage.at;
    let keep = |person: &mut Person| -> Result<()> {
        for (number, to) in (0..).zip(at.postgres.sockets(ECHO)) {
            person.order(&Order::Keep(By::Udp, to, Shape::default(), 10_000_000 * (number + 1)))?;
        }
        Ok(())
    };
    keep(&mut stage.n8n)?;
    for (name, who) in stage.attackers() {
        let mut person = stage.person(&who)?;
        let is_root = who.user == 0;
        for (of, component) in [("n8n", at.n8n), ("worker", at.worker)] {
            for (to, from) in at.postgres.sockets(ECHO).into_iter().zip(component.sockets(40_001)) {
                let token = matrix.next();
                let answer = person.order(&Order::Forge(from, to, token))?;
                let attempt = format!("{of}: raw socket, {}", way(By::Udp, to.ip()));
                matrix.note(name, attempt, Expected::Refused, token, &answer);
                for by in BOTH {
                    let token = matrix.next();
                    let before = stage.mesh.drops("app-1", "not_owner")?;
                    let answer = person.order(&Order::Inject(by, from, to, token))?;
                    let attempt = format!("{of}: packet socket on the TUN, {}", way(by, to.ip()));
                    let expected = match (is_root, by) {
                        (false, _) => Expected::Refused,
                        (true, By::Tcp) => Expected::Nothing,
                        // The honest limit: root on a host can be any component of that host.
                        (true, By::Udp) => Expected::Arrives,
                    };
                    matrix.note(name, attempt.clone(), expected, token, &answer);
                    if is_root && by == By::Tcp {
                        let counted = wait_for("the SYN to be counted", PATIENCE, || {
                            Ok(Some(stage.mesh.drops("app-1", "not_owner")?).filter(|now| *now > before))
                        });
                        let observed = format!("not_owner {before} -> {counted:?}");
                        matrix.state(name, &format!("{attempt}: counted"), Expected::Nothing, observed, counted.is_ok());
                    }
                }
            }
        }
    }
    stage.n8n.order(&Order::Stop)?;
    Ok(())
}

/// Root inside of a namespace that is a component, with the rights of a container and with more.
fn from_inside_a_namespace(stage: &mut Stage, matrix: &mut Matrix) -> Result<()> {
    let at = stage.at;
    let more = format!("{CONTAINER},+net_raw,+net_admin");
    for (name, capabilities) in [
        ("(d) root in boxed, default", CONTAINER),
        ("(d) root in boxed, NET_ADMIN+RAW", &more),
    ] {
        let who = Who {
            through: through(&["setpriv", "--inh-caps=-all", "--bounding-set", capabilities, "--"]),
            ..Who::default()
        };
        let mut person = Person::start(&stage.boxed, &who)?;
        let is_default = capabilities == CONTAINER;
        if !is_default {
            for from in at.n8n.addresses() {
                let length = if from.is_ipv4() { 32 } else { 128 };
                let mut line = through(&["setpriv", "--inh-caps=-all", "--bounding-set", capabilities, "--"]);
                line.extend(["ip", "address", "add"].map(str::to_owned));
                line.extend([format!("{from}/{length}"), "dev".to_owned(), INTERFACE.to_owned()]);
                let line: Vec<&str> = line.iter().map(String::as_str).collect();
                stage.boxed.run(&line)?.ok()?;
            }
        }
        for (to, from) in at.postgres.sockets(ECHO).into_iter().zip(at.n8n.addresses()) {
            for by in BOTH {
                for (what, shape) in shapes(from, by, mark(at.n8n)) {
                    matrix.ask(name, &mut person, &format!("n8n: {what}"), (by, to), &shape, Expected::Nothing)?;
                }
            }
            let token = matrix.next();
            let answer = person.order(&Order::Forge((from, 40_002).into(), to, token))?;
            let expected = if is_default { Expected::Refused } else { Expected::Nothing };
            matrix.note(name, format!("n8n: raw socket, {}", way(By::Udp, from)), expected, token, &answer);
        }
    }
    Ok(())
}

/// What segmentation is for: a database that knows its clients by their addresses.
fn databases(stage: &mut Stage, matrix: &mut Matrix) -> Result<()> {
    let at = stage.at;
    let server = Postgres::start(stage.mesh.host("db-1")?, &at.postgres.addresses())?;
    server.admit_only(stage.mesh.host("db-1")?, &at.n8n.addresses())?;
    let app = stage.app()?;
    let query = |who: &Who, to: IpAddr| {
        let mut line = who.line();
        let to = to.to_string();
        line.extend(
            [
                "psql",
                "-XAt",
                "-h",
                &to,
                "-U",
                "postgres",
                "-c",
                "select host(inet_client_addr())",
                "postgres",
            ]
            .map(str::to_owned),
        );
        let (first, rest) = line.split_first().context("an empty line")?;
        let mut command = app.command(first);
        command.args(rest).env("PGCONNECT_TIMEOUT", "2");
        process::run(command, PATIENCE)
    };
    let n8n = Who {
        user: N8N,
        group: Some(stage.group.place()),
        ..Who::default()
    };
    for (to, own) in at.postgres.addresses().into_iter().zip(at.n8n.addresses()) {
        let answer = wait_for("the database to admit n8n", PATIENCE, || {
            let answer = query(&n8n, to)?;
            Ok(answer.status.success().then_some(answer.stdout))
        })?;
        let holds = answer.trim() == own.to_string();
        matrix.state(
            "n8n itself",
            &format!("psql to {to}"),
            Expected::Arrives,
            answer.trim().to_owned(),
            holds,
        );
        let before = server.clients_seen();
        for (name, who) in stage.attackers() {
            let refused = query(&who, to)?;
            let holds = !refused.status.success() && server.clients_seen() == before;
            let observed = refused.stderr.lines().last().unwrap_or("nothing").trim().to_owned();
            matrix.state(name, &format!("psql to {to}"), Expected::Nothing, observed, holds);
        }
    }
    // Admission is by address: on its own host, where no mesh stands between, another source is turned away.
    let local = postgres::query(stage.mesh.host("db-1")?.net(), at.postgres.v4, "select 1", 2)?;
    let observed = local.stderr.lines().last().unwrap_or("nothing").trim().to_owned();
    let holds = observed.contains("no pg_hba.conf entry");
    matrix.state(
        "postgres' own host",
        "psql from another address",
        Expected::Nothing,
        observed,
        holds,
    );
    Ok(())
}
