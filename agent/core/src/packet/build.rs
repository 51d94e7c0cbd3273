//! Packets for tests: built byte by byte, without the code under test, and strategies that draw them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

/// Instance number `n`'s address of either family.
pub(crate) fn address(v6: bool, n: u8) -> IpAddr {
    if v6 {
        Ipv6Addr::new(0xfd12, 0x3456, 0x789a, 0, 0, 0, 1, u16::from(n)).into()
    } else {
        Ipv4Addr::new(10, 77, 1, n).into()
    }
}

/// An IP packet with this payload; IPv4 with DF and without checksum, which no parser here verifies.
pub(crate) fn ip(src: IpAddr, dst: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let len = u16::try_from(20 + payload.len()).unwrap_or(u16::MAX).to_be_bytes();
            let mut header = vec![0x45, 0x00, len[0], len[1], 0, 0, 0x40, 0, 64, protocol, 0, 0];
            header.extend(src.octets());
            header.extend(dst.octets());
            header
        }
        (src, dst) => {
            let len = u16::try_from(payload.len()).unwrap_or(u16::MAX).to_be_bytes();
            let mut header = vec![0x60, 0x00, 0, 0, len[0], len[1], protocol, 64];
            for address in [src, dst] {
                header.extend(match address {
                    IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                    IpAddr::V6(v6) => v6.octets(),
                });
            }
            header
        }
    };
    packet.extend(payload);
    packet
}

/// A TCP segment.
pub(crate) fn tcp(ports: (u16, u16), flags: u8, seq: u32, ack: u32, data: &[u8]) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend(ports.0.to_be_bytes());
    segment.extend(ports.1.to_be_bytes());
    segment.extend(seq.to_be_bytes());
    segment.extend(ack.to_be_bytes());
    segment.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(data);
    segment
}

/// A UDP datagram.
pub(crate) fn udp(ports: (u16, u16), data: &[u8]) -> Vec<u8> {
    let mut datagram = Vec::new();
    datagram.extend(ports.0.to_be_bytes());
    datagram.extend(ports.1.to_be_bytes());
    datagram.extend(u16::try_from(8 + data.len()).unwrap_or(0).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(data);
    datagram
}

/// An ICMP message of either family.
pub(crate) fn icmp(kind: u8, code: u8, id: u16, rest: &[u8]) -> Vec<u8> {
    let mut message = vec![kind, code, 0, 0];
    message.extend(id.to_be_bytes());
    message.extend([0, 1]);
    message.extend(rest);
    message
}

/// Upper protocol number of ICMP in a family.
pub(crate) fn icmp_number(v6: bool) -> u8 {
    if v6 { 58 } else { 1 }
}

/// Packets that are good but for the protocol details drawn: TCP, UDP, echo and errors of both families, with any data.
pub(crate) fn packets() -> impl Strategy<Value = Vec<u8>> {
    let data = prop::collection::vec(any::<u8>(), 0..64);
    (any::<bool>(), 0u8..4, any::<(u16, u16, u32, u32)>(), 0u8..64, 0u8..12, data).prop_map(
        |(v6, kind, (from, to, seq, ack), flags, icmp_kind, data)| {
            let (src, dst) = (address(v6, 1), address(v6, 2));
            let (protocol, payload) = match kind {
                0 => (6, tcp((from, to), flags, seq, ack, &data)),
                1 => (17, udp((from, to), &data)),
                2 => (
                    icmp_number(v6),
                    icmp(if v6 { 128 + (icmp_kind & 1) } else { icmp_kind & 8 }, 0, from, &data),
                ),
                _ => {
                    let quoted = ip(dst, src, 17, &udp((to, from), &data));
                    (icmp_number(v6), icmp(icmp_kind, flags & 15, 0, &quoted))
                }
            };
            ip(src, dst, protocol, &payload)
        },
    )
}

/// Values that mean something in one field or another: versions and header lengths, flags of fragments, protocols, types, small lengths.
const TELLING: [u8; 24] = [
    0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 17, 0x20, 40, 43, 44, 0x40, 0x44, 0x46, 51, 58, 60, 0x60, 128, 0xff,
];

/// Packets as [`packets`] draws them, with up to three bytes changed, mostly in headers and by values that mean something there, and with
/// the end cut off or padded: what a parser must stand.
pub(crate) fn damaged() -> impl Strategy<Value = Vec<u8>> {
    #[derive(Debug, Clone)]
    enum Damage {
        Set(usize, u8),
        Flip(usize, u8),
        Add(usize, u8),
    }
    let at = || prop_oneof![4 => 0usize..10, 2 => 20usize..40, 3 => 40usize..60, 1 => 0usize..140];
    let damage = prop_oneof![
        (at(), prop::sample::select(&TELLING[..])).prop_map(|(at, value)| Damage::Set(at, value)),
        (at(), 0u8..8).prop_map(|(at, bit)| Damage::Flip(at, 1 << bit)),
        (at(), prop_oneof![Just(1), Just(255), Just(4), Just(252)]).prop_map(|(at, by)| Damage::Add(at, by)),
    ];
    (
        packets(),
        prop::collection::vec(damage, 0..4),
        prop_oneof![3 => Just(0i8), 1 => -8i8..8],
    )
        .prop_map(|(mut packet, damages, grow)| {
            for damage in damages {
                let (Damage::Set(at, _) | Damage::Flip(at, _) | Damage::Add(at, _)) = damage;
                if let Some(byte) = packet.get_mut(at) {
                    *byte = match damage {
                        Damage::Set(_, value) => value,
                        Damage::Flip(_, bit) => *byte ^ bit,
                        Damage::Add(_, by) => byte.wrapping_add(by),
                    };
                }
            }
            let by = usize::from(grow.unsigned_abs());
            let len = if grow < 0 {
                packet.len().saturating_sub(by)
            } else {
                packet.len() + by
            };
            packet.resize(len, 0);
            packet
        })
}
