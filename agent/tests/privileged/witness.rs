//! Real sockets of several users, and owners that say which of them are which component.

use std::collections::HashMap;
use std::io::{ErrorKind, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cloison_agent::attach::owners::Owners;
use cloison_agent::netlink::nftables::{Nftables, Rules};
use cloison_agent::sys::netns::NetNs;
use cloison_agent_core::packet::Direction;
use cloison_proto::verdict::DropReason;
use socket2::{Domain, Protocol, Socket, Type};

use crate::mesh::{Component, Host, Mesh, config, talk, two_hosts};
use crate::netns::Named;
use crate::sock_diag::own_cgroup;
use crate::{Outcome, as_user, inside};

const APP: u32 = 2002;
const DB: u32 = 2003;
const ROGUE: u32 = 3009;

/// How long to wait for what must not come.
const SOON: Duration = Duration::from_millis(700);

fn mesh() -> Mesh {
    let component = |name, host| Component {
        name,
        host,
        attachment: "host".into(),
    };
    Mesh {
        components: vec![component("app", 1), component("db", 2)],
        rules: vec![("app", "db", "tcp/5432"), ("app", "db", "udp/5353"), ("app", "db", "icmp")],
    }
}

/// Says that `name` is those of `user`, on its host.
fn claim(host: &Host, mesh: &Mesh, name: &str, user: u32) -> Outcome {
    claim_by(host, mesh, name, user, None)
}

/// The same, by a base table that has to be there.
fn claim_by(host: &Host, mesh: &Mesh, name: &str, user: u32, table: Option<(Box<str>, Rules)>) -> Outcome {
    let component = || name.parse().map_err(|_| "a bad name");
    let mut owners = Owners::default();
    for address in mesh.address(name)?.both() {
        owners.addresses.insert(address, component()?);
    }
    owners.users = HashMap::from([(user, component()?)]);
    owners.table = table;
    host.dataplane.owners().store(Arc::new(owners));
    // The next batch knows.
    std::thread::sleep(Duration::from_millis(20));
    Ok(())
}

fn connect(ns: &NetNs, user: u32, to: IpAddr) -> Outcome<std::io::Result<TcpStream>> {
    as_user(ns, user, || Ok(TcpStream::connect_timeout(&(to, 5432).into(), SOON)))
}

fn refused(host: &Host, direction: Direction) -> u64 {
    host.engine.stats().of(direction).dropped(DropReason::NotOwner)
}

/// Every packet is accounted for (I8), once none is under way.
fn check_balance(hosts: &[Host]) {
    let balances = || {
        let mut all = hosts.iter().map(|host| host.engine.stats());
        all.all(|stats| stats.outbound.balances() && stats.inbound.balances())
    };
    let deadline = Instant::now() + Duration::from_secs(5);
    // Once is enough: a keepalive may be under way the next time.
    while !balances() {
        assert!(
            Instant::now() < deadline,
            "{:?}",
            hosts.iter().map(|h| h.engine.stats()).collect::<Vec<_>>()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_stream_passes_for_the_owner_s_sockets_and_fails_at_once_for_others() -> Outcome {
    let mesh = mesh();
    let hosts = two_hosts(&mesh)?;
    claim(&hosts[0], &mesh, "app", APP)?;
    for db in mesh.address("db")?.both() {
        let listener = hosts[1].listen(db, 5432)?;
        talk(connect(&hosts[0].ns, APP, db)??, &listener)?;
        for other in [ROGUE, 0] {
            let before = refused(&hosts[0], Direction::Outbound);
            let error = connect(&hosts[0].ns, other, db)?.err().ok_or("a stranger got through")?;
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{other}: {error}");
            assert_eq!(refused(&hosts[0], Direction::Outbound), before + 1);
        }
        talk(connect(&hosts[0].ns, APP, db)??, &listener)?;
    }
    check_balance(&hosts);
    Ok(())
}

#[test]
fn a_denial_names_the_user_and_the_cgroup_of_the_socket_that_is_to_blame() -> Outcome {
    let mesh = mesh();
    let hosts = two_hosts(&mesh)?;
    let db: IpAddr = mesh.address("db")?.v4.into();
    claim(&hosts[0], &mesh, "app", APP)?;
    claim(&hosts[1], &mesh, "db", DB)?;
    let _listener = as_user(&hosts[1].ns, ROGUE, || Ok(TcpListener::bind((db, 5432))?))?;
    let cgroup = Some(own_cgroup()?);
    let named = |host: &Host, port: u16| -> Vec<_> {
        let noted = host.dataplane.take_denials().into_iter();
        noted
            .filter(|(kept, _)| kept.port == port)
            .map(|(kept, _)| (kept.reason, kept.process))
            .collect()
    };
    assert!(connect(&hosts[0].ns, ROGUE, db)?.is_err());
    assert_eq!(named(&hosts[0], 5432), [(DropReason::NotOwner, Some((ROGUE, cgroup)))]);
    assert!(connect(&hosts[0].ns, APP, db)?.is_err());
    assert_eq!(
        named(&hosts[1], 5432),
        [(DropReason::NotOwner, Some((ROGUE, cgroup)))],
        "the listener, and not the sender"
    );
    assert!(as_user(&hosts[0].ns, APP, || Ok(TcpStream::connect((db, 22))?)).is_err());
    assert_eq!(named(&hosts[0], 22), [(DropReason::NoRule, Some((APP, cgroup)))]);
    Ok(())
}

#[test]
fn a_stream_without_a_socket_goes_nowhere() -> Outcome {
    let mesh = mesh();
    let hosts = two_hosts(&mesh)?;
    claim(&hosts[0], &mesh, "app", APP)?;
    let (app, db) = (mesh.address("app")?.v4, mesh.address("db")?.v4);
    let _listener = hosts[1].listen(db.into(), 5432)?;
    inside(&hosts[0].ns, || {
        // The kernel fills in length, identification and checksum of the IP header.
        let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
        let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0];
        packet.extend([app.octets(), db.octets()].concat());
        packet.extend([0x9c, 0x40, 0x15, 0x38, 0, 0, 1, 0, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
        raw.send_to(&packet, &SocketAddr::from((db, 0)).into())?;
        Ok(())
    })?;
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(refused(&hosts[0], Direction::Outbound), 1);
    assert_eq!(
        hosts[1].engine.stats().inbound.received,
        0,
        "it was never sealed, and no handshake was made for it"
    );
    check_balance(&hosts);
    Ok(())
}

#[test]
fn a_stream_reaches_the_owner_s_listener_and_no_other_that_took_its_place() -> Outcome {
    let mesh = mesh();
    let hosts = two_hosts(&mesh)?;
    claim(&hosts[1], &mesh, "db", DB)?;
    for db in mesh.address("db")?.both() {
        let wildcard: IpAddr = if db.is_ipv4() {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        let error = hosts[0].connect(db, 5432)?.err().ok_or("nobody listens")?;
        assert_eq!(
            error.kind(),
            ErrorKind::ConnectionRefused,
            "the kernel answers where nobody listens: {error}"
        );
        for bound in [db, wildcard] {
            let before = refused(&hosts[1], Direction::Inbound);
            let rogue = as_user(&hosts[1].ns, ROGUE, || Ok(TcpListener::bind((bound, 5432))?))?;
            rogue.set_nonblocking(true)?;
            let error = connect(&hosts[0].ns, 0, db)?.err().ok_or("the rogue was reached")?;
            assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
            assert_eq!(rogue.accept().err().map(|e| e.kind()), Some(ErrorKind::WouldBlock));
            assert!(refused(&hosts[1], Direction::Inbound) > before, "{bound}");
            drop(rogue);
            let owner = as_user(&hosts[1].ns, DB, || Ok(TcpListener::bind((bound, 5432))?))?;
            talk(hosts[0].connect(db, 5432)??, &owner)?;
        }
    }
    check_balance(&hosts);
    Ok(())
}

#[test]
fn a_port_that_is_used_again_leads_to_the_listener_and_not_to_the_rest_of_the_old_stream() -> Outcome {
    let mesh = mesh();
    let hosts = two_hosts(&mesh)?;
    claim(&hosts[1], &mesh, "db", DB)?;
    for db in mesh.address("db")?.both() {
        let listener = as_user(&hosts[1].ns, DB, || Ok(TcpListener::bind((db, 5432))?))?;
        let from_one_port = || {
            inside(&hosts[0].ns, || {
                let socket = Socket::new(Domain::for_address((db, 0).into()), Type::STREAM, None)?;
                socket.set_reuse_address(true)?;
                let any: IpAddr = if db.is_ipv4() {
                    Ipv4Addr::UNSPECIFIED.into()
                } else {
                    Ipv6Addr::UNSPECIFIED.into()
                };
                socket.bind(&SocketAddr::new(any, 40_000).into())?;
                socket.connect_timeout(&SocketAddr::new(db, 5432).into(), SOON)?;
                Ok(TcpStream::from(socket))
            })
        };
        let (here, there, _) = talk(from_one_port()?, &listener)?;
        // Who closes first keeps the rest of the stream.
        drop(there);
        std::thread::sleep(Duration::from_millis(50));
        drop(here);
        std::thread::sleep(Duration::from_millis(50));
        let rest = inside(&hosts[1].ns, || crate::run("ss", "-Htan state time-wait"))?;
        assert!(rest.contains(":40000"), "no stream in TIME_WAIT: {rest}");
        talk(from_one_port()?, &listener)?;
    }
    assert_eq!(refused(&hosts[1], Direction::Inbound), 0);
    Ok(())
}

#[test]
fn datagrams_for_a_user_s_component_are_not_stolen_by_a_more_specific_socket() -> Outcome {
    let mesh = mesh();
    let hosts = two_hosts(&mesh)?;
    claim(&hosts[1], &mesh, "db", DB)?;
    for db in mesh.address("db")?.both() {
        let wildcard: IpAddr = if db.is_ipv4() {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        let shared = |user, bound: IpAddr| {
            as_user(&hosts[1].ns, user, || {
                let socket = Socket::new(Domain::for_address((bound, 0).into()), Type::DGRAM, None)?;
                socket.set_reuse_address(true)?;
                socket.bind(&SocketAddr::new(bound, 5353).into())?;
                socket.set_read_timeout(Some(SOON))?;
                Ok(UdpSocket::from(socket))
            })
        };
        let server = shared(DB, wildcard)?;
        let client = inside(&hosts[0].ns, || Ok(UdpSocket::bind((wildcard, 0))?))?;
        client.send_to(b"one", (db, 5353))?;
        let mut room = [0; 8];
        assert_eq!(server.recv(&mut room)?, 3);
        let before = refused(&hosts[1], Direction::Inbound);
        let thief = shared(ROGUE, db)?;
        client.send_to(b"two!", (db, 5353))?;
        assert!(thief.recv(&mut room).is_err(), "the thief heard it");
        assert_eq!(refused(&hosts[1], Direction::Inbound), before + 1);
        drop(thief);
        client.send_to(b"three", (db, 5353))?;
        assert_eq!(server.recv(&mut room)?, 5);
    }
    check_balance(&hosts);
    Ok(())
}

#[test]
fn a_namespace_s_own_sockets_are_not_asked_about_and_the_host_s_listener_is() -> Outcome {
    let named = Named::new("witness")?;
    let component = |name, attachment: String| Component { name, host: 1, attachment };
    let mesh = Mesh {
        components: vec![
            component("app", format!("netns:{}", named.path().display())),
            component("db", "host".into()),
        ],
        rules: vec![("app", "db", "tcp/5432")],
    };
    let hosts = two_hosts(&mesh)?;
    claim(&hosts[0], &mesh, "db", DB)?;
    let ns = NetNs::open(&named.path(), &config()?.accepted.netns_dirs)?;
    for db in mesh.address("db")?.both() {
        let rogue = as_user(&hosts[0].ns, ROGUE, || Ok(TcpListener::bind((db, 5432))?))?;
        let error = connect(&ns, ROGUE, db)?.err().ok_or("the rogue was reached")?;
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "on one host it fails at once: {error}");
        drop(rogue);
        let owner = as_user(&hosts[0].ns, DB, || Ok(TcpListener::bind((db, 5432))?))?;
        talk(connect(&ns, ROGUE, db)??, &owner)?;
    }
    assert_eq!(refused(&hosts[0], Direction::Outbound), 2, "each was received once, and from a TUN");
    check_balance(&hosts);
    Ok(())
}

#[test]
fn a_change_of_owners_counts_from_the_next_stream_on_and_leaves_the_others_alone() -> Outcome {
    let mesh = mesh();
    let hosts = two_hosts(&mesh)?;
    let db = mesh.address("db")?.v4.into();
    let listener = hosts[1].listen(db, 5432)?;
    let (mut here, ..) = talk(connect(&hosts[0].ns, ROGUE, db)??, &listener)?;
    claim(&hosts[0], &mesh, "app", APP)?;
    assert!(connect(&hosts[0].ns, ROGUE, db)?.is_err());
    here.write_all(b"still here")?;
    assert!(!hosts[0].dataplane.is_blind());
    Ok(())
}

#[test]
fn without_the_table_that_the_owners_go_by_nothing_passes_whatever_is_known_of_it() -> Outcome {
    let mesh = mesh();
    let hosts = two_hosts(&mesh)?;
    let db = mesh.address("db")?.v4.into();
    let listener = hosts[1].listen(db, 5432)?;
    let of = |name: &'static str| inside(&hosts[0].ns, || Ok(Nftables::open(name)?.rules()?));
    let (ours, none) = (of("cloison_test")?, Rules::default());
    for (name, rules) in [
        // Gone; never read; another one than was loaded.
        ("nowhere", ours.clone()),
        ("nowhere", none.clone()),
        ("cloison_test", none),
    ] {
        let before = hosts[0].engine.stats().outbound.dropped(DropReason::Unenforced);
        claim_by(&hosts[0], &mesh, "app", APP, Some((name.into(), rules)))?;
        let passed = connect(&hosts[0].ns, APP, db)?;
        assert!(passed.is_err(), "{name}: {passed:?}");
        assert!(hosts[0].engine.stats().outbound.dropped(DropReason::Unenforced) > before, "{name}");
        claim(&hosts[0], &mesh, "app", APP)?;
    }
    talk(connect(&hosts[0].ns, APP, db)??, &listener)?;
    Ok(())
}
