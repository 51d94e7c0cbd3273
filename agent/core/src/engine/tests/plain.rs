//! The same engine speaks plain WireGuard: longest prefix, no filter, no lease.

use std::net::SocketAddr;
use std::sync::Arc;

use cloison_proto::version::Timestamp;

use super::lab::{Outcome, host_id, key};
use crate::TunId;
use crate::engine::{Engine, EngineConfig, Meta};
use crate::install::{Hint, PeerPlan, Plan};
use crate::offload::VnetHeader;
use crate::packet::build::{ip, udp};
use crate::path_policy::PlainWireguard;
use crate::peer::{Keys, PeerIndex};
use crate::wg::LocalKey as _;
use crate::wg::boringtun::BoringKey;
use crate::worker::Worker;

const NOW: Timestamp = Timestamp(1_000_000_000);

type Host = (Engine<PlainWireguard, BoringKey>, Worker<PlainWireguard, BoringKey>);

fn endpoint(host: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, host], 51_820))
}

/// A host with the key `us`, to which 10.`them`/16 belongs to the other.
fn host(us: u8, them: u8) -> Host {
    let engine = Engine::new(EngineConfig::default());
    let local = Arc::new(BoringKey::new(&key(us)));
    let keys = Keys {
        locals: vec![local.clone()],
        remotes: vec![key(them).public()],
        psk: None,
        psk_generation: 0,
    };
    let host = host_id(them.into());
    let plan = Plan {
        policy: PlainWireguard::unfiltered_for_interop(TunId(0), [([10, them, 0, 0].into(), 16, PeerIndex(0))]),
        locals: vec![local],
        peers: vec![PeerPlan { host, keys }],
        lease: None,
    };
    let mut worker = engine.worker();
    engine.install(&mut worker, plan, NOW);
    let candidates = vec![endpoint(them)];
    engine.hint(
        host,
        &Hint {
            candidates,
            incarnation: 0,
        },
    );
    (engine, worker)
}

#[test]
fn plain_wireguard_passes_everything_between_its_prefixes() -> Outcome {
    let [mut one, mut two] = [host(1, 2), host(2, 1)];
    let sent = ip([10, 1, 0, 1].into(), [10, 2, 9, 9].into(), 17, &udp((1, 2), b"x"));
    one.1.begin(&one.0);
    one.0.on_tun(&mut one.1, TunId(0), &mut sent.clone(), VnetHeader::WHOLE, NOW);
    assert!(carry(&mut one, endpoint(1), &mut two).is_empty(), "an initiation");
    assert!(carry(&mut two, endpoint(2), &mut one).is_empty(), "a response");
    assert_eq!(carry(&mut one, endpoint(1), &mut two), [sent], "what waited");
    Ok(())
}

/// Carries what one host has to send to the other; what the other's TUN is given.
fn carry(from: &mut Host, at: SocketAddr, to: &mut Host) -> Vec<Vec<u8>> {
    let wire: Vec<_> = from.1.udp().map(|(bytes, _)| bytes.to_vec()).collect();
    from.1.end();
    let (engine, worker) = to;
    worker.begin(engine);
    let meta = Meta {
        from: at,
        local: None,
        ecn: 0,
    };
    for mut datagram in wire {
        engine.on_udp(worker, &mut datagram, 0, meta, NOW);
    }
    worker.tun().map(|(bytes, _)| bytes.to_vec()).collect()
}
