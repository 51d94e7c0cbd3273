//! What the agent's local status socket is asked and answers: one JSON object a line, in either direction.
//!
//! The socket tells only what this host's own view tells, to root and to its owner. It changes nothing but the time of a handshake, and of the
//! next change of the WireGuard key.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::id::{HostId, MeshId, RuleId};
use crate::key::WgPublicKey;
use crate::label::{ComponentName, HostName, ServiceName};
use crate::net::{PortSpec, Protocol};
use crate::verdict::DropReason;
use crate::version::{MeshTime, Version};

/// Longest request, in bytes with its newline.
pub const MAX_REQUEST: usize = 4 * 1024;

/// Most flows in one answer.
pub const MAX_FLOWS: usize = 10_000;

/// A question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// How the agent does.
    Status,
    /// The flows.
    Flows,
    /// Whether something is allowed, by this host's view.
    Explain {
        /// Who begins; `None` means any component of this host.
        from: Option<ComponentName>,
        /// Whom it is to reach.
        to: ComponentName,
        /// On what.
        on: Port,
    },
    /// A handshake with each host of a component.
    Ping {
        /// The component.
        component: ComponentName,
    },
    /// The last denials.
    Denials,
    /// Change the WireGuard key now.
    RotateKey,
}

/// On what a component is to be reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Port {
    /// On anything at all.
    Any,
    /// On a service that a rule of the view names.
    Service(ServiceName),
    /// On protocol and ports: `tcp/5432`, `icmp`.
    Ports(PortSpec),
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// To [`Request::Flows`].
    Flows {
        /// The flows, at most [`MAX_FLOWS`].
        flows: Vec<Flow>,
        /// How many there are.
        total: u64,
    },
    /// To [`Request::Explain`].
    Explain(Explanation),
    /// To [`Request::Ping`].
    Ping {
        /// One for each host of the component that the view names.
        hosts: Vec<Ping>,
    },
    /// To [`Request::Denials`].
    Denials {
        /// The newest last.
        denials: Vec<Denial>,
    },
    /// To [`Request::RotateKey`]: how far the change is.
    RotateKey(KeyStatus),
    /// The request could not be answered.
    Error(Problem),
}

/// Why a request has no answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Stable code.
    pub code: String,
    /// What failed and why.
    pub what: String,
    /// What to do.
    pub hint: String,
}

/// How the agent does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The agent's version.
    pub software: String,
    /// The host's id.
    pub host: HostId,
    /// The host's name.
    pub name: HostName,
    /// The mesh.
    pub mesh: MeshId,
    /// Seconds since the agent started.
    pub uptime_secs: u64,
    /// The host's incarnation.
    pub incarnation: u64,
    /// The WireGuard port.
    pub listen_port: u16,
    /// The interface.
    pub interface: String,
    /// Version of the view in force; `None` while nothing is allowed for want of one.
    pub version: Option<Version>,
    /// State hash of the view in force.
    pub state_hash: Option<String>,
    /// The lease of the view in force.
    pub lease: Lease,
    /// How far this host's wall clock is ahead of the mesh's (negative: behind), in seconds; `None` until a lease told the mesh's time.
    #[serde(default)]
    pub clock_offset_secs: Option<i64>,
    /// The link with the coordinator.
    pub link: Link,
    /// This host's WireGuard key.
    pub wg_key: KeyStatus,
    /// Instances of this host.
    pub instances: Vec<Instance>,
    /// Hosts that a rule pairs this one with.
    pub peers: Vec<Peer>,
    /// Packets.
    pub packets: Packets,
    /// Names of components in the hosts file.
    #[serde(default)]
    pub names: Names,
    /// Names of components over DNS.
    #[serde(default)]
    pub resolver: Resolver,
    /// What systemd-resolved was told of the resolver.
    #[serde(default)]
    pub resolved: Resolved,
    /// Items of the view that this agent could not use.
    pub ignored_items: u64,
    /// What people should look at.
    pub warnings: Vec<String>,
}

/// How long the view may still be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// What is left, in seconds; zero: nothing is allowed.
    pub left_secs: u64,
    /// How long it was given for, in seconds; zero without one.
    pub valid_for_secs: u64,
    /// Mesh time, as far as leases tell it.
    pub mesh_time: MeshTime,
}

/// The link with the coordinator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Link {
    /// It stands.
    Linked {
        /// The coordinator's address.
        address: String,
        /// For how long, in seconds.
        for_secs: u64,
    },
    /// An attempt is under way.
    Connecting,
    /// The next attempt comes later.
    Waiting {
        /// In how many seconds.
        next_secs: u64,
        /// Why the last one ended.
        why: String,
    },
}

