use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, UdpSocket};
use std::time::{Duration, Instant};

use cloison_agent::dataplane::{self, Enforcement};
use cloison_agent::sys::netns::NetNs;
use cloison_proto::verdict::DropReason;

use crate::mesh::{Component, Host, Mesh, apply, config, connect_in, talk, two_hosts};
use crate::netns::Named;
use crate::{Outcome, inside, ip, range, run, wired_pair};

fn component(name: &'static str, host: u8, attachment: &str) -> Component {
    Component {
        name,
        host,
        attachment: attachment.into(),
    }
}

/// `app` on host 1 and `db` on host 2, both attached to their whole host; `app` may reach `db` on tcp/5432.
fn app_and_db() -> Mesh {
    Mesh {
        components: vec![component("app", 1, "host"), component("db", 2, "host")],
        rules: vec![("app", "db", "tcp/5432")],
    }
}

#[test]
fn a_rule_s_port_works_in_both_families_and_everything_else_is_refused_at_once() -> Outcome {
    let mesh = app_and_db();
    let [one, two] = two_hosts(&mesh)?;
    for (app, db) in mesh.address("app")?.both().into_iter().zip(mesh.address("db")?.both()) {
        let listener = two.listen(db, 5432)?;
        let (_, _, from) = talk(one.connect(db, 5432)??, &listener)?;
        assert_eq!(from, app, "the source address is the identity");

        let _other = two.listen(db, 5433)?;
        let begun = Instant::now();
        let refused = one.connect(db, 5433)?.err().ok_or("tcp/5433 was open")?;
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{refused}");
        assert!(begun.elapsed() < Duration::from_secs(2), "it fails fast");

        let _backwards = one.listen(app, 5432)?;
        let refused = two.connect(app, 5432)?.err().ok_or("the reverse was open")?;
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{refused}");
        assert!(
            inside(&one.ns, || run("ping", &format!("-n -c 1 -W 1 {db}"))).is_err(),
            "no rule allows echo"
        );
    }
    assert!(one.engine.stats().outbound.dropped(DropReason::NoRule) > 0);
    Ok(())
}

#[test]
fn large_transfers_arrive_whole() -> Outcome {
    let mesh = app_and_db();
    let [one, two] = two_hosts(&mesh)?;
    let sent: Vec<u8> = (0..4_000_000u32).map(|i| (i % 251) as u8).collect();
    for db in mesh.address("db")?.both() {
        let listener = two.listen(db, 5432)?;
        let (mut here, mut there, _) = talk(one.connect(db, 5432)??, &listener)?;
        let got = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                here.write_all(&sent)?;
                here.shutdown(std::net::Shutdown::Write)
            });
            let mut got = Vec::new();
            there.read_to_end(&mut got)?;
            writer.join().map_err(|_| "the writer panicked")??;
            Outcome::Ok(got)
        })?;
        assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
    }
    assert_eq!((one.dataplane.counts().tun_refused, two.dataplane.counts().tun_refused), (0, 0));
    Ok(())
}

#[test]
fn echo_needs_its_own_rule_and_large_packets_pass_a_narrow_underlay() -> Outcome {
    let mut mesh = app_and_db();
    mesh.rules.push(("app", "db", "icmp"));
    let mut hosts = two_hosts(&mesh)?;
    for db in mesh.address("db")?.both() {
        inside(&hosts[0].ns, || run("ping", &format!("-n -c 1 -w 5 -s 1300 {db}")))?;
    }
    for host in &hosts {
        ip(&host.ns, "link set eth0 mtu 1300")?;
    }
    // The next view finds the narrow underlay: the TUNs shrink as far as IPv6 lets them, and the outer datagrams become fragments.
    apply(&mut hosts, &mesh)?;
    assert!(ip(&hosts[0].ns, "link show cloison0")?.contains("mtu 1280"));
    for db in mesh.address("db")?.both() {
        inside(&hosts[0].ns, || run("ping", &format!("-n -c 1 -w 5 -s 1200 {db}")))?;
    }
    assert!(hosts[0].dataplane.counts().udp_fragmented > 0);
    Ok(())
}

#[test]
fn a_withdrawn_rule_cuts_live_streams_at_both_ends() -> Outcome {
    let mut mesh = app_and_db();
    let mut hosts = two_hosts(&mesh)?;
    let db = mesh.address("db")?.v4.into();
    let listener = hosts[1].listen(db, 5432)?;
    let (mut here, mut there, _) = talk(hosts[0].connect(db, 5432)??, &listener)?;
    mesh.rules.clear();
    let installed = apply(&mut hosts, &mesh)?;
    assert_eq!(installed.map(|i| i.cut_flows), [1, 1]);
    for stream in [&mut here, &mut there] {
        let error = stream.read(&mut [0; 1]).err().ok_or("the stream goes on")?;
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    }
    assert!(hosts[0].connect(db, 5432)?.is_err());
    Ok(())
}

