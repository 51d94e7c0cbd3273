//! How many flows an instance pair, an instance and the host may have. A full quota refuses the newcomer, so that nobody can evict another's
//! entries (I9).

use std::hash::{Hash, Hasher};

use foldhash::SharedSeed;
use foldhash::quality::FoldHasher;
use hashbrown::HashTable;

use cloison_proto::verdict::DropReason;

/// A local and a remote instance, by numbers whose meaning the engine defines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstancePair {
    /// The local instance.
    pub local: u32,
    /// The remote instance.
    pub remote: u32,
}

/// The most flows that there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowLimits {
    /// On the host; fixed when the table is made.
    pub total: u32,
    /// Of one local instance.
    pub per_instance: u32,
    /// Between one local and one remote instance.
    pub per_pair: u32,
}

impl FlowLimits {
    /// Flows of a host.
    pub const DEFAULT_TOTAL: u32 = 65_536;

    /// A pair may always have this many, if the host has room.
    const MIN_PER_PAIR: u32 = 1_024;

    /// An instance may always have this many, if the host has room.
    const MIN_PER_INSTANCE: u32 = 4_096;

    /// Divides `total` among local instances: to each its share, and to one remote instance at most a quarter of that.
    #[must_use]
    pub fn divided(total: u32, local_instances: u32) -> Self {
        let share = total / local_instances.max(1);
        let per_instance = share.max(Self::MIN_PER_INSTANCE).min(total);
        let per_pair = (per_instance / 4).max(Self::MIN_PER_PAIR).min(per_instance);
        Self {
            total,
            per_instance,
            per_pair,
        }
    }
}

impl Default for FlowLimits {
    fn default() -> Self {
        Self::divided(Self::DEFAULT_TOTAL, 1)
    }
}

/// How many flows there are, by pair and by instance. Zero counts are not kept.
#[derive(Debug)]
pub(super) struct Quotas {
    limits: FlowLimits,
    total: u32,
    pairs: HashTable<Count<InstancePair>>,
    instances: HashTable<Count<u32>>,
    hasher: Seeded,
}

#[derive(Debug)]
struct Count<K> {
    of: K,
    flows: u32,
}

impl Quotas {
    pub(super) const fn new(limits: FlowLimits, hasher: Seeded) -> Self {
        Self {
            limits,
            total: 0,
            pairs: HashTable::new(),
            instances: HashTable::new(),
            hasher,
        }
    }

    /// Sets the limits of instances and pairs; the total stays. Whoever has more than that keeps it.
    pub(super) const fn set_limits(&mut self, limits: FlowLimits) {
        self.limits.per_instance = limits.per_instance;
        self.limits.per_pair = limits.per_pair;
    }

    pub(super) const fn total(&self) -> u32 {
        self.total
    }

    pub(super) fn of_pair(&self, pair: InstancePair) -> u32 {
        let hash = self.hasher.hash(&pair);
        self.pairs.find(hash, |count| count.of == pair).map_or(0, |count| count.flows)
    }

    pub(super) fn of_instance(&self, local: u32) -> u32 {
        let hash = self.hasher.hash(&local);
        self.instances.find(hash, |count| count.of == local).map_or(0, |count| count.flows)
    }

    /// Counts one more flow of `pair`.
    ///
    /// # Errors
    /// [`DropReason::FlowQuota`] if the pair, its local instance or the host has as many as it may have.
    pub(super) fn admit(&mut self, pair: InstancePair) -> Result<(), DropReason> {
        let of_pair = self.of_pair(pair);
        let room = self.total < self.limits.total
            && self.of_instance(pair.local) < self.limits.per_instance
            && of_pair < self.limits.per_pair
            && (of_pair > 0 || self.pairs.len() < self.most_pairs());
        if !room {
            return Err(DropReason::FlowQuota);
        }
        self.add(pair);
        Ok(())
    }

    /// Counts one flow of `pair` less.
    pub(super) fn release(&mut self, pair: InstancePair) {
        let hash = self.hasher.hash(&pair);
        release(&mut self.pairs, hash, pair);
        let hash = self.hasher.hash(&pair.local);
        release(&mut self.instances, hash, pair.local);
        self.total = self.total.saturating_sub(1);
    }

    /// Counts a flow that exists for another pair than before; it is not refused.
    pub(super) fn transfer(&mut self, from: InstancePair, to: InstancePair) {
        self.release(from);
        self.add(to);
    }

    pub(super) fn allocated_bytes(&self) -> usize {
        self.pairs.allocation_size() + self.instances.allocation_size()
    }

    /// Seven of eight flows may be of pairs of their own: with more, the table of counts could double, and the whole would pass 8 MiB.
    fn most_pairs(&self) -> usize {
        usize::try_from(self.limits.total / 8 * 7).unwrap_or(usize::MAX).max(1)
    }

    fn add(&mut self, pair: InstancePair) {
        add(&mut self.pairs, pair, |of| self.hasher.hash(of));
        add(&mut self.instances, pair.local, |of| self.hasher.hash(of));
        self.total = self.total.saturating_add(1);
    }
}

fn add<K: Copy + Eq>(counts: &mut HashTable<Count<K>>, of: K, hash: impl Fn(&K) -> u64) {
    match counts.find_mut(hash(&of), |count| count.of == of) {
        Some(count) => count.flows = count.flows.saturating_add(1),
        None => {
            counts.insert_unique(hash(&of), Count { of, flows: 1 }, |count| hash(&count.of));
        }
    }
}

fn release<K: Eq>(counts: &mut HashTable<Count<K>>, hash: u64, of: K) {
    if let Ok(mut entry) = counts.find_entry(hash, |count| count.of == of) {
        let count = entry.get_mut();
        count.flows = count.flows.saturating_sub(1);
        if count.flows == 0 {
            entry.remove();
        }
    }
}

/// A hash that nobody outside can predict: the seed comes in from the shell (I7).
#[derive(Debug, Clone)]
pub(super) struct Seeded {
    own: u64,
    shared: SharedSeed,
}

impl Seeded {
    pub(super) const fn new(seed: u64) -> Self {
        Self {
            own: seed,
            shared: SharedSeed::from_u64(seed.rotate_left(32)),
        }
    }

    pub(super) fn hash(&self, value: &impl Hash) -> u64 {
        let mut hasher = FoldHasher::with_seed(self.own, &self.shared);
        value.hash(&mut hasher);
        hasher.finish()
    }
}
