//! Scenarios: what happens in a mesh, drawn by chance, and what must be true at the end of each.
//!
//! Six components lie on up to six hosts. Services listen below port 2,000, conversations begin from above 20,000, so that of a packet it is
//! clear which end began. Applications answer what they are given.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use cloison_agent_core::packet::{Transport, parse};
use cloison_proto::label::ComponentName;
use cloison_proto::net::Protocol;

use super::clock::{MESH_START, mesh_time, millis};
use super::history::Instance;
use super::network::Weather;
use super::world::{Confusion, Number, World};
use crate::packets::flags::{ACK, PSH, SYN};
use crate::packets::{echo, ip, number, tcp, udp};

/// How long leases last here.
pub const LEASE: Duration = Duration::from_secs(300);

/// How far an agent's mesh time may be behind: it knows whole seconds, and what it learned was under way.
const CLOCK_LAG: Duration = Duration::from_secs(3);

/// Where each component runs.
const COMPONENTS: [(&str, &str); 6] = [
    ("c0", "h0"),
    ("c1", "[h0, h1]"),
    ("c2", "h1"),
    ("c3", "[h2, h3]"),
    ("c4", "[h1, h2, h3]"),
    ("c5", "[h0, h1, h2, h3, h4, h5]"),
];

/// What rules open.
const OPENINGS: [&str; 6] = ["tcp/1000", "udp/1000", "icmp", "tcp/1000-1001", "udp/1000-1002", "tcp/1001"];

/// One thing that happens. Numbers count modulo what there is.
#[derive(Debug, Clone)]
pub enum Step {
    /// The operator puts these rules in force.
    Apply(Vec<DrawnRule>),
    /// An instance begins a conversation with another one.
    Begin(Talk),
    /// Time passes, in tenths of a second; open streams go on meanwhile.
    Pass(u16),
    /// The weather changes: loss, doubling, longest way in milliseconds.
    Weather(u8, u8, u16),
    /// Nothing comes from one host to the other any more.
    Block(usize, usize),
    /// A host cannot reach the coordinator any more.
    CutOff(usize),
    /// A host cannot reach the coordinator until its lease has ended, and longer.
    Starve(usize),
    /// Everybody reaches everybody again.
    Heal,
    /// An agent is restarted.
    Restart(usize),
    /// The coordinator is restarted.
    RestartCoordinator,
    /// One more host joins, if there is a name left.
    Join,
    /// A host is revoked.
    Revoke(usize),
    /// A host gets another address.
    Roam(usize),
    /// A host is sent again what it was sent before.
    Replay(usize, usize),
    /// A host is sent what is meant for one host or another, changed; then its link ends.
    Confuse(usize, usize, Confusion, usize),
    /// Somebody with a host's keys seals a packet in the name of any instance.
    Lie(usize, Talk),
}

/// A rule: who (bits), to whom, on what, and until when, in seconds from the start.
#[derive(Debug, Clone)]
pub struct DrawnRule {
    /// The components that may begin, as bits.
    pub from: u8,
    /// The one that they may reach.
    pub to: usize,
    /// On what.
    pub opening: usize,
    /// Until when.
    pub expires: Option<u16>,
}

/// A first packet.
#[derive(Debug, Clone)]
pub struct Talk {
    /// Who begins.
    pub from: usize,
    /// With whom.
    pub to: usize,
    /// On what.
    pub what: What,
    /// In which family.
    pub v6: bool,
    /// Whether to take one of those that the rules allow, if there is any, instead of any two.
    pub lawful: bool,
}

/// What a conversation begins with.
#[derive(Debug, Clone, Copy)]
pub enum What {
    /// A TCP stream to 1000 and so many.
    Stream(u8),
    /// A segment from the middle of a stream.
    MidStream(u8),
    /// A SYN-ACK from a service.
    SynAck(u8),
    /// A UDP datagram.
    Datagram(u8),
    /// A UDP datagram from a service.
    Answer(u8),
    /// An echo request.
    Echo,
    /// An echo reply.
    EchoReply,
}

impl What {
    /// What a rule must open for it, and whether from the other end.
    const fn asks(self) -> ((Protocol, u16), bool) {
        match self {
            Self::Stream(port) | Self::MidStream(port) => ((Protocol::Tcp, service(port)), false),
            Self::SynAck(port) => ((Protocol::Tcp, service(port)), true),
            Self::Datagram(port) => ((Protocol::Udp, service(port)), false),
            Self::Answer(port) => ((Protocol::Udp, service(port)), true),
            Self::Echo => ((Protocol::Icmp, 0), false),
            Self::EchoReply => ((Protocol::Icmp, 0), true),
        }
    }
}

