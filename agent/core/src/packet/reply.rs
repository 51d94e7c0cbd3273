//! Answers that this host gives in the name of a destination, so that applications fail fast: TCP RST and ICMP admin-prohibited.
//!
//! Each function writes one whole packet into the caller's buffer, back to the sender of the packet in question, and returns its length.
//! A RST and an ICMP error are never answered (RFC 9293 section 3.5.2, RFC 1122 section 3.2.2, RFC 4443 section 2.4), nor is an echo
//! reply. How many answers are given is for the caller to limit.

use std::net::IpAddr;

use super::checksum::Sum;
use super::transport::TCP_HEADER_LEN;
use super::{Parsed, TcpFlags, Transport, icmp, ipv4, ipv6, number};

/// The longest answer in bytes: an ICMPv6 error fills at most the minimum MTU (RFC 4443 section 2.4).
pub const MAX_LEN: usize = 1280;

/// The longest ICMPv4 error in bytes (RFC 1812 section 4.3.2.3).
const MAX_LEN_V4: usize = 576;

/// Time to live of what is made here: the common default of the kernel.
const HOP_LIMIT: u8 = 64;

/// Answers a denied packet: a RST to a TCP segment, admin-prohibited to a datagram or an echo request. `packet` is the buffer that
/// `parsed` was read from. `None` if such a packet is not to be answered, or `out` is shorter than [`MAX_LEN`] and too short.
pub fn denied(packet: &[u8], parsed: &Parsed, out: &mut [u8]) -> Option<usize> {
    match parsed.transport {
        Transport::Tcp { .. } => reset(parsed, out),
        Transport::Udp { .. } | Transport::Echo { request: true, .. } => prohibited(packet, parsed, out),
        Transport::Echo { request: false, .. } | Transport::IcmpError { .. } => None,
    }
}

/// Answers a TCP segment by a RST that its sender accepts in every state (RFC 9293 section 3.5.2): with the sequence number that the
/// segment acknowledges, or, if it acknowledges nothing, by acknowledging all of it.
pub fn reset(parsed: &Parsed, out: &mut [u8]) -> Option<usize> {
    let Transport::Tcp {
        src_port,
        dst_port,
        flags,
        seq,
        ack,
        payload_len,
    } = parsed.transport
    else {
        return None;
    };
    if flags.rst() {
        return None;
    }
    let (seq, ack) = if flags.ack() {
        (ack, None)
    } else {
        let occupied = u32::try_from(payload_len).ok()? + u32::from(flags.syn()) + u32::from(flags.fin());
        (0, Some(seq.wrapping_add(occupied)))
    };
    Reset {
        src: parsed.dst,
        dst: parsed.src,
        src_port: dst_port,
        dst_port: src_port,
        seq,
        ack,
    }
    .write(out)
}

/// Answers a packet by an ICMP error that says it is administratively prohibited (v4 type 3 code 13, RFC 1812 section 5.2.7.1; v6 type 1
/// code 1, RFC 4443 section 3.1), quoting as much of it as the family allows.
pub fn prohibited(packet: &[u8], parsed: &Parsed, out: &mut [u8]) -> Option<usize> {
    if matches!(parsed.transport, Transport::IcmpError { .. }) {
        return None;
    }
    let v4 = parsed.src.is_ipv4();
    let (ip_len, max_len, kind, code, protocol) = match v4 {
        true => (ipv4::HEADER_LEN, MAX_LEN_V4, 3, 13, number::ICMP),
        false => (ipv6::HEADER_LEN, MAX_LEN, 1, 1, number::ICMPV6),
    };
    let packet = packet.get(..parsed.len)?;
    let quote = packet.get(..max_len - ip_len - icmp::HEADER_LEN).unwrap_or(packet);
    let message_len = icmp::HEADER_LEN + quote.len();
    let pseudo = match v4 {
        true => Sum::ZERO,
        false => Sum::pseudo_header(parsed.dst, parsed.src, protocol, u32::try_from(message_len).ok()?),
    };
    let [c0, c1] = pseudo.bytes(&[kind, code]).bytes(quote).checksum().to_be_bytes();
    let body = write_ip(parsed.dst, parsed.src, protocol, message_len, out)?;
    let (header, rest) = body.split_first_chunk_mut::<8>()?;
    *header = [kind, code, c0, c1, 0, 0, 0, 0];
    rest.copy_from_slice(quote);
    Some(ip_len + message_len)
}

