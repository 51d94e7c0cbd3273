use cloison_agent::attach::site::{Common, Site};
use cloison_agent::attach::{Unenforced, host};
use cloison_agent::sys::netns::NetNs;

use crate::{Outcome, addresses, fresh, inside, ip, range, run, tun_name, wired_pair};

fn common() -> Outcome<Common> {
    Ok(Common {
        tun: tun_name()?,
        table: "cloison_test".parse()?,
        range: range()?,
        mtu: 1420,
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
