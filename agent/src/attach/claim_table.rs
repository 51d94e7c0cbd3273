//! What the base table says of components that share the host's namespace: which sockets may speak from which overlay address, and which
//! may hear at it. Text for `nft`; the sets of cgroups are empty there and are filled by netlink ([`super::claims`]), so that a table that
//! was just loaded refuses all of them.
//!
//! The order is from the deepest cgroup to the root, then users, then the rest of the host. What no socket is behind (resets, the last
//! segments of closed sockets) passes here, because the engine knows the flows that it may belong to and no SYN comes without a socket. That a
//! user's socket is asked for last is no matter of taste: an orphan has no user any more, but it still has its cgroup.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;

use cloison_proto::net::{AddressPair, OverlayRange};

use crate::sys::InterfaceName;

/// Claims of the host's namespace, as the table needs them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimTable {
    /// How deep cgroups are looked at, from the root's children (1) on; zero if none is claimed.
    pub levels: u8,
    /// Addresses of the components that are a cgroup.
    pub of_cgroups: Vec<AddressPair>,
    /// Addresses of the components that are a user, by the user's number.
    pub of_users: BTreeMap<u32, AddressPair>,
    /// Addresses of the rest of the host, if it is a component.
    pub rest: Option<AddressPair>,
}

/// The set of pairs of a cgroup at this level and its own address.
#[must_use]
pub fn own(level: u8, address: IpAddr) -> String {
    let family = if address.is_ipv4() { 4 } else { 6 };
    format!("own{family}_{level}")
}

/// The set of the cgroups at this level that are a component.
#[must_use]
pub fn claimed(level: u8) -> String {
    format!("claimed_{level}")
}

/// The set of the cgroups at this level of which it is known that they are nobody's.
#[must_use]
pub fn rest(level: u8) -> String {
    format!("rest_{level}")
}

impl ClaimTable {
    /// The sets and chains.
    pub(super) fn definitions(&self) -> String {
        let mut text = String::new();
        for level in 1..=self.levels {
            let cgroup = format!("socket cgroupv2 level {level}");
            let _ = writeln!(text, "  set own4_{level} {{ typeof {cgroup} . ip saddr; }}");
            let _ = writeln!(text, "  set own6_{level} {{ typeof {cgroup} . ip6 saddr; }}");
            let _ = writeln!(text, "  set claimed_{level} {{ typeof {cgroup}; }}");
            let _ = writeln!(text, "  set rest_{level} {{ typeof {cgroup}; }}");
        }
        if self.levels > 0 {
            text.push_str("  set none { typeof socket cgroupv2 level 1; }\n");
        }
        for (chain, what) in [
            ("unspoken", "sent by a socket of another component"),
            ("unheard", "meant for another component's socket"),
        ] {
            let _ = writeln!(
                text,
                "  chain {chain} {{\n    counter reject with icmpx admin-prohibited comment \"{what}\"\n  }}"
            );
        }
        self.write_rest(&mut text);
        self.write_speaking(&mut text);
        self.write_hearing(&mut text);
        text
    }

    /// The rest of the host: where cgroups are claimed, a socket in a cgroup that nobody has looked at yet is not of it.
    fn write_rest(&self, text: &mut String) {
        text.push_str("  chain rest {\n");
        for level in 1..=self.levels {
            let _ = writeln!(text, "    socket cgroupv2 level {level} @rest_{level} accept");
        }
        if self.levels > 0 {
            text.push_str("    socket cgroupv2 level 1 != @none counter drop comment \"socket of a cgroup that is not known yet\"\n");
        }
        text.push_str("    accept\n  }\n");
    }

    /// Who sends from which address.
    fn write_speaking(&self, text: &mut String) {
        text.push_str("  chain speaking {\n");
        for level in (1..=self.levels).rev() {
            let cgroup = format!("socket cgroupv2 level {level}");
            let _ = writeln!(text, "    {cgroup} . ip saddr @own4_{level} accept");
            let _ = writeln!(text, "    {cgroup} . ip6 saddr @own6_{level} accept");
            let _ = writeln!(text, "    {cgroup} @claimed_{level} goto unspoken");
        }
        // What answers a SYN has a socket in the making, which has no cgroup yet, but its listener's user. The listener was heard.
        text.push_str("    tcp flags & (syn | ack) == syn | ack accept\n");
        for (user, addresses) in &self.of_users {
            let _ = writeln!(text, "    meta skuid {user} ip saddr {} accept", addresses.v4);
            let _ = writeln!(text, "    meta skuid {user} ip6 saddr {} accept", addresses.v6);
            let _ = writeln!(text, "    meta skuid {user} goto unspoken");
        }
        if let Some(rest) = self.rest {
            let _ = writeln!(text, "    ip saddr {} goto rest", rest.v4);
            let _ = writeln!(text, "    ip6 saddr {} goto rest", rest.v6);
        }
        // Every user: a packet that has a socket at all. A socket that the kernel made on somebody's behalf has no user, so of what has none
        // only that passes which a stream or an error can leave behind; a stream's first packet is the witness's business, too.
        text.push_str(
            "    meta skuid 0-4294967294 goto unspoken\n    meta l4proto { tcp, icmp, ipv6-icmp } accept\n    goto unspoken\n  }\n",
        );
    }

