use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use cloison_agent::attach::base_table::{self, BaseTable};
use cloison_agent::netlink::{Netlink, addr, link};
use cloison_agent::sys::netns::NetNs;
use cloison_agent::sys::tun::{Tun, VNET_HEADER_LEN};

use crate::{Outcome, addresses, inside, ip, range, run, tun_name, wire, wired_pair};

fn table() -> Outcome<BaseTable> {
    Ok(BaseTable {
        name: "cloison_test".parse()?,
        range: range()?,
        tun: tun_name()?,
        claims: None,
    })
}

/// A host with a TUN that has addresses, and beside it on the wire a stranger who can send from overlay addresses.
fn host_and_stranger() -> Outcome<(NetNs, NetNs, Tun)> {
    let (host, stranger) = wired_pair()?;
    let tun = inside(&host, || {
        let tun = Tun::create(&tun_name()?)?;
        let mut netlink = Netlink::open()?;
        link::apply(
            &mut netlink,
            tun.index(),
            link::LinkState {
                mtu: 1420,
                queue_length: 1000,
            },
        )?;
        addr::apply(&mut netlink, tun.index(), &addresses(0)?.both())?;
        Ok(tun)
    })?;
    for address in addresses(9)?.both() {
        let nodad = if address.is_ipv6() { "nodad" } else { "" };
        ip(&stranger, &format!("addr add {address} dev lo {nodad}"))?;
        let (to, via) = if address.is_ipv4() {
            ("10.77.0.0/16", "192.0.2.1")
        } else {
            ("fd12:3456:789a::/48", "2001:db8::1")
        };
        ip(&stranger, &format!("route add {to} via {via}"))?;
        ip(
            &host,
            &format!(
                "route add {address} via {}",
                if address.is_ipv4() { "192.0.2.2" } else { "2001:db8::2" }
            ),
        )?;
    }
    for setting in [
        "net.ipv4.ip_forward=1",
        "net.ipv6.conf.all.forwarding=1",
        "net.ipv4.conf.all.rp_filter=0",
        "net.ipv4.conf.eth0.rp_filter=0",
    ] {
        inside(&host, || run("sysctl", &format!("-qw {setting}")))?;
    }
    Ok((host, stranger, tun))
}

fn bind(ns: &NetNs, address: IpAddr) -> Outcome<UdpSocket> {
    inside(ns, || Ok(UdpSocket::bind((address, 0))?))
}

/// Asserts that a datagram from `from` reaches `to`, or that it does not. What should arrive is sent again for some seconds: the first ones
/// may be lost while the kernel still looks for its neighbour.
fn assert_reaches(from: &UdpSocket, to: &UdpSocket, expected: bool, what: &str) -> Outcome {
    let (tries, wait) = if expected { (40, 250) } else { (1, 100) };
    to.set_read_timeout(Some(Duration::from_millis(wait)))?;
    for _ in 0..tries {
        if reaches(from, to)? {
            assert!(expected, "{what}: {to:?}");
            return Ok(());
        }
    }
    assert!(!expected, "{what} in vain: {to:?}");
    Ok(())
}

fn reaches(from: &UdpSocket, to: &UdpSocket) -> Outcome<bool> {
    let address: SocketAddr = to.local_addr()?;
    match from.send_to(b"spoofed", address) {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return Ok(false),
        Err(e) => return Err(e.into()),
    }
    Ok(to.recv(&mut [0; 64]).is_ok())
}

#[test]
fn overlay_addresses_pass_no_other_interface_than_the_tun() -> Outcome {
    let (host, stranger, tun) = host_and_stranger()?;
    let (ours, theirs) = (addresses(0)?, addresses(9)?);
    let underlay: [(IpAddr, IpAddr); 2] = [
        ("192.0.2.1".parse()?, "192.0.2.2".parse()?),
        ("2001:db8::1".parse()?, "2001:db8::2".parse()?),
    ];
    for (loaded, expected) in [(false, true), (true, false)] {
        if loaded {
            inside(&host, || Ok(table()?.load()?))?;
        }
        for (here, there) in underlay {
            let (here_socket, there_socket) = (bind(&host, here)?, bind(&stranger, there)?);
            let (ours, theirs) = (bind(&host, ours.of_family(here))?, bind(&stranger, theirs.of_family(here))?);
            assert_reaches(&theirs, &here_socket, expected, "a forged source arrives")?;
            assert_reaches(&there_socket, &ours, expected, "an overlay destination arrives")?;
            assert_reaches(&ours, &there_socket, expected, "an overlay source leaves")?;
            assert_reaches(&here_socket, &theirs, expected, "an overlay destination leaves")?;
            assert_reaches(&here_socket, &there_socket, true, "the underlay is left alone")?;
            assert_reaches(&there_socket, &here_socket, true, "the underlay is left alone")?;
        }
    }
    let listed = inside(&host, || run("nft", "list table inet cloison_test"))?;
    assert!(
        listed.matches("packets 0").count() < listed.matches("counter").count(),
        "the drops are counted: {listed}"
    );
    drop(tun);
    Ok(())
}

