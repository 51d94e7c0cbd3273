//! The other WireGuard: Debian's `wireguard-go` against our agent, in both roles, across a real rekey.
//!
//! Our agent runs as it ships, from a view that was signed by hand; no coordinator takes part.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cloison_proto::net::AddressPair;
use cloison_tests::lab::agent::{self, Agent};
use cloison_tests::lab::by_hand::ByHand;
use cloison_tests::lab::netns::Netns;
use cloison_tests::lab::tool::Tool;
use cloison_tests::lab::wireguard::{Peer, WireGuard};
use cloison_tests::lab::{Lab, wait_for};

const ECHO: u16 = 7000;
const OURS: ByHand = ByHand { name: "ours", number: 1 };
const THEIRS: ByHand = ByHand { name: "theirs", number: 2 };
/// REKEY_AFTER_TIME (WireGuard paper, section 6.1), and some seconds for the new handshake.
const ACROSS_A_REKEY: Duration = Duration::from_secs(135);

struct Pair {
    lab: Lab,
    agent: Agent,
    other: WireGuard,
}

impl Pair {
    /// One of the two sides knows where the other one is.
    fn start(name: &str, they_know_us: bool) -> Result<Self> {
        let lab = Lab::builder(name).host(OURS.name).host(THEIRS.name).build()?;
        let (ours, theirs) = (lab.host(OURS.name)?, lab.host(THEIRS.name)?);
        let endpoint = |host: &cloison_tests::lab::host::Host| Ok::<_, anyhow::Error>(SocketAddr::new(IpAddr::V4(host.v4()?), agent::PORT));
        let mut agent = Agent::configure(ours, "")?;
        let to_them = if they_know_us { None } else { Some(endpoint(theirs)?) };
        OURS.write(&agent.state(), THEIRS, to_them, &["tcp/7000".parse()?, "udp/7000".parse()?])?;
        let peer = Peer {
            key: *OURS.wg_key().public().as_bytes(),
            endpoint: if they_know_us { Some(endpoint(ours)?) } else { None },
            addresses: both(OURS.addresses()?),
        };
        let other = WireGuard::start(theirs, &[0x22; 32], agent::PORT, &both(THEIRS.addresses()?), &peer)?;
        agent.start()?;
        wait_for("the view in force", Duration::from_secs(20), || {
            Ok((!agent.status()?["version"].is_null()).then_some(()))
        })?;
        Ok(Self { lab, agent, other })
    }

    fn net(&self, side: ByHand) -> Result<&Netns> {
        Ok(self.lab.host(side.name)?.net())
    }

    fn finish(mut self) -> Result<()> {
        self.other.stop()?;
        self.agent.stop()?;
        self.lab.finish()
    }
}

fn both(pair: AddressPair) -> Vec<IpAddr> {
    vec![pair.v4.into(), pair.v6.into()]
}

/// `from` reaches a listener of `to`, on both families.
fn must_reach(pair: &Pair, from: ByHand, to: ByHand) -> Result<()> {
    for address in both(to.addresses()?) {
        let at = SocketAddr::new(address, ECHO);
        let mut listener = Tool::tcp_listen(pair.net(to)?, at)?;
        let event = Tool::tcp_attempt(pair.net(from)?, at, Duration::from_secs(5))?;
        ensure!(event.what == "received", "{} should reach {at}: {event:?}", from.name);
        listener.process().stop()?;
    }
    Ok(())
}

#[test]
fn wireguard_go_reaches_our_agent() -> Result<()> {
    let pair = Pair::start("interop-theirs-first", true)?;
    must_reach(&pair, THEIRS, OURS)?;
    ensure!(pair.other.latest_handshake()?.is_some());
    pair.finish()
}

#[test]
fn our_agent_reaches_wireguard_go() -> Result<()> {
    let pair = Pair::start("interop-ours-first", false)?;
    must_reach(&pair, OURS, THEIRS)?;
    ensure!(pair.other.latest_handshake()?.is_some());
    pair.finish()
}

#[test]
fn streams_in_both_directions_go_on_across_a_real_rekey() -> Result<()> {
    let pair = Pair::start("interop-rekey", true)?;
    let (to_ours, to_theirs) = (
        SocketAddr::from((OURS.addresses()?.v4, ECHO)),
        SocketAddr::from((THEIRS.addresses()?.v6, ECHO)),
    );
    let _listeners = (
        Tool::tcp_listen(pair.net(OURS)?, to_ours)?,
        Tool::tcp_listen(pair.net(THEIRS)?, to_theirs)?,
    );
    let start = Instant::now();
    let theirs = Tool::tcp_stream(pair.net(THEIRS)?, to_ours)?;
    let ours = Tool::tcp_stream(pair.net(OURS)?, to_theirs)?;
    let first = pair.other.latest_handshake()?.context("no handshake, although data passed")?;
    while start.elapsed() < ACROSS_A_REKEY {
        theirs.wait_for_more(640, Duration::from_secs(5))?;
        ours.wait_for_more(640, Duration::from_secs(5))?;
        std::thread::sleep(Duration::from_secs(1));
    }
    let last = pair.other.latest_handshake()?.context("no handshake")?;
    ensure!(last > first, "there was no second handshake in {ACROSS_A_REKEY:?}");
    ensure!(theirs.last("failed")?.is_none() && ours.last("failed")?.is_none());
    pair.finish()
}
