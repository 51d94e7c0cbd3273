//! Counters of packets, by direction and drop reason (I8): received = delivered + dropped + queued. Answers made here are counted apart.
//!
//! Each worker counts in a [`Stats`] of its own, so that no two processors write to one cache line; whoever wants to know takes a
//! [`Snapshot`] of each and adds them up. Counters only grow, and are relaxed: a snapshot taken while packets pass may be off by those.

use std::ops::AddAssign;
use std::sync::atomic::{AtomicU64, Ordering};

use cloison_proto::verdict::DropReason;

use crate::packet::Direction;

/// How many reasons there are.
const REASONS: usize = DropReason::ALL.len();

/// The counters of one worker.
#[derive(Debug, Default)]
pub struct Stats {
    outbound: Counters,
    inbound: Counters,
}

impl Stats {
    /// Counts packets that came in: from a TUN (outbound), or datagrams from the mesh (inbound).
    pub fn received(&self, direction: Direction, packets: u64) {
        add(&self.of(direction).received, packets);
    }

    /// Counts packets that went on: sealed for a peer (outbound), or handed to a TUN (inbound). A datagram that is a message of the session
    /// layer itself, such as a handshake, is delivered when that layer has taken it.
    pub fn delivered(&self, direction: Direction, packets: u64) {
        add(&self.of(direction).delivered, packets);
    }

    /// Counts packets dropped for this reason.
    pub fn dropped(&self, direction: Direction, reason: DropReason, packets: u64) {
        if let Some(counter) = self.of(direction).dropped.get(reason.index()) {
            add(counter, packets);
        }
    }

    /// Counts packets that began to wait for a handshake.
    pub fn queued(&self, direction: Direction, packets: u64) {
        add(&self.of(direction).queued, packets);
    }

    /// Counts packets that wait no longer; each is then counted as delivered or dropped.
    pub fn unqueued(&self, direction: Direction, packets: u64) {
        add(&self.of(direction).unqueued, packets);
    }

    /// Counts answers made here to packets of this direction.
    pub fn answered(&self, direction: Direction, packets: u64) {
        add(&self.of(direction).answered, packets);
    }

    /// What has been counted so far.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            outbound: self.outbound.totals(),
            inbound: self.inbound.totals(),
        }
    }

    const fn of(&self, direction: Direction) -> &Counters {
        match direction {
            Direction::Outbound => &self.outbound,
            Direction::Inbound => &self.inbound,
        }
    }
}

/// What the workers counted, by direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Snapshot {
    /// From TUNs to the mesh.
    pub outbound: Totals,
    /// From the mesh to TUNs.
    pub inbound: Totals,
}

impl Snapshot {
    /// What was counted in this direction.
    #[must_use]
    pub const fn of(&self, direction: Direction) -> &Totals {
        match direction {
            Direction::Outbound => &self.outbound,
            Direction::Inbound => &self.inbound,
        }
    }
}

impl AddAssign for Snapshot {
    fn add_assign(&mut self, other: Self) {
        self.outbound += other.outbound;
        self.inbound += other.inbound;
    }
}

/// What was counted in one direction, in packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Totals {
    /// Packets that came in.
    pub received: u64,
    /// Packets that went on.
    pub delivered: u64,
    /// Packets that ever began to wait.
    pub queued: u64,
    /// Packets that wait no longer.
    pub unqueued: u64,
    /// Answers made here.
    pub answered: u64,
    dropped: [u64; REASONS],
}

impl Totals {
    /// Packets dropped for this reason.
    #[must_use]
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.dropped.get(reason.index()).copied().unwrap_or(0)
    }

    /// Every reason with its count, in the order of the reasons.
    pub fn drops(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.iter().copied().zip(self.dropped)
    }

    /// Packets dropped for any reason.
    #[must_use]
    pub fn dropped_in_all(&self) -> u64 {
        self.dropped.iter().sum()
    }

    /// Packets that wait.
    #[must_use]
    pub const fn waiting(&self) -> u64 {
        self.queued.saturating_sub(self.unqueued)
    }

    /// Whether every packet received is accounted for (I8); meant for moments at which no packet is under way.
    #[must_use]
    pub fn balances(&self) -> bool {
        self.received == self.delivered + self.dropped_in_all() + self.waiting()
    }
}

