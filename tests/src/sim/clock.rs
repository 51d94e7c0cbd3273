//! Virtual time: a host's monotonic clock and the coordinator's, in step unless a test has them differ.

use std::time::Duration;

use cloison_proto::version::{MeshTime, Timestamp};

/// When every run begins, on the hosts' clocks.
pub const START: Timestamp = Timestamp(1_000_000_000_000);

/// The same moment on the coordinator's clock.
pub const MESH_START: MeshTime = MeshTime(1_800_000_000);

/// What the coordinator's clock shows.
#[must_use]
pub fn mesh_time(now: Timestamp) -> MeshTime {
    MESH_START.plus(now.since(START))
}

/// Milliseconds as a span.
#[must_use]
pub const fn millis(count: u64) -> Duration {
    Duration::from_millis(count)
}
