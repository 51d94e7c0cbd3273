//! The other WireGuard: Debian's `wireguard-go` against our agent, in both roles, across a real rekey.
//!
//! The other side takes the place of an enrolled host by its key. Our agent runs as it ships, with the view that its coordinator signed.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cloison_tests::lab::agent;
use cloison_tests::lab::mesh::{Instance, Mesh};
use cloison_tests::lab::tool::Tool;
use cloison_tests::lab::wireguard::{Peer, WireGuard};

const POLICY: &str = "\
version: 1
components:
  ours:   {on: ours,   attach: host, services: {echo: [tcp/7000, udp/7000]}}
  theirs: {on: theirs, attach: host, services: {echo: [tcp/7000, udp/7000]}}
allow:
  - ours -> theirs:echo
  - theirs -> ours:echo
";
const ECHO: u16 = 7000;
/// REKEY_AFTER_TIME (WireGuard paper, section 6.1), and some seconds for the new handshake.
const ACROSS_A_REKEY: Duration = Duration::from_secs(135);

struct Pair {
    mesh: Mesh,
    ours: Instance,
    theirs: Instance,
    other: WireGuard,
}

impl Pair {
    /// `theirs` is `wireguard-go` with the key of a host that enrolled; it knows our endpoint or waits for us.
    fn start(name: &str, knows_endpoint: bool) -> Result<Self> {
        let mut mesh = Mesh::with_policy(name, &["ours", "theirs"], POLICY)?;
        let (ours, theirs) = (mesh.instance("ours", "ours")?, mesh.instance("theirs", "theirs")?);
        let key = std::fs::read(Path::new(&mesh.agent("theirs")?.state()).join("wireguard-key"))?;
        let key: [u8; 32] = *key.last_chunk().context("the key file is too short")?;
        mesh.agent_mut("theirs")?.stop()?;
        mesh.host("theirs")?.net().nft("flush ruleset")?;
        let endpoint = SocketAddr::new(IpAddr::V4(mesh.host("ours")?.v4()?), agent::PORT);
        let peer = Peer {
            key: *mesh.coordinator.host("ours")?.wg_key.as_bytes(),
            endpoint: knows_endpoint.then_some(endpoint),
            addresses: ours.addresses().to_vec(),
        };
        let other = WireGuard::start(mesh.host("theirs")?, &key, agent::PORT, &theirs.addresses(), &peer)?;
        Ok(Self { mesh, ours, theirs, other })
    }

    fn finish(mut self) -> Result<()> {
        self.other.stop()?;
        self.mesh.finish()
    }
}

#[test]
fn wireguard_go_reaches_our_agent() -> Result<()> {
    let pair = Pair::start("interop-theirs-first", true)?;
    for at in pair.ours.sockets(ECHO) {
        let mut listener = Tool::tcp_listen(pair.mesh.host("ours")?.net(), at)?;
        pair.mesh.must_reach("theirs", at)?;
        listener.process().stop()?;
    }
    ensure!(pair.other.latest_handshake()?.is_some());
    pair.finish()
}

#[test]
fn our_agent_reaches_wireguard_go() -> Result<()> {
    let pair = Pair::start("interop-ours-first", false)?;
    for at in pair.theirs.sockets(ECHO) {
        let mut listener = Tool::tcp_listen(pair.mesh.host("theirs")?.net(), at)?;
        pair.mesh.must_reach("ours", at)?;
        listener.process().stop()?;
    }
    ensure!(pair.other.latest_handshake()?.is_some());
    pair.finish()
}

#[test]
fn streams_in_both_directions_go_on_across_a_real_rekey() -> Result<()> {
    let pair = Pair::start("interop-rekey", true)?;
    let (to_ours, to_theirs) = (SocketAddr::from((pair.ours.v4, ECHO)), SocketAddr::from((pair.theirs.v6, ECHO)));
    let _listeners = (
        Tool::tcp_listen(pair.mesh.host("ours")?.net(), to_ours)?,
        Tool::tcp_listen(pair.mesh.host("theirs")?.net(), to_theirs)?,
    );
    let start = Instant::now();
    let theirs = Tool::tcp_stream(pair.mesh.host("theirs")?.net(), to_ours)?;
    let ours = Tool::tcp_stream(pair.mesh.host("ours")?.net(), to_theirs)?;
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
