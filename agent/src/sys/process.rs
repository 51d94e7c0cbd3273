//! A process that is held by a descriptor (pidfd): its number may be used again by others, the descriptor stays that of the one process.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::clock;

/// What /proc counts time in: USER_HZ is 100 on all architectures that this runs on.
const NANOS_A_TICK: u64 = 10_000_000;

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

    /// When it began, on the wall clock as it goes now, to a hundredth of a second.
    ///
    /// # Errors
    /// ESRCH: it has ended; what /proc does not tell.
    pub fn started(&self) -> io::Result<SystemTime> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid.as_raw_nonzero()));
        if self.has_ended() {
            return Err(rustix::io::Errno::SRCH.into());
        }
        // The name, in parentheses, may hold anything; the 22nd field, which is the 20th behind it, is the time since boot (proc_pid_stat(5)).
        let stat = stat?;
        let ticks = stat
            .rsplit_once(") ")
            .and_then(|(_, fields)| fields.split(' ').nth(19)?.parse::<u64>().ok());
        let begun = ticks.ok_or(io::ErrorKind::InvalidData)?.saturating_mul(NANOS_A_TICK);
        let age = Duration::from_nanos(clock::now().0.saturating_sub(begun));
        SystemTime::now().checked_sub(age).ok_or_else(|| io::ErrorKind::InvalidData.into())
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
        let age = SystemTime::now().duration_since(process.started()?)?;
        assert!(age < Duration::from_secs(5), "{age:?}");
        child.kill()?;
        let mut fds = [PollFd::new(&process, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&Timespec::try_from(Duration::from_secs(5))?))?, 1);
        assert!(process.has_ended(), "nobody has waited for it yet");
        assert!(process.started().is_err());
        child.wait()?;
        assert!(process.has_ended());
        assert!(Process::open(pid).is_err());
        Ok(())
    }
}
