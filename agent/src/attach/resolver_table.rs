//! What the base table says of the resolver's addresses: inside the machine, over loopback, they are there for DNS and for nothing else. A
//! server that listens on all addresses must not be met at one that is nobody's.
//!
//! It stands before what is said of components, which knows these addresses not at all. From outside they are overlay addresses like any other.

use std::fmt::Write as _;

use cloison_proto::net::OverlayRange;

use crate::names::dns::serve::PORT;

/// The chain that judges what comes for the resolver, and what comes back to who asked from the resolver's own address, as the kernel has who
/// binds to none. What comes back begins no stream, and is the resolver's: port 53 of any other address would lead to any port.
pub(super) fn definitions(range: OverlayRange) -> String {
    let resolver = range.resolver();
    let (v4, v6) = (resolver.v4, resolver.v6);
    format!(
        r#"  chain resolving {{
    meta l4proto {{ tcp, udp }} th dport {PORT} accept
    ip saddr {v4} udp sport {PORT} accept
    ip6 saddr {v6} udp sport {PORT} accept
    ip saddr {v4} tcp sport {PORT} tcp flags & (syn | ack) != syn accept
    ip6 saddr {v6} tcp sport {PORT} tcp flags & (syn | ack) != syn accept
    meta l4proto {{ icmp, ipv6-icmp }} accept
    counter drop comment "no service of the resolver"
  }}
"#
    )
}

/// What leads there; `interface` is `iifname` or `oifname`.
pub(super) fn jumps(interface: &str, range: OverlayRange) -> String {
    let resolver = range.resolver();
    let mut text = String::new();
    let _ = writeln!(text, "    {interface} \"lo\" ip daddr {} goto resolving", resolver.v4);
    let _ = writeln!(text, "    {interface} \"lo\" ip6 daddr {} goto resolving", resolver.v6);
    text
}
