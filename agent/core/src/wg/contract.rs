//! What every implementation of the seam promises, as one suite that runs for each of them. Messages are carried by hand; time is passed
//! in.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use cloison_proto::key::{Secret32, WgPrivateKey};
use cloison_proto::verdict::DropReason;
use cloison_proto::version::Timestamp;

use super::index::Prefixes;
use super::*;

type Outcome = Result<(), String>;
type Promise = fn() -> Outcome;

const START: Timestamp = Timestamp(1_000_000_000_000);
const FROM: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

/// Two private keys.
pub(crate) fn keys() -> (WgPrivateKey, WgPrivateKey) {
    (WgPrivateKey::from_bytes([1; 32]), WgPrivateKey::from_bytes([2; 32]))
}

/// Runs every promise.
pub(crate) fn contract<K: LocalKey>() -> Outcome {
    let promises: [(&str, Promise); 14] = [
        ("data passes both ways", || data_passes_both_ways::<K>(None)),
        ("and with a pre-shared key", || {
            data_passes_both_ways::<K>(Some(&Secret32::from_bytes([7; 32])))
        }),
        ("no keys before a handshake", no_keys_before_a_handshake::<K>),
        ("replays are refused", replays_are_refused::<K>),
        (
            "reordering within the window loses nothing",
            reordering_within_the_window_loses_nothing::<K>,
        ),
        (
            "lost handshake messages are made up for",
            lost_handshake_messages_are_made_up_for::<K>,
        ),
        ("other keys are refused", other_keys_are_refused::<K>),
        ("damage is refused and changes nothing", damage_is_refused_and_changes_nothing::<K>),
        ("short buffers are refused", short_buffers_are_refused::<K>),
        ("keys are replaced without loss", keys_are_replaced_without_loss::<K>),
        (
            "old keys are not used and the session begins anew",
            old_keys_are_not_used_and_the_session_begins_anew::<K>,
        ),
        ("initiations at the same time converge", initiations_at_the_same_time_converge::<K>),
        ("macs and cookies prove what they say", macs_and_cookies_prove_what_they_say::<K>),
        (
            "bad inner packets are refused",
            inner_packets_that_do_not_hold_together_are_refused::<K>,
        ),
    ];
    promises
        .iter()
        .try_for_each(|(name, promise)| promise().map_err(|broken| format!("{name}: {broken}")))
}

fn data_passes_both_ways<K: LocalKey>(psk: Option<&Secret32>) -> Outcome {
    let mut pair = Pair::<K>::new(psk, psk);
    pair.handshake()?;
    ensure(
        pair.one.established(START).is_some() && pair.two.established(START).is_some(),
        "both have keys",
    )?;
    ensure(pair.one.round_trip().is_some(), "the initiator knows the round trip")?;
    for n in 0..50 {
        let (there, back) = (packet(n), packet(n.wrapping_add(100)));
        let sealed = seal(&mut pair.one, &there)?;
        ensure(sealed.len() == there.len() + OVERHEAD, "32 bytes are added")?;
        expect_packet(&mut pair.two, &sealed, &there)?;
        let sealed = seal(&mut pair.two, &back)?;
        expect_packet(&mut pair.one, &sealed, &back)?;
    }
    let keepalive = seal(&mut pair.one, &[])?;
    ensure(keepalive.len() == OVERHEAD, "a keepalive is empty")?;
    ensure(open(&mut pair.two, &keepalive)?.0 == Opened::Keepalive, "a keepalive is told apart")
}

fn no_keys_before_a_handshake<K: LocalKey>() -> Outcome {
    let mut pair = Pair::<K>::new(None, None);
    let mut out = [0; 256];
    ensure(
        pair.one.seal(&packet(1), &mut out, START) == Sealed::NoSession,
        "nothing is sealed without keys",
    )?;
    let initiation = initiate(&mut pair.one, START)?;
    let (opened, response) = open(&mut pair.two, &initiation)?;
    ensure(opened == Opened::Accepted(RESPONSE_LEN), "the initiation is accepted")?;
    ensure(
        pair.two.seal(&packet(1), &mut out, START) == Sealed::NoSession,
        "the responder waits until the initiator has shown its keys",
    )?;
    let (opened, first) = open(&mut pair.one, &response)?;
    ensure(opened == Opened::Established(OVERHEAD), "the response makes the keys")?;
    ensure(
        open(&mut pair.two, &first)?.0 == Opened::Keepalive,
        "the first message confirms them",
    )?;
    seal(&mut pair.two, &packet(1)).map(drop)
}

