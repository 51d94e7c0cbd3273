//! The agent's answers to questions on the status socket, made of the view in force and the engine's counters. What they say of names and
//! rules is this host's own view, and nothing else.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use cloison_agent_core::flow::Opener;
use cloison_agent_core::stats::Totals;
use cloison_proto::filter::{InstanceIndex, Table, Verdict};
use cloison_proto::id::HostId;
use cloison_proto::label::{ComponentName, HostName};
use cloison_proto::net::{PortSpec, Protocol};
use cloison_proto::status::{
    Allowed, Answer, Counters, Enforcement as ShownEnforcement, Explanation, Flow, Instance, MAX_FLOWS, Packets, Peer, Ping, PingOutcome,
    Port,
};
use cloison_proto::version::MeshTime;
use cloison_proto::view::View;

use crate::dataplane::{Enforcement, MeshEngine, Report};
use crate::sys::clock;
use crate::worker::KernelCounts;

/// How long a ping waits for its handshake: an initiation is repeated after five seconds (WireGuard paper section 6.1), and once is enough.
const PING_WAIT: Duration = Duration::from_secs(8);

/// How often a ping looks whether its handshake came about.
const PING_LOOK: Duration = Duration::from_millis(5);

/// The instances of this host and how each is enforced.
#[must_use]
pub fn instances(view: &View, report: &Report) -> Vec<Instance> {
    let shown = |component: &ComponentName| match report.get(component) {
        Some(Enforcement::Isolated(by)) => ShownEnforcement::Isolated { by: by.clone() },
        Some(Enforcement::Bound(by)) => ShownEnforcement::Bound { by: by.clone() },
        Some(Enforcement::Shared) => ShownEnforcement::Shared,
        Some(Enforcement::Unenforced(why)) => ShownEnforcement::Unenforced { why: why.clone() },
        None => ShownEnforcement::Unenforced {
            why: "it is not installed yet".into(),
        },
    };
    let one = |(component, instance): (&ComponentName, &cloison_proto::view::LocalInstance)| Instance {
        component: component.clone(),
        addresses: instance.addresses.both().to_vec(),
        attachment: instance.attachment.to_string(),
        enforcement: shown(component),
        last_denial: None,
    };
    view.instances.iter().map(one).collect()
}

/// The hosts that a rule pairs this one with.
#[must_use]
pub fn peers(view: &View, engine: &MeshEngine) -> Vec<Peer> {
    let now = clock::now();
    let mut states: BTreeMap<HostId, _> = engine.peers(now).into_iter().map(|p| (p.host, p)).collect();
    let one = |peer: &cloison_proto::view::Peer| {
        let state = states.remove(&peer.id);
        let of_host = view.remotes.iter().filter(|r| r.host == peer.id);
        Peer {
            host: peer.id,
            name: peer.name.clone(),
            components: of_host.map(|r| r.component.clone()).collect(),
            endpoint: state.and_then(|s| s.endpoint).map(|e| e.remote),
            handshake_secs: state.and_then(|s| s.session_age).map(|age| age.as_secs()),
            round_trip_micros: state.and_then(|s| s.round_trip).map(micros),
            received_bytes: state.map_or(0, |s| s.received_bytes),
            sent_bytes: state.map_or(0, |s| s.sent_bytes),
            waiting: state.map_or(0, |s| s.waiting as u64),
        }
    };
    view.peers.values().map(one).collect()
}

/// The packets counted so far.
#[must_use]
pub fn packets(engine: &MeshEngine, kernel: KernelCounts) -> Packets {
    let stats = engine.stats();
    let counters = |totals: &Totals| Counters {
        received: totals.received,
        delivered: totals.delivered,
        waiting: totals.waiting(),
        answered: totals.answered,
        dropped: totals.drops().filter(|(_, count)| *count > 0).collect(),
    };
    let kernel = [
        ("udp_refused", kernel.udp_refused),
        ("udp_fragmented", kernel.udp_fragmented),
        ("tun_refused", kernel.tun_refused),
        ("sockets_unanswered", kernel.sockets_unanswered),
    ];
    Packets {
        outbound: counters(&stats.outbound),
        inbound: counters(&stats.inbound),
        kernel: kernel.map(|(name, count)| (name.to_owned(), count)).into(),
    }
}

