//! A host's data plane as its agent runs it: the engine, one worker, a TUN for each component.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use cloison_agent_core::TunId;
use cloison_agent_core::engine::{Engine, EngineConfig, Meta};
use cloison_agent_core::install::{Hint, Installed, LeaseTerm, Plan};
use cloison_agent_core::offload::VnetHeader;
use cloison_agent_core::packet::Direction;
use cloison_agent_core::path_policy::Mesh;
use cloison_agent_core::wg::LocalKey as _;
use cloison_agent_core::wg::trivial::SimulatedKey;
use cloison_agent_core::worker::Worker;
use cloison_proto::id::HostId;
use cloison_proto::key::WgPrivateKey;
use cloison_proto::label::ComponentName;
use cloison_proto::verdict::DropReason;
use cloison_proto::version::Timestamp;
use cloison_proto::view::View;

/// The engine with sessions that keep nothing secret.
pub type SimEngine = Engine<Mesh, SimulatedKey>;

/// What came of one input.
#[derive(Debug, Default)]
pub struct Output {
    /// Packets given to TUNs: to which component, and what.
    pub delivered: Vec<(ComponentName, Vec<u8>)>,
    /// Datagrams for the underlay.
    pub sent: Vec<(SocketAddr, Vec<u8>)>,
}

/// What became of a packet that a component sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It was sealed, or given to a component of the same host.
    Passed,
    /// It waits for a handshake.
    Waits,
    /// It was dropped.
    Dropped(DropReason),
}

/// A data plane.
pub struct Host {
    engine: SimEngine,
    worker: Worker<Mesh, SimulatedKey>,
    key: Arc<SimulatedKey>,
    tuns: BTreeMap<ComponentName, TunId>,
    /// Peers of the view in force, for the bounds.
    peers: usize,
}

/// Packets that may wait for one peer.
const WAITING_PER_PEER: usize = 128;

impl Host {
    /// A host with this key and no view.
    #[must_use]
    pub fn new(key: &WgPrivateKey, seed: u64) -> Self {
        let config = EngineConfig {
            seed,
            ..EngineConfig::default()
        };
        let engine = SimEngine::new(config);
        Self {
            worker: engine.worker(),
            engine,
            key: Arc::new(SimulatedKey::new(key)),
            tuns: BTreeMap::new(),
            peers: 0,
        }
    }

    /// The engine, to be asked.
    #[must_use]
    pub const fn engine(&self) -> &SimEngine {
        &self.engine
    }

    /// Puts a view in force.
    pub fn install(&mut self, view: &View, lease: Option<LeaseTerm>, now: Timestamp) -> (Installed, Output) {
        for component in view.instances.keys() {
            let next = TunId(u32::try_from(self.tuns.len()).unwrap_or(u32::MAX));
            self.tuns.entry(component.clone()).or_insert(next);
        }
        self.peers = view.peers.len();
        let tuns = &self.tuns;
        let plan = Plan::from_view(
            view,
            vec![self.key.clone()],
            lease,
            |local| tuns.get(&local.component).copied(),
            |_, _| None,
        );
        let installed = self.engine.install(&mut self.worker, plan, now);
        (installed, self.collect())
    }

    /// Goes on with the view in force under a new lease.
    pub fn renew(&self, lease: LeaseTerm) {
        self.engine.renew(lease);
    }

    /// Takes a hint about a peer.
    pub fn hint(&self, peer: HostId, endpoints: &[SocketAddr], incarnation: u64) {
        let candidates = endpoints.to_vec();
        self.engine.hint(peer, &Hint { candidates, incarnation });
    }

    /// A packet from a component.
    ///
    /// # Errors
    /// If the host has no such component, or counts the packet otherwise than once.
    pub fn send(&mut self, component: &ComponentName, packet: &[u8], now: Timestamp) -> Result<(Fate, Output)> {
        let tun = *self.tuns.get(component).with_context(|| format!("no {component} here"))?;
        let before = self.engine.stats().outbound;
        self.worker.begin(&self.engine);
        self.engine
            .on_tun(&mut self.worker, tun, &mut packet.to_vec(), VnetHeader::WHOLE, now);
        let output = self.collect();
        let after = self.engine.stats().outbound;
        let dropped = after.drops().zip(before.drops()).find(|(a, b)| a.1 > b.1);
        let fates = [
            (after.delivered > before.delivered).then_some(Fate::Passed),
            (after.queued > before.queued).then_some(Fate::Waits),
            dropped.map(|((reason, _), _)| Fate::Dropped(reason)),
        ];
        let mut fates = fates.into_iter().flatten();
        let fate = fates.next().context("a packet without a fate")?;
        ensure!(fates.next().is_none(), "a packet with two fates: {before:?}, {after:?}");
        Ok((fate, output))
    }

    /// A datagram from the underlay.
    pub fn receive(&mut self, from: SocketAddr, datagram: &[u8], now: Timestamp) -> Output {
        let meta = Meta { from, local: None, ecn: 0 };
        self.worker.begin(&self.engine);
        self.engine.on_udp(&mut self.worker, &mut datagram.to_vec(), 0, meta, now);
        self.collect()
    }

    /// Lets time pass; to be called every tick.
    pub fn tick(&mut self, now: Timestamp) -> Output {
        self.worker.begin(&self.engine);
        self.engine.on_tick(&mut self.worker, now);
        self.collect()
    }

    /// How many packets were dropped on their way in for this reason.
    #[must_use]
    pub fn refused(&self, reason: DropReason) -> u64 {
        self.engine.stats().of(Direction::Inbound).dropped(reason)
    }

    /// Whether every packet is accounted for (I8), and every table within its bounds (I9).
    ///
    /// # Errors
    /// If not.
    pub fn check(&self) -> Result<()> {
        let stats = self.engine.stats();
        ensure!(
            stats.outbound.balances(),
            "I8: outbound packets are lost or counted twice: {:?}",
            stats.outbound
        );
        ensure!(
            stats.inbound.balances(),
            "I8: inbound packets are lost or counted twice: {:?}",
            stats.inbound
        );
        let waiting = self.engine.waiting();
        ensure!(
            u64::try_from(waiting)? == stats.outbound.waiting(),
            "I8: {waiting} packets wait, but {:?}",
            stats.outbound
        );
        ensure!(
            waiting <= WAITING_PER_PEER * self.peers,
            "I9: {waiting} packets wait for {} peers",
            self.peers
        );
        let flows = self.engine.flows().len();
        ensure!(flows <= 65_536, "I9: {flows} flows");
        Ok(())
    }

    fn collect(&mut self) -> Output {
        let component = |tun: TunId| self.tuns.iter().find(|(_, of)| **of == tun).map(|(component, _)| component.clone());
        let delivered = self
            .worker
            .tun()
            .filter_map(|(packet, tun)| Some((component(tun)?, packet.to_vec())));
        let delivered = delivered.collect();
        let sent = self.worker.udp().map(|(datagram, to)| (to.remote, datagram.to_vec())).collect();
        self.worker.end();
        Output { delivered, sent }
    }
}
