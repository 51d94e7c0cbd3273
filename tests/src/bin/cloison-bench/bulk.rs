//! One TCP stream as fast as it goes, through the mesh and through `wireguard-go`, on the same namespaces and wire, by turns.
//!
//! Both run all the time; the one that is not measured has nothing to do. CPU time is that of the two agents, or of the two `wireguard-go`,
//! from `/proc`: what the kernel does for them in softirqs is in neither, and what the applications take neither.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use cloison_tests::lab::host::Host;
use cloison_tests::lab::mesh::Mesh;
use cloison_tests::lab::wait_for;
use cloison_tests::lab::wireguard::{Peer, WireGuard};
use serde::Serialize;
use x25519_dalek::{PublicKey, StaticSecret};

use crate::machine::{cpu_time, process_in};
use crate::report::median;
use crate::talk::{Pace, STREAM_PORT, Stream};
use crate::{RECEIVER, SENDER, receiver};

const PORT: u16 = 51_830;
/// Addresses of the `wireguard-go` pair: none of the mesh (RFC 5737).
const SENDER_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const RECEIVER_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
/// Until the stream has found its speed.
const WARM_UP: Duration = Duration::from_millis(500);
const START_LIMIT: Duration = Duration::from_secs(10);
/// When no further round begins.
const LIMIT: Duration = Duration::from_secs(60);

/// All rounds, and their medians.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Bulk {
    /// Each round.
    pub(crate) rounds: Vec<Round>,
    /// Median megabits per second of the mesh.
    pub(crate) mesh_mbit_s: f64,
    /// Median megabits per second of `wireguard-go`.
    pub(crate) wireguard_go_mbit_s: f64,
    /// Median over the rounds of mesh / `wireguard-go`; more is better.
    pub(crate) throughput_ratio: f64,
    /// Median CPU seconds per gigabyte of both agents.
    pub(crate) mesh_cpu_s_per_gb: f64,
    /// Median CPU seconds per gigabyte of both `wireguard-go`.
    pub(crate) wireguard_go_cpu_s_per_gb: f64,
    /// Median over the rounds of mesh / `wireguard-go`; less is better.
    pub(crate) cpu_ratio: f64,
}

/// One stream through each.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Round {
    /// Through the mesh.
    pub(crate) mesh: Pass,
    /// Through `wireguard-go`.
    pub(crate) wireguard_go: Pass,
}

/// What one stream did.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Pass {
    /// Megabits of payload per second.
    pub(crate) mbit_s: f64,
    /// CPU seconds of both ends per gigabyte (10^9 bytes) of payload.
    pub(crate) cpu_s_per_gb: f64,
}

/// A way from the sender to the receiver.
struct Way {
    at: SocketAddr,
    processes: [u32; 2],
}

impl Bulk {
    fn of(rounds: Vec<Round>) -> Self {
        let over = |figure: fn(&Round) -> f64| median(rounds.iter().map(figure).collect());
        Self {
            mesh_mbit_s: over(|r| r.mesh.mbit_s),
            wireguard_go_mbit_s: over(|r| r.wireguard_go.mbit_s),
            throughput_ratio: over(|r| r.mesh.mbit_s / r.wireguard_go.mbit_s),
            mesh_cpu_s_per_gb: over(|r| r.mesh.cpu_s_per_gb),
            wireguard_go_cpu_s_per_gb: over(|r| r.wireguard_go.cpu_s_per_gb),
            cpu_ratio: over(|r| r.mesh.cpu_s_per_gb / r.wireguard_go.cpu_s_per_gb),
            rounds,
        }
    }
}