/// The conversations that pass right now.
#[must_use]
pub fn flows(table: &Table, engine: &MeshEngine) -> Answer {
    let now = clock::now();
    let component = |address: IpAddr| table.lookup(address).and_then(|i| table.instance(i)).map(|i| i.component.clone());
    let mut flows = Vec::new();
    engine.flows().for_each(now, |entry| {
        if flows.len() < MAX_FLOWS {
            let key = entry.key();
            flows.push(Flow {
                protocol: key.kind.protocol(),
                local: key.local,
                local_component: component(key.local),
                local_port: key.local_port,
                remote: key.remote,
                remote_component: component(key.remote),
                remote_port: key.remote_port,
                outbound: entry.opener() == Opener::Here,
                rule: table.rule(cloison_proto::filter::RuleIndex(entry.grant().rule)),
                idle_secs: now.since(entry.last_seen()).as_secs(),
            });
        }
    });
    Answer::Flows {
        flows,
        total: u64::from(engine.flows().len()),
    }
}

/// What `explain` is asked.
#[derive(Debug, Clone)]
pub struct Question {
    /// Who begins; `None` means any component of this host.
    pub from: Option<ComponentName>,
    /// Whom it is to reach.
    pub to: ComponentName,
    /// On what.
    pub on: Port,
}

/// Whether something is allowed, by the very table and function that packets are judged by.
#[must_use]
pub fn explain(view: &View, table: &Table, question: &Question, now: MeshTime) -> Vec<Allowed> {
    let named = |name: Option<&ComponentName>, (_, instance): &(InstanceIndex, &cloison_proto::filter::Instance)| match name {
        Some(name) => instance.component == *name,
        None => instance.local,
    };
    let all = || (0..).map(InstanceIndex).zip(table.instances());
    let mut allowed = Vec::new();
    for from in all().filter(|i| named(question.from.as_ref(), i)) {
        for to in all().filter(|i| named(Some(&question.to), i)) {
            for ports in openings(view, table, question, &from.1.component) {
                if let Verdict::Allowed { rule, until } = check(table, (from.0, to.0), ports, now) {
                    allowed.extend(table.rule(rule).map(|rule| Allowed {
                        from: from.1.component.clone(),
                        from_host: host_name(view, from.1.host),
                        to: to.1.component.clone(),
                        to_host: host_name(view, to.1.host),
                        to_addresses: to.1.addresses.both().to_vec(),
                        ports,
                        rule,
                        until: (until != MeshTime::NEVER).then_some(until),
                    }));
                }
            }
        }
    }
    allowed
}

/// What is to be checked: what was asked for, or, if anything will do, whatever rules open between the two.
fn openings(view: &View, table: &Table, question: &Question, from: &ComponentName) -> Vec<PortSpec> {
    match &question.on {
        Port::Ports(ports) => vec![*ports],
        Port::Service(service) => table.service(&question.to, service).collect(),
        Port::Any => {
            let rules = view.rules.iter().filter(|r| r.from == *from && r.to == question.to);
            let mut ports: Vec<_> = rules.flat_map(|r| &r.grants).map(|g| g.ports).collect();
            ports.sort();
            ports.dedup();
            ports
        }
    }
}

/// The verdict for all ports of a specification: the first one's, if all are allowed.
fn check(table: &Table, (from, to): (InstanceIndex, InstanceIndex), ports: PortSpec, now: MeshTime) -> Verdict {
    let (protocol, mut range) = match ports {
        PortSpec::Tcp(range) => (Protocol::Tcp, range.first()..=range.last()),
        PortSpec::Udp(range) => (Protocol::Udp, range.first()..=range.last()),
        PortSpec::Icmp => (Protocol::Icmp, 0..=0),
    };
    let one = |port| table.check_pair(from, to, protocol, port, now);
    let first = one(*range.start());
    range.find(|port| !one(*port).is_allowed()).map_or(first, one)
}

/// What keeps the allowed from working right now, as far as this host can tell.
#[must_use]
pub fn obstacles(view: &View, report: &Report, engine: &MeshEngine, allowed: &[Allowed], lease_left: Duration) -> Explanation {
    let mut obstacles = Vec::new();
    if lease_left.is_zero() && !allowed.is_empty() {
        obstacles.push("the lease of the view has ended: nothing passes until the coordinator renews it".to_owned());
    }
    for instance in instances(view, report) {
        let concerned = allowed.iter().any(|a| a.from == instance.component || a.to == instance.component);
        if let (true, ShownEnforcement::Unenforced { why }) = (concerned, &instance.enforcement) {
            obstacles.push(format!("{} is unenforced on this host: {why}", instance.component));
        }
    }
    for peer in peers(view, engine) {
        let concerned = allowed.iter().any(|a| a.from_host == peer.name || a.to_host == peer.name);
        if concerned && peer.endpoint.is_none() && peer.handshake_secs.is_none() {
            obstacles.push(format!("{} was not reached yet; `cloison-agent ping` tries it", peer.name));
        }
    }
    Explanation {
        allowed: allowed.to_vec(),
        obstacles,
    }
}

