//! Inner packets, built byte by byte and without the code under test. No checksums: neither the agent nor a test's receiver looks at them.

use std::net::IpAddr;

/// TCP's control bits (RFC 9293 section 3.1).
pub mod flags {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronises sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Resets.
    pub const RST: u8 = 0x04;
    /// Pushes.
    pub const PSH: u8 = 0x08;
    /// The acknowledgment number counts.
    pub const ACK: u8 = 0x10;
    /// The urgent pointer counts.
    pub const URG: u8 = 0x20;
}

/// Numbers of protocols and of IPv6 extension headers (IANA, Assigned Internet Protocol Numbers).
pub mod number {
    /// IPv6 hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// IPv4 in something.
    pub const IP_IN_IP: u8 = 4;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// IPv6 routing header.
    pub const ROUTING: u8 = 43;
    /// IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// GRE.
    pub const GRE: u8 = 47;
    /// Encapsulating security payload.
    pub const ESP: u8 = 50;
    /// Authentication header.
    pub const AH: u8 = 51;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    /// Nothing follows.
    pub const NO_NEXT: u8 = 59;
    /// IPv6 destination options.
    pub const DESTINATION: u8 = 60;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

/// An IP packet with this payload; IPv4 with DF. An IPv4 address beside an IPv6 one is mapped.
#[must_use]
pub fn ip(src: IpAddr, dst: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let [high, low] = length(payload.len() + 20);
            let head = [0x45, 0, high, low, 0, 0, 0x40, 0, 64, protocol, 0, 0];
            [&head[..], &src.octets(), &dst.octets(), payload].concat()
        }
        (src, dst) => {
            let [high, low] = length(payload.len());
            let octets = |address| match address {
                IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                IpAddr::V6(v6) => v6.octets(),
            };
            let head = [0x60, 0, 0, 0, high, low, protocol, 64];
            [&head[..], &octets(src), &octets(dst), payload].concat()
        }
    }
}

/// A TCP segment from and to these ports.
#[must_use]
pub fn tcp(ports: (u16, u16), flags: u8, seq: u32, ack: u32, data: &[u8]) -> Vec<u8> {
    let (from, to) = (ports.0.to_be_bytes(), ports.1.to_be_bytes());
    let tail = [0x50, flags, 0xff, 0xff, 0, 0, 0, 0];
    [&from[..], &to, &seq.to_be_bytes(), &ack.to_be_bytes(), &tail, data].concat()
}

/// A UDP datagram from and to these ports.
#[must_use]
pub fn udp(ports: (u16, u16), data: &[u8]) -> Vec<u8> {
    let (from, to) = (ports.0.to_be_bytes(), ports.1.to_be_bytes());
    [&from[..], &to, &length(data.len() + 8), &[0, 0], data].concat()
}

/// An ICMP message of either family; `id` stands where echo has its identifier.
#[must_use]
pub fn icmp(kind: u8, code: u8, id: u16, rest: &[u8]) -> Vec<u8> {
    [&[kind, code, 0, 0][..], &id.to_be_bytes(), &[0, 1], rest].concat()
}

/// An echo message in a packet.
#[must_use]
pub fn echo(src: IpAddr, dst: IpAddr, request: bool, id: u16) -> Vec<u8> {
    let (protocol, kind) = match (src.is_ipv6(), request) {
        (false, true) => (number::ICMP, 8),
        (false, false) => (number::ICMP, 0),
        (true, true) => (number::ICMPV6, 128),
        (true, false) => (number::ICMPV6, 129),
    };
    ip(src, dst, protocol, &icmp(kind, 0, id, b"echo"))
}

/// "Port unreachable" about the packet `quoted`.
#[must_use]
pub fn unreachable(src: IpAddr, dst: IpAddr, quoted: &[u8]) -> Vec<u8> {
    match src {
        IpAddr::V4(_) => ip(src, dst, number::ICMP, &icmp(3, 3, 0, quoted)),
        IpAddr::V6(_) => ip(src, dst, number::ICMPV6, &icmp(1, 4, 0, quoted)),
    }
}

/// The IPv4 packet as a fragment at `offset` (in units of eight bytes), perhaps with more behind it.
#[must_use]
pub fn fragment(mut packet: Vec<u8>, offset: u16, more: bool) -> Vec<u8> {
    let field = (offset & 0x1fff) | if more { 0x2000 } else { 0 };
    replace(&mut packet, 6, &field.to_be_bytes());
    packet
}

/// The IPv6 packet with extension headers in front of its payload: the number and the bytes of each, of which the first is overwritten.
#[must_use]
pub fn extended(packet: &[u8], headers: &[(u8, &[u8])]) -> Vec<u8> {
    let (head, payload) = packet.split_at(packet.len().min(40));
    let (mut head, mut chain) = (head.to_vec(), Vec::new());
    let upper = head.get(6).copied().unwrap_or(number::NO_NEXT);
    let mut following: Vec<u8> = headers.iter().skip(1).map(|(number, _)| *number).collect();
    following.push(upper);
    for ((_, bytes), next) in headers.iter().zip(following) {
        let start = chain.len();
        chain.extend_from_slice(bytes);
        replace(&mut chain, start, &[next]);
    }
    chain.extend_from_slice(payload);
    replace(&mut head, 4, &length(chain.len()));
    replace(&mut head, 6, &[headers.first().map_or(upper, |(number, _)| *number)]);
    [head, chain].concat()
}

/// The packet with bytes of it overwritten; what lies beyond its end is not written.
#[must_use]
pub fn with(mut packet: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    replace(&mut packet, at, bytes);
    packet
}

fn replace(packet: &mut [u8], at: usize, bytes: &[u8]) {
    for (to, from) in packet.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}

/// A length field; what does not fit is the largest there is.
fn length(bytes: usize) -> [u8; 2] {
    u16::try_from(bytes).unwrap_or(u16::MAX).to_be_bytes()
}
