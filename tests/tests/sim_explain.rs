//! `explain` says what happens: over any mesh, its answer is what a real packet meets at the sending agent and at the receiving one, and what
//! the policy means by the naive evaluator.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use cloison_agent_core::install::LeaseTerm;
use cloison_coordinator::policy::explain::{EndVerdict, HostLive, LiveState, PairAnswer, Question, explain};
use cloison_proto::id::HostId;
use cloison_proto::label::{ComponentName, LabelSet};
use cloison_proto::net::{PortSpec, Protocol};
use cloison_proto::policy::{Policy, What, testing};
use cloison_proto::verdict::DropReason;
use cloison_proto::version::Timestamp;
use cloison_tests::model;
use cloison_tests::packets::flags::SYN;
use cloison_tests::packets::{echo, ip, number, tcp, udp};
use cloison_tests::sim::clock::{START, mesh_time};
use cloison_tests::sim::host::{Fate, Host};
use cloison_tests::sim::hostile::Liar;
use cloison_tests::sim::inventory::{LEASE, Mesh, key_of};
use proptest::prelude::*;

/// What is asked of every pair: edges of what arbitrary policies open.
const ASKED: [(&str, Protocol, u16); 6] = [
    ("tcp/80", Protocol::Tcp, 80),
    ("tcp/65535", Protocol::Tcp, 65_535),
    ("tcp/1", Protocol::Tcp, 1),
    ("udp/80", Protocol::Udp, 80),
    ("udp/2", Protocol::Udp, 2),
    ("icmp", Protocol::Icmp, 0),
];

const NOW: Timestamp = Timestamp(START.0 + 10_000_000_000);

/// Nobody is linked: `explain` answers all the same.
struct Nobody;

impl LiveState for Nobody {
    fn live(&self, _: HostId) -> HostLive {
        HostLive::default()
    }
}

/// Every host's real data plane, and somebody with each host's keys who asks no filter, so that the receiving one is heard too.
struct Agents {
    hosts: BTreeMap<HostId, (SocketAddr, Host)>,
    liars: BTreeMap<HostId, Liar>,
    names: BTreeMap<HostId, String>,
    counter: u16,
}

impl Agents {
    fn of(mesh: &Mesh, names: &[&str]) -> Result<Self> {
        let mut agents = Self {
            hosts: BTreeMap::new(),
            liars: BTreeMap::new(),
            names: BTreeMap::new(),
            counter: 0,
        };
        for (n, name) in (1u8..).zip(names) {
            let (id, view) = (mesh.id(name)?, mesh.view(name)?);
            let mut host = Host::new(&key_of(name), u64::from(n));
            let lease = LeaseTerm {
                at: START,
                mesh: mesh_time(START),
                ends: START + LEASE,
            };
            host.install(&view, Some(lease), START);
            for peer in view.peers.keys() {
                host.hint(*peer, &["192.0.2.99:1".parse()?], 1);
            }
            agents.hosts.insert(id, (SocketAddr::from(([192, 0, 2, n], 51_820)), host));
            agents.liars.insert(id, Liar::new(&key_of(name), u64::from(n)));
            agents.names.insert(id, (*name).to_owned());
        }
        Ok(agents)
    }

    /// What the sending agent does with a packet.
    fn send(&mut self, host: HostId, component: &ComponentName, packet: &[u8]) -> Result<Fate> {
        let (_, host) = self.hosts.get_mut(&host).context("no such host")?;
        let (fate, _) = host.send(component, packet, NOW)?;
        host.check()?;
        Ok(fate)
    }

    /// Whether the receiving agent delivers a packet that the other host sealed without asking anybody; if not, for what reason. `None` if
    /// there is no session between the two.
    fn receive(&mut self, from: HostId, to: HostId, packet: &[u8]) -> Result<Option<Result<(), DropReason>>> {
        let key = key_of(self.names.get(&to).context("no such host")?).public();
        let address = self.hosts.get(&from).context("no such host")?.0;
        let liar = self.liars.get_mut(&from).context("no such host")?;
        let (_, host) = self.hosts.get_mut(&to).context("no such host")?;
        if !liar.is_live(&key, NOW) {
            let initiation = liar.greet(&key, NOW)?;
            let answer = host.receive(address, &initiation, NOW);
            let Some(first) = answer.sent.first().and_then(|(_, response)| liar.receive(response, NOW)) else {
                return Ok(None);
            };
            host.receive(address, &first, NOW);
        }
        let datagram = liar.say(&key, packet, NOW)?;
        let before = host.engine().stats().inbound;
        let output = host.receive(address, &datagram, NOW);
        let after = host.engine().stats().inbound;
        if !output.delivered.is_empty() {
            return Ok(Some(Ok(())));
        }
        let counted = after.drops().zip(before.drops()).find(|(after, before)| after.1 > before.1);
        let ((reason, _), _) = counted.context("neither delivered nor dropped")?;
        Ok(Some(Err(reason)))
    }

    /// A first packet that no other one is like.
    fn packet(&mut self, protocol: Protocol, port: u16, from: IpAddr, to: IpAddr) -> Vec<u8> {
        self.counter = self.counter.wrapping_add(1).max(1_024);
        match protocol {
            Protocol::Tcp => ip(from, to, number::TCP, &tcp((self.counter, port), SYN, 1, 0, b"")),
            Protocol::Udp => ip(from, to, number::UDP, &udp((self.counter, port), b"hello")),
            Protocol::Icmp => echo(from, to, true, self.counter),
        }
    }
}

