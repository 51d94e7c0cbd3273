//! Waiting: an epoll set whose members carry a number, and a waker that ends the wait from another thread. Level-triggered: what was not
//! read dry is reported again.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::buffer::spare_capacity;
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
pub struct Poller {
    epoll: OwnedFd,
    events: Vec<epoll::Event>,
}

impl Poller {
    /// An empty set.
    ///
    /// # Errors
    /// The kernel's: too many open files.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            events: Vec::with_capacity(MAX_EVENTS),
        })
    }

    /// Adds `fd`, to be reported as `token` when it can be read.
    ///
    /// # Errors
    /// The kernel's: `fd` is in the set already, or cannot be waited for.
    pub fn add(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        Ok(epoll::add(
            &self.epoll,
            fd,
            epoll::EventData::new_u64(token),
            epoll::EventFlags::IN,
        )?)
    }

    /// Takes `fd` out again.
    ///
    /// # Errors
    /// The kernel's: `fd` is not in the set.
    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.epoll, fd)?)
    }

    /// Waits until a member is ready or `timeout` is over, and reports what is ready: nothing, if a signal came in between.
    ///
    /// # Errors
    /// The kernel's; none in ordinary operation.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<impl Iterator<Item = Ready> + '_> {
        let timeout = Timespec::try_from(timeout).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        self.events.clear();
        match epoll::wait(&self.epoll, spare_capacity(&mut self.events), Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let broken = epoll::EventFlags::ERR | epoll::EventFlags::HUP;
        Ok(self.events.iter().map(move |event| {
            let flags = event.flags;
            Ready {
                token: event.data.u64(),
                broken: flags.intersects(broken),
            }
        }))
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
        let (mut poller, waker) = (Poller::new()?, Waker::new()?);
        poller.add(&waker, 7)?;
        assert_eq!(poller.wait(Duration::ZERO)?.count(), 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                waker.wake();
                waker.wake();
            });
            let ready: Vec<_> = poller.wait(Duration::from_secs(10))?.collect();
            assert_eq!(ready, [Ready { token: 7, broken: false }]);
            io::Result::Ok(())
        })?;
        waker.clear();
        assert_eq!(poller.wait(Duration::ZERO)?.count(), 0);
        poller.remove(&waker)?;
        waker.wake();
        assert_eq!(poller.wait(Duration::ZERO)?.count(), 0);
        Ok(())
    }
}
