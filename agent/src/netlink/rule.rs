//! Routing rules: what this host's own programs send to the mesh goes to the TUN, by the table of the component that sends it, before the
//! kernel's table `local` is asked. So components of one host meet the filter too, and each has its own source address.
//!
//! Ours are told from others' by their protocol number, and from those of another agent by the overlay range that they speak of. The table
//! `local` is asked at priority 0 on an ordinary host; as long as there are rules of ours it is asked at [`priority::LOCAL`] instead, which
//! changes nothing for addresses outside the overlay.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cloison_proto::net::{AddressPair, OverlayRange};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage, RuleUidRange};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::route::{COMPAT, LOCAL, MAIN, PROTOCOL, Prefix, destinations};
use super::{Netlink, NetlinkError};

/// Where our rules stand: the lowest number is asked first.
mod priority {
    /// What anybody asks the resolver stays in the kernel.
    pub(super) const RESOLVER: u32 = 10;
    /// What a component sends to itself stays in the kernel.
    pub(super) const ITSELF: u32 = 11;
    /// What it sends to anybody else of the mesh: by its own table.
    pub(super) const MARKED: u32 = 12;
    pub(super) const USER: u32 = 13;
    pub(super) const BOUND: u32 = 14;
    /// What the rest of the host sends to itself, and to anybody else of the mesh.
    pub(super) const REST_ITSELF: u32 = 15;
    pub(super) const REST: u32 = 16;
    /// Where the table `local` is asked while there are rules of ours.
    pub(super) const LOCAL: u32 = 100;
}

/// The interface by whose name a rule means "sent by this host itself".
const OURSELVES: &str = "lo";

/// The whole of a mark.
const WHOLE: u32 = u32::MAX;

/// Who sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sender {
    /// A socket with this mark.
    Mark(u32),
    /// A socket of this user.
    User(u32),
}

/// A component on the host's TUN whose processes are claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// Who sends as this component.
    pub sender: Sender,
    /// Its addresses.
    pub addresses: AddressPair,
    /// The number of its routing table.
    pub table: u32,
}

/// A rule of ours. All of them are about what this host itself sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rule {
    priority: u32,
    to: Prefix,
    from: Option<IpAddr>,
    sender: Option<Sender>,
    table: u32,
}

/// Makes our rules for `range` those of these components; `rest` are the addresses of the rest of the host. Without claimed components there
/// are none, and the table `local` is asked first again.
///
/// # Errors
/// [`NetlinkError`].
pub fn apply(netlink: &mut Netlink, range: OverlayRange, claimed: &[Route], rest: Option<AddressPair>) -> Result<(), NetlinkError> {
    let wanted = wanted(range, claimed, rest);
    let found = dump(netlink)?;
    let is_ours = |message: &RuleMessage| has_our_protocol(message) && parse(message).is_some_and(|rule| is_of(range, &rule));
    if !wanted.is_empty() {
        move_local(netlink, &found)?;
    }
    let mut missing = wanted.clone();
    for message in found.iter().filter(|m| is_ours(m)) {
        if !parse(message).is_some_and(|rule| missing.remove(&rule)) {
            netlink.change("remove a routing rule", RouteNetlinkMessage::DelRule(message.clone()), 0)?;
        }
    }
    missing.into_iter().try_for_each(|rule| add(netlink, message(rule)))?;
    let of_others = found.iter().any(|m| has_our_protocol(m) && !is_local(m) && !is_ours(m));
    if wanted.is_empty() && !of_others {
        move_local_back(netlink, &found)?;
    }
    Ok(())
}

