//! What passes, what is denied, and by which way.

use std::net::SocketAddr;
use std::time::Duration;

use cloison_proto::verdict::DropReason;

use super::lab::*;
use super::with_both_sessions;
use crate::TunId;
use crate::packet::build::{icmp, icmp_number, ip, tcp, udp};
use crate::packet::{Direction, Transport, parse};
use crate::wg::LocalKey;

with_both_sessions! {
    what_a_rule_allows_passes_in_both_families
    the_answer_passes_and_nothing_else_does
    a_denied_segment_is_answered_by_a_reset_at_once
    a_denied_datagram_is_answered_by_prohibited
    answers_to_denials_are_limited
    a_destination_on_this_host_takes_no_session
    echo_passes_by_its_own_rule
    an_icmp_error_passes_only_about_a_live_flow
    a_forged_source_stays_here
    nothing_passes_without_a_view
    an_endpoint_roams_with_authentic_data
    a_peer_that_cannot_be_reached_times_out
    a_session_lives_on_through_its_rekeys
}

fn what_a_rule_allows_passes_in_both_families<K: LocalKey>() -> Outcome {
    for v6 in [false, true] {
        let mut lab = Lab::<K>::new()?;
        let packet = segment(v6, true, SYN, 500, 0)?;
        lab.send("n8n", packet.clone());
        assert_eq!(lab.hosts[APP].engine.waiting(), 1, "it waits for the handshake");
        lab.carry();
        assert_eq!(lab.take_delivered(DB), [(tun("postgres"), packet)]);
        lab.open_stream(v6)?;
        lab.check_balance();
        assert_eq!(lab.hosts[APP].engine.waiting(), 0);
    }
    Ok(())
}

fn the_answer_passes_and_nothing_else_does<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    lab.send("n8n", datagram(false, "n8n", "postgres", (4_000, 53))?);
    lab.carry();
    assert_eq!(lab.take_delivered(DB).len(), 1);
    lab.send("postgres", datagram(false, "postgres", "n8n", (53, 4_000))?);
    lab.carry();
    assert_eq!(lab.take_delivered(APP).len(), 1, "the answer");
    for ports in [(53, 4_001), (54, 4_000)] {
        lab.send("postgres", datagram(false, "postgres", "n8n", ports)?);
    }
    lab.send(
        "postgres",
        ip(at("postgres", false)?, at("n8n", false)?, 6, &tcp((53, 4_000), SYN, 1, 0, b"")),
    );
    lab.carry();
    assert!(lab.take_delivered(APP).is_empty());
    assert_eq!(lab.dropped(DB, Direction::Outbound, DropReason::NoRule), 3);
    lab.check_balance();
    Ok(())
}

fn a_denied_segment_is_answered_by_a_reset_at_once<K: LocalKey>() -> Outcome {
    for v6 in [false, true] {
        let mut lab = Lab::<K>::new()?;
        lab.send(
            "n8n",
            ip(at("n8n", v6)?, at("postgres", v6)?, 6, &tcp((40_000, 22), SYN, 500, 0, b"")),
        );
        assert!(lab.wire.is_empty(), "nothing leaves");
        let answers = lab.take_delivered(APP);
        let [(to, answer)] = &*answers else {
            return Err("one answer".into());
        };
        let answer = parse(answer).map_err(DropReason::as_str)?;
        assert_eq!((*to, answer.src, answer.dst), (tun("n8n"), at("postgres", v6)?, at("n8n", v6)?));
        assert!(matches!(answer.transport, Transport::Tcp { flags, seq: 0, ack: 501, .. } if flags.rst()));
        lab.check_balance();
    }
    Ok(())
}

