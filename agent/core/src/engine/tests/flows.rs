//! Flows across time: leases, rules that expire, streams from before a restart.

use std::time::Duration;

use cloison_proto::verdict::DropReason;
use cloison_proto::version::MeshTime;

use super::lab::*;
use super::with_both_sessions;
use crate::packet::{Direction, Transport, parse};
use crate::wg::LocalKey;

with_both_sessions! {
    after_the_lease_nothing_passes_and_streams_are_cut
    a_renewed_lease_goes_on
    a_rule_that_expires_cuts_its_streams
    a_stream_from_before_a_restart_goes_on
    no_reset_is_sent_soon_after_the_first_view
}

fn after_the_lease_nothing_passes_and_streams_are_cut<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    lab.open_stream(false)?;
    lab.now = lab.now + LEASE;
    lab.hosts.iter_mut().for_each(|host| host.delivered.clear());
    lab.send("n8n", segment(false, true, ACK, 501, 101)?);
    assert_eq!(lab.dropped(APP, Direction::Outbound, DropReason::LeaseEnded), 1);
    let answers = lab.take_delivered(APP);
    assert!(
        matches!(&*answers, [(_, answer)] if is_reset(answer, 101)),
        "the application is told: {answers:?}"
    );
    assert!(lab.wire.is_empty());
    Ok(())
}

fn a_renewed_lease_goes_on<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    lab.open_stream(false)?;
    lab.now = lab.now + Duration::from_secs(200);
    let term = lab.lease();
    assert!(lab.hosts.iter().all(|host| host.engine.renew(term)));
    lab.now = lab.now + LEASE - Duration::from_secs(10);
    lab.send("n8n", segment(false, true, SYN, 1, 0)?);
    lab.pass(Duration::from_millis(200));
    assert_eq!(lab.take_delivered(DB).len(), 1);
    Ok(())
}

fn a_rule_that_expires_cuts_its_streams<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    let until = MeshTime(lab.mesh_time().0 + 60);
    let policy = Policy {
        rules: vec![("n8n", "postgres", "tcp/5432", until)],
        ..Policy::default()
    };
    lab.install(APP, &policy)?;
    lab.install(DB, &policy)?;
    lab.open_stream(true)?;
    lab.pass(Duration::from_secs(58));
    assert!(lab.take_delivered(APP).is_empty() && lab.take_delivered(DB).is_empty());
    lab.pass(Duration::from_secs(4));
    let (here, there) = (lab.take_delivered(APP), lab.take_delivered(DB));
    assert!(matches!(&*here, [(_, reset)] if is_reset(reset, 101)), "{here:?}");
    assert!(matches!(&*there, [(_, reset)] if is_reset(reset, 501)), "{there:?}");
    lab.send("n8n", segment(true, true, SYN, 9, 0)?);
    assert_eq!(lab.dropped(APP, Direction::Outbound, DropReason::RuleExpired), 1);
    Ok(())
}

fn a_stream_from_before_a_restart_goes_on<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    lab.hosts[DB].engine.want_handshake(host_id(APP));
    lab.pass(Duration::from_secs(1));
    // Against the rule's direction first: it passes alone, creates nothing, and is limited.
    lab.send("postgres", segment(false, false, ACK, 100, 501)?);
    lab.carry();
    assert_eq!(lab.take_delivered(APP).len(), 1);
    assert!(lab.hosts.iter().all(|host| host.engine.flows().is_empty()));
    for _ in 0..1_100 {
        lab.send("postgres", segment(false, false, ACK, 100, 501)?);
    }
    lab.carry();
    assert_eq!(lab.dropped(DB, Direction::Outbound, DropReason::MidStreamLimit), 101);
    assert_eq!(lab.take_delivered(APP).len(), 999);
    // In the rule's direction the flow is there again.
    lab.send("n8n", segment(false, true, ACK, 501, 101)?);
    lab.carry();
    assert!(lab.hosts.iter().all(|host| host.engine.flows().len() == 1));
    // A SYN-ACK never passes without a flow, nor does a SYN against the rule.
    lab.take_delivered(APP);
    let other = |flags| {
        let (from, to) = (at("postgres", false)?, at("n8n", false)?);
        Ok::<_, Failure>(crate::packet::build::ip(
            from,
            to,
            6,
            &crate::packet::build::tcp((5_432, 7), flags, 1, 1, b""),
        ))
    };
    lab.send("postgres", other(SYN_ACK)?);
    lab.send("postgres", other(SYN)?);
    lab.carry();
    assert!(lab.take_delivered(APP).is_empty());
    lab.check_balance();
    Ok(())
}

fn no_reset_is_sent_soon_after_the_first_view<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::without_views();
    lab.install(APP, &Policy::only(&[]))?;
    lab.send("n8n", segment(false, true, ACK, 501, 101)?);
    assert!(lab.take_delivered(APP).is_empty(), "silence");
    lab.now = lab.now + Duration::from_secs(5);
    lab.send("n8n", segment(false, true, ACK, 501, 101)?);
    let answers = lab.take_delivered(APP);
    assert!(matches!(&*answers, [(_, answer)] if is_reset(answer, 101)));
    assert_eq!(lab.dropped(APP, Direction::Outbound, DropReason::NoRule), 2);
    Ok(())
}

/// Whether a packet is a reset with exactly this sequence number.
pub(crate) fn is_reset(packet: &[u8], expected: u32) -> bool {
    matches!(parse(packet).map(|parsed| parsed.transport), Ok(Transport::Tcp { flags, seq, .. }) if flags.rst() && seq == expected)
}
