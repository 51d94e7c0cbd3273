//! A whole mesh in a lab: one coordinator, one agent on each host, all of them joined and running.
//!
//! The coordinator has a host of its own, named [`COORDINATOR`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::agent::Agent;
use super::coordinator::Coordinator;
use super::host::Host;
use super::tool::{Event, Tool};
use super::{Lab, LabBuilder, wait_for};

/// The name of the coordinator's host.
pub const COORDINATOR: &str = "coordinator";
const APPLY_LIMIT: Duration = Duration::from_secs(30);
const ATTEMPT_LIMIT: Duration = Duration::from_secs(3);

/// A running mesh.
#[derive(Debug)]
pub struct Mesh {
    /// Its coordinator.
    pub coordinator: Coordinator,
    agents: Vec<Agent>,
    /// Last: its end takes away what the others run in.
    lab: Lab,
}

/// What a mesh shall look like.
#[derive(Debug, Clone)]
pub struct MeshBuilder {
    lab: LabBuilder,
    hosts: Vec<String>,
    init: Vec<String>,
    agent: String,
}

/// The addresses of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instance {
    /// IPv4.
    pub v4: Ipv4Addr,
    /// IPv6.
    pub v6: Ipv6Addr,
}

impl Instance {
    /// Both addresses, IPv4 first.
    #[must_use]
    pub fn addresses(self) -> [IpAddr; 2] {
        [IpAddr::V4(self.v4), IpAddr::V6(self.v6)]
    }

    /// Both addresses with a port, IPv4 first.
    #[must_use]
    pub fn sockets(self, port: u16) -> [SocketAddr; 2] {
        self.addresses().map(|address| SocketAddr::new(address, port))
    }
}

impl Mesh {
    /// A mesh of this name (that of the test) with these hosts beside the coordinator's; [`COORDINATOR`] among them puts an agent beside it.
    #[must_use]
    pub fn builder(name: &str, hosts: &[&str]) -> MeshBuilder {
        let others = hosts.iter().filter(|host| **host != COORDINATOR);
        let lab = others.fold(Lab::builder(name).host(COORDINATOR), |lab, host| lab.host(host));
        let hosts = hosts.iter().map(|h| (*h).to_owned()).collect();
        MeshBuilder {
            lab,
            hosts,
            init: Vec::new(),
            agent: String::new(),
        }
    }

    /// A running mesh with this policy in force on all hosts.
    ///
    /// # Errors
    /// If anything on the way there fails.
    pub fn with_policy(name: &str, hosts: &[&str], policy: &str) -> Result<Self> {
        let mut mesh = Self::builder(name, hosts).start()?;
        mesh.join_all()?;
        mesh.coordinator.apply_and_wait(policy)?;
        Ok(mesh)
    }

    /// The lab that it runs in.
    #[must_use]
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// One of its hosts.
    ///
    /// # Errors
    /// If there is none of this name.
    pub fn host(&self, name: &str) -> Result<&Host> {
        self.lab.host(name)
    }

    /// The agent of a host.
    ///
    /// # Errors
    /// If there is none.
    pub fn agent(&self, host: &str) -> Result<&Agent> {
        self.agents
            .iter()
            .find(|a| a.host() == host)
            .with_context(|| format!("no agent on `{host}`"))
    }

    /// The agent of a host, to start and stop.
    ///
    /// # Errors
    /// If there is none.
    pub fn agent_mut(&mut self, host: &str) -> Result<&mut Agent> {
        self.agents
            .iter_mut()
            .find(|a| a.host() == host)
            .with_context(|| format!("no agent on `{host}`"))
    }

    /// All agents.
    pub fn agents_mut(&mut self) -> &mut [Agent] {
        &mut self.agents
    }

    /// Enrolls every host with a token of its own, and starts its agent.
    ///
    /// # Errors
    /// If one does not get there.
    pub fn join_all(&mut self) -> Result<()> {
        for agent in &mut self.agents {
            agent.join(&self.coordinator.token(agent.host())?)?.ok()?;
            agent.start()?;
        }
        self.wait_until_applied()
    }

    /// Waits until the view compiled last is in force on every host.
    ///
    /// # Errors
    /// If it takes longer than 30 s.
    pub fn wait_until_applied(&self) -> Result<()> {
        wait_for("every host to have its view in force", APPLY_LIMIT, || {
            let status = self.coordinator.status()?;
            Ok((status.hosts == status.applied).then_some(()))
        })
    }