/// Measures `rounds` rounds of `span` for each; fewer, if time runs out.
pub(crate) fn measure(mesh: &mut Mesh, rounds: usize, span: Duration) -> Result<Option<Bulk>> {
    if rounds == 0 {
        return Ok(None);
    }
    let ours = Way {
        at: (receiver(mesh)?.v4, STREAM_PORT).into(),
        processes: [mesh.agent_mut(SENDER)?.process()?.id(), mesh.agent_mut(RECEIVER)?.process()?.id()],
    };
    let mut pair = start_pair(mesh)?;
    let theirs = Way {
        at: (RECEIVER_ADDRESS, STREAM_PORT).into(),
        processes: [
            process_in(mesh.host(SENDER)?, "wireguard-go")?,
            process_in(mesh.host(RECEIVER)?, "wireguard-go")?,
        ],
    };
    let begin = Instant::now();
    let mut all = Vec::new();
    for number in 1..=rounds {
        if begin.elapsed() > LIMIT {
            eprintln!("only {} of {rounds} rounds in {} s", all.len(), LIMIT.as_secs());
            break;
        }
        let round = round(mesh, &ours, &theirs, number % 2 == 1, span)?;
        eprintln!(
            "round {number} of {rounds}: mesh {:.0} Mbit/s, wireguard-go {:.0} Mbit/s",
            round.mesh.mbit_s, round.wireguard_go.mbit_s
        );
        all.push(round);
    }
    pair.iter_mut().try_for_each(WireGuard::stop)?;
    Ok(Some(Bulk::of(all)))
}

/// Who begins changes from round to round: what drifts meets both alike.
fn round(mesh: &Mesh, ours: &Way, theirs: &Way, ours_first: bool, span: Duration) -> Result<Round> {
    if ours_first {
        let first = pass(mesh, ours, span)?;
        Ok(Round {
            mesh: first,
            wireguard_go: pass(mesh, theirs, span)?,
        })
    } else {
        let first = pass(mesh, theirs, span)?;
        Ok(Round {
            mesh: pass(mesh, ours, span)?,
            wireguard_go: first,
        })
    }
}

fn pass(mesh: &Mesh, way: &Way, span: Duration) -> Result<Pass> {
    let stream = Stream::tcp(mesh.host(SENDER)?.net(), mesh.host(RECEIVER)?.net(), way.at, Pace::Full)?;
    wait_for("the stream to flow", START_LIMIT, || Ok((stream.bytes() > 0).then_some(())))?;
    std::thread::sleep(WARM_UP);
    let now = || -> Result<(Instant, u64, Duration)> { Ok((Instant::now(), stream.bytes(), cpu_time(&way.processes)?)) };
    let (start, bytes_before, cpu_before) = now()?;
    std::thread::sleep(span);
    let (end, bytes_after, cpu_after) = now()?;
    ensure!(bytes_after > bytes_before, "the stream to {} stood still", way.at);
    let gigabytes = f64::from(u32::try_from((bytes_after - bytes_before) / 1000)?) / 1e6;
    Ok(Pass {
        mbit_s: gigabytes * 8e3 / (end - start).as_secs_f64(),
        cpu_s_per_gb: cpu_after.saturating_sub(cpu_before).as_secs_f64() / gigabytes,
    })
}

/// Two `wireguard-go`, each with the other as its only peer.
fn start_pair(mesh: &Mesh) -> Result<[WireGuard; 2]> {
    let (sender, receiver) = (mesh.host(SENDER)?, mesh.host(RECEIVER)?);
    let (sender_key, receiver_key) = (fresh_key()?, fresh_key()?);
    Ok([
        start_one(sender, &sender_key, SENDER_ADDRESS, receiver, &receiver_key, RECEIVER_ADDRESS)?,
        start_one(receiver, &receiver_key, RECEIVER_ADDRESS, sender, &sender_key, SENDER_ADDRESS)?,
    ])
}

fn start_one(
    own: &Host,
    key: &StaticSecret,
    address: Ipv4Addr,
    other: &Host,
    other_key: &StaticSecret,
    other_address: Ipv4Addr,
) -> Result<WireGuard> {
    let peer = Peer {
        key: PublicKey::from(other_key).to_bytes(),
        endpoint: Some((other.v4()?, PORT).into()),
        addresses: vec![IpAddr::V4(other_address)],
    };
    WireGuard::start(own, &key.to_bytes(), PORT, &[IpAddr::V4(address)], &peer).context("starting wireguard-go")
}

fn fresh_key() -> Result<StaticSecret> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|error| anyhow!("no random bytes for a key: {error}"))?;
    Ok(StaticSecret::from(bytes))
}