fn replays_are_refused<K: LocalKey>() -> Outcome {
    let mut pair = Pair::<K>::new(None, None);
    let initiation = initiate(&mut pair.one, START)?;
    let (_, response) = open(&mut pair.two, &initiation)?;
    let (_, first) = open(&mut pair.one, &response)?;
    open(&mut pair.two, &first)?;
    let sealed = seal(&mut pair.one, &packet(1))?;
    expect_packet(&mut pair.two, &sealed, &packet(1))?;
    refused(&mut pair.two, &sealed, DropReason::Replay)?;
    refused(&mut pair.two, &initiation, DropReason::Replay)?;
    refused(&mut pair.one, &response, DropReason::UnknownSession)?;
    let sealed = seal(&mut pair.one, &packet(2))?;
    expect_packet(&mut pair.two, &sealed, &packet(2))
}

fn reordering_within_the_window_loses_nothing<K: LocalKey>() -> Outcome {
    let mut pair = Pair::<K>::new(None, None);
    pair.handshake()?;
    let sealed: Vec<_> = (0..1_000).map(|_| seal(&mut pair.one, &packet(9))).collect::<Result<_, _>>()?;
    for datagram in sealed.iter().rev() {
        expect_packet(&mut pair.two, datagram, &packet(9))?;
    }
    for _ in 0..2_000 {
        let datagram = seal(&mut pair.one, &packet(9))?;
        expect_packet(&mut pair.two, &datagram, &packet(9))?;
    }
    sealed
        .iter()
        .step_by(100)
        .try_for_each(|old| refused(&mut pair.two, old, DropReason::Replay))
}

fn lost_handshake_messages_are_made_up_for<K: LocalKey>() -> Outcome {
    let mut pair = Pair::<K>::new(None, None);
    let at = |seconds| START + Duration::from_secs(seconds);
    initiate(&mut pair.one, START)?; // lost
    let initiation = initiate(&mut pair.one, at(1))?;
    open(&mut pair.two, &initiation)?; // the response is lost
    let initiation = initiate(&mut pair.one, at(2))?;
    let (_, response) = open(&mut pair.two, &initiation)?;
    let (opened, _) = open(&mut pair.one, &response)?; // the first message is lost
    ensure(opened == Opened::Established(OVERHEAD), "the third try makes the keys")?;
    let sealed = seal(&mut pair.one, &packet(3))?;
    expect_packet(&mut pair.two, &sealed, &packet(3))?;
    let sealed = seal(&mut pair.two, &packet(4))?;
    expect_packet(&mut pair.one, &sealed, &packet(4))
}

fn other_keys_are_refused<K: LocalKey>() -> Outcome {
    let psk = Secret32::from_bytes([7; 32]);
    let mut other_psk = Pair::<K>::new(Some(&psk), None);
    ensure(other_psk.handshake().is_err(), "another pre-shared key makes no session")?;
    ensure(other_psk.one.established(START).is_none(), "and no keys")?;
    let (_, second) = keys();
    let stranger = K::new(&WgPrivateKey::from_bytes([3; 32]));
    let mut stranger = stranger.session(&second.public(), None, index(3));
    let mut pair = Pair::<K>::new(None, None);
    let forged = initiate(&mut stranger, START)?;
    refused(&mut pair.two, &forged, DropReason::BadAuth)?;
    pair.handshake()?;
    let foreign = seal(&mut pair.two, &packet(1))?;
    refused(&mut stranger, &foreign, DropReason::UnknownSession)
}

