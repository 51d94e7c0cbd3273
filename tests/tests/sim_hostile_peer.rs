//! One pair of hosts, one of which is hostile: whatever it forges is dropped by the other for the right reason, and nothing is delivered (I1,
//! I3, I8, I15; promise 1).

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use cloison_agent_core::install::LeaseTerm;
use cloison_proto::key::WgPublicKey;
use cloison_proto::net::AddressPair;
use cloison_proto::verdict::DropReason;
use cloison_proto::version::Timestamp;
use cloison_tests::packets::flags::{ACK, RST, SYN};
use cloison_tests::packets::{ip, number, tcp, udp, unreachable};
use cloison_tests::sim::clock::{START, mesh_time};
use cloison_tests::sim::host::{Fate, Host, Output};
use cloison_tests::sim::hostile::{BACK_TCP, Liar, OPEN_TCP, OPEN_UDP, Stage, forgeries};
use cloison_tests::sim::inventory::{LEASE, Mesh, key_of, overlay};
use proptest::prelude::*;

/// `n8n` is the attacker, `postgres` its victim. `web` is honest and stands for everybody else.
const POLICY: &str = "
version: 1
components:
  n8n:      {on: app, attach: {user: n8n}}
  runner:   {on: app, attach: {user: runner}}
  postgres: {on: db, attach: {user: postgres}}
  redis:    {on: db, attach: {user: redis}}
  web:      {on: web, attach: {user: web}}
allow:
  - n8n -> postgres:tcp/5432, postgres:udp/53
  - postgres -> n8n:tcp/8080
  - web -> postgres:tcp/5432, redis:tcp/6379
  - runner -> web:tcp/80
";

/// The attacker's host is gone; its keys are in the hands of a liar. The victim's agent is the real one.
struct Theatre {
    stage: Stage,
    victim: Host,
    victim_key: WgPublicKey,
    liar: Liar,
    now: Timestamp,
}

const ATTACKER: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 66)), 51_820);

impl Theatre {
    fn open() -> Result<Self> {
        let mesh = Mesh::new(POLICY, &["app", "db", "web"])?;
        let nobody = overlay()?.nth(4_711).context("an address")?;
        let stage = Stage {
            attacker: mesh.addresses("n8n")?,
            accomplice: mesh.addresses("runner")?,
            victim: mesh.addresses("postgres")?,
            neighbour: mesh.addresses("redis")?,
            third: mesh.addresses("web")?,
            nobody,
        };
        let mut victim = Host::new(&key_of("db"), 7);
        let lease = LeaseTerm {
            at: START,
            mesh: mesh_time(START),
            ends: START + LEASE,
        };
        victim.install(&mesh.view("db")?, Some(lease), START);
        let now = START + Duration::from_secs(10);
        let mut theatre = Self {
            stage,
            victim,
            victim_key: key_of("db").public(),
            liar: Liar::new(&key_of("app"), 8),
            now,
        };
        theatre.greet()?;
        Ok(theatre)
    }

    fn greet(&mut self) -> Result<()> {
        let initiation = self.liar.greet(&self.victim_key, self.now)?;
        let answer = self.victim.receive(ATTACKER, &initiation, self.now);
        let (to, response) = answer.sent.first().context("no response")?;
        ensure!(*to == ATTACKER && answer.delivered.is_empty());
        let first = self.liar.receive(response, self.now).context("no session")?;
        let answer = self.victim.receive(ATTACKER, &first, self.now);
        ensure!(answer.sent.is_empty() && answer.delivered.is_empty(), "{answer:?}");
        Ok(())
    }

    /// The liar sends this inner packet; what the victim does with it.
    fn say(&mut self, packet: &[u8]) -> Result<Output> {
        let datagram = self.liar.say(&self.victim_key, packet, self.now)?;
        let output = self.victim.receive(ATTACKER, &datagram, self.now);
        self.victim.check()?;
        Ok(output)
    }

