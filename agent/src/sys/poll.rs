//! Waiting: an epoll set whose members carry a number, and a waker that ends the wait from another thread. Level-triggered: what was not
//! read dry is reported again.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};

/// Most events reported by one wait; the rest is reported by the next.
const MAX_EVENTS: usize = 64;

/// One member of the set that has something to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ready {
    /// The number under which it was added.
    pub token: u64,
    /// Whether the kernel reports an error or an end: for a TUN, that its interface is gone.
    pub broken: bool,
}

/// A set of file descriptors that are waited for together.
#[derive(Debug)]
pub struct Poller(OwnedFd);

impl Poller {
    /// An empty set.
    ///
    /// # Errors
    /// The kernel's: too many open files.
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Adds `fd`, to be reported as `token` when it can be read.
    ///
    /// # Errors
    /// The kernel's: `fd` is in the set already, or cannot be waited for.
    pub fn add(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        Ok(epoll::add(&self.0, fd, epoll::EventData::new_u64(token), epoll::EventFlags::IN)?)
    }

    /// Takes `fd` out again.
    ///
    /// # Errors
    /// The kernel's: `fd` is not in the set.
    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.0, fd)?)
    }

    /// Waits until a member is ready or `timeout` is over, and makes `ready` the list of those that are: empty, if a signal came in between.
    ///
    /// # Errors
    /// The kernel's; none in ordinary operation.
    pub fn wait(&self, ready: &mut Vec<Ready>, timeout: Duration) -> io::Result<()> {
        ready.clear();
        let timeout = Timespec::try_from(timeout).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut events = [const { MaybeUninit::<epoll::Event>::uninit() }; MAX_EVENTS];
        let events = match epoll::wait(&self.0, &mut events, Some(&timeout)) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        ready.extend(events.iter().map(|event| {
            let (flags, data) = (event.flags, event.data);
            let broken = flags.intersects(epoll::EventFlags::ERR | epoll::EventFlags::HUP);
            Ready { token: data.u64(), broken }
        }));
        Ok(())
    }
}

/// Ends another thread's wait. Waking twice before it runs is one waking.
#[derive(Debug)]
pub struct Waker(OwnedFd);

impl Waker {
    /// A waker that was not used yet.
    ///
    /// # Errors
    /// The kernel's: too many open files.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Makes it readable. Cannot fail: a counter that is full is readable too.
    pub fn wake(&self) {
        let _full = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Makes it unreadable again, at the start of what the waking was for.
    pub fn clear(&self) {
        let _empty = rustix::io::read(&self.0, &mut [0u8; 8]);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waker_ends_a_wait_once() -> io::Result<()> {
        let (poller, waker, mut ready) = (Poller::new()?, Waker::new()?, Vec::new());
        poller.add(&waker, 7)?;
        poller.wait(&mut ready, Duration::ZERO)?;
        assert_eq!(ready, []);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                waker.wake();
                waker.wake();
            });
            poller.wait(&mut ready, Duration::from_secs(10))
        })?;
        assert_eq!(ready, [Ready { token: 7, broken: false }]);
        waker.clear();
        poller.wait(&mut ready, Duration::ZERO)?;
        assert_eq!(ready, []);
        poller.remove(&waker)?;
        waker.wake();
        poller.wait(&mut ready, Duration::ZERO)?;
        assert_eq!(ready, []);
        Ok(())
    }
}
