//! What the parser accepts, what it refuses and why, and what is answered.

use proptest::prelude::*;

use super::build::{address, damaged, icmp, icmp_number, ip, packets, tcp, udp};
use super::checksum::Sum;
use super::*;
use crate::fuzz;

const FAMILIES: [bool; 2] = [false, true];

fn between(v6: bool, protocol: u8, payload: &[u8]) -> Vec<u8> {
    ip(address(v6, 1), address(v6, 2), protocol, payload)
}

#[test]
fn both_families_are_read_alike() -> Result<(), DropReason> {
    for v6 in FAMILIES {
        let packet = between(v6, 6, &tcp((40_000, 5_432), 0x18, 7, 9, b"select"));
        let parsed = parse(&packet)?;
        assert_eq!((parsed.src, parsed.dst), (address(v6, 1), address(v6, 2)));
        assert_eq!((parsed.len, parsed.l4_offset), (packet.len(), packet.len() - 26));
        let flags = TcpFlags::new(0x18);
        assert_eq!(
            parsed.transport,
            Transport::Tcp {
                src_port: 40_000,
                dst_port: 5_432,
                flags,
                seq: 7,
                ack: 9,
                payload_len: 6
            }
        );
        assert_eq!((parsed.ports(), parsed.protocol()), ((40_000, 5_432), Some(Protocol::Tcp)));

        let parsed = parse(&between(v6, 17, &udp((1, 53), b"?")))?;
        assert_eq!(parsed.transport, Transport::Udp { src_port: 1, dst_port: 53 });

        let request = if v6 { 128 } else { 8 };
        let parsed = parse(&between(v6, icmp_number(v6), &icmp(request, 0, 77, b"ping")))?;
        assert_eq!(parsed.transport, Transport::Echo { id: 77, request: true });
    }
    Ok(())
}

#[test]
fn only_beginnings_may_begin() -> Result<(), DropReason> {
    let opening = |protocol, payload: &[u8]| parse(&between(false, protocol, payload)).map(|parsed| parsed.opening());
    let segment = |flags| tcp((1, 2), flags, 0, 0, &[]);
    assert_eq!(opening(6, &segment(0x02))?, Opening::Opens);
    assert_eq!(opening(6, &segment(0x12))?, Opening::NeedsFlow);
    for flags in [0x10, 0x11, 0x04, 0x14, 0x18] {
        assert_eq!(opening(6, &segment(flags))?, Opening::Continues);
    }
    assert_eq!(opening(17, &udp((1, 2), &[]))?, Opening::Opens);
    assert_eq!(opening(1, &icmp(8, 0, 1, &[]))?, Opening::Opens);
    assert_eq!(opening(1, &icmp(0, 0, 1, &[]))?, Opening::NeedsFlow);
    Ok(())
}

#[test]
fn what_cannot_be_judged_is_refused_with_its_reason() {
    let good = |v6| between(v6, 17, &udp((1, 2), b"data"));
    let changed = |v6, at: usize, value: u8| {
        let mut packet = good(v6);
        packet[at] = value;
        parse(&packet)
    };
    assert_eq!(parse(&[]), Err(DropReason::Malformed));
    assert_eq!(changed(false, 0, 0x55), Err(DropReason::Malformed), "version 5");
    assert_eq!(changed(false, 0, 0x44), Err(DropReason::Malformed), "a header of 16 bytes");
    assert_eq!(changed(false, 0, 0x46), Err(DropReason::IpOptions));
    assert_eq!(changed(false, 3, 33), Err(DropReason::Malformed), "longer than the buffer");
    assert_eq!(changed(false, 3, 19), Err(DropReason::Malformed), "shorter than the header");
    assert_eq!(changed(false, 6, 0x20), Err(DropReason::Fragment), "the first of several");
    assert_eq!(changed(false, 7, 0x01), Err(DropReason::Fragment), "a later one");
    assert_eq!(changed(false, 9, 58), Err(DropReason::Protocol), "ICMPv6 in IPv4");
    assert_eq!(changed(true, 6, 1), Err(DropReason::Protocol), "ICMP in IPv6");
    assert_eq!(changed(true, 6, 44), Err(DropReason::Fragment));
    for extension in [0, 43, 50, 51, 60, 135, 139, 140, 253, 254] {
        assert_eq!(changed(true, 6, extension), Err(DropReason::ExtensionHeader));
    }
    assert_eq!(changed(true, 5, 13), Err(DropReason::Malformed), "longer than the buffer");
    assert_eq!(changed(true, 5, 11), Err(DropReason::Malformed), "UDP says 12");
    assert_eq!(changed(false, 25, 0), Err(DropReason::Malformed), "UDP says nothing");
}