fn damage_is_refused_and_changes_nothing<K: LocalKey>() -> Outcome {
    let mut pair = Pair::<K>::new(None, None);
    pair.handshake()?;
    let good = seal(&mut pair.one, &packet(5))?;
    for at in 16..good.len() {
        let mut damaged = good.clone();
        if let Some(byte) = damaged.get_mut(at) {
            *byte ^= 0x80;
        }
        ensure(matches!(open(&mut pair.two, &damaged)?.0, Opened::Refused(_)), "damage is refused")?;
    }
    let mut ahead = good.clone();
    if let Some(counter) = ahead.get_mut(8..16) {
        counter.copy_from_slice(&(REJECT_AFTER_MESSAGES - 1).to_le_bytes());
    }
    refused(&mut pair.two, &ahead, DropReason::BadAuth)?;
    let next = seal(&mut pair.one, &packet(6))?;
    expect_packet(&mut pair.two, &next, &packet(6))
}

fn short_buffers_are_refused<K: LocalKey>() -> Outcome {
    let mut pair = Pair::<K>::new(None, None);
    pair.handshake()?;
    let sealed = seal(&mut pair.one, &packet(8))?;
    let initiation = initiate(&mut pair.one, START)?;
    for len in 0..INITIATION_LEN {
        let mut short = vec![0; len];
        ensure(
            matches!(pair.one.seal(&packet(8), &mut short, START), Sealed::Refused(_)),
            "seal needs room",
        )?;
        ensure(pair.one.initiate(&mut short, START).is_none(), "initiate needs room")?;
        ensure(pair.one.tick(&mut short, START) == Ticked::Quiet, "tick needs room")?;
        for datagram in [&sealed, &initiation] {
            let datagram = Datagram::parse(datagram).map_err(|e| e.to_string())?;
            ensure(
                matches!(pair.two.open(&datagram, &mut short, START), Opened::Refused(_)),
                "open needs room",
            )?;
        }
    }
    expect_packet(&mut pair.two, &sealed, &packet(8))
}

fn keys_are_replaced_without_loss<K: LocalKey>() -> Outcome {
    let mut pair = Pair::<K>::new(None, None);
    pair.handshake()?;
    for round in 0..20 {
        let on_its_way = seal(&mut pair.one, &packet(round))?;
        let back_on_its_way = seal(&mut pair.two, &packet(round))?;
        if round % 2 == 0 {
            pair.handshake()?
        } else {
            pair.handshake_back()?
        }
        expect_packet(&mut pair.two, &on_its_way, &packet(round))?;
        expect_packet(&mut pair.one, &back_on_its_way, &packet(round))?;
        let sealed = seal(&mut pair.one, &packet(round))?;
        expect_packet(&mut pair.two, &sealed, &packet(round))?;
        let sealed = seal(&mut pair.two, &packet(round))?;
        expect_packet(&mut pair.one, &sealed, &packet(round))?;
    }
    Ok(())
}

fn old_keys_are_not_used_and_the_session_begins_anew<K: LocalKey>() -> Outcome {
    let mut pair = Pair::<K>::new(None, None);
    pair.handshake()?;
    let late = START + REJECT_AFTER_TIME;
    let mut out = [0; 256];
    ensure(pair.one.established(late).is_none(), "old keys are none")?;
    ensure(
        pair.one.seal(&packet(1), &mut out, late) == Sealed::NoSession,
        "nothing is sealed with old keys",
    )?;
    pair.now = late;
    pair.handshake()?;
    ensure(pair.one.established(late) == Some(late), "a new handshake is all it needs")?;
    let sealed = seal_at(&mut pair.one, &packet(1), late)?;
    let mut out = [0; 256];
    let datagram = Datagram::parse(&sealed).map_err(|e| e.to_string())?;
    ensure(
        pair.two.open(&datagram, &mut out, late) == Opened::Packet(packet(1).len()),
        "and data passes",
    )
}

