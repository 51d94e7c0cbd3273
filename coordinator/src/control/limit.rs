//! Budgets: frames of one link, attempts to join from one source, certificates of one host.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use cloison_proto::version::Timestamp;
use parking_lot::Mutex;

/// A budget that refills steadily up to its burst.
#[derive(Debug, Clone, Copy)]
pub struct Bucket {
    /// What is left, as the time that it takes to refill.
    saved: Duration,
    cost: Duration,
    full: Duration,
    last: Timestamp,
}

impl Bucket {
    /// A full bucket of `burst` that gains `per` in each `span`.
    #[must_use]
    pub fn new(burst: u32, per: u32, span: Duration, now: Timestamp) -> Self {
        let cost = span / per.max(1);
        let full = cost.saturating_mul(burst);
        Self {
            saved: full,
            cost,
            full,
            last: now,
        }
    }

    /// Takes one, if there is one.
    pub fn take(&mut self, now: Timestamp) -> bool {
        self.refill(now);
        match self.saved.checked_sub(self.cost) {
            Some(left) => {
                self.saved = left;
                true
            }
            None => false,
        }
    }

    fn refill(&mut self, now: Timestamp) {
        self.saved = self.saved.saturating_add(now.since(self.last)).min(self.full);
        self.last = self.last.max(now);
    }
}

/// Most keys that are remembered at once. When there are more, those with full budgets are forgotten; if that is not enough, all new ones
/// share one budget.
const MAX_KEYS: usize = 16_384;

/// A budget for each key.
#[derive(Debug)]
pub struct Budgets<K> {
    burst: u32,
    span: Duration,
    table: Mutex<Table<K>>,
}

#[derive(Debug)]
struct Table<K> {
    buckets: HashMap<Option<K>, Bucket>,
    /// When full budgets were last forgotten: at most once a second, because it looks at all of them.
    swept: Option<Timestamp>,
}

impl<K: Eq + Hash> Budgets<K> {
    /// At most `burst` at once, and as many in each `span`.
    #[must_use]
    pub fn new(burst: u32, span: Duration) -> Self {
        Self {
            burst,
            span,
            table: Mutex::new(Table {
                buckets: HashMap::new(),
                swept: None,
            }),
        }
    }

    /// Takes one of `key`'s budget, if there is one.
    pub fn take(&self, key: K, now: Timestamp) -> bool {
        let mut table = self.table.lock();
        let mut key = Some(key);
        if table.buckets.len() >= MAX_KEYS && !table.buckets.contains_key(&key) {
            table.sweep(now);
            key = key.filter(|_| table.buckets.len() < MAX_KEYS);
        }
        let new = || Bucket::new(self.burst, self.burst, self.span, now);
        table.buckets.entry(key).or_insert_with(new).take(now)
    }
}

impl<K: Eq + Hash> Table<K> {
    fn sweep(&mut self, now: Timestamp) {
        if self.swept.is_some_and(|last| now.since(last) < Duration::from_secs(1)) {
            return;
        }
        self.swept = Some(now);
        self.buckets.retain(|_, bucket| {
            bucket.refill(now);
            bucket.saved < bucket.full
        });
    }
}

/// What counts as one source: an IPv4 address, or an IPv6 /64, which every household gets.
#[must_use]
pub fn network(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V6(a) => IpAddr::V6(Ipv6Addr::from_bits(a.to_bits() & (u128::MAX << 64))),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> Timestamp {
        Timestamp(milliseconds * 1_000_000)
    }

    #[test]
    fn a_burst_passes_and_then_the_rate() {
        let mut bucket = Bucket::new(100, 20, Duration::from_secs(1), at(0));
        assert_eq!((0..200).filter(|_| bucket.take(at(0))).count(), 100);
        assert_eq!((0..200).filter(|_| bucket.take(at(1000))).count(), 20);
        assert_eq!(
            (0..200).filter(|_| bucket.take(at(500))).count(),
            0,
            "a clock that steps back refills nothing"
        );
        assert_eq!((0..200).filter(|_| bucket.take(at(3_600_000))).count(), 100);
    }

    #[test]
    fn sources_do_not_share_a_budget_but_a_network_does() -> Result<(), std::net::AddrParseError> {
        let limit = Budgets::new(2, Duration::from_secs(60));
        let take = |source: &str| Ok::<_, std::net::AddrParseError>(limit.take(network(source.parse()?), at(0)));
        assert!(take("192.0.2.1")? && take("::ffff:192.0.2.1")? && !take("192.0.2.1")?);
        assert!(take("192.0.2.2")?);
        assert!(take("2001:db8::1")? && take("2001:db8::2")? && !take("2001:db8::ffff:3")?);
        assert!(limit.take("192.0.2.1".parse()?, at(60_000)));
        Ok(())
    }

    #[test]
    fn the_number_of_budgets_is_bounded() {
        let limit = Budgets::new(1, Duration::from_secs(60));
        assert!((0..40_000_u32).filter(|n| limit.take(*n, at(0))).count() <= MAX_KEYS + 1);
        assert!(limit.table.lock().buckets.len() <= MAX_KEYS + 1);
        assert!(!limit.take(99_999, at(1)), "strangers beyond the bound share one budget");
        assert!(limit.take(99_999, at(60_000)));
    }
}