/// An instance, its host and its address.
type End = (Number, Instance, IpAddr);

/// A packet that was tried: what it was, the packet, and how often it should come, where that is certain.
type Tried = (String, Vec<u8>, Option<u32>);

/// Both ends of a stream that was accepted.
#[derive(Debug, Clone)]
struct Stream {
    ends: [(Number, ComponentName, IpAddr, u16); 2],
}

/// A scenario under way.
pub struct Run {
    /// The mesh.
    pub world: World,
    streams: Vec<Stream>,
    /// Names of hosts, by number.
    names: BTreeMap<Number, String>,
    /// Makes every packet another one.
    counter: u32,
}

impl Run {
    /// A mesh of so many hosts, without rules.
    ///
    /// # Errors
    /// If an invariant breaks.
    pub fn new(seed: u64, hosts: usize) -> Result<Self> {
        let mut run = Self {
            world: World::new(seed, LEASE)?,
            streams: Vec::new(),
            names: BTreeMap::new(),
            counter: 0,
        };
        for _ in 0..hosts {
            run.step(&Step::Join)?;
        }
        run.step(&Step::Apply(Vec::new()))?;
        run.step(&Step::Pass(30))?;
        Ok(run)
    }

    /// Lets one thing happen.
    ///
    /// # Errors
    /// If an invariant breaks.
    pub fn step(&mut self, step: &Step) -> Result<()> {
        match step {
            Step::Apply(rules) => self.world.apply(&policy(rules)),
            Step::Begin(talk) => self.begin(talk),
            Step::Pass(tenths) => self.pass(millis(u64::from(*tenths) * 100)),
            Step::Weather(loss, doubled, longest) => {
                self.world.network.weather = Weather {
                    loss: *loss,
                    doubled: *doubled,
                    longest: millis(u64::from(*longest)),
                };
                Ok(())
            }
            Step::Block(from, to) => {
                let pair = self.alive(*from).zip(self.alive(*to));
                pair.into_iter().for_each(|(from, to)| self.world.block(from, to));
                Ok(())
            }
            Step::CutOff(host) => self.alive(*host).map_or(Ok(()), |host| self.world.cut_off(host)),
            Step::Starve(host) => {
                self.alive(*host).map_or(Ok(()), |host| self.world.cut_off(host))?;
                self.pass(LEASE)
            }
            Step::Heal => {
                self.world.heal();
                Ok(())
            }
            Step::Restart(host) => self.alive(*host).map_or(Ok(()), |host| self.world.restart(host)),
            Step::RestartCoordinator => self.world.restart_coordinator(),
            Step::Join => self.join(),
            Step::Revoke(host) => self.alive(*host).map_or(Ok(()), |host| self.world.revoke(host)),
            Step::Roam(host) => self.alive(*host).map_or(Ok(()), |host| self.world.roam(host)),
            Step::Replay(host, from) => {
                self.alive(*host).into_iter().for_each(|host| self.world.replay(host, *from));
                Ok(())
            }
            Step::Confuse(host, of, how, from) => match self.alive(*host).zip(self.alive(*of)) {
                Some((host, of)) => self.world.confuse(host, of, *how, *from),
                None => Ok(()),
            },
            Step::Lie(host, talk) => self.lie(*host, talk),
        }
    }

    /// The end: everything is healed, all hosts get what is theirs, and then every pair can do what the rules say, and nothing else.
    ///
    /// # Errors
    /// If not, or if an invariant breaks.
    pub fn finish(&mut self) -> Result<()> {
        self.world.heal();
        self.world.network.weather = Weather::CALM;
        // The longest wait before an agent tries to link again, and the age at which sessions to old addresses end.
        self.try_all_pairs(Duration::from_secs(100))?;
        self.world.has_converged()?;
        self.try_all_pairs(Duration::from_secs(90))?;
        let tried = self.try_all_pairs(Duration::from_secs(12))?;
        for (talk, packet, expected) in tried {
            let delivered = self.world.deliveries(&packet);
            ensure!(
                expected.is_none_or(|expected| delivered == expected),
                "{talk} came {delivered} times, not {expected:?}"
            );
        }
        self.world.has_converged()?;
        self.world.coordinator().verify_audit()?;
        Ok(())
    }

    fn join(&mut self) -> Result<()> {
        let alive: BTreeSet<_> = self
            .world
            .alive()
            .into_iter()
            .filter_map(|number| self.names.get(&number).cloned())
            .collect();
        let free = (0..6).map(|n| format!("h{n}")).find(|name| !alive.contains(name));
        let Some(name) = free.filter(|_| self.names.len() < 9) else {
            return Ok(());
        };
        let number = self.world.join(&name)?;
        self.names.insert(number, name);
        Ok(())
    }

