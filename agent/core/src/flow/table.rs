//! The table of flows: sharded, bounded, with room for every entry from the start.
//!
//! A shard is a dense list of entries and an index of 16-bit positions in it: a quarter of the memory that a hash table of entries takes at
//! its worst. A packet costs one hash, one lock and no allocation. Counts for the quotas are behind one more lock, taken inside a shard's
//! lock, and only when a flow begins, ends or changes its pair.
//!
//! What it does not do: judge. Callers' closures run under a shard's lock: they must be short, and must not call the table.

use std::sync::atomic::{AtomicUsize, Ordering};

use hashbrown::HashTable;
use parking_lot::Mutex;

use cloison_proto::verdict::DropReason;
use cloison_proto::version::Timestamp;

use super::entry::{Entry, Moment};
use super::key::FlowKey;
use super::quota::{FlowLimits, InstancePair, Quotas, Seeded};

/// How many shards there are: enough that workers seldom meet, few enough that a sweep of all is cheap.
pub const SHARDS: usize = 16;

/// What [`FlowTable::insert`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inserted {
    /// The flow began.
    New,
    /// It was there; it now has this verdict.
    Renewed,
    /// It was there with a verdict of a later view, which stays.
    Outdated,
}

/// What a sweep's judge says of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// It stays, with the verdict that the judge gave it.
    Keep,
    /// It goes.
    Drop,
}

/// What a sweep did, in entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Swept {
    /// Entries looked at.
    pub seen: usize,
    /// Entries removed because they were idle.
    pub idle: usize,
    /// Entries removed because the judge said so.
    pub dropped: usize,
}

/// All flows of a host.
#[derive(Debug)]
pub struct FlowTable {
    shards: [Mutex<Shard>; SHARDS],
    quotas: Mutex<Quotas>,
    hasher: Seeded,
    /// The shard that the next step of the sweep looks at.
    next: AtomicUsize,
}

impl FlowTable {
    /// An empty table with these limits, whose hash depends on `seed`.
    #[must_use]
    pub fn new(limits: FlowLimits, seed: u64) -> Self {
        let capacity = Shard::capacity(limits.total);
        let hasher = Seeded::new(seed);
        Self {
            shards: std::array::from_fn(|_| Mutex::new(Shard::new(capacity))),
            quotas: Mutex::new(Quotas::new(limits, hasher.clone())),
            hasher,
            next: AtomicUsize::new(0),
        }
    }

    /// Sets what instances and pairs may have, as their number changes; the total stays. Nothing is removed.
    pub fn set_limits(&self, limits: FlowLimits) {
        self.quotas.lock().set_limits(limits);
    }

    /// Runs `f` on the flow, if there is one, under its shard's lock. A flow that `f` [grants](Entry::regrant) to another pair is counted
    /// there from then on.
    pub fn with<R>(&self, key: &FlowKey, f: impl FnOnce(&mut Entry) -> R) -> Option<R> {
        let hash = self.hasher.hash(key);
        let mut shard = self.shard(hash).lock();
        let position = shard.find(hash, key)?;
        let entry = shard.entries.get_mut(usize::from(position))?;
        let before = entry.pair();
        let result = f(entry);
        self.transfer(before, entry.pair());
        Some(result)
    }

    /// A copy of the flow, if there is one.
    #[must_use]
    pub fn get(&self, key: &FlowKey) -> Option<Entry> {
        self.with(key, |entry| *entry)
    }

    /// Puts in a flow. If it is there already (two workers saw its first packets, or a SYN came against its opener), the verdict of the later
    /// view wins, and of two of the same view the one put in last; what is known of a flow with the same opener stays.
    ///
    /// # Errors
    /// [`DropReason::FlowQuota`] if the pair, the local instance or the host has as many flows as it may have.
    pub fn insert(&self, entry: Entry) -> Result<Inserted, DropReason> {
        let key = entry.key();
        let hash = self.hasher.hash(&key);
        let mut shard = self.shard(hash).lock();
        if let Some(position) = shard.find(hash, &key)
            && let Some(old) = shard.entries.get_mut(usize::from(position))
        {
            if old.grant().stamp > entry.grant().stamp {
                return Ok(Inserted::Outdated);
            }
            self.transfer(old.pair(), entry.pair());
            if old.opener() == entry.opener() {
                old.regrant(entry.grant());
            } else {
                *old = entry;
            }
            return Ok(Inserted::Renewed);
        }
        if shard.is_full() {
            return Err(DropReason::FlowQuota);
        }
        self.quotas.lock().admit(entry.pair())?;
        shard.push(hash, entry, &self.hasher);
        Ok(Inserted::New)
    }

    /// Takes out a flow.
    pub fn remove(&self, key: &FlowKey) -> Option<Entry> {
        let hash = self.hasher.hash(key);
        let mut shard = self.shard(hash).lock();
        let position = shard.find(hash, key)?;
        let entry = shard.take(usize::from(position), &self.hasher)?;
        self.quotas.lock().release(entry.pair());
        Some(entry)
    }

    /// Sweeps the next shard: removes idle flows, and asks `judge` of those whose verdict is not current. [`SHARDS`] calls go once round.
    pub fn sweep_step(&self, moment: &Moment, judge: impl FnMut(&mut Entry) -> Kept) -> Swept {
        let next = self.next.fetch_add(1, Ordering::Relaxed) % SHARDS;
        self.shards
            .get(next)
            .map_or_else(Swept::default, |shard| self.sweep_shard(shard, moment, judge))
    }

