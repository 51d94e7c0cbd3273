//! The seam's implementation without any secrecy, for simulations: the messages have WireGuard's types, lengths and indices, and all that
//! is sent can be read and forged by anyone. It needs neither clock nor randomness, so that a simulated mesh repeats itself to the bit and
//! its timers run on simulated time.
//!
//! What stands for cryptography is a checksum over the keys of both sides. That is enough to tell apart what the contract tells apart:
//! keys, pre-shared keys, sessions and messages.

use std::collections::{BTreeSet, VecDeque};
use std::hash::BuildHasher as _;
use std::net::IpAddr;
use std::time::Duration;

use cloison_proto::key::{Secret32, WgPrivateKey, WgPublicKey};
use cloison_proto::verdict::DropReason;
use cloison_proto::version::Timestamp;
use foldhash::quality::FixedState;

use super::classify::word;
use super::{COOKIE_REPLY_LEN, INITIATION_LEN, OVERHEAD, RESPONSE_LEN};
use super::{Checked, Datagram, LocalKey, Message, Opened, Proof, Sealed, Session, SessionIndex, Ticked};
use super::{KEEPALIVE_TIMEOUT, REJECT_AFTER_TIME, REKEY_ATTEMPT_TIME, REKEY_TIMEOUT};

/// How far back a message may come: as with boringtun.
const WINDOW: u64 = 1_024;
/// Keys kept for what is still on its way.
const KEPT: usize = 3;

/// A local key whose sessions keep nothing secret: for simulations only.
pub struct SimulatedKey {
    public: WgPublicKey,
}

impl LocalKey for SimulatedKey {
    type Session = SimulatedSession;

    fn new(key: &WgPrivateKey) -> Self {
        Self { public: key.public() }
    }

    fn public(&self) -> &WgPublicKey {
        &self.public
    }

    fn session(&self, peer: &WgPublicKey, psk: Option<&Secret32>, index: SessionIndex) -> SimulatedSession {
        let (low, high) = if self.public < *peer {
            (&self.public, peer)
        } else {
            (peer, &self.public)
        };
        let psk = psk.map_or([0; 32], |secret| *secret.expose());
        SimulatedSession {
            own: self.public,
            peer: *peer,
            shared: digest(&[b"shared", low.as_bytes(), high.as_bytes(), &psk]),
            index: index.get() << 8,
            stamp: 0,
            peer_stamp: 0,
            cookie: [0; 8],
            mac1: [0; 16],
            attempt: None,
            keys: VecDeque::new(),
            heard: None,
            spoke: Timestamp::default(),
            round_trip: None,
        }
    }

    fn check(&self, datagram: &Datagram<'_>, from: IpAddr, proof: Proof, reply: &mut [u8]) -> Checked {
        let bytes = datagram.bytes();
        let Some((body, [mac1, mac2])) = split_macs(bytes) else {
            return Checked::Passed;
        };
        if mac1 != mac(&self.public, body) {
            return Checked::BadMac;
        }
        let cookie = digest(&[b"cookie", self.public.as_bytes(), from.to_canonical().to_string().as_bytes()]);
        if proof == Proof::Key || mac2 == second_mac(cookie, mac1) {
            return Checked::Passed;
        }
        let sender = word(bytes, 4).unwrap_or_default().to_le_bytes();
        let written = write(
            reply,
            COOKIE_REPLY_LEN,
            &[&[3, 0, 0, 0], &sender, &cookie, &digest(&[&cookie, &mac1])],
        );
        written.map_or(Checked::BadMac, Checked::Cookie)
    }

    fn initiator(&self, datagram: &Datagram<'_>) -> Option<WgPublicKey> {
        let key = datagram.bytes().get(40..72)?.first_chunk::<32>()?;
        WgPublicKey::from_bytes(*key).ok()
    }
}

/// A session that keeps nothing secret: for simulations only.
pub struct SimulatedSession {
    own: WgPublicKey,
    peer: WgPublicKey,
    /// Stands for the agreement of both static keys and the pre-shared key.
    shared: [u8; 8],
    /// The last receiver field given out.
    index: u32,
    /// Of our last initiation, and of the peer's: they only grow.
    stamp: u64,
    peer_stamp: u64,
    cookie: [u8; 8],
    /// mac1 of our last handshake message: what a cookie answers to.
    mac1: [u8; 16],
    attempt: Option<Attempt>,
    /// Newest last.
    keys: VecDeque<Keys>,
    /// When data came that was not answered by anything.
    heard: Option<Timestamp>,
    /// When anything was last sent.
    spoke: Timestamp,
    round_trip: Option<Duration>,
}

