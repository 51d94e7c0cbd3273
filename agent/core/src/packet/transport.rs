//! TCP and UDP headers: ports, and of TCP what opening, answering and cutting a flow need.

use std::fmt;

use cloison_proto::verdict::DropReason;

use super::Transport;

/// Length in bytes of a TCP header without options.
pub(super) const TCP_HEADER_LEN: usize = 20;

/// The control bits of a TCP header (RFC 9293 section 3.1).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct TcpFlags(u8);

impl TcpFlags {
    /// No more data from the sender.
    pub const FIN: Self = Self(0x01);
    /// Synchronise sequence numbers: the connection begins.
    pub const SYN: Self = Self(0x02);
    /// The connection ends at once.
    pub const RST: Self = Self(0x04);
    /// The acknowledgment number counts.
    pub const ACK: Self = Self(0x10);

    /// The flags as they stand in the header.
    #[must_use]
    pub const fn new(bits: u8) -> Self {
        Self(bits)
    }

    /// The flags as they stand in the header.
    #[must_use]
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// These flags and those.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether FIN is set.
    #[must_use]
    pub const fn fin(self) -> bool {
        self.has(Self::FIN)
    }

    /// Whether SYN is set.
    #[must_use]
    pub const fn syn(self) -> bool {
        self.has(Self::SYN)
    }

    /// Whether RST is set.
    #[must_use]
    pub const fn rst(self) -> bool {
        self.has(Self::RST)
    }

    /// Whether ACK is set.
    #[must_use]
    pub const fn ack(self) -> bool {
        self.has(Self::ACK)
    }

    const fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Whether a TCP may send such a segment: SYN never with FIN or RST, and one of SYN, ACK and RST always (RFC 9293 section 3.10.7).
    const fn make_sense(self) -> bool {
        if self.syn() {
            !self.fin() && !self.rst()
        } else {
            self.ack() || self.rst()
        }
    }
}

impl fmt::Debug for TcpFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [(self.syn(), "SYN"), (self.fin(), "FIN"), (self.rst(), "RST"), (self.ack(), "ACK")];
        f.debug_set()
            .entries(names.iter().filter(|(set, _)| *set).map(|(_, name)| name))
            .finish()
    }
}

/// Reads a TCP segment that fills `segment`.
pub(super) fn tcp(segment: &[u8]) -> Result<Transport, DropReason> {
    let Some(&[s0, s1, d0, d1, q0, q1, q2, q3, a0, a1, a2, a3, offset, flags, _, _, _, _, _, _]) = segment.first_chunk() else {
        return Err(DropReason::Malformed);
    };
    let header_len = usize::from(offset >> 4) * 4;
    let flags = TcpFlags(flags);
    let payload_len = segment.len().checked_sub(header_len).ok_or(DropReason::Malformed)?;
    if header_len < TCP_HEADER_LEN || !flags.make_sense() {
        return Err(DropReason::Malformed);
    }
    Ok(Transport::Tcp {
        src_port: u16::from_be_bytes([s0, s1]),
        dst_port: u16::from_be_bytes([d0, d1]),
        flags,
        seq: u32::from_be_bytes([q0, q1, q2, q3]),
        ack: u32::from_be_bytes([a0, a1, a2, a3]),
        payload_len,
    })
}

/// Reads a UDP datagram that fills `datagram`: its own length must say the same as the IP header's.
pub(super) fn udp(datagram: &[u8]) -> Result<Transport, DropReason> {
    let Some(&[s0, s1, d0, d1, l0, l1, _, _]) = datagram.first_chunk() else {
        return Err(DropReason::Malformed);
    };
    if usize::from(u16::from_be_bytes([l0, l1])) != datagram.len() {
        return Err(DropReason::Malformed);
    }
    Ok(Transport::Udp {
        src_port: u16::from_be_bytes([s0, s1]),
        dst_port: u16::from_be_bytes([d0, d1]),
    })
}
