//! Hearing what is meant for a component; what one address leaves behind for another; and ways around the mesh on the host itself.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result};
use cloison_tests::lab::mesh::Instance;
use cloison_tests::lab::person::{Person, Who};
use cloison_tests::lab::sockets::{By, Order, Shape, any_like};
use cloison_tests::lab::wait_for;

use crate::stage::{BOTH, ECHO, Expected, HOOK, Matrix, PATIENCE, STRANGER, Stage, WORKER, bound, takes_the_tun, through, user, way};

/// A port on app-1's own addresses, where a server of nobody in particular trusts whom it knows.
const TRUSTING: u16 = 9000;

/// Streams that are tried side by side.
const STREAMS: u64 = 30;

fn reusing() -> Shape {
    Shape {
        reuse: true,
        ..Shape::default()
    }
}

fn fixed(from: SocketAddr) -> Shape {
    Shape {
        from: Some(from),
        ..Shape::default()
    }
}

#[test]
fn nobody_but_its_processes_hears_what_is_meant_for_a_component() -> Result<()> {
    let mut stage = Stage::new("e2e-evade-hear")?;
    let mut matrix = Matrix::default();
    who_is_first_hears_nothing(&mut stage, &mut matrix)?;
    who_flickers_hears_nothing(&mut stage, &mut matrix)?;
    let seen = stage.seen()?;
    matrix.conclude("Hearing as another component", &seen)?;
    stage.mesh.finish()
}

#[test]
fn what_is_left_behind_is_nobody_else_s_and_no_way_leads_around_the_mesh() -> Result<()> {
    let mut stage = Stage::new("e2e-evade-around")?;
    let mut matrix = Matrix::default();
    a_tuple_is_used_again(&mut stage, &mut matrix)?;
    user_namespaces_and_cgroups(&mut stage, &mut matrix)?;
    let mut seen = servers_on_all_addresses(&mut stage, &mut matrix)?;
    seen.extend(stage.seen()?);
    matrix.conclude("Around the mesh", &seen)?;
    orphans_arrive_whole(&mut stage)?;
    stage.mesh.finish()
}

/// Who asks from db-1, what a rogue has heard of it, and who answered.
fn ask_past_a_rogue(
    stage: &mut Stage,
    matrix: &mut Matrix,
    (who, attempt): (&str, &str),
    rogue: &mut Person,
    (by, to): (By, SocketAddr),
) -> Result<()> {
    let token = matrix.next();
    let mut client = Person::start(stage.mesh.host("db-1")?.net(), &Who::default())?;
    let answer = client.order(&Order::Ask(by, to, Shape::default(), token))?;
    std::thread::sleep(std::time::Duration::from_millis(50));
    let heard = rogue.seen()?;
    let told = answer.error.or(answer.by).unwrap_or_default();
    let holds = !heard
        .iter()
        .any(|seen| seen.token == token || seen.peer.ip() == stage.at.postgres.v4 || seen.peer.ip() == stage.at.postgres.v6);
    let attempt = format!("{attempt}, {}", way(by, to.ip()));
    matrix.state(
        who,
        &attempt,
        Expected::Nothing,
        format!("heard {}; who asked: {told}", heard.len()),
        holds,
    );
    Ok(())
}

