//! A host whose agent is not ours: it has its keys and its view, seals whatever it likes, and never asks a filter.
//!
//! [`forgeries`] lists what it may try to get past an honest receiver inside of a session that is good, each with the reason for which it must
//! be dropped. It comes from the known ways around packet filters: sources that are another's, destinations behind the receiver, segments
//! from the middle of nowhere, errors about flows that are not, fragments and headers that hide ports, and protocols that carry others.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use cloison_agent_core::wg::index::Prefixes;
use cloison_agent_core::wg::trivial::{SimulatedKey, SimulatedSession};
use cloison_agent_core::wg::{Datagram, INITIATION_LEN, LocalKey as _, OVERHEAD, Opened, Sealed, Session as _};
use cloison_proto::key::{WgPrivateKey, WgPublicKey};
use cloison_proto::net::AddressPair;
use cloison_proto::verdict::DropReason;
use cloison_proto::version::Timestamp;

use crate::packets::flags::{ACK, FIN, PSH, RST, SYN, URG};
use crate::packets::{echo, extended, fragment, icmp, ip, number, tcp, udp, unreachable, with};

/// A host that lies. It has one session with each peer.
pub struct Liar {
    key: Arc<SimulatedKey>,
    prefixes: Prefixes,
    drawn: Vec<u32>,
    sessions: BTreeMap<WgPublicKey, SimulatedSession>,
}

impl Liar {
    /// A host with this key.
    #[must_use]
    pub fn new(key: &WgPrivateKey, seed: u64) -> Self {
        Self {
            key: Arc::new(SimulatedKey::new(key)),
            prefixes: Prefixes::new(seed),
            drawn: Vec::new(),
            sessions: BTreeMap::new(),
        }
    }

    /// The initiation of a handshake with a peer.
    ///
    /// # Errors
    /// If none can be made.
    pub fn greet(&mut self, peer: &WgPublicKey, now: Timestamp) -> Result<Vec<u8>> {
        let session = match self.sessions.entry(*peer) {
            std::collections::btree_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::btree_map::Entry::Vacant(new) => {
                let drawn = &self.drawn;
                let prefix = self
                    .prefixes
                    .draw(|prefix| drawn.contains(&prefix.slot(0).get()))
                    .context("no index left")?;
                self.drawn.push(prefix.slot(0).get());
                new.insert(self.key.session(peer, None, prefix.slot(0)))
            }
        };
        let mut out = vec![0; INITIATION_LEN];
        let len = session.initiate(&mut out, now).context("no initiation")?;
        out.truncate(len);
        Ok(out)
    }

    /// Takes a datagram; what is to be sent back.
    pub fn receive(&mut self, datagram: &[u8], now: Timestamp) -> Option<Vec<u8>> {
        let parsed = Datagram::parse(datagram).ok()?;
        for session in self.sessions.values_mut() {
            let mut out = vec![0; datagram.len().max(INITIATION_LEN)];
            if let Opened::Established(len) | Opened::Accepted(len) = session.open(&parsed, &mut out, now) {
                out.truncate(len);
                return Some(out);
            }
        }
        None
    }

    /// A datagram that holds this inner packet.
    ///
    /// # Errors
    /// If there is no session with this peer.
    pub fn say(&mut self, peer: &WgPublicKey, inner: &[u8], now: Timestamp) -> Result<Vec<u8>> {
        let session = self.sessions.get_mut(peer).context("never greeted")?;
        let mut out = vec![0; inner.len() + OVERHEAD + INITIATION_LEN];
        match session.seal(inner, &mut out, now) {
            Sealed::Datagram(len) => out.truncate(len),
            other @ (Sealed::NoSession | Sealed::Refused(_)) => bail!("cannot be sealed: {other:?}"),
        }
        Ok(out)
    }

    /// Whether packets can be sealed for this peer.
    #[must_use]
    pub fn is_live(&self, peer: &WgPublicKey, now: Timestamp) -> bool {
        self.sessions.get(peer).is_some_and(|session| session.established(now).is_some())
    }
}

/// Who is there: the attacker, its victim, and others.
#[derive(Debug, Clone, Copy)]
pub struct Stage {
    /// The attacker's instance that a rule lets speak to the victim.
    pub attacker: AddressPair,
    /// Another instance of the attacker's host, which no rule pairs with the victim's.
    pub accomplice: AddressPair,
    /// The victim: it listens on [`OPEN_TCP`], and on [`OPEN_UDP`].
    pub victim: AddressPair,
    /// Another instance of the victim's host, which no rule lets the attacker reach.
    pub neighbour: AddressPair,
    /// An instance of a third host, which may speak to the victim too.
    pub third: AddressPair,
    /// Addresses of the overlay that nobody has.
    pub nobody: AddressPair,
}

