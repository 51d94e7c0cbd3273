//! The sessions of one peer: usually one, more while keys change.
//!
//! Each is between one of our keys and one of the peer's. Data is sealed by the one whose keys were agreed last, so that a new session
//! takes over when it is ready and not before; the old one goes on receiving until it expires.

use std::sync::Arc;
use std::time::Duration;

use cloison_proto::key::{Secret32, WgPublicKey};
use cloison_proto::verdict::DropReason;
use cloison_proto::version::Timestamp;

use crate::wg::index::{PeerPrefix, SLOTS};
use crate::wg::{Datagram, LocalKey, Opened, Sealed, Session, SessionIndex, Ticked};

/// Sessions of one peer at a time: two keys on either side, each with one session to replace. The one whose last handshake is longest ago makes room (I9).
const MAX_SESSIONS: usize = 8;

/// The sessions of one peer.
pub struct Sessions<K: LocalKey> {
    prefix: PeerPrefix,
    /// The one that last took part in a handshake is the last.
    slots: Vec<Slot<K>>,
    /// The number of the next one.
    next: u8,
}

struct Slot<K: LocalKey> {
    index: SessionIndex,
    local: Arc<K>,
    remote: WgPublicKey,
    /// To be replaced by a session with a fresh start: used while it lasts, never for another handshake.
    superseded: bool,
    session: K::Session,
}

/// Both ends of a session and what they share.
#[derive(Clone, Copy)]
pub struct Ends<'a, K> {
    /// Our key.
    pub local: &'a Arc<K>,
    /// The peer's.
    pub remote: &'a WgPublicKey,
    /// Their pre-shared key.
    pub psk: Option<&'a Secret32>,
}

impl<K: LocalKey> Sessions<K> {
    /// No sessions, whose indices will begin with `prefix`.
    #[must_use]
    pub const fn new(prefix: PeerPrefix) -> Self {
        Self {
            prefix,
            slots: Vec::new(),
            next: 0,
        }
    }

    /// Seals by the session whose keys were agreed last.
    pub fn seal(&mut self, inner: &[u8], out: &mut [u8], now: Timestamp) -> Sealed {
        match self.newest(now) {
            Some((slot, _)) => slot.session.seal(inner, out, now),
            None => Sealed::NoSession,
        }
    }

    /// Opens a datagram that names the session `index`.
    pub fn open(&mut self, index: SessionIndex, datagram: &Datagram<'_>, out: &mut [u8], now: Timestamp) -> Opened {
        match self.slots.iter_mut().find(|slot| slot.index == index) {
            Some(slot) => slot.session.open(datagram, out, now),
            None => Opened::Refused(DropReason::UnknownSession),
        }
    }

    /// Opens an initiation between these ends.
    pub fn accept(&mut self, ends: Ends<'_, K>, datagram: &Datagram<'_>, out: &mut [u8], now: Timestamp) -> Opened {
        self.between(ends).session.open(datagram, out, now)
    }

    /// Writes an initiation between these ends.
    pub fn initiate(&mut self, ends: Ends<'_, K>, out: &mut [u8], now: Timestamp) -> Option<usize> {
        self.between(ends).session.initiate(out, now)
    }

    /// Lets time pass for the session at `position`; `None` beyond the last.
    pub fn tick(&mut self, position: usize, out: &mut [u8], now: Timestamp) -> Option<Ticked> {
        let slot = self.slots.get_mut(position)?;
        let ticked = slot.session.tick(out, now);
        // A session that is to be replaced does not renew itself: it would be the newest again.
        let renews = matches!(ticked, Ticked::Initiation(_)) && slot.superseded;
        Some(if renews { Ticked::Quiet } else { ticked })
    }

    /// Drops the session at `position`.
    pub fn drop_at(&mut self, position: usize) {
        if position < self.slots.len() {
            self.slots.remove(position);
        }
    }

    /// Drops the sessions whose ends are not both among these.
    pub fn keep_only(&mut self, locals: &[Arc<K>], remotes: &[WgPublicKey]) {
        let known = |slot: &Slot<K>| locals.iter().any(|local| local.public() == slot.local.public()) && remotes.contains(&slot.remote);
        self.slots.retain(known);
    }

    /// Has the next handshake begin with a new session; the present ones are used until it is ready.
    pub fn supersede(&mut self) {
        self.slots.iter_mut().for_each(|slot| slot.superseded = true);
    }

    /// Has the next handshake be between these ends: sessions between others are used until it is done, and not renewed. Whether there are
    /// any such.
    pub fn prefer(&mut self, local: &WgPublicKey, remote: &WgPublicKey) -> bool {
        let others = self
            .slots
            .iter_mut()
            .filter(|slot| slot.local.public() != local || slot.remote != *remote);
        others.map(|slot| slot.superseded = true).count() > 0
    }

    /// The age of the keys in use, and whether ours is the end that renews them first: the one with the smaller key.
    pub fn age(&mut self, now: Timestamp) -> Option<(Duration, bool)> {
        let (slot, agreed) = self.newest(now)?;
        Some((now.since(agreed), *slot.local.public() < slot.remote))
    }

    /// Whether the session that is used is to be replaced by a new one.
    pub fn is_superseded(&mut self, now: Timestamp) -> bool {
        self.newest(now).is_some_and(|(slot, _)| slot.superseded)
    }

    /// How long the last answered initiation took.
    #[must_use]
    pub fn round_trip(&self) -> Option<Duration> {
        self.slots.iter().rev().find_map(|slot| slot.session.round_trip())
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    fn newest(&mut self, now: Timestamp) -> Option<(&mut Slot<K>, Timestamp)> {
        let live = self.slots.iter_mut().filter_map(|slot| {
            let agreed = slot.session.established(now)?;
            Some((slot, agreed))
        });
        live.max_by_key(|(_, agreed)| *agreed)
    }

    /// The session between these ends that handshakes go to; a new one if there is none.
    fn between(&mut self, ends: Ends<'_, K>) -> &mut Slot<K> {
        let fits = |slot: &Slot<K>| !slot.superseded && slot.local.public() == ends.local.public() && slot.remote == *ends.remote;
        let slot = match self.slots.iter().position(fits) {
            Some(position) => self.slots.remove(position),
            None => self.begin(ends),
        };
        self.slots.push_mut(slot)
    }

    fn begin(&mut self, ends: Ends<'_, K>) -> Slot<K> {
        if self.slots.len() >= MAX_SESSIONS {
            self.slots.remove(0);
        }
        while self.slots.iter().any(|slot| slot.index == self.prefix.slot(self.next)) {
            self.next = self.next.wrapping_add(1) % SLOTS;
        }
        let index = self.prefix.slot(self.next);
        self.next = self.next.wrapping_add(1) % SLOTS;
        let session = ends.local.session(ends.remote, ends.psk, index);
        Slot {
            index,
            local: ends.local.clone(),
            remote: *ends.remote,
            superseded: false,
            session,
        }
    }
}
