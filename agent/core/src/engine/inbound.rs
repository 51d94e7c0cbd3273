//! From the underlay to a TUN. The functions stand in the order in which a datagram passes them.
//!
//! Nothing is answered, and nothing but counters and the handshake budget changes, before a message is authentic (I15); except that a
//! sender with a right mac1, beyond the budget, gets a cookie.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use cloison_proto::verdict::DropReason;
use cloison_proto::version::Timestamp;

use super::{Engine, Step, ecn};
use crate::TunId;
use crate::packet::{Direction, Parsed, parse};
use crate::path_policy::{PathPolicy, Route};
use crate::peer::{PeerIndex, PeerState};
use crate::wg::{Checked, Datagram, LocalKey, Message, Opened, Proof, SessionIndex};
use crate::worker::{Transmit, Worker};

/// What the kernel says of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meta {
    /// Where it came from.
    pub from: SocketAddr,
    /// The address of ours that it came to, if that is known.
    pub local: Option<IpAddr>,
    /// The two ECN bits of its outer header.
    pub ecn: u8,
}

impl<P: PathPolicy, K: LocalKey> Engine<P, K> {
    /// Takes what the underlay brought: one datagram, or several of `segment` bytes each (the last may be shorter) in one buffer. Zero, or
    /// more than there is, means one.
    pub fn on_udp(&self, worker: &mut Worker<P, K>, datagrams: &mut [u8], segment: usize, meta: Meta, now: Timestamp) {
        let segment = if segment == 0 { datagrams.len().max(1) } else { segment };
        // An empty datagram is one, too.
        let empty = datagrams.is_empty().then_some(&[][..]);
        for datagram in datagrams.chunks(segment).chain(empty) {
            worker.stats().received(Direction::Inbound, 1);
            match self.step(worker, now) {
                Some(mut step) => step.receive(datagram, meta),
                None => worker.stats().dropped(Direction::Inbound, DropReason::NoView, 1),
            }
        }
    }
}

