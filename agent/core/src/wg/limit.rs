//! The handshake budget: how many handshake messages are worked on, from whom.
//!
//! A response to an initiation costs some 200 µs, and its sender may be anybody who knows this host's public key. So every message passes
//! three gates, in this order: mac1 (cheap; a stranger's message ends here and drains nothing), then its source's bucket and the common
//! one. While both have room, nothing more is asked. Beyond, the sender must also prove its address (mac2): who floods brings this upon its
//! own source alone, who forges another's source cannot lock it out, and a flood from many sources costs the honest one round trip. What is
//! proven has its own buckets, which nobody else can drain. A message that was accepted also counts against its peer; one that only names
//! the peer does not, for anybody can send a recorded initiation again, and would keep the peer out.
//!
//! Buckets are kept as one moment each (GCRA): the time at which it would be full again.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use cloison_proto::version::Timestamp;
use foldhash::fast::FixedState;
use hashbrown::HashMap;

use super::Proof;

/// Messages a second of one source, and how many at once: the kernel's numbers (`drivers/net/wireguard/ratelimiter.c`).
const SOURCE: Rate = Rate::new(20, 5);
/// Messages a second of all sources without a proof of address: a quarter of a core is lost to strangers at most.
const UNPROVEN: Rate = Rate::new(1_000, 200);
/// Messages a second of all sources with proof.
const PROVEN: Rate = Rate::new(2_000, 400);
/// Messages a second of one peer, however many addresses it has.
const PEER: Rate = Rate::new(20, 10);
/// Sources remembered at a time, of each kind (I9). One that is not remembered has a full bucket.
const MAX_SOURCES: usize = 8_192;

/// A full table is searched for full buckets this often: an empty bucket is full again after that time, and a flood from forged sources
/// must not have the whole table walked for each message.
const PURGE: Duration = Duration::from_millis(250);

/// So many a second, so many at once.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    interval: Duration,
    tolerance: Duration,
}

impl Rate {
    /// `per_second` (1 or more), of which `burst` may come at the same moment.
    #[must_use]
    pub const fn new(per_second: u32, burst: u32) -> Self {
        let per_second = if per_second == 0 { 1 } else { per_second };
        // Checked division cannot fail: the divisor is one or more.
        let interval = match Duration::from_secs(1).checked_div(per_second) {
            Some(interval) => interval,
            None => Duration::from_secs(1),
        };
        Self {
            interval,
            tolerance: interval.saturating_mul(burst.saturating_sub(1)),
        }
    }
}

/// One bucket: the moment at which it is full again.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bucket(Timestamp);

impl Bucket {
    /// Whether there is room at `now`; if so, takes it.
    pub fn take(&mut self, rate: Rate, now: Timestamp) -> bool {
        let has_room = self.has_room(rate, now);
        if has_room {
            self.0 = self.0.max(now) + rate.interval;
        }
        has_room
    }

    /// Whether a handshake message that names this bucket's peer may be worked on.
    #[must_use]
    pub fn admits_handshake(&self, now: Timestamp) -> bool {
        self.has_room(PEER, now)
    }

    /// Counts a handshake message that this bucket's peer did send.
    pub fn count_handshake(&mut self, now: Timestamp) {
        self.take(PEER, now);
    }

    fn has_room(self, rate: Rate, now: Timestamp) -> bool {
        self.0 <= now + rate.tolerance
    }

    fn is_full(self, now: Timestamp) -> bool {
        self.0 <= now
    }
}

/// The budget of all handshake messages from the underlay.
#[derive(Debug)]
pub struct Budget {
    unproven: Bucket,
    proven: Bucket,
    unproven_sources: Sources,
    proven_sources: Sources,
}

