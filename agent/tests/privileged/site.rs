use std::collections::BTreeMap;
use std::net::UdpSocket;

use cloison_agent::attach::claim_table::ClaimTable;
use cloison_agent::attach::site::{Common, Members, Site};
use cloison_agent::attach::{Unenforced, host};
use cloison_agent::sys::netns::NetNs;
use cloison_agent::sys::tun::VNET_HEADER_LEN;

use crate::{Outcome, addresses, fresh, inside, ip, range, run, tun_name, wired_pair};

fn common() -> Outcome<Common> {
    Ok(Common {
        tun: tun_name()?,
        table: "cloison_test".parse()?,
        range: range()?,
        mtu: 1420,
        resolver: false,
    })
}

/// A second handle to the namespace of a site.
fn site_in(ns: &NetNs) -> Outcome<Site> {
    Ok(Site::new(inside(ns, || Ok(NetNs::current()?))?))
}

/// Everything that a site could have left behind.
fn state(ns: &NetNs) -> Outcome<String> {
    let tables = inside(ns, || run("nft", "list tables"))?;
    Ok([tables, ip(ns, "addr show")?, ip(ns, "route show")?, ip(ns, "-6 route show")?].concat())
}

#[test]
fn a_site_is_safe_before_it_has_a_tun_and_after_it_lost_it() -> Outcome {
    let (ns, _other) = wired_pair()?;
    let empty = state(&ns)?;
    let mut site = site_in(&ns)?;
    site.apply(&common()?, None)?;
    let safe = state(&ns)?;
    assert!(
        safe.contains("table inet cloison_test") && safe.matches("unreachable ").count() == 2 && !safe.contains("cloison0"),
        "{safe}"
    );
    site.apply(&common()?, None)?;
    assert_eq!(state(&ns)?, safe);

    site.apply(&common()?, Some(addresses(0)?))?;
    let attached = state(&ns)?;
    assert!(
        attached.contains("10.77.1.0/32") && attached.contains("fd12:3456:789a::100/128") && attached.contains("qlen 1000"),
        "{attached}"
    );
    site.apply(&common()?, Some(addresses(0)?))?;
    assert_eq!(state(&ns)?, attached);
    site.apply(&common()?, Some(addresses(1)?))?;
    let moved = state(&ns)?;
    assert!(moved.contains("src 10.77.1.1 ") && !moved.contains("10.77.1.0/"), "{moved}");

    site.apply(&common()?, None)?;
    assert_eq!(state(&ns)?, safe);
    site.apply(&common()?, Some(addresses(0)?))?;
    drop(site);
    assert_eq!(state(&ns)?, safe, "an agent that stops leaves the host safe");
    site_in(&ns)?.clear(range()?, &common()?.table)?;
    assert_eq!(state(&ns)?, empty);
    Ok(())
}

#[test]
fn the_resolver_s_addresses_stand_behind_the_instance_s_and_go_when_they_are_not_wanted() -> Outcome {
    let (ns, _other) = wired_pair()?;
    let mut site = site_in(&ns)?;
    let with = Common {
        resolver: true,
        ..common()?
    };
    let shown = || -> Outcome<Vec<String>> {
        let shown = ip(&ns, "-o -4 address show dev cloison0")?;
        Ok(shown
            .lines()
            .filter_map(|line| line.split_whitespace().nth(3).map(str::to_owned))
            .collect())
    };
    site.apply(&with, Some(addresses(0)?))?;
    assert_eq!(
        shown()?,
        ["10.77.1.0/32", "10.77.0.53/32"],
        "the first one is taken for the interface's own"
    );
    assert!(ip(&ns, "-6 address show dev cloison0")?.contains("fd12:3456:789a::53/128"));
    site.apply(&common()?, Some(addresses(0)?))?;
    assert_eq!(shown()?, ["10.77.1.0/32"]);
    Ok(())
}