/// An initiation under way.
struct Attempt {
    receiver: u32,
    stamp: u64,
    began: Timestamp,
    sent: Timestamp,
}

/// What one handshake agreed on.
struct Keys {
    receiver: u32,
    remote: u32,
    key: [u8; 8],
    agreed: Timestamp,
    /// Whether the other side has shown that it has them.
    confirmed: bool,
    sent: u64,
    highest: u64,
    seen: BTreeSet<u64>,
}

impl Session for SimulatedSession {
    fn seal(&mut self, inner: &[u8], out: &mut [u8], now: Timestamp) -> Sealed {
        if out.len() < INITIATION_LEN.max(inner.len().saturating_add(OVERHEAD)) {
            return Sealed::Refused(DropReason::TooBig);
        }
        match self.keys.iter_mut().rfind(|keys| keys.in_use(now)) {
            None => Sealed::NoSession,
            Some(keys) => {
                (self.heard, self.spoke) = (None, now);
                keys.seal(inner, out).map_or(Sealed::Refused(DropReason::TooBig), Sealed::Datagram)
            }
        }
    }

    fn open(&mut self, datagram: &Datagram<'_>, out: &mut [u8], now: Timestamp) -> Opened {
        if out.len() < INITIATION_LEN.max(datagram.bytes().len()) {
            return Opened::Refused(DropReason::TooBig);
        }
        let opened = match datagram.message() {
            Message::Initiation => self.respond(datagram.bytes(), out, now),
            Message::Response { receiver } => self.conclude(datagram.bytes(), receiver, out, now),
            Message::Cookie { receiver } => self.note_cookie(datagram.bytes(), receiver),
            Message::Data { receiver, counter } => self.receive(datagram.bytes(), receiver, counter, out, now),
        };
        opened.unwrap_or_else(Opened::Refused)
    }

    fn initiate(&mut self, out: &mut [u8], now: Timestamp) -> Option<usize> {
        let receiver = self.next_receiver();
        let stamp = now.0.max(self.stamp.saturating_add(1));
        let (sender, stamp_bytes) = (receiver.to_le_bytes(), stamp.to_le_bytes());
        let tag = digest(&[b"initiation", &self.shared, &sender, &stamp_bytes, self.own.as_bytes()]);
        let head = [&[1, 0, 0, 0][..], &sender, &stamp_bytes, &[0; 24], self.own.as_bytes(), &tag];
        let len = write(out, INITIATION_LEN, &head)?;
        self.add_macs(out, len);
        let began = self.attempt.as_ref().map_or(now, |attempt| attempt.began);
        self.attempt = Some(Attempt {
            receiver,
            stamp,
            began,
            sent: now,
        });
        (self.stamp, self.spoke) = (stamp, now);
        Some(len)
    }

    fn tick(&mut self, out: &mut [u8], now: Timestamp) -> Ticked {
        if out.len() < INITIATION_LEN {
            return Ticked::Quiet;
        }
        self.keys.retain(|keys| now.since(keys.agreed) < REJECT_AFTER_TIME);
        match &self.attempt {
            Some(attempt) if now.since(attempt.began) >= REKEY_ATTEMPT_TIME => {
                self.attempt = None;
                self.keys.clear();
                Ticked::Expired
            }
            Some(attempt) if now.since(attempt.sent) >= REKEY_TIMEOUT => self.initiate(out, now).map_or(Ticked::Quiet, Ticked::Initiation),
            None if self.keys.is_empty() => Ticked::Expired,
            _ if self
                .heard
                .is_some_and(|since| now.since(since.max(self.spoke)) >= KEEPALIVE_TIMEOUT) =>
            {
                match self.seal(&[], out, now) {
                    Sealed::Datagram(len) => Ticked::Keepalive(len),
                    Sealed::NoSession | Sealed::Refused(_) => Ticked::Quiet,
                }
            }
            _ => Ticked::Quiet,
        }
    }

    fn established(&self, now: Timestamp) -> Option<Timestamp> {
        self.keys.iter().rfind(|keys| keys.in_use(now)).map(|keys| keys.agreed)
    }

    fn round_trip(&self) -> Option<Duration> {
        self.round_trip
    }
}

