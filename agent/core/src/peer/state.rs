//! What changes about a peer: sessions, endpoints, the packets that wait, and the pace of handshakes.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use cloison_proto::id::HostId;
use cloison_proto::key::{Secret32, WgPublicKey};
use cloison_proto::version::Timestamp;

use super::sessions::{Ends, Sessions};
use super::{Endpoint, Endpoints, PeerStatus};
use crate::wg::index::PeerPrefix;
use crate::wg::limit::Bucket;
use crate::wg::queue::{Queue, Room};
use crate::wg::{Datagram, LocalKey, Opened, REKEY_AFTER_TIME, REKEY_TIMEOUT};

/// At most one initiation in this time (DESIGN: hints).
const MIN_PACE: Duration = Duration::from_secs(1);
/// The end with the larger key renews keys of this age: the other one had its turn, six times.
const LATE_REKEY: Duration = Duration::from_secs(150);
/// For this long after the last packet, a session is kept fresh and made anew when it ends, so that peers learn where this host is.
const KEEP_WARM: Duration = Duration::from_secs(3_600);

/// The keys between this host and a peer.
pub struct Keys<K> {
    /// Ours: initiations use the first.
    pub locals: Vec<Arc<K>>,
    /// The peer's: initiations go to the first, then to the others.
    pub remotes: Vec<WgPublicKey>,
    /// The pre-shared key between the hosts.
    pub psk: Option<Secret32>,
    /// Which generation that is; another one needs new sessions.
    pub psk_generation: u32,
}

/// The part of a peer that changes.
pub struct PeerState<K: LocalKey> {
    keys: Keys<K>,
    /// Its sessions.
    pub sessions: Sessions<K>,
    /// Where it is.
    pub endpoints: Endpoints,
    /// What waits for a session with it.
    pub queue: Queue,
    /// Handshake messages that it may send.
    pub handshakes: Bucket,
    /// Highest incarnation that was hinted.
    incarnation: u64,
    initiated: Option<Timestamp>,
    /// Initiations since the last success.
    tries: usize,
    /// A handshake is wanted although nothing waits.
    wanted: bool,
    last_used: Option<Timestamp>,
    sent_bytes: u64,
    received_bytes: u64,
    /// It stands in no view any more.
    retired: bool,
}

impl<K: LocalKey> PeerState<K> {
    /// A peer of which only the keys are known.
    #[must_use]
    pub fn new(prefix: PeerPrefix, keys: Keys<K>, room: Arc<Room>) -> Self {
        Self {
            keys,
            sessions: Sessions::new(prefix),
            endpoints: Endpoints::default(),
            queue: Queue::new(room),
            handshakes: Bucket::default(),
            incarnation: 0,
            initiated: None,
            tries: 0,
            wanted: false,
            last_used: None,
            sent_bytes: 0,
            received_bytes: 0,
            retired: false,
        }
    }

    /// Takes the keys of a new view. Sessions between keys that stay are carried over, those of others end at once; another first key of
    /// either end, or another pre-shared key, makes a new session before the old one is given up.
    pub fn set_keys(&mut self, keys: Keys<K>) {
        self.sessions.keep_only(&keys.locals, &keys.remotes);
        if self.keys.psk_generation != keys.psk_generation {
            self.sessions.supersede();
            self.wanted |= !self.sessions.is_empty();
        }
        let first = |keys: &Keys<K>| Some((*keys.locals.first()?.public(), *keys.remotes.first()?));
        if let Some((local, remote)) = first(&keys)
            && first(&self.keys) != Some((local, remote))
        {
            self.wanted |= self.sessions.prefer(&local, &remote);
        }
        self.keys = keys;
    }

    /// Takes a hint of the peer's incarnation. A higher one has begun anew, perhaps with an earlier clock, which the present session would
    /// refuse; so its next initiation meets a new session.
    pub fn set_incarnation(&mut self, incarnation: u64) {
        if incarnation > self.incarnation {
            if self.incarnation > 0 {
                self.sessions.supersede();
            }
            self.incarnation = incarnation;
        }
    }

    /// Has a handshake begin at the next opportunity, whatever session there is.
    pub const fn want_handshake(&mut self) {
        self.wanted = true;
        self.tries = 0;
    }

    /// Ends the peer: no session, and nothing is accepted for it.
    pub fn retire(&mut self) {
        self.retired = true;
        self.sessions.keep_only(&[], &[]);
    }

    /// Whether it stands in no view any more.
    #[must_use]
    pub const fn is_retired(&self) -> bool {
        self.retired
    }

