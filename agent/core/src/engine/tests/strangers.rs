//! What the underlay may bring: strangers, forgeries, recordings, floods, and peers that lie.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use cloison_proto::verdict::DropReason;

use super::lab::*;
use super::with_both_sessions;
use crate::engine::Meta;
use crate::packet::Direction;
use crate::packet::build::{ip, udp};
use crate::wg::index::Prefixes;
use crate::wg::{INITIATION_LEN, LocalKey, OVERHEAD, Sealed, Session};

with_both_sessions! {
    strangers_get_silence
    a_peer_cannot_speak_for_another_address
    what_fails_authentication_changes_nothing
    an_old_initiation_moves_nobody
    recorded_initiations_do_not_keep_their_peer_out
    a_flood_of_handshakes_costs_the_flooder_alone
    segments_of_one_buffer_are_taken_one_by_one
}

fn stranger(n: u8) -> SocketAddr {
    SocketAddr::from(([203, 0, 113, n], 1_000))
}

fn strangers_get_silence<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    let mut bad_mac = vec![0; INITIATION_LEN];
    bad_mac[0] = 1;
    lab.receive(DB, stranger(1), bad_mac);
    lab.receive(DB, stranger(1), Vec::new());
    lab.receive(DB, stranger(1), vec![0x45; 60]);
    let mut data = vec![0; 64];
    data[0] = 4;
    lab.receive(DB, stranger(1), data);
    let mut response = vec![0; 92];
    response[0] = 2;
    lab.receive(DB, stranger(1), response);
    // Someone who knows the public key, and whom no rule pairs with this host.
    let index = Prefixes::new(1).draw(|_| false).ok_or("a prefix")?.slot(0);
    let mut unknown = K::new(&key(66)).session(&key(2).public(), None, index);
    let mut initiation = vec![0; INITIATION_LEN];
    unknown.initiate(&mut initiation, lab.now).ok_or("an initiation")?;
    lab.receive(DB, stranger(1), initiation);
    assert!(lab.wire.is_empty() && lab.take_delivered(DB).is_empty());
    let dropped = |reason| lab.dropped(DB, Direction::Inbound, reason);
    assert_eq!((dropped(DropReason::BadMac), dropped(DropReason::NotWireGuard)), (2, 2));
    assert_eq!((dropped(DropReason::UnknownSession), dropped(DropReason::UnknownPeer)), (1, 1));
    lab.check_balance();
    Ok(())
}

/// A host whose agent is not ours: it has its key, and sends whatever it likes.
struct Liar<S> {
    session: S,
}

impl<S: Session> Liar<S> {
    fn join<K: LocalKey<Session = S>>(lab: &mut Lab<K>) -> Result<Self, Failure> {
        let index = Prefixes::new(1).draw(|_| false).ok_or("a prefix")?.slot(0);
        let mut session = Arc::new(K::new(&key(1))).session(&key(2).public(), None, index);
        let mut out = vec![0; 256];
        let len = session.initiate(&mut out, lab.now).ok_or("an initiation")?;
        lab.receive(DB, stranger(7), out[..len].to_vec());
        let (_, _, response) = lab.wire.pop_front().ok_or("a response")?;
        let response = crate::wg::Datagram::parse(&response).map_err(DropReason::as_str)?;
        let opened = session.open(&response, &mut out, lab.now);
        let crate::wg::Opened::Established(len) = opened else {
            return Err(format!("{opened:?}").into());
        };
        lab.receive(DB, stranger(7), out[..len].to_vec());
        Ok(Self { session })
    }

    fn say<K: LocalKey>(&mut self, lab: &mut Lab<K>, packet: &[u8]) -> Outcome {
        let mut out = vec![0; packet.len() + OVERHEAD + INITIATION_LEN];
        let sealed = self.session.seal(packet, &mut out, lab.now);
        let Sealed::Datagram(len) = sealed else {
            return Err(format!("{sealed:?}").into());
        };
        lab.receive(DB, stranger(7), out[..len].to_vec());
        Ok(())
    }
}

fn a_peer_cannot_speak_for_another_address<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    let mut liar = Liar::join(&mut lab)?;
    let (postgres, n8n) = (at("postgres", false)?, at("n8n", false)?);
    liar.say(&mut lab, &ip([10, 77, 9, 9].into(), postgres, 17, &udp((1, 53), b"")))?;
    liar.say(&mut lab, &ip(postgres, postgres, 17, &udp((1, 53), b"")))?;
    liar.say(&mut lab, &ip(n8n, at("runner", false)?, 17, &udp((1, 53), b"")))?;
    liar.say(&mut lab, &ip(n8n, postgres, 17, &udp((1, 54), b"")))?;
    liar.say(&mut lab, &ip(at("runner", false)?, postgres, 17, &udp((1, 53), b"")))?;
    liar.say(&mut lab, ip(n8n, postgres, 17, &udp((1, 53), b"")).get(..24).unwrap_or_default())?;
    liar.say(&mut lab, &[0x45])?;
    assert!(lab.take_delivered(DB).is_empty() && lab.wire.is_empty(), "dropped in silence");
    let dropped = |reason| lab.dropped(DB, Direction::Inbound, reason);
    assert_eq!(
        (dropped(DropReason::SourceNotPeer), dropped(DropReason::DestinationNotLocal)),
        (2, 1)
    );
    assert_eq!((dropped(DropReason::NoRule), dropped(DropReason::Malformed)), (2, 2));
    liar.say(&mut lab, &ip(n8n, postgres, 17, &udp((1, 53), b"")))?;
    assert_eq!(lab.take_delivered(DB).len(), 1, "what it may say it says");
    lab.check_balance();
    Ok(())
}

