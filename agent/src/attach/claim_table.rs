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
    /// Whether a component that is a cgroup is reached on loopback by itself alone.
    pub guard: bool,
}

/// The upper eight bits of our marks and of the numbers of our routing tables; the others are those of the component's IPv4 address. Both stay
/// with the component for ever: a socket keeps the mark that it was made with.
const MARK: u32 = 0xc100_0000;

/// The bits of a mark by which it is one of ours.
const MARK_MASK: u32 = 0xff00_0000;

/// The mark of what the agent tries out on loopback ([`super::selftest`]): its own cgroup may be unknown to the table that the agent before it has left.
pub const TRIAL: u32 = 0xc200_0000;

/// The mark of a component's sockets, and the number of its routing table.
#[must_use]
pub fn mark(addresses: AddressPair) -> u32 {
    MARK | u32::from(addresses.v4) & !MARK_MASK
}

/// The set of protocols whose foreign packets are refused aloud, which is filled with the others: until then nobody is known, and who is refused
/// in that moment had better try again than hear of it.
pub const FILLED: &str = "filled";

/// What it is filled with: ICMP, TCP, UDP and ICMPv6.
pub const PROTOCOLS: [u8; 4] = [1, 6, 17, 58];

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

/// The set of the cgroups at this level that have others inside, and of which it is known that they are nobody's themselves.
#[must_use]
pub fn inner(level: u8) -> String {
    format!("inner_{level}")
}

/// The set of the cgroups at this level that the guard of loopback is attached to.
#[must_use]
pub fn held(level: u8) -> String {
    format!("held_{level}")
}

/// The map of the cgroups at this level that are a component to its mark.
#[must_use]
pub fn signs(level: u8) -> String {
    format!("signs_{level}")
}

