//! What must hold of every packet that is sent, and of every packet that a TUN is given.
//!
//! Packets are known by their bytes, which no two of them share. A delivered packet that nobody sent is an answer that an agent made; it must
//! be one to something that is denied.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::{Context as _, Result, anyhow, ensure};
use cloison_agent_core::packet::{Opening, Parsed, QuotedTransport, Transport, parse};
use cloison_proto::id::HostId;
use cloison_proto::label::ComponentName;
use cloison_proto::net::Protocol;
use cloison_proto::verdict::DropReason;
use cloison_proto::version::{MeshTime, Version};

use super::history::{History, Instance};
use super::host::Fate;

/// One conversation as one end sees it: protocol, its own address and port, the other's. Echo has its identifier as both ports.
type Tuple = (Protocol, (IpAddr, u16), (IpAddr, u16));

/// A packet that was sent by somebody.
#[derive(Debug)]
struct Sent {
    by: HostId,
    delivered: u32,
}

/// What a host knows at the moment of a verdict.
#[derive(Debug, Clone, Copy)]
pub struct Standpoint {
    /// The host.
    pub host: HostId,
    /// The version of its view; `None` without one.
    pub version: Option<Version>,
    /// Whether its lease holds.
    pub holds: bool,
    /// Mesh time, as it knows it.
    pub mesh: MeshTime,
}

/// Watches every packet of one run.
#[derive(Default)]
pub struct Watch {
    sent: BTreeMap<Vec<u8>, Sent>,
    /// What each host's instances have said, by conversation, since that host's last start.
    spoken: BTreeMap<HostId, BTreeSet<Tuple>>,
    /// What each conversation's last packet was, whether it passed or not.
    last: BTreeMap<(HostId, Tuple), Opening>,
}

/// What the model makes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Model {
    /// It may pass by itself.
    Allowed,
    /// It may pass if its flow is there.
    WithItsFlow,
    /// It must not pass.
    Forbidden,
}

impl Watch {
    /// A packet is about to be sent by `host`, honestly or not.
    ///
    /// # Errors
    /// If another one with the same bytes was sent before: the scenario is at fault.
    pub fn sends(&mut self, host: HostId, packet: &[u8]) -> Result<()> {
        let sent = Sent { by: host, delivered: 0 };
        let old = self.sent.insert(packet.to_vec(), sent);
        ensure!(old.is_none_or(|old| old.by == host), "two packets with the same bytes");
        Ok(())
    }

    /// A packet is about to be sent by an instance of an honest host.
    ///
    /// # Errors
    /// As [`Watch::sends`].
    pub fn says(&mut self, host: HostId, packet: &[u8]) -> Result<()> {
        self.sends(host, packet)?;
        let parsed = read(packet)?;
        if let Some(tuple) = tuple_of(&parsed) {
            self.last.insert((host, tuple), parsed.opening());
        }
        Ok(())
    }

    /// How often a packet was delivered.
    #[must_use]
    pub fn deliveries(&self, packet: &[u8]) -> u32 {
        self.sent.get(packet).map_or(0, |sent| sent.delivered)
    }

    /// Forgets what a host's instances have said: its agent began anew.
    pub fn forget(&mut self, host: HostId) {
        self.spoken.remove(&host);
    }

    /// An honest agent has dealt with a packet of its own instance. It refuses what the model forbids at its version, and nothing else
    /// (promise 3; I1 at the sender).
    ///
    /// # Errors
    /// If it does not.
    pub fn was_sent(&mut self, history: &History, at: Standpoint, packet: &[u8], fate: Fate) -> Result<()> {
        let parsed = read(packet)?;
        let model = self.judge(history, at, &parsed, false)?;
        let passes = matches!(fate, Fate::Passed | Fate::Waits);
        ensure!(
            !passes || model != Model::Forbidden,
            "I1: {} let go what is forbidden: {fate:?} {parsed:?}",
            at.host
        );
        if passes {
            self.spoken.entry(at.host).or_default().extend(tuple_of(&parsed));
        }
        let transient = matches!(
            fate,
            Fate::Dropped(
                DropReason::NoEndpoint
                    | DropReason::QueueFull
                    | DropReason::FlowQuota
                    | DropReason::MidStreamLimit
                    | DropReason::Congestion
            )
        );
        let is_refused = model == Model::Allowed && !passes && !transient;
        ensure!(!is_refused, "{} refused what is allowed: {fate:?} {parsed:?}", at.host);
        Ok(())
    }

    /// A TUN of an honest host was given a packet.
    ///
    /// # Errors
    /// If I1, I2, I3 or I13 is broken.
    pub fn was_delivered(&mut self, history: &History, at: Standpoint, to: &ComponentName, packet: &[u8]) -> Result<()> {
        let parsed = read(packet)?;
        let here = (to.clone(), at.host);
        ensure!(
            history.owner(parsed.dst) == Some(&here),
            "{to} of {} was given a packet for {}",
            at.host,
            parsed.dst
        );
        let Some(by) = self.sent.get(packet).map(|sent| sent.by) else {
            return self.was_answered(history, at, &parsed);
        };
        let (_, owner) = history
            .owner(parsed.src)
            .with_context(|| format!("I3: {} is nobody's", parsed.src))?;
        ensure!(*owner == by, "I3: {by} spoke in the name of {owner}: {parsed:?}");
        ensure!(at.holds, "I13: {} took a packet after its lease: {parsed:?}", at.host);
        let model = self.judge(history, at, &parsed, true)?;
        ensure!(
            model != Model::Forbidden,
            "I1: {} at {:?} took what is forbidden: {parsed:?}",
            at.host,
            at.version
        );
        let is_lone = model == Model::Allowed || self.is_answered(at.host, &parsed);
        ensure!(is_lone, "I1: {} took an answer to nothing: {parsed:?}", at.host);
        let sent = self.sent.get_mut(packet).context("a packet that was sent")?;
        sent.delivered += 1;
        ensure!(sent.delivered == 1, "a packet was delivered twice: {parsed:?}");
        Ok(())
    }

