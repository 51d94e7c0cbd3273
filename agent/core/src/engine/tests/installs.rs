//! New views: what they end, what they carry over, and that nothing slips through while they come into force.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use cloison_proto::verdict::DropReason;

use super::flows::is_reset;
use super::lab::*;
use super::with_both_sessions;
use crate::install::Installed;
use crate::offload::VnetHeader;
use crate::packet::Direction;
use crate::wg::LocalKey;

with_both_sessions! {
    a_revocation_cuts_the_stream_at_both_ends_with_the_exact_number
    one_end_that_knows_is_enough
    a_view_that_changes_nothing_disturbs_nothing
    what_waits_is_judged_by_the_view_in_force
    what_waits_for_a_peer_that_goes_is_withdrawn
    a_withdrawn_view_cuts_everything
    a_host_changes_its_key_without_losing_a_packet
    sessions_with_a_next_key_are_made_by_whoever_hears_of_it_first
    a_peer_that_was_away_while_keys_changed_is_met_again
    a_revoked_key_is_refused_at_once
    a_restarted_peer_is_met_again
    when_install_returns_no_denied_packet_passes
}

fn a_revocation_cuts_the_stream_at_both_ends_with_the_exact_number<K: LocalKey>() -> Outcome {
    for v6 in [false, true] {
        let mut lab = Lab::<K>::new()?;
        lab.open_stream(v6)?;
        let less = Policy::only(&[("n8n", "postgres", "udp/53")]);
        assert_eq!(lab.install(APP, &less)?.cut_flows, 1);
        assert_eq!(lab.install(DB, &less)?.cut_flows, 1);
        let (here, there) = (lab.take_delivered(APP), lab.take_delivered(DB));
        assert!(
            matches!(&*here, [(to, reset)] if *to == tun("n8n") && is_reset(reset, 101)),
            "{here:?}"
        );
        assert!(
            matches!(&*there, [(to, reset)] if *to == tun("postgres") && is_reset(reset, 501)),
            "{there:?}"
        );
        assert!(lab.hosts.iter().all(|host| host.engine.flows().is_empty()));
        lab.send("n8n", segment(v6, true, ACK, 501, 101)?);
        lab.send("postgres", segment(v6, false, ACK, 101, 501)?);
        assert!(lab.wire.is_empty());
        lab.check_balance();
    }
    Ok(())
}

fn one_end_that_knows_is_enough<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    lab.open_stream(false)?;
    lab.install(DB, &Policy::only(&[("n8n", "postgres", "udp/53")]))?;
    lab.take_delivered(DB);
    lab.send("n8n", segment(false, true, ACK, 501, 101)?);
    lab.carry();
    assert!(lab.take_delivered(DB).is_empty());
    assert_eq!(
        lab.dropped(DB, Direction::Inbound, DropReason::NoRule),
        1,
        "the receiver drops in silence"
    );
    assert!(lab.take_delivered(APP).is_empty());
    Ok(())
}

fn a_view_that_changes_nothing_disturbs_nothing<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    lab.open_stream(false)?;
    let unchanged = Installed {
        kept_peers: 1,
        kept_flows: 1,
        ..Installed::default()
    };
    assert_eq!(lab.install(APP, &Policy::default())?, unchanged);
    lab.send("n8n", segment(false, true, ACK, 501, 101)?);
    assert_eq!(
        lab.wire.front().map(|(_, _, bytes)| bytes.first()),
        Some(Some(&4)),
        "data, by the session that was there"
    );
    lab.carry();
    assert_eq!((lab.take_delivered(DB).len(), lab.take_delivered(APP).len()), (1, 0));
    Ok(())
}

fn what_waits_is_judged_by_the_view_in_force<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    lab.send("n8n", segment(false, true, SYN, 500, 0)?);
    lab.send("n8n", datagram(false, "n8n", "postgres", (4_000, 53))?);
    assert_eq!(lab.hosts[APP].engine.waiting(), 2);
    lab.install(APP, &Policy::only(&[("n8n", "postgres", "udp/53")]))?;
    lab.take_delivered(APP);
    lab.carry();
    let delivered = lab.take_delivered(DB);
    assert_eq!(delivered, [(tun("postgres"), datagram(false, "n8n", "postgres", (4_000, 53))?)]);
    assert_eq!(lab.dropped(APP, Direction::Outbound, DropReason::NoRule), 1);
    let answers = lab.take_delivered(APP);
    assert_eq!(answers.len(), 1, "the denied one is answered");
    lab.check_balance();
    Ok(())
}