fn initiations_at_the_same_time_converge<K: LocalKey>() -> Outcome {
    let mut pair = Pair::<K>::new(None, None);
    let (from_one, from_two) = (initiate(&mut pair.one, START)?, initiate(&mut pair.two, START)?);
    let (_, answer_to_one) = open(&mut pair.two, &from_one)?;
    let (_, answer_to_two) = open(&mut pair.one, &from_two)?;
    let (_, first_of_one) = open(&mut pair.one, &answer_to_one)?;
    let (_, first_of_two) = open(&mut pair.two, &answer_to_two)?;
    open(&mut pair.two, &first_of_one)?;
    open(&mut pair.one, &first_of_two)?;
    for n in 0..3 {
        let sealed = seal(&mut pair.one, &packet(n))?;
        expect_packet(&mut pair.two, &sealed, &packet(n))?;
        let sealed = seal(&mut pair.two, &packet(n))?;
        expect_packet(&mut pair.one, &sealed, &packet(n))?;
    }
    Ok(())
}

fn macs_and_cookies_prove_what_they_say<K: LocalKey>() -> Outcome {
    let mut pair = Pair::<K>::new(None, None);
    let (first, second) = keys();
    let (guard, wrong) = (K::new(&second), K::new(&first));
    let initiation = initiate(&mut pair.one, START)?;
    let mut reply = [0; COOKIE_REPLY_LEN];
    let parsed = Datagram::parse(&initiation).map_err(|e| e.to_string())?;
    ensure(
        wrong.check(&parsed, FROM, Proof::Key, &mut reply) == Checked::BadMac,
        "mac1 is for one key",
    )?;
    ensure(
        wrong.check(&parsed, FROM, Proof::Address, &mut reply) == Checked::BadMac,
        "a wrong mac1 gets no cookie",
    )?;
    ensure(
        guard.check(&parsed, FROM, Proof::Key, &mut reply) == Checked::Passed,
        "mac1 proves the key",
    )?;
    ensure(guard.initiator(&parsed) == Some(first.public()), "the initiator names itself")?;
    ensure(
        guard.check(&parsed, FROM, Proof::Address, &mut reply[..10]) == Checked::BadMac,
        "no room, no cookie",
    )?;
    ensure(
        guard.check(&parsed, FROM, Proof::Address, &mut reply) == Checked::Cookie(COOKIE_REPLY_LEN),
        "mac2 is missing",
    )?;
    ensure(open(&mut pair.one, &reply)?.0 == Opened::Cookie, "the cookie is taken")?;
    let again = initiate(&mut pair.one, START + Duration::from_secs(1))?;
    let parsed = Datagram::parse(&again).map_err(|e| e.to_string())?;
    ensure(
        guard.check(&parsed, FROM, Proof::Address, &mut reply) == Checked::Passed,
        "the cookie proves the address",
    )?;
    let elsewhere = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));
    ensure(
        guard.check(&parsed, elsewhere, Proof::Address, &mut reply) != Checked::Passed,
        "and no other address",
    )?;
    ensure(
        matches!(open(&mut pair.two, &again)?.0, Opened::Accepted(_)),
        "the message is still good",
    )
}

fn inner_packets_that_do_not_hold_together_are_refused<K: LocalKey>() -> Outcome {
    let mut pair = Pair::<K>::new(None, None);
    pair.handshake()?;
    let mut too_long = packet(1);
    if let Some(length) = too_long.get_mut(3) {
        *length = 200;
    }
    for bad in [vec![0x45], vec![0; 40], vec![0x60; 39], too_long] {
        let sealed = seal(&mut pair.one, &bad)?;
        refused(&mut pair.two, &sealed, DropReason::Malformed)?;
    }
    let mut padded = packet(1);
    padded.resize(64, 0);
    let sealed = seal(&mut pair.one, &padded)?;
    expect_packet(&mut pair.two, &sealed, &packet(1))
}

/// Two sessions with each other.
struct Pair<K: LocalKey> {
    one: K::Session,
    two: K::Session,
    now: Timestamp,
}

