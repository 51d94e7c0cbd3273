//! Interfaces: what there is, and the state in which a TUN must be.

use std::io;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};

use super::{Netlink, NetlinkError};

/// An interface, as far as the agent cares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Length of its transmit queue in packets.
    pub queue_length: u32,
    /// Whether it is up.
    pub up: bool,
    /// Whether it is the loopback interface.
    pub loopback: bool,
    /// What somebody noted about it; empty if nobody did.
    pub alias: String,
}

/// The state in which a TUN must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkState {
    /// MTU in bytes.
    pub mtu: u32,
    /// Length of the transmit queue in packets.
    pub queue_length: u32,
}

/// All interfaces of the namespace.
///
/// # Errors
/// [`NetlinkError`].
pub fn list(netlink: &mut Netlink) -> Result<Vec<Link>, NetlinkError> {
    let found = netlink.dump("list the interfaces", &RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    Ok(found.into_iter().filter_map(parse).collect())
}

/// Notes on interface `index` what it is for.
///
/// # Errors
/// [`NetlinkError`].
pub fn set_alias(netlink: &mut Netlink, index: u32, alias: &str) -> Result<(), NetlinkError> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = vec![LinkAttribute::IfAlias(alias.to_owned())];
    netlink.change("mark the TUN", RouteNetlinkMessage::SetLink(message), 0)
}

/// Takes interface `index` away, with its addresses and routes.
///
/// # Errors
/// [`NetlinkError`].
pub fn delete(netlink: &mut Netlink, index: u32) -> Result<(), NetlinkError> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    netlink.change("remove a TUN", RouteNetlinkMessage::DelLink(message), 0)
}

/// Brings interface `index` up, in the state that is wanted.
///
/// # Errors
/// [`NetlinkError`]; ENODEV if there is no such interface.
pub fn apply(netlink: &mut Netlink, index: u32, wanted: LinkState) -> Result<(), NetlinkError> {
    let what = "bring the TUN up";
    let Some(link) = list(netlink)?.into_iter().find(|l| l.index == index) else {
        return Err(NetlinkError::Refused(what, io::Error::from_raw_os_error(libc::ENODEV)));
    };
    if link.up && (link.mtu, link.queue_length) == (wanted.mtu, wanted.queue_length) {
        return Ok(());
    }
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message.attributes = vec![LinkAttribute::Mtu(wanted.mtu), LinkAttribute::TxQueueLen(wanted.queue_length)];
    netlink.change(what, RouteNetlinkMessage::SetLink(message), 0)
}

fn parse(message: RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = message else {
        return None;
    };
    let flags = message.header.flags;
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mtu: 0,
        queue_length: 0,
        up: flags.contains(LinkFlags::Up),
        loopback: flags.contains(LinkFlags::Loopback),
        alias: String::new(),
    };
    for attribute in message.attributes {
        if let LinkAttribute::IfName(name) = attribute {
            link.name = name;
        } else if let LinkAttribute::Mtu(mtu) = attribute {
            link.mtu = mtu;
        } else if let LinkAttribute::TxQueueLen(length) = attribute {
            link.queue_length = length;
        } else if let LinkAttribute::IfAlias(alias) = attribute {
            link.alias = alias;
        }
    }
    Some(link)
}