/// What the rules let the attacker reach of the victim by TCP.
pub const OPEN_TCP: u16 = 5_432;
/// What the rules let the attacker reach of the victim by UDP.
pub const OPEN_UDP: u16 = 53;
/// What the rules let the victim reach of the attacker by TCP.
pub const BACK_TCP: u16 = 8_080;

/// A packet that must not come through.
#[derive(Debug, Clone)]
pub struct Forgery {
    /// What it tries.
    pub name: String,
    /// The inner packet.
    pub packet: Vec<u8>,
    /// Why it is dropped.
    pub reason: DropReason,
}

struct List {
    v6: bool,
    all: Vec<Forgery>,
}

impl List {
    fn add(&mut self, name: impl std::fmt::Display, reason: DropReason, packet: Vec<u8>) {
        let family = if self.v6 { "v6" } else { "v4" };
        let name = format!("{family}: {name}");
        self.all.push(Forgery { name, packet, reason });
    }
}

/// Everything that the attacker may try in this family.
///
/// # Errors
/// Never.
pub fn forgeries(stage: &Stage, v6: bool) -> Result<Vec<Forgery>> {
    let mut list = List { v6, all: Vec::new() };
    let of = |pair: AddressPair| if v6 { IpAddr::from(pair.v6) } else { pair.v4.into() };
    let (from, to) = (of(stage.attacker), of(stage.victim));
    let hello = |from: IpAddr, to: IpAddr| ip(from, to, number::UDP, &udp((4_000, OPEN_UDP), b"forged"));
    for (name, source) in [
        ("the source of a third host", stage.third),
        ("the victim's own source", stage.victim),
        ("the source of the victim's neighbour", stage.neighbour),
        ("a source of its own that is paired with nobody here", stage.accomplice),
        ("a source that nobody has", stage.nobody),
    ] {
        list.add(name, DropReason::SourceNotPeer, hello(of(source), to));
    }
    for (name, destination, reason) in [
        ("to the victim's neighbour", stage.neighbour, DropReason::NoRule),
        ("through the victim to a third host", stage.third, DropReason::DestinationNotLocal),
        ("through the victim to nobody", stage.nobody, DropReason::DestinationNotLocal),
        ("back to itself", stage.attacker, DropReason::DestinationNotLocal),
    ] {
        list.add(name, reason, hello(from, of(destination)));
    }
    let open = ip(of(stage.third), to, number::TCP, &tcp((40_000, OPEN_TCP), SYN, 1, 0, b""));
    list.add("what a third host may do, in its name", DropReason::SourceNotPeer, open);
    addresses(&mut list, from, to)?;
    ports(&mut list, from, to);
    segments(&mut list, from, to);
    errors(&mut list, from, to, of(stage.third));
    shapes(&mut list, from, to);
    if v6 {
        headers(&mut list, from, to);
    } else {
        fragments(&mut list, from, to);
    }
    Ok(list.all)
}

/// Addresses that are nobody's, or the machine's own.
fn addresses(list: &mut List, from: IpAddr, to: IpAddr) -> Result<()> {
    let (bad, underlay): (&[&str], &[&str]) = if list.v6 {
        (
            &["::", "::1", "fe80::1", "ff02::1", "::ffff:10.77.1.0"],
            &["2001:db8::1", "::10.77.1.0"],
        )
    } else {
        (
            &["0.0.0.0", "0.0.0.1", "127.0.0.1", "169.254.0.1", "224.0.0.1", "255.255.255.255"],
            &["192.0.2.1", "10.77.0.0", "10.77.255.255"],
        )
    };
    let hello = |from: IpAddr, to: IpAddr| ip(from, to, number::UDP, &udp((4_000, OPEN_UDP), b"forged"));
    for text in bad {
        let address: IpAddr = text.parse()?;
        list.add(format!("from {text}"), DropReason::BadAddress, hello(address, to));
        list.add(format!("to {text}"), DropReason::BadAddress, hello(from, address));
    }
    for text in underlay {
        let address: IpAddr = text.parse()?;
        list.add(format!("from {text}"), DropReason::SourceNotPeer, hello(address, to));
        list.add(format!("to {text}"), DropReason::DestinationNotLocal, hello(from, address));
    }
    Ok(())
}