    /// The addresses of a component's instance on a host, from `cloison host show`.
    ///
    /// # Errors
    /// If it has none there.
    pub fn instance(&self, component: &str, host: &str) -> Result<Instance> {
        let summary = self.coordinator.host(host)?;
        let instance = summary.instances.iter().find(|i| i.component.to_string() == component);
        let instance = instance.with_context(|| format!("{component} has no instance on {host}"))?;
        Ok(Instance {
            v4: instance.v4,
            v6: instance.v6,
        })
    }

    /// One attempt over TCP from a host, with no more than 3 s for the connection: `received`, or `failed` and its kind.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn attempt(&self, from: &str, to: SocketAddr) -> Result<Event> {
        Tool::tcp_attempt(self.host(from)?.net(), to, ATTEMPT_LIMIT)
    }

    /// Insists that a listener which echoes is reached over TCP from a host.
    ///
    /// # Errors
    /// If it is not.
    pub fn must_reach(&self, from: &str, to: SocketAddr) -> Result<()> {
        let event = self.attempt(from, to)?;
        ensure!(event.what == "received", "{from} should reach {to}: {event:?}");
        Ok(())
    }

    /// Insists that an attempt from a host is answered with a refusal, and soon: no application waits for a time-out.
    ///
    /// # Errors
    /// If it goes through, or hangs.
    pub fn must_be_refused(&self, from: &str, to: SocketAddr) -> Result<()> {
        let event = self.attempt(from, to)?;
        ensure!(event.what == "failed", "{from} should not reach {to}: {event:?}");
        ensure!(
            event.kind() != "TimedOut" && event.kind() != "WouldBlock",
            "{from} was not refused by {to} but left waiting"
        );
        Ok(())
    }

    /// How often an agent has dropped a packet for this reason, in both directions, from its `status`.
    ///
    /// # Errors
    /// If the agent does not answer.
    pub fn drops(&self, host: &str, reason: &str) -> Result<u64> {
        Ok(sum_of(&self.agent(host)?.status()?, reason))
    }

    /// Ends a test that went well: every agent and the coordinator must end in order when asked to.
    ///
    /// # Errors
    /// If one had crashed, or had to be killed, or something could not be removed.
    pub fn finish(mut self) -> Result<()> {
        for agent in &mut self.agents {
            if let Ok(process) = agent.process() {
                ensure!(process.ended()?.is_none(), "the agent of {} has crashed", agent.host());
                agent.stop()?;
            }
        }
        self.coordinator.stop()?;
        self.lab.finish()
    }

    /// Ends a lab that is kept: nothing is stopped.
    ///
    /// # Errors
    /// If the lab cannot be ended.
    pub fn leave_running(self) -> Result<()> {
        self.lab.finish()
    }
}

/// The sum of all numbers under this key, anywhere in the answer, in an object's own field or in rows `{reason: KEY, count: N}`.
fn sum_of(value: &Value, key: &str) -> u64 {
    match value {
        Value::Object(fields) => {
            let row = fields.get("reason").and_then(Value::as_str) == Some(key);
            let own = |(name, inner): (&String, &Value)| match inner.as_u64() {
                Some(number) if name == key || row && (name == "count" || name == "packets") => number,
                _ => sum_of(inner, key),
            };
            fields.iter().map(own).sum()
        }
        Value::Array(items) => items.iter().map(|item| sum_of(item, key)).sum(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => 0,
    }
}

impl MeshBuilder {
    /// Changes the lab: its underlay, its MTU.
    #[must_use]
    pub fn lab(mut self, change: impl FnOnce(LabBuilder) -> LabBuilder) -> Self {
        self.lab = change(self.lab);
        self
    }

    /// Further arguments for `cloison-coordinator init`.
    #[must_use]
    pub fn init(mut self, arguments: &[&str]) -> Self {
        self.init.extend(arguments.iter().map(|a| (*a).to_owned()));
        self
    }

    /// Further lines for every agent's configuration.
    #[must_use]
    pub fn agents(mut self, lines: &str) -> Self {
        self.agent.push_str(lines);
        self
    }

    /// Lays it out, initialises the coordinator and starts it. No host has joined yet.
    ///
    /// # Errors
    /// If something does not come up.
    pub fn start(self) -> Result<Mesh> {
        let lab = self.lab.build()?;
        let arguments: Vec<&str> = self.init.iter().map(String::as_str).collect();
        let mut coordinator = Coordinator::init(lab.host(COORDINATOR)?, &arguments)?;
        coordinator.serve()?;
        let agents = self
            .hosts
            .iter()
            .map(|h| Agent::configure(lab.host(h)?, &self.agent))
            .collect::<Result<_>>()?;
        Ok(Mesh { coordinator, agents, lab })
    }
}