/// A TCP segment that ends a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reset {
    /// Who seems to send it.
    pub src: IpAddr,
    /// Whose socket it is for.
    pub dst: IpAddr,
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// Sequence number: what the socket expects next, to the byte (RFC 5961 section 3.2).
    pub seq: u32,
    /// Acknowledgment number, if the segment has one.
    pub ack: Option<u32>,
}

impl Reset {
    /// Writes the segment; its length in bytes, or `None` if `out` is too short or the addresses are of different families.
    pub fn write(&self, out: &mut [u8]) -> Option<usize> {
        let Self {
            src,
            dst,
            src_port,
            dst_port,
            seq,
            ack,
        } = *self;
        let flags = if ack.is_some() {
            TcpFlags::RST.with(TcpFlags::ACK)
        } else {
            TcpFlags::RST
        };
        let [s0, s1] = src_port.to_be_bytes();
        let [d0, d1] = dst_port.to_be_bytes();
        let [q0, q1, q2, q3] = seq.to_be_bytes();
        let [a0, a1, a2, a3] = ack.unwrap_or(0).to_be_bytes();
        // Offset of five words, no window, no urgent pointer.
        let mut segment = [
            s0,
            s1,
            d0,
            d1,
            q0,
            q1,
            q2,
            q3,
            a0,
            a1,
            a2,
            a3,
            5 << 4,
            flags.bits(),
            0,
            0,
            0,
            0,
            0,
            0,
        ];
        let [c0, c1] = Sum::pseudo_header(src, dst, number::TCP, 20)
            .bytes(&segment)
            .checksum()
            .to_be_bytes();
        segment[16] = c0;
        segment[17] = c1;
        let body = write_ip(src, dst, number::TCP, TCP_HEADER_LEN, out)?;
        body.copy_from_slice(&segment);
        Some(if src.is_ipv4() { ipv4::HEADER_LEN } else { ipv6::HEADER_LEN } + TCP_HEADER_LEN)
    }
}

/// Writes an IP header for a payload of `payload_len` bytes; the place for the payload.
fn write_ip(src: IpAddr, dst: IpAddr, protocol: u8, payload_len: usize, out: &mut [u8]) -> Option<&mut [u8]> {
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let (header, body) = out.split_first_chunk_mut::<{ ipv4::HEADER_LEN }>()?;
            let [l0, l1] = u16::try_from(ipv4::HEADER_LEN + payload_len).ok()?.to_be_bytes();
            let [s0, s1, s2, s3] = src.octets();
            let [d0, d1, d2, d3] = dst.octets();
            // No identification: it is never fragmented (DF, RFC 6864 section 4.1).
            *header = [
                0x45, 0, l0, l1, 0, 0, 0x40, 0, HOP_LIMIT, protocol, 0, 0, s0, s1, s2, s3, d0, d1, d2, d3,
            ];
            let [c0, c1] = Sum::ZERO.bytes(header).checksum().to_be_bytes();
            header[10] = c0;
            header[11] = c1;
            body.get_mut(..payload_len)
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let (fixed, rest) = out.split_first_chunk_mut::<8>()?;
            let (to_src, rest) = rest.split_first_chunk_mut::<16>()?;
            let (to_dst, body) = rest.split_first_chunk_mut::<16>()?;
            let [l0, l1] = u16::try_from(payload_len).ok()?.to_be_bytes();
            *fixed = [0x60, 0, 0, 0, l0, l1, protocol, HOP_LIMIT];
            *to_src = src.octets();
            *to_dst = dst.octets();
            body.get_mut(..payload_len)
        }
        _ => None,
    }
}
