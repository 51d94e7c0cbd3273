//! Inner packets: one parser for both families, and the answers that are made here.
//!
//! Data passes: bytes -> [`ipv4`] or [`ipv6`] (addresses, lengths, upper protocol) -> one path for both: address rules -> [`transport`]
//! or [`icmp`] -> [`Parsed`]. The parser is total and allocates nothing; what it does not understand it refuses with the one
//! [`DropReason`] that says why (I8). It is run against a second parser on random and on recorded bytes (`fuzz.rs`).
//!
//! What it does not do: verify checksums (the receiving kernel does, and a TUN hands over partial ones), reassemble fragments (ports
//! cannot be known, so they are refused: RFC 1858), or decide anything about rules.

pub mod checksum;
mod icmp;
mod ipv4;
mod ipv6;
pub mod reply;
mod transport;

use std::net::IpAddr;

use cloison_proto::net::{Protocol, is_unicast_overlay};
use cloison_proto::verdict::DropReason;

pub use icmp::{IcmpErrorKind, Quoted, QuotedTransport};
pub use transport::TcpFlags;

/// Which way a packet goes, seen from this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// From a local instance's TUN to the mesh.
    Outbound,
    /// From the mesh to a local instance's TUN.
    Inbound,
}

impl Direction {
    /// The other way.
    #[must_use]
    pub const fn reversed(self) -> Self {
        match self {
            Self::Outbound => Self::Inbound,
            Self::Inbound => Self::Outbound,
        }
    }
}

/// What the data plane must know about a packet to judge it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parsed {
    /// Source address, usable inside the mesh.
    pub src: IpAddr,
    /// Destination address, usable inside the mesh, of the same family.
    pub dst: IpAddr,
    /// What the packet carries.
    pub transport: Transport,
    /// Length of the packet in bytes as its IP header tells it; what follows in the buffer is padding, to be cut off by the caller.
    pub len: usize,
    /// Offset in bytes of the transport header.
    pub l4_offset: usize,
    /// The two ECN bits (RFC 3168 section 5).
    pub ecn: u8,
}

/// What a packet carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// A TCP segment (RFC 9293 section 3.1) whose flags make sense.
    Tcp {
        /// Source port.
        src_port: u16,
        /// Destination port.
        dst_port: u16,
        /// Control bits.
        flags: TcpFlags,
        /// Sequence number.
        seq: u32,
        /// Acknowledgment number; it counts only if the flag is set.
        ack: u32,
        /// Bytes of data behind the header.
        payload_len: usize,
    },
    /// A UDP datagram (RFC 768).
    Udp {
        /// Source port.
        src_port: u16,
        /// Destination port.
        dst_port: u16,
    },
    /// An ICMP or ICMPv6 echo message.
    Echo {
        /// The identifier, chosen by the one who requests.
        id: u16,
        /// Request or reply.
        request: bool,
    },
    /// An ICMP or ICMPv6 error about a packet that went from `dst` to `src` of this one.
    IcmpError {
        /// What went wrong.
        kind: IcmpErrorKind,
        /// The packet that the error is about.
        quoted: Quoted,
    },
}

/// What a packet that belongs to no flow may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opening {
    /// A TCP SYN, a UDP datagram, an echo request: a rule in its direction may allow it, and a flow begins.
    Opens,
    /// A TCP segment without SYN: a rule in its direction lets it and a flow continue; a rule in reverse lets it alone pass.
    Continues,
    /// A SYN-ACK, an echo reply, an ICMP error: never without a flow.
    NeedsFlow,
}

impl Parsed {
    /// The protocol that a rule must grant; `None` for an ICMP error, which no rule grants.
    #[must_use]
    pub const fn protocol(&self) -> Option<Protocol> {
        match self.transport {
            Transport::Tcp { .. } => Some(Protocol::Tcp),
            Transport::Udp { .. } => Some(Protocol::Udp),
            Transport::Echo { .. } => Some(Protocol::Icmp),
            Transport::IcmpError { .. } => None,
        }
    }

    /// Source and destination port; zero where the protocol has none.
    #[must_use]
    pub const fn ports(&self) -> (u16, u16) {
        match self.transport {
            Transport::Tcp { src_port, dst_port, .. } | Transport::Udp { src_port, dst_port } => (src_port, dst_port),
            Transport::Echo { .. } | Transport::IcmpError { .. } => (0, 0),
        }
    }

    /// What the packet may ask for when it belongs to no flow.
    #[must_use]
    pub const fn opening(&self) -> Opening {
        match self.transport {
            Transport::Tcp { flags, .. } => match (flags.syn(), flags.ack()) {
                (true, false) => Opening::Opens,
                (true, true) => Opening::NeedsFlow,
                (false, _) => Opening::Continues,
            },
            Transport::Udp { .. } | Transport::Echo { request: true, .. } => Opening::Opens,
            Transport::Echo { request: false, .. } | Transport::IcmpError { .. } => Opening::NeedsFlow,
        }
    }
}

/// Parses one inner packet of either family. Bytes behind the length that the IP header tells are ignored (WireGuard pads: paper
/// section 5.4.6); see [`Parsed::len`].
///
/// # Errors
/// The reason for which such a packet is dropped: `Malformed`, `IpOptions`, `ExtensionHeader`, `Fragment`, `BadAddress`, `Protocol`, `Icmp`.
pub fn parse(packet: &[u8]) -> Result<Parsed, DropReason> {
    let network = network(packet)?;
    if !is_unicast_overlay(network.src) || !is_unicast_overlay(network.dst) {
        return Err(DropReason::BadAddress);
    }
    let payload = packet.get(network.l4_offset..network.len).ok_or(DropReason::Malformed)?;
    let transport = match network.upper {
        Upper::Tcp => transport::tcp(payload)?,
        Upper::Udp => transport::udp(payload)?,
        Upper::Icmp => icmp::parse(&network, payload)?,
        Upper::Other => return Err(DropReason::Protocol),
    };
    let Network {
        src,
        dst,
        len,
        l4_offset,
        ecn,
        ..
    } = network;
    Ok(Parsed {
        src,
        dst,
        transport,
        len,
        l4_offset,
        ecn,
    })
}

/// What the IP header says, before anything is known about the rest of the buffer.
#[derive(Debug, Clone, Copy)]
struct Network {
    src: IpAddr,
    dst: IpAddr,
    upper: Upper,
    /// Length of the whole packet in bytes; at least `l4_offset`, and perhaps more than there is.
    len: usize,
    l4_offset: usize,
    ecn: u8,
}

/// The upper protocol, ICMP being that of the packet's own family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Upper {
    Tcp,
    Udp,
    Icmp,
    Other,
}

/// Reads the IP header of either family.
fn network(packet: &[u8]) -> Result<Network, DropReason> {
    match packet.first().map(|byte| byte >> 4) {
        Some(4) => ipv4::header(packet),
        Some(6) => ipv6::header(packet),
        _ => Err(DropReason::Malformed),
    }
}

/// Numbers of the upper protocols (IANA, Assigned Internet Protocol Numbers).
mod number {
    pub(super) const ICMP: u8 = 1;
    pub(super) const TCP: u8 = 6;
    pub(super) const UDP: u8 = 17;
    pub(super) const ICMPV6: u8 = 58;
}

#[cfg(test)]
pub(crate) mod build;

#[cfg(test)]
mod tests;
