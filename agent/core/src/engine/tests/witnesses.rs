//! Whose the sockets are: what a witness refuses goes nowhere, is counted once, and leaves nothing behind.

use std::sync::Arc;

use cloison_proto::verdict::DropReason;
use parking_lot::Mutex;

use super::lab::*;
use super::with_both_sessions;
use crate::TunId;
use crate::packet::build::{icmp, icmp_number, ip, tcp};
use crate::packet::{Direction, Parsed, Transport, parse};
use crate::wg::LocalKey;
use crate::witness::Witness;
use crate::worker::Worker;

with_both_sessions! {
    a_stream_of_a_stranger_s_socket_is_never_sealed_and_fails_at_once
    a_stream_to_a_stranger_s_socket_arrives_nowhere_and_is_not_answered
    a_datagram_is_asked_about_where_it_arrives_and_nowhere_else
    between_two_components_of_a_host_both_ends_are_asked
    what_the_filter_denies_is_not_asked_about
    only_the_first_segment_is_asked_about
    a_packet_that_waited_is_asked_about_again
    a_witness_with_nothing_to_ask_is_not_asked
    where_the_witness_lets_nothing_pass_nothing_passes
}

/// What was asked: which way the packet went, and on which TUN.
type Asked = Vec<(Direction, TunId)>;

/// Says no to one direction, and remembers what it was asked.
#[derive(Default)]
struct Fake {
    is_on: bool,
    refuses: Option<Direction>,
    is_closed: bool,
    asked: Asked,
}

struct Shared(Arc<Mutex<Fake>>);

impl Shared {
    fn answer(&self, direction: Direction, tun: TunId) -> bool {
        let mut fake = self.0.lock();
        fake.asked.push((direction, tun));
        fake.refuses != Some(direction)
    }
}

impl Witness for Shared {
    fn begin(&mut self) -> bool {
        self.0.lock().is_on
    }

    fn is_open(&self, _: TunId) -> bool {
        !self.0.lock().is_closed
    }

    fn is_senders(&mut self, tun: TunId, _: &Parsed) -> bool {
        self.answer(Direction::Outbound, tun)
    }

    fn is_receivers(&mut self, tun: TunId, _: &Parsed) -> bool {
        self.answer(Direction::Inbound, tun)
    }
}

/// A lab in which `host` has a witness.
fn lab<K: LocalKey>(host: usize, refuses: Option<Direction>) -> Result<(Lab<K>, Arc<Mutex<Fake>>), Failure> {
    let mut lab = Lab::<K>::new()?;
    let fake = Arc::new(Mutex::new(Fake {
        is_on: true,
        refuses,
        is_closed: false,
        asked: Asked::new(),
    }));
    let worker: Worker<_, K> = lab.hosts[host].engine.worker();
    lab.hosts[host].worker = worker.with_witness(Box::new(Shared(fake.clone())));
    Ok((lab, fake))
}

fn a_stream_of_a_stranger_s_socket_is_never_sealed_and_fails_at_once<K: LocalKey>() -> Outcome {
    for v6 in [false, true] {
        let (mut lab, fake) = lab::<K>(APP, Some(Direction::Outbound))?;
        lab.send("n8n", segment(v6, true, SYN, 500, 0)?);
        assert!(lab.wire.is_empty(), "nothing leaves, not even a handshake");
        assert_eq!(fake.lock().asked, [(Direction::Outbound, tun("n8n"))]);
        assert_eq!(lab.hosts[APP].engine.flows().len(), 0, "no flow begins");
        assert_eq!(lab.dropped(APP, Direction::Outbound, DropReason::NotOwner), 1);
        let noted: Vec<_> = lab.hosts[APP].denials.iter().map(|d| (d.reason, d.source_port, d.port)).collect();
        assert_eq!(noted, [(DropReason::NotOwner, 40_000, 5_432)]);
        let answers = lab.take_delivered(APP);
        let [(_, answer)] = &*answers else {
            return Err("one answer".into());
        };
        let answer = parse(answer).map_err(DropReason::as_str)?;
        assert!(matches!(answer.transport, Transport::Tcp { flags, .. } if flags.rst()));
        lab.check_balance();
    }
    Ok(())
}