    /// Whether data can be sealed now.
    pub fn is_live(&mut self, now: Timestamp) -> bool {
        self.sessions.age(now).is_some()
    }

    /// Whether time has nothing to do here.
    #[must_use]
    pub fn is_idle(&self, now: Timestamp) -> bool {
        self.retired || (self.sessions.is_empty() && self.queue.is_empty() && !self.wanted && !self.is_warm(now))
    }

    /// Opens an initiation to our key `local` by the static key `remote`; `None` if that is no pair of keys in use.
    pub fn accept(
        &mut self,
        local: &Arc<K>,
        remote: &WgPublicKey,
        datagram: &Datagram<'_>,
        out: &mut [u8],
        now: Timestamp,
    ) -> Option<Opened> {
        if self.retired || !self.keys.remotes.contains(remote) {
            return None;
        }
        let ends = Ends {
            local,
            remote,
            psk: self.keys.psk.as_ref(),
        };
        Some(self.sessions.accept(ends, datagram, out, now))
    }

    /// Whether the pace allows an initiation, and there is somewhere to send it.
    #[must_use]
    pub fn may_initiate(&self, now: Timestamp) -> bool {
        let first_rounds = self.tries < self.endpoints.known().saturating_mul(2).max(1);
        let pace = if first_rounds { MIN_PACE } else { REKEY_TIMEOUT };
        let somewhere = self.endpoints.known() > 0;
        !self.retired && somewhere && self.initiated.is_none_or(|last| now.since(last) >= pace)
    }

    /// Writes an initiation for the next endpoint, if the pace allows one and there is an endpoint.
    pub fn initiate(&mut self, out: &mut [u8], now: Timestamp) -> Option<(usize, Endpoint)> {
        if !self.may_initiate(now) {
            return None;
        }
        let rounds = self.tries.checked_div(self.endpoints.known())?;
        let remote = *self.keys.remotes.get(rounds.checked_rem(self.keys.remotes.len())?)?;
        let later = rounds.checked_div(self.keys.remotes.len())?;
        let local = self.keys.locals.get(later.checked_rem(self.keys.locals.len())?)?;
        let ends = Ends {
            local,
            remote: &remote,
            psk: self.keys.psk.as_ref(),
        };
        let len = self.sessions.initiate(ends, out, now)?;
        let endpoint = self.note_initiation(now)?;
        Some((len, endpoint))
    }

    /// Counts an initiation against the pace; where it goes.
    pub fn note_initiation(&mut self, now: Timestamp) -> Option<Endpoint> {
        (self.initiated, self.tries, self.wanted) = (Some(now), self.tries.saturating_add(1), false);
        self.endpoints.next_target()
    }

    /// Takes note of an authentic, fresh message; whether the endpoint is another one.
    pub fn heard(&mut self, from: SocketAddr, to: Option<IpAddr>) -> bool {
        self.tries = 0;
        self.endpoints.roam(from, to)
    }

    /// Counts an inner packet that was sent.
    pub fn note_sent(&mut self, bytes: usize, now: Timestamp) {
        self.last_used = Some(now);
        self.sent_bytes = self.sent_bytes.wrapping_add(u64::try_from(bytes).unwrap_or_default());
    }

    /// Counts an inner packet that was received.
    pub fn note_received(&mut self, bytes: usize, now: Timestamp) {
        self.last_used = Some(now);
        self.received_bytes = self.received_bytes.wrapping_add(u64::try_from(bytes).unwrap_or_default());
    }

    /// Whether a handshake is due: something waits or asks for it, or a session in use is old or has ended.
    pub fn is_handshake_due(&mut self, now: Timestamp) -> bool {
        let due = match self.sessions.age(now) {
            None => !self.queue.is_empty() || self.is_warm(now),
            Some((age, ours)) => {
                let limit = if ours { REKEY_AFTER_TIME } else { LATE_REKEY };
                (age >= limit && self.is_warm(now)) || self.sessions.is_superseded(now)
            }
        };
        due || self.wanted
    }

    /// What `status` shows.
    pub fn status(&mut self, host: HostId, now: Timestamp) -> PeerStatus {
        PeerStatus {
            host,
            endpoint: self.endpoints.current(),
            session_age: self.sessions.age(now).map(|(age, _)| age),
            round_trip: self.sessions.round_trip(),
            sent_bytes: self.sent_bytes,
            received_bytes: self.received_bytes,
            waiting: self.queue.len(),
            last_used: self.last_used,
        }
    }

    fn is_warm(&self, now: Timestamp) -> bool {
        self.last_used.is_some_and(|last| now.since(last) < KEEP_WARM)
    }
}