impl SimulatedSession {
    fn respond(&mut self, bytes: &[u8], out: &mut [u8], now: Timestamp) -> Result<Opened, DropReason> {
        let (sender, stamp) = (array::<4>(bytes, 4)?, array::<8>(bytes, 8)?);
        if array::<8>(bytes, 72)? != digest(&[b"initiation", &self.shared, &sender, &stamp, self.peer.as_bytes()]) {
            return Err(DropReason::BadAuth);
        }
        if u64::from_le_bytes(stamp) <= self.peer_stamp {
            return Err(DropReason::Replay);
        }
        self.peer_stamp = u64::from_le_bytes(stamp);
        let receiver = self.next_receiver();
        let tag = digest(&[b"response", &self.shared, &receiver.to_le_bytes(), &sender, &stamp]);
        let head = [&[2, 0, 0, 0][..], &receiver.to_le_bytes(), &sender, &[0; 32], &tag];
        let len = write(out, RESPONSE_LEN, &head).ok_or(DropReason::TooBig)?;
        self.add_macs(out, len);
        self.spoke = now;
        self.add_keys(Keys::new(receiver, u32::from_le_bytes(sender), tag, now, false));
        Ok(Opened::Accepted(len))
    }

    fn conclude(&mut self, bytes: &[u8], receiver: u32, out: &mut [u8], now: Timestamp) -> Result<Opened, DropReason> {
        let attempt = self
            .attempt
            .as_ref()
            .filter(|attempt| attempt.receiver == receiver)
            .ok_or(DropReason::UnknownSession)?;
        let remote = array::<4>(bytes, 4)?;
        let tag = digest(&[
            b"response",
            &self.shared,
            &remote,
            &receiver.to_le_bytes(),
            &attempt.stamp.to_le_bytes(),
        ]);
        if array::<8>(bytes, 44)? != tag {
            return Err(DropReason::BadAuth);
        }
        self.round_trip = Some(now.since(attempt.sent));
        self.attempt = None;
        self.add_keys(Keys::new(receiver, u32::from_le_bytes(remote), tag, now, true));
        match self.seal(&[], out, now) {
            Sealed::Datagram(len) => Ok(Opened::Established(len)),
            Sealed::NoSession | Sealed::Refused(_) => Err(DropReason::Session),
        }
    }

    fn note_cookie(&mut self, bytes: &[u8], receiver: u32) -> Result<Opened, DropReason> {
        let cookie = array::<8>(bytes, 8)?;
        if receiver != self.index {
            return Err(DropReason::UnknownSession);
        }
        if array::<8>(bytes, 16)? != digest(&[&cookie, &self.mac1]) {
            return Err(DropReason::BadAuth);
        }
        self.cookie = cookie;
        Ok(Opened::Cookie)
    }

    fn receive(&mut self, bytes: &[u8], receiver: u32, counter: u64, out: &mut [u8], now: Timestamp) -> Result<Opened, DropReason> {
        let known = |keys: &&mut Keys| keys.receiver == receiver && now.since(keys.agreed) < REJECT_AFTER_TIME;
        let keys = self.keys.iter_mut().find(known).ok_or(DropReason::UnknownSession)?;
        let inner = keys.open(bytes, counter)?;
        if inner.is_empty() {
            return Ok(Opened::Keepalive);
        }
        let len = ip_length(inner).filter(|len| *len <= inner.len()).ok_or(DropReason::Malformed)?;
        self.heard = self.heard.or(Some(now));
        write(out, len, &[inner.get(..len).unwrap_or_default()])
            .map(Opened::Packet)
            .ok_or(DropReason::TooBig)
    }

    /// The session's index in front of a number that goes round.
    fn next_receiver(&mut self) -> u32 {
        self.index = self.index & !0xff | self.index.wrapping_add(1) & 0xff;
        self.index
    }

    fn add_keys(&mut self, keys: Keys) {
        if self.keys.len() >= KEPT {
            self.keys.pop_front();
        }
        self.keys.push_back(keys);
    }

    /// Writes mac1 and mac2 over the last 32 bytes of the message of `len` bytes in `out`.
    fn add_macs(&mut self, out: &mut [u8], len: usize) {
        let Some((body, [mac1, mac2])) = out.get_mut(..len).and_then(split_macs_mut) else {
            return;
        };
        self.mac1 = mac(&self.peer, body);
        *mac1 = self.mac1;
        *mac2 = if self.cookie == [0; 8] {
            [0; 16]
        } else {
            second_mac(self.cookie, self.mac1)
        };
    }
}

impl Keys {
    fn new(receiver: u32, remote: u32, tag: [u8; 8], agreed: Timestamp, confirmed: bool) -> Self {
        let (key, seen) = (digest(&[b"session", &tag]), BTreeSet::new());
        Self {
            receiver,
            remote,
            key,
            agreed,
            confirmed,
            sent: 0,
            highest: 0,
            seen,
        }
    }