fn a_denied_datagram_is_answered_by_prohibited<K: LocalKey>() -> Outcome {
    for v6 in [false, true] {
        let mut lab = Lab::<K>::new()?;
        lab.send("runner", datagram(v6, "runner", "postgres", (4_000, 53))?);
        let answers = lab.take_delivered(APP);
        let [(to, answer)] = &*answers else {
            return Err("one answer".into());
        };
        assert_eq!(*to, tun("runner"));
        assert!(
            matches!(parse(answer).map_err(DropReason::as_str)?.transport, Transport::IcmpError { quoted, .. } if quoted.dst == at("postgres", v6)?)
        );
        assert_eq!(lab.dropped(APP, Direction::Outbound, DropReason::NoRule), 1);
        let denied = lab.hosts[APP].denials.first().map(|d| (d.source, d.destination, d.port, d.reason));
        assert_eq!(denied, Some((at("runner", v6)?, at("postgres", v6)?, 53, DropReason::NoRule)));
    }
    Ok(())
}

fn answers_to_denials_are_limited<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    for _ in 0..1_500 {
        lab.send("runner", datagram(false, "runner", "postgres", (4_000, 53))?);
    }
    lab.send("n8n", datagram(false, "n8n", "postgres", (4_000, 54))?);
    assert_eq!(lab.take_delivered(APP).len(), 1_001, "another instance has its own budget");
    assert_eq!(lab.dropped(APP, Direction::Outbound, DropReason::NoRule), 1_501);
    lab.check_balance();
    Ok(())
}

fn a_destination_on_this_host_takes_no_session<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    lab.install(APP, &Policy::only(&[("n8n", "runner", "udp/7")]))?;
    let packet = datagram(true, "n8n", "runner", (1, 7))?;
    lab.send("n8n", packet.clone());
    assert!(lab.wire.is_empty());
    assert_eq!(lab.take_delivered(APP), [(tun("runner"), packet)]);
    let answer = datagram(true, "runner", "n8n", (7, 1))?;
    lab.send("runner", answer.clone());
    assert_eq!(lab.take_delivered(APP), [(tun("n8n"), answer)]);
    lab.send("runner", datagram(true, "runner", "n8n", (8, 1))?);
    let answers = lab.take_delivered(APP);
    assert!(matches!(&*answers, [(TunId(2), _)]), "denied, and told so: {answers:?}");
    assert_eq!(lab.hosts[APP].engine.flows().len(), 2, "one for each end");
    lab.check_balance();
    Ok(())
}

fn echo_passes_by_its_own_rule<K: LocalKey>() -> Outcome {
    for v6 in [false, true] {
        let mut lab = Lab::<K>::new()?;
        let (request, reply) = if v6 { (128, 129) } else { (8, 0) };
        let echo = |from, to, kind| Ok::<_, Failure>(ip(at(from, v6)?, at(to, v6)?, icmp_number(v6), &icmp(kind, 0, 9, b"x")));
        lab.send("n8n", echo("n8n", "postgres", request)?);
        lab.carry();
        lab.send("postgres", echo("postgres", "n8n", reply)?);
        lab.carry();
        assert_eq!((lab.take_delivered(DB).len(), lab.take_delivered(APP).len()), (1, 1));
        lab.send("postgres", echo("postgres", "n8n", request)?);
        lab.carry();
        assert!(lab.take_delivered(APP).is_empty(), "a request needs a rule in its own direction");
    }
    Ok(())
}

fn an_icmp_error_passes_only_about_a_live_flow<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    let sent = datagram(false, "n8n", "postgres", (4_000, 53))?;
    let unreachable = |quoted: &[u8]| {
        let message = [&[3, 3, 0, 0, 0, 0, 0, 0], quoted].concat();
        Ok::<_, Failure>(ip(at("postgres", false)?, at("n8n", false)?, 1, &message))
    };
    lab.send("n8n", sent.clone());
    lab.carry();
    lab.send("postgres", unreachable(&sent)?);
    lab.send("postgres", unreachable(&datagram(false, "n8n", "postgres", (4_001, 53))?)?);
    lab.carry();
    assert_eq!(lab.take_delivered(APP).len(), 1);
    assert_eq!(lab.dropped(DB, Direction::Outbound, DropReason::Icmp), 1);
    Ok(())
}

