//! The lab itself keeps its promises: what is tested through it can be trusted no further than it can.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use cloison_tests::lab::postgres::{self, Postgres};
use cloison_tests::lab::tool::Tool;
use cloison_tests::lab::{Lab, Underlay, netns, process, wait_for};

const ECHO_PORT: u16 = 7000;

#[test]
fn hosts_reach_each_other_over_both_families_and_nothing_else() -> Result<()> {
    let lab = Lab::builder("lab-both-families").host("app-1").host("db-1").build()?;
    let (app, db) = (lab.host("app-1")?, lab.host("db-1")?);
    for address in db.addresses() {
        let mut listener = Tool::tcp_listen(db.net(), (address, ECHO_PORT).into())?;
        let event = Tool::tcp_attempt(app.net(), (address, ECHO_PORT).into(), Duration::from_secs(5))?;
        ensure!(event.what == "received", "{event:?}");
        listener.process().stop()?;
        let mut listener = Tool::udp_listen(db.net(), (address, ECHO_PORT).into())?;
        ensure!(Tool::udp_attempt(app.net(), (address, ECHO_PORT).into(), 5)? == (5, 0));
        listener.process().stop()?;
    }
    let outside: SocketAddr = "192.0.2.2:22".parse()?;
    let event = Tool::tcp_attempt(app.net(), outside, Duration::from_secs(1))?;
    ensure!(event.kind() == "NetworkUnreachable", "{event:?}");
    lab.finish()
}

#[test]
fn a_wire_of_one_family_carries_only_that() -> Result<()> {
    for (name, underlay) in [("lab-only-v4", Underlay::V4), ("lab-only-v6", Underlay::V6)] {
        let lab = Lab::builder(name).host("a").host("b").underlay(underlay).build()?;
        let (a, b) = (lab.host("a")?, lab.host("b")?);
        ensure!(b.addresses().len() == 1 && b.v4().is_ok() == underlay.has_v4() && b.v6().is_ok() == underlay.has_v6());
        for address in b.addresses() {
            let _listener = Tool::tcp_listen(b.net(), (address, ECHO_PORT).into())?;
            let event = Tool::tcp_attempt(a.net(), (address, ECHO_PORT).into(), Duration::from_secs(5))?;
            ensure!(event.what == "received", "{event:?}");
        }
        let interfaces = a.net().run(&["ip", "-br", "address"])?.ok()?.stdout;
        ensure!(
            interfaces.contains("198.51.100.") == underlay.has_v4() && interfaces.contains("2001:db8:") == underlay.has_v6(),
            "{interfaces}"
        );
        lab.finish()?;
    }
    Ok(())
}

#[test]
fn nothing_of_a_lab_is_left_when_it_ends_and_no_interface_outside_it_is_made() -> Result<()> {
    let interfaces = || -> Result<String> {
        let mut command = std::process::Command::new("ip");
        command.args(["-o", "link"]);
        let names = process::run(command, Duration::from_secs(10))?.ok()?.stdout;
        Ok(names.lines().filter_map(|l| l.split(':').nth(1)).collect())
    };
    let before = interfaces()?;
    let lab = Lab::builder("lab-leaves-nothing").host("a").build()?;
    let (prefix, folder) = (lab.prefix().to_owned(), lab.folder().to_owned());
    let mut command = lab.host("a")?.net().command("sleep");
    command.arg("600");
    let sleeper = lab.host("a")?.net().start("sleep", command)?;
    let id = sleeper.id();
    until_it_sleeps(id)?;
    ensure!(interfaces()? == before && folder.is_dir());
    ensure!(netns::list()?.iter().filter(|n| n.starts_with(&prefix)).count() == 2);
    drop(lab);
    ensure!(!netns::list()?.iter().any(|n| n.starts_with(&prefix)) && !folder.exists());
    wait_for("the program to end with its lab", Duration::from_secs(10), || {
        let stat = stat(id);
        Ok((stat.is_empty() || stat.contains(") Z ")).then_some(()))
    })
}

