//! The one clock of the data plane: CLOCK_BOOTTIME, monotonic, counting through suspend. It is read through the C library like every other
//! clock of the process, so that a library loaded before it can move all of them together, as the tests of clocks do.

use cloison_proto::version::Timestamp;

/// This moment.
#[must_use]
pub fn now() -> Timestamp {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    #[expect(unsafe_code, reason = "rustix asks the kernel past the C library")]
    // SAFETY: the call writes one `timespec`, which lives until it returns. It cannot fail: Linux has this clock since 2.6.39.
    let _always_zero = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
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
