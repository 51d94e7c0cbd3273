//! Who is asked whose a socket is: the second check of what the kernel's own filter has let through.
//!
//! Components may share a TUN; which socket may use which of their addresses is enforced outside, by the kernel. A witness looks at the
//! sockets themselves when a TCP stream begins and when a datagram arrives, and its "no" drops the packet as `not_owner`. The engine asks it
//! behind the verdict of the filter and before a flow begins or anything is counted as delivered (I1, I8).
//!
//! The witness belongs to the shell, and so does everything that it looks at; the core itself still reads no socket (I7). It is asked while
//! a peer is locked, so it must not wait.

use crate::TunId;
use crate::packet::{Direction, Opening, Parsed, Transport};

/// Knows whose the sockets of this host are.
pub trait Witness: Send {
    /// Begins a batch: whether anything is to be asked in it. What changes at the witness before an install is known to each batch behind it.
    fn begin(&mut self) -> bool;

    /// Whether anything passes this TUN at all: what the second check stands behind may be gone for a moment.
    fn is_open(&self, tun: TunId) -> bool;

    /// Whether the socket that sent this packet, which `tun` gave us, is its source's.
    fn is_senders(&mut self, tun: TunId, packet: &Parsed) -> bool;

    /// Whether the socket that would get this packet from `tun` is its destination's, or there is none.
    fn is_receivers(&mut self, tun: TunId, packet: &Parsed) -> bool;
}

/// Whether a packet is worth the question. A TCP stream is the business of the socket that began it, and of the one that listened; a
/// datagram may be for another socket than the one before.
pub(crate) const fn is_asked_about(packet: &Parsed, direction: Direction) -> bool {
    match (packet.transport, direction) {
        (Transport::Tcp { .. }, _) => matches!(packet.opening(), Opening::Opens),
        (Transport::Udp { .. }, Direction::Inbound) => true,
        (Transport::Udp { .. } | Transport::Echo { .. } | Transport::IcmpError { .. }, _) => false,
    }
}