fn who_is_first_hears_nothing(stage: &mut Stage, matrix: &mut Matrix) -> Result<()> {
    for (name, component) in [("n8n", stage.at.n8n), ("worker", stage.at.worker)] {
        for (number, (who, identity)) in stage.attackers().into_iter().enumerate() {
            for to in component.sockets(HOOK) {
                for by in BOTH {
                    let mut rogue = stage.person(&identity)?;
                    rogue.serve(by, to, reusing(), "rogue")?;
                    ask_past_a_rogue(
                        stage,
                        matrix,
                        (who, &format!("{name}: is first at its address")),
                        &mut rogue,
                        (by, to),
                    )?;
                    if number > 0 {
                        continue;
                    }
                    drop(rogue);
                    let mut rogue = stage.person(&identity)?;
                    rogue.serve(by, any_like(to.ip(), HOOK), reusing(), "rogue")?;
                    ask_past_a_rogue(
                        stage,
                        matrix,
                        (who, &format!("{name}: is first at all addresses")),
                        &mut rogue,
                        (by, to),
                    )?;
                }
            }
        }
    }
    // A datagram goes to the socket that is bound more closely, if both said that they share.
    for (name, component) in [("n8n", stage.at.n8n), ("worker", stage.at.worker)] {
        for to in component.sockets(HOOK) {
            let own = if name == "n8n" { &mut stage.n8n } else { &mut stage.worker };
            own.serve(By::Udp, any_like(to.ip(), HOOK), reusing(), name)?;
            let mut rogue = stage.person(&user(STRANGER))?;
            rogue.serve(By::Udp, to, reusing(), "rogue")?;
            ask_past_a_rogue(
                stage,
                matrix,
                ("(a) another user", &format!("{name}: is closer, by SO_REUSEADDR")),
                &mut rogue,
                (By::Udp, to),
            )?;
            drop(rogue);
            let mut client = Person::start(stage.mesh.host("db-1")?.net(), &Who::default())?;
            let mut tries = 0;
            let answered = wait_for("the component to answer", PATIENCE, || {
                tries += 1;
                let answer = client.order(&Order::Ask(By::Udp, to, Shape::default(), 1))?;
                Ok((answer.by.as_deref() == Some(name)).then_some(()))
            });
            let attempt = format!("answers when the rogue is gone, {}", way(By::Udp, to.ip()));
            matrix.state(
                name,
                &attempt,
                Expected::Arrives,
                format!("{tries} tries, {answered:?}"),
                answered.is_ok(),
            );
            // Two that share a port at all addresses take each other's datagrams, which are refused then.
            let own = if name == "n8n" { &mut stage.n8n } else { &mut stage.worker };
            own.order(&Order::Stop)?;
        }
    }
    Ok(())
}

/// Between the agent's question whose a listener is and the packet's arrival, another one may be there.
fn who_flickers_hears_nothing(stage: &mut Stage, matrix: &mut Matrix) -> Result<()> {
    for (name, component) in [("n8n", stage.at.n8n), ("worker", stage.at.worker)] {
        for to in component.sockets(HOOK) {
            let mut rogue = stage.person(&user(STRANGER))?;
            rogue.order(&Order::Flicker(to, "rogue".to_owned()))?;
            let mut client = Person::start(stage.mesh.host("db-1")?.net(), &Who::default())?;
            let token = matrix.next() * 1_000_000;
            for number in 0..STREAMS {
                client.order(&Order::Keep(By::Tcp, to, Shape::default(), token + number * 10_000))?;
            }
            std::thread::sleep(std::time::Duration::from_secs(2));
            let attempts = client.order(&Order::Stop)?.attempts;
            std::thread::sleep(std::time::Duration::from_millis(300));
            let heard = rogue.seen()?;
            let questions = heard.iter().filter(|seen| seen.token != 0).count();
            let observed = format!("{attempts} streams, {} accepted, {questions} heard", heard.len());
            let attempt = format!("{name}: listens for moments, {}", way(By::Tcp, to.ip()));
            matrix.state(
                "(a) another user",
                &attempt,
                Expected::Nothing,
                observed,
                questions == 0 && attempts > 0,
            );
        }
    }
    Ok(())
}