/// Names of components in the hosts file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Names {
    /// The agent's configuration says that there are to be none.
    #[default]
    Off,
    /// There was no view yet.
    Waiting {
        /// The file.
        file: PathBuf,
    },
    /// They are there.
    Kept {
        /// The file.
        file: PathBuf,
        /// How many instances have a name.
        instances: usize,
        /// How many have none because the block would be too long.
        left_out: usize,
    },
    /// They are not, or not the right ones.
    Failed {
        /// The file.
        file: PathBuf,
        /// Why.
        why: String,
        /// What to do.
        hint: String,
    },
}

/// Names of components over DNS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Resolver {
    /// The agent's configuration says that none are to be answered.
    #[default]
    Off,
    /// They are answered where components are attached.
    On {
        /// At these addresses, port 53; none before the first view.
        addresses: Vec<IpAddr>,
        /// In these namespaces.
        namespaces: Vec<ResolverAt>,
    },
}

/// What systemd-resolved was told of the resolver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Resolved {
    /// The agent's configuration says that it is to be told nothing.
    #[default]
    Off,
    /// Nothing yet: no component is attached to the host's interface, or none is answered for there.
    Waiting,
    /// It asks the resolver for the mesh's names.
    Told,
    /// It could not be told.
    Failed {
        /// Why.
        why: String,
    },
}

/// How names are answered in one namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolverAt {
    /// Which namespace, for people.
    pub at: String,
    /// The components there, for which names are answered.
    pub components: Vec<ComponentName>,
    /// How many instances have a name there.
    pub instances: usize,
    /// Why none are answered; `None` if they are.
    pub why_not: Option<String>,
}

/// The host's WireGuard key, and how far a change of it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyStatus {
    /// The key in use; during a change, the former one.
    pub current: WgPublicKey,
    /// The key that is to take its place.
    pub next: Option<WgPublicKey>,
    /// How far the change is.
    pub stage: KeyStage,
    /// In how many seconds the key changes by itself; `None` if it never does, or before the first view.
    pub changes_in_secs: Option<u64>,
    /// Why the coordinator did not take the next key, if it said so.
    pub refused: Option<String>,
}

/// How far a change of the WireGuard key is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyStage {
    /// None is under way.
    Settled,
    /// The next key is here, and the coordinator has not taken it yet.
    Offered,
    /// Both keys are good until all peers have the next one.
    Overlap,
}

/// An instance of this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// The component.
    pub component: ComponentName,
    /// Its overlay addresses.
    pub addresses: Vec<IpAddr>,
    /// How the host knows its processes, as the policy writes it.
    pub attachment: String,
    /// How it is enforced that only its own processes can be it.
    pub enforcement: Enforcement,
    /// What was denied to it or by it last.
    #[serde(default)]
    pub last_denial: Option<Denial>,
}

/// How it is enforced that only an instance's own processes can be it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Enforcement {
    /// They have a network namespace of their own.
    Isolated {
        /// Which one, or whose.
        by: String,
    },
    /// The kernel binds its addresses to them.
    Bound {
        /// To which ones; also if there are none right now.
        by: String,
    },
    /// It is not: any process of the host that no other component claims can be it.
    Shared,
    /// Nobody: nothing reaches it and it reaches nothing.
    Unenforced {
        /// Why.
        why: String,
    },
}

/// A host that a rule pairs this one with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its id.
    pub host: HostId,
    /// Its name.
    pub name: HostName,
    /// Its components that this host has to do with.
    pub components: Vec<ComponentName>,
    /// Where it was last seen.
    pub endpoint: Option<SocketAddr>,
    /// How long ago the last handshake was, in seconds; `None` without a session.
    pub handshake_secs: Option<u64>,
    /// How long the last handshake that we began took, in microseconds.
    pub round_trip_micros: Option<u64>,
    /// Bytes of packets from it.
    pub received_bytes: u64,
    /// Bytes of packets to it.
    pub sent_bytes: u64,
    /// Packets that wait for a handshake.
    pub waiting: u64,
}

/// Packets since the agent started, by direction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Packets {
    /// From components to the mesh.
    pub outbound: Counters,
    /// From the mesh to components.
    pub inbound: Counters,
    /// What the kernel did not take, by kind.
    pub kernel: BTreeMap<String, u64>,
}

/// Packets of one direction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Counters {
    /// That came in.
    pub received: u64,
    /// That went on.
    pub delivered: u64,
    /// That wait for a handshake.
    pub waiting: u64,
    /// Answers made here, like resets.
    pub answered: u64,
    /// That were dropped, by reason; reasons without drops are left out.
    pub dropped: BTreeMap<DropReason, u64>,
}