/// Waits until a program `sleep` runs: on its way there it is not in its namespace yet.
fn until_it_sleeps(id: u32) -> Result<()> {
    wait_for("the program to run", Duration::from_secs(10), || {
        Ok(stat(id).contains("(sleep)").then_some(()))
    })
}

/// What the kernel says of a process; nothing if it is gone.
fn stat(id: u32) -> String {
    std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default()
}

#[test]
fn what_a_killed_run_left_is_removed_by_the_next_of_that_name() -> Result<()> {
    // A kept lab is what a killed one looks like: namespaces, a running program and a folder, and nobody who holds the name.
    let lab = Lab::builder("lab-leftovers").host("a").keep(true).build()?;
    let folder = lab.folder().to_owned();
    let mut command = lab.host("a")?.net().command("sleep");
    command.arg("600");
    let mut sleeper = lab.host("a")?.net().start("sleep", command)?;
    until_it_sleeps(sleeper.id())?;
    lab.finish()?;
    ensure!(folder.is_dir() && sleeper.ended()?.is_none());
    let lab = Lab::builder("lab-leftovers").host("b").build()?;
    ensure!(!folder.exists());
    wait_for("the leftover program to end", Duration::from_secs(10), || sleeper.ended())?;
    let names: Vec<String> = netns::list()?.into_iter().filter(|n| n.starts_with(lab.prefix())).collect();
    ensure!(names.len() == 2 && names.iter().all(|n| !n.ends_with(".a")), "{names:?}");
    lab.finish()
}

#[test]
fn a_real_postgres_answers_psql_and_pgbench_from_another_host() -> Result<()> {
    let lab = Lab::builder("lab-postgres").host("app-1").host("db-1").build()?;
    let (app, db) = (lab.host("app-1")?, lab.host("db-1")?);
    let mut server = Postgres::start(db, &db.addresses())?;
    for address in db.addresses() {
        let answer = postgres::query(app.net(), address, "select 6 * 7", 5)?.ok()?;
        ensure!(answer.stdout == "42\n", "{answer:?}");
    }
    ensure!(server.clients_seen() == 2, "{}", server.log());
    postgres::fill(app.net(), IpAddr::V4(db.v4()?), 1)?.ok()?;
    let report = postgres::bench(app.net(), IpAddr::V4(db.v4()?), 1, &["-c", "2", "-S"])?.ok()?;
    ensure!(report.stdout.contains("number of failed transactions: 0"), "{report:?}");
    server.stop()?;
    let refused = postgres::query(app.net(), IpAddr::V4(db.v4()?), "select 1", 5)?.refused()?;
    ensure!(refused.stderr.contains("Connection refused"), "{refused:?}");
    lab.finish()
}

#[test]
fn a_postgres_waits_for_an_address_that_appears_later() -> Result<()> {
    let lab = Lab::builder("lab-postgres-waits").host("db-1").build()?;
    let db = lab.host("db-1")?;
    let later: IpAddr = "10.99.0.1".parse()?;
    let net = db.net().clone();
    let adding = std::thread::spawn(move || -> Result<()> {
        std::thread::sleep(Duration::from_secs(2));
        net.run(&["ip", "address", "add", "10.99.0.1/32", "dev", "lo"])?.ok()?;
        Ok(())
    });
    let mut server = Postgres::start(db, &[later])?;
    let joined = adding.join();
    ensure!(matches!(joined, Ok(Ok(()))), "{joined:?}");
    postgres::query(db.net(), later, "select 1", 5)?.ok()?;
    server.stop()?;
    lab.finish()
}

#[test]
fn a_capture_holds_what_passed_with_addresses_payload_and_times() -> Result<()> {
    let lab = Lab::builder("lab-capture").host("a").host("b").build()?;
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    let (_first, _second) = (
        Tool::udp_listen(b.net(), (b.v4()?, ECHO_PORT).into())?,
        Tool::udp_listen(b.net(), (b.v6()?, ECHO_PORT).into())?,
    );
    let capture = b.capture_wire()?;
    let before = std::time::SystemTime::now();
    ensure!(Tool::udp_attempt(a.net(), (b.v4()?, ECHO_PORT).into(), 4)? == (4, 0));
    ensure!(Tool::udp_attempt(a.net(), (b.v6()?, ECHO_PORT).into(), 3)? == (3, 0));
    let after = std::time::SystemTime::now();
    let recording = capture.stop()?;
    ensure!(recording.containing(b"lab-tool message") == 14);
    let towards = recording.matching(|p| p.to_port == ECHO_PORT && p.protocol == 17 && p.payload == 64);
    ensure!(towards.len() == 7 && towards.iter().all(|f| f.at >= before && f.at <= after));
    ensure!(recording.with_address(IpAddr::V4(b.v4()?)) == 8 && recording.mentions(IpAddr::V6(a.v6()?)));
    ensure!(!recording.mentions("203.0.113.77".parse()?));
    lab.finish()
}

