//! When to try again: full jitter, so that hosts that lost their coordinator together do not come back together.

use std::time::Duration;

/// The shortest longest wait: of the first attempt.
pub const FIRST: Duration = Duration::from_millis(500);

/// The longest wait.
pub const LONGEST: Duration = Duration::from_secs(60);

/// Waits that grow and are drawn at random. The seed comes from the caller: this module draws no entropy.
#[derive(Debug, Clone)]
pub struct Backoff {
    attempts: u32,
    state: u64,
}

impl Backoff {
    /// A backoff that has not failed yet.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { attempts: 0, state: seed }
    }

    /// The wait before the next attempt: anything up to `FIRST * 2^attempts`, and [`LONGEST`] at most.
    pub fn next_wait(&mut self) -> Duration {
        let ceiling = FIRST.saturating_mul(1 << self.attempts.min(16)).min(LONGEST);
        self.attempts = self.attempts.saturating_add(1);
        // Never zero: a coordinator that refuses at once is not asked in a loop.
        let span = u64::try_from(ceiling.as_micros()).unwrap_or(u64::MAX).saturating_sub(MIN_MICROS);
        Duration::from_micros(MIN_MICROS.saturating_add(self.draw() % span.max(1)))
    }

    /// The link held: the next failure is the first one again.
    pub const fn reset(&mut self) {
        self.attempts = 0;
    }

    /// SplitMix64 (Steele, Lea, Flood 2014): spreads hosts well, and keeps no secret.
    const fn draw(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = self.state;
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

const MIN_MICROS: u64 = 50_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_are_spread_and_end_at_a_minute() {
        let mut all = Vec::new();
        for seed in 0..200 {
            let mut backoff = Backoff::new(seed);
            let waits: Vec<_> = (0..40).map(|_| backoff.next_wait()).collect();
            assert!(waits.first().is_some_and(|w| *w <= FIRST) && waits.iter().all(|w| *w <= LONGEST));
            assert!(waits.iter().skip(10).any(|w| *w > LONGEST / 2), "{seed}");
            backoff.reset();
            assert!(backoff.next_wait() <= FIRST);
            all.extend(waits.get(20));
        }
        all.sort();
        assert!(all.first() < Some(&Duration::from_secs(5)) && all.last() > Some(&Duration::from_secs(55)));
    }
}