    /// An agent told its own instance that something is denied: it must be.
    fn was_answered(&self, history: &History, at: Standpoint, answer: &Parsed) -> Result<()> {
        let denied = match answer.transport {
            Transport::Tcp {
                flags, src_port, dst_port, ..
            } if flags.rst() => (Protocol::Tcp, dst_port, src_port),
            Transport::IcmpError { quoted, .. } => match quoted.transport {
                QuotedTransport::Udp { src_port, dst_port } => (Protocol::Udp, src_port, dst_port),
                QuotedTransport::Echo { id, .. } => (Protocol::Icmp, id, id),
                QuotedTransport::Tcp { src_port, dst_port, .. } => (Protocol::Tcp, src_port, dst_port),
            },
            Transport::Tcp { .. } | Transport::Udp { .. } | Transport::Echo { .. } => {
                return Err(anyhow!("{} was given what nobody sent: {answer:?}", at.host));
            }
        };
        let (protocol, here, there) = denied;
        let Some(state) = at.version.filter(|_| at.holds).map(|version| history.at(version)).transpose()? else {
            return Ok(());
        };
        let (Some(local), Some(remote)) = (history.owner(answer.dst), history.owner(answer.src)) else {
            return Ok(());
        };
        let is_open = state.may(local, remote, (protocol, there), at.mesh) || state.may(remote, local, (protocol, here), at.mesh);
        // What is allowed is refused all the same where it needs a flow and there is none: a SYN-ACK whose SYN was let in by an older view. Of
        // UDP and echo the answer does not say whether it was one.
        let tuple = (protocol, (answer.dst, here), (answer.src, there));
        let needs_flow = protocol != Protocol::Tcp || self.last.get(&(at.host, tuple)) == Some(&Opening::NeedsFlow);
        ensure!(
            !is_open || needs_flow,
            "{} cut or denied what is allowed: {answer:?} at {:?}",
            at.host,
            at.version
        );
        Ok(())
    }

    /// What the model says of a packet, at the version of the host that judges it.
    fn judge(&self, history: &History, at: Standpoint, packet: &Parsed, inbound: bool) -> Result<Model> {
        let Some(version) = at.version.filter(|_| at.holds) else {
            return Ok(Model::Forbidden);
        };
        let state = history.at(version)?;
        let (Some(from), Some(to)) = (history.owner(packet.src), history.owner(packet.dst)) else {
            return Ok(Model::Forbidden);
        };
        let own: &Instance = if inbound { to } else { from };
        ensure!(own.1 == at.host || !inbound, "a packet for another host");
        let (src, dst) = packet.ports();
        let Some(protocol) = packet.protocol() else {
            return Ok(Model::WithItsFlow);
        };
        let onward = state.may(from, to, (protocol, dst), at.mesh);
        let back = state.may(to, from, (protocol, src), at.mesh);
        Ok(match packet.opening() {
            Opening::Opens if onward => Model::Allowed,
            Opening::Continues if onward || back => Model::Allowed,
            Opening::Opens if back && protocol == Protocol::Udp => Model::WithItsFlow,
            Opening::NeedsFlow if onward || back => Model::WithItsFlow,
            Opening::Opens | Opening::Continues | Opening::NeedsFlow => Model::Forbidden,
        })
    }

    /// Whether the receiver has spoken on this conversation before, so that there may be a flow.
    fn is_answered(&self, host: HostId, packet: &Parsed) -> bool {
        let spoken = |tuple: Tuple| self.spoken.get(&host).is_some_and(|spoken| spoken.contains(&tuple));
        match (packet.transport, tuple_of(packet)) {
            (Transport::IcmpError { quoted, .. }, _) => quoted_tuple(&quoted.transport, quoted.src, quoted.dst).is_some_and(spoken),
            (_, Some((protocol, here, there))) => spoken((protocol, there, here)),
            (_, None) => false,
        }
    }
}

fn read(packet: &[u8]) -> Result<Parsed> {
    parse(packet).map_err(|reason| anyhow!("a packet that cannot be read ({reason}): {packet:02x?}"))
}

/// The conversation of a packet, from its sender's side.
fn tuple_of(packet: &Parsed) -> Option<Tuple> {
    let (src, dst) = match packet.transport {
        Transport::Tcp { src_port, dst_port, .. } | Transport::Udp { src_port, dst_port } => (src_port, dst_port),
        Transport::Echo { id, .. } => (id, id),
        Transport::IcmpError { .. } => return None,
    };
    Some((packet.protocol()?, (packet.src, src), (packet.dst, dst)))
}

fn quoted_tuple(quoted: &QuotedTransport, src: IpAddr, dst: IpAddr) -> Option<Tuple> {
    Some(match quoted {
        QuotedTransport::Tcp { src_port, dst_port, .. } => (Protocol::Tcp, (src, *src_port), (dst, *dst_port)),
        QuotedTransport::Udp { src_port, dst_port } => (Protocol::Udp, (src, *src_port), (dst, *dst_port)),
        QuotedTransport::Echo { id, .. } => (Protocol::Icmp, (src, *id), (dst, *id)),
    })
}