#[test]
fn streams_report_that_they_were_reset_and_when() -> Result<()> {
    let lab = Lab::builder("lab-streams").host("a").host("b").build()?;
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    let at: SocketAddr = (b.v4()?, ECHO_PORT).into();
    let listener = Tool::tcp_listen(b.net(), at)?;
    let (mut stream, mut idle) = (Tool::tcp_stream(a.net(), at)?, Tool::tcp_idle(a.net(), at)?);
    stream.wait_for_more(640, Duration::from_secs(5))?;
    let start = Instant::now();
    b.net().run(&["ss", "-K", "sport", "=", &format!(":{ECHO_PORT}")])?.ok()?;
    // `ss -K` needs a kernel that can destroy sockets; where it cannot, ending the listener's process resets what was not read.
    drop(listener);
    for tool in [&mut stream, &mut idle] {
        let status = tool.process().wait(Duration::from_secs(5))?;
        ensure!(status.code() == Some(3), "{status} {:?}", tool.events()?);
    }
    ensure!(start.elapsed() < Duration::from_secs(5));
    let refused = Tool::tcp_attempt(a.net(), at, Duration::from_secs(2))?;
    ensure!(refused.kind() == "ConnectionRefused", "{refused:?}");
    lab.finish()
}

#[test]
fn the_wire_loses_doubles_and_swallows_as_told() -> Result<()> {
    let lab = Lab::builder("lab-impairment").host("a").host("b").mtu(1280).build()?;
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    let at: SocketAddr = (b.v4()?, ECHO_PORT).into();
    let _listener = Tool::udp_listen(b.net(), at)?;
    let ping = |size: &str| a.net().run(&["ping", "-c1", "-W1", "-M", "do", "-s", size, &b.v4()?.to_string()]);
    ping("1252")?.ok()?;
    ping("1253")?.refused()?;

    lab.wire().lose_longer_than(b, 1000)?;
    ping("900")?.ok()?;
    ping("1100")?.refused()?;
    lab.wire().repair(&[b])?;

    lab.wire().duplicate(a, b, 100)?;
    let (echoes, errors) = Tool::udp_attempt(a.net(), at, 10)?;
    ensure!(echoes == 20 && errors == 0, "{echoes} echoes and {errors} errors");
    lab.wire().repair(&[])?;

    lab.wire().lose(b, 50)?;
    let (echoes, _) = Tool::udp_attempt(a.net(), at, 60)?;
    ensure!((5..=55).contains(&echoes), "{echoes} of 60 came back");
    lab.wire().cut(b)?;
    ensure!(Tool::udp_attempt(a.net(), at, 10)?.0 == 0);
    lab.wire().repair(&[b])?;
    ensure!(Tool::udp_attempt(a.net(), at, 10)?.0 == 10);
    lab.finish()
}

#[test]
fn a_component_has_a_namespace_of_its_own_inside_its_host() -> Result<()> {
    let lab = Lab::builder("lab-component").host("app-1").build()?;
    let inner = lab.host("app-1")?.component_namespace("n8n")?;
    let interfaces = inner.run(&["ip", "-br", "link"])?.ok()?.stdout;
    ensure!(interfaces.lines().count() == 1 && interfaces.starts_with("lo"), "{interfaces}");
    let names = inner.enter(|| Ok(std::fs::read_to_string("/proc/thread-self/net/dev")?))?;
    ensure!(!names.contains("eth0"), "{names}");
    lab.finish()
}