/// The set of pairs of a cgroup at this level that is a component and its mark.
#[must_use]
pub fn home(level: u8) -> String {
    format!("home_{level}")
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
            let _ = writeln!(text, "  set inner_{level} {{ typeof {cgroup}; }}");
        }
        if self.levels > 0 {
            text.push_str("  set none { typeof socket cgroupv2 level 1; }\n");
        }
        let _ = writeln!(text, "  set {FILLED} {{ type inet_proto; }}");
        for (chain, what) in [
            ("unspoken", "sent by a socket of another component"),
            ("unheard", "meant for another component's socket"),
        ] {
            let _ = writeln!(
                text,
                "  chain {chain} {{\n    meta l4proto @{FILLED} counter reject with icmpx admin-prohibited comment \"{what}\"\n    counter drop\n  }}"
            );
        }
        self.write_rest(&mut text);
        self.write_speaking(&mut text);
        self.write_hearing(&mut text);
        if self.is_guarded() {
            self.write_guard(&mut text);
        }
        text
    }

    /// The rest of the host: where cgroups are claimed, a socket in a cgroup that nobody has looked at yet is not of it.
    fn write_rest(&self, text: &mut String) {
        for level in 1..=self.levels {
            // Whoever is further inside is known for himself, or not yet.
            let _ = writeln!(
                text,
                "  chain at_{level} {{\n    socket cgroupv2 level {} != @none return\n    accept\n  }}",
                level.saturating_add(1)
            );
        }
        text.push_str("  chain rest {\n");
        for level in 1..=self.levels {
            let _ = writeln!(text, "    socket cgroupv2 level {level} @rest_{level} accept");
            let _ = writeln!(text, "    socket cgroupv2 level {level} @inner_{level} jump at_{level}");
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
            "    meta skuid 0-4294967294 goto unspoken\n    tcp flags & (syn | ack) == syn goto unspoken\n    meta l4proto { tcp, icmp, ipv6-icmp } accept\n    goto unspoken\n  }\n",
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
        // Of all sockets that are left, `wildcard` is known, also of those in the root cgroup, which has no level. The rest of a stream that was
        // closed here first is no full socket any more, and stands before the listener that a new one reaches. The agent has asked whose that
        // listener is.
        for address in self.of_cgroups.iter().flat_map(|pair| pair.both()) {
            let to = if address.is_ipv4() { "ip daddr" } else { "ip6 daddr" };
            let _ = writeln!(text, "    {to} {address} socket wildcard {{ 0, 1 }} goto unheard");
            let _ = writeln!(
                text,
                "    {to} {address} socket transparent 0 tcp flags & (syn | ack) == syn accept"
            );
        }
        text.push_str("    tcp flags & (syn | ack) != syn accept\n    goto unheard\n  }\n");
    }

    /// Whether loopback is guarded: of users nobody knows what they hear.
    const fn is_guarded(&self) -> bool {
        self.guard && self.levels > 0
    }

    /// What the guard of loopback ([`super::guard`]) needs of the base table, for what has no overlay address. Who sends is known when a packet leaves,
    /// and who hears when it arrives: the mark of a claimed cgroup is written on its packets between the two (`signing`), and taken from those
    /// of everybody else. The guard judges by that mark, at the socket that receives.
    ///
    /// What it would refuse in silence is refused aloud here, if it is a stream's first packet and the listener is found at once; and
    /// a cgroup that is not known yet has no guard of its own, and hears nothing new.
    fn write_guard(&self, text: &mut String) {
        let ours = format!("meta mark & {MARK_MASK:#x} == {MARK:#x}");
        for level in 1..=self.levels {
            let _ = writeln!(text, "  map signs_{level} {{ typeof socket cgroupv2 level {level} : meta mark; }}");
            let _ = writeln!(text, "  set home_{level} {{ typeof socket cgroupv2 level {level} . meta mark; }}");
            let _ = writeln!(text, "  set held_{level} {{ typeof socket cgroupv2 level {level}; }}");
        }
        let _ = writeln!(text, "  chain signing {{\n    {ours} meta mark set 0");
        for level in 1..=self.levels {
            let _ = writeln!(text, "    meta mark set socket cgroupv2 level {level} map @signs_{level}");
        }
        let _ = writeln!(
            text,
            "  }}\n  chain guarded {{\n    meta l4proto {{ icmp, ipv6-icmp }} accept\n    tcp flags & (syn | ack) != syn accept\n    \
             meta mark {TRIAL:#x} accept"
        );
        for level in (1..=self.levels).rev() {
            let cgroup = format!("socket cgroupv2 level {level}");
            let _ = writeln!(text, "    meta l4proto tcp {cgroup} . meta mark @home_{level} accept");
            let _ = writeln!(text, "    meta l4proto != tcp {cgroup} @held_{level} accept");
            let _ = writeln!(text, "    {cgroup} @claimed_{level} goto unheard");
        }
        text.push_str("    goto rest\n  }\n");
    }

    /// What stands first in the chain of packets that leave.
    pub(super) fn output(&self, tun: &InterfaceName, range: OverlayRange) -> String {
        let mut text = format!("    oifname \"{tun}\" goto speaking\n");
        for (source, destination) in self.themselves() {
            let _ = writeln!(text, "    oifname \"lo\" {source} {destination} goto speaking");
        }
        let signed = if self.is_guarded() {
            // What goes to a group leaves by another interface and comes back.
            format!("    oifname \"lo\" jump signing\n    oifname != \"lo\" meta mark & {MARK_MASK:#x} == {MARK:#x} jump signing\n")
        } else {
            String::new()
        };
        text + &stays_away("oifname", range) + &signed
    }

    /// What stands first in the chain of packets that arrive.
    pub(super) fn input(&self, tun: &InterfaceName, range: OverlayRange) -> String {
        let mut text = format!("    iifname \"{tun}\" goto hearing\n");
        for (source, destination) in self.themselves() {
            let _ = writeln!(text, "    iifname \"lo\" {source} {destination} goto hearing");
        }
        let guarded = if self.is_guarded() {
            "    iifname \"lo\" goto guarded\n"
        } else {
            ""
        };
        text + &stays_away("iifname", range) + guarded
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_mark_is_the_component_s_for_ever_and_never_zero() -> Result<(), Box<dyn std::error::Error>> {
        let range = OverlayRange::new([10, 77, 0, 0].into(), 16, "fd12:3456:789a::".parse()?)?;
        let marks: BTreeSet<u32> = (0..1_000).filter_map(|n| range.nth(n)).map(mark).collect();
        assert_eq!(marks.len(), 1_000);
        assert!(marks.iter().all(|mark| mark >> 24 == 0xc1));
        Ok(())
    }
}