#[test]
fn nothing_is_forwarded_to_or_from_the_tun() -> Outcome {
    let (host, stranger, tun) = host_and_stranger()?;
    let pairs: [(IpAddr, IpAddr); 2] = [
        ("198.51.100.1".parse()?, "192.0.2.2".parse()?),
        ("2001:db8:1::1".parse()?, "2001:db8::2".parse()?),
    ];
    for (far, there) in pairs {
        ip(&host, &format!("route add {far} dev cloison0"))?;
        let via = if far.is_ipv4() { "192.0.2.1" } else { "2001:db8::1" };
        ip(&stranger, &format!("route add {far} via {via}"))?;
        // The host itself knows the way to the stranger, so that only the table can stand in between.
        inside(&host, || {
            Ok(UdpSocket::bind((if far.is_ipv4() { "0.0.0.0" } else { "::" }, 0))?.send_to(b"hello", (there, 9))?)
        })?;
    }
    for (loaded, expected) in [(false, true), (true, false)] {
        if loaded {
            inside(&host, || Ok(table()?.load()?))?;
        }
        for (far, there) in pairs {
            let from_stranger = |p: &[u8]| wire::read_echo(p).is_some_and(|(s, d, _)| (s, d) == (there, far));
            bind(&stranger, there)?.send_to(b"through", (far, 9))?;
            assert_eq!(wire::read_until(&tun, from_stranger)?.is_some(), expected, "to the TUN: {far}");
            tun.write(&[0; VNET_HEADER_LEN], &wire::echo(far, there, true, b"through")?)?;
            assert_eq!(wire::read_until(&tun, from_stranger)?.is_some(), expected, "from the TUN: {far}");
        }
    }
    let listed = inside(&host, || run("nft", "list chain inet cloison_test forward"))?;
    assert_eq!(
        listed.matches("packets 2 ").count(),
        2,
        "one packet of each family and direction: {listed}"
    );
    Ok(())
}

#[test]
fn another_table_s_redirection_does_not_lead_around_it() -> Outcome {
    let (host, stranger, _tun) = host_and_stranger()?;
    let server = bind(&host, addresses(0)?.v4.into())?;
    let redirect = format!("udp dport 7777 dnat to {}", server.local_addr()?);
    inside(&host, || {
        run("nft", "add table ip elsewhere")?;
        run(
            "nft",
            "add chain ip elsewhere prerouting { type nat hook prerouting priority -100 ; }",
        )?;
        run("nft", &format!("add rule ip elsewhere prerouting {redirect}"))
    })?;
    for (loaded, expected) in [(false, true), (true, false)] {
        if loaded {
            inside(&host, || Ok(table()?.load()?))?;
        }
        server.set_read_timeout(Some(Duration::from_millis(if expected { 3000 } else { 100 })))?;
        bind(&stranger, "192.0.2.2".parse()?)?.send_to(b"around", ("192.0.2.1", 7777))?;
        assert_eq!(server.recv(&mut [0; 16]).is_ok(), expected);
    }
    Ok(())
}

#[test]
fn the_table_is_replaced_as_a_whole_and_leaves_others_alone() -> Outcome {
    let (ns, _other) = wired_pair()?;
    inside(&ns, || {
        run("nft", "add table inet somebody_else")?;
        let table = table()?;
        assert!(!table.is_loaded()?);
        table.load()?;
        let first = run("nft", "list ruleset")?;
        table.load()?;
        assert_eq!(run("nft", "list ruleset")?, first);
        assert!(table.is_loaded()? && first.contains("somebody_else"));
        // A trial that was killed in the middle leaves a table of its own.
        run("nft", "add table inet cloison_test_trial")?;
        base_table::remove(&table.name)?;
        base_table::remove(&table.name)?;
        assert!(!table.is_loaded()?);
        assert_eq!(run("nft", "list tables")?.trim(), "table inet somebody_else");
        Ok(())
    })
}

#[test]
fn neighbours_do_not_learn_overlay_addresses_by_arp() -> Outcome {
    let (host, stranger, _tun) = host_and_stranger()?;
    let ours = addresses(0)?.v4;
    ip(&stranger, "route replace 10.77.0.0/16 dev eth0")?;
    for (loaded, expected) in [(false, true), (true, false)] {
        if loaded {
            inside(&host, || Ok(table()?.load()?))?;
        }
        ip(&stranger, "neigh flush all")?;
        // Nothing answers the ping; the question for the address goes out all the same.
        let _unanswered = inside(&stranger, || run("ping", &format!("-n -c 1 -W 1 -I 192.0.2.2 {ours}")));
        let told = ip(&stranger, &format!("neigh show {ours}"))?.contains("lladdr");
        assert_eq!(told, expected, "table loaded: {loaded}");
    }
    inside(&host, || Ok(base_table::remove(&table()?.name)?))?;
    assert!(!inside(&host, || run("nft", "list tables"))?.contains("cloison_test"));
    Ok(())
}