    /// Who receives at which address: the socket is the very one that the packet would reach.
    fn write_hearing(&self, text: &mut String) {
        // An error reaches the socket whose packet it quotes: the engine has compared it with the flow, and what was refused here is told so.
        text.push_str("  chain hearing {\n    meta l4proto { icmp, ipv6-icmp } accept\n");
        for level in (1..=self.levels).rev() {
            let cgroup = format!("socket cgroupv2 level {level}");
            let _ = writeln!(text, "    {cgroup} . ip daddr @own4_{level} accept");
            let _ = writeln!(text, "    {cgroup} . ip6 daddr @own6_{level} accept");
            let _ = writeln!(text, "    {cgroup} @claimed_{level} goto unheard");
        }
        for (user, addresses) in &self.of_users {
            // Behind the first packet the kernel knows the socket, or the listener of one in the making: one that took a listener's place
            // between the agent's question and the first packet gets no second one.
            let _ = writeln!(text, "    ip daddr {} meta skuid != {user} goto unheard", addresses.v4);
            let _ = writeln!(text, "    ip6 daddr {} meta skuid != {user} goto unheard", addresses.v6);
            let _ = writeln!(
                text,
                "    ip daddr {} accept comment \"the agent asked whose the listener is\"",
                addresses.v4
            );
            let _ = writeln!(
                text,
                "    ip6 daddr {} accept comment \"the agent asked whose the listener is\"",
                addresses.v6
            );
        }
        if let Some(rest) = self.rest {
            let _ = writeln!(text, "    ip daddr {} goto rest", rest.v4);
            let _ = writeln!(text, "    ip6 daddr {} goto rest", rest.v6);
        }
        text.push_str("    tcp flags & (syn | ack) != syn accept\n    goto unheard\n  }\n");
    }

    /// What stands first in the chain of packets that leave.
    pub(super) fn output(&self, tun: &InterfaceName, range: OverlayRange) -> String {
        let mut text = format!("    oifname \"{tun}\" goto speaking\n");
        for (source, destination) in self.themselves() {
            let _ = writeln!(text, "    oifname \"lo\" {source} {destination} goto speaking");
        }
        text + &stays_away("oifname", range)
    }

    /// What stands first in the chain of packets that arrive.
    pub(super) fn input(&self, tun: &InterfaceName, range: OverlayRange) -> String {
        let mut text = format!("    iifname \"{tun}\" goto hearing\n");
        for (source, destination) in self.themselves() {
            let _ = writeln!(text, "    iifname \"lo\" {source} {destination} goto hearing");
        }
        text + &stays_away("iifname", range)
    }

    /// By loopback a component reaches itself, and nobody else of the mesh: source and destination are one address.
    fn themselves(&self) -> Vec<(String, String)> {
        let all = self.of_cgroups.iter().chain(self.of_users.values()).chain(&self.rest);
        all.flat_map(|pair| {
            let (v4, v6) = (pair.v4, pair.v6);
            [
                (format!("ip saddr {v4}"), format!("ip daddr {v4}")),
                (format!("ip6 saddr {v6}"), format!("ip6 daddr {v6}")),
            ]
        })
        .collect()
    }
}

/// No overlay address on loopback but for that: a server that trusts a component's address must not meet it without the filter.
fn stays_away(interface: &str, range: OverlayRange) -> String {
    let ((v4, v4_len), (v6, v6_len)) = (range.v4(), range.v6());
    let mut text = String::new();
    for address in [
        format!("ip saddr {v4}/{v4_len}"),
        format!("ip daddr {v4}/{v4_len}"),
        format!("ip6 saddr {v6}/{v6_len}"),
        format!("ip6 daddr {v6}/{v6_len}"),
    ] {
        let _ = writeln!(
            text,
            "    {interface} \"lo\" {address} counter drop comment \"overlay address around the filter\""
        );
    }
    text
}