fn wanted(range: OverlayRange, claimed: &[Route], rest: Option<AddressPair>) -> BTreeSet<Rule> {
    let mut wanted = BTreeSet::new();
    if claimed.is_empty() {
        return wanted;
    }
    for whole in destinations(range) {
        let mut add = |priority, to, from, sender, table| {
            let _ = wanted.insert(Rule {
                priority,
                to,
                from,
                sender,
                table,
            });
        };
        for Route { sender, addresses, table } in claimed {
            let address = addresses.of_family(whole.0);
            let by = if matches!(sender, Sender::Mark(_)) {
                priority::MARKED
            } else {
                priority::USER
            };
            add(priority::ITSELF, exactly(address), None, Some(*sender), LOCAL);
            add(priority::ITSELF, exactly(address), Some(address), None, LOCAL);
            add(by, whole, None, Some(*sender), *table);
            add(priority::BOUND, whole, Some(address), None, *table);
        }
        add(priority::RESOLVER, exactly(range.resolver().of_family(whole.0)), None, None, LOCAL);
        if let Some(rest) = rest {
            add(priority::REST_ITSELF, exactly(rest.of_family(whole.0)), None, None, LOCAL);
        }
        // Where there is no rest of the host, its table has nothing but `unreachable`.
        add(priority::REST, whole, None, None, MAIN);
    }
    wanted
}

const fn exactly(address: IpAddr) -> Prefix {
    (address, if address.is_ipv4() { 32 } else { 128 })
}

/// Whether a rule speaks of this overlay.
fn is_of(range: OverlayRange, rule: &Rule) -> bool {
    destinations(range).contains(&rule.to) || range.contains(rule.to.0)
}

/// Has the table `local` asked behind our rules: first there, then no longer before them, so that nothing breaks in between.
fn move_local(netlink: &mut Netlink, found: &[RuleMessage]) -> Result<(), NetlinkError> {
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let of_family = || found.iter().filter(|m| m.header.family == family && is_local(m));
        if of_family().next().is_none() {
            // A kernel without that family.
            continue;
        }
        if !of_family().any(|m| priority_of(m) == priority::LOCAL) {
            add(netlink, local_message(family, priority::LOCAL, PROTOCOL))?;
        }
        for first in of_family().filter(|m| priority_of(m) == 0) {
            netlink.change("move the table `local`", RouteNetlinkMessage::DelRule(first.clone()), 0)?;
        }
    }
    Ok(())
}

fn move_local_back(netlink: &mut Netlink, found: &[RuleMessage]) -> Result<(), NetlinkError> {
    for moved in found.iter().filter(|m| is_local(m) && has_our_protocol(m)) {
        let family = moved.header.family;
        let has_first = found
            .iter()
            .any(|m| m.header.family == family && is_local(m) && priority_of(m) == 0);
        if !has_first {
            add(netlink, local_message(family, 0, RouteProtocol::Kernel))?;
        }
        netlink.change("move the table `local` back", RouteNetlinkMessage::DelRule(moved.clone()), 0)?;
    }
    Ok(())
}

fn add(netlink: &mut Netlink, message: RuleMessage) -> Result<(), NetlinkError> {
    netlink.change(
        "add a routing rule",
        RouteNetlinkMessage::NewRule(message),
        NLM_F_CREATE | NLM_F_EXCL,
    )
}

fn dump(netlink: &mut Netlink) -> Result<Vec<RuleMessage>, NetlinkError> {
    let mut rules = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut ask = RuleMessage::default();
        ask.header.family = family;
        let found = netlink.dump("list the routing rules", &RouteNetlinkMessage::GetRule(ask))?;
        rules.extend(
            found
                .into_iter()
                .filter_map(|m| if let RouteNetlinkMessage::NewRule(m) = m { Some(m) } else { None }),
        );
    }
    // A kernel without a family answers with those of all others.
    rules.dedup();
    Ok(rules)
}

fn message(rule: Rule) -> RuleMessage {
    let mut message = empty(rule.to.0, rule.priority, rule.table, PROTOCOL);
    message.header.dst_len = rule.to.1;
    message.attributes.push(RuleAttribute::Destination(rule.to.0));
    message.attributes.push(RuleAttribute::Iifname(OURSELVES.into()));
    if let Some(from) = rule.from {
        message.header.src_len = exactly(from).1;
        message.attributes.push(RuleAttribute::Source(from));
    }
    match rule.sender {
        Some(Sender::Mark(mark)) => message
            .attributes
            .extend([RuleAttribute::FwMark(mark), RuleAttribute::FwMask(WHOLE)]),
        Some(Sender::User(user)) => message
            .attributes
            .push(RuleAttribute::UidRange(RuleUidRange { start: user, end: user })),
        None => {}
    }
    message
}

