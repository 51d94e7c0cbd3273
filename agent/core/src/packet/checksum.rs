//! The Internet checksum (RFC 1071): a sum of 16-bit words in ones' complement, and the pseudo-headers of both families.
//!
//! Sums are kept as a `u64` of 32-bit words, wide enough for any packet (2^14 words of at most 2^32), and folded once at the end.

use std::net::IpAddr;

/// A sum under way. Only the last piece added may have an odd length, for it is padded with a zero byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[must_use]
pub struct Sum(u64);

impl Sum {
    /// The sum of nothing.
    pub const ZERO: Self = Self(0);

    /// The sum of the pseudo-header for a transport message of `len` bytes (RFC 9293 section 3.1, RFC 8200 section 8.1). Addresses of
    /// different families make no packet; they are summed all the same.
    pub fn pseudo_header(src: IpAddr, dst: IpAddr, protocol: u8, len: u32) -> Self {
        Self(u64::from(protocol) + u64::from(len)).address(src).address(dst)
    }

    /// This sum and that of `bytes`.
    pub fn bytes(self, bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<4>();
        let sum: u64 = words.iter().map(|word| u64::from(u32::from_be_bytes(*word))).sum();
        let mut last = [0; 4];
        for (to, from) in last.iter_mut().zip(rest) {
            *to = *from;
        }
        Self(self.0 + sum + u64::from(u32::from_be_bytes(last)))
    }

    /// The 16-bit sum, not inverted: what stands in the checksum field of a packet whose checksum the kernel is to finish.
    #[must_use]
    pub fn folded(self) -> u16 {
        let mut sum = self.0;
        while let Err(_overflow) = u16::try_from(sum) {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        u16::try_from(sum).unwrap_or(u16::MAX)
    }

    /// The checksum: the inverted 16-bit sum. Zero means a message with a right checksum, if its checksum was among what was added.
    #[must_use]
    pub fn checksum(self) -> u16 {
        !self.folded()
    }

    fn address(self, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => self.bytes(&v4.octets()),
            IpAddr::V6(v6) => self.bytes(&v6.octets()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 1071 section 1 word by word, without any cleverness.
    fn naive(bytes: &[u8]) -> u16 {
        let mut sum: u32 = 0;
        for pair in bytes.chunks(2) {
            let low = pair.get(1).copied().unwrap_or(0);
            sum += u32::from(u16::from_be_bytes([pair[0], low]));
            if sum > 0xffff {
                sum -= 0xffff;
            }
        }
        u16::try_from(sum).unwrap_or(0)
    }

    /// Ones' complement has two zeros.
    fn same(a: u16, b: u16) -> bool {
        a % 0xffff == b % 0xffff
    }

    #[test]
    fn the_example_of_rfc_1071_sums_to_ddf2() {
        assert_eq!(Sum::ZERO.bytes(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]).folded(), 0xddf2);
    }

    #[test]
    fn the_largest_packet_of_ones_does_not_overflow() {
        assert_eq!(Sum::ZERO.bytes(&[0xff; 65_536]).checksum(), 0);
    }

    proptest! {
        #[test]
        fn sums_equal_the_naive_sum_and_can_be_split_at_even_offsets(bytes: Vec<u8>, cut: usize) {
            let whole = Sum::ZERO.bytes(&bytes).folded();
            prop_assert!(same(whole, naive(&bytes)), "{whole:04x} {:04x}", naive(&bytes));
            let cut = if bytes.is_empty() { 0 } else { (cut % bytes.len()) & !1 };
            let (head, tail) = bytes.split_at(cut);
            prop_assert_eq!(Sum::ZERO.bytes(head).bytes(tail).folded(), whole);
        }
    }
}
