//! What the packet workers note of what they refuse: summed up by what it was, in a notebook that the agent's loop empties.
//!
//! Per batch: the core's denials -> whose socket it was, if it is on the host's TUN and the budget allows a question -> one sum for each kind.
//! The notebook is bounded: what does not fit is in the counters alone.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use cloison_agent_core::packet::Direction;
use cloison_agent_core::worker::Denial;
use cloison_proto::net::Protocol;
use cloison_proto::verdict::DropReason;
use cloison_proto::version::Timestamp;
use parking_lot::Mutex;

use crate::netlink::sock_diag::{Found, Kind, SockDiag};
use crate::witness::Sockets;

/// Most kinds of denials in the notebook.
const MOST: usize = 512;

/// Questions about sockets in one second, by one worker: at a few microseconds each, a part in several thousand of its time.
const QUESTIONS: u32 = 50;

/// What was refused.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Kept {
    /// Which way it went.
    pub direction: Direction,
    /// Why it was refused.
    pub reason: DropReason,
    /// Our end.
    pub local: IpAddr,
    /// The other end.
    pub remote: IpAddr,
    /// What a rule would have to grant; `None` for an ICMP error.
    pub protocol: Option<Protocol>,
    /// The destination port; zero where there is none.
    pub port: u16,
    /// Whose socket it was: the user, and the id of the cgroup.
    pub process: Option<(u32, Option<u64>)>,
}

/// The sums since the notebook was last emptied.
#[derive(Debug, Default)]
pub struct Notebook(Mutex<HashMap<Kept, u64>>);

impl Notebook {
    /// Everything that was noted since the last time, with how many packets it was.
    #[must_use]
    pub fn take(&self) -> HashMap<Kept, u64> {
        std::mem::take(&mut self.0.lock())
    }

    fn note(&self, kept: Kept) {
        let mut noted = self.0.lock();
        let is_full = noted.len() >= MOST;
        if let Some(packets) = noted.get_mut(&kept) {
            *packets = packets.saturating_add(1);
        } else if !is_full {
            noted.insert(kept, 1);
        }
    }
}

/// One worker's pencil.
pub struct Scribe {
    notebook: Arc<Notebook>,
    sockets: Arc<Sockets>,
    /// In the namespace of this worker, from the first denial on; inside, `None` if the kernel cannot be asked.
    diag: Option<Option<SockDiag>>,
    /// The second of the budget, and what of it is spent.
    spent: (u64, u32),
}

impl Scribe {
    /// A scribe for a worker in the host's own namespace.
    #[must_use]
    pub const fn new(notebook: Arc<Notebook>, sockets: Arc<Sockets>) -> Self {
        Self {
            notebook,
            sockets,
            diag: None,
            spent: (0, 0),
        }
    }

    /// Notes a batch's denials. To be called before their answers reach the sockets, which are gone soon after.
    pub fn note(&mut self, denials: &[Denial], now: Timestamp) {
        for denial in denials {
            let (local, remote) = match denial.direction {
                Direction::Outbound => (denial.source, denial.destination),
                Direction::Inbound => (denial.destination, denial.source),
            };
            let process = self.process(denial, now);
            self.notebook.note(Kept {
                direction: denial.direction,
                reason: denial.reason,
                local,
                remote,
                protocol: denial.protocol,
                port: denial.port,
                process,
            });
        }
    }

    /// Whose socket is to blame: the sender's, unless it was the receiver's that was refused.
    fn process(&mut self, denial: &Denial, now: Timestamp) -> Option<(u32, Option<u64>)> {
        let kind = match denial.protocol? {
            Protocol::Tcp => Kind::Tcp,
            Protocol::Udp => Kind::Udp,
            Protocol::Icmp => return None,
        };
        let owners = self.sockets.owners();
        let source = SocketAddr::new(denial.source, denial.source_port);
        let destination = SocketAddr::new(denial.destination, denial.port);
        let is_strangers = |found: &Found, address| owners.of_socket(found.user, found.cgroup) != owners.of_address(address);
        let mut blamed = None;
        if denial.direction == Direction::Outbound && owners.of_address(denial.source).is_some() {
            let found = self.find(kind, source, destination, now)?;
            blamed = found.filter(|found| denial.reason != DropReason::NotOwner || is_strangers(found, denial.source));
        }
        if blamed.is_none() && denial.reason == DropReason::NotOwner && owners.of_address(denial.destination).is_some() {
            let found = self.find(kind, destination, source, now)?;
            blamed = found.filter(|found| is_strangers(found, denial.destination));
        }
        blamed.map(|found| (found.user, found.cgroup))
    }

    /// A socket by its ends; `None` also inside if there is none, and outside if it cannot be asked for.
    #[expect(clippy::option_option, reason = "no socket and no answer are two things")]
    fn find(&mut self, kind: Kind, local: SocketAddr, remote: SocketAddr, now: Timestamp) -> Option<Option<Found>> {
        let second = now.0 / 1_000_000_000;
        if self.spent.0 != second {
            self.spent = (second, 0);
        }
        if self.spent.1 >= QUESTIONS {
            return None;
        }
        self.spent.1 = self.spent.1.saturating_add(1);
        let interface = self.sockets.tun.load().as_ref()?.interface;
        let diag = self.diag.get_or_insert_with(|| SockDiag::open().ok()).as_mut()?;
        diag.find(kind, local, remote, interface).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_notebook_sums_up_and_ends() {
        let notebook = Notebook::default();
        let denial = |port| Kept {
            direction: Direction::Outbound,
            reason: DropReason::NoRule,
            local: [10, 77, 1, 0].into(),
            remote: [10, 77, 1, 1].into(),
            protocol: Some(Protocol::Tcp),
            port,
            process: None,
        };
        for _ in 0..3 {
            (0..=u16::MAX).for_each(|port| notebook.note(denial(port)));
        }
        let noted = notebook.take();
        assert_eq!(noted.len(), MOST);
        assert!(noted.values().all(|packets| *packets == 3), "what is known goes on being summed");
        assert!(notebook.take().is_empty());
    }

    #[test]
    fn a_scan_costs_no_more_questions_than_the_budget() {
        let mut scribe = Scribe::new(Arc::default(), Arc::default());
        let ends = ([10, 77, 1, 0], 1).into();
        let now = Timestamp(7_000_000_000);
        for _ in 0..1_000 {
            let _unknown = scribe.find(Kind::Tcp, ends, ends, now);
        }
        assert_eq!(scribe.spent, (7, QUESTIONS));
        let _later = scribe.find(Kind::Tcp, ends, ends, Timestamp(8_000_000_000));
        assert_eq!(scribe.spent, (8, 1));
    }
}