#[test]
fn a_lasting_tun_stays_with_all_that_hangs_on_it_until_it_is_not_wanted_any_more() -> Outcome {
    let (ns, _other) = wired_pair()?;
    let empty = state(&ns)?;
    let lasting = || -> Outcome<Site> { Ok(Site::lasting(inside(&ns, || Ok(NetNs::current()?))?)) };
    let mut site = lasting()?;
    site.apply(&common()?, None)?;
    let safe = state(&ns)?;
    site.apply(&common()?, Some(addresses(0)?))?;
    let attached = ip(&ns, "-o addr show dev cloison0")?;
    let routes = || -> Outcome<String> { Ok(ip(&ns, "route show")? + &ip(&ns, "-6 route show")?) };
    let held = |routes: String| routes.replace(" linkdown", "");
    let before = held(routes()?);
    drop(site);
    assert_eq!(ip(&ns, "-o addr show dev cloison0")?, attached, "addresses stay");
    assert_eq!(held(routes()?), before, "routes stay");
    assert_eq!(
        host::mtu(&inside(&ns, || Ok(NetNs::current()?))?, None)?.underlay,
        1500,
        "and it is no underlay"
    );

    let mut site = lasting()?;
    site.protect(&common()?)?;
    assert_eq!(held(routes()?), before, "making the host safe takes nothing away");
    assert_eq!(
        site.conflict(range()?, &common()?.table)?,
        None,
        "our own addresses are no conflict"
    );
    site.apply(&common()?, Some(addresses(0)?))?;
    assert_eq!(ip(&ns, "-o addr show dev cloison0")?, attached, "the same interface is taken up");
    assert!(ip(&ns, "link show dev cloison0")?.contains("LOWER_UP"));
    drop(site);

    // The configuration names another interface: the one that was left goes.
    let other = Common {
        tun: "cloison9".parse()?,
        ..common()?
    };
    let mut site = lasting()?;
    site.apply(&other, Some(addresses(0)?))?;
    assert!(!ip(&ns, "link show")?.contains("cloison0") && ip(&ns, "addr show dev cloison9")?.contains("10.77.1.0/32"));
    drop(site);
    // There is no instance any more.
    lasting()?.apply(&common()?, None)?;
    assert_eq!(state(&ns)?, safe);

    // And `leave`, from a process that holds nothing.
    let mut site = lasting()?;
    site.apply(&common()?, Some(addresses(0)?))?;
    drop(site);
    site_in(&ns)?.clear(range()?, &common()?.table)?;
    assert_eq!(state(&ns)?, empty);
    Ok(())
}

#[test]
fn an_interface_of_our_name_that_is_somebody_else_s_is_left_alone() -> Outcome {
    let ns = fresh()?;
    ip(&ns, "tuntap add dev cloison0 mode tun user 65534")?;
    ip(&ns, "addr add 192.0.2.9/32 dev cloison0")?;
    let mut site = Site::lasting(inside(&ns, || Ok(NetNs::current()?))?);
    let refused = site.apply(&common()?, Some(addresses(0)?));
    assert!(matches!(refused, Err(Unenforced::Tun(_))), "{refused:?}");
    assert!(ip(&ns, "addr show dev cloison0")?.contains("192.0.2.9"));
    Ok(())
}

#[test]
fn ipv6_that_is_switched_off_is_switched_on_for_the_tun_alone() -> Outcome {
    let ns = fresh()?;
    inside(&ns, || {
        run(
            "sysctl",
            "-qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1",
        )
    })?;
    let mut site = site_in(&ns)?;
    site.apply(&common()?, Some(addresses(0)?))?;
    assert!(ip(&ns, "-6 addr show dev cloison0")?.contains("fd12:3456:789a::100/128"));
    assert!(!ip(&ns, "-6 addr show dev cloison0")?.contains("fe80"));
    Ok(())
}

#[test]
fn what_others_take_away_is_noticed_and_made_again() -> Outcome {
    let ns = fresh()?;
    let mut site = site_in(&ns)?;
    site.apply(&common()?, Some(addresses(0)?))?;
    let whole = state(&ns)?;
    assert!(site.check()?);
    inside(&ns, || run("nft", "flush ruleset"))?;
    assert!(site.check()?);
    assert_eq!(state(&ns)?, whole);
    ip(&ns, "link delete cloison0")?;
    assert!(!site.check()? && site.tun().is_none());
    site.apply(&common()?, Some(addresses(0)?))?;
    assert!(site.check()? && state(&ns)?.contains("10.77.1.0/32"));
    Ok(())
}