fn a_stream_to_a_stranger_s_socket_arrives_nowhere_and_is_not_answered<K: LocalKey>() -> Outcome {
    for v6 in [false, true] {
        let (mut lab, fake) = lab::<K>(DB, Some(Direction::Inbound))?;
        lab.send("n8n", segment(v6, true, SYN, 500, 0)?);
        lab.carry();
        assert!(lab.take_delivered(DB).is_empty() && lab.take_delivered(APP).is_empty());
        assert_eq!(fake.lock().asked, [(Direction::Inbound, tun("postgres"))]);
        assert_eq!(lab.hosts[DB].engine.flows().len(), 0, "no flow begins");
        assert_eq!(lab.dropped(DB, Direction::Inbound, DropReason::NotOwner), 1);
        lab.check_balance();
        fake.lock().refuses = None;
        lab.open_stream(v6)?;
        lab.check_balance();
    }
    Ok(())
}

fn where_the_witness_lets_nothing_pass_nothing_passes<K: LocalKey>() -> Outcome {
    for host in [APP, DB] {
        let (mut lab, fake) = lab::<K>(host, None)?;
        lab.send("n8n", datagram(false, "n8n", "postgres", (4_000, 53))?);
        lab.carry();
        assert_eq!(lab.take_delivered(DB).len(), 1);
        fake.lock().is_closed = true;
        // Of a flow that is there, too.
        lab.send("n8n", datagram(false, "n8n", "postgres", (4_000, 53))?);
        lab.carry();
        assert!(lab.take_delivered(DB).is_empty());
        let direction = if host == APP { Direction::Outbound } else { Direction::Inbound };
        assert_eq!(lab.dropped(host, direction, DropReason::Unenforced), 1);
        fake.lock().is_closed = false;
        lab.send("n8n", datagram(false, "n8n", "postgres", (4_000, 53))?);
        lab.carry();
        assert_eq!(lab.take_delivered(DB).len(), 1);
        lab.check_balance();
    }
    Ok(())
}

fn a_datagram_is_asked_about_where_it_arrives_and_nowhere_else<K: LocalKey>() -> Outcome {
    let (mut lab, fake) = lab::<K>(DB, None)?;
    lab.send("n8n", datagram(false, "n8n", "postgres", (4_000, 53))?);
    lab.carry();
    lab.send("postgres", datagram(false, "postgres", "n8n", (53, 4_000))?);
    lab.carry();
    assert_eq!((lab.take_delivered(DB).len(), lab.take_delivered(APP).len()), (1, 1));
    assert_eq!(
        fake.lock().asked,
        [(Direction::Inbound, tun("postgres"))],
        "the answer is the kernel's business"
    );
    // Of a flow that is there, too: another socket may have taken its port.
    fake.lock().refuses = Some(Direction::Inbound);
    lab.send("n8n", datagram(false, "n8n", "postgres", (4_000, 53))?);
    lab.send(
        "n8n",
        ip(at("n8n", false)?, at("postgres", false)?, icmp_number(false), &icmp(8, 0, 1, b"")),
    );
    lab.carry();
    assert_eq!(lab.dropped(DB, Direction::Inbound, DropReason::NotOwner), 1);
    assert_eq!(lab.take_delivered(DB).len(), 1, "an echo request has no socket");
    lab.check_balance();
    Ok(())
}

