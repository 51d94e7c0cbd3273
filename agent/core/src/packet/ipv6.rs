//! The IPv6 header (RFC 8200 section 3): no extension headers, whose lengths have misled filters before, and no jumbograms.

use std::net::Ipv6Addr;

use cloison_proto::verdict::DropReason;

use super::{Network, Upper, number};

/// Length in bytes of the fixed header.
pub(super) const HEADER_LEN: usize = 40;

/// The fragment header (RFC 8200 section 4.5).
const FRAGMENT: u8 = 44;

/// Extension headers other than the fragment header (IANA, IPv6 Extension Header Types): hop-by-hop, routing, ESP, AH, destination
/// options, mobility, HIP, shim6, and the two for experiments.
const EXTENSIONS: [u8; 10] = [0, 43, 50, 51, 60, 135, 139, 140, 253, 254];

/// Reads the header; that the buffer holds `len` bytes is for the caller to check.
pub(super) fn header(packet: &[u8]) -> Result<Network, DropReason> {
    let Some((&[v0, v1, _, _, l0, l1, next_header, _], rest)) = packet.split_first_chunk() else {
        return Err(DropReason::Malformed);
    };
    let Some((&src, rest)) = rest.split_first_chunk::<16>() else {
        return Err(DropReason::Malformed);
    };
    let Some(&dst) = rest.first_chunk::<16>() else {
        return Err(DropReason::Malformed);
    };
    let upper = match next_header {
        number::TCP => Upper::Tcp,
        number::UDP => Upper::Udp,
        number::ICMPV6 => Upper::Icmp,
        FRAGMENT => return Err(DropReason::Fragment),
        other if EXTENSIONS.contains(&other) => return Err(DropReason::ExtensionHeader),
        _ => Upper::Other,
    };
    // The traffic class straddles the first two bytes; its last two bits are ECN.
    let traffic_class = (v0 << 4) | (v1 >> 4);
    Ok(Network {
        src: Ipv6Addr::from(src).into(),
        dst: Ipv6Addr::from(dst).into(),
        upper,
        len: HEADER_LEN + usize::from(u16::from_be_bytes([l0, l1])),
        l4_offset: HEADER_LEN,
        ecn: traffic_class & 0x03,
    })
}