/// A conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// The protocol.
    pub protocol: Protocol,
    /// The local address, with its component if it is one of the view's.
    pub local: IpAddr,
    /// The local component.
    pub local_component: Option<ComponentName>,
    /// The local port; for echo, the identifier.
    pub local_port: u16,
    /// The remote address.
    pub remote: IpAddr,
    /// The remote component.
    pub remote_component: Option<ComponentName>,
    /// The remote port; zero for echo.
    pub remote_port: u16,
    /// Whether the local end began.
    pub outbound: bool,
    /// The rule that allows it, if it is one of the view in force.
    pub rule: Option<RuleId>,
    /// Seconds since its last packet.
    pub idle_secs: u64,
}

/// Whether something is allowed, by this host's view.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// What is allowed; empty: nothing, or nothing that this host knows of.
    pub allowed: Vec<Allowed>,
    /// What keeps that from working right now.
    pub obstacles: Vec<String>,
}

/// Something that a rule allows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allowed {
    /// Who may begin.
    pub from: ComponentName,
    /// On which host.
    pub from_host: HostName,
    /// Whom it may reach.
    pub to: ComponentName,
    /// On which host.
    pub to_host: HostName,
    /// Its addresses.
    pub to_addresses: Vec<IpAddr>,
    /// On what.
    pub ports: PortSpec,
    /// By which rule.
    pub rule: RuleId,
    /// Until when, if the rule ends.
    pub until: Option<MeshTime>,
}

/// A handshake with one host of a component.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ping {
    /// The host.
    pub host: HostName,
    /// Where it answered, or was last seen.
    pub endpoint: Option<SocketAddr>,
    /// How it went.
    pub outcome: PingOutcome,
    /// Whether an echo from a component of this host would be allowed.
    pub echo_allowed: bool,
}

/// How a handshake went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum PingOutcome {
    /// It came about.
    Answered {
        /// How long it took, in microseconds.
        round_trip_micros: u64,
    },
    /// It did not.
    Silent {
        /// Why, as far as this host can tell.
        why: String,
    },
    /// The component runs on this very host.
    Local,
}

/// Packets that were denied, summed over a short time. Who and whom is only known of what was noted packet by packet: of the most frequent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denial {
    /// Seconds ago.
    pub ago_secs: u64,
    /// Whether they came from a component of this host.
    pub outbound: bool,
    /// Why.
    pub reason: DropReason,
    /// How many.
    pub packets: u64,
    /// The component of this host that it was about.
    #[serde(default)]
    pub component: Option<ComponentName>,
    /// The other end.
    #[serde(default)]
    pub remote: Option<IpAddr>,
    /// The other end's component, if this host's view names it.
    #[serde(default)]
    pub remote_component: Option<ComponentName>,
    /// What a rule would have to grant.
    #[serde(default)]
    pub protocol: Option<Protocol>,
    /// The destination port.
    #[serde(default)]
    pub port: Option<u16>,
    /// The process of this host that it was about, if it is known.
    #[serde(default)]
    pub process: Option<Process>,
}

impl Denial {
    /// The other end, for people.
    #[must_use]
    pub fn remote_shown(&self) -> Option<String> {
        let name = self.remote_component.as_ref().map(ToString::to_string);
        name.or_else(|| self.remote.map(|address| address.to_string()))
    }

    /// What it was on, for people: `tcp/5432`, `icmp`.
    #[must_use]
    pub fn on_shown(&self) -> Option<String> {
        let protocol = self.protocol?;
        Some(match self.port {
            Some(port) => format!("{protocol}/{port}"),
            None => protocol.to_string(),
        })
    }
}

/// Whose a socket of this host is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Process {
    /// The number of the user who made it.
    #[serde(default)]
    pub user: Option<u32>,
    /// The cgroup in which it was made, as a path from the tree's root: for a service, it ends in its unit.
    #[serde(default)]
    pub cgroup: Option<String>,
    /// The container or namespace that it is in.
    #[serde(default)]
    pub place: Option<String>,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let user = self.user.map(|user| format!("user {user}"));
        let cgroup = self.cgroup.as_ref().map(|cgroup| format!("in {cgroup}"));
        let known: Vec<String> = user.into_iter().chain(cgroup).chain(self.place.clone()).collect();
        f.write_str(&known.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_single_lines_and_unknown_fields_are_refused() -> Result<(), Box<dyn std::error::Error>> {
        let request = Request::Explain {
            from: None,
            to: "postgres".parse()?,
            on: Port::Ports("tcp/5432".parse()?),
        };
        let line = serde_json::to_string(&request)?;
        assert!(!line.contains('\n') && line.len() < MAX_REQUEST);
        assert_eq!(serde_json::from_str::<Request>(&line)?, request);
        assert!(serde_json::from_str::<Request>(r#"{"ask":"ping","component":"a","force":true}"#).is_err());
        assert!(serde_json::from_str::<Request>(r#"{"ask":"reboot"}"#).is_err());
        Ok(())
    }
}
