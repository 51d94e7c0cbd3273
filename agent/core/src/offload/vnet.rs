//! The header that a TUN with `IFF_VNET_HDR` puts before each packet (`struct virtio_net_hdr`, virtio 1.2 section 5.1.6).
//!
//! TUNs are opened without offloads, so that every header is empty: one whole packet with its checksums in place. The type stands in the
//! engine's interface from the first day, so that super-packets can come without changing it; until then a header that asks for anything
//! is refused.

/// What is still to be done to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VnetHeader {
    flags: u8,
    gso_type: u8,
}

/// `VIRTIO_NET_HDR_F_DATA_VALID`: the checksums are in place, and were verified.
const DATA_VALID: u8 = 2;

impl VnetHeader {
    /// One whole packet: nothing is left to do.
    pub const WHOLE: Self = Self { flags: 0, gso_type: 0 };

    /// Length of the header in bytes.
    pub const LEN: usize = 10;

    /// Reads the header before a packet; `None` if there are fewer bytes.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let [flags, gso_type, ..] = *bytes.first_chunk::<{ Self::LEN }>()?;
        Some(Self { flags, gso_type })
    }

    /// Whether the packet is whole and its checksums are in place. That somebody has verified them already changes nothing.
    #[must_use]
    pub const fn is_whole(self) -> bool {
        self.gso_type == 0 && self.flags & !DATA_VALID == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_that_asks_for_nothing_means_a_whole_packet() {
        assert_eq!(VnetHeader::parse(&[0; 10]), Some(VnetHeader::WHOLE));
        assert!(VnetHeader::parse(&[2, 0, 0, 0, 0, 0, 0, 0, 0, 0]).is_some_and(VnetHeader::is_whole));
        assert!(VnetHeader::parse(&[0; 9]).is_none());
        assert!(VnetHeader::parse(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]).is_some_and(|header| !header.is_whole()));
        assert!(VnetHeader::parse(&[0, 1, 0, 0, 0, 0, 0, 0, 0, 0]).is_some_and(|header| !header.is_whole()));
    }
}