impl Budget {
    /// A full budget; `seed` keeps the table's order from strangers.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            unproven: Bucket::default(),
            proven: Bucket::default(),
            unproven_sources: Sources::new(seed),
            proven_sources: Sources::new(seed.rotate_left(32)),
        }
    }

    /// What a message from `source`, whose mac1 was right, must prove.
    pub fn demand(&mut self, source: IpAddr, now: Timestamp) -> Proof {
        if self.unproven_sources.take(source, now) && self.unproven.take(UNPROVEN, now) {
            Proof::Key
        } else {
            Proof::Address
        }
    }

    /// Whether a message whose address is proven may be worked on.
    pub fn admit_proven(&mut self, source: IpAddr, now: Timestamp) -> bool {
        self.proven_sources.take(source, now) && self.proven.take(PROVEN, now)
    }
}

/// Buckets by source: an IPv4 address, or an IPv6 /64.
#[derive(Debug)]
struct Sources {
    buckets: HashMap<IpAddr, Bucket, FixedState>,
    /// When full buckets were last looked for.
    purged: Timestamp,
}

impl Sources {
    fn new(seed: u64) -> Self {
        Self {
            buckets: HashMap::with_hasher(FixedState::with_seed(seed)),
            purged: Timestamp::default(),
        }
    }

    fn take(&mut self, source: IpAddr, now: Timestamp) -> bool {
        let source = network(source);
        if let Some(bucket) = self.buckets.get_mut(&source) {
            return bucket.take(SOURCE, now);
        }
        if self.buckets.len() >= MAX_SOURCES && now.since(self.purged) >= PURGE {
            self.purged = now;
            self.buckets.retain(|_, bucket| !bucket.is_full(now));
        }
        if self.buckets.len() >= MAX_SOURCES {
            return false;
        }
        self.buckets.entry(source).or_default().take(SOURCE, now)
    }
}

/// What one sender can be assumed to hold whole: the address, or its /64.
fn network(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V4(v4) => IpAddr::V4(v4),
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from(u128::from(v6) >> 64 << 64)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Timestamp = Timestamp(1_000_000_000_000);

    fn source(n: u32) -> IpAddr {
        IpAddr::V4(n.into())
    }

    #[test]
    fn a_source_has_a_burst_of_five_and_twenty_a_second() {
        let mut budget = Budget::new(1);
        let at_once = (0..10).filter(|_| budget.demand(source(1), START) == Proof::Key).count();
        assert_eq!(at_once, 5);
        let later = (1..=100u32)
            .filter(|n| budget.demand(source(1), START + Duration::from_millis(10) * *n) == Proof::Key)
            .count();
        assert_eq!(later, 20);
    }

    #[test]
    fn who_floods_must_prove_its_own_address_only() {
        let mut budget = Budget::new(1);
        assert!((0..100).any(|_| budget.demand(source(1), START) == Proof::Address));
        assert_eq!(budget.demand(source(2), START), Proof::Key);
        assert!(budget.admit_proven(source(1), START), "a forged source does not lock its owner out");
    }

    #[test]
    fn an_ipv6_network_is_one_source() {
        let mut budget = Budget::new(1);
        let addresses = (1..=6u16).map(|n| IpAddr::from([0x2001, 0xdb8, 0, 1, 0, 0, 0, n]));
        let passed = addresses.filter(|a| budget.demand(*a, START) == Proof::Key).count();
        assert_eq!(passed, 5);
        assert_eq!(budget.demand(IpAddr::from([0x2001, 0xdb8, 0, 2, 0, 0, 0, 1]), START), Proof::Key);
    }

    #[test]
    fn handshakes_that_are_spaced_never_see_a_cookie() {
        let mut budget = Budget::new(1);
        for n in 0..10_000u32 {
            assert_eq!(budget.demand(source(1), START + Duration::from_millis(50) * n), Proof::Key);
        }
    }

    #[test]
    fn the_table_is_bounded_and_recovers() {
        let mut budget = Budget::new(1);
        for n in 0..100_000 {
            budget.demand(source(n), START);
        }
        assert!(budget.unproven_sources.buckets.len() <= MAX_SOURCES);
        assert_eq!(budget.demand(source(200_000), START), Proof::Address);
        assert_eq!(budget.demand(source(200_000), START + Duration::from_secs(1)), Proof::Key);
    }
}
