//! Packets that wait for the handshake with their peer. They are judged again when they are sealed, so that a rule withdrawn meanwhile
//! holds for them too (I6).
//!
//! A peer's queue takes 128 packets, and one instance half of them, so that it cannot keep the others of its host from the peer; all
//! queues together take no more than their common budget (I9). What waits too long is dropped: its sender has tried again by then.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cloison_proto::version::Timestamp;

use crate::TunId;

/// Packets that wait for one peer (DESIGN: limits).
pub const MAX_PER_PEER: usize = 128;
/// Packets of one source address that wait for one peer.
pub const MAX_PER_SOURCE: usize = MAX_PER_PEER / 2;
/// Packets that wait on this host: 12 MiB at the usual MTU.
pub const MAX_PER_HOST: usize = 8_192;
/// How long a packet waits: two tries of a handshake.
pub const MAX_WAIT: Duration = Duration::from_secs(10);

/// One packet that waits.
#[derive(Debug)]
pub struct Waiting {
    /// The packet, as its TUN gave it.
    pub packet: Box<[u8]>,
    /// Its source address, for the share of one source.
    pub source: IpAddr,
    /// The TUN it came from, for judging it again.
    pub tun: TunId,
    /// When it came.
    pub since: Timestamp,
}

/// How many packets wait on this host.
#[derive(Debug, Default)]
pub struct Room(AtomicUsize);

impl Room {
    /// How many packets wait now.
    #[must_use]
    pub fn taken(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    fn take(&self) -> bool {
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
                (n < MAX_PER_HOST).then(|| n.saturating_add(1))
            })
            .is_ok()
    }

    fn free(&self, packets: usize) {
        self.0.fetch_sub(packets, Ordering::Relaxed);
    }
}

/// What waits for one peer, in the order in which it came.
#[derive(Debug)]
pub struct Queue {
    packets: VecDeque<Waiting>,
    room: Arc<Room>,
}

impl Queue {
    /// An empty queue that counts against `room`.
    #[must_use]
    pub const fn new(room: Arc<Room>) -> Self {
        Self {
            packets: VecDeque::new(),
            room,
        }
    }

    /// Appends a packet unless the queue, its source's share of it, or the host's room is full; whether it was taken.
    pub fn push(&mut self, packet: &[u8], source: IpAddr, tun: TunId, now: Timestamp) -> bool {
        let of_source = self.packets.iter().filter(|w| w.source == source).count();
        if self.packets.len() >= MAX_PER_PEER || of_source >= MAX_PER_SOURCE || !self.room.take() {
            return false;
        }
        self.packets.push_back(Waiting {
            packet: packet.into(),
            source,
            tun,
            since: now,
        });
        true
    }

    /// Takes out the packet that came first.
    pub fn pop(&mut self) -> Option<Waiting> {
        let first = self.packets.pop_front()?;
        self.room.free(1);
        Some(first)
    }

    /// Takes out the first packet if it has waited for [`MAX_WAIT`].
    pub fn pop_overdue(&mut self, now: Timestamp) -> Option<Waiting> {
        let overdue = self.packets.front().is_some_and(|first| now.since(first.since) >= MAX_WAIT);
        if overdue { self.pop() } else { None }
    }

    /// Moves all packets of `other` to the end of this queue, as far as there is room; how many there was no room for.
    pub fn append(&mut self, other: &mut Self) -> usize {
        let room = MAX_PER_PEER.saturating_sub(self.packets.len());
        let lost = other.packets.len().saturating_sub(room);
        other.packets.truncate(room);
        other.room.free(lost);
        self.packets.append(&mut other.packets);
        lost
    }

    /// How many packets wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.packets.len()
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.room.free(self.packets.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(5);

    fn source(n: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, n])
    }

    #[test]
    fn a_queue_holds_128_and_half_of_one_source() {
        let mut queue = Queue::new(Arc::default());
        let taken = |queue: &mut Queue, n| (0..200).filter(|_| queue.push(&[1], source(n), TunId(0), NOW)).count();
        assert_eq!(taken(&mut queue, 1), 64);
        assert_eq!(taken(&mut queue, 2), 64);
        assert_eq!(taken(&mut queue, 3), 0);
        assert_eq!(queue.len(), MAX_PER_PEER);
    }

    #[test]
    fn the_host_has_room_for_so_many_and_gets_it_back() {
        let room = Arc::new(Room::default());
        let mut queues: Vec<_> = (0..200).map(|_| Queue::new(room.clone())).collect();
        let mut taken = 0;
        for queue in &mut queues {
            taken += (0..64).filter(|_| queue.push(&[1], source(1), TunId(0), NOW)).count();
        }
        assert_eq!((taken, room.taken()), (MAX_PER_HOST, MAX_PER_HOST));
        assert!(queues.first_mut().and_then(Queue::pop).is_some());
        assert_eq!(room.taken(), MAX_PER_HOST - 1);
        queues.clear();
        assert_eq!(room.taken(), 0);
    }

    #[test]
    fn packets_leave_in_order_or_when_they_are_overdue() {
        let mut queue = Queue::new(Arc::default());
        for n in 1..=3 {
            assert!(queue.push(&[n], source(1), TunId(4), Timestamp(u64::from(n))));
        }
        let first = Timestamp(1) + MAX_WAIT;
        assert_eq!(queue.pop_overdue(first).map(|w| w.packet), Some(Box::from([1])));
        assert!(queue.pop_overdue(first).is_none());
        assert_eq!(queue.pop().map(|w| (w.packet, w.tun)), Some((Box::from([2]), TunId(4))));
    }

    #[test]
    fn queues_are_joined_within_the_limit() {
        let room = Arc::new(Room::default());
        let (mut one, mut two) = (Queue::new(room.clone()), Queue::new(room.clone()));
        for n in 0..MAX_PER_PEER {
            let from = source(if n % 2 == 0 { 1 } else { 2 });
            assert!(two.push(&[1], from, TunId(0), NOW));
        }
        assert!(one.push(&[1], source(1), TunId(0), NOW));
        assert_eq!(one.append(&mut two), 1);
        assert_eq!((one.len(), two.len(), room.taken()), (MAX_PER_PEER, 0, MAX_PER_PEER));
    }
}