impl<K: LocalKey> Pair<K> {
    fn new(psk_one: Option<&Secret32>, psk_two: Option<&Secret32>) -> Self {
        let (first, second) = keys();
        let one = K::new(&first).session(&second.public(), psk_one, index(1));
        let two = K::new(&second).session(&first.public(), psk_two, index(2));
        Self { one, two, now: START }
    }

    fn handshake(&mut self) -> Outcome {
        handshake(&mut self.one, &mut self.two, self.now)
    }

    fn handshake_back(&mut self) -> Outcome {
        handshake(&mut self.two, &mut self.one, self.now)
    }
}

fn handshake<S: Session>(from: &mut S, to: &mut S, now: Timestamp) -> Outcome {
    let initiation = initiate(from, now)?;
    let (opened, response) = open_at(to, &initiation, now)?;
    ensure(opened == Opened::Accepted(RESPONSE_LEN), &format!("initiation: {opened:?}"))?;
    let (opened, first) = open_at(from, &response, now)?;
    ensure(opened == Opened::Established(OVERHEAD), &format!("response: {opened:?}"))?;
    let (opened, _) = open_at(to, &first, now)?;
    ensure(opened == Opened::Keepalive, &format!("first message: {opened:?}"))
}

fn index(seed: u64) -> SessionIndex {
    Prefixes::new(seed)
        .draw(|_| false)
        .map_or(SessionIndex::of_receiver(0), |prefix| prefix.slot(3))
}

/// An IPv4 packet of 48 bytes.
fn packet(fill: u8) -> Vec<u8> {
    let mut bytes = vec![0x45, 0, 0, 48];
    bytes.resize(48, fill);
    bytes
}

fn initiate<S: Session>(session: &mut S, now: Timestamp) -> Result<Vec<u8>, String> {
    let mut out = vec![0xee; INITIATION_LEN];
    let len = session.initiate(&mut out, now).ok_or("no initiation")?;
    ensure(len == INITIATION_LEN, "an initiation has 148 bytes")?;
    Ok(out)
}

fn seal<S: Session>(session: &mut S, inner: &[u8]) -> Result<Vec<u8>, String> {
    seal_at(session, inner, START)
}

fn seal_at<S: Session>(session: &mut S, inner: &[u8], now: Timestamp) -> Result<Vec<u8>, String> {
    let mut out = vec![0; 512];
    match session.seal(inner, &mut out, now) {
        Sealed::Datagram(len) => {
            out.truncate(len);
            Ok(out)
        }
        other @ (Sealed::NoSession | Sealed::Refused(_)) => Err(format!("not sealed: {other:?}")),
    }
}

fn open<S: Session>(session: &mut S, datagram: &[u8]) -> Result<(Opened, Vec<u8>), String> {
    open_at(session, datagram, START)
}

fn open_at<S: Session>(session: &mut S, datagram: &[u8], now: Timestamp) -> Result<(Opened, Vec<u8>), String> {
    let datagram = Datagram::parse(datagram).map_err(|reason| reason.to_string())?;
    let mut out = vec![0; 512];
    let opened = session.open(&datagram, &mut out, now);
    let len = match opened {
        Opened::Packet(len) | Opened::Accepted(len) | Opened::Established(len) => len,
        Opened::Keepalive | Opened::Cookie | Opened::Refused(_) => 0,
    };
    out.truncate(len);
    Ok((opened, out))
}

fn expect_packet<S: Session>(session: &mut S, datagram: &[u8], inner: &[u8]) -> Outcome {
    let (opened, bytes) = open(session, datagram)?;
    ensure(
        opened == Opened::Packet(inner.len()) && bytes == inner,
        &format!("expected the packet, got {opened:?}"),
    )
}

fn refused<S: Session>(session: &mut S, datagram: &[u8], reason: DropReason) -> Outcome {
    let (opened, _) = open(session, datagram)?;
    ensure(opened == Opened::Refused(reason), &format!("expected {reason}, got {opened:?}"))
}

fn ensure(holds: bool, what: &str) -> Outcome {
    if holds { Ok(()) } else { Err(what.to_owned()) }
}