#[test]
fn addresses_that_have_no_place_in_a_mesh_are_refused_on_either_side() {
    let bad = [
        "127.0.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "0.0.0.0",
        "169.254.1.1",
        "::1",
        "::",
        "ff02::1",
        "fe80::1",
        "::ffff:10.77.1.1",
    ];
    for text in bad {
        let Ok(bad) = text.parse::<IpAddr>() else { panic!("{text}") };
        let good = address(bad.is_ipv6(), 1);
        for (src, dst) in [(bad, good), (good, bad)] {
            assert_eq!(parse(&ip(src, dst, 17, &udp((1, 2), &[]))), Err(DropReason::BadAddress), "{text}");
        }
    }
}

#[test]
fn tcp_flags_that_no_stack_sends_are_refused() {
    for flags in 0..=0x3f_u8 {
        let (syn, fin, rst, ack) = (flags & 2 != 0, flags & 1 != 0, flags & 4 != 0, flags & 16 != 0);
        let sane = if syn { !(fin || rst) } else { ack || rst };
        let parsed = parse(&between(true, 6, &tcp((1, 2), flags, 0, 0, &[])));
        assert_eq!(parsed.is_ok(), sane, "{flags:#x}");
    }
}

#[test]
fn an_error_is_read_only_if_it_quotes_a_packet_between_the_same_two() -> Result<(), DropReason> {
    for v6 in FAMILIES {
        let (us, them, third) = (address(v6, 1), address(v6, 2), address(v6, 3));
        let unreachable = if v6 { 1 } else { 3 };
        let error = |quote: &[u8]| parse(&ip(them, us, icmp_number(v6), &icmp(unreachable, 1, 0, quote)));
        let sent = ip(us, them, 6, &tcp((40_000, 5_432), 0x02, 5, 0, &[]));
        let transport = QuotedTransport::Tcp {
            src_port: 40_000,
            dst_port: 5_432,
            seq: 5,
        };
        let quoted = Quoted {
            src: us,
            dst: them,
            transport,
        };
        let header = sent.len() - 20;
        for cut in [sent.len(), header + 8] {
            assert_eq!(
                error(&sent[..cut])?.transport,
                Transport::IcmpError {
                    kind: IcmpErrorKind::Unreachable,
                    quoted
                }
            );
        }
        assert_eq!(error(&sent[..header + 7]), Err(DropReason::Icmp), "ports, but not the eight bytes");
        assert_eq!(error(&[]), Err(DropReason::Icmp));
        let mut short = sent.clone();
        short[if v6 { 5 } else { 3 }] = if v6 { 7 } else { 27 };
        assert_eq!(error(&short), Err(DropReason::Icmp), "a packet that says it had no eight bytes");
        assert_eq!(
            error(&ip(us, third, 17, &udp((1, 2), &[]))),
            Err(DropReason::Icmp),
            "sent to another"
        );
        assert_eq!(
            error(&ip(third, them, 17, &udp((1, 2), &[]))),
            Err(DropReason::Icmp),
            "sent by another"
        );
        assert_eq!(
            error(&ip(us, them, icmp_number(v6), &icmp(unreachable, 1, 0, &sent))),
            Err(DropReason::Icmp),
            "an error about an error"
        );
        assert_eq!(
            error(&ip(us, them, 132, &[0; 20])),
            Err(DropReason::Icmp),
            "a protocol that never passes"
        );
    }
    Ok(())
}

#[test]
fn redirects_discovery_and_the_rest_of_icmp_are_refused() {
    for v6 in FAMILIES {
        let accepted: &[u8] = if v6 { &[1, 2, 3, 4, 128, 129] } else { &[0, 3, 8, 11] };
        let quote = ip(address(v6, 2), address(v6, 1), 17, &udp((1, 2), &[]));
        for kind in 0..=255 {
            let parsed = parse(&between(v6, icmp_number(v6), &icmp(kind, 0, 0, &quote)));
            assert_eq!(parsed.is_ok(), accepted.contains(&kind), "type {kind}");
        }
    }
}

#[test]
fn padding_behind_the_packet_is_not_part_of_it() -> Result<(), DropReason> {
    for v6 in FAMILIES {
        let mut packet = between(v6, 17, &udp((1, 2), b"x"));
        let len = packet.len();
        packet.resize(len + 15, 0);
        assert_eq!(parse(&packet)?.len, len);
    }
    Ok(())
}

#[test]
fn ecn_is_read_from_both_families() -> Result<(), DropReason> {
    let mut v4 = between(false, 17, &udp((1, 2), &[]));
    v4[1] = 0xfd;
    assert_eq!(parse(&v4)?.ecn, 1);
    let mut v6 = between(true, 17, &udp((1, 2), &[]));
    v6[1] = 0x2f;
    assert_eq!(parse(&v6)?.ecn, 2);
    Ok(())
}

