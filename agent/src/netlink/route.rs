//! Routes: the overlay ranges to a TUN, and `unreachable` under them, so that overlay traffic never follows a default route while there is
//! no TUN.
//!
//! Ours are told from others' by their protocol number. They stand in the main table, and for a component whose processes are claimed in a
//! table of its own, which a rule leads to ([`super::rule`]).

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cloison_proto::net::OverlayRange;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::link::Link;
use super::{Netlink, NetlinkError};

/// Marks a route as ours: a number that iproute2's rt_protos and the known routing daemons leave free.
pub(super) const PROTOCOL: RouteProtocol = RouteProtocol::Other(0xc1);

/// Metric of the routes to a TUN: low, so that they win; not zero, which IPv6 would take for 1024.
const TUN_METRIC: u32 = 8;

/// Metric of the `unreachable` routes: the highest there is, so that they win only when nothing else is left.
const UNREACHABLE_METRIC: u32 = u32::MAX;

/// The main table, and that of this host's own addresses (`RT_TABLE_MAIN` and `RT_TABLE_LOCAL` in linux/rtnetlink.h).
pub const MAIN: u32 = 254;
pub(super) const LOCAL: u32 = 255;

/// What the eight bits of a header say for a table whose number needs more (`RT_TABLE_COMPAT`).
pub(super) const COMPAT: u8 = 252;

/// A destination: network address and prefix length.
pub type Prefix = (IpAddr, u8);

/// A route of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Route {
    /// To a TUN; what has no source address yet gets `source`.
    Tun {
        /// Where to.
        destination: Prefix,
        /// Index of the TUN.
        index: u32,
        /// Source address for those that have none.
        source: IpAddr,
        /// The routing table.
        table: u32,
    },
    /// Nowhere: the kernel answers that the destination is unreachable.
    Unreachable {
        /// Where to.
        destination: Prefix,
    },
}

impl Route {
    const fn destination(&self) -> Prefix {
        match self {
            Self::Tun { destination, .. } | Self::Unreachable { destination } => *destination,
        }
    }
}

/// Both overlay ranges as destinations.
#[must_use]
pub const fn destinations(range: OverlayRange) -> [Prefix; 2] {
    let ((v4, v4_len), (v6, v6_len)) = (range.v4(), range.v6());
    [(IpAddr::V4(v4), v4_len), (IpAddr::V6(v6), v6_len)]
}

/// Makes our routes to `destinations` exactly `wanted`.
///
/// # Errors
/// [`NetlinkError`].
pub fn apply(netlink: &mut Netlink, destinations: &[Prefix], wanted: &BTreeSet<Route>) -> Result<(), NetlinkError> {
    let mut missing = wanted.clone();
    for found in dump(netlink)?.into_iter().filter(|m| m.header.protocol == PROTOCOL) {
        if !destinations.contains(&destination(&found)) {
            continue;
        }
        if !parse(&found).is_some_and(|route| missing.remove(&route)) {
            netlink.change("remove a route", RouteNetlinkMessage::DelRoute(found), 0)?;
        }
    }
    missing.into_iter().try_for_each(|route| add(netlink, route))
}

/// Adds those of `wanted` that are missing, and takes nothing away.
///
/// # Errors
/// [`NetlinkError`].
pub fn ensure(netlink: &mut Netlink, wanted: &BTreeSet<Route>) -> Result<(), NetlinkError> {
    let ours = dump(netlink)?.into_iter().filter(|m| m.header.protocol == PROTOCOL);
    let there: BTreeSet<Route> = ours.filter_map(|m| parse(&m)).collect();
    wanted.difference(&there).try_for_each(|route| add(netlink, *route))
}

/// The first route of others that the overlay ranges would take traffic from: one inside a range, or one to neighbours on a link of this
/// host that contains a range. `own` are the indices of our TUNs.
///
/// # Errors
/// [`NetlinkError`].
pub fn conflict(netlink: &mut Netlink, range: OverlayRange, own: &[u32]) -> Result<Option<Prefix>, NetlinkError> {
    let ranges = destinations(range);
    let found = dump(netlink)?.into_iter().find(|message| {
        let ours = message.header.protocol == PROTOCOL || oif(message).is_some_and(|i| own.contains(&i));
        let prefix = destination(message);
        let inside = ranges.iter().any(|range| contains(*range, prefix));
        let around = !has_gateway(message) && prefix.1 > 0 && ranges.iter().any(|range| contains(prefix, *range));
        let kind = message.header.kind;
        !ours && matches!(kind, RouteType::Unicast | RouteType::Local) && (inside || around)
    });
    Ok(found.as_ref().map(destination))
}

