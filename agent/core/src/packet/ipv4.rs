//! The IPv4 header (RFC 791 section 3.1): no options, no fragments, lengths that hold together.

use std::net::Ipv4Addr;

use cloison_proto::verdict::DropReason;

use super::{Network, Upper, number};

/// Length in bytes of a header without options.
pub(super) const HEADER_LEN: usize = 20;

/// More fragments, and the fragment offset; the flag DF and the reserved one do not matter.
const FRAGMENT_MASK: u16 = 0x3fff;

/// Reads the header; that the buffer holds `len` bytes is for the caller to check.
pub(super) fn header(packet: &[u8]) -> Result<Network, DropReason> {
    let Some(
        &[
            version_ihl,
            tos,
            l0,
            l1,
            _,
            _,
            f0,
            f1,
            _,
            protocol,
            _,
            _,
            s0,
            s1,
            s2,
            s3,
            d0,
            d1,
            d2,
            d3,
        ],
    ) = packet.first_chunk()
    else {
        return Err(DropReason::Malformed);
    };
    let header_len = usize::from(version_ihl & 0x0f) * 4;
    let len = usize::from(u16::from_be_bytes([l0, l1]));
    if header_len < HEADER_LEN || len < header_len {
        return Err(DropReason::Malformed);
    }
    if header_len > HEADER_LEN {
        return Err(DropReason::IpOptions);
    }
    if u16::from_be_bytes([f0, f1]) & FRAGMENT_MASK != 0 {
        return Err(DropReason::Fragment);
    }
    let upper = match protocol {
        number::TCP => Upper::Tcp,
        number::UDP => Upper::Udp,
        number::ICMP => Upper::Icmp,
        _ => Upper::Other,
    };
    Ok(Network {
        src: Ipv4Addr::new(s0, s1, s2, s3).into(),
        dst: Ipv4Addr::new(d0, d1, d2, d3).into(),
        upper,
        len,
        l4_offset: HEADER_LEN,
        ecn: tos & 0x03,
    })
}
