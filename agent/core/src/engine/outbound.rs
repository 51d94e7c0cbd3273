//! From a TUN to the mesh. The functions stand in the order in which a packet passes them.

use std::sync::Arc;

use cloison_proto::verdict::DropReason;
use cloison_proto::version::Timestamp;

use super::{Engine, Step};
use crate::TunId;
use crate::offload::VnetHeader;
use crate::packet::{Direction, Opening, Parsed, Transport, parse, reply};
use crate::path_policy::{PathPolicy, Route};
use crate::peer::{Peer, PeerIndex, PeerState};
use crate::wg::limit::Rate;
use crate::wg::{LocalKey, Sealed};
use crate::worker::{Transmit, Worker};

/// Initiations that a host sends: 10 % of a core, and enough to meet 16,384 peers in a minute and a half.
const INITIATIONS: Rate = Rate::new(200, 50);

/// What became of a packet that may leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    /// It is a result.
    Delivered,
    /// It waits for a handshake.
    Queued,
}

impl<P: PathPolicy, K: LocalKey> Engine<P, K> {
    /// Takes a packet that `tun` gave us.
    pub fn on_tun(&self, worker: &mut Worker<P, K>, tun: TunId, packet: &mut [u8], vnet: VnetHeader, now: Timestamp) {
        worker.stats().received(Direction::Outbound, 1);
        match self.step(worker, now) {
            Some(step) if !vnet.is_whole() => step.dropped(Direction::Outbound, DropReason::TooBig),
            Some(mut step) => step.take(tun, packet),
            None => worker.stats().dropped(Direction::Outbound, DropReason::NoView, 1),
        }
    }
}

impl<P: PathPolicy, K: LocalKey> Step<'_, P, K> {
    /// Takes a packet on its way out, fresh from its TUN or from where it waited.
    fn take(&mut self, tun: TunId, packet: &[u8]) {
        let parsed = match parse(packet) {
            Ok(parsed) => parsed,
            Err(reason) => return self.dropped(Direction::Outbound, reason),
        };
        match self.send(tun, packet, &parsed) {
            Ok(Sent::Delivered) => self.stats.delivered(Direction::Outbound, 1),
            Ok(Sent::Queued) => self.stats.queued(Direction::Outbound, 1),
            Err(reason) => {
                self.dropped(Direction::Outbound, reason);
                self.out.deny(Direction::Outbound, &parsed, reason);
                self.answer(tun, packet, &parsed, reason);
            }
        }
    }

    fn send(&mut self, tun: TunId, packet: &[u8], parsed: &Parsed) -> Result<Sent, DropReason> {
        let path = self.snapshot.policy.outbound(tun, parsed)?;
        self.judge(tun, &path, parsed, Direction::Outbound)?;
        let packet = packet.get(..parsed.len).ok_or(DropReason::Malformed)?;
        match path.route {
            Route::Here(to) => {
                self.judge(to, &path, parsed, Direction::Inbound)?;
                if self.out.tun.push(packet, to) {
                    Ok(Sent::Delivered)
                } else {
                    Err(DropReason::Congestion)
                }
            }
            Route::Peer(peer) => self.seal(tun, peer, packet, parsed),
        }
    }

    /// Seals for a peer; without a session, the packet waits and a handshake begins.
    fn seal(&mut self, tun: TunId, index: PeerIndex, packet: &[u8], parsed: &Parsed) -> Result<Sent, DropReason> {
        let now = self.now();
        let peer = self.snapshot.peers.get(index).ok_or(DropReason::UnknownDestination)?;
        let space = self.out.udp.space();
        if space.is_empty() {
            return Err(DropReason::Congestion);
        }
        let mut state = peer.lock();
        match state.sessions.seal(packet, space, now) {
            Sealed::Datagram(len) => {
                let endpoint = state.endpoints.current().ok_or(DropReason::NoEndpoint)?;
                state.note_sent(packet.len(), now);
                let transmit = Transmit {
                    remote: endpoint.remote,
                    local: endpoint.local,
                    ecn: parsed.ecn,
                };
                self.out.udp.commit(len, transmit);
                Ok(Sent::Delivered)
            }
            Sealed::NoSession if state.endpoints.known() == 0 => Err(DropReason::NoEndpoint),
            Sealed::NoSession if !state.queue.push(packet, parsed.src, tun, now) => Err(DropReason::QueueFull),
            Sealed::NoSession => {
                self.initiate(peer, &mut state);
                Ok(Sent::Queued)
            }
            Sealed::Refused(reason) => Err(reason),
        }
    }

    /// Begins a handshake, if the peer's pace and the host's budget allow it now; if not, a tick will.
    pub(super) fn initiate(&mut self, peer: &Arc<Peer<K>>, state: &mut PeerState<K>) {
        let now = self.now();
        self.engine.awake.wake(peer);
        if !state.may_initiate(now) || !self.engine.initiations.lock().take(INITIATIONS, now) {
            return;
        }
        if let Some((len, endpoint)) = state.initiate(self.out.udp.space(), now) {
            self.out.udp.commit(
                len,
                Transmit {
                    remote: endpoint.remote,
                    local: endpoint.local,
                    ecn: 0,
                },
            );
        }
    }

    /// Judges and seals what waited for a peer, as long as there is a session and room.
    pub(super) fn flush(&mut self, peer: &Arc<Peer<K>>) {
        while self.out.udp.has_room() && self.out.tun.has_room() {
            let mut state = peer.lock();
            if !state.is_live(self.now()) {
                return;
            }
            let Some(waiting) = state.queue.pop() else { return };
            drop(state);
            self.stats.unqueued(Direction::Outbound, 1);
            self.take_waiting(waiting.tun, &waiting.packet);
        }
    }

    fn take_waiting(&mut self, tun: TunId, packet: &[u8]) {
        let known = parse(packet).and_then(|parsed| self.snapshot.policy.outbound(tun, &parsed));
        match known {
            Err(DropReason::UnknownDestination) => self.dropped(Direction::Outbound, DropReason::Withdrawn),
            Ok(_) | Err(_) => self.take(tun, packet),
        }
    }

    /// Tells the application at once that its packet was denied, so many a second per instance, then not.
    fn answer(&mut self, tun: TunId, packet: &[u8], parsed: &Parsed, reason: DropReason) {
        let Some(local) = self.snapshot.policy.filter().and_then(|table| table.lookup(parsed.src)) else {
            return;
        };
        // A segment of a stream that this agent does not know yet may be of one that the next view allows; a SYN begins one.
        let is_stream = matches!(parsed.transport, Transport::Tcp { .. }) && parsed.opening() != Opening::Opens;
        let is_early = is_stream && !self.engine.resets_are_sent(self.now());
        if !is_answered(reason) || is_early || !self.engine.answers.admit(local.0, self.now()) {
            return;
        }
        if let Some(len) = reply::denied(packet, parsed, self.out.tun.space()) {
            self.out.tun.commit(len, tun);
            self.stats.answered(Direction::Outbound, 1);
        }
    }
}

/// Which denials are told to the application: verdicts, not what may work a moment later or was never its own.
const fn is_answered(reason: DropReason) -> bool {
    matches!(
        reason,
        DropReason::NoRule
            | DropReason::RuleExpired
            | DropReason::LeaseEnded
            | DropReason::UnknownDestination
            | DropReason::Unenforced
            | DropReason::NoFlow
            | DropReason::NotOwner
    )
}