    fn in_use(&self, now: Timestamp) -> bool {
        self.confirmed && now.since(self.agreed) < REJECT_AFTER_TIME
    }

    fn seal(&mut self, inner: &[u8], out: &mut [u8]) -> Option<usize> {
        let counter = self.sent.to_le_bytes();
        let tag = digest(&[&self.key, &self.remote.to_le_bytes(), &counter, inner]);
        let len = inner.len().saturating_add(OVERHEAD);
        let written = write(
            out,
            len,
            &[&[4, 0, 0, 0], &self.remote.to_le_bytes(), &counter, inner, &tag, &[0; 8]],
        )?;
        self.sent = self.sent.saturating_add(1);
        Some(written)
    }

    fn open<'a>(&mut self, bytes: &'a [u8], counter: u64) -> Result<&'a [u8], DropReason> {
        if counter.saturating_add(WINDOW) < self.highest || self.seen.contains(&counter) {
            return Err(DropReason::Replay);
        }
        let (head, [tag @ .., 0, 0, 0, 0, 0, 0, 0, 0]) = bytes.split_last_chunk::<16>().ok_or(DropReason::NotWireGuard)? else {
            return Err(DropReason::BadAuth);
        };
        let inner = head.get(16..).ok_or(DropReason::NotWireGuard)?;
        if *tag != digest(&[&self.key, &self.receiver.to_le_bytes(), &counter.to_le_bytes(), inner]) {
            return Err(DropReason::BadAuth);
        }
        self.confirmed = true;
        self.highest = self.highest.max(counter);
        self.seen.insert(counter);
        while self.seen.first().is_some_and(|oldest| oldest.saturating_add(WINDOW) < self.highest) {
            self.seen.pop_first();
        }
        Ok(inner)
    }
}

/// A checksum that stands for a hash, a MAC and a key: it keeps nothing secret.
fn digest(parts: &[&[u8]]) -> [u8; 8] {
    let hash = parts.iter().fold(0, |seed, part| FixedState::with_seed(seed).hash_one(*part));
    hash.to_le_bytes()
}

fn mac(key: &WgPublicKey, body: &[u8]) -> [u8; 16] {
    second_mac(digest(&[b"mac1", key.as_bytes(), body]), [0; 16])
}

fn second_mac(cookie: [u8; 8], mac1: [u8; 16]) -> [u8; 16] {
    let (mut out, [low, high]) = ([0; 16], [digest(&[b"low", &cookie, &mac1]), digest(&[b"high", &cookie, &mac1])]);
    for (to, from) in out.iter_mut().zip(low.into_iter().chain(high)) {
        *to = from;
    }
    out
}

fn split_macs(bytes: &[u8]) -> Option<(&[u8], [[u8; 16]; 2])> {
    let (rest, mac2) = bytes.split_last_chunk::<16>()?;
    let (body, mac1) = rest.split_last_chunk::<16>()?;
    Some((body, [*mac1, *mac2]))
}

fn split_macs_mut(bytes: &mut [u8]) -> Option<(&mut [u8], [&mut [u8; 16]; 2])> {
    let (rest, mac2) = bytes.split_last_chunk_mut::<16>()?;
    let (body, mac1) = rest.split_last_chunk_mut::<16>()?;
    Some((body, [mac1, mac2]))
}

/// Writes `parts` to the start of `out` and zeros behind them, `len` bytes in all; `None` if something does not fit.
fn write(out: &mut [u8], len: usize, parts: &[&[u8]]) -> Option<usize> {
    let mut rest = out.get_mut(..len)?;
    for part in parts {
        let (to, behind) = rest.split_at_mut_checked(part.len())?;
        to.copy_from_slice(part);
        rest = behind;
    }
    rest.fill(0);
    Some(len)
}

fn array<const N: usize>(bytes: &[u8], offset: usize) -> Result<[u8; N], DropReason> {
    bytes
        .get(offset..)
        .and_then(|rest| rest.first_chunk::<N>())
        .copied()
        .ok_or(DropReason::NotWireGuard)
}

/// The length that an inner packet's header states.
fn ip_length(inner: &[u8]) -> Option<usize> {
    let stated = |at| {
        inner
            .get(at..)
            .and_then(|rest| rest.first_chunk::<2>())
            .map(|bytes| usize::from(u16::from_be_bytes(*bytes)))
    };
    match inner.first()? >> 4 {
        4 if inner.len() >= 20 => stated(2),
        6 if inner.len() >= 40 => stated(4)?.checked_add(40),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wg::contract::contract;

    #[test]
    fn the_simulated_session_keeps_the_contract() -> Result<(), String> {
        contract::<SimulatedKey>()
    }
}