/// The smallest MTU among the routes that leave this host: of all unicast routes of the main table but those over `own` and loopback
/// interfaces. `None` if there is no such route.
///
/// # Errors
/// [`NetlinkError`].
pub fn underlay_mtu(netlink: &mut Netlink, links: &[Link], own: &[u32]) -> Result<Option<u32>, NetlinkError> {
    let leaves = |link: &&Link| link.up && !link.loopback && !own.contains(&link.index);
    let mtu = |message: &RouteMessage| {
        let link = links.iter().filter(leaves).find(|l| Some(l.index) == oif(message))?;
        Some(metric_mtu(message).unwrap_or(link.mtu).min(link.mtu))
    };
    let underlay =
        |m: &&RouteMessage| m.header.table == RouteHeader::RT_TABLE_MAIN && m.header.kind == RouteType::Unicast && !is_link_local(m);
    Ok(dump(netlink)?.iter().filter(underlay).filter_map(mtu).min())
}

fn add(netlink: &mut Netlink, route: Route) -> Result<(), NetlinkError> {
    netlink.change(
        "add a route",
        RouteNetlinkMessage::NewRoute(message(route)),
        NLM_F_CREATE | NLM_F_EXCL,
    )
}

fn dump(netlink: &mut Netlink) -> Result<Vec<RouteMessage>, NetlinkError> {
    let mut routes = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut ask = RouteMessage::default();
        ask.header.address_family = family;
        let found = netlink.dump("list the routes", &RouteNetlinkMessage::GetRoute(ask))?;
        routes.extend(
            found
                .into_iter()
                .filter_map(|m| if let RouteNetlinkMessage::NewRoute(m) = m { Some(m) } else { None }),
        );
    }
    Ok(routes)
}

fn parse(message: &RouteMessage) -> Option<Route> {
    let (destination, metric, table) = (destination(message), metric(message), table(message));
    if message.header.kind == RouteType::Unreachable && metric == UNREACHABLE_METRIC {
        return (table == MAIN).then_some(Route::Unreachable { destination });
    }
    let source = message
        .attributes
        .iter()
        .find_map(|a| if let RouteAttribute::PrefSource(a) = a { ip(a) } else { None })?;
    let index = oif(message)?;
    (message.header.kind == RouteType::Unicast && metric == TUN_METRIC).then_some(Route::Tun {
        destination,
        index,
        source,
        table,
    })
}

fn message(route: Route) -> RouteMessage {
    let (address, length) = route.destination();
    let mut message = RouteMessage::default();
    let table = if let Route::Tun { table, .. } = route { table } else { MAIN };
    // The header's field has eight bits; the attribute holds the whole number, and wins.
    message.header.table = u8::try_from(table).unwrap_or(COMPAT);
    message.header.protocol = PROTOCOL;
    message.header.destination_prefix_length = length;
    message.header.address_family = if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    message.attributes = vec![RouteAttribute::Destination(route_address(address)), RouteAttribute::Table(table)];
    match route {
        Route::Tun { index, source, .. } => {
            message.header.kind = RouteType::Unicast;
            message.header.scope = if address.is_ipv4() {
                RouteScope::Link
            } else {
                RouteScope::Universe
            };
            message.attributes.extend([
                RouteAttribute::PrefSource(route_address(source)),
                RouteAttribute::Oif(index),
                RouteAttribute::Priority(TUN_METRIC),
            ]);
        }
        Route::Unreachable { .. } => {
            message.header.kind = RouteType::Unreachable;
            message.header.scope = RouteScope::Universe;
            message.attributes.push(RouteAttribute::Priority(UNREACHABLE_METRIC));
        }
    }
    message
}

fn destination(message: &RouteMessage) -> Prefix {
    let address = message
        .attributes
        .iter()
        .find_map(|a| if let RouteAttribute::Destination(a) = a { ip(a) } else { None });
    let any = if message.header.address_family == AddressFamily::Inet {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    } else {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    };
    (address.unwrap_or(any), message.header.destination_prefix_length)
}