fn is_same(end: EndVerdict, fate: Fate) -> bool {
    match (end, fate) {
        (EndVerdict::Allowed { .. }, Fate::Passed | Fate::Waits | Fate::Dropped(DropReason::QueueFull)) => true,
        (EndVerdict::Denied(said), Fate::Dropped(met)) => said == met,
        (EndVerdict::Allowed { .. } | EndVerdict::Denied(_), _) => false,
    }
}

/// One pair of instances: `explain`, the model and both agents agree.
fn agree(agents: &mut Agents, policy: &Policy, question: &Question, asked: (Protocol, u16), pair: &PairAnswer) -> Result<()> {
    let [answer] = &*pair.answers else {
        anyhow::bail!("one port has one answer: {pair:?}")
    };
    let (from, to) = ((&question.from, pair.from.host), (&question.to, pair.to.host));
    let may = model::may(policy, from, to, asked, mesh_time(NOW));
    ensure!(answer.is_allowed() == may, "explain {question:?} {pair:?}, the model: {may}");
    for (source, destination) in pair.from.addresses.both().into_iter().zip(pair.to.addresses.both()) {
        let packet = agents.packet(asked.0, asked.1, source, destination);
        let fate = agents.send(pair.from.host, &question.from, &packet)?;
        ensure!(
            is_same(answer.sender, fate),
            "explain {question:?} says {:?} of the sender, which {fate:?}",
            answer.sender
        );
        if pair.from.host == pair.to.host {
            continue;
        }
        let packet = agents.packet(asked.0, asked.1, source, destination);
        match (agents.receive(pair.from.host, pair.to.host, &packet)?, answer.receiver) {
            (Some(Ok(())), EndVerdict::Allowed { .. }) => {}
            // Of an instance that it does not know, the receiver learns first that it does not belong to that peer.
            (Some(Err(met)), EndVerdict::Denied(said)) if met == said || met == DropReason::SourceNotPeer => {}
            (None, EndVerdict::Denied(_)) => {}
            (met, said) => anyhow::bail!("explain {question:?} says {said:?} of the receiver, which {met:?}"),
        }
    }
    Ok(())
}

fn check(policy: &Arc<Policy>, labels: &[LabelSet]) -> Result<usize> {
    let names = ["h0", "h1", "h2"];
    let mesh = Mesh::of(policy, names.into_iter().zip(labels.iter().cloned()))?;
    let mut agents = Agents::of(&mesh, &names)?;
    let mut allowed = 0;
    for from in policy.components().keys() {
        for to in policy.components().keys() {
            for (text, protocol, port) in ASKED {
                let what = What::Ports(text.parse::<PortSpec>()?);
                let question = Question {
                    from: from.clone(),
                    to: to.clone(),
                    what,
                };
                let explanation = explain(mesh.plan(), &question, mesh_time(NOW), &Nobody)?;
                for pair in &explanation.pairs {
                    agree(&mut agents, policy, &question, (protocol, port), pair)?;
                    allowed += usize::from(pair.is_allowed());
                }
            }
        }
    }
    Ok(allowed)
}

fn any_labels() -> impl Strategy<Value = Vec<LabelSet>> {
    let label =
        |key: &'static str| prop::option::of(prop::sample::select(vec!["app", "data", "null", "1"])).prop_map(move |value| (key, value));
    let labels = (label("role"), label("zone")).prop_map(|(role, zone)| {
        let pairs = [role, zone]
            .into_iter()
            .filter_map(|(key, value)| Some((key.parse().ok()?, value?.parse().ok()?)));
        pairs.collect::<LabelSet>()
    });
    prop::collection::vec(labels, 3)
}

fn cases() -> u32 {
    std::env::var("CLOISON_SIM_CASES")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), max_shrink_iters: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn explain_says_what_a_packet_meets_and_what_the_policy_means(policy in testing::policies(), labels in any_labels()) {
        let checked = check(&Arc::new(policy), &labels);
        prop_assert!(checked.is_ok(), "{:#}", checked.err().unwrap_or_else(|| anyhow::anyhow!("nothing")));
    }
}

#[test]
fn explain_agrees_where_something_is_allowed() -> Result<()> {
    let policy = cloison_tests::sim::inventory::policy(
        "
version: 1
components:
  a: {on: [h0, h1], attach: {user: a}}
  b: {on: [h1, h2], attach: {user: b}, services: {web: tcp/80}}
  c: {on: h2, attach: {user: c}}
allow:
  - a -> b:web
  - a -> c:icmp
  - {from: b, to: a:udp/80, expires: 2027-01-15T08:00:05Z}
  - {from: c, to: a:udp/80, expires: 2027-01-15T08:00:15Z}
",
    )?;
    let allowed = check(&policy, &[LabelSet::new(), LabelSet::new(), LabelSet::new()])?;
    // a -> b: four pairs; a -> c: two; c -> a: two; b -> a has ended.
    ensure!(allowed == 8, "{allowed} pairs");
    Ok(())
}