#[test]
fn resets_answer_as_rfc_9293_says() -> Result<(), DropReason> {
    for v6 in FAMILIES {
        let answer = |flags, data: &[u8]| -> Result<Option<Transport>, DropReason> {
            let packet = between(v6, 6, &tcp((1, 2), flags, 100, 900, data));
            let mut out = [0; reply::MAX_LEN];
            match reply::denied(&packet, &parse(&packet)?, &mut out) {
                Some(len) => Ok(Some(parse(&out[..len])?.transport)),
                None => Ok(None),
            }
        };
        let expected = |bits, seq, ack| {
            Some(Transport::Tcp {
                src_port: 2,
                dst_port: 1,
                flags: TcpFlags::new(bits),
                seq,
                ack,
                payload_len: 0,
            })
        };
        assert_eq!(answer(0x02, &[])?, expected(0x14, 0, 101), "a SYN counts as one byte");
        assert_eq!(answer(0x02, b"fast open")?, expected(0x14, 0, 110));
        assert_eq!(answer(0x10, b"data")?, expected(0x04, 900, 0));
        assert_eq!(answer(0x11, &[])?, expected(0x04, 900, 0));
        assert_eq!(answer(0x04, &[])?, None, "never a reset to a reset");
        assert_eq!(answer(0x14, &[])?, None);
    }
    Ok(())
}

#[test]
fn errors_and_echo_replies_are_not_answered() -> Result<(), DropReason> {
    for v6 in FAMILIES {
        let quote = ip(address(v6, 2), address(v6, 1), 17, &udp((1, 2), &[]));
        let (unreachable, echo_reply) = if v6 { (1, 129) } else { (3, 0) };
        for message in [icmp(unreachable, 0, 0, &quote), icmp(echo_reply, 0, 1, &[])] {
            let packet = between(v6, icmp_number(v6), &message);
            assert_eq!(reply::denied(&packet, &parse(&packet)?, &mut [0; reply::MAX_LEN]), None);
        }
    }
    Ok(())
}

#[test]
fn a_prohibited_answer_quotes_as_much_as_its_family_allows() -> Result<(), DropReason> {
    for (v6, expected) in [(false, 576), (true, 1280)] {
        let packet = between(v6, 17, &udp((1, 2), &[7; 1300]));
        let mut out = [0; reply::MAX_LEN];
        let len = reply::denied(&packet, &parse(&packet)?, &mut out);
        assert_eq!(len, Some(expected));
        assert_eq!(
            reply::denied(&packet, &parse(&packet)?, &mut out[..expected - 1]),
            None,
            "never a cut answer"
        );
    }
    Ok(())
}

/// Whether all checksums of a packet made here are right, by the pseudo-header for TCP and ICMPv6.
fn checksums_are_right(packet: &[u8], parsed: &Parsed) -> bool {
    let v4 = parsed.src.is_ipv4();
    let message = &packet[parsed.l4_offset..parsed.len];
    let protocol = if v4 { packet[9] } else { packet[6] };
    let pseudo = match (v4, protocol) {
        (true, 1) => Sum::ZERO,
        _ => Sum::pseudo_header(parsed.src, parsed.dst, protocol, u32::try_from(message.len()).unwrap_or(0)),
    };
    let header = if v4 { Sum::ZERO.bytes(&packet[..20]).checksum() } else { 0 };
    header == 0 && pseudo.bytes(message).checksum() == 0
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn the_parser_agrees_with_a_second_one_on_damaged_packets(packet in damaged()) {
        fuzz::packet(&packet);
    }

    #[test]
    fn the_parser_agrees_with_a_second_one_on_any_bytes(mut bytes in prop::collection::vec(any::<u8>(), 0..128), version: Option<bool>) {
        if let (Some(first), Some(v6)) = (bytes.first_mut(), version) {
            *first = if v6 { 0x60 } else { 0x45 };
        }
        fuzz::packet(&bytes);
    }

    #[test]
    fn answers_go_back_to_the_sender_with_right_checksums(packet in packets()) {
        let Ok(parsed) = parse(&packet) else { return Ok(()) };
        let mut out = [0xaa; reply::MAX_LEN];
        let Some(len) = reply::denied(&packet, &parsed, &mut out) else { return Ok(()) };
        let answer = parse(&out[..len]).map_err(|reason| TestCaseError::fail(reason.to_string()))?;
        prop_assert_eq!((answer.src, answer.dst, answer.len), (parsed.dst, parsed.src, len));
        prop_assert!(checksums_are_right(&out[..len], &answer));
        let again = reply::denied(&out[..len], &answer, &mut [0; reply::MAX_LEN]);
        prop_assert_eq!(again, None, "an answer is never answered");
    }
}