fn oif(message: &RouteMessage) -> Option<u32> {
    message
        .attributes
        .iter()
        .find_map(|a| if let RouteAttribute::Oif(i) = a { Some(*i) } else { None })
}

fn table(message: &RouteMessage) -> u32 {
    let found = message
        .attributes
        .iter()
        .find_map(|a| if let RouteAttribute::Table(t) = a { Some(*t) } else { None });
    found.unwrap_or_else(|| u32::from(message.header.table))
}

fn metric(message: &RouteMessage) -> u32 {
    message
        .attributes
        .iter()
        .find_map(|a| if let RouteAttribute::Priority(p) = a { Some(*p) } else { None })
        .unwrap_or(0)
}

fn metric_mtu(message: &RouteMessage) -> Option<u32> {
    let metrics = message
        .attributes
        .iter()
        .find_map(|a| if let RouteAttribute::Metrics(m) = a { Some(m) } else { None })?;
    metrics
        .iter()
        .find_map(|m| if let RouteMetric::Mtu(mtu) = m { Some(*mtu) } else { None })
}

fn has_gateway(message: &RouteMessage) -> bool {
    message.attributes.iter().any(|a| {
        matches!(
            a,
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_)
        )
    })
}

fn is_link_local(message: &RouteMessage) -> bool {
    match destination(message) {
        (IpAddr::V4(a), _) => a.is_link_local(),
        (IpAddr::V6(a), _) => a.is_unicast_link_local() || a.is_multicast(),
    }
}

/// Whether the first prefix contains the second.
fn contains((outer, outer_length): Prefix, (inner, inner_length): Prefix) -> bool {
    let shared = match (outer, inner) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (u32::from(a) ^ u32::from(b)).leading_zeros(),
        (IpAddr::V6(a), IpAddr::V6(b)) => (u128::from(a) ^ u128::from(b)).leading_zeros(),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return false,
    };
    inner_length >= outer_length && shared >= u32::from(outer_length)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    if let RouteAddress::Inet(a) = address {
        Some(IpAddr::V4(*a))
    } else if let RouteAddress::Inet6(a) = address {
        Some(IpAddr::V6(*a))
    } else {
        None
    }
}

const fn route_address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(a) => RouteAddress::Inet(a),
        IpAddr::V6(a) => RouteAddress::Inet6(a),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(text: &str) -> Prefix {
        let (address, length) = text.split_once('/').unwrap_or((text, "0"));
        (
            address.parse().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
            length.parse().unwrap_or(0),
        )
    }

    #[test]
    fn a_prefix_contains_itself_and_longer_ones_of_its_family() {
        for (outer, inner, expected) in [
            ("10.77.0.0/16", "10.77.0.0/16", true),
            ("10.77.0.0/16", "10.77.9.0/24", true),
            ("10.77.9.0/24", "10.77.0.0/16", false),
            ("10.0.0.0/8", "10.77.0.0/16", true),
            ("10.77.0.0/16", "10.78.0.0/16", false),
            ("0.0.0.0/0", "10.77.0.0/16", true),
            ("::/0", "10.77.0.0/16", false),
            ("fd12::/16", "fd12:3456:789a::/48", true),
            ("fd12:3456:789a::/48", "fd12:3456:789b::/64", false),
        ] {
            assert_eq!(contains(prefix(outer), prefix(inner)), expected, "{outer} {inner}");
        }
    }

    #[test]
    fn a_route_is_read_back_as_it_was_written() {
        let source = IpAddr::V6(Ipv6Addr::new(0xfd12, 0, 0, 0, 0, 0, 1, 1));
        for route in [
            Route::Tun {
                destination: prefix("10.77.0.0/16"),
                index: 3,
                source: IpAddr::V4([10, 77, 1, 0].into()),
                table: MAIN,
            },
            Route::Tun {
                destination: prefix("fd12::/48"),
                index: 3,
                source,
                table: 0xc100_0100,
            },
            Route::Unreachable {
                destination: prefix("10.77.0.0/16"),
            },
            Route::Unreachable {
                destination: prefix("fd12::/48"),
            },
        ] {
            assert_eq!(parse(&message(route)), Some(route));
        }
    }
}