impl<P: PathPolicy, K: LocalKey> Step<'_, P, K> {
    fn receive(&mut self, bytes: &[u8], meta: Meta) {
        match self.take_datagram(bytes, meta) {
            Ok(()) => self.stats.delivered(Direction::Inbound, 1),
            Err(reason) => self.dropped(Direction::Inbound, reason),
        }
    }

    fn take_datagram(&mut self, bytes: &[u8], meta: Meta) -> Result<(), DropReason> {
        let datagram = Datagram::parse(bytes)?;
        if self.out.tun.space().is_empty() || self.out.udp.space().is_empty() {
            return Err(DropReason::Congestion);
        }
        match datagram.message() {
            Message::Initiation => self.take_initiation(&datagram, meta),
            Message::Response { receiver } => {
                self.guard(&datagram, meta)?;
                self.take_message(receiver, &datagram, meta)
            }
            Message::Cookie { receiver } | Message::Data { receiver, .. } => self.take_message(receiver, &datagram, meta),
        }
    }

    /// Whether work may be spent on a handshake message; the key of ours that it is for.
    fn guard(&mut self, datagram: &Datagram<'_>, meta: Meta) -> Result<Arc<K>, DropReason> {
        let (from, now) = (meta.from.ip(), self.now());
        let reply = self.out.udp.space();
        let is_for = |local: &&Arc<K>| local.check(datagram, from, Proof::Key, &mut []) == Checked::Passed;
        let local = self.snapshot.locals.iter().find(is_for).ok_or(DropReason::BadMac)?;
        let proof = self.engine.budget.lock().demand(from, now);
        if proof == Proof::Key {
            return Ok(local.clone());
        }
        match local.check(datagram, from, Proof::Address, reply) {
            Checked::Passed if self.engine.budget.lock().admit_proven(from, now) => Ok(local.clone()),
            Checked::Passed => Err(DropReason::HandshakeLimit),
            Checked::BadMac => Err(DropReason::BadMac),
            Checked::Cookie(len) => {
                self.out.udp.commit(
                    len,
                    Transmit {
                        remote: meta.from,
                        local: meta.local,
                        ecn: 0,
                    },
                );
                self.stats.answered(Direction::Inbound, 1);
                Err(DropReason::HandshakeLimit)
            }
        }
    }

    /// An initiation: from a peer's key, or nothing.
    fn take_initiation(&mut self, datagram: &Datagram<'_>, meta: Meta) -> Result<(), DropReason> {
        let local = self.guard(datagram, meta)?;
        let remote = local.initiator(datagram).ok_or(DropReason::BadAuth)?;
        let index = self.snapshot.peers.by_key(&remote).ok_or(DropReason::UnknownPeer)?;
        let peer = self.snapshot.peers.get(index).ok_or(DropReason::UnknownPeer)?;
        let now = self.now();
        let mut state = peer.lock();
        if !state.handshakes.admits_handshake(now) {
            return Err(DropReason::HandshakeLimit);
        }
        let opened = state
            .accept(&local, &remote, datagram, self.out.udp.space(), now)
            .ok_or(DropReason::UnknownPeer)?;
        match opened {
            Opened::Accepted(len) => {
                state.handshakes.count_handshake(now);
                self.out.udp.commit(
                    len,
                    Transmit {
                        remote: meta.from,
                        local: meta.local,
                        ecn: 0,
                    },
                );
                self.engine.awake.wake(peer);
                Ok(())
            }
            Opened::Refused(reason) => Err(reason),
            Opened::Packet(_) | Opened::Keepalive | Opened::Established(_) | Opened::Cookie => Err(DropReason::Session),
        }
    }

    /// A message that names a session of ours.
    fn take_message(&mut self, receiver: u32, datagram: &Datagram<'_>, meta: Meta) -> Result<(), DropReason> {
        let session = SessionIndex::of_receiver(receiver);
        let index = self.snapshot.peers.by_prefix(session.peer()).ok_or(DropReason::UnknownSession)?;
        let peer = self.snapshot.peers.get(index).ok_or(DropReason::UnknownSession)?;
        let now = self.now();
        let mut state = peer.lock();
        let opened = state.sessions.open(session, datagram, self.out.tun.space(), now);
        let waits = !state.queue.is_empty();
        let result = match opened {
            Opened::Packet(len) => {
                state.heard(meta.from, meta.local);
                state.note_received(len, now);
                self.arrive(index, len, meta.ecn)
            }
            Opened::Established(len) => self.conclude(&mut state, len, meta),
            Opened::Keepalive => {
                state.heard(meta.from, meta.local);
                Ok(())
            }
            Opened::Cookie => Ok(()),
            Opened::Refused(reason) => return Err(reason),
            Opened::Accepted(_) => return Err(DropReason::Session),
        };
        drop(state);
        if waits {
            self.flush(peer);
        }
        result
    }

    /// Our initiation was answered: the first message goes out, behind it what waited.
    fn conclude(&mut self, state: &mut PeerState<K>, len: usize, meta: Meta) -> Result<(), DropReason> {
        state.heard(meta.from, meta.local);
        let first = self.out.tun.space().get(..len).unwrap_or_default();
        let sent = self.out.udp.push(
            first,
            Transmit {
                remote: meta.from,
                local: meta.local,
                ecn: 0,
            },
        );
        if sent { Ok(()) } else { Err(DropReason::Congestion) }
    }

    /// The inner packet of `len` bytes in the TUN slab's space, which the keys of `peer` decrypted.
    fn arrive(&mut self, peer: PeerIndex, len: usize, outer_ecn: u8) -> Result<(), DropReason> {
        let parsed = parse(self.out.tun.space().get(..len).unwrap_or_default())?;
        let tun = self
            .admit(peer, &parsed)
            .inspect_err(|reason| self.out.deny(Direction::Inbound, &parsed, *reason))?;
        if outer_ecn == ecn::CE {
            self.out.tun.space().get_mut(..parsed.len).map(ecn::mark);
        }
        self.out.tun.commit(parsed.len, tun);
        Ok(())
    }

    /// Whether a packet of `peer` may come in; the TUN of its destination.
    fn admit(&mut self, peer: PeerIndex, packet: &Parsed) -> Result<TunId, DropReason> {
        let path = self.snapshot.policy.inbound(peer, packet)?;
        let Route::Here(tun) = path.route else {
            return Err(DropReason::DestinationNotLocal);
        };
        self.judge(tun, &path, packet, Direction::Inbound)?;
        Ok(tun)
    }
}
