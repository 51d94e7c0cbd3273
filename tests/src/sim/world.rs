//! A mesh in memory: a coordinator, hosts with their agents, the links between them, and the underlay; moved on from event to event.
//!
//! After every event each host's accounts are checked (I8, I9), and every packet that is sent or delivered is judged ([`super::invariant`]).

mod links;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use cloison_agent::control::link::LinkState;
use cloison_agent_core::timer::TICK;
use cloison_proto::control::frame::Frame;
use cloison_proto::id::HostId;
use cloison_proto::key::{SigningKey, WgPrivateKey};
use cloison_proto::label::ComponentName;
use cloison_proto::policy::Policy;
use cloison_proto::version::Timestamp;

pub use links::Confusion;

use links::{FRAME, Wire};

use super::clock::START;
use super::coordinator::Coordinator;
use super::history::History;
use super::host::{Fate, Output};
use super::hostile::Liar;
use super::invariant::{Standpoint, Watch};
use super::member::{Deed, Member};
use super::network::{Datagram, Network};

/// Position of a host in its world.
pub type Number = usize;

/// Everything.
pub struct World {
    /// What time it is, on every host's clock.
    pub now: Timestamp,
    /// The underlay.
    pub network: Network,
    coordinator: Coordinator,
    members: Vec<Member>,
    revoked: BTreeSet<Number>,
    wires: BTreeMap<Number, Wire>,
    /// Hosts that cannot reach the coordinator.
    cut_off: BTreeSet<Number>,
    /// Ways from host to host on which nothing comes.
    blocked: BTreeSet<(Number, Number)>,
    /// By the address that they send from: the host whose keys they have.
    liars: BTreeMap<SocketAddr, (Number, Liar)>,
    policy: Arc<Policy>,
    history: History,
    watch: Watch,
    next_tick: Timestamp,
    /// What the coordinator ever sent to each host.
    recorded: BTreeMap<Number, Vec<Frame>>,
    /// Packets that instances were given and have not looked at.
    inbox: Vec<(Number, ComponentName, Vec<u8>)>,
    seed: u64,
}

impl World {
    /// A mesh without hosts, whose leases last that long.
    ///
    /// # Errors
    /// As [`Coordinator::new`].
    pub fn new(seed: u64, lease: Duration) -> Result<Self> {
        Ok(Self {
            now: START,
            network: Network::new(seed),
            coordinator: Coordinator::new(seed, lease)?,
            members: Vec::new(),
            revoked: BTreeSet::new(),
            wires: BTreeMap::new(),
            cut_off: BTreeSet::new(),
            blocked: BTreeSet::new(),
            liars: BTreeMap::new(),
            policy: Arc::default(),
            history: History::default(),
            watch: Watch::default(),
            next_tick: START + TICK,
            recorded: BTreeMap::new(),
            inbox: Vec::new(),
            seed,
        })
    }

    // What an operator does.

    /// Joins one more host.
    ///
    /// # Errors
    /// If it is refused, or an invariant breaks.
    pub fn join(&mut self, name: &str) -> Result<Number> {
        let number = self.members.len();
        let byte = u8::try_from(number + 1)?;
        let underlay = SocketAddr::from(([192, 0, 2, byte], 51_820));
        let (key, identity) = (WgPrivateKey::from_bytes([byte; 32]), SigningKey::from_seed(&[byte; 32]));
        let us = self.coordinator.join(name, &key, &identity, underlay.ip())?;
        self.published()?;
        let member = Member::new(us, key, underlay, self.seed ^ u64::from(byte) << 32, self.now)?;
        self.members.push(member);
        let now = self.now;
        let deeds = self.member(number)?.announce(now)?;
        self.carry_out(number, deeds)?;
        Ok(number)
    }

    /// Puts a policy in force.
    ///
    /// # Errors
    /// If it is refused, or an invariant breaks.
    pub fn apply(&mut self, text: &str) -> Result<()> {
        self.policy = self.coordinator.apply(text)?;
        self.published()
    }

    /// Revokes a host.
    ///
    /// # Errors
    /// If an invariant breaks.
    pub fn revoke(&mut self, number: Number) -> Result<()> {
        if self.revoked.insert(number) {
            self.coordinator.revoke(self.members[number].id())?;
            self.published()?;
        }
        Ok(())
    }

    // What happens to machines and wires.

    /// The agent begins anew with what is on disk.
    ///
    /// # Errors
    /// If an invariant breaks.
    pub fn restart(&mut self, number: Number) -> Result<()> {
        self.wires.remove(&number);
        let now = self.now;
        let outputs = self.member(number)?.restart(now)?;
        self.watch.forget(self.members[number].id());
        for output in outputs {
            self.carry(number, output)?;
        }
        let deeds = self.member(number)?.announce(now)?;
        self.carry_out(number, deeds)
    }