    /// Packets that the victim dropped on their way in, by reason.
    fn drops(&self) -> Vec<(DropReason, u64)> {
        self.victim
            .engine()
            .stats()
            .inbound
            .drops()
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    fn addresses(&self, v6: bool) -> (IpAddr, IpAddr) {
        let of = |pair: AddressPair| if v6 { pair.v6.into() } else { pair.v4.into() };
        (of(self.stage.attacker), of(self.stage.victim))
    }

    /// What the rules allow the liar comes through, so that it is heard at all.
    fn is_heard(&mut self, v6: bool, port: u16) -> Result<()> {
        let (from, to) = self.addresses(v6);
        let packet = ip(from, to, number::UDP, &udp((port, OPEN_UDP), b"a lawful word"));
        let output = self.say(&packet)?;
        ensure!(
            output.delivered == [("postgres".parse()?, packet)] && output.sent.is_empty(),
            "{output:?}"
        );
        Ok(())
    }
}

#[test]
fn whatever_a_hostile_peer_forges_is_dropped_for_the_right_reason() -> Result<()> {
    let mut theatre = Theatre::open()?;
    let mut names = BTreeSet::new();
    for v6 in [false, true] {
        theatre.is_heard(v6, 3_999)?;
        let all = forgeries(&theatre.stage, v6)?;
        ensure!(all.len() > 80, "only {} forgeries", all.len());
        for forgery in all {
            let (before, flows) = (theatre.victim.refused(forgery.reason), theatre.victim.engine().flows().len());
            let drops = theatre.victim.engine().stats().inbound.dropped_in_all();
            let output = theatre.say(&forgery.packet)?;
            ensure!(output.delivered.is_empty(), "{} was delivered: {output:?}", forgery.name);
            ensure!(output.sent.is_empty(), "{} was answered: {output:?}", forgery.name);
            let counted = theatre.victim.refused(forgery.reason) - before;
            ensure!(
                counted == 1,
                "{} was not counted as {}: {:?}",
                forgery.name,
                forgery.reason,
                theatre.drops()
            );
            ensure!(
                theatre.victim.engine().stats().inbound.dropped_in_all() == drops + 1,
                "{} was counted twice",
                forgery.name
            );
            ensure!(theatre.victim.engine().flows().len() == flows, "{} left a flow", forgery.name);
            ensure!(names.insert(forgery.name.clone()), "{} stands twice in the list", forgery.name);
        }
        theatre.is_heard(v6, 4_000)?;
    }
    Ok(())
}

#[test]
fn in_reverse_of_a_rule_only_a_stream_goes_on_and_only_so_fast() -> Result<()> {
    for v6 in [false, true] {
        let mut theatre = Theatre::open()?;
        let (from, to) = theatre.addresses(v6);
        let segment = |flags, n: u32| ip(from, to, number::TCP, &tcp((BACK_TCP, 40_000), flags, n, 1, b""));
        for flags in [SYN, SYN | ACK] {
            ensure!(theatre.say(&segment(flags, 0))?.delivered.is_empty());
        }
        let mut delivered = 0;
        for n in 0..1_500 {
            delivered += theatre.say(&segment(ACK, n))?.delivered.len();
        }
        ensure!(delivered == 1_000, "{delivered} segments without a flow in one second");
        ensure!(theatre.victim.refused(DropReason::MidStreamLimit) == 500);
        ensure!(theatre.victim.engine().flows().is_empty(), "a segment in reverse makes no flow");
        // After them, not even the victim's port is open to a SYN.
        ensure!(theatre.say(&segment(SYN, 9))?.delivered.is_empty());
    }
    Ok(())
}

#[test]
fn an_icmp_error_passes_only_about_what_the_victim_sent() -> Result<()> {
    for v6 in [false, true] {
        let mut theatre = Theatre::open()?;
        let (from, to) = theatre.addresses(v6);
        let (here, there) = ((OPEN_UDP, 4_000), (4_000, OPEN_UDP));
        let answer = ip(to, from, number::UDP, &udp(here, b"an answer"));
        let error = unreachable(from, to, &answer);
        ensure!(theatre.say(&error)?.delivered.is_empty(), "before there is a flow");
        ensure!(theatre.say(&ip(from, to, number::UDP, &udp(there, b"a question")))?.delivered.len() == 1);
        let now = theatre.now;
        let (fate, _) = theatre.victim.send(&"postgres".parse()?, &answer, now)?;
        ensure!(fate == Fate::Passed, "{fate:?}");
        ensure!(theatre.say(&error)?.delivered.len() == 1, "about a packet that the victim sent");
        for quoted in [(OPEN_UDP, 4_001), (OPEN_UDP + 1, 4_000), (4_000, OPEN_UDP)] {
            let error = unreachable(from, to, &ip(to, from, number::UDP, &udp(quoted, b"an answer")));
            ensure!(theatre.say(&error)?.delivered.is_empty(), "about {quoted:?}");
        }
        ensure!(theatre.victim.refused(DropReason::Icmp) == 4);
    }
    Ok(())
}

#[test]
fn forged_handshakes_and_messages_change_nothing() -> Result<()> {
    let mut theatre = Theatre::open()?;
    let now = theatre.now;
    let stranger: SocketAddr = "203.0.113.1:9".parse()?;
    let good = {
        let (from, to) = theatre.addresses(false);
        theatre
            .liar
            .say(&theatre.victim_key, &ip(from, to, number::UDP, &udp((1, OPEN_UDP), b"x")), now)?
    };
    let mut changed = |name: &str, datagram: &[u8], reason: DropReason| -> Result<()> {
        let before = (theatre.victim.refused(reason), theatre.victim.engine().peers(now));
        let output = theatre.victim.receive(stranger, datagram, now);
        ensure!(output.delivered.is_empty() && output.sent.is_empty(), "{name}: {output:?}");
        ensure!(
            theatre.victim.refused(reason) == before.0 + 1,
            "{name}: {:?}",
            theatre.victim.engine().stats().inbound
        );
        ensure!(theatre.victim.engine().peers(now) == before.1, "{name} changed a peer");
        theatre.victim.check()
    };
    for at in [16, good.len() / 2, good.len() - 9] {
        let mut damaged = good.clone();
        damaged[at] ^= 1;
        changed("a damaged message", &damaged, DropReason::BadAuth)?;
    }
    for len in [0, 1, 4, 15, 31, 91, 147, 149] {
        changed("a message of no length", &vec![1; len], DropReason::NotWireGuard)?;
    }
    let mut foreign = good.clone();
    foreign[5] ^= 0xff;
    changed("a message for another session", &foreign, DropReason::UnknownSession)?;
    let mut last = good.clone();
    last[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    changed("the last counter", &last, DropReason::CounterLimit)?;
    let mut unknown = Liar::new(&key_of("nobody"), 9);
    let initiation = unknown.greet(&key_of("db").public(), now)?;
    changed("an initiation of a host that is no peer", &initiation, DropReason::UnknownPeer)?;
    let for_another = unknown.greet(&key_of("web").public(), now)?;
    changed("an initiation to another host", &for_another, DropReason::BadMac)?;
    let mut response = vec![0; 92];
    response[0] = 2;
    changed("a response with no mac", &response, DropReason::BadMac)?;
    ensure!(
        theatre.victim.receive(ATTACKER, &good, now).delivered.len() == 1,
        "the message itself"
    );
    ensure!(theatre.victim.receive(stranger, &good, now).delivered.is_empty(), "the same again");
    ensure!(theatre.victim.refused(DropReason::Replay) == 1);
    Ok(())
}

#[test]
fn a_recorded_handshake_brings_nothing() -> Result<()> {
    let mut theatre = Theatre::open()?;
    theatre.now = theatre.now + Duration::from_secs(1);
    let recorded = theatre.liar.greet(&theatre.victim_key, theatre.now)?;
    ensure!(theatre.victim.receive(ATTACKER, &recorded, theatre.now).sent.len() == 1);
    theatre.now = theatre.now + Duration::from_secs(1);
    let again = theatre.victim.receive("203.0.113.1:9".parse()?, &recorded, theatre.now);
    ensure!(again.sent.is_empty(), "{again:?}");
    ensure!(theatre.victim.refused(DropReason::Replay) == 1);
    Ok(())
}

#[test]
fn a_hostile_peer_fills_its_own_quota_and_no_other() -> Result<()> {
    let mut theatre = Theatre::open()?;
    let (from, to) = theatre.addresses(false);
    let mut refused = 0;
    for n in 0..30_000u32 {
        let port = u16::try_from(n + 1_024)?;
        let output = theatre.say(&ip(from, to, number::UDP, &udp((port, OPEN_UDP), b"")))?;
        refused += u32::from(output.delivered.is_empty());
    }
    ensure!(refused > 10_000, "{refused}");
    ensure!(theatre.victim.refused(DropReason::FlowQuota) == u64::from(refused));
    // The honest host has its share all the same.
    let web = theatre.stage.third;
    let mut honest = Liar::new(&key_of("web"), 10);
    let initiation = honest.greet(&theatre.victim_key, theatre.now)?;
    let source: SocketAddr = "192.0.2.3:51820".parse()?;
    let answer = theatre.victim.receive(source, &initiation, theatre.now);
    let first = honest
        .receive(&answer.sent.first().context("no response")?.1, theatre.now)
        .context("no session")?;
    theatre.victim.receive(source, &first, theatre.now);
    for port in 0..500 {
        let packet = ip(web.v4.into(), to, number::TCP, &tcp((20_000 + port, OPEN_TCP), SYN, 1, 0, b""));
        let datagram = honest.say(&theatre.victim_key, &packet, theatre.now)?;
        ensure!(
            theatre.victim.receive(source, &datagram, theatre.now).delivered.len() == 1,
            "flow {port} of the honest host"
        );
    }
    theatre.victim.check()
}

#[test]
fn after_the_lease_a_hostile_peer_is_not_heard() -> Result<()> {
    let mut theatre = Theatre::open()?;
    theatre.is_heard(false, 4_000)?;
    theatre.now = START + LEASE - Duration::from_secs(1);
    theatre.greet()?;
    theatre.is_heard(false, 4_000)?;
    theatre.now = START + LEASE;
    let (from, to) = theatre.addresses(false);
    for packet in [
        ip(from, to, number::UDP, &udp((4_000, OPEN_UDP), b"x")),
        ip(from, to, number::TCP, &tcp((4_000, OPEN_TCP), SYN, 1, 0, b"")),
    ] {
        ensure!(theatre.say(&packet)?.delivered.is_empty());
    }
    ensure!(theatre.victim.refused(DropReason::LeaseEnded) == 2);
    Ok(())
}

/// What the rules say, as simply as possible, of a packet from the attacker that the second parser has read.
fn is_lawful(stage: &Stage, packet: &[u8]) -> bool {
    let Ok(sliced) = etherparse::SlicedPacket::from_ip(packet) else {
        return false;
    };
    let (src, dst): (IpAddr, IpAddr) = match &sliced.net {
        Some(etherparse::NetSlice::Ipv4(v4)) => (v4.header().source_addr().into(), v4.header().destination_addr().into()),
        Some(etherparse::NetSlice::Ipv6(v6)) => (v6.header().source_addr().into(), v6.header().destination_addr().into()),
        Some(etherparse::NetSlice::Arp(_)) | None => return false,
    };
    if !stage.attacker.both().contains(&src) || !stage.victim.both().contains(&dst) {
        return false;
    }
    match &sliced.transport {
        Some(etherparse::TransportSlice::Tcp(tcp)) => {
            let open = tcp.destination_port() == OPEN_TCP && !(tcp.syn() && tcp.ack());
            open || tcp.source_port() == BACK_TCP && !tcp.syn()
        }
        Some(etherparse::TransportSlice::Udp(udp)) => udp.destination_port() == OPEN_UDP,
        _ => false,
    }
}

fn cases() -> u32 {
    std::env::var("CLOISON_SIM_CASES")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(200)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    /// Promise 1: whatever bytes a hostile peer seals, only what the rules allow is delivered.
    #[test]
    fn only_what_the_rules_allow_is_delivered(
        v6 in any::<bool>(),
        drawn in prop::collection::vec((any::<prop::sample::Index>(), prop::collection::vec((0usize..90, any::<u8>()), 0..4), any::<bool>()), 1..40),
    ) {
        let failed = |error: anyhow::Error| TestCaseError::fail(format!("{error:#}"));
        let mut theatre = Theatre::open().map_err(failed)?;
        let (from, to) = theatre.addresses(v6);
        let mut sources: Vec<_> = forgeries(&theatre.stage, v6).map_err(failed)?.into_iter().map(|forgery| forgery.packet).collect();
        let lawful = [
            ip(from, to, number::TCP, &tcp((40_000, OPEN_TCP), SYN, 1, 0, b"")),
            ip(from, to, number::TCP, &tcp((40_000, OPEN_TCP), ACK, 1, 1, b"data")),
            ip(from, to, number::TCP, &tcp((BACK_TCP, 40_000), RST | ACK, 1, 1, b"")),
            ip(from, to, number::UDP, &udp((4_000, OPEN_UDP), b"data")),
        ];
        for (index, changes, begin_lawful) in drawn {
            let mut packet = if begin_lawful { index.get(&lawful).clone() } else { index.get(&sources).clone() };
            for (at, value) in changes {
                packet.iter_mut().skip(at).take(1).for_each(|byte| *byte = value);
            }
            let output = theatre.say(&packet).map_err(failed)?;
            prop_assert!(output.sent.is_empty(), "answered: {packet:02x?}");
            for (component, delivered) in output.delivered {
                prop_assert_eq!(component.as_str(), "postgres");
                prop_assert!(is_lawful(&theatre.stage, &delivered), "delivered: {:02x?}", delivered);
                prop_assert!(packet.starts_with(&delivered));
            }
            sources.push(packet);
        }
    }
}
