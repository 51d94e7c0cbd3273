//! Desired state -> idempotent apply, over rtnetlink: links, addresses, routes, rules; and elements of nftables' sets. Each `apply` reads what is there, and adds and removes the
//! difference; applying twice changes nothing.
//!
//! A [`Netlink`] belongs to the network namespace of the thread that opened it. It is synchronous: changes are rare, a few messages each,
//! and run on threads that exist for them.

pub mod addr;
pub mod link;
pub mod monitor;
pub mod nftables;
pub mod route;
pub mod rule;
pub mod sock_diag;

use std::io;
use std::time::Duration;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// The kernel answers at once; an answer that takes longer than this is lost.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// How often a dump that other changes disturbed is tried again.
const DUMP_ATTEMPTS: usize = 5;

/// Why the kernel's network state could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The agent lacks a privilege.
    #[error("cannot {0}: not permitted; the agent needs CAP_NET_ADMIN (run it as root, or grant that capability in its unit)")]
    NotPermitted(&'static str, #[source] io::Error),
    /// The kernel refused.
    #[error("cannot {0}")]
    Refused(&'static str, #[source] io::Error),
}

impl NetlinkError {
    fn new(what: &'static str, e: io::Error) -> Self {
        match e.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted(what, e),
            _ => Self::Refused(what, e),
        }
    }

    /// The kernel's error number, if it gave one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::NotPermitted(_, e) | Self::Refused(_, e) => e.raw_os_error(),
        }
    }
}

/// A connection to the kernel's routing tables and interfaces in one network namespace.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens a connection in the namespace of the calling thread.
    ///
    /// # Errors
    /// [`NetlinkError`].
    pub fn open() -> Result<Self, NetlinkError> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            socket.set_non_blocking(true)?;
            Ok(socket)
        };
        Ok(Self {
            socket: open().map_err(|e| NetlinkError::new("open a netlink socket", e))?,
            sequence: 0,
        })
    }

    /// Sends a change and waits for its acknowledgement.
    fn change(&mut self, what: &'static str, message: RouteNetlinkMessage, flags: u16) -> Result<(), NetlinkError> {
        self.exchange(message, NLM_F_ACK | flags, |_| ())
            .map_err(|e| NetlinkError::new(what, e))
    }

    /// Asks for all objects of the kind that `message` names.
    fn dump(&mut self, what: &'static str, message: &RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        let mut attempts = 0;
        loop {
            let mut objects = Vec::new();
            match self.exchange(message.clone(), NLM_F_DUMP, |object| objects.push(object)) {
                Ok(()) => return Ok(objects),
                Err(e) if e.kind() == io::ErrorKind::Interrupted && attempts < DUMP_ATTEMPTS => attempts += 1,
                Err(e) => return Err(NetlinkError::new(what, e)),
            }
        }
    }

    fn exchange(&mut self, message: RouteNetlinkMessage, flags: u16, mut each: impl FnMut(RouteNetlinkMessage)) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut disturbed = false;
        loop {
            let answer = self.receive()?;
            let mut rest = answer.as_slice();
            while !rest.is_empty() {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(io::Error::other)?;
                rest = rest.get(padded_length(&message.header)..).unwrap_or_default();
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                disturbed |= message.header.flags & DUMP_DISTURBED != 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(object) => each(object),
                    NetlinkPayload::Error(e) if e.code.is_some() => return Err(e.to_io()),
                    NetlinkPayload::Error(_) => return Ok(()),
                    NetlinkPayload::Done(_) if disturbed => return Err(io::ErrorKind::Interrupted.into()),
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Overrun(_) => return Err(io::ErrorKind::Interrupted.into()),
                    NetlinkPayload::Noop | _ => {}
                }
            }
        }
    }

    fn receive(&self) -> io::Result<Vec<u8>> {
        let timeout = Timespec::try_from(ANSWER_WITHIN).map_err(io::Error::other)?;
        if poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&timeout))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.socket.recv_from_full().map(|(bytes, _)| bytes)
    }
}

/// The dump was disturbed by a change and may be inconsistent (`NLM_F_DUMP_INTR` in linux/netlink.h).
const DUMP_DISTURBED: u16 = 0x10;

/// Messages in one buffer begin at multiples of four.
fn padded_length(header: &NetlinkHeader) -> usize {
    usize::try_from(header.length).map_or(usize::MAX, |l| l.max(16).next_multiple_of(4))
}
