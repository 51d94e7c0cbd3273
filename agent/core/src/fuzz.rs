//! Bodies of fuzz targets, shared by discovery and by the replay of recorded inputs: each takes bytes and panics if a promise breaks.
//!
//! Compiled for tests and with the feature `fuzz` only, so that the second parser never ships.

use std::net::IpAddr;

use etherparse::{LaxNetSlice, LaxSlicedPacket, NetSlice, SlicedPacket, TransportSlice};

use cloison_proto::net::is_unicast_overlay;

use crate::flow::FlowKey;
use crate::packet::reply;
use crate::packet::{Direction, Parsed, Quoted, QuotedTransport, TcpFlags, Transport, parse};

/// Parses any bytes by our parser and by `etherparse`: both must accept the same packets and see the same in them. What is accepted has a
/// flow key that both directions share, and an answer that parses and is never answered itself.
///
/// # Panics
/// If one of these does not hold.
pub fn packet(bytes: &[u8]) {
    let ours = parse(bytes).ok();
    assert_eq!(
        ours.map(|parsed| Seen::of(&parsed)),
        second(bytes),
        "ours (left) and the second parser (right) disagree"
    );
    let Some(parsed) = ours else { return };
    assert!(
        parsed.l4_offset < parsed.len && parsed.len <= bytes.len(),
        "offsets within the packet"
    );
    let key = FlowKey::of(&parsed, Direction::Outbound);
    assert_eq!(
        key.mirrored(),
        FlowKey::of(&parsed, Direction::Inbound),
        "one flow, seen from its two ends"
    );

    let mut out = [0; reply::MAX_LEN];
    let Some(len) = reply::denied(bytes, &parsed, &mut out) else {
        return;
    };
    let answer = out.get(..len).map(parse);
    let Some(Ok(answer)) = answer else {
        panic!("our own answer does not parse: {answer:?}")
    };
    assert_eq!((answer.src, answer.dst), (parsed.dst, parsed.src));
    assert_eq!(
        FlowKey::of(&answer, Direction::Inbound),
        key,
        "the answer belongs to the flow of the packet"
    );
    assert_eq!(
        reply::denied(&out, &answer, &mut [0; reply::MAX_LEN]),
        None,
        "an answer is never answered"
    );
}

/// What both parsers can tell of a packet, in terms of neither.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    src: IpAddr,
    dst: IpAddr,
    ecn: u8,
    payload_len: usize,
    transport: SeenTransport,
}

#[derive(Debug, PartialEq, Eq)]
enum SeenTransport {
    Tcp {
        ports: (u16, u16),
        flags: u8,
        seq: u32,
        ack: u32,
        data: usize,
    },
    Udp {
        ports: (u16, u16),
    },
    Echo {
        id: u16,
        request: bool,
    },
    Error {
        quoted: Quoted,
    },
}

impl Seen {
    fn of(parsed: &Parsed) -> Self {
        let transport = match parsed.transport {
            Transport::Tcp {
                src_port,
                dst_port,
                flags,
                seq,
                ack,
                payload_len,
            } => SeenTransport::Tcp {
                ports: (src_port, dst_port),
                flags: known(flags),
                seq,
                ack,
                data: payload_len,
            },
            Transport::Udp { src_port, dst_port } => SeenTransport::Udp {
                ports: (src_port, dst_port),
            },
            Transport::Echo { id, request } => SeenTransport::Echo { id, request },
            Transport::IcmpError { quoted, .. } => SeenTransport::Error { quoted },
        };
        Self {
            src: parsed.src,
            dst: parsed.dst,
            ecn: parsed.ecn,
            payload_len: parsed.len - parsed.l4_offset,
            transport,
        }
    }
}

/// The flags that count here.
fn known(flags: TcpFlags) -> u8 {
    flag_bits(flags.syn(), flags.fin(), flags.rst(), flags.ack())
}

fn flag_bits(syn: bool, fin: bool, rst: bool, ack: bool) -> u8 {
    u8::from(syn) << 1 | u8::from(fin) | u8::from(rst) << 2 | u8::from(ack) << 4
}