impl Default for Totals {
    fn default() -> Self {
        Self {
            received: 0,
            delivered: 0,
            queued: 0,
            unqueued: 0,
            answered: 0,
            dropped: [0; REASONS],
        }
    }
}

impl AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        self.received += other.received;
        self.delivered += other.delivered;
        self.queued += other.queued;
        self.unqueued += other.unqueued;
        self.answered += other.answered;
        for (to, from) in self.dropped.iter_mut().zip(other.dropped) {
            *to += from;
        }
    }
}

/// Aligned so that no two directions, nor two workers, share a cache line (two lines: the next one is fetched with each).
#[derive(Debug)]
#[repr(align(128))]
struct Counters {
    received: AtomicU64,
    delivered: AtomicU64,
    queued: AtomicU64,
    unqueued: AtomicU64,
    answered: AtomicU64,
    dropped: [AtomicU64; REASONS],
}

impl Counters {
    fn totals(&self) -> Totals {
        // What left is read before what came, so that a packet under way is never seen to leave without having come.
        let dropped = self.dropped.each_ref().map(read);
        Totals {
            answered: read(&self.answered),
            delivered: read(&self.delivered),
            unqueued: read(&self.unqueued),
            queued: read(&self.queued),
            received: read(&self.received),
            dropped,
        }
    }
}

impl Default for Counters {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            received: zero(),
            delivered: zero(),
            queued: zero(),
            unqueued: zero(),
            answered: zero(),
            dropped: std::array::from_fn(|_| zero()),
        }
    }
}

fn add(counter: &AtomicU64, packets: u64) {
    counter.fetch_add(packets, Ordering::Relaxed);
}

fn read(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_packet_is_accounted_for_once() {
        let stats = Stats::default();
        let out = Direction::Outbound;
        stats.received(out, 5);
        stats.delivered(out, 1);
        stats.dropped(out, DropReason::NoRule, 2);
        stats.queued(out, 2);
        assert!(stats.snapshot().outbound.balances());
        stats.unqueued(out, 1);
        assert!(!stats.snapshot().outbound.balances(), "neither delivered nor dropped");
        stats.dropped(out, DropReason::HandshakeTimeout, 1);
        stats.answered(out, 9);
        let totals = stats.snapshot().outbound;
        assert!(totals.balances());
        assert_eq!((totals.waiting(), totals.dropped_in_all(), totals.answered), (1, 3, 9));
        assert_eq!(totals.dropped(DropReason::NoRule), 2);
        assert_eq!(stats.snapshot().inbound, Totals::default());
    }

    #[test]
    fn each_reason_has_a_counter_of_its_own() {
        let stats = Stats::default();
        for (position, reason) in (1..).zip(DropReason::ALL) {
            stats.dropped(Direction::Inbound, *reason, position);
        }
        let counted: Vec<_> = stats.snapshot().inbound.drops().map(|(_, count)| count).collect();
        assert_eq!(counted, (1..).take(REASONS).collect::<Vec<u64>>());
    }

    #[test]
    fn snapshots_of_workers_add_up() {
        let (one, two) = (Stats::default(), Stats::default());
        one.received(Direction::Inbound, 3);
        two.received(Direction::Inbound, 4);
        two.dropped(Direction::Inbound, DropReason::Replay, 4);
        let mut sum = one.snapshot();
        sum += two.snapshot();
        assert_eq!(
            (sum.inbound.received, sum.of(Direction::Inbound).dropped(DropReason::Replay)),
            (7, 4)
        );
    }
}