fn local_message(family: AddressFamily, priority: u32, protocol: RouteProtocol) -> RuleMessage {
    let of_family: IpAddr = if family == AddressFamily::Inet {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    empty(of_family, priority, LOCAL, protocol)
}

fn empty(of_family: IpAddr, priority: u32, table: u32, protocol: RouteProtocol) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = if of_family.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    message.header.action = RuleAction::ToTable;
    // The header's field has eight bits; the attribute holds the whole number, and wins.
    message.header.table = u8::try_from(table).unwrap_or(COMPAT);
    message.attributes = vec![
        RuleAttribute::Priority(priority),
        RuleAttribute::Table(table),
        RuleAttribute::Protocol(protocol),
    ];
    message
}

fn parse(message: &RuleMessage) -> Option<Rule> {
    let to = find(message, |a| {
        if let RuleAttribute::Destination(address) = a {
            Some(*address)
        } else {
            None
        }
    })?;
    let mark = find(message, |a| if let RuleAttribute::FwMark(mark) = a { Some(*mark) } else { None });
    let user = find(message, |a| {
        if let RuleAttribute::UidRange(range) = a {
            Some(*range)
        } else {
            None
        }
    });
    let user = user.filter(|range| range.start == range.end).map(|range| Sender::User(range.start));
    Some(Rule {
        priority: priority_of(message),
        to: (to, message.header.dst_len),
        from: find(message, |a| {
            if let RuleAttribute::Source(address) = a {
                Some(*address)
            } else {
                None
            }
        }),
        sender: mark.filter(|mark| *mark != 0).map(Sender::Mark).or(user),
        table: table_of(message),
    })
}

fn find<T>(message: &RuleMessage, wanted: impl Fn(&RuleAttribute) -> Option<T>) -> Option<T> {
    message.attributes.iter().find_map(wanted)
}

fn has_our_protocol(message: &RuleMessage) -> bool {
    message
        .attributes
        .iter()
        .any(|a| matches!(a, RuleAttribute::Protocol(p) if *p == PROTOCOL))
}

/// Whether a rule sends everything to the table `local`.
fn is_local(message: &RuleMessage) -> bool {
    let condition = |a: &RuleAttribute| {
        matches!(
            a,
            RuleAttribute::Destination(_) | RuleAttribute::Source(_) | RuleAttribute::Iifname(_) | RuleAttribute::FwMark(_)
        )
    };
    table_of(message) == LOCAL && !message.attributes.iter().any(condition)
}

/// The kernel leaves a zero out.
fn priority_of(message: &RuleMessage) -> u32 {
    find(message, |a| if let RuleAttribute::Priority(p) = a { Some(*p) } else { None }).unwrap_or(0)
}

fn table_of(message: &RuleMessage) -> u32 {
    let found = find(message, |a| if let RuleAttribute::Table(table) = a { Some(*table) } else { None });
    found.unwrap_or_else(|| u32::from(message.header.table))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range() -> Result<OverlayRange, cloison_proto::net::NetError> {
        OverlayRange::new(Ipv4Addr::new(10, 77, 0, 0), 16, Ipv6Addr::new(0xfd12, 0, 0, 0, 0, 0, 0, 0))
    }

    #[test]
    fn a_rule_is_read_back_as_it_was_written() -> Result<(), Box<dyn std::error::Error>> {
        let addresses = range()?.nth(0).ok_or("no address")?;
        let routes = [Sender::Mark(0xc100_0100), Sender::User(70)].map(|sender| Route {
            sender,
            addresses,
            table: 0xc100_0100,
        });
        let wanted = wanted(range()?, &routes, range()?.nth(1));
        assert_eq!(
            wanted.len(),
            2 * (4 + 2 + 2 + 1),
            "both families; what is about addresses alone is there once"
        );
        for rule in wanted {
            assert_eq!(parse(&message(rule)), Some(rule));
            assert!(is_of(range()?, &rule) && has_our_protocol(&message(rule)) && !is_local(&message(rule)));
        }
        Ok(())
    }

    #[test]
    fn without_claims_there_are_no_rules() -> Result<(), Box<dyn std::error::Error>> {
        assert!(wanted(range()?, &[], range()?.nth(1)).is_empty());
        Ok(())
    }
}