fn a_tuple_is_used_again(stage: &mut Stage, matrix: &mut Matrix) -> Result<()> {
    for (who, identity) in stage.attackers() {
        let mut rogue = stage.person(&identity)?;
        for (name, component) in [("n8n", stage.at.n8n), ("worker", stage.at.worker)] {
            for (to, from) in stage.at.postgres.sockets(ECHO).into_iter().zip(component.sockets(40_100)) {
                for by in BOTH {
                    let mut shape = fixed(from);
                    shape.reuse = true;
                    let own = if name == "n8n" { &mut stage.n8n } else { &mut stage.worker };
                    matrix.ask(name, own, "from a port of its choice", (by, to), &shape, Expected::Arrives)?;
                    let attempt = format!("{name}: the same port at once");
                    matrix.ask(who, &mut rogue, &attempt, (by, to), &shape, Expected::Refused)?;
                    // The next of the three begins another stream: its port is free again.
                }
            }
        }
    }
    Ok(())
}

fn user_namespaces_and_cgroups(stage: &mut Stage, matrix: &mut Matrix) -> Result<()> {
    let with = |words: &[&str]| Who {
        user: STRANGER,
        through: through(words),
        ..Who::default()
    };
    let own_network = with(&["unshare", "--user", "--map-root-user", "--net", "--"]);
    let mapped = with(&["unshare", "--user", &format!("--map-user={WORKER}"), "--"]);
    let root_in_there = with(&["unshare", "--user", "--map-root-user", "--"]);
    for (who, identity) in [
        ("(a) root of its own namespaces", own_network),
        ("(a) mapped to worker's number", mapped),
        ("(a) root of a user namespace", root_in_there),
    ] {
        let mut person = stage.person(&identity)?;
        for (number, to) in stage.at.postgres.sockets(ECHO).into_iter().enumerate() {
            for by in BOTH {
                matrix.ask(who, &mut person, "binds to nothing", (by, to), &Shape::default(), Expected::Nothing)?;
                for (name, component) in [("n8n", stage.at.n8n), ("worker", stage.at.worker)] {
                    let from = *component.addresses().get(number).context("two families")?;
                    let mut shape = bound(from);
                    shape.freebind = true;
                    matrix.ask(
                        who,
                        &mut person,
                        &format!("{name}: IP_FREEBIND to its address"),
                        (by, to),
                        &shape,
                        Expected::Nothing,
                    )?;
                }
            }
        }
    }
    let mut stranger = stage.person(&user(STRANGER))?;
    let procs = stage.group.place().join("cgroup.procs").display().to_string();
    let answer = stranger.order(&Order::Write(procs, "0".to_owned()))?;
    let holds = answer.error.as_deref() == Some("EACCES");
    matrix.state(
        "(a) another user",
        "moves into n8n's cgroup",
        Expected::Refused,
        format!("{answer:?}"),
        holds,
    );
    let app = stage.app()?;
    let refused = takes_the_tun(&app)?;
    let observed = refused.stderr.trim().to_owned();
    matrix.state(
        "(a) another user",
        "attaches to the TUN",
        Expected::Refused,
        observed,
        !refused.status.success(),
    );
    let ping = |who: &Who, from: IpAddr, to: IpAddr| {
        let mut line = who.line();
        line.extend(["ping", "-c1", "-W1", "-I", &from.to_string(), &to.to_string()].map(str::to_owned));
        let line: Vec<&str> = line.iter().map(String::as_str).collect();
        app.run(&line)
    };
    for (to, from) in stage.at.postgres.addresses().into_iter().zip(stage.at.n8n.addresses()) {
        for (who, identity) in stage.attackers() {
            let came = ping(&identity, from, to)?;
            let observed = (came.stdout.lines().chain(came.stderr.lines()))
                .rfind(|l| !l.is_empty())
                .unwrap_or_default()
                .to_owned();
            matrix.state(
                who,
                &format!("n8n: ping from its address {from}"),
                Expected::Nothing,
                observed,
                !came.status.success(),
            );
        }
    }
    Ok(())
}

