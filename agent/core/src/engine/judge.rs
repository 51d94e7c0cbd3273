//! The verdict on one packet: by its flow, or by the filter.
//!
//! [`Table::check_pair`] is the only judge; a flow is its verdict, kept. So the order is: the lease, the flow if its verdict is of the view
//! in force, the filter in the flow's own direction if it is of an older one, the filter in the packet's direction if there is no flow. What
//! begins a stream where components share a TUN is shown to the [witness](crate::witness), behind the filter and before its flow is kept.

use cloison_proto::filter::{InstanceIndex, Table, Verdict};
use cloison_proto::net::Protocol;
use cloison_proto::verdict::DropReason;

use super::Step;
use crate::TunId;
use crate::flow::{Coverage, Entry, FlowKey, Grant, InstancePair, Moment, Opener};
use crate::packet::{Direction, Opening, Parsed};
use crate::path_policy::{Path, PathPolicy};
use crate::wg::LocalKey;
use crate::witness::is_asked_about;

/// What the flow table says of a packet.
enum Known {
    /// Its flow covers it, by a verdict that is in force.
    Passes,
    /// Its flow covers it, by a verdict that is to be given anew.
    Stale(Opener),
    /// It opens a flow against the one that is there.
    Opens,
    /// It cannot belong to its flow.
    Refused,
}

/// Both ends of a flow, by their positions in the table.
#[derive(Clone, Copy)]
struct Ends {
    local: InstanceIndex,
    remote: InstanceIndex,
}

impl<P: PathPolicy, K: LocalKey> Step<'_, P, K> {
    /// Whether a packet may go this way, as one half of the filter sees it; a flow begins or goes on (I1). `tun` is the local end's.
    pub(super) fn judge(&mut self, tun: TunId, path: &Path, packet: &Parsed, direction: Direction) -> Result<(), DropReason> {
        let Some(table) = self.snapshot.policy.filter() else {
            return Ok(());
        };
        if !self.snapshot.lease.holds(self.moment.now) {
            return Err(DropReason::LeaseEnded);
        }
        let key = FlowKey::of(packet, direction);
        let ends = match direction {
            Direction::Outbound => Ends {
                local: path.from,
                remote: path.to,
            },
            Direction::Inbound => Ends {
                local: path.to,
                remote: path.from,
            },
        };
        if self.witness.as_ref().is_some_and(|witness| !witness.is_open(tun)) {
            return Err(DropReason::Unenforced);
        }
        if self.witness.is_some() && is_asked_about(packet, direction) {
            self.ask(table, tun, &key, ends, packet, direction)?;
        }
        let known = self.engine.flows.with(&key, |entry| known(entry, packet, direction, &self.moment));
        match known {
            Some(Known::Passes) => Ok(()),
            Some(Known::Stale(opener)) => self.judge_anew(table, &key, ends, opener, packet, direction),
            Some(Known::Opens) => self.open(table, &key, ends, packet, direction),
            Some(Known::Refused) => Err(DropReason::NoFlow),
            None => match packet.opening() {
                Opening::Opens => self.open(table, &key, ends, packet, direction),
                Opening::Continues => self.go_on(table, &key, ends, packet, direction),
                Opening::NeedsFlow if packet.protocol().is_none() => Err(DropReason::Icmp),
                Opening::NeedsFlow => Err(DropReason::NoFlow),
            },
        }
    }

    /// Shows the witness a packet that its flow or the filter lets pass, before either takes note of it.
    fn ask(
        &mut self,
        table: &Table,
        tun: TunId,
        key: &FlowKey,
        ends: Ends,
        packet: &Parsed,
        direction: Direction,
    ) -> Result<(), DropReason> {
        let covers = |entry: &mut Entry| entry.covers(direction, &packet.transport) == Coverage::Covered;
        if self.engine.flows.with(key, covers) != Some(true) {
            ends.check(table, key, Opener::by(direction), &self.moment)?;
        }
        let is_owners = self.witness.as_mut().is_none_or(|witness| match direction {
            Direction::Outbound => witness.is_senders(tun, packet),
            Direction::Inbound => witness.is_receivers(tun, packet),
        });
        if is_owners { Ok(()) } else { Err(DropReason::NotOwner) }
    }

    /// A flow whose verdict is of an older view, or past its time. What is no longer allowed is left to the sweep, which also tells the
    /// local socket.
    fn judge_anew(
        &self,
        table: &Table,
        key: &FlowKey,
        ends: Ends,
        opener: Opener,
        packet: &Parsed,
        direction: Direction,
    ) -> Result<(), DropReason> {
        let grant = ends.check(table, key, opener, &self.moment)?;
        let granted = self.engine.flows.with(key, |entry| {
            entry.regrant(grant);
            entry.note(direction, &packet.transport, self.moment.now);
        });
        granted.ok_or(DropReason::NoFlow)
    }

    /// A packet that opens a flow in its own direction.
    fn open(&self, table: &Table, key: &FlowKey, ends: Ends, packet: &Parsed, direction: Direction) -> Result<(), DropReason> {
        let opener = Opener::by(direction);
        let grant = ends.check(table, key, opener, &self.moment)?;
        let mut entry = Entry::new(*key, opener, grant, self.moment.now);
        entry.note(direction, &packet.transport, self.moment.now);
        self.engine.flows.insert(entry).map(|_| ())
    }

    /// A TCP segment without SYN and without a flow: a stream that was there before this agent. In the direction of a rule its flow begins
    /// anew; in reverse it passes alone, so many a second.
    fn go_on(&self, table: &Table, key: &FlowKey, ends: Ends, packet: &Parsed, direction: Direction) -> Result<(), DropReason> {
        let denied = match self.open(table, key, ends, packet, direction) {
            Err(DropReason::NoRule) => DropReason::NoRule,
            opened => return opened,
        };
        ends.check(table, key, Opener::by(direction.reversed()), &self.moment)
            .map_err(|_| denied)?;
        let passes = self.engine.mid_stream.admit(ends.pair(), self.moment.now);
        if passes { Ok(()) } else { Err(DropReason::MidStreamLimit) }
    }
}