fn what_waits_for_a_peer_that_goes_is_withdrawn<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    lab.send("n8n", segment(false, true, SYN, 500, 0)?);
    let mut plan = lab.plan(APP, &Policy::default())?;
    plan.peers.clear();
    let now = lab.now;
    let Host { engine, worker, .. } = &mut lab.hosts[APP];
    assert_eq!(engine.install(worker, plan, now).gone_peers, 1);
    lab.carry();
    assert_eq!(lab.dropped(APP, Direction::Outbound, DropReason::Withdrawn), 1);
    lab.check_balance();
    Ok(())
}

fn a_withdrawn_view_cuts_everything<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    lab.open_stream(false)?;
    let now = lab.now;
    let Host { engine, worker, .. } = &mut lab.hosts[APP];
    assert_eq!(engine.withdraw(worker, now).cut_flows, 1);
    lab.collect(APP);
    let told = lab.take_delivered(APP);
    assert!(matches!(&*told, [(_, reset)] if is_reset(reset, 101)), "{told:?}");
    lab.send("n8n", segment(false, true, SYN, 1, 0)?);
    lab.send("postgres", segment(false, false, ACK, 101, 501)?);
    lab.carry();
    assert_eq!(lab.dropped(APP, Direction::Outbound, DropReason::NoView), 1);
    assert!(lab.dropped(APP, Direction::Inbound, DropReason::NoView) >= 1);
    assert!(lab.take_delivered(APP).is_empty());
    Ok(())
}

fn a_host_changes_its_key_without_losing_a_packet<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    lab.open_stream(false)?;
    let passes = |lab: &mut Lab<K>, step: &str| {
        lab.send("n8n", segment(false, true, ACK, 501, 101)?);
        lab.carry();
        lab.send("postgres", segment(false, false, ACK, 101, 501)?);
        lab.carry();
        assert_eq!((lab.take_delivered(DB).len(), lab.take_delivered(APP).len()), (1, 1), "{step}");
        Outcome::Ok(())
    };
    let both = |first, second| Policy {
        keys: [vec![first, second], vec![2]],
        ..Policy::default()
    };
    lab.install(DB, &both(1, 3))?;
    passes(&mut lab, "the peer knows both keys")?;
    lab.install(APP, &both(3, 1))?;
    passes(&mut lab, "the host prefers the new one")?;
    lab.pass(Duration::from_secs(2));
    lab.hosts[APP].engine.want_handshake(host_id(DB));
    lab.pass(Duration::from_secs(2));
    passes(&mut lab, "a session between the new keys")?;
    let new = Policy {
        keys: [vec![3], vec![2]],
        ..Policy::default()
    };
    lab.install(APP, &new)?;
    passes(&mut lab, "the old key is gone here")?;
    lab.install(DB, &new)?;
    passes(&mut lab, "and there")
}

/// As agents and coordinator do it: the host takes handshakes for its next key before anybody hears of it; then views come in any order.
fn sessions_with_a_next_key_are_made_by_whoever_hears_of_it_first<K: LocalKey>() -> Outcome {
    let keys = |app: &[u8]| Policy {
        keys: [app.to_vec(), vec![2]],
        ..Policy::default()
    };
    for first in [APP, DB] {
        let mut lab = Lab::<K>::new()?;
        lab.open_stream(false)?;
        let passes = |lab: &mut Lab<K>, step: &str| {
            lab.send("n8n", segment(false, true, ACK, 501, 101)?);
            lab.carry();
            lab.send("postgres", segment(false, false, ACK, 101, 501)?);
            lab.carry();
            assert_eq!(
                (lab.take_delivered(DB).len(), lab.take_delivered(APP).len()),
                (1, 1),
                "{first}: {step}"
            );
            Outcome::Ok(())
        };
        lab.install(APP, &keys(&[1, 3]))?;
        passes(&mut lab, "both are taken")?;
        lab.install(first, &keys(&[3, 1]))?;
        passes(&mut lab, "one end has the next key")?;
        // Longer than any session lasts: whoever has not heard of it is met by the former key.
        for _ in 0..40 {
            lab.pass(Duration::from_secs(10));
            passes(&mut lab, "one end alone, for a while")?;
        }
        lab.install(1 - first, &keys(&[3, 1]))?;
        lab.pass(Duration::from_secs(5));
        passes(&mut lab, "both ends have the next key")?;
        for host in [first, 1 - first] {
            lab.install(host, &keys(&[3]))?;
            passes(&mut lab, "the former is gone")?;
        }
        assert_eq!(lab.hosts[APP].engine.waiting() + lab.hosts[DB].engine.waiting(), 0);
    }
    Ok(())
}

