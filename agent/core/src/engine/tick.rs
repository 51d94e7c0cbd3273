//! The passing of time: sessions are kept fresh and made anew, packets that waited too long are dropped, flows end.

use std::sync::Arc;

use cloison_proto::verdict::DropReason;
use cloison_proto::version::Timestamp;

use super::{Engine, Step};
use crate::packet::Direction;
use crate::path_policy::PathPolicy;
use crate::peer::{Peer, PeerState};
use crate::wg::{LocalKey, Ticked};
use crate::worker::{Transmit, Worker};

impl<P: PathPolicy, K: LocalKey> Engine<P, K> {
    /// Lets time pass; to be called every [`TICK`](crate::timer::TICK), by one worker at a time, within a batch.
    pub fn on_tick(&self, worker: &mut Worker<P, K>, now: Timestamp) {
        let Some(mut step) = self.step(worker, now) else { return };
        step.tell_pending_cuts();
        step.sweep();
        self.awake.round(|peer| step.tick_peer(peer));
    }
}

impl<P: PathPolicy, K: LocalKey> Step<'_, P, K> {
    /// One peer's share of a tick; whether it needs another one.
    fn tick_peer(&mut self, peer: &Arc<Peer<K>>) -> bool {
        let now = self.now();
        let mut state = peer.lock();
        self.drop_overdue(&mut state);
        self.tick_sessions(&mut state);
        let flush = !state.queue.is_empty() && state.is_live(now);
        if state.is_handshake_due(now) {
            self.initiate(peer, &mut state);
        }
        if state.is_idle(now) {
            peer.sleep();
            return false;
        }
        drop(state);
        if flush {
            self.flush(peer);
        }
        true
    }

    fn drop_overdue(&self, state: &mut PeerState<K>) {
        while state.queue.pop_overdue(self.now()).is_some() {
            self.stats.unqueued(Direction::Outbound, 1);
            self.dropped(Direction::Outbound, DropReason::HandshakeTimeout);
        }
    }

    fn tick_sessions(&mut self, state: &mut PeerState<K>) {
        let now = self.now();
        let mut position = 0;
        while let Some(ticked) = state.sessions.tick(position, self.out.udp.space(), now) {
            let sent = match ticked {
                Ticked::Expired => {
                    state.sessions.drop_at(position);
                    continue;
                }
                Ticked::Quiet => None,
                Ticked::Keepalive(len) => state.endpoints.current().map(|to| (len, to)),
                // The session's own retransmission counts against the pace, and goes where the next one was to go.
                Ticked::Initiation(len) if state.may_initiate(now) => state.note_initiation(now).map(|to| (len, to)),
                Ticked::Initiation(_) => None,
            };
            if let Some((len, to)) = sent {
                self.out.udp.commit(
                    len,
                    Transmit {
                        remote: to.remote,
                        local: to.local,
                        ecn: 0,
                    },
                );
            }
            position = position.saturating_add(1);
        }
    }
}
