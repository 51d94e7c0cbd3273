//! What each packet worker owns: its view of the engine for one batch, its counters, and the slabs that results are written to.
//!
//! A worker's batch: [`Worker::begin`] -> packets and datagrams into the engine -> the results out of [`Worker::udp`] and [`Worker::tun`]
//! to the kernel -> [`Worker::clear`] -> [`Worker::end`], and then it may sleep. Results that were not sent before `end` may have been
//! judged by a view that is no longer in force (I6); so `end` throws them away.
//!
//! A thread that stops working must drop its worker or end its batch: an install waits for both.
//!
//! Nothing here is allocated per packet, and a slab never grows: when [`Worker::has_room`] says no, the results are to be sent first.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use cloison_proto::net::Protocol;
use cloison_proto::verdict::DropReason;

use crate::TunId;
use crate::engine::{Engine, Snapshot};
use crate::packet::{Direction, Parsed};
use crate::path_policy::PathPolicy;
use crate::stats::Stats;
use crate::wg::{LocalKey, OVERHEAD};
use crate::witness::Witness;

/// The largest inner packet in bytes: what an IPv4 header can state.
const MAX_PACKET: usize = 65_535;
/// Bytes in a slab: a batch of datagrams, and what can wait for one peer.
const SLAB_BYTES: usize = 1 << 20;
/// Results in a slab.
const SLAB_ITEMS: usize = 2_048;
/// Room for whatever one packet or datagram may bring forth: itself, and what waited for its peer at the usual MTU.
const ROOM_BYTES: usize = 384 * 1024;
/// The same in results.
const ROOM_ITEMS: usize = 256;

/// Refused packets that a batch notes.
const MAX_DENIALS: usize = 64;

/// A datagram to be sent on the underlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transmit {
    /// Where it goes.
    pub remote: SocketAddr,
    /// The source address that the peer knows; `None` leaves it to the kernel.
    pub local: Option<IpAddr>,
    /// The two ECN bits of the outer header (RFC 6040).
    pub ecn: u8,
}

/// A packet that was understood and refused: for the log and for `status`, which limit themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Denial {
    /// Which way it went.
    pub direction: Direction,
    /// Where it came from.
    pub source: IpAddr,
    /// Where it was to go.
    pub destination: IpAddr,
    /// What a rule would have to grant; `None` for an ICMP error.
    pub protocol: Option<Protocol>,
    /// The source port; zero where there is none.
    pub source_port: u16,
    /// The destination port; zero where there is none.
    pub port: u16,
    /// Why it was refused.
    pub reason: DropReason,
}

/// A worker's part of the engine.
pub struct Worker<P: PathPolicy, K: LocalKey> {
    pub(crate) snapshot: Option<Arc<Snapshot<P, K>>>,
    pub(crate) out: Outputs,
    pub(crate) seat: Arc<Seat>,
    witness: Option<Box<dyn Witness>>,
    /// Whether the witness is asked in this batch.
    asks: bool,
}

/// What the engine knows of a worker.
#[derive(Debug, Default)]
pub(crate) struct Seat {
    /// Which view the worker's batch is judged by.
    state: AtomicU64,
    pub(crate) stats: Stats,
}

/// The worker is between batches.
const ASLEEP: u64 = 0;
/// The worker is about to take a view, and it is not yet known which.
const WAKING: u64 = 1;
/// The seat is free for another worker.
const FREE: u64 = u64::MAX;
/// The number of the first view.
pub(crate) const FIRST_STAMP: u64 = 2;

impl<P: PathPolicy, K: LocalKey> Worker<P, K> {
    pub(crate) fn new(seat: Arc<Seat>) -> Self {
        Self {
            snapshot: None,
            out: Outputs::new(),
            seat,
            witness: None,
            asks: false,
        }
    }

    /// Has `witness` asked about sockets from the next batch on.
    #[must_use]
    pub fn with_witness(mut self, witness: Box<dyn Witness>) -> Self {
        self.witness = Some(witness);
        self
    }

    /// Begins a batch: what follows is judged by the view in force now. Results of a batch that was not ended are gone.
    pub fn begin(&mut self, engine: &Engine<P, K>) {
        if self.snapshot.is_some() {
            self.clear();
        }
        // Announced before it is loaded, so that an install either waits for this batch or is seen by it.
        self.seat.state.store(WAKING, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.snapshot = engine.current();
        // Without a view nothing passes, but a view that was installed before is not passed either.
        let stamp = self.snapshot.as_ref().map_or(WAKING, |snapshot| snapshot.stamp);
        self.seat.state.store(stamp, Ordering::Release);
        self.asks = self.witness.as_mut().is_some_and(|witness| witness.begin());
    }

    /// Ends the batch: the worker may sleep now, and no install waits for it. Results that were not taken are gone.
    pub fn end(&mut self) {
        self.clear();
        self.snapshot = None;
        self.seat.state.store(ASLEEP, Ordering::Release);
    }

    /// Whether the results of one more packet or datagram are sure to fit.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.out.udp.has_room() && self.out.tun.has_room()
    }

    /// Datagrams to be sent, in order. Those of one peer lie one behind the other.
    pub fn udp(&self) -> impl Iterator<Item = (&[u8], Transmit)> {
        self.out.udp.iter()
    }

    /// Packets to be given to TUNs, in order.
    pub fn tun(&self) -> impl Iterator<Item = (&[u8], TunId)> {
        self.out.tun.iter()
    }

    /// Packets that were refused in this batch, as far as there was room to note them: all are counted.
    #[must_use]
    pub fn denials(&self) -> &[Denial] {
        &self.out.denials
    }