fn host_name(view: &View, host: HostId) -> HostName {
    view.peers
        .get(&host)
        .map_or_else(|| view.host.name.clone(), |peer| peer.name.clone())
}

/// Makes a handshake with each host of `component`, and says how it went.
pub async fn ping(view: Arc<View>, table: Arc<Table>, engine: Arc<MeshEngine>, component: ComponentName, now: MeshTime) -> Answer {
    let echo = Question {
        from: None,
        to: component.clone(),
        on: Port::Ports(PortSpec::Icmp),
    };
    let echo_allowed: Vec<HostName> = explain(&view, &table, &echo, now).into_iter().map(|a| a.to_host).collect();
    let mut hosts = Vec::new();
    if view.instances.contains_key(&component) {
        let host = view.host.name.clone();
        hosts.push(Ping {
            echo_allowed: echo_allowed.contains(&host),
            host,
            endpoint: None,
            outcome: PingOutcome::Local,
        });
    }
    let remote: Vec<HostId> = view.remotes.iter().filter(|r| r.component == component).map(|r| r.host).collect();
    let attempts: Vec<_> = remote.iter().map(|host| tokio::spawn(handshake(engine.clone(), *host))).collect();
    for (host, attempt) in remote.into_iter().zip(attempts) {
        let outcome = attempt.await.unwrap_or_else(|e| PingOutcome::Silent { why: e.to_string() });
        let host_name = host_name(&view, host);
        hosts.push(Ping {
            echo_allowed: echo_allowed.contains(&host_name),
            host: host_name,
            endpoint: engine.peer(host, clock::now()).and_then(|p| p.endpoint).map(|e| e.remote),
            outcome,
        });
    }
    Answer::Ping { hosts }
}

async fn handshake(engine: Arc<MeshEngine>, host: HostId) -> PingOutcome {
    let silent = |why: &str| PingOutcome::Silent { why: why.into() };
    let began = clock::now();
    if !engine.want_handshake(host) {
        return silent("this host is no peer of the view in force");
    }
    loop {
        tokio::time::sleep(PING_LOOK).await;
        let now = clock::now();
        let waited = now.since(began);
        let Some(peer) = engine.peer(host, now) else {
            return silent("the peer was withdrawn meanwhile");
        };
        if peer.session_age.is_some_and(|age| age < waited) {
            let round_trip = peer.round_trip.unwrap_or(waited);
            return PingOutcome::Answered {
                round_trip_micros: micros(round_trip),
            };
        }
        if waited > PING_WAIT {
            return match peer.endpoint {
                Some(endpoint) => silent(&format!("no answer from {}", endpoint.remote)),
                None => silent("no endpoint of it answered; the coordinator's hints may be missing, or a firewall drops UDP"),
            };
        }
    }
}

fn micros(span: Duration) -> u64 {
    u64::try_from(span.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::testing::Mesh;

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    fn asked(to: &str, on: Port) -> Result<Vec<Allowed>, Box<dyn std::error::Error>> {
        let view = Mesh::new().view(1, &["tcp/5432", "icmp"])?;
        let table = Table::new(view.content());
        let question = Question {
            from: None,
            to: to.parse()?,
            on,
        };
        Ok(explain(view.content(), &table, &question, MeshTime(1)))
    }

    #[test]
    fn explain_finds_what_the_table_allows() -> Outcome {
        let by_service = asked("postgres", Port::Service("sql".parse()?))?;
        assert_eq!(by_service.len(), 2);
        let by_port = asked("postgres", Port::Ports("tcp/5432".parse()?))?;
        assert_eq!(
            by_port.iter().map(|a| (a.from.as_str(), a.to_host.as_str())).collect::<Vec<_>>(),
            [("n8n", "db-1")]
        );
        assert_eq!(asked("postgres", Port::Any)?.len(), 2);
        assert!(
            asked("postgres", Port::Ports("tcp/5432-5433".parse()?))?.is_empty(),
            "a range of which one port is denied"
        );
        Ok(())
    }

    #[test]
    fn what_is_unknown_and_what_is_denied_look_alike() -> Outcome {
        let denied = asked("postgres", Port::Ports("tcp/22".parse()?))?;
        assert_eq!(denied, asked("no-such-component", Port::Any)?);
        assert_eq!(denied, asked("postgres", Port::Service("no-such-service".parse()?))?);
        assert!(denied.is_empty());
        Ok(())
    }
}