/// What the second parser sees, if it is a packet that the project lets pass.
fn second(bytes: &[u8]) -> Option<Seen> {
    let sliced = SlicedPacket::from_ip(bytes).ok()?;
    let (src, dst, ecn, payload): (IpAddr, IpAddr, u8, &[u8]) = match sliced.net.as_ref()? {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            let plain = header.options().is_empty() && !header.is_fragmenting_payload() && [1, 6, 17].contains(&header.protocol().0);
            plain.then_some((
                header.source_addr().into(),
                header.destination_addr().into(),
                header.ecn().value(),
                ip.payload().payload,
            ))?
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header();
            // A payload length of zero would be a jumbogram for the second parser.
            let plain = [6, 17, 58].contains(&header.next_header().0) && header.payload_length() != 0;
            let ecn = header.traffic_class() & 3;
            plain.then_some((
                header.source_addr().into(),
                header.destination_addr().into(),
                ecn,
                ip.payload().payload,
            ))?
        }
        NetSlice::Arp(_) => return None,
    };
    if !is_unicast_overlay(src) || !is_unicast_overlay(dst) {
        return None;
    }
    let transport = second_transport(sliced.transport.as_ref()?, src, dst, payload.len())?;
    Some(Seen {
        src,
        dst,
        ecn,
        payload_len: payload.len(),
        transport,
    })
}

fn second_transport(transport: &TransportSlice<'_>, src: IpAddr, dst: IpAddr, payload_len: usize) -> Option<SeenTransport> {
    match transport {
        TransportSlice::Tcp(tcp) => {
            let sane = if tcp.syn() {
                !tcp.fin() && !tcp.rst()
            } else {
                tcp.ack() || tcp.rst()
            };
            sane.then(|| SeenTransport::Tcp {
                ports: (tcp.source_port(), tcp.destination_port()),
                flags: flag_bits(tcp.syn(), tcp.fin(), tcp.rst(), tcp.ack()),
                seq: tcp.sequence_number(),
                ack: tcp.acknowledgment_number(),
                data: tcp.payload().len(),
            })
        }
        TransportSlice::Udp(udp) => {
            let whole = usize::from(udp.length()) == payload_len;
            whole.then(|| SeenTransport::Udp {
                ports: (udp.source_port(), udp.destination_port()),
            })
        }
        TransportSlice::Icmpv4(icmp) => match (icmp.type_u8(), icmp.code_u8()) {
            (8 | 0, 0) => Some(echo(icmp.bytes5to8(), icmp.type_u8() == 8)),
            (3 | 11, _) => second_quote(icmp.payload(), src, dst),
            _ => None,
        },
        TransportSlice::Icmpv6(icmp) => match (icmp.type_u8(), icmp.code_u8()) {
            (128 | 129, 0) => Some(echo(icmp.bytes5to8(), icmp.type_u8() == 128)),
            (1..=4, _) => second_quote(icmp.payload(), src, dst),
            _ => None,
        },
        TransportSlice::Igmp(_) => None,
    }
}

fn echo([high, low, ..]: [u8; 4], request: bool) -> SeenTransport {
    SeenTransport::Echo {
        id: u16::from_be_bytes([high, low]),
        request,
    }
}

/// The packet that an error from `outer_src` to `outer_dst` quotes, cut short or not.
fn second_quote(quote: &[u8], outer_src: IpAddr, outer_dst: IpAddr) -> Option<SeenTransport> {
    let sliced = LaxSlicedPacket::from_ip(quote).ok()?;
    let (src, dst, protocol, declared, payload): (IpAddr, IpAddr, u8, u16, &[u8]) = match sliced.net.as_ref()? {
        LaxNetSlice::Ipv4(ip) => {
            let header = ip.header();
            let plain = header.options().is_empty() && !header.is_fragmenting_payload();
            let declared = header.total_len().checked_sub(20)?;
            plain.then_some((
                header.source_addr().into(),
                header.destination_addr().into(),
                header.protocol().0,
                declared,
                ip.payload().payload,
            ))?
        }
        LaxNetSlice::Ipv6(ip) => {
            let header = ip.header();
            (
                header.source_addr().into(),
                header.destination_addr().into(),
                header.next_header().0,
                header.payload_length(),
                ip.payload().payload,
            )
        }
        LaxNetSlice::Arp(_) => return None,
    };
    let &[b0, b1, b2, b3, b4, b5, b6, b7] = payload.first_chunk()?;
    let (src_port, dst_port) = (u16::from_be_bytes([b0, b1]), u16::from_be_bytes([b2, b3]));
    let id = u16::from_be_bytes([b4, b5]);
    let transport = match (protocol, src.is_ipv4(), b0, b1) {
        (6, ..) => QuotedTransport::Tcp {
            src_port,
            dst_port,
            seq: u32::from_be_bytes([b4, b5, b6, b7]),
        },
        (17, ..) => QuotedTransport::Udp { src_port, dst_port },
        (1, true, 8 | 0, 0) => QuotedTransport::Echo { id, request: b0 == 8 },
        (58, false, 128 | 129, 0) => QuotedTransport::Echo { id, request: b0 == 128 },
        _ => return None,
    };
    let matches = declared >= 8 && src == outer_dst && dst == outer_src;
    matches.then_some(SeenTransport::Error {
        quoted: Quoted { src, dst, transport },
    })
}
