//! Addresses of a TUN: exactly the wanted ones, each a /32 or /128 that makes no route of its own and is usable at once.

use std::collections::BTreeSet;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Netlink, NetlinkError};

/// The addresses of interface `index`.
///
/// # Errors
/// [`NetlinkError`].
pub fn list(netlink: &mut Netlink, index: u32) -> Result<BTreeSet<IpAddr>, NetlinkError> {
    Ok(found(netlink, index)?.iter().filter_map(address).collect())
}

/// Gives interface `index` the `wanted` addresses and takes away all others. New ones are made in their order, which is that in which people
/// and the kernel see those of IPv4: what comes first is taken for the interface's own.
///
/// # Errors
/// [`NetlinkError`].
pub fn apply(netlink: &mut Netlink, index: u32, wanted: &[IpAddr]) -> Result<(), NetlinkError> {
    let mut missing: BTreeSet<IpAddr> = wanted.iter().copied().collect();
    for message in found(netlink, index)? {
        let whole = [32, 128].contains(&message.header.prefix_len);
        let good = whole && address(&message).is_some_and(|a| missing.remove(&a));
        if !good {
            netlink.change("remove an address", RouteNetlinkMessage::DelAddress(message), 0)?;
        }
    }
    for address in wanted.iter().copied().filter(|address| missing.contains(address)) {
        netlink.change(
            "add an address",
            RouteNetlinkMessage::NewAddress(message(index, address)),
            NLM_F_CREATE | NLM_F_EXCL,
        )?;
    }
    Ok(())
}

fn found(netlink: &mut Netlink, index: u32) -> Result<Vec<AddressMessage>, NetlinkError> {
    let all = netlink.dump("list the addresses", &RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    let ours = all.into_iter().filter_map(|m| {
        if let RouteNetlinkMessage::NewAddress(m) = m {
            Some(m)
        } else {
            None
        }
    });
    Ok(ours.filter(|m| m.header.index == index).collect())
}

fn address(message: &AddressMessage) -> Option<IpAddr> {
    // IFA_LOCAL is the address itself where both are there (IPv4); IPv6 has IFA_ADDRESS alone.
    let local = message
        .attributes
        .iter()
        .find_map(|a| if let AddressAttribute::Local(a) = a { Some(*a) } else { None });
    local.or_else(|| {
        message
            .attributes
            .iter()
            .find_map(|a| if let AddressAttribute::Address(a) = a { Some(*a) } else { None })
    })
}

fn message(index: u32, address: IpAddr) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    (message.header.family, message.header.prefix_len) = match address {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    // No duplicate address detection: the coordinator gave the address to this host alone, and a tentative address cannot be a route's source.
    let flags = AddressFlags::Nodad | AddressFlags::Noprefixroute | AddressFlags::Permanent;
    message.attributes = vec![
        AddressAttribute::Local(address),
        AddressAttribute::Address(address),
        AddressAttribute::Flags(flags),
    ];
    message
}