/// A server that listens on all addresses of the host must never meet an overlay address but through the mesh.
fn servers_on_all_addresses(stage: &mut Stage, matrix: &mut Matrix) -> Result<BTreeSet<u64>> {
    let mut trusting = stage.person(&user(2009))?;
    for any in [IpAddr::from(Ipv4Addr::UNSPECIFIED), IpAddr::from(Ipv6Addr::UNSPECIFIED)] {
        for by in BOTH {
            trusting.serve(by, (any, TRUSTING).into(), Shape::default(), "trusting")?;
        }
    }
    let status = stage.mesh.agent("app-1")?.status()?;
    let resolver = |index: usize| -> Result<IpAddr> {
        Ok(status["resolver"]["addresses"][index]
            .as_str()
            .context("the resolver's address")?
            .parse()?)
    };
    let resolver = [resolver(0)?, resolver(1)?];
    let lan = stage.mesh.host("app-1")?.addresses();
    let loopback = [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)];
    let mut everybody = stage.attackers().to_vec();
    everybody.push((
        "n8n itself",
        Who {
            user: crate::stage::N8N,
            group: Some(stage.group.place()),
            ..Who::default()
        },
    ));
    for (who, identity) in everybody {
        let mut person = stage.person(&identity)?;
        for by in BOTH {
            for number in [0, 1] {
                let own = |instance: Instance| instance.addresses()[number];
                let (n8n, worker) = (own(stage.at.n8n), own(stage.at.worker));
                for (place, target) in [
                    ("the host's own address", lan[number]),
                    ("loopback", loopback[number]),
                    ("the resolver's", resolver[number]),
                ] {
                    let to = (target, TRUSTING).into();
                    matrix.ask(
                        who,
                        &mut person,
                        &format!("n8n: from its address to {place}"),
                        (by, to),
                        &bound(n8n),
                        Expected::Nothing,
                    )?;
                    if identity.user == 0 {
                        // From the port of DNS, as an answer of the resolver would come.
                        let shape = fixed((n8n, 53).into());
                        matrix.ask(
                            who,
                            &mut person,
                            &format!("n8n: from its port 53 to {place}"),
                            (by, to),
                            &shape,
                            Expected::Nothing,
                        )?;
                    }
                }
                // One's own component by its overlay address is what loopback is for; another's is not.
                if who != "n8n itself" {
                    for (name, target) in [("n8n", n8n), ("worker", worker)] {
                        let to = (target, TRUSTING).into();
                        matrix.ask(
                            who,
                            &mut person,
                            &format!("{name}: from its address to itself"),
                            (by, to),
                            &bound(target),
                            Expected::Nothing,
                        )?;
                        let shape = bound(loopback[number]);
                        matrix.ask(
                            who,
                            &mut person,
                            &format!("{name}: from loopback to its address"),
                            (by, to),
                            &shape,
                            Expected::Nothing,
                        )?;
                        let mut shape = bound(loopback[number]);
                        shape.device = Some("lo".to_owned());
                        matrix.ask(
                            who,
                            &mut person,
                            &format!("{name}: over lo to its address"),
                            (by, to),
                            &shape,
                            Expected::Nothing,
                        )?;
                    }
                }
            }
        }
    }
    Ok(trusting.seen()?.iter().map(|seen| seen.token).collect())
}

/// What a process wrote before it closed its socket is still its component's.
fn orphans_arrive_whole(stage: &mut Stage) -> Result<()> {
    const BYTES: u64 = 400_000;
    for (name, person, own) in [
        ("n8n", &mut stage.n8n, stage.at.n8n),
        ("worker", &mut stage.worker, stage.at.worker),
    ] {
        for (to, from) in stage.at.postgres.sockets(ECHO).into_iter().zip(own.addresses()) {
            let answer = person.order(&Order::Blast(to, bound(from), BYTES))?;
            anyhow::ensure!(answer.error.is_none(), "{name}: {answer:?}");
            wait_for("all of what was written to arrive", PATIENCE, || {
                let seen = stage.server.seen()?;
                Ok(seen.iter().any(|seen| seen.peer.ip() == from && seen.bytes == BYTES).then_some(()))
            })?;
            println!(
                "{name:<34} writes {BYTES} bytes and closes at once, {}: all arrive",
                way(By::Tcp, from)
            );
        }
    }
    Ok(())
}