fn a_peer_that_was_away_while_keys_changed_is_met_again<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    lab.open_stream(false)?;
    let new = Policy {
        keys: [vec![3], vec![2]],
        ..Policy::default()
    };
    lab.install(APP, &new)?;
    lab.pass(Duration::from_secs(200));
    lab.send("postgres", segment(false, false, ACK, 101, 501)?);
    lab.pass(Duration::from_secs(10));
    assert!(lab.take_delivered(APP).is_empty(), "the former key is dead");
    lab.install(DB, &new)?;
    lab.pass(Duration::from_secs(10));
    lab.take_delivered(APP);
    lab.send("postgres", segment(false, false, ACK, 101, 501)?);
    lab.carry();
    assert_eq!(lab.take_delivered(APP).len(), 1);
    lab.check_balance();
    Ok(())
}

fn a_revoked_key_is_refused_at_once<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    lab.open_stream(false)?;
    lab.install(
        DB,
        &Policy {
            keys: [vec![9], vec![2]],
            ..Policy::default()
        },
    )?;
    lab.send("n8n", segment(false, true, ACK, 501, 101)?);
    lab.carry();
    assert!(lab.take_delivered(DB).is_empty());
    assert_eq!(lab.dropped(DB, Direction::Inbound, DropReason::UnknownSession), 1);
    lab.pass(Duration::from_secs(2));
    lab.hosts[APP].engine.want_handshake(host_id(DB));
    lab.pass(Duration::from_secs(1));
    assert!(lab.dropped(DB, Direction::Inbound, DropReason::UnknownPeer) >= 1);
    Ok(())
}

fn a_restarted_peer_is_met_again<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    lab.open_stream(false)?;
    let fresh = Lab::<K>::without_views();
    let [app, _] = fresh.hosts;
    lab.hosts[APP] = app;
    lab.install(APP, &Policy::default())?;
    lab.hosts[APP].engine.want_handshake(host_id(DB));
    lab.pass(Duration::from_secs(1));
    lab.send("postgres", segment(false, false, ACK, 101, 501)?);
    lab.carry();
    assert_eq!(lab.take_delivered(APP).len(), 1, "the stream goes on");
    lab.send("n8n", segment(false, true, ACK, 501, 101)?);
    lab.carry();
    assert_eq!(lab.take_delivered(DB).len(), 1);
    assert_eq!(lab.hosts[APP].engine.flows().len(), 1);
    Ok(())
}

/// Promise 4 and I6, with real threads: workers send without pause while the rule comes and goes.
fn when_install_returns_no_denied_packet_passes<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    lab.open_stream(false)?;
    let now = lab.now;
    let with = (0..20).map(|_| lab.plan(APP, &Policy::default())).collect::<Result<Vec<_>, _>>()?;
    let without = (0..20).map(|_| lab.plan(APP, &Policy::only(&[]))).collect::<Result<Vec<_>, _>>()?;
    let packet = segment(false, true, ACK, 501, 101)?;
    let [Host { engine, worker, .. }, _] = &mut lab.hosts;
    // Odd from the return of an install that denies until just before the next one.
    let (engine, phase, stop) = (&*engine, AtomicU64::new(0), AtomicBool::new(false));
    let passed_while_denied = std::thread::scope(|scope| {
        let send = || {
            let (mut worker, mut wrong, mut packet) = (engine.worker(), 0, packet.clone());
            while !stop.load(Ordering::SeqCst) {
                worker.begin(engine);
                // Here an install may come between: it must not return before this batch has ended.
                std::thread::yield_now();
                let before = phase.load(Ordering::SeqCst);
                engine.on_tun(&mut worker, tun("n8n"), &mut packet, VnetHeader::WHOLE, now);
                let sealed = worker.udp().any(|(bytes, _)| bytes.first() == Some(&4));
                worker.end();
                let denied = before % 2 == 1 && phase.load(Ordering::SeqCst) == before;
                wrong += u32::from(sealed && denied);
            }
            wrong
        };
        let senders = [scope.spawn(send), scope.spawn(send)];
        for (with, without) in with.into_iter().zip(without) {
            engine.install(worker, with, now);
            std::thread::yield_now();
            engine.install(worker, without, now);
            phase.fetch_add(1, Ordering::SeqCst);
            (0..100).for_each(|_| std::thread::yield_now());
            phase.fetch_add(1, Ordering::SeqCst);
        }
        stop.store(true, Ordering::SeqCst);
        senders.into_iter().map(|sender| sender.join().unwrap_or(u32::MAX)).sum::<u32>()
    });
    assert_eq!(passed_while_denied, 0);
    lab.check_balance();
    Ok(())
}
