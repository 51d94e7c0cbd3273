//! The coordinator's clock: the only file that reads the time. Seconds are enough for everything it decides: leases, tokens, certificates.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cloison_proto::version::MeshTime;

/// Where the time comes from: the system, or a test.
pub trait Clock: fmt::Debug + Send + Sync {
    /// The time, in seconds since the Unix epoch.
    fn now(&self) -> MeshTime;
}

/// The machine's wall clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> MeshTime {
        // A clock before 1970 reads as 1970: every token and certificate made then has run out by any real clock.
        MeshTime(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
    }
}

/// A clock that moves only when told to: for tests and the simulation.
#[derive(Debug, Clone, Default)]
pub struct ManualClock(Arc<AtomicU64>);

impl ManualClock {
    /// A clock that stands at `start`.
    #[must_use]
    pub fn starting_at(start: MeshTime) -> Self {
        Self(Arc::new(AtomicU64::new(start.0)))
    }

    /// Moves the clock forward.
    pub fn advance(&self, span: Duration) {
        self.0.fetch_add(span.as_secs(), Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> MeshTime {
        MeshTime(self.0.load(Ordering::SeqCst))
    }
}
