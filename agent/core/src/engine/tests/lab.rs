//! Hosts in memory. `app` has n8n and runner, `db` has postgres; n8n may reach postgres on tcp/5432, udp/53 and by echo.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use cloison_proto::id::{HostId, RuleId};
use cloison_proto::key::WgPrivateKey;
use cloison_proto::net::{AddressPair, OverlayRange};
use cloison_proto::policy::Attachment;
use cloison_proto::verdict::DropReason;
use cloison_proto::version::{MeshTime, Timestamp};
use cloison_proto::view::{Config, Grant, Items, LocalInstance, Peer, RemoteInstance, RuleItem, SelfHost, View};

use crate::TunId;
use crate::engine::{Engine, EngineConfig, Meta};
use crate::install::{Hint, Installed, LeaseTerm, Plan};
use crate::offload::VnetHeader;
use crate::packet::Direction;
use crate::packet::build::{ip, tcp, udp};
use crate::path_policy::Mesh;
use crate::timer::TICK;
use crate::wg::LocalKey;
use crate::worker::{Denial, Worker};

pub(crate) type Failure = Box<dyn std::error::Error>;
pub(crate) type Outcome = Result<(), Failure>;

pub(crate) const APP: usize = 0;
pub(crate) const DB: usize = 1;

pub(crate) const SYN: u8 = 0x02;
pub(crate) const ACK: u8 = 0x10;
pub(crate) const SYN_ACK: u8 = SYN | ACK;

/// Mesh time at the start.
const MESH: MeshTime = MeshTime(1_800_000_000);
/// How long leases last.
pub(crate) const LEASE: Duration = Duration::from_secs(86_400);

/// Where components run.
const INSTANCES: [(&str, usize); 3] = [("n8n", APP), ("runner", APP), ("postgres", DB)];