    /// The coordinator begins anew with what is on disk; its links end.
    ///
    /// # Errors
    /// If an invariant breaks.
    pub fn restart_coordinator(&mut self) -> Result<()> {
        let linked: Vec<_> = self.wires.keys().copied().collect();
        linked
            .into_iter()
            .try_for_each(|number| self.unlink(number, "the coordinator is gone"))?;
        self.coordinator.restart()
    }

    /// The host cannot reach the coordinator from now on.
    ///
    /// # Errors
    /// If an invariant breaks.
    pub fn cut_off(&mut self, number: Number) -> Result<()> {
        self.cut_off.insert(number);
        self.unlink(number, "timed out")
    }

    /// Nothing comes from one host to the other from now on.
    pub fn block(&mut self, from: Number, to: Number) {
        self.blocked.insert((from, to));
    }

    /// Everybody reaches everybody again.
    pub fn heal(&mut self) {
        self.cut_off.clear();
        self.blocked.clear();
    }

    /// The host has another address from now on.
    ///
    /// # Errors
    /// If an invariant breaks.
    pub fn roam(&mut self, number: Number) -> Result<()> {
        let member = self.members.get_mut(number).context("no such host")?;
        let port = member.underlay.port().wrapping_add(1).max(1_024);
        member.underlay.set_port(port);
        let deeds = member.announce(self.now)?;
        self.carry_out(number, deeds)
    }

    // What components do.

    /// An instance sends a packet by its honest agent.
    ///
    /// # Errors
    /// If an invariant breaks.
    pub fn send(&mut self, number: Number, from: &ComponentName, packet: &[u8]) -> Result<Option<Fate>> {
        let now = self.now;
        let at = self.standpoint(number)?;
        self.watch.says(at.host, packet)?;
        let has_it = |member: &Member| member.view().is_some_and(|view| view.content().instances.contains_key(from));
        let member = self.member(number)?;
        if !has_it(member) {
            return Ok(None);
        }
        let (fate, output) = member.host.send(from, packet, now)?;
        self.watch.was_sent(&self.history, at, packet, fate)?;
        self.carry(number, output)?;
        Ok(Some(fate))
    }

    /// Somebody with the keys of one host seals a packet for another one, from an address of his own. Without a session, a handshake begins
    /// instead; whether the packet went.
    ///
    /// # Errors
    /// If an invariant breaks.
    pub fn lie(&mut self, number: Number, to: Number, packet: &[u8]) -> Result<bool> {
        let now = self.now;
        let (host, peer) = (self.members[number].id(), self.members[to].key.public());
        let address = SocketAddr::from(([198, 51, 100, u8::try_from(number)?], 666));
        let (_, liar) = self
            .liars
            .entry(address)
            .or_insert_with(|| (number, Liar::new(&self.members[number].key, self.seed)));
        let (is_live, bytes) = if liar.is_live(&peer, now) {
            (true, liar.say(&peer, packet, now)?)
        } else {
            (false, liar.greet(&peer, now)?)
        };
        if is_live {
            self.watch.sends(host, packet)?;
        }
        let to = self.members[to].underlay;
        self.network.send(Datagram { from: address, to, bytes }, now);
        Ok(is_live)
    }

    /// Whether somebody has this host's keys.
    #[must_use]
    pub fn is_betrayed(&self, number: Number) -> bool {
        self.liars.values().any(|(host, _)| *host == number)
    }

    // Time.

    /// Lets time pass: frames and datagrams arrive, agents tick.
    ///
    /// # Errors
    /// If an invariant breaks.
    pub fn pass(&mut self, span: Duration) -> Result<()> {
        let end = self.now + span;
        loop {
            let frames = self.wires.values().flat_map(|wire| [wire.up.front(), wire.down.front()]).flatten();
            let events = frames.map(|(at, _)| *at).chain(self.network.next_arrival());
            let next = events.min().unwrap_or(self.next_tick).min(self.next_tick);
            if next > end {
                break;
            }
            self.now = self.now.max(next);
            self.coordinator.set_time(self.now);
            self.move_frames()?;
            while let Some(datagram) = self.network.arrive(self.now) {
                self.arrive(datagram)?;
            }
            if self.next_tick <= self.now {
                self.next_tick = self.next_tick + TICK;
                self.tick()?;
            }
            self.members.iter().try_for_each(|member| member.host.check())?;
        }
        self.now = end;
        Ok(())
    }

    // What is asked of it.

    /// What instances were given since the last time.
    pub fn take_inbox(&mut self) -> Vec<(Number, ComponentName, Vec<u8>)> {
        std::mem::take(&mut self.inbox)
    }

    /// The hosts that were not revoked.
    #[must_use]
    pub fn alive(&self) -> Vec<Number> {
        (0..self.members.len()).filter(|number| !self.revoked.contains(number)).collect()
    }