/// What no rule opens.
fn ports(list: &mut List, from: IpAddr, to: IpAddr) {
    for port in [0, 1, OPEN_TCP - 1, OPEN_TCP + 1, BACK_TCP, u16::MAX] {
        list.add(
            format!("SYN to {port}"),
            DropReason::NoRule,
            ip(from, to, number::TCP, &tcp((40_000, port), SYN, 1, 0, b"")),
        );
        list.add(
            format!("datagram to {port}"),
            DropReason::NoRule,
            ip(from, to, number::UDP, &udp((40_000, port), b"x")),
        );
    }
    list.add(
        "datagram to a TCP port",
        DropReason::NoRule,
        ip(from, to, number::UDP, &udp((40_000, OPEN_TCP), b"x")),
    );
    list.add(
        "SYN to a UDP port",
        DropReason::NoRule,
        ip(from, to, number::TCP, &tcp((40_000, OPEN_UDP), SYN, 1, 0, b"")),
    );
    list.add(
        "datagram from an open port",
        DropReason::NoRule,
        ip(from, to, number::UDP, &udp((OPEN_UDP, 40_000), b"x")),
    );
    list.add("echo", DropReason::NoRule, echo(from, to, true, 7));
    list.add("answer to no echo", DropReason::NoFlow, echo(from, to, false, 7));
    for protocol in [number::IP_IN_IP, 41, number::GRE, number::SCTP, 136, 255] {
        let reason = DropReason::Protocol;
        let inner = ip(to, from, number::TCP, &tcp((1, OPEN_TCP), SYN, 1, 0, b""));
        list.add(format!("protocol {protocol}"), reason, ip(from, to, protocol, &inner));
    }
}

/// TCP that does not begin with a SYN to an open port.
fn segments(list: &mut List, from: IpAddr, to: IpAddr) {
    let mut segment = |name: &str, reason, ports, flags| list.add(name, reason, ip(from, to, number::TCP, &tcp(ports, flags, 9, 9, b"")));
    segment("SYN-ACK out of the blue", DropReason::NoFlow, (40_000, OPEN_TCP), SYN | ACK);
    segment("SYN-ACK as if answering", DropReason::NoFlow, (BACK_TCP, 40_000), SYN | ACK);
    segment("SYN against a rule", DropReason::NoRule, (BACK_TCP, 40_000), SYN);
    for (name, flags) in [
        ("ACK", ACK),
        ("FIN", FIN | ACK),
        ("RST", RST),
        ("RST-ACK", RST | ACK),
        ("data", ACK | PSH),
    ] {
        segment(&format!("{name} to a closed port"), DropReason::NoRule, (40_000, 22), flags);
        segment(&format!("{name} from an open port"), DropReason::NoRule, (OPEN_TCP, 40_000), flags);
    }
    for (name, flags) in [
        ("NULL", 0),
        ("XMAS", FIN | PSH | URG),
        ("SYN-FIN", SYN | FIN),
        ("SYN-RST", SYN | RST),
        ("FIN alone", FIN),
    ] {
        segment(name, DropReason::Malformed, (40_000, OPEN_TCP), flags);
    }
}

/// Errors about packets that the victim did not send.
fn errors(list: &mut List, from: IpAddr, to: IpAddr, third: IpAddr) {
    let sent = |from: IpAddr, to: IpAddr| ip(from, to, number::UDP, &udp((OPEN_UDP, 4_999), b"never sent"));
    list.add("error about no flow", DropReason::Icmp, unreachable(from, to, &sent(to, from)));
    list.add(
        "error about a TCP flow that is not",
        DropReason::Icmp,
        unreachable(from, to, &ip(to, from, number::TCP, &tcp((OPEN_TCP, 9), ACK, 1, 1, b""))),
    );
    list.add(
        "error about another's flow",
        DropReason::Icmp,
        unreachable(from, to, &sent(to, third)),
    );
    list.add(
        "error about a packet to the victim",
        DropReason::Icmp,
        unreachable(from, to, &sent(from, to)),
    );
    list.add(
        "error about an error",
        DropReason::Icmp,
        unreachable(from, to, &unreachable(to, from, &sent(from, to))),
    );
    list.add(
        "error about a fragment of nothing",
        DropReason::Icmp,
        unreachable(from, to, &[0x45]),
    );
    let (protocol, kinds): (u8, &[u8]) = if list.v6 {
        (number::ICMPV6, &[130, 133, 134, 135, 136, 137, 143])
    } else {
        (number::ICMP, &[4, 5, 9, 10, 13, 17])
    };
    for kind in kinds {
        list.add(
            format!("ICMP type {kind}"),
            DropReason::Icmp,
            ip(from, to, protocol, &icmp(*kind, 0, 0, &sent(to, from))),
        );
    }
    let other = if list.v6 { number::ICMP } else { number::ICMPV6 };
    list.add(
        "ICMP of the other family",
        DropReason::Protocol,
        ip(from, to, other, &icmp(8, 0, 1, b"x")),
    );
}