    /// Sweeps all shards, one after the other, as [`FlowTable::sweep_step`] does: after an `install`.
    pub fn sweep_all(&self, moment: &Moment, mut judge: impl FnMut(&mut Entry) -> Kept) -> Swept {
        let mut sum = Swept::default();
        for shard in &self.shards {
            let swept = self.sweep_shard(shard, moment, &mut judge);
            sum.seen += swept.seen;
            sum.idle += swept.idle;
            sum.dropped += swept.dropped;
        }
        sum
    }

    /// Shows every flow that is not idle, for `status`. Shards are locked one after the other: flows that come and go meanwhile may be missed.
    pub fn for_each(&self, now: Timestamp, mut f: impl FnMut(&Entry)) {
        for shard in &self.shards {
            shard.lock().entries.iter().filter(|entry| !entry.is_idle(now)).for_each(&mut f);
        }
    }

    /// How many flows there are.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.quotas.lock().total()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many flows a pair and its local instance have.
    #[must_use]
    pub fn counts(&self, pair: InstancePair) -> (u32, u32) {
        let quotas = self.quotas.lock();
        (quotas.of_pair(pair), quotas.of_instance(pair.local))
    }

    /// Bytes of memory that the table has reserved.
    #[must_use]
    pub fn allocated_bytes(&self) -> usize {
        let shards: usize = self.shards.iter().map(|shard| shard.lock().allocated_bytes()).sum();
        size_of::<Self>() + shards + self.quotas.lock().allocated_bytes()
    }

    fn sweep_shard(&self, shard: &Mutex<Shard>, moment: &Moment, mut judge: impl FnMut(&mut Entry) -> Kept) -> Swept {
        let mut shard = shard.lock();
        let mut swept = Swept {
            seen: shard.entries.len(),
            ..Swept::default()
        };
        // Backwards, so that the entry that fills a gap has been seen already.
        for position in (0..shard.entries.len()).rev() {
            let Some(entry) = shard.entries.get_mut(position) else { continue };
            let before = entry.pair();
            if entry.is_idle(moment.now) {
                swept.idle += 1;
            } else if !entry.is_current(moment) && judge(entry) == Kept::Drop {
                swept.dropped += 1;
            } else {
                self.transfer(before, entry.pair());
                continue;
            }
            shard.take(position, &self.hasher);
            self.quotas.lock().release(before);
        }
        swept
    }

    fn transfer(&self, from: InstancePair, to: InstancePair) {
        if from != to {
            self.quotas.lock().transfer(from, to);
        }
    }

    /// The shard of a hash, by bits that neither the position in the index nor its tags are taken from.
    fn shard(&self, hash: u64) -> &Mutex<Shard> {
        let [first, ..] = &self.shards;
        let [_, _, _, byte, ..] = hash.to_le_bytes();
        self.shards.get(usize::from(byte) % SHARDS).unwrap_or(first)
    }
}

#[derive(Debug)]
struct Shard {
    entries: Vec<Entry>,
    /// Positions in `entries`.
    index: HashTable<u16>,
}

impl Shard {
    /// Entries that a shard has room for: its share of `total`, and as much again as hashes may deviate (the deviation of a shard's number is
    /// the square root of its share; four of these, and at least 32 entries).
    fn capacity(total: u32) -> u16 {
        let share = total.div_ceil(16);
        let spare = share.isqrt().saturating_mul(4).max(32);
        u16::try_from(share.saturating_add(spare)).unwrap_or(u16::MAX)
    }

    fn new(capacity: u16) -> Self {
        let capacity = usize::from(capacity);
        Self {
            entries: Vec::with_capacity(capacity),
            index: HashTable::with_capacity(capacity),
        }
    }

    fn is_full(&self) -> bool {
        self.entries.len() == self.entries.capacity()
    }

    fn find(&self, hash: u64, key: &FlowKey) -> Option<u16> {
        let is_it = |position: &u16| self.entries.get(usize::from(*position)).is_some_and(|entry| entry.key() == *key);
        self.index.find(hash, is_it).copied()
    }

    fn push(&mut self, hash: u64, entry: Entry, hasher: &Seeded) {
        let Ok(position) = u16::try_from(self.entries.len()) else { return };
        self.entries.push(entry);
        let entries = &self.entries;
        self.index.insert_unique(hash, position, |at| {
            entries.get(usize::from(*at)).map_or(0, |entry| hasher.hash(&entry.key()))
        });
    }

    /// Takes out the entry at `position`; the last one takes its place.
    fn take(&mut self, position: usize, hasher: &Seeded) -> Option<Entry> {
        let gone = self.entries.get(position)?.key();
        let last = self.entries.len().checked_sub(1)?;
        if let Ok(slot) = self.index.find_entry(hasher.hash(&gone), |at| usize::from(*at) == position) {
            slot.remove();
        }
        if position != last {
            let moved = hasher.hash(&self.entries.get(last)?.key());
            if let Some(slot) = self.index.find_mut(moved, |at| usize::from(*at) == last) {
                *slot = u16::try_from(position).ok()?;
            }
        }
        Some(self.entries.swap_remove(position))
    }

    fn allocated_bytes(&self) -> usize {
        self.entries.capacity() * size_of::<Entry>() + self.index.allocation_size()
    }
}

#[cfg(test)]
mod tests;