    /// A host.
    ///
    /// # Errors
    /// If there is none.
    pub fn member(&mut self, number: Number) -> Result<&mut Member> {
        self.members.get_mut(number).context("no such host")
    }

    /// Its number.
    #[must_use]
    pub fn number(&self, host: HostId) -> Option<Number> {
        self.members.iter().position(|member| member.id() == host)
    }

    /// What was allowed when.
    #[must_use]
    pub const fn history(&self) -> &History {
        &self.history
    }

    /// The coordinator.
    #[must_use]
    pub const fn coordinator(&self) -> &Coordinator {
        &self.coordinator
    }

    /// How often a packet was delivered.
    #[must_use]
    pub fn deliveries(&self, packet: &[u8]) -> u32 {
        self.watch.deliveries(packet)
    }

    /// Whether every host has the view that was compiled last, and a lease for it.
    ///
    /// # Errors
    /// If not: what is missing.
    pub fn has_converged(&self) -> Result<()> {
        let (progress, alive) = (self.coordinator.progress(), self.alive());
        for number in &alive {
            let member = &self.members[*number];
            let is_linked = matches!(member.link.state(), LinkState::Linked { .. });
            ensure!(is_linked, "{} is not linked: {:?}", member.name(), member.link.state());
            ensure!(member.may_use_its_view(self.now), "{} has no lease", member.name());
        }
        ensure!(
            progress.hosts == alive.len() && progress.applied == alive.len(),
            "{progress:?} of {} hosts",
            alive.len()
        );
        let version = self.coordinator.inventory().version;
        ensure!(
            progress.version >= version,
            "published is {}, in the store {version}",
            progress.version
        );
        Ok(())
    }

    // Below: how it moves.

    /// The store's state changed: the publisher takes it up, and history takes it down.
    fn published(&mut self) -> Result<()> {
        self.history.note(&self.coordinator.inventory(), &self.policy)?;
        self.coordinator.reconcile()?;
        self.refresh_sessions();
        Ok(())
    }

    fn tick(&mut self) -> Result<()> {
        let now = self.now;
        for number in 0..self.members.len() {
            let member = &mut self.members[number];
            let output = member.host.tick(now);
            let outputs = member.link.tick(now);
            let deeds = member.carry_out(outputs, now)?;
            self.carry(number, output)?;
            self.carry_out(number, deeds)?;
        }
        self.refresh_sessions();
        Ok(())
    }

    fn carry_out(&mut self, number: Number, deeds: Vec<Deed>) -> Result<()> {
        let mut queue = VecDeque::from(deeds);
        while let Some(deed) = queue.pop_front() {
            let now = self.now;
            match deed {
                Deed::Connect if self.cut_off.contains(&number) => self.member(number)?.link.disconnected(now, "unreachable"),
                Deed::Connect => {
                    self.wires.insert(number, Wire::default());
                    let member = self.member(number)?;
                    let outputs = member.link.connected(now);
                    queue.extend(member.carry_out(outputs, now)?);
                }
                Deed::Send(frame) => {
                    if let Some(wire) = self.wires.get_mut(&number) {
                        wire.up.push_back((now + FRAME, frame));
                    }
                }
                Deed::Close => self.unlink(number, "closed")?,
                Deed::Carry(output) => self.carry(number, output)?,
            }
        }
        Ok(())
    }

    /// Takes up what a host's data plane brought forth.
    fn carry(&mut self, number: Number, output: Output) -> Result<()> {
        let (at, from) = (self.standpoint(number)?, self.members[number].underlay);
        for (component, packet) in output.delivered {
            self.watch.was_delivered(&self.history, at, &component, &packet)?;
            self.inbox.push((number, component, packet));
        }
        for (to, bytes) in output.sent {
            let receiver = self.members.iter().position(|member| member.underlay == to);
            if !receiver.is_some_and(|receiver| self.blocked.contains(&(number, receiver))) {
                self.network.send(Datagram { from, to, bytes }, self.now);
            }
        }
        Ok(())
    }

    fn arrive(&mut self, datagram: Datagram) -> Result<()> {
        let Datagram { from, to, bytes } = datagram;
        let now = self.now;
        if let Some(number) = self.members.iter().position(|member| member.underlay == to) {
            let output = self.member(number)?.host.receive(from, &bytes, now);
            return self.carry(number, output);
        }
        if let Some((_, liar)) = self.liars.get_mut(&to)
            && let Some(answer) = liar.receive(&bytes, now)
        {
            let answer = Datagram {
                from: to,
                to: from,
                bytes: answer,
            };
            self.network.send(answer, now);
        }
        Ok(())
    }

    fn standpoint(&self, number: Number) -> Result<Standpoint> {
        let member = self.members.get(number).context("no such host")?;
        Ok(Standpoint {
            host: member.id(),
            version: member.view().map(|view| view.header().version),
            holds: member.may_use_its_view(self.now),
            mesh: member.mesh_time(self.now),
        })
    }
}
