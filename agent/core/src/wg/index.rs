//! Session indices: 24 bits on the wire in front of the 8 that the session itself counts through.
//!
//! An index tells an observer nothing about how many peers there are or in which order they came: each peer gets a random prefix of 20
//! bits, and its sessions number themselves in the remaining four. So a received index leads to the peer by one look-up in a table that
//! changes only when a view is installed, while sessions come and go.

use std::fmt;

use foldhash::fast::FixedState;
use std::hash::BuildHasher as _;

/// Sessions that one peer may have at a time, old and new and of several key pairs.
pub const SLOTS: u8 = 16;

/// Bits of an index that name the session within its peer.
const SLOT_BITS: u32 = 4;
/// Bits of an index that name the peer.
const PEER_BITS: u32 = 20;

/// The part of an index that all sessions of one peer share: 20 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PeerPrefix(u32);

/// The 24-bit index of one session.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionIndex(u32);

impl PeerPrefix {
    /// The index of this peer's session number `slot`, counted modulo [`SLOTS`].
    #[must_use]
    pub const fn slot(self, slot: u8) -> SessionIndex {
        // A widening that is const, unlike `u32::from`.
        let slot = u32::from_le_bytes([slot % SLOTS, 0, 0, 0]);
        SessionIndex(self.0 << SLOT_BITS | slot)
    }
}

impl SessionIndex {
    /// The session that a receiver field names.
    #[must_use]
    pub const fn of_receiver(receiver: u32) -> Self {
        Self(receiver >> 8)
    }

    /// The peer that the session belongs to.
    #[must_use]
    pub const fn peer(self) -> PeerPrefix {
        PeerPrefix(self.0 >> SLOT_BITS)
    }

    /// The 24 bits.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Debug for SessionIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:06x}", self.0)
    }
}

/// Draws prefixes, the same ones for the same seed.
#[derive(Debug)]
pub struct Prefixes {
    state: FixedState,
    drawn: u64,
}

impl Prefixes {
    /// A sequence that depends on `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            state: FixedState::with_seed(seed),
            drawn: 0,
        }
    }

    /// The next prefix for which `taken` says no. With 16,384 of 1,048,576 in use, one draw in 64 is repeated. `None` when many draws in
    /// a row were taken: then the table is full.
    pub fn draw(&mut self, taken: impl Fn(PeerPrefix) -> bool) -> Option<PeerPrefix> {
        std::iter::repeat_with(|| self.next()).take(256).find(|prefix| !taken(*prefix))
    }

    fn next(&mut self) -> PeerPrefix {
        self.drawn = self.drawn.wrapping_add(1);
        let bits = self.state.hash_one(self.drawn) >> (u64::BITS - PEER_BITS);
        PeerPrefix(u32::try_from(bits).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn an_index_leads_back_to_its_peer() {
        let mut prefixes = Prefixes::new(7);
        for slot in 0..SLOTS {
            let prefix = prefixes.draw(|_| false);
            assert_eq!(prefix.map(|p| p.slot(slot).peer()), prefix);
            assert!(prefix.is_some_and(|p| p.slot(slot).get() < 1 << 24));
            assert_eq!(
                prefix.map(|p| SessionIndex::of_receiver(p.slot(slot).get() << 8 | 0xab)),
                prefix.map(|p| p.slot(slot))
            );
        }
    }

    #[test]
    fn prefixes_are_never_given_twice_and_the_draw_ends() {
        let mut prefixes = Prefixes::new(1);
        let mut taken = BTreeSet::new();
        for _ in 0..16_384 {
            let prefix = prefixes.draw(|p| taken.contains(&p));
            assert!(prefix.is_some_and(|p| taken.insert(p)));
        }
        assert_eq!(prefixes.draw(|_| true), None);
    }

    #[test]
    fn another_seed_draws_others() {
        let draw = |seed| Prefixes::new(seed).draw(|_| false);
        assert_ne!(draw(1), draw(2));
        assert_eq!(draw(1), draw(1));
    }
}
