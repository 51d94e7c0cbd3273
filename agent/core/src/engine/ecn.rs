//! Congestion marks across the session (RFC 6040): the inner bits are copied out, and a mark that the underlay made is copied in.

/// The two bits: not capable of marks.
const NOT_ECT: u8 = 0;
/// The two bits: congestion experienced.
pub(super) const CE: u8 = 3;

/// Marks a parsed packet, if its transport understands marks.
pub(super) fn mark(packet: &mut [u8]) {
    match packet {
        [first, tos, rest @ ..] if *first >> 4 == 4 && *tos & CE != NOT_ECT => {
            let added = CE & !*tos;
            *tos |= CE;
            if let Some(checksum) = rest.get_mut(8..10).and_then(|field| field.first_chunk_mut::<2>()) {
                // RFC 1624, equation 3; the word's lower byte grew by `added`.
                let (sum, carry) = (!u16::from_be_bytes(*checksum)).overflowing_add(u16::from(added));
                *checksum = (!sum.wrapping_add(u16::from(carry))).to_be_bytes();
            }
        }
        [first, second, ..] if *first >> 4 == 6 && *second >> 4 & CE != NOT_ECT => *second |= CE << 4,
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::build::{address, ip, udp};
    use crate::packet::checksum::Sum;
    use crate::packet::parse;

    fn with_tos(v6: bool, ecn: u8) -> Vec<u8> {
        let mut packet = ip(address(v6, 1), address(v6, 2), 17, &udp((1, 2), &[9; 30]));
        if let Some(byte) = packet.get_mut(1) {
            *byte = if v6 { ecn << 4 } else { 0x40 | ecn };
        }
        if let Some(header) = (!v6).then(|| packet.split_at_mut(20).0) {
            let checksum = Sum::ZERO.bytes(header).checksum().to_be_bytes();
            header[10..12].copy_from_slice(&checksum);
        }
        packet
    }

    #[test]
    fn a_mark_is_copied_in_where_it_is_understood() {
        for v6 in [false, true] {
            for (before, after) in [(0, 0), (1, CE), (2, CE), (CE, CE)] {
                let mut packet = with_tos(v6, before);
                mark(&mut packet);
                assert_eq!(parse(&packet).map(|parsed| parsed.ecn), Ok(after), "v6: {v6}, {before}");
                let sum = (!v6).then(|| Sum::ZERO.bytes(&packet[..20]).checksum());
                assert_eq!(sum.unwrap_or(0), 0, "the checksum holds");
            }
        }
    }
}
