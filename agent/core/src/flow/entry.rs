//! One flow: the verdict that allowed it, when it was last seen, and what a reset of its local socket needs.
//!
//! An entry is 80 bytes, so that 65,536 of them fit the 8 MiB that the whole table may take; hence the flat fields, the seconds, and the
//! bits.

use std::net::IpAddr;
use std::time::Duration;

use cloison_proto::version::{MeshTime, Timestamp};

use crate::packet::{Direction, TcpFlags, Transport};

use super::key::{FlowKey, FlowKind};
use super::quota::InstancePair;

/// After this long without a packet, a TCP flow is forgotten. If it goes on after all, it is judged by the rules as after a restart.
const TCP_IDLE: Duration = Duration::from_secs(300);

/// The same for a TCP flow that was closed from both sides or reset: long enough for the last acknowledgments, short enough that many short
/// connections do not fill the quota.
const TCP_CLOSED_IDLE: Duration = Duration::from_secs(10);

/// The same for a UDP flow without an answer.
const UDP_IDLE: Duration = Duration::from_secs(30);

/// The same for a UDP flow with an answer (RFC 4787 section 4.3: at least two minutes).
const UDP_REPLIED_IDLE: Duration = Duration::from_secs(180);

/// The same for an echo flow.
const ECHO_IDLE: Duration = Duration::from_secs(30);

/// Which end began a flow: the end whose direction a rule allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Opener {
    /// The local instance.
    Here,
    /// The remote instance.
    There,
}

impl Opener {
    /// Who opens a flow by a packet that goes this way.
    #[must_use]
    pub const fn by(direction: Direction) -> Self {
        match direction {
            Direction::Outbound => Self::Here,
            Direction::Inbound => Self::There,
        }
    }

    /// The direction of the opener's packets: the one in which the flow's rule is to be looked up.
    #[must_use]
    pub const fn direction(self) -> Direction {
        match self {
            Self::Here => Direction::Outbound,
            Self::There => Direction::Inbound,
        }
    }
}

/// What the rules said of a flow, and according to which view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// Index of the rule, in the table of the view that `stamp` names.
    pub rule: u32,
    /// The two instances, as the quotas count them.
    pub pair: InstancePair,
    /// Number of the `install` that brought the view.
    pub stamp: u64,
    /// When the grant must be judged again at the latest: the rule's end, or the lease's.
    pub valid_until: MeshTime,
}

/// What a packet's verdict is measured against: now, by both clocks, and the number of the `install` that brought the view in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// The host's clock, for idle times.
    pub now: Timestamp,
    /// Mesh time, for grants.
    pub mesh: MeshTime,
    /// Number of the `install` that brought the view in force.
    pub stamp: u64,
}

/// Whether a flow lets a packet of it pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coverage {
    /// It passes by the flow's verdict.
    Covered,
    /// A SYN against the opener: only a rule in its own direction can allow it, and the flow is then to be inserted anew.
    NeedsRule,
    /// A SYN-ACK of the opener answers nothing: `DropReason::NoFlow`.
    Refused,
}

/// One flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    stamp: u64,
    valid_until: MeshTime,
    pair: InstancePair,
    rule: u32,
    /// In seconds of the host's clock, rounded down.
    last_seen: u32,
    /// The last ACK number that the local side sent, if `ACKED`: what its socket expects next.
    local_ack: u32,
    /// The sequence number of the local side's last SYN, if `SYN_SENT`.
    local_syn: u32,
    local_port: u16,
    remote_port: u16,
    local: IpAddr,
    remote: IpAddr,
    kind: FlowKind,
    flags: u8,
}

/// The remote end began the flow.
const OPENED_THERE: u8 = 1 << 0;
/// A packet went against the opener's direction.
const REPLIED: u8 = 1 << 1;
/// The local side sent a SYN without ACK; `local_syn` is its sequence number.
const SYN_SENT: u8 = 1 << 2;
/// The local side sent an ACK; `local_ack` is its number.
const ACKED: u8 = 1 << 3;
/// The local side sent a FIN.
const FIN_SENT: u8 = 1 << 4;
/// The remote side sent a FIN.
const FIN_RECEIVED: u8 = 1 << 5;
/// Either side sent a RST that counts.
const WAS_RESET: u8 = 1 << 6;

impl Entry {
    /// A flow that begins with a packet of its opener; the packet itself is still to be [noted](Entry::note).
    #[must_use]
    pub fn new(key: FlowKey, opener: Opener, grant: Grant, now: Timestamp) -> Self {
        let FlowKey {
            local,
            remote,
            kind,
            local_port,
            remote_port,
        } = key;
        let Grant {
            rule,
            pair,
            stamp,
            valid_until,
        } = grant;
        let flags = match opener {
            Opener::Here => 0,
            Opener::There => OPENED_THERE,
        };
        let last_seen = seconds(now);
        Self {
            stamp,
            valid_until,
            pair,
            rule,
            last_seen,
            local_ack: 0,
            local_syn: 0,
            local_port,
            remote_port,
            local,
            remote,
            kind,
            flags,
        }
    }

    /// What identifies the flow.
    #[must_use]
    pub const fn key(&self) -> FlowKey {
        FlowKey {
            local: self.local,
            remote: self.remote,
            kind: self.kind,
            local_port: self.local_port,
            remote_port: self.remote_port,
        }
    }

    /// Which end began it.
    #[must_use]
    pub const fn opener(&self) -> Opener {
        if self.has(OPENED_THERE) { Opener::There } else { Opener::Here }
    }