#[test]
fn a_namespace_is_a_component_of_its_own() -> Outcome {
    let named = Named::new("app")?;
    let path = format!("netns:{}", named.path().display());
    let components = vec![
        component("app", 1, &path),
        component("db", 2, "host"),
        component("tools", 1, "host"),
    ];
    let mesh = Mesh {
        components,
        rules: vec![("app", "db", "tcp/5432"), ("app", "tools", "udp/53")],
    };
    let [one, two] = two_hosts(&mesh)?;
    let reported: Vec<_> = one.dataplane.report().values().cloned().collect();
    assert_eq!(
        reported,
        [Enforcement::Isolated(named.path().display().to_string()), Enforcement::Shared]
    );
    let ns = NetNs::open(&named.path(), &config()?.accepted.netns_dirs)?;
    for (app, db) in mesh.address("app")?.both().into_iter().zip(mesh.address("db")?.both()) {
        let listener = two.listen(db, 5432)?;
        assert_eq!(talk(connect_in(&ns, db, 5432)??, &listener)?.2, app);
        assert!(one.connect(db, 5432)?.is_err(), "the host itself is another component");
    }
    // Two components of one host speak through the engine too.
    let (app, tools): (IpAddr, IpAddr) = (mesh.address("app")?.v4.into(), mesh.address("tools")?.v4.into());
    let server = inside(&one.ns, || Ok(UdpSocket::bind((tools, 53))?))?;
    server.set_read_timeout(Some(Duration::from_secs(5)))?;
    let client = inside(&ns, || Ok(UdpSocket::bind((app, 0))?))?;
    client.send_to(b"query", (tools, 53))?;
    assert_eq!(server.recv_from(&mut [0; 16])?.1.ip(), app);
    Ok(())
}

#[test]
fn a_namespace_that_goes_and_comes_back_is_unenforced_in_between() -> Outcome {
    let named = Named::new("gone")?;
    let path = named.path();
    let components = vec![
        component("app", 1, &format!("netns:{}", path.display())),
        component("db", 2, "host"),
    ];
    let mesh = Mesh {
        components,
        rules: vec![("app", "db", "tcp/5432")],
    };
    let [mut one, two] = two_hosts(&mesh)?;
    let app = "app";
    assert!(!one.dataplane.check(), "all is well");
    let name = path.file_name().and_then(|n| n.to_str()).ok_or("no name")?.to_owned();
    run("ip", &format!("netns delete {name}"))?;
    assert!(one.dataplane.check());
    let reason = one.dataplane.report().get(app).cloned();
    assert!(
        matches!(&reason, Some(Enforcement::Unenforced(why)) if why.contains("does not exist")),
        "{reason:?}"
    );
    run("ip", &format!("netns add {name}"))?;
    assert!(one.dataplane.check());
    assert_eq!(
        one.dataplane.report().get(app),
        Some(&Enforcement::Isolated(path.display().to_string()))
    );
    let db = mesh.address("db")?.v4.into();
    let listener = two.listen(db, 5432)?;
    let ns = NetNs::open(&path, &config()?.accepted.netns_dirs)?;
    talk(connect_in(&ns, db, 5432)??, &listener)?;
    drop(named);
    Ok(())
}

#[test]
fn what_cannot_be_enforced_is_shown_with_its_reason_and_gets_nothing() -> Outcome {
    let mut one = Host::alone(1)?;
    let home = format!("/run/netns/cloison-sh-home-{}", std::process::id());
    let attachments = [
        ("a-user", "user:no-such-user", "has no user"),
        ("b-outside", "netns:/proc/1/ns/net", "not below a directory"),
        ("c-missing", "netns:/run/netns/cloison-sh-none", "does not exist"),
        ("d-host", "host", ""),
    ];
    let components = attachments
        .iter()
        .map(|(name, attachment, _)| component(name, 1, attachment))
        .collect();
    one.apply(&Mesh {
        components,
        rules: Vec::new(),
    })?;
    for (name, _, expected) in attachments {
        match one.dataplane.report().get(name) {
            Some(Enforcement::Unenforced(why)) => assert!(!expected.is_empty() && why.contains(expected), "{name}: {why}"),
            other => assert!(expected.is_empty() && other == Some(&Enforcement::Shared), "{name}: {other:?}"),
        }
    }
    assert!(!std::path::Path::new(&home).exists());
    let addresses = ip(&one.ns, "addr show")?;
    assert!(
        addresses.contains("10.77.1.3/32") && addresses.matches("10.77.").count() == 1,
        "{addresses}"
    );
    Ok(())
}

