//! What an entry covers, and when it is forgotten.

use super::*;
use crate::packet::build::address;

const HERE: Direction = Direction::Outbound;
const THERE: Direction = Direction::Inbound;

fn entry(kind: FlowKind, opener: Opener) -> Entry {
    let key = FlowKey {
        local: address(false, 1),
        remote: address(false, 2),
        kind,
        local_port: 1,
        remote_port: 2,
    };
    Entry::new(key, opener, grant(7, 100), at(1_000))
}

fn grant(stamp: u64, valid_until: u64) -> Grant {
    Grant {
        rule: 3,
        pair: InstancePair { local: 4, remote: 5 },
        stamp,
        valid_until: MeshTime(valid_until),
    }
}

fn at(second: u64) -> Timestamp {
    Timestamp(0) + Duration::from_secs(second)
}

fn segment(flags: u8) -> Transport {
    Transport::Tcp {
        src_port: 1,
        dst_port: 2,
        flags: TcpFlags::new(flags),
        seq: 0,
        ack: 0,
        payload_len: 0,
    }
}

/// How long the flow lives without packets, in seconds, after these packets at second 1,000.
fn lives(mut entry: Entry, packets: &[(Direction, Transport)]) -> u64 {
    for (direction, transport) in packets {
        entry.note(*direction, transport, at(1_000));
    }
    (0..).find(|span| entry.is_idle(at(1_000 + span))).unwrap_or(0)
}

#[test]
fn an_entry_takes_80_bytes() {
    // 65,536 of these, their index and the counts of the quotas fit 8 MiB; the table's own test adds them up.
    assert_eq!(size_of::<Entry>(), 80);
}

#[test]
fn an_entry_gives_back_what_it_was_made_of() {
    for opener in [Opener::Here, Opener::There] {
        for kind in [FlowKind::Tcp, FlowKind::Udp, FlowKind::EchoFromHere, FlowKind::EchoFromThere] {
            let entry = entry(kind, opener);
            assert_eq!((entry.opener(), entry.key().kind, entry.grant()), (opener, kind, grant(7, 100)));
            assert_eq!(
                (entry.last_seen(), entry.replied(), entry.local_ack(), entry.local_syn()),
                (at(1_000), false, None, None)
            );
        }
    }
}

#[test]
fn flows_live_as_long_as_their_kind_says() {
    let datagram = Transport::Udp { src_port: 1, dst_port: 2 };
    let request = Transport::Echo { id: 1, request: true };
    assert_eq!(
        lives(entry(FlowKind::Tcp, Opener::Here), &[(HERE, segment(0x02)), (THERE, segment(0x12))]),
        300
    );
    assert_eq!(lives(entry(FlowKind::Udp, Opener::Here), &[(HERE, datagram)]), 30);
    assert_eq!(
        lives(entry(FlowKind::Udp, Opener::Here), &[(HERE, datagram), (THERE, datagram)]),
        180
    );
    assert_eq!(
        lives(entry(FlowKind::Udp, Opener::There), &[(THERE, datagram), (THERE, datagram)]),
        30,
        "no answer yet"
    );
    assert_eq!(lives(entry(FlowKind::EchoFromHere, Opener::Here), &[(HERE, request)]), 30);
}

#[test]
fn closed_connections_are_soon_forgotten_and_ports_can_be_used_again() {
    let tcp = || entry(FlowKind::Tcp, Opener::Here);
    assert_eq!(lives(tcp(), &[(HERE, segment(0x11))]), 300, "half closed");
    assert_eq!(lives(tcp(), &[(HERE, segment(0x11)), (THERE, segment(0x11))]), 10);
    assert_eq!(lives(tcp(), &[(THERE, segment(0x14))]), 10);
    assert_eq!(
        lives(tcp(), &[(THERE, segment(0x14)), (HERE, segment(0x02))]),
        300,
        "a new connection"
    );
}

#[test]
fn a_reset_that_the_local_socket_ignores_does_not_end_a_flow() {
    let sent = |ack| Transport::Tcp {
        src_port: 1,
        dst_port: 2,
        flags: TcpFlags::ACK,
        seq: 0,
        ack,
        payload_len: 0,
    };
    let reset = |seq| Transport::Tcp {
        src_port: 2,
        dst_port: 1,
        flags: TcpFlags::RST,
        seq,
        ack: 0,
        payload_len: 0,
    };
    let tcp = || entry(FlowKind::Tcp, Opener::Here);
    assert_eq!(lives(tcp(), &[(HERE, sent(77)), (THERE, reset(78))]), 300);
    assert_eq!(lives(tcp(), &[(HERE, sent(77)), (THERE, reset(77))]), 10);
}

#[test]
fn errors_about_a_flow_do_not_keep_it_alive() {
    let mut flow = entry(FlowKind::Tcp, Opener::Here);
    let transport = crate::packet::QuotedTransport::Tcp {
        src_port: 1,
        dst_port: 2,
        seq: 0,
    };
    let quoted = crate::packet::Quoted {
        src: address(false, 1),
        dst: address(false, 2),
        transport,
    };
    let before = flow;
    flow.note(
        THERE,
        &Transport::IcmpError {
            kind: crate::packet::IcmpErrorKind::Unreachable,
            quoted,
        },
        at(1_200),
    );
    assert_eq!(flow, before);
}

#[test]
fn an_older_clock_of_another_worker_does_not_age_a_flow() {
    let mut flow = entry(FlowKind::Tcp, Opener::Here);
    flow.note(HERE, &segment(0x10), at(2_000));
    flow.note(HERE, &segment(0x10), at(1_500));
    assert_eq!(flow.last_seen(), at(2_000));
}

#[test]
fn a_syn_is_covered_in_the_openers_direction_only() {
    for opener in [Opener::Here, Opener::There] {
        let flow = entry(FlowKind::Tcp, opener);
        let (forward, back) = (opener.direction(), opener.direction().reversed());
        assert_eq!(Opener::by(forward), opener);
        assert_eq!(flow.covers(forward, &segment(0x02)), Coverage::Covered);
        assert_eq!(flow.covers(back, &segment(0x02)), Coverage::NeedsRule);
        assert_eq!(flow.covers(forward, &segment(0x12)), Coverage::Refused);
        assert_eq!(flow.covers(back, &segment(0x12)), Coverage::Covered);
        for flags in [0x10, 0x11, 0x04, 0x18] {
            assert_eq!(flow.covers(forward, &segment(flags)), Coverage::Covered);
            assert_eq!(flow.covers(back, &segment(flags)), Coverage::Covered);
        }
    }
}

#[test]
fn a_verdict_is_current_for_its_view_and_its_time() {
    let flow = entry(FlowKind::Udp, Opener::Here);
    let moment = |stamp, mesh| Moment {
        now: at(0),
        mesh: MeshTime(mesh),
        stamp,
    };
    assert!(flow.is_current(&moment(7, 99)));
    assert!(!flow.is_current(&moment(7, 100)), "past its time");
    assert!(!flow.is_current(&moment(8, 99)), "of an older view");
    assert!(!flow.is_current(&moment(6, 99)), "of a view that this worker does not know yet");
    let mut renewed = flow;
    renewed.regrant(grant(8, 200));
    assert!(renewed.is_current(&moment(8, 199)));
}
