//! The version of a host's view, and times as the project's own types.

use std::fmt;
use std::ops::{Add, Sub};
use std::time::Duration;

use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

/// The version of the state that a view was compiled from, compared lexicographically: a generation is made by `init` or `recover`, a
/// revision by each change within it. Agents never go back (I12).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Encode, Decode, Serialize, Deserialize)]
#[cbor(map)]
pub struct Version {
    /// Unix second of the `init` or `recover` that began this generation, forced above any seen.
    #[n(0)]
    pub generation: u64,
    /// Number of the change, within its generation, at which this host's view last changed.
    #[n(1)]
    pub revision: u64,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.generation, self.revision)
    }
}

/// Mesh time: seconds since the Unix epoch as the coordinator's signed leases tell it. It drives leases and `expires`; a host's own wall
/// clock never does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Encode, Decode, Serialize, Deserialize)]
#[cbor(transparent)]
#[serde(transparent)]
pub struct MeshTime(#[n(0)] pub u64);

impl MeshTime {
    /// The latest time there is: an `expires` that never comes.
    pub const NEVER: Self = Self(u64::MAX);

    /// This time plus a span, saturating.
    #[must_use]
    pub fn plus(self, span: Duration) -> Self {
        Self(self.0.saturating_add(span.as_secs()))
    }
}

/// A host's monotonic clock that counts through suspend (CLOCK_BOOTTIME), in nanoseconds. The core never reads it; the shell passes it in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// The span from `earlier` to this moment; zero if `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Timestamp {
    type Output = Self;
    fn add(self, span: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl Sub<Duration> for Timestamp {
    type Output = Self;
    fn sub(self, span: Duration) -> Self {
        Self(self.0.saturating_sub(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generations_outrank_revisions() {
        let old = Version {
            generation: 1,
            revision: 900,
        };
        let new = Version {
            generation: 2,
            revision: 1,
        };
        assert!(new > old);
    }
}