#[test]
fn a_base_table_that_others_change_is_made_anew() -> Outcome {
    let ns = fresh()?;
    let mut site = site_in(&ns)?;
    site.apply(&common()?, Some(addresses(0)?))?;
    let listing = || inside(&ns, || run("nft", "-s list table inet cloison_test"));
    let whole = listing()?;
    for (count, change) in [
        "flush table inet cloison_test",
        "flush chain inet cloison_test leaving",
        "insert rule inet cloison_test arriving accept",
        "add table inet cloison_test { flags dormant; }",
        "add chain inet cloison_test input { policy drop; }",
        "delete table inet cloison_test",
    ]
    .into_iter()
    .enumerate()
    {
        inside(&ns, || run("nft", change))?;
        assert!(listing().map_or(true, |now| now != whole), "{change} changes nothing");
        assert!(site.check()?);
        assert_eq!(listing()?, whole, "{change}");
        assert_eq!(site.loads(), u64::try_from(count)? + 2, "{change}");
    }
    // One that keeps its number, and a table of the same words that is another one.
    let numbered = inside(&ns, || run("nft", "-a list chain inet cloison_test leaving"))?;
    let rule = numbered
        .lines()
        .find(|line| line.contains("overlay source to elsewhere"))
        .ok_or("no rule")?;
    let handle = rule.rsplit(' ').next().ok_or("no handle")?.to_owned();
    inside(&ns, || {
        run("nft", &format!("replace rule inet cloison_test leaving handle {handle} accept"))
    })?;
    assert!(site.check()?);
    assert_eq!(listing()?, whole, "replaced");
    let (loads, saved) = (site.loads(), inside(&ns, || run("nft", "list table inet cloison_test"))?);
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), format!("flush ruleset\n{saved}"))?;
    inside(&ns, || run("nft", &format!("-f {}", file.path().display())))?;
    assert_eq!(listing()?, whole, "the same words");
    assert!(site.check()? && site.loads() == loads + 1, "and another table");
    // What is no rule of ours is none of our business.
    inside(&ns, || run("nft", "add table inet other"))?;
    let loads = site.loads();
    assert!(site.check()? && site.loads() == loads);
    Ok(())
}

#[test]
fn what_waited_in_a_tun_while_there_was_no_word_on_whose_sockets_are_whose_is_thrown_away() -> Outcome {
    let ns = fresh()?;
    ip(&ns, "link set lo up")?;
    let mut site = site_in(&ns)?;
    let (rest, user) = (addresses(0)?, addresses(1)?);
    let claims = Members {
        rest: Some(rest),
        routes: Vec::new(),
        claims: Some(ClaimTable {
            levels: 0,
            of_cgroups: Vec::new(),
            of_users: BTreeMap::from([(2001, user)]),
            rest: Some(rest),
            guard: false,
        }),
    };
    let send = || {
        inside(&ns, || {
            let socket = UdpSocket::bind((rest.v4, 0))?;
            Ok(socket.send_to(b"waits", (addresses(9)?.v4, 7))?)
        })
    };
    let waiting = |site: &Site| -> Outcome<usize> {
        let tun = site.tun().ok_or("no TUN")?;
        let (mut header, mut packet) = ([0; VNET_HEADER_LEN], [0; 2048]);
        Ok(std::iter::from_fn(|| tun.read(&mut header, &mut packet).ok()).take(100).count())
    };
    site.apply(&common()?, Some(rest))?;
    send()?;
    assert_eq!(waiting(&site)?, 1, "whoever speaks without claims is heard");
    send()?;
    site.apply(&common()?, claims.clone())?;
    assert_eq!(waiting(&site)?, 0, "it came before anybody could say whose it is");
    send()?;
    site.apply(&common()?, claims)?;
    assert_eq!(waiting(&site)?, 1, "what came behind the table is the rest's");
    send()?;
    inside(&ns, || run("nft", "flush ruleset"))?;
    send()?;
    assert!(site.check()?);
    assert_eq!(waiting(&site)?, 0, "some of it came while there was no table");
    Ok(())
}

#[test]
fn a_host_that_uses_the_overlay_s_addresses_is_left_as_it_is() -> Outcome {
    let (ns, _other) = wired_pair()?;
    ip(&ns, "addr add 10.77.3.1/24 dev eth0")?;
    let before = state(&ns)?;
    let refused = site_in(&ns)?.apply(&common()?, Some(addresses(0)?));
    assert!(matches!(refused, Err(Unenforced::Conflict(_))), "{refused:?}");
    assert_eq!(state(&ns)?, before);
    Ok(())
}

#[test]
fn the_tun_s_own_routes_do_not_count_as_its_underlay() -> Outcome {
    let (ns, _other) = wired_pair()?;
    let mut site = site_in(&ns)?;
    site.apply(&Common { mtu: 1280, ..common()? }, Some(addresses(0)?))?;
    let own = site.tun().map(|t| t.index());
    assert_eq!(host::mtu(&ns, own)?, host::Mtu { underlay: 1500, tun: 1420 });
    ip(&ns, "link set eth0 mtu 1400")?;
    assert_eq!(host::mtu(&ns, own)?.tun, 1320);
    Ok(())
}