    /// Forgets the results, after they have been sent.
    pub fn clear(&mut self) {
        self.out.udp.clear();
        self.out.tun.clear();
        self.out.denials.clear();
    }

    /// The worker's counters.
    #[must_use]
    pub fn stats(&self) -> &Stats {
        &self.seat.stats
    }
}

/// What a step of the engine needs of a worker.
pub(crate) struct Parts<'a, P: PathPolicy, K: LocalKey> {
    pub(crate) snapshot: &'a Snapshot<P, K>,
    pub(crate) out: &'a mut Outputs,
    pub(crate) stats: &'a Stats,
    /// Only if there is something to ask.
    pub(crate) witness: Option<&'a mut (dyn Witness + 'static)>,
}

impl<P: PathPolicy, K: LocalKey> Worker<P, K> {
    /// The worker's parts; `None` while there is no view.
    pub(crate) fn parts(&mut self) -> Option<Parts<'_, P, K>> {
        let witness = if self.asks { self.witness.as_deref_mut() } else { None };
        Some(Parts {
            snapshot: self.snapshot.as_deref()?,
            out: &mut self.out,
            stats: &self.seat.stats,
            witness,
        })
    }
}

impl<P: PathPolicy, K: LocalKey> Drop for Worker<P, K> {
    fn drop(&mut self) {
        self.seat.state.store(FREE, Ordering::Release);
    }
}

impl Seat {
    /// Takes a free seat; its counters go on.
    pub(crate) fn take(&self) -> bool {
        self.state
            .compare_exchange(FREE, ASLEEP, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// Whether no packet of this worker is judged by a view before the one with this stamp.
    pub(crate) fn has_passed(&self, stamp: u64) -> bool {
        match self.state.load(Ordering::Acquire) {
            ASLEEP | FREE => true,
            at => at >= stamp,
        }
    }
}

/// Both slabs of a worker.
#[derive(Debug)]
pub(crate) struct Outputs {
    pub(crate) udp: Slab<Transmit>,
    pub(crate) tun: Slab<TunId>,
    denials: Vec<Denial>,
}

impl Outputs {
    fn new() -> Self {
        Self {
            udp: Slab::new(),
            tun: Slab::new(),
            denials: Vec::with_capacity(MAX_DENIALS),
        }
    }

    /// Notes a packet that was refused, if there is room.
    pub(crate) fn deny(&mut self, direction: Direction, packet: &Parsed, reason: DropReason) {
        let (source_port, port) = packet.ports();
        if self.denials.len() < MAX_DENIALS {
            self.denials.push(Denial {
                direction,
                source: packet.src,
                destination: packet.dst,
                protocol: packet.protocol(),
                source_port,
                port,
                reason,
            });
        }
    }
}

/// Results one behind the other in one buffer, each with where it goes.
#[derive(Debug)]
pub(crate) struct Slab<D> {
    bytes: Box<[u8]>,
    used: usize,
    /// Length and destination.
    items: Vec<(usize, D)>,
}

impl<D: Copy> Slab<D> {
    fn new() -> Self {
        Self {
            bytes: vec![0; SLAB_BYTES].into_boxed_slice(),
            used: 0,
            items: Vec::with_capacity(SLAB_ITEMS),
        }
    }

    /// Where the next result may be written: at least as long as the longest packet or datagram, or empty if the slab is full.
    pub(crate) fn space(&mut self) -> &mut [u8] {
        let free = self.bytes.get_mut(self.used..).unwrap_or_default();
        let room = free.len() >= MAX_PACKET + OVERHEAD && self.items.len() < SLAB_ITEMS;
        if room { free } else { &mut [] }
    }

    /// Makes the first `len` bytes of the space a result.
    pub(crate) fn commit(&mut self, len: usize, to: D) {
        self.used = self.used.saturating_add(len).min(self.bytes.len());
        self.items.push((len, to));
    }

    /// Makes a copy of `bytes` a result; whether there was room.
    pub(crate) fn push(&mut self, bytes: &[u8], to: D) -> bool {
        let fits = self
            .space()
            .get_mut(..bytes.len())
            .map(|space| space.copy_from_slice(bytes))
            .is_some();
        if fits {
            self.commit(bytes.len(), to);
        }
        fits
    }

    pub(crate) fn has_room(&self) -> bool {
        self.bytes.len().saturating_sub(self.used) >= ROOM_BYTES && SLAB_ITEMS.saturating_sub(self.items.len()) >= ROOM_ITEMS
    }

    fn iter(&self) -> impl Iterator<Item = (&[u8], D)> {
        self.items.iter().scan(0usize, |from, (len, to)| {
            let end = from.saturating_add(*len);
            let bytes = self.bytes.get(*from..end)?;
            *from = end;
            Some((bytes, *to))
        })
    }

    fn clear(&mut self) {
        self.used = 0;
        self.items.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_out_as_they_went_in_and_the_slab_ends() {
        let mut slab = Slab::new();
        assert!(slab.push(b"one", 1) && slab.push(b"", 2) && slab.push(b"three", 3));
        let all: Vec<_> = slab.iter().collect();
        assert_eq!(all, [(&b"one"[..], 1), (b"", 2), (b"three", 3)]);
        slab.clear();
        let big = vec![7; MAX_PACKET];
        let taken = (0..100).filter(|n| slab.push(&big, *n)).count();
        assert_eq!(taken, SLAB_BYTES / MAX_PACKET - 1);
        assert!(!slab.has_room() && slab.space().is_empty());
        slab.clear();
        assert_eq!((0..10_000).filter(|n| slab.push(b"x", *n)).count(), SLAB_ITEMS);
    }
}