fn a_forged_source_stays_here<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    let forged = datagram(false, "n8n", "postgres", (4_000, 53))?;
    lab.send("runner", forged);
    lab.send(
        "runner",
        ip([10, 77, 9, 9].into(), at("postgres", false)?, 17, &udp((4_000, 53), b"")),
    );
    lab.send("n8n", ip(at("n8n", false)?, [10, 77, 9, 9].into(), 17, &udp((4_000, 53), b"")));
    assert!(lab.wire.is_empty());
    assert_eq!(lab.dropped(APP, Direction::Outbound, DropReason::SourceNotLocal), 2);
    assert_eq!(lab.dropped(APP, Direction::Outbound, DropReason::UnknownDestination), 1);
    assert_eq!(lab.take_delivered(APP).len(), 1, "only a source of its own is answered");
    lab.check_balance();
    Ok(())
}

fn nothing_passes_without_a_view<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::without_views();
    lab.send("n8n", segment(false, true, SYN, 1, 0)?);
    lab.receive(APP, SocketAddr::from(([192, 0, 2, 9], 9)), vec![1; 148]);
    lab.tick();
    assert!(lab.wire.is_empty() && lab.take_delivered(APP).is_empty());
    assert_eq!(lab.dropped(APP, Direction::Outbound, DropReason::NoView), 1);
    assert_eq!(lab.dropped(APP, Direction::Inbound, DropReason::NoView), 1);
    lab.check_balance();
    Ok(())
}

fn an_endpoint_roams_with_authentic_data<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    lab.open_stream(false)?;
    let moved = SocketAddr::from(([198, 51, 100, 7], 4_444));
    lab.hosts[APP].endpoint = moved;
    lab.send("n8n", segment(false, true, ACK, 501, 101)?);
    let replay = lab.wire.front().cloned().ok_or("a datagram")?;
    lab.carry();
    let endpoint = |lab: &Lab<K>| {
        lab.hosts[DB]
            .engine
            .peer(host_id(APP), lab.now)
            .and_then(|peer| peer.endpoint)
            .map(|e| e.remote)
    };
    assert_eq!(endpoint(&lab), Some(moved));
    let elsewhere = SocketAddr::from(([203, 0, 113, 1], 1));
    lab.receive(DB, elsewhere, replay.2);
    assert_eq!(endpoint(&lab), Some(moved), "a recording moves nothing");
    lab.send("postgres", segment(false, false, ACK, 101, 501)?);
    assert_eq!(lab.wire.front().map(|(_, to, _)| *to), Some(moved));
    lab.carry();
    lab.take_delivered(DB);
    assert_eq!(lab.take_delivered(APP).len(), 1);
    Ok(())
}

fn a_peer_that_cannot_be_reached_times_out<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    lab.hosts[DB].endpoint = SocketAddr::from(([192, 0, 2, 99], 1));
    for n in 0..100 {
        lab.send("n8n", datagram(false, "n8n", "postgres", (4_000 + n, 53))?);
    }
    assert_eq!(lab.hosts[APP].engine.waiting(), 64, "one instance takes half of the queue");
    assert_eq!(lab.dropped(APP, Direction::Outbound, DropReason::QueueFull), 36);
    assert_eq!(lab.wire.len(), 1, "one initiation");
    lab.pass(Duration::from_secs(11));
    assert_eq!(lab.dropped(APP, Direction::Outbound, DropReason::HandshakeTimeout), 64);
    lab.check_balance();
    Ok(())
}

fn a_session_lives_on_through_its_rekeys<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    lab.open_stream(false)?;
    for minute in 0..10 {
        lab.pass(Duration::from_secs(60));
        let packet = segment(false, true, ACK, 501, 101)?;
        lab.send("n8n", packet.clone());
        lab.carry();
        assert_eq!(lab.take_delivered(DB), [(tun("postgres"), packet)], "minute {minute}");
        let age = lab.hosts[APP].engine.peer(host_id(DB), lab.now).and_then(|peer| peer.session_age);
        assert!(age.is_some_and(|age| age <= Duration::from_secs(121)), "{age:?}");
    }
    lab.check_balance();
    Ok(())
}