/// Judges a flow for the sweep; the verdict by which it goes on.
pub(super) fn judge_flow(table: &Table, entry: &Entry, moment: &Moment) -> Result<Grant, DropReason> {
    let key = entry.key();
    let local = table.lookup(key.local).ok_or(DropReason::SourceNotLocal)?;
    let remote = table.lookup(key.remote).ok_or(DropReason::UnknownDestination)?;
    Ends { local, remote }.check(table, &key, entry.opener(), moment)
}

impl Ends {
    /// What the table says of a flow that `opener` opens.
    fn check(self, table: &Table, key: &FlowKey, opener: Opener, moment: &Moment) -> Result<Grant, DropReason> {
        let (from, to, port) = match opener {
            Opener::Here => (self.local, self.remote, key.remote_port),
            Opener::There => (self.remote, self.local, key.local_port),
        };
        let protocol: Protocol = key.kind.protocol();
        match table.check_pair(from, to, protocol, port, moment.mesh) {
            Verdict::Allowed { rule, until } => Ok(Grant {
                rule: rule.0,
                pair: self.pair(),
                stamp: moment.stamp,
                valid_until: until,
            }),
            Verdict::Denied(reason) => Err(reason),
        }
    }

    const fn pair(self) -> InstancePair {
        InstancePair {
            local: self.local.0,
            remote: self.remote.0,
        }
    }
}

fn known(entry: &mut Entry, packet: &Parsed, direction: Direction, moment: &Moment) -> Known {
    match entry.covers(direction, &packet.transport) {
        Coverage::Covered if entry.is_current(moment) => {
            entry.note(direction, &packet.transport, moment.now);
            Known::Passes
        }
        Coverage::Covered => Known::Stale(entry.opener()),
        Coverage::NeedsRule => Known::Opens,
        Coverage::Refused => Known::Refused,
    }
}
