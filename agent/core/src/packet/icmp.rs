//! ICMP (RFC 792) and ICMPv6 (RFC 4443): echo, and errors that quote the packet they are about.
//!
//! An error is only ever believed for the flow that it quotes: from the very address that the quoted packet went to, to the very address
//! that it came from. The parser checks that the two headers agree; that such a flow lives is for the flow table to know. Redirects,
//! router and neighbour discovery, and everything else have no place inside the mesh.

use std::net::IpAddr;

use cloison_proto::verdict::DropReason;

use super::{Network, Transport, Upper, network};

/// Length in bytes of an ICMP header.
pub(super) const HEADER_LEN: usize = 8;

/// What an ICMP error says, for both families.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IcmpErrorKind {
    /// Destination unreachable (v4 type 3, v6 type 1).
    Unreachable,
    /// Packet too big (v4 type 3 code 4, v6 type 2).
    TooBig,
    /// Time exceeded (v4 type 11, v6 type 3).
    TimeExceeded,
    /// Parameter problem (v6 type 4).
    ParameterProblem,
}

/// The packet that an ICMP error is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Quoted {
    /// Its source: the destination of the error.
    pub src: IpAddr,
    /// Its destination: the source of the error.
    pub dst: IpAddr,
    /// What it carried.
    pub transport: QuotedTransport,
}

/// What the quoted packet carried, as far as the first eight bytes tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QuotedTransport {
    /// A TCP segment.
    Tcp {
        /// Source port.
        src_port: u16,
        /// Destination port.
        dst_port: u16,
        /// Sequence number.
        seq: u32,
    },
    /// A UDP datagram.
    Udp {
        /// Source port.
        src_port: u16,
        /// Destination port.
        dst_port: u16,
    },
    /// An echo message.
    Echo {
        /// The identifier.
        id: u16,
        /// Request or reply.
        request: bool,
    },
}

/// Types and codes of one family, put in common terms.
enum Meaning {
    Echo { request: bool },
    Error(IcmpErrorKind),
    Other,
}

/// Reads the ICMP message `message` of a packet with the header `outer`.
pub(super) fn parse(outer: &Network, message: &[u8]) -> Result<Transport, DropReason> {
    let Some((&[kind, code, _, _, i0, i1, _, _], quote)) = message.split_first_chunk::<HEADER_LEN>() else {
        return Err(DropReason::Malformed);
    };
    match meaning(outer.src.is_ipv4(), kind, code) {
        Meaning::Echo { request } => Ok(Transport::Echo {
            id: u16::from_be_bytes([i0, i1]),
            request,
        }),
        Meaning::Error(kind) => {
            let quoted = quoted(quote).ok_or(DropReason::Icmp)?;
            if quoted.src != outer.dst || quoted.dst != outer.src {
                return Err(DropReason::Icmp);
            }
            Ok(Transport::IcmpError { kind, quoted })
        }
        Meaning::Other => Err(DropReason::Icmp),
    }
}

fn meaning(v4: bool, kind: u8, code: u8) -> Meaning {
    match (v4, kind, code) {
        (true, 8, 0) | (false, 128, 0) => Meaning::Echo { request: true },
        (true, 0, 0) | (false, 129, 0) => Meaning::Echo { request: false },
        (true, 3, 4) | (false, 2, _) => Meaning::Error(IcmpErrorKind::TooBig),
        (true, 3, _) | (false, 1, _) => Meaning::Error(IcmpErrorKind::Unreachable),
        (true, 11, _) | (false, 3, _) => Meaning::Error(IcmpErrorKind::TimeExceeded),
        (false, 4, _) => Meaning::Error(IcmpErrorKind::ParameterProblem),
        _ => Meaning::Other,
    }
}

/// Reads the packet that an error quotes; it may be cut short behind the first eight bytes of its payload (RFC 792). What could not have
/// passed here (options, fragments, another protocol, an error) is not a quote of ours.
fn quoted(quote: &[u8]) -> Option<Quoted> {
    let inner = network(quote).ok()?;
    let start = quote.get(inner.l4_offset..)?;
    let &[b0, b1, b2, b3, b4, b5, b6, b7] = start.first_chunk::<8>()?;
    if inner.len < inner.l4_offset + 8 {
        return None;
    }
    let src_port = u16::from_be_bytes([b0, b1]);
    let dst_port = u16::from_be_bytes([b2, b3]);
    let transport = match inner.upper {
        Upper::Tcp => QuotedTransport::Tcp {
            src_port,
            dst_port,
            seq: u32::from_be_bytes([b4, b5, b6, b7]),
        },
        Upper::Udp => QuotedTransport::Udp { src_port, dst_port },
        Upper::Icmp => match meaning(inner.src.is_ipv4(), b0, b1) {
            Meaning::Echo { request } => QuotedTransport::Echo {
                id: u16::from_be_bytes([b4, b5]),
                request,
            },
            Meaning::Error(_) | Meaning::Other => return None,
        },
        Upper::Other => return None,
    };
    Some(Quoted {
        src: inner.src,
        dst: inner.dst,
        transport,
    })
}