    fn alive(&self, drawn: usize) -> Option<Number> {
        let alive = self.world.alive();
        alive.get(drawn.checked_rem(alive.len())?).copied()
    }

    /// Who talks to whom.
    fn ends(&self, talk: &Talk) -> Result<Option<(End, End)>> {
        let state = self.world.history().at(self.world.coordinator().inventory().version)?;
        let all = state.instances(talk.v6);
        let (packet, is_reverse) = talk.what.asks();
        let now = mesh_time(self.world.now);
        let may = |from: &Instance, to: &Instance| {
            let (from, to) = if is_reverse { (to, from) } else { (from, to) };
            !talk.lawful || state.may(from, to, packet, now)
        };
        let pairs = all.iter().flat_map(|from| all.iter().map(move |to| (from, to)));
        let pairs: Vec<_> = pairs.filter(|(from, to)| from.1 != to.1 && may(&from.0, &to.0)).collect();
        let drawn = (talk.from * 41 + talk.to).checked_rem(pairs.len());
        let Some((from, to)) = drawn.and_then(|at| pairs.get(at)) else {
            return Ok(None);
        };
        let end = |(instance, address): &(Instance, IpAddr)| {
            let number = self.world.number(instance.1).context("an instance on no host")?;
            Ok::<_, anyhow::Error>((number, instance.clone(), *address))
        };
        Ok(Some((end(from)?, end(to)?)))
    }

    fn begin(&mut self, talk: &Talk) -> Result<()> {
        if let Some((from, to)) = self.ends(talk)? {
            let packet = self.packet(talk.what, from.2, to.2);
            self.world.send(from.0, &from.1.0, &packet)?;
        }
        Ok(())
    }

    /// The keys are one host's, the name is any instance's, and so is the destination.
    fn lie(&mut self, host: usize, talk: &Talk) -> Result<()> {
        let Some((liar, (from, to))) = self.alive(host).zip(self.ends(talk)?) else {
            return Ok(());
        };
        if liar == to.0 {
            return Ok(());
        }
        // The first goes for the handshake.
        for _ in 0..3 {
            let packet = self.packet(talk.what, from.2, to.2);
            if self.world.lie(liar, to.0, &packet)? {
                break;
            }
            self.pass(millis(1_000))?;
        }
        Ok(())
    }

    fn packet(&mut self, what: What, from: IpAddr, to: IpAddr) -> Vec<u8> {
        self.counter += 1;
        let (n, high) = (self.counter, 20_000 + u16::try_from(self.counter % 40_000).unwrap_or(0));
        let data = n.to_be_bytes();
        match what {
            What::Stream(port) => ip(from, to, number::TCP, &tcp((high, service(port)), SYN, n, 0, &data)),
            What::MidStream(port) => ip(from, to, number::TCP, &tcp((high, service(port)), ACK | PSH, n, 1, &data)),
            What::SynAck(port) => ip(from, to, number::TCP, &tcp((service(port), high), SYN | ACK, n, 1, &data)),
            What::Datagram(port) => ip(from, to, number::UDP, &udp((high, service(port)), &data)),
            What::Answer(port) => ip(from, to, number::UDP, &udp((service(port), high), &data)),
            What::Echo => echo(from, to, true, high),
            What::EchoReply => echo(from, to, false, high),
        }
    }

    /// Time passes in pieces; applications answer, and streams go on.
    fn pass(&mut self, span: Duration) -> Result<()> {
        let pieces = u32::try_from(span.as_secs()).unwrap_or(0).clamp(1, 8);
        for _ in 0..pieces {
            self.world.pass(span / pieces)?;
            for (number, component, packet) in self.world.take_inbox() {
                self.answer(number, &component, &packet)?;
            }
            for stream in self.streams.clone() {
                let [a, b] = &stream.ends;
                self.segment(a, b)?;
                self.segment(b, a)?;
            }
        }
        Ok(())
    }

    /// One more segment of a stream, from one end to the other.
    fn segment(&mut self, from: &(Number, ComponentName, IpAddr, u16), to: &(Number, ComponentName, IpAddr, u16)) -> Result<()> {
        self.counter += 1;
        let packet = ip(
            from.2,
            to.2,
            number::TCP,
            &tcp((from.3, to.3), ACK, self.counter, 1, &self.counter.to_be_bytes()),
        );
        if self.world.alive().contains(&from.0) {
            self.world.send(from.0, &from.1, &packet)?;
        }
        Ok(())
    }

