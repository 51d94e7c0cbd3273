//! A process that is held by a descriptor (pidfd): its number may be used again by others, the descriptor stays that of the one process.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A process, alive or not.
pub struct Process {
    fd: OwnedFd,
    pid: Pid,
}

impl Process {
    /// The process that has this number now. Takes no privilege.
    ///
    /// # Errors
    /// ESRCH: there is none; EMFILE: too many open files.
    pub fn open(pid: Pid) -> io::Result<Self> {
        Ok(Self {
            fd: pidfd_open(pid, PidfdFlags::empty())?,
            pid,
        })
    }

    /// Its number; somebody else's as soon as it [has ended](Self::has_ended).
    #[must_use]
    pub const fn pid(&self) -> Pid {
        self.pid
    }

    /// Waits for its end, on a tokio runtime with IO. Nothing is left behind if this is given up before.
    ///
    /// # Errors
    /// The kernel's: too many open files.
    pub async fn end(self: Arc<Self>) -> io::Result<()> {
        #[expect(unsafe_code, reason = "tokio has no safe way to wait for a descriptor of another kind")]
        // SAFETY: the descriptor is open for as long as the value that is registered, which is shared, and never replaced.
        let registered = unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) };
        registered?.readable().await.map(drop)
    }

    /// Whether it has ended, though nobody may have noticed yet.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let now = Timespec::try_from(Duration::ZERO).ok();
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        // What cannot be asked is not alive.
        !matches!(poll(&mut fds, now.as_ref()), Ok(0))
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Process {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Process({})", self.pid.as_raw_nonzero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_ended_before_anybody_takes_notice_and_stays_so() -> Result<(), Box<dyn std::error::Error>> {
        let mut child = std::process::Command::new("sleep").arg("60").spawn()?;
        let pid = Pid::from_raw(i32::try_from(child.id())?).ok_or("no number")?;
        let process = Process::open(pid)?;
        assert!(!process.has_ended());
        child.kill()?;
        let mut fds = [PollFd::new(&process, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&Timespec::try_from(Duration::from_secs(5))?))?, 1);
        assert!(process.has_ended(), "nobody has waited for it yet");
        child.wait()?;
        assert!(process.has_ended());
        assert!(Process::open(pid).is_err());
        Ok(())
    }
}
