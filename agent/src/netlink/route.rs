//! Routes: the overlay ranges to a TUN, and `unreachable` under them, so that overlay traffic never follows a default route while there is
//! no TUN.
//!
//! Ours are told from others' by their protocol number. All stand in the main table.

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
const PROTOCOL: RouteProtocol = RouteProtocol::Other(0xc1);

/// Metric of the routes to a TUN: low, so that they win; not zero, which IPv6 would take for 1024.
const TUN_METRIC: u32 = 8;

/// Metric of the `unreachable` routes: the highest there is, so that they win only when nothing else is left.
const UNREACHABLE_METRIC: u32 = u32::MAX;

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
    for route in missing {
        netlink.change("add a route", RouteNetlinkMessage::NewRoute(message(route)), NLM_F_CREATE | NLM_F_EXCL)?;
    }
    Ok(())
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
    let mtu = |message: &RouteMessage| {
        let link = links.iter().find(|l| Some(l.index) == oif(message))?;
        if link.loopback || !link.up || own.contains(&link.index) || message.header.kind != RouteType::Unicast {
            return None;
        }
        let metrics = message.attributes.iter().find_map(|a| if let RouteAttribute::Metrics(m) = a { Some(m) } else { None });
        let of_route = metrics?.iter().find_map(|m| if let RouteMetric::Mtu(mtu) = m { Some(*mtu) } else { None });
        Some(of_route.unwrap_or(link.mtu))
    };
    let with_link_mtu = |message: &RouteMessage| {
        mtu(message).or_else(|| {
            let link = links.iter().find(|l| Some(l.index) == oif(message))?;
            let leaves = !link.loopback && link.up && !own.contains(&link.index) && message.header.kind == RouteType::Unicast;
            leaves.then_some(link.mtu)
        })
    };
    Ok(dump(netlink)?.iter().filter(|m| table(m) == MAIN_TABLE && !is_link_local(m)).filter_map(with_link_mtu).min())
}
