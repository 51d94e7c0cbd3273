//! Descriptors that this process was started with: what the service manager kept of the agent before.

use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// Takes the descriptors that a service manager passed to this very process (`LISTEN_FDS`, sd_listen_fds(3)), with their names. They are
/// closed on exec from then on. Once: a second call gives nothing.
///
/// # Errors
/// The variables are malformed, or name a descriptor that is not open; nothing is taken then.
pub fn take() -> io::Result<Vec<(String, OwnedFd)>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::AcqRel) {
        return Ok(Vec::new());
    }
    let passed = sd_notify::listen_fds_with_names()?;
    let taken = passed.map(|(number, name)| {
        #[expect(unsafe_code, reason = "a number becomes a descriptor that is owned")]
        // SAFETY: the variables name this process (LISTEN_PID), so the numbers from 3 on were opened for it before it began, and were found
        // open a moment ago; nothing else here takes numbers for descriptors, and this runs once.
        (name, unsafe { OwnedFd::from_raw_fd(number) })
    });
    Ok(taken.collect())
}
