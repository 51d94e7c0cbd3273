//! How often something may happen, by key: segments that pass without a flow, and answers to what is denied.
//!
//! Counts start anew with each second of the host's clock. The number of keys in a second is bounded as well; what comes beyond is refused.

use std::hash::Hash;

use hashbrown::HashTable;
use parking_lot::Mutex;

use cloison_proto::version::Timestamp;

use super::quota::{InstancePair, Seeded};

/// Segments a second that pass without a flow, by instance pair: a stream that goes on after an agent's restart speaks in its flow's own
/// direction soon, and 1,000 segments are about 11 Mbit/s until then.
pub const MID_STREAM_PER_SECOND: u32 = 1_000;

/// Answers a second to what is denied, by local instance; then silence.
pub const ANSWERS_PER_SECOND: u32 = 1_000;

/// Keys in a second: as many as a view may have peers. Bounds a limiter to 0.7 MiB.
const MAX_KEYS: usize = 16_384;

/// Limits segments that pass without a flow.
pub type MidStreamLimit = RateLimit<InstancePair>;

/// Limits answers to what is denied, by local instance.
pub type AnswerLimit = RateLimit<u32>;

/// At most so many events a second for each key, and so many keys.
#[derive(Debug)]
pub struct RateLimit<K> {
    per_second: u32,
    max_keys: usize,
    hasher: Seeded,
    window: Mutex<Window<K>>,
}

#[derive(Debug)]
struct Window<K> {
    /// The second that is counted.
    second: u64,
    counts: HashTable<(K, u32)>,
}

impl MidStreamLimit {
    /// The limit of segments without a flow.
    #[must_use]
    pub fn mid_stream(seed: u64) -> Self {
        Self::new(MID_STREAM_PER_SECOND, MAX_KEYS, seed)
    }
}

impl AnswerLimit {
    /// The limit of answers.
    #[must_use]
    pub fn answers(seed: u64) -> Self {
        Self::new(ANSWERS_PER_SECOND, MAX_KEYS, seed)
    }
}

impl<K: Copy + Eq + Hash> RateLimit<K> {
    /// At most `per_second` events a second for each of at most `max_keys` keys.
    #[must_use]
    pub fn new(per_second: u32, max_keys: usize, seed: u64) -> Self {
        let window = Mutex::new(Window {
            second: 0,
            counts: HashTable::new(),
        });
        Self {
            per_second,
            max_keys,
            hasher: Seeded::new(seed),
            window,
        }
    }

    /// Whether one more event of `key` may happen; if so, it is counted.
    #[must_use]
    pub fn admit(&self, key: K, now: Timestamp) -> bool {
        let second = now.since(Timestamp(0)).as_secs();
        let hash = self.hasher.hash(&key);
        let mut window = self.window.lock();
        if second > window.second {
            window.second = second;
            window.counts.clear();
        }
        let keys = window.counts.len();
        match window.counts.find_mut(hash, |(of, _)| *of == key) {
            Some((_, count)) if *count < self.per_second => *count += 1,
            None if keys < self.max_keys && self.per_second > 0 => {
                window.counts.insert_unique(hash, (key, 1), |(of, _)| self.hasher.hash(of));
            }
            Some(_) | None => return false,
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn each_key_has_its_own_budget_in_each_second() {
        let limit = RateLimit::new(3, 2, 1);
        let mut now = Timestamp(0) + Duration::from_secs(10);
        for _second in 0..3 {
            let admitted = (0..5).filter(|_| limit.admit("a", now)).count();
            assert_eq!(admitted, 3);
            assert!(limit.admit("b", now), "another key is not touched");
            assert!(!limit.admit("c", now), "no more than two keys");
            now = now + Duration::from_secs(1);
        }
    }

    #[test]
    fn a_worker_with_an_older_clock_does_not_get_a_fresh_budget() {
        let limit = RateLimit::new(1, 8, 1);
        let now = Timestamp(0) + Duration::from_secs(10);
        assert!(limit.admit(1, now));
        assert!(!limit.admit(1, now - Duration::from_secs(1)));
    }

    #[test]
    fn the_defaults_are_those_of_the_contract() {
        let limit = MidStreamLimit::mid_stream(7);
        let pair = InstancePair { local: 1, remote: 2 };
        let now = Timestamp(0) + Duration::from_secs(1);
        assert_eq!((0..3_000).filter(|_| limit.admit(pair, now)).count(), 1_000);
        assert!(AnswerLimit::answers(7).admit(1, now));
    }
}