/// Lengths that lie.
fn shapes(list: &mut List, from: IpAddr, to: IpAddr) {
    let good = ip(from, to, number::UDP, &udp((4_000, OPEN_UDP), b"forged"));
    let head = if list.v6 { 40 } else { 20 };
    for len in [head - 1, head, head + 7] {
        list.add(
            format!("only {len} bytes"),
            DropReason::Malformed,
            good.get(..len).unwrap_or_default().to_vec(),
        );
    }
    for version in [0u8, 5, 15] {
        list.add(
            format!("version {version}"),
            DropReason::Malformed,
            with(good.clone(), 0, &[version << 4 | 5]),
        );
    }
    list.add(
        "UDP longer than its packet",
        DropReason::Malformed,
        with(good.clone(), head + 4, &[0xff, 0xff]),
    );
    list.add(
        "UDP shorter than its header",
        DropReason::Malformed,
        with(good.clone(), head + 4, &[0, 7]),
    );
    list.add(
        "packet longer than its datagram",
        DropReason::Malformed,
        with(good.clone(), if list.v6 { 4 } else { 2 }, &[0x10, 0]),
    );
    let segment = ip(from, to, number::TCP, &tcp((40_000, OPEN_TCP), SYN, 1, 0, b""));
    list.add(
        "TCP header beyond its packet",
        DropReason::Malformed,
        with(segment.clone(), head + 12, &[0xf0]),
    );
    list.add(
        "TCP header shorter than a header",
        DropReason::Malformed,
        with(segment, head + 12, &[0x40]),
    );
}

/// IPv4: what hides ports from a filter (RFC 1858, RFC 3128).
fn fragments(list: &mut List, from: IpAddr, to: IpAddr) {
    let good = ip(from, to, number::TCP, &tcp((40_000, OPEN_TCP), SYN, 1, 0, &[0; 40]));
    for (name, offset, more) in [
        ("first", 0, true),
        ("second, over the ports", 1, false),
        ("last", 100, false),
        ("beyond 64 KiB", 0x1fff, true),
    ] {
        list.add(
            format!("fragment: {name}"),
            DropReason::Fragment,
            fragment(good.clone(), offset, more),
        );
    }
    list.add(
        "fragment: too small for its flags",
        DropReason::Fragment,
        fragment(ip(from, to, number::TCP, &[0; 8]), 0, true),
    );
    for ihl in [6u8, 15] {
        list.add(
            format!("options, header of {ihl} words"),
            DropReason::IpOptions,
            with(good.clone(), 0, &[0x40 | ihl]),
        );
    }
    list.add("header of 4 words", DropReason::Malformed, with(good, 0, &[0x44]));
}

/// IPv6: headers in front of the ports (RFC 7112, RFC 5722).
fn headers(list: &mut List, from: IpAddr, to: IpAddr) {
    let good = ip(from, to, number::TCP, &tcp((40_000, OPEN_TCP), SYN, 1, 0, b""));
    let empty: &[u8] = &[0, 0, 1, 4, 0, 0, 0, 0];
    for kind in [
        number::HOP_BY_HOP,
        number::ROUTING,
        number::DESTINATION,
        number::AH,
        number::ESP,
        135,
        139,
        140,
        253,
        254,
    ] {
        list.add(
            format!("header {kind}"),
            DropReason::ExtensionHeader,
            extended(&good, &[(kind, empty)]),
        );
        let chain = [(kind, empty), (number::FRAGMENT, empty), (number::ROUTING, empty)];
        list.add(format!("chain from {kind}"), DropReason::ExtensionHeader, extended(&good, &chain));
    }
    for (name, bytes) in [
        ("atomic", [0, 0, 0, 0, 0, 0, 0, 1]),
        ("first", [0, 0, 0, 1, 0, 0, 0, 1]),
        ("second", [0, 0, 0, 8, 0, 0, 0, 1]),
    ] {
        list.add(
            format!("fragment: {name}"),
            DropReason::Fragment,
            extended(&good, &[(number::FRAGMENT, &bytes)]),
        );
    }
    list.add("no next header", DropReason::Protocol, ip(from, to, number::NO_NEXT, &[0; 20]));
}
