use std::collections::BTreeSet;

use cloison_agent::netlink::monitor::{Changes, Monitor};
use cloison_agent::netlink::nftables::{Change, Key, Nftables, Operation};
use cloison_agent::netlink::{Netlink, addr, link, route};
use cloison_agent::sys::tun::Tun;

use crate::{Outcome, addresses, fresh, inside, ip, range, run, tun_name, wired_pair};

const STATE: link::LinkState = link::LinkState {
    mtu: 1400,
    queue_length: 1000,
};

fn wanted_routes(index: u32) -> Outcome<BTreeSet<route::Route>> {
    let ours = addresses(0)?;
    let to = route::destinations(range()?);
    let tun = to.map(|destination| route::Route::Tun {
        destination,
        index,
        source: ours.of_family(destination.0),
        table: route::MAIN,
    });
    let nowhere = to.map(|destination| route::Route::Unreachable { destination });
    Ok(tun.into_iter().chain(nowhere).collect())
}

#[test]
fn applying_twice_changes_nothing_and_applying_less_takes_away() -> Outcome {
    let ns = fresh()?;
    let tun = inside(&ns, || Ok(Tun::create(&tun_name()?)?))?;
    let apply = |count: u32| {
        inside(&ns, || {
            let mut netlink = Netlink::open()?;
            link::apply(&mut netlink, tun.index(), STATE)?;
            let mut all = BTreeSet::new();
            for i in 0..count {
                all.extend(addresses(i)?.both());
            }
            addr::apply(&mut netlink, tun.index(), &all.iter().copied().collect::<Vec<_>>())?;
            assert_eq!(addr::list(&mut netlink, tun.index())?, all);
            route::apply(&mut netlink, &route::destinations(range()?), &wanted_routes(tun.index())?)?;
            Ok(())
        })
    };
    let state =
        || Ok::<_, Box<dyn std::error::Error + Send + Sync>>([ip(&ns, "addr show")?, ip(&ns, "route show")?, ip(&ns, "-6 route show")?]);
    apply(3)?;
    let first = state()?;
    apply(3)?;
    assert_eq!(state()?, first);
    let all = first.concat();
    assert!(
        all.contains("10.77.0.0/16 dev cloison0 proto 193 scope link src 10.77.1.0 metric 8"),
        "{all}"
    );
    assert!(all.contains("unreachable 10.77.0.0/16 proto 193 metric 4294967295"), "{all}");
    assert!(
        all.contains("fd12:3456:789a::/48 dev cloison0 proto 193 src fd12:3456:789a::100 metric 8"),
        "{all}"
    );
    assert!(
        all.contains("unreachable fd12:3456:789a::/48 dev lo proto 193 metric 4294967295"),
        "{all}"
    );
    assert!(
        all.contains("mtu 1400") && all.contains("qlen 1000") && !all.contains("tentative"),
        "{all}"
    );
    apply(1)?;
    assert!(!ip(&ns, "addr show")?.contains("10.77.1.2"));
    Ok(())
}

