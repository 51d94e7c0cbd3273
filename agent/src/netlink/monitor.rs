//! What the kernel tells of changes: to interfaces and addresses, and to nftables. It says that something changed, not what: whoever hears
//! it looks for itself. Messages that are lost count as a change.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};

/// Groups of rtnetlink (linux/rtnetlink.h): interfaces, and addresses of both families.
const ROUTE_GROUPS: u32 = 0x1 | 0x10 | 0x100;

/// The group of nftables (`NFNLGRP_NFTABLES` in linux/netfilter/nfnetlink.h).
const NFTABLES_GROUP: u32 = 7;

/// Most messages taken at once; what is left is taken the next time.
const MOST: usize = 256;

/// Room for one message.
const BUFFER: usize = 32 * 1024;

/// What changed since it was last asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Changes {
    /// Interfaces or addresses.
    pub addresses: bool,
    /// Tables, chains or rules of nftables.
    pub rules: bool,
}

/// Listens in the namespace of the thread that opened it.
pub struct Monitor {
    route: Socket,
    nftables: Option<Socket>,
}

impl Monitor {
    /// Begins to listen; `None` if the kernel does not let us, and without nftables where it has none.
    #[must_use]
    pub fn open() -> Option<Self> {
        let route = listen(NETLINK_ROUTE, |socket| socket.bind(&SocketAddr::new(0, ROUTE_GROUPS)));
        let nftables = listen(NETLINK_NETFILTER, |socket| {
            socket.bind_auto()?;
            socket.add_membership(NFTABLES_GROUP)
        });
        match route {
            Ok(route) => Some(Self {
                route,
                nftables: nftables.ok(),
            }),
            Err(error) => {
                tracing::warn!(%error, "the kernel does not tell of changes; they are looked for from time to time");
                None
            }
        }
    }

    /// What changed since the last call. Never waits.
    pub fn look(&mut self) -> Changes {
        Changes {
            addresses: has_news(&self.route),
            rules: self.nftables.as_ref().is_some_and(has_news),
        }
    }
}

/// Tells of changes to nftables alone, to whoever waits for its descriptor.
#[derive(Debug)]
pub struct RulesMonitor(Socket);

impl RulesMonitor {
    /// Begins to listen in the namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel's; none where nftables is there.
    pub fn open() -> io::Result<Self> {
        listen(NETLINK_NETFILTER, |socket| {
            socket.bind_auto()?;
            socket.add_membership(NFTABLES_GROUP)
        })
        .map(Self)
    }

    /// Whether something changed since the last call. Never waits, and costs one system call if nothing did.
    pub fn look(&mut self) -> bool {
        let mut news = false;
        for _ in 0..MOST {
            // What does not fit is cut off: nobody reads it.
            match rustix::net::recv(&self.0, &mut [0u8; 16], rustix::net::RecvFlags::DONTWAIT) {
                Ok(_) | Err(rustix::io::Errno::NOBUFS) => news = true,
                Err(_) => break,
            }
        }
        news
    }
}

impl AsFd for RulesMonitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn listen(protocol: isize, join: impl FnOnce(&mut Socket) -> io::Result<()>) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.set_non_blocking(true)?;
    join(&mut socket)?;
    Ok(socket)
}

fn has_news(socket: &Socket) -> bool {
    let mut news = false;
    for _ in 0..MOST {
        let mut buffer = Vec::with_capacity(BUFFER);
        match socket.recv(&mut buffer, 0) {
            Ok(_) => news = true,
            Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => news = true,
            Err(_) => break,
        }
    }
    news
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_monitor_that_heard_nothing_says_so_at_once() {
        if let Some(mut monitor) = Monitor::open() {
            let began = std::time::Instant::now();
            monitor.look();
            assert!(began.elapsed() < std::time::Duration::from_secs(1));
        }
    }
}