#[test]
fn leaving_takes_everything_away_and_stopping_nothing_of_the_host_s_own() -> Outcome {
    let named = Named::new("leave")?;
    let ns = NetNs::open(&named.path(), &config()?.accepted.netns_dirs)?;
    let mut one = Host::alone(1)?;
    let state = |ns: &NetNs| {
        let tables = inside(ns, || run("nft", "list tables"))?;
        Outcome::Ok([tables, ip(ns, "addr show")?, ip(ns, "route show")?, ip(ns, "-6 route show")?].concat())
    };
    let before = [state(&one.ns)?, state(&ns)?];
    let attachment = format!("netns:{}", named.path().display());
    let mesh = Mesh {
        components: vec![component("app", 1, &attachment), component("tools", 1, "host")],
        rules: Vec::new(),
    };
    one.apply(&mesh)?;
    for state in [state(&one.ns)?, state(&ns)?] {
        assert!(
            state.contains("cloison0") && state.contains("table inet cloison_test") && state.contains("unreachable"),
            "{state}"
        );
    }
    drop(one.dataplane);
    for (state, has_tun) in [(state(&one.ns)?, true), (state(&ns)?, false)] {
        assert!(
            state.contains("cloison0") == has_tun && state.contains("table inet cloison_test") && state.contains("unreachable"),
            "{state}"
        );
    }
    inside(&one.ns, || Ok(dataplane::leave(&config()?, range()?, Some(&mesh.view(1)?))?))?;
    assert_eq!([state(&one.ns)?, state(&ns)?], before);
    Ok(())
}

#[test]
fn a_first_view_in_conflict_with_the_host_s_addresses_changes_nothing() -> Outcome {
    let (ns, _other) = wired_pair()?;
    let mut one = Host::start(1, ns, 1)?;
    ip(&one.ns, "addr add 10.77.9.1/24 dev eth0")?;
    assert!(one.apply(&app_and_db()).is_err());
    assert!(!ip(&one.ns, "link show")?.contains("cloison0"));
    assert!(!inside(&one.ns, || run("nft", "list tables"))?.contains("cloison_test"));
    Ok(())
}

#[test]
fn a_conflict_that_comes_later_keeps_no_withdrawn_rule_in_force() -> Outcome {
    let mut mesh = app_and_db();
    let [mut one, two] = two_hosts(&mesh)?;
    let db = mesh.address("db")?.v4.into();
    let listener = two.listen(db, 5432)?;
    let (mut here, _there, _) = talk(one.connect(db, 5432)??, &listener)?;
    // What a neighbour's router advertisement or DHCP server can bring about.
    ip(&one.ns, "route add 10.77.9.0/24 dev eth0")?;
    mesh.rules.clear();
    assert_eq!(one.apply(&mesh)?.cut_flows, 1);
    let error = here.read(&mut [0; 1]).err().ok_or("the stream goes on")?;
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    assert!(one.connect(db, 5432)?.is_err());
    one.apply(&app_and_db())?;
    talk(one.connect(db, 5432)??, &listener)?;
    Ok(())
}

#[test]
fn a_host_of_the_mesh_is_made_safe_whatever_routes_there_are() -> Outcome {
    let (ns, _other) = wired_pair()?;
    let mut one = Host::start(1, ns, 1)?;
    ip(&one.ns, "route add 10.77.9.0/24 dev eth0")?;
    one.dataplane.prepare(range()?)?;
    assert!(inside(&one.ns, || run("nft", "list tables"))?.contains("cloison_test"));
    assert!(one.apply(&app_and_db()).is_err(), "the view has to wait for the route to go");
    Ok(())
}

#[test]
fn a_tun_that_was_deleted_is_told_of_at_once_and_comes_back_with_the_next_check() -> Outcome {
    let mesh = app_and_db();
    let [mut one, two] = two_hosts(&mesh)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let told = |limit| runtime.block_on(async { tokio::time::timeout(limit, one.nudge.heard()).await.is_ok() });
    // What was told while the host was set up.
    while told(Duration::from_millis(50)) {}
    ip(&one.ns, "link delete cloison0")?;
    assert!(told(Duration::from_secs(2)), "nobody noticed");
    inside(&one.ns, || run("nft", "flush ruleset"))?;
    let db = mesh.address("db")?.v4.into();
    let unreachable = one.connect(db, 5432)?.err().ok_or("a way was found")?;
    assert!(
        matches!(unreachable.raw_os_error(), Some(libc::EHOSTUNREACH | libc::ENETUNREACH)),
        "{unreachable}"
    );
    one.dataplane.check();
    let listener = two.listen(db, 5432)?;
    talk(one.connect(db, 5432)??, &listener)?;
    assert!(inside(&one.ns, || run("nft", "list tables"))?.contains("cloison_test"));
    Ok(())
}