    fn answer(&mut self, here: Number, component: &ComponentName, packet: &[u8]) -> Result<()> {
        let Ok(parsed) = parse(packet) else { return Ok(()) };
        let (from, to) = (parsed.dst, parsed.src);
        let there = self.world.history().owner(to).cloned();
        self.counter += 1;
        let (n, data) = (self.counter, self.counter.to_be_bytes());
        let answer = match parsed.transport {
            Transport::Tcp {
                src_port, dst_port, flags, ..
            } if flags.syn() && !flags.ack() => ip(from, to, number::TCP, &tcp((dst_port, src_port), SYN | ACK, n, 1, &data)),
            Transport::Tcp {
                src_port, dst_port, flags, ..
            } if flags.syn() => {
                let other = there.and_then(|there| Some((self.world.number(there.1)?, there.0)));
                if let Some((number, other)) = other {
                    let ends = [(here, component.clone(), from, dst_port), (number, other, to, src_port)];
                    self.streams.push(Stream { ends });
                    self.streams.drain(..self.streams.len().saturating_sub(6));
                }
                return Ok(());
            }
            Transport::Udp { src_port, dst_port } if dst_port < 2_000 => ip(from, to, number::UDP, &udp((dst_port, src_port), &data)),
            Transport::Echo { id, request: true } => echo(from, to, false, id),
            Transport::Tcp { .. } | Transport::Udp { .. } | Transport::Echo { .. } | Transport::IcmpError { .. } => return Ok(()),
        };
        self.world.send(here, component, &answer)?;
        Ok(())
    }

    /// Every pair of instances tries everything; what was tried, and how often it should come, where that is certain.
    fn try_all_pairs(&mut self, patience: Duration) -> Result<Vec<Tried>> {
        let version = self.world.coordinator().inventory().version;
        let mut tried = Vec::new();
        // Alternating families, so that both have their turn.
        let v6 = self.counter % 2 == 1;
        let instances = self.world.history().at(version)?.instances(v6);
        for (from, source) in &instances {
            for (to, destination) in &instances {
                for (what, asked) in [
                    (What::Stream(0), (Protocol::Tcp, 1_000)),
                    (What::Stream(1), (Protocol::Tcp, 1_001)),
                    (What::Datagram(0), (Protocol::Udp, 1_000)),
                    (What::Echo, (Protocol::Icmp, 0)),
                ] {
                    if from == to {
                        continue;
                    }
                    let packet = self.packet(what, *source, *destination);
                    let number = self.world.number(from.1).context("an instance on no host")?;
                    let peer = self.world.number(to.1).context("an instance on no host")?;
                    self.world.send(number, &from.0, &packet)?;
                    let may = |at| Ok::<_, anyhow::Error>(self.world.history().at(version)?.may(from, to, asked, mesh_time(at)));
                    let now = self.world.now;
                    // What ends in these seconds may or may not come; agents' clocks may be a little behind, never ahead.
                    let is_steady = may(now - CLOCK_LAG)? == may(now + patience)?;
                    let is_certain = is_steady && !self.world.is_betrayed(number) && !self.world.is_betrayed(peer);
                    let expected = is_certain.then_some(u32::from(may(now)?));
                    tried.push((format!("{what:?} from {from:?} to {to:?}"), packet, expected));
                }
            }
        }
        self.pass(patience)?;
        Ok(tried)
    }
}

const fn service(port: u8) -> u16 {
    1_000 + (port % 4) as u16
}

/// The policy of these rules.
fn policy(rules: &[DrawnRule]) -> String {
    let mut text = "version: 1\ncomponents:\n".to_owned();
    for (name, on) in COMPONENTS {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {name}: {{on: {on}, attach: {{user: {name}}}}}");
    }
    let mut known = BTreeSet::new();
    let mut allow = String::new();
    for rule in rules {
        let from: Vec<_> = COMPONENTS
            .iter()
            .enumerate()
            .filter(|(n, _)| rule.from >> n & 1 == 1)
            .map(|(_, (name, _))| *name)
            .collect();
        let (to, opening) = (COMPONENTS[rule.to % COMPONENTS.len()].0, OPENINGS[rule.opening % OPENINGS.len()]);
        if from.is_empty() || !known.insert((from.clone(), to, opening)) {
            continue;
        }
        let _ = write!(allow, "  - {{from: [{}], to: \"{to}:{opening}\"", from.join(", "));
        if let Some(seconds) = rule.expires {
            let end = MESH_START.0 + u64::from(seconds);
            let end = i64::try_from(end).ok().and_then(|end| jiff::Timestamp::from_second(end).ok());
            let _ = end.map(|end| write!(allow, ", expires: {end}"));
        }
        allow.push_str("}\n");
    }
    if !allow.is_empty() {
        text.push_str("allow:\n");
        text.push_str(&allow);
    }
    text
}