    /// The verdict that allows it.
    #[must_use]
    pub const fn grant(&self) -> Grant {
        Grant {
            rule: self.rule,
            pair: self.pair,
            stamp: self.stamp,
            valid_until: self.valid_until,
        }
    }

    /// Whether a packet went against the opener's direction.
    #[must_use]
    pub const fn replied(&self) -> bool {
        self.has(REPLIED)
    }

    /// When the last packet was seen, rounded down to a second.
    #[must_use]
    pub fn last_seen(&self) -> Timestamp {
        Timestamp(0) + Duration::from_secs(self.last_seen.into())
    }

    /// The ACK number that the local side of a TCP flow sent last.
    #[must_use]
    pub fn local_ack(&self) -> Option<u32> {
        self.has(ACKED).then_some(self.local_ack)
    }

    /// The sequence number of the SYN by which the local side of a TCP flow began.
    #[must_use]
    pub fn local_syn(&self) -> Option<u32> {
        self.has(SYN_SENT).then_some(self.local_syn)
    }

    /// Replaces the verdict, after the flow was judged anew. The table moves the flow to the quotas of the new pair.
    pub const fn regrant(&mut self, grant: Grant) {
        self.rule = grant.rule;
        self.pair = grant.pair;
        self.stamp = grant.stamp;
        self.valid_until = grant.valid_until;
    }

    /// Whether the verdict is that of the view in force and not past its time. If not, the flow is to be judged anew.
    #[must_use]
    pub fn is_current(&self, moment: &Moment) -> bool {
        self.stamp == moment.stamp && moment.mesh < self.valid_until
    }

    /// Whether this flow lets such a packet pass.
    #[must_use]
    pub fn covers(&self, direction: Direction, transport: &Transport) -> Coverage {
        let of_opener = direction == self.opener().direction();
        match transport {
            Transport::Tcp { flags, .. } if flags.syn() => match (flags.ack(), of_opener) {
                (false, true) | (true, false) => Coverage::Covered,
                (false, false) => Coverage::NeedsRule,
                (true, true) => Coverage::Refused,
            },
            Transport::Tcp { .. } | Transport::Udp { .. } | Transport::Echo { .. } | Transport::IcmpError { .. } => Coverage::Covered,
        }
    }

    /// Takes note of a packet that passes. An ICMP error about the flow changes nothing: it must not keep the flow alive.
    pub fn note(&mut self, direction: Direction, transport: &Transport, now: Timestamp) {
        if let Transport::IcmpError { .. } = transport {
            return;
        }
        self.last_seen = self.last_seen.max(seconds(now));
        if direction != self.opener().direction() {
            self.flags |= REPLIED;
        }
        if let Transport::Tcp { flags, seq, ack, .. } = *transport {
            self.note_segment(direction, flags, seq, ack);
        }
    }

    /// Whether the flow has been without packets for longer than its kind may be.
    #[must_use]
    pub fn is_idle(&self, now: Timestamp) -> bool {
        now.since(self.last_seen()) >= self.idle_limit()
    }

    /// How long the flow may be without packets.
    #[must_use]
    pub const fn idle_limit(&self) -> Duration {
        match self.kind {
            FlowKind::Tcp if self.is_closed() => TCP_CLOSED_IDLE,
            FlowKind::Tcp => TCP_IDLE,
            FlowKind::Udp if self.replied() => UDP_REPLIED_IDLE,
            FlowKind::Udp => UDP_IDLE,
            FlowKind::EchoFromHere | FlowKind::EchoFromThere => ECHO_IDLE,
        }
    }

    /// Whether a TCP flow was closed from both sides, or reset.
    #[must_use]
    pub const fn is_closed(&self) -> bool {
        self.has(WAS_RESET) || (self.has(FIN_SENT) && self.has(FIN_RECEIVED))
    }

    pub(super) const fn pair(&self) -> InstancePair {
        self.pair
    }

    fn note_segment(&mut self, direction: Direction, flags: TcpFlags, seq: u32, ack: u32) {
        if flags.syn() {
            // A connection begins, perhaps on the ports of an older one.
            self.flags &= !(FIN_SENT | FIN_RECEIVED | WAS_RESET);
            if !flags.ack() {
                self.flags &= !(ACKED | SYN_SENT);
            }
        }
        match direction {
            // One that the local socket will ignore does not end the flow (RFC 5961 section 3.2).
            Direction::Inbound if flags.rst() && self.has(ACKED) && seq != self.local_ack => {}
            _ if flags.rst() => self.flags |= WAS_RESET,
            Direction::Inbound if flags.fin() => self.flags |= FIN_RECEIVED,
            Direction::Inbound => {}
            Direction::Outbound => self.note_sent(flags, seq, ack),
        }
    }

    fn note_sent(&mut self, flags: TcpFlags, seq: u32, ack: u32) {
        if flags.fin() {
            self.flags |= FIN_SENT;
        }
        if flags.syn() && !flags.ack() {
            self.local_syn = seq;
            self.flags |= SYN_SENT;
        }
        // Workers may see segments out of order; the later number counts (RFC 9293 section 3.4, modulo 2^32).
        let later = ack.wrapping_sub(self.local_ack) < 1 << 31;
        if flags.ack() && (later || flags.syn() || !self.has(ACKED)) {
            self.local_ack = ack;
            self.flags |= ACKED;
        }
    }

    const fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// Seconds of the host's clock: enough for 136 years of uptime.
fn seconds(now: Timestamp) -> u32 {
    u32::try_from(now.since(Timestamp(0)).as_secs()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