/// What a view is made of.
#[derive(Clone)]
pub(crate) struct Policy {
    /// From, to, what is open, and until when.
    pub(crate) rules: Vec<(&'static str, &'static str, &'static str, MeshTime)>,
    /// Seeds of the hosts' keys.
    pub(crate) keys: [Vec<u8>; 2],
}

impl Default for Policy {
    fn default() -> Self {
        let open = |ports| ("n8n", "postgres", ports, MeshTime::NEVER);
        Self {
            rules: vec![open("tcp/5432"), open("udp/53"), open("icmp")],
            keys: [vec![1], vec![2]],
        }
    }
}

impl Policy {
    pub(crate) fn only(rules: &[(&'static str, &'static str, &'static str)]) -> Self {
        let rules = rules
            .iter()
            .map(|(from, to, ports)| (*from, *to, *ports, MeshTime::NEVER))
            .collect();
        Self { rules, ..Self::default() }
    }
}

/// One host.
pub(crate) struct Host<K: LocalKey> {
    pub(crate) engine: Engine<Mesh, K>,
    pub(crate) worker: Worker<Mesh, K>,
    pub(crate) endpoint: SocketAddr,
    /// What its TUNs were given.
    pub(crate) delivered: Vec<(TunId, Vec<u8>)>,
    /// What it refused last.
    pub(crate) denials: Vec<Denial>,
}

/// Two hosts and what is between them.
pub(crate) struct Lab<K: LocalKey> {
    pub(crate) hosts: [Host<K>; 2],
    pub(crate) now: Timestamp,
    /// Datagrams on their way: from which address, to which, and what.
    pub(crate) wire: VecDeque<(SocketAddr, SocketAddr, Vec<u8>)>,
}

pub(crate) fn host_id(host: usize) -> HostId {
    HostId([u8::try_from(host).unwrap_or(0) + 10; 16])
}

pub(crate) fn key(seed: u8) -> WgPrivateKey {
    WgPrivateKey::from_bytes([seed; 32])
}

/// The TUN of a component on its host.
pub(crate) fn tun(component: &str) -> TunId {
    TunId(if component == "runner" { 2 } else { 1 })
}

fn range() -> Result<OverlayRange, Failure> {
    Ok(OverlayRange::new([10, 77, 0, 0].into(), 16, "fd12:3456:789a::".parse()?)?)
}

fn addresses(component: &str) -> Result<AddressPair, Failure> {
    let position = INSTANCES.iter().position(|(name, _)| *name == component).unwrap_or(99);
    range()?.nth(u32::try_from(position)?).ok_or_else(|| "outside the range".into())
}

/// A component's address.
pub(crate) fn at(component: &str, v6: bool) -> Result<IpAddr, Failure> {
    let addresses = addresses(component)?;
    Ok(if v6 { addresses.v6.into() } else { addresses.v4.into() })
}

/// The view of `host`: what a coordinator would compile, by the shortest way.
pub(crate) fn view(policy: &Policy, host: usize) -> Result<View, Failure> {
    let mut items = Items::default();
    let keys = |host: usize| {
        policy
            .keys
            .get(host)
            .into_iter()
            .flatten()
            .map(|seed| key(*seed).public())
            .collect::<Vec<_>>()
    };
    Config {
        overlay: range()?,
        lease: LEASE,
    }
    .put_in(&mut items);
    SelfHost {
        id: host_id(host),
        name: format!("host-{host}").parse()?,
        wg_keys: keys(host),
    }
    .put_in(&mut items);
    for (component, on) in INSTANCES {
        let (component, addresses) = (component.parse()?, addresses(component)?);
        if on == host {
            LocalInstance {
                component,
                attachment: Attachment::Host,
                addresses,
            }
            .put_in(&mut items);
        } else {
            RemoteInstance {
                component,
                host: host_id(on),
                addresses,
            }
            .put_in(&mut items);
        }
    }
    let other = 1 - host;
    Peer {
        id: host_id(other),
        name: format!("host-{other}").parse()?,
        wg_keys: keys(other),
        psk_generation: 0,
    }
    .put_in(&mut items);
    put_rules(policy, &mut items)?;
    Ok(View::parse(&items, host_id(host))?)
}

fn put_rules(policy: &Policy, items: &mut Items) -> Outcome {
    for (n, (from, to, ports, expires)) in policy.rules.iter().enumerate() {
        let grants = vec![Grant {
            ports: ports.parse()?,
            service: None,
        }];
        let id = RuleId([u8::try_from(n)?; 16]);
        RuleItem {
            id,
            from: from.parse()?,
            to: to.parse()?,
            grants,
            expires: *expires,
        }
        .put_in(items);
    }
    Ok(())
}

impl<K: LocalKey> Lab<K> {
    /// Both hosts with the default policy, past the time in which no resets are sent.
    pub(crate) fn new() -> Result<Self, Failure> {
        let mut lab = Self::without_views();
        for host in [APP, DB] {
            lab.install(host, &Policy::default())?;
        }
        lab.now = lab.now + Duration::from_secs(6);
        Ok(lab)
    }

    pub(crate) fn without_views() -> Self {
        let host = |n: u8| {
            let engine = Engine::new(EngineConfig {
                seed: 77 + u64::from(n),
                ..EngineConfig::default()
            });
            let worker = engine.worker();
            Host {
                engine,
                worker,
                endpoint: SocketAddr::from(([192, 0, 2, n], 51_820)),
                delivered: Vec::new(),
                denials: Vec::new(),
            }
        };
        Self {
            hosts: [host(1), host(2)],
            now: Timestamp(1_000_000_000_000),
            wire: VecDeque::new(),
        }
    }

    /// Gives `host` its view of `policy` and the other's endpoint.
    pub(crate) fn install(&mut self, host: usize, policy: &Policy) -> Result<Installed, Failure> {
        let plan = self.plan(host, policy)?;
        let now = self.now;
        let candidates = vec![self.hosts[1 - host].endpoint];
        let Host { engine, worker, .. } = &mut self.hosts[host];
        let installed = engine.install(worker, plan, now);
        engine.hint(
            host_id(1 - host),
            &Hint {
                candidates,
                incarnation: 1,
            },
        );
        self.collect(host);
        Ok(installed)
    }

    pub(crate) fn plan(&self, host: usize, policy: &Policy) -> Result<Plan<Mesh, K>, Failure> {
        let locals = policy.keys[host].iter().map(|seed| Arc::new(K::new(&key(*seed)))).collect();
        let lease = Some(self.lease());
        let tun = |instance: &LocalInstance| Some(tun(instance.component.as_str()));
        Ok(Plan::from_view(&view(policy, host)?, locals, lease, tun, |_, _| None))
    }

    pub(crate) fn lease(&self) -> LeaseTerm {
        LeaseTerm {
            at: self.now,
            mesh: self.mesh_time(),
            ends: self.now + LEASE,
        }
    }

    pub(crate) fn mesh_time(&self) -> MeshTime {
        MESH.plus(self.now.since(Timestamp(1_000_000_000_000)))
    }

    /// A packet from a component's TUN; what its host then has to send and deliver is taken up.
    pub(crate) fn send(&mut self, component: &str, mut packet: Vec<u8>) {
        let host = INSTANCES.iter().find(|(name, _)| *name == component).map_or(APP, |(_, host)| *host);
        let now = self.now;
        let Host { engine, worker, .. } = &mut self.hosts[host];
        worker.begin(engine);
        engine.on_tun(worker, tun(component), &mut packet, VnetHeader::WHOLE, now);
        self.collect(host);
    }

    /// A datagram for `host`.
    pub(crate) fn receive(&mut self, host: usize, from: SocketAddr, mut datagram: Vec<u8>) {
        let now = self.now;
        let Host { engine, worker, .. } = &mut self.hosts[host];
        worker.begin(engine);
        engine.on_udp(worker, &mut datagram, 0, Meta { from, local: None, ecn: 0 }, now);
        self.collect(host);
    }

    /// Takes up a worker's results and ends its batch.
    pub(crate) fn collect(&mut self, host: usize) {
        let Host {
            worker,
            endpoint,
            delivered,
            denials,
            ..
        } = &mut self.hosts[host];
        let sent = worker.udp().map(|(bytes, to)| (*endpoint, to.remote, bytes.to_vec()));
        self.wire.extend(sent);
        delivered.extend(worker.tun().map(|(bytes, tun)| (tun, bytes.to_vec())));
        *denials = worker.denials().to_vec();
        worker.end();
    }

    /// Carries datagrams until there are none.
    pub(crate) fn carry(&mut self) {
        while let Some((from, to, datagram)) = self.wire.pop_front() {
            if let Some(host) = self.hosts.iter().position(|host| host.endpoint == to) {
                self.receive(host, from, datagram);
            }
        }
    }

    /// Lets time pass tick by tick, and carries what it brings.
    pub(crate) fn pass(&mut self, span: Duration) {
        let end = self.now + span;
        while self.now < end {
            self.now = self.now + TICK;
            self.tick();
            self.carry();
        }
    }

    pub(crate) fn tick(&mut self) {
        let now = self.now;
        for host in [APP, DB] {
            let Host { engine, worker, .. } = &mut self.hosts[host];
            worker.begin(engine);
            engine.on_tick(worker, now);
            self.collect(host);
        }
    }

    /// What `host`'s TUNs were given since the last time.
    pub(crate) fn take_delivered(&mut self, host: usize) -> Vec<(TunId, Vec<u8>)> {
        std::mem::take(&mut self.hosts[host].delivered)
    }

    pub(crate) fn dropped(&self, host: usize, direction: Direction, reason: DropReason) -> u64 {
        self.hosts[host].engine.stats().of(direction).dropped(reason)
    }

    /// Every packet is accounted for (I8).
    pub(crate) fn check_balance(&self) {
        for host in &self.hosts {
            let stats = host.engine.stats();
            assert!(stats.outbound.balances(), "outbound: {:?}", stats.outbound);
            assert!(stats.inbound.balances(), "inbound: {:?}", stats.inbound);
            assert_eq!(usize::try_from(stats.outbound.waiting()), Ok(host.engine.waiting()));
        }
    }

    /// Opens a TCP stream from n8n's port 40,000 to postgres; the local ACK numbers are 501 there and 101 here.
    pub(crate) fn open_stream(&mut self, v6: bool) -> Outcome {
        self.send("n8n", segment(v6, true, SYN, 500, 0)?);
        self.carry();
        self.send("postgres", segment(v6, false, SYN_ACK, 100, 501)?);
        self.carry();
        self.send("n8n", segment(v6, true, ACK, 501, 101)?);
        self.carry();
        let delivered = (self.take_delivered(APP).len(), self.take_delivered(DB).len());
        if delivered == (1, 2) {
            Ok(())
        } else {
            Err(format!("the stream did not open: {delivered:?}").into())
        }
    }
}

/// A segment between n8n's port 40,000 and postgres.
pub(crate) fn segment(v6: bool, from_n8n: bool, flags: u8, seq: u32, ack: u32) -> Result<Vec<u8>, Failure> {
    let (n8n, postgres) = (at("n8n", v6)?, at("postgres", v6)?);
    Ok(match from_n8n {
        true => ip(n8n, postgres, 6, &tcp((40_000, 5_432), flags, seq, ack, b"")),
        false => ip(postgres, n8n, 6, &tcp((5_432, 40_000), flags, seq, ack, b"")),
    })
}

/// A UDP datagram between two components.
pub(crate) fn datagram(v6: bool, from: &str, to: &str, ports: (u16, u16)) -> Result<Vec<u8>, Failure> {
    Ok(ip(at(from, v6)?, at(to, v6)?, 17, &udp(ports, b"hello")))
}