#[test]
fn without_a_tun_the_overlay_is_unreachable_and_not_the_default_route_s() -> Outcome {
    let (ns, _other) = wired_pair()?;
    ip(&ns, "route add default via 192.0.2.2")?;
    ip(&ns, "-6 route add default via 2001:db8::2")?;
    inside(&ns, || {
        let to = route::destinations(range()?);
        let nowhere = to.map(|destination| route::Route::Unreachable { destination });
        route::apply(&mut Netlink::open()?, &to, &nowhere.into())?;
        for address in addresses(5)?.both() {
            let socket = std::net::UdpSocket::bind(if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
            let error = socket.connect((address, 9)).err().ok_or("a way was found")?;
            assert!(
                matches!(error.raw_os_error(), Some(libc::EHOSTUNREACH | libc::ENETUNREACH)),
                "{error}"
            );
        }
        route::apply(&mut Netlink::open()?, &to, &BTreeSet::new())?;
        assert!(std::net::UdpSocket::bind("0.0.0.0:0")?.connect((addresses(5)?.v4, 9)).is_ok());
        Ok(())
    })
}

#[test]
fn routes_of_others_inside_or_around_the_overlay_are_a_conflict() -> Outcome {
    let (ns, _other) = wired_pair()?;
    let conflict = || {
        inside(&ns, || {
            Ok(route::conflict(&mut Netlink::open()?, range()?, &[])?.map(|(a, l)| format!("{a}/{l}")))
        })
    };
    ip(&ns, "route add default via 192.0.2.2")?;
    ip(&ns, "route add 10.0.0.0/8 via 192.0.2.2")?;
    assert_eq!(conflict()?, None, "a wide route over a gateway loses to the overlay's");
    for (change, found) in [
        ("route add 10.77.5.0/24 via 192.0.2.2", "10.77.5.0/24"),
        ("route add 10.64.0.0/10 dev eth0", "10.64.0.0/10"),
        ("-6 route add fd12:3456:789a:1::/64 via 2001:db8::2", "fd12:3456:789a:1::/64"),
        ("addr add 10.77.8.1/32 dev eth0", "10.77.8.1/32"),
    ] {
        ip(&ns, change)?;
        assert_eq!(conflict()?.as_deref(), Some(found), "{change}");
        ip(&ns, &change.replace(" add ", " del "))?;
    }
    assert_eq!(conflict()?, None);
    Ok(())
}

#[test]
fn the_underlay_s_mtu_is_the_smallest_of_its_routes() -> Outcome {
    let (ns, _other) = wired_pair()?;
    let mtu = || {
        inside(&ns, || {
            let mut netlink = Netlink::open()?;
            let links = link::list(&mut netlink)?;
            Ok(route::underlay_mtu(&mut netlink, &links, &[])?)
        })
    };
    assert_eq!(mtu()?, Some(1500));
    ip(&ns, "route add 198.51.100.0/24 via 192.0.2.2 mtu 1380")?;
    assert_eq!(mtu()?, Some(1380));
    ip(&ns, "link set eth0 down")?;
    assert_eq!(mtu()?, None);
    Ok(())
}

#[test]
fn the_monitor_tells_of_addresses_and_of_a_foreign_flush() -> Outcome {
    inside(&fresh()?, || {
        let mut monitor = Monitor::open().ok_or("a monitor")?;
        assert_eq!(monitor.look(), Changes::default());
        let run = |line: &str| -> Outcome {
            let mut words = line.split_whitespace();
            let status = std::process::Command::new(words.next().unwrap_or_default()).args(words).status()?;
            if status.success() {
                Ok(())
            } else {
                Err(format!("`{line}` failed").into())
            }
        };
        run("ip address add 192.0.2.1/32 dev lo")?;
        assert_eq!(
            monitor.look(),
            Changes {
                addresses: true,
                rules: false
            }
        );
        run("nft add table inet foreign")?;
        run("nft flush ruleset")?;
        assert_eq!(
            monitor.look(),
            Changes {
                addresses: false,
                rules: true
            }
        );
        assert_eq!(monitor.look(), Changes::default());
        Ok(())
    })
}

#[test]
fn more_elements_than_fit_a_socket_s_buffer_come_and_go() -> Outcome {
    const COUNT: u64 = 15_000;
    let ns = fresh()?;
    inside(&ns, || {
        run("nft", "add table inet cloison_test")?;
        // Keys of the same length; `nft` would look for the path of each cgroup.
        run("nft", "add set inet cloison_test many { type ipv4_addr . ipv4_addr . ipv4_addr; }")?;
        let mut nftables = Nftables::open("cloison_test")?;
        let change = |operation| {
            let key = |id| Change {
                operation,
                set: "many".into(),
                key: Key::CgroupAt(id, [10, 77, 1, 0].into()),
            };
            (1..=COUNT).map(key).collect::<Vec<_>>()
        };
        nftables.change(&change(Operation::Add))?;
        let count = || -> Outcome<usize> { Ok(run("nft", "list set inet cloison_test many")?.matches(". 10.77.1.0").count()) };
        assert_eq!(u64::try_from(count()?)?, COUNT);
        nftables.change(&change(Operation::Remove))?;
        assert_eq!(count()?, 0);
        assert!(nftables.change(&change(Operation::Remove)).is_err(), "they are gone");
        assert!(!nftables.rules()?.is_empty());
        run("nft", "delete table inet cloison_test")?;
        assert!(nftables.rules()?.is_empty());
        Ok(())
    })
}