fn what_fails_authentication_changes_nothing<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    lab.open_stream(false)?;
    lab.send("n8n", segment(false, true, ACK, 501, 101)?);
    let (_, _, good) = lab.wire.pop_front().ok_or("a datagram")?;
    let before = lab.hosts[DB].engine.peer(host_id(APP), lab.now);
    for at in 16..good.len() {
        let mut damaged = good.clone();
        damaged[at] ^= 1;
        lab.receive(DB, stranger(2), damaged);
    }
    assert_eq!(lab.hosts[DB].engine.peer(host_id(APP), lab.now), before);
    assert!(lab.take_delivered(DB).is_empty() && lab.wire.is_empty());
    lab.receive(DB, lab.hosts[APP].endpoint, good);
    assert_eq!(lab.take_delivered(DB).len(), 1);
    Ok(())
}

fn an_old_initiation_moves_nobody<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    lab.send("n8n", segment(false, true, SYN, 500, 0)?);
    let (_, _, recorded) = lab.wire.front().cloned().ok_or("an initiation")?;
    lab.carry();
    let endpoint = |lab: &Lab<K>| {
        lab.hosts[DB]
            .engine
            .peer(host_id(APP), lab.now)
            .and_then(|peer| peer.endpoint)
            .map(|e| e.remote)
    };
    let known = endpoint(&lab);
    assert_eq!(known, Some(lab.hosts[APP].endpoint));
    // The same session refuses it; a new one, after a restart hint, would answer, but not follow.
    lab.receive(DB, stranger(3), recorded.clone());
    assert_eq!(lab.dropped(DB, Direction::Inbound, DropReason::Replay), 1);
    let hint = crate::install::Hint {
        candidates: Vec::new(),
        incarnation: 2,
    };
    lab.hosts[DB].engine.hint(host_id(APP), &hint);
    lab.receive(DB, stranger(3), recorded);
    assert_eq!(endpoint(&lab), known);
    Ok(())
}

fn recorded_initiations_do_not_keep_their_peer_out<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    lab.send("n8n", segment(false, true, SYN, 500, 0)?);
    let (_, _, recorded) = lab.wire.front().cloned().ok_or("an initiation")?;
    lab.carry();
    lab.now = lab.now + Duration::from_secs(2);
    for n in 0..40 {
        lab.receive(DB, stranger(n), recorded.clone());
    }
    lab.hosts[APP].engine.want_handshake(host_id(DB));
    lab.tick();
    lab.carry();
    let peer = lab.hosts[APP].engine.peer(host_id(DB), lab.now).ok_or("a peer")?;
    assert_eq!(peer.session_age, Some(Duration::ZERO), "a new session");
    let dropped = |reason| lab.dropped(DB, Direction::Inbound, reason);
    assert_eq!((dropped(DropReason::Replay), dropped(DropReason::HandshakeLimit)), (40, 0));
    Ok(())
}

fn a_flood_of_handshakes_costs_the_flooder_alone<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    let index = Prefixes::new(1).draw(|_| false).ok_or("a prefix")?.slot(0);
    let mut flooder = K::new(&key(66)).session(&key(2).public(), None, index);
    for n in 0..100u32 {
        let mut initiation = vec![0; INITIATION_LEN];
        flooder
            .initiate(&mut initiation, lab.now + Duration::from_micros(1) * n)
            .ok_or("an initiation")?;
        lab.receive(DB, stranger(5), initiation);
    }
    let dropped = |lab: &Lab<K>, reason| lab.dropped(DB, Direction::Inbound, reason);
    assert_eq!(
        (dropped(&lab, DropReason::UnknownPeer), dropped(&lab, DropReason::HandshakeLimit)),
        (5, 95)
    );
    assert!(
        lab.wire.iter().all(|(_, to, bytes)| *to == stranger(5) && bytes.len() == 64),
        "cookies only"
    );
    lab.wire.clear();
    lab.open_stream(false)?;
    lab.check_balance();
    Ok(())
}

fn segments_of_one_buffer_are_taken_one_by_one<K: LocalKey>() -> Outcome {
    let mut lab = Lab::<K>::new()?;
    lab.open_stream(false)?;
    for _ in 0..3 {
        lab.send("n8n", segment(false, true, ACK, 501, 101)?);
    }
    let datagrams: Vec<_> = lab.wire.drain(..).map(|(_, _, bytes)| bytes).collect();
    let len = datagrams.first().map_or(0, Vec::len);
    let mut buffer = datagrams.concat();
    let (now, from) = (lab.now, lab.hosts[APP].endpoint);
    let Host { engine, worker, .. } = &mut lab.hosts[DB];
    worker.begin(engine);
    engine.on_udp(worker, &mut buffer, len, Meta { from, local: None, ecn: 0 }, now);
    assert_eq!(worker.tun().count(), 3);
    lab.collect(DB);
    lab.check_balance();
    Ok(())
}
