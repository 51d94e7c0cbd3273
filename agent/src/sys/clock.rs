//! The one clock of the data plane: CLOCK_BOOTTIME, monotonic, counting through suspend.

use cloison_proto::version::Timestamp;
use rustix::time::{ClockId, clock_gettime};

/// This moment.
#[must_use]
pub fn now() -> Timestamp {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    Timestamp(seconds.saturating_mul(1_000_000_000).saturating_add(nanos))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn time_passes() {
        let before = now();
        std::thread::sleep(Duration::from_millis(5));
        let span = now().since(before);
        assert!(span >= Duration::from_millis(5) && span < Duration::from_secs(60), "{span:?}");
    }
}