fn between_two_components_of_a_host_both_ends_are_asked<K: LocalKey>() -> Outcome {
    let syn = || -> Result<Vec<u8>, Failure> { Ok(ip(at("n8n", false)?, at("runner", false)?, 6, &tcp((40_000, 80), SYN, 500, 0, b""))) };
    for refuses in [None, Some(Direction::Outbound), Some(Direction::Inbound)] {
        let (mut lab, fake) = lab::<K>(APP, refuses)?;
        lab.install(APP, &Policy::only(&[("n8n", "runner", "tcp/80")]))?;
        lab.send("n8n", syn()?);
        let delivered = lab.take_delivered(APP);
        let arrived = delivered.iter().filter(|(to, _)| *to == tun("runner")).count();
        let both = [(Direction::Outbound, tun("n8n")), (Direction::Inbound, tun("runner"))];
        let (asked, reset) = (fake.lock().asked.len(), usize::from(refuses.is_some()));
        assert_eq!(fake.lock().asked, both.get(..asked).unwrap_or_default());
        assert_eq!((arrived, delivered.len() - arrived), (1 - reset, reset), "{refuses:?}");
        assert_eq!(asked, if refuses == Some(Direction::Outbound) { 1 } else { 2 });
        assert_eq!(
            lab.dropped(APP, Direction::Outbound, DropReason::NotOwner),
            u64::from(refuses.is_some())
        );
        assert_eq!(
            lab.dropped(APP, Direction::Inbound, DropReason::NotOwner),
            0,
            "it was received once"
        );
        lab.check_balance();
    }
    Ok(())
}

fn what_the_filter_denies_is_not_asked_about<K: LocalKey>() -> Outcome {
    let (mut lab, fake) = lab::<K>(APP, Some(Direction::Outbound))?;
    lab.send(
        "n8n",
        ip(at("n8n", false)?, at("postgres", false)?, 6, &tcp((40_000, 22), SYN, 1, 0, b"")),
    );
    lab.send("runner", segment(false, true, SYN, 1, 0)?);
    assert!(fake.lock().asked.is_empty());
    assert_eq!(lab.dropped(APP, Direction::Outbound, DropReason::NoRule), 1);
    assert_eq!(lab.dropped(APP, Direction::Outbound, DropReason::SourceNotLocal), 1);
    lab.check_balance();
    Ok(())
}

fn only_the_first_segment_is_asked_about<K: LocalKey>() -> Outcome {
    let (mut lab, fake) = lab::<K>(APP, None)?;
    lab.open_stream(false)?;
    let asked = fake.lock().asked.len();
    assert_eq!(asked, 2, "when it was sent, and when it was sealed");
    fake.lock().refuses = Some(Direction::Outbound);
    lab.send("n8n", segment(false, true, ACK, 501, 101)?);
    assert_eq!(fake.lock().asked.len(), asked);
    lab.send("n8n", segment(false, true, SYN, 900, 0)?);
    assert_eq!(
        lab.dropped(APP, Direction::Outbound, DropReason::NotOwner),
        1,
        "a SYN of a known flow is one, too"
    );
    lab.check_balance();
    Ok(())
}

fn a_packet_that_waited_is_asked_about_again<K: LocalKey>() -> Outcome {
    let (mut lab, fake) = lab::<K>(APP, None)?;
    lab.send("n8n", segment(false, true, SYN, 500, 0)?);
    assert_eq!(lab.hosts[APP].engine.waiting(), 1);
    fake.lock().refuses = Some(Direction::Outbound);
    lab.carry();
    assert!(lab.take_delivered(DB).is_empty());
    assert_eq!(lab.dropped(APP, Direction::Outbound, DropReason::NotOwner), 1);
    lab.check_balance();
    Ok(())
}

fn a_witness_with_nothing_to_ask_is_not_asked<K: LocalKey>() -> Outcome {
    let (mut lab, fake) = lab::<K>(APP, Some(Direction::Outbound))?;
    fake.lock().is_on = false;
    lab.open_stream(false)?;
    assert!(fake.lock().asked.is_empty());
    fake.lock().is_on = true;
    lab.send("n8n", segment(false, true, SYN, 900, 0)?);
    assert_eq!(
        lab.dropped(APP, Direction::Outbound, DropReason::NotOwner),
        1,
        "from the next batch on"
    );
    lab.check_balance();
    Ok(())
}
