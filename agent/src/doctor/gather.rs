//! Looks at everything that `doctor` speaks of. Nothing is made or changed; what takes long (peers that do not answer) is asked side by side,
//! and each question has an end.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use cloison_proto::key::SigningKey;
use cloison_proto::label::ComponentName;
use cloison_proto::net::OverlayRange;
use cloison_proto::status::{Answer, Names, PingOutcome, Request, Status};
use cloison_proto::trust::{Role, SpiffeId};

use super::exposure;
use super::facts::{Exposed, Exposure, Facts, Foreign, Kernel, PeerPath, Table, Unusable};
use super::path_mtu;
use crate::attach::base_table::{self, BaseTable};
use crate::attach::host::DEFAULT_MTU;
use crate::attach::nudge::Nudge;
use crate::attach::site::has_ipv6;
use crate::config::{Config, HostsFile};
use crate::control::certificate::{Window, check_host};
use crate::control::connection::{self, Attempt};
use crate::control::verifier::Anchors;
use crate::dataplane;
use crate::names::block::owners;
use crate::names::hosts_file;
use crate::netlink::{Netlink, NetlinkError, addr, link, route};
use crate::run::{RunError, plane_config};
use crate::state::clock::{Moment, wall_now};
use crate::state::identity::{Membership, load_certificate};
use crate::state::keys::load_one;
use crate::state::view_cache::{self, Cached};
use crate::state::{File, StateDir, StateError};
use crate::status::ask;
use crate::sys::netns::NetNs;

/// Most peers that are tried; of more, the first in the order of their ids.
const MAX_PEERS: usize = 32;

/// What is read from the state directory.
struct Known {
    us: Option<Membership>,
    cached: Option<Cached>,
    overlay: Option<OverlayRange>,
    enrolled: Option<bool>,
    unusable: Vec<Unusable>,
    certificate: Result<Option<Window>, String>,
}

/// Looks at everything.
#[must_use]
pub fn facts(config: &Config) -> Facts {
    let agent = match ask(&config.socket, &Request::Status) {
        Ok(Answer::Status(status)) => Ok(status),
        Ok(_) => Err("its answer is of another kind than the question: compare the versions".to_owned()),
        Err(error) => Err(error.to_string()),
    };
    let dir = StateDir::existing(config.state_dir.clone());
    let known = known(&dir);
    let running = agent.as_ref().ok().map(|status| &**status);
    let overlay = known.overlay;
    let (handshakes, paths, coordinators) = std::thread::scope(|scope| {
        let handshakes = scope.spawn(|| running.map_or_else(Vec::new, |status| handshakes(config, status)));
        let paths = scope.spawn(|| paths(config, running, known.cached.as_ref(), &dir));
        let coordinators = coordinators(config, &known);
        (
            handshakes.join().unwrap_or_default(),
            paths.join().unwrap_or_default(),
            coordinators,
        )
    });
    Facts {
        tun: std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .map(drop)
            .map_err(|e| e.to_string()),
        port: (
            config.listen_port,
            if running.is_some() { Ok(()) } else { free(config.listen_port) },
        ),
        table: table(config, overlay, running.is_some(), known.cached.as_ref()),
        table_name: config.table.to_string(),
        clock: clock(running, &known),
        state_dir: (config.state_dir.clone(), exposed(&config.state_dir).map_err(|e| e.to_string())),
        damaged: known.cached.as_ref().map_or_else(Vec::new, |cached| cached.problems.clone()),
        lease: lease(running, known.cached.as_ref()),
        enrolled: known.enrolled,
        unusable: known.unusable,
        certificate: known.certificate,
        foreign: foreign(config, overlay).map_err(|e| e.to_string()),
        kernel: kernel(config),
        hosts: hosts(config, running, known.us.as_ref()),
        exposure: exposure(config, known.cached.as_ref()),
        handshakes,
        paths,
        coordinators,
        agent,
    }
}

/// Reads each file by itself: one that cannot be used hides none of the others.
fn known(dir: &StateDir) -> Known {
    let mut unusable = Vec::new();
    let mut note = |error: &StateError| unusable.push(unusable_for(error));
    let us = if dir.path().exists() { Membership::load(dir) } else { Ok(None) };
    let enrolled = us.as_ref().ok().map(Option::is_some);
    let us = us.inspect_err(&mut note).ok().flatten();
    let cached = us.as_ref().map(|us| view_cache::load(dir, us, &Moment::now()));
    let cached = cached.transpose().inspect_err(&mut note).ok().flatten();
    let overlay = match (&cached, &us) {
        (Some(cached), _) => cached.overlay,
        (None, Some(us)) => view_cache::overlay(dir, us).ok().flatten(),
        (None, None) => None,
    };
    let identity = us.as_ref().and_then(|_| identity(dir, &mut unusable));
    let certificate = match us.as_ref().zip(identity) {
        Some((us, key)) => certificate(dir, us, &key).map_err(|e| e.to_string()),
        None => Ok(None),
    };
    Known {
        us,
        cached,
        overlay,
        enrolled,
        unusable,
        certificate,
    }
}

/// The identity key; what is wrong with any of the keys goes into `unusable`.
fn identity(dir: &StateDir, unusable: &mut Vec<Unusable>) -> Option<SigningKey> {
    let mut read = |file| {
        let loaded = load_one(dir, file).inspect_err(|error| unusable.push(unusable_for(error)));
        // One that is damaged is not missing.
        let is_missing = matches!(loaded, Ok(None));
        (loaded.ok().flatten(), is_missing)
    };
    let (identity, no_identity) = read(File::IdentityKey);
    let (_, no_wg) = read(File::WgKey);
    read(File::NextWgKey);
    if no_identity || no_wg {
        let error = RunError::NoKeys { path: dir.path().into() };
        unusable.push(Unusable {
            why: error.to_string(),
            fix: error.hint(),
        });
    }
    identity.map(|seed| SigningKey::from_seed(&seed))
}

fn unusable_for(error: &StateError) -> Unusable {
    Unusable {
        why: error.to_string(),
        fix: error.hint(),
    }
}

fn certificate(dir: &StateDir, us: &Membership, key: &SigningKey) -> Result<Option<Window>, Box<dyn std::error::Error>> {
    let Some(der) = load_certificate(dir)? else { return Ok(None) };
    let wanted = SpiffeId {
        mesh: us.mesh,
        role: Role::Host(us.host),
    };
    Ok(Some(check_host(&der, wanted, &key.identity())?))
}

/// Mesh time and wall clock: the agent's, if it runs; otherwise mesh time as far as the state directory tells it.
fn clock(running: Option<&Status>, known: &Known) -> Option<(u64, u64)> {
    let told = running.map(|status| status.lease.mesh_time);
    let kept = || known.cached.as_ref().map(|cached| cached.clock.at(Moment::now().boottime));
    Some((told.or_else(kept)?.0, wall_now().0))
}

fn lease(running: Option<&Status>, cached: Option<&Cached>) -> Option<(u64, u64)> {
    match running {
        Some(status) => status.version.map(|_| (status.lease.left_secs, status.lease.valid_for_secs)),
        None => {
            let (held, left) = cached?.lease.as_ref()?;
            Some((left.as_secs(), held.lease.valid_for_secs))
        }
    }
}

/// Whether the agent could listen on a port.
fn free(port: u16) -> Result<(), String> {
    let any: IpAddr = [0, 0, 0, 0].into();
    UdpSocket::bind((any, port))
        .map(drop)
        .map_err(|e| format!("port {port} cannot be had: {e}"))
}

/// Compares the table with the same one in a namespace made for that: `nft` writes tables in another way than it reads them.
fn table(config: &Config, overlay: Option<OverlayRange>, is_running: bool, cached: Option<&Cached>) -> Result<Table, String> {
    let Some(range) = overlay else { return Ok(Table::NotYet) };
    // After a boot, and until the agent runs, the table says nothing yet of components that share the host.
    let says_whose = is_running || base_table::has_claims(&config.table).map_err(|e| e.to_string())?;
    let view = cached.and_then(|cached| cached.view.as_ref()).filter(|_| says_whose);
    let wanted = BaseTable {
        name: config.table.clone(),
        range,
        tun: config.interface.clone(),
        claims: view.and_then(|view| dataplane::claim_table(&plane_config(config, Nudge::default()), view.content())),
    };
    if !wanted.is_loaded().map_err(|e| e.to_string())? {
        return Ok(Table::Missing);
    }
    let found = wanted.listing().map_err(|e| e.to_string())?;
    let elsewhere = NetNs::fresh().map_err(|e| e.to_string())?;
    let expected = elsewhere.run(|| wanted.load().and_then(|()| wanted.listing()));
    let expected = expected.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
    Ok(if found == expected { Table::Whole } else { Table::Altered })
}

/// The state directory and its files, as far as they are open to others.
fn exposed(dir: &Path) -> std::io::Result<Vec<Exposed>> {
    let us = rustix::process::geteuid().as_raw();
    let mut all = vec![dir.to_owned()];
    if let Ok(entries) = std::fs::read_dir(dir) {
        all.extend(entries.flatten().map(|entry| entry.path()));
    }
    let mut found = Vec::new();
    for path in all {
        let meta = match std::fs::symlink_metadata(&path) {
            Ok(meta) => meta,
            // It went meanwhile, or the host is not enrolled.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        let owner = Some(meta.uid()).filter(|owner| ![0, us].contains(owner));
        let mode = meta.mode() & 0o7777;
        if mode & 0o077 != 0 || owner.is_some() {
            found.push(Exposed { path, mode, owner });
        }
    }
    Ok(found)
}

/// Asks each coordinator who it is, as a stranger: a link would take the place of the running agent's.
fn coordinators(config: &Config, known: &Known) -> Vec<(String, Result<(), String>)> {
    let (Some(us), Some(cached)) = (&known.us, &known.cached) else {
        return Vec::new();
    };
    let named = [&*config.coordinators, cached.trust.addresses(), &*us.addresses];
    let addresses = named.into_iter().find(|list| !list.is_empty()).unwrap_or_default();
    let attempt = Attempt {
        mesh: us.mesh,
        anchors: Anchors::of(&cached.trust),
        wall: wall_now(),
        past: cached.clock.at(Moment::now().boottime),
    };
    let asked = |runtime: &tokio::runtime::Runtime, address: &str| {
        runtime.block_on(async {
            let frames = connection::join(address, attempt.clone()).await.map_err(|e| e.to_string())?;
            frames.close("doctor").await;
            Ok(())
        })
    };
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => addresses.iter().map(|a| (a.clone(), asked(&runtime, a))).collect(),
        Err(error) => addresses.iter().map(|a| (a.clone(), Err(error.to_string()))).collect(),
    }
}

/// Has the agent make a handshake with each peer: a question for each component, all at once.
fn handshakes(config: &Config, status: &Status) -> Vec<(String, PingOutcome)> {
    let mut covered = BTreeSet::new();
    let mut questions: BTreeSet<&ComponentName> = BTreeSet::new();
    for peer in status.peers.iter().take(MAX_PEERS) {
        if let (Some(component), true) = (peer.components.first(), covered.insert(&peer.name)) {
            questions.insert(component);
        }
    }
    let answers: Vec<Answer> = std::thread::scope(|scope| {
        let asked: Vec<_> = questions
            .into_iter()
            .map(|component| {
                let component = component.clone();
                scope.spawn(move || ask(&config.socket, &Request::Ping { component }))
            })
            .collect();
        asked.into_iter().filter_map(|thread| thread.join().ok()?.ok()).collect()
    });
    let hosts = answers
        .into_iter()
        .filter_map(|answer| if let Answer::Ping { hosts } = answer { Some(hosts) } else { None });
    let outcomes: BTreeMap<String, PingOutcome> = hosts
        .flatten()
        .filter(|ping| ping.outcome != PingOutcome::Local)
        .map(|ping| (ping.host.to_string(), ping.outcome))
        .collect();
    outcomes.into_iter().collect()
}

/// Tries which sizes pass to the peers' endpoints, up to that of a full datagram.
fn paths(config: &Config, running: Option<&Status>, cached: Option<&Cached>, dir: &StateDir) -> Vec<PeerPath> {
    let endpoints: Vec<(String, SocketAddr)> = match running {
        Some(status) => status
            .peers
            .iter()
            .filter_map(|p| Some((p.name.to_string(), p.endpoint?)))
            .collect(),
        None => {
            let heard = view_cache::load_endpoints(dir).unwrap_or_default();
            let peers = cached.and_then(|cached| cached.view.as_ref()).map(|view| &view.content().peers);
            let named = peers.into_iter().flat_map(|peers| peers.values());
            named
                .filter_map(|peer| Some((peer.name.to_string(), *heard.get(&peer.id)?)))
                .collect()
        }
    };
    let (tun, underlay) = sizes(config).unwrap_or((DEFAULT_MTU, 1500));
    std::thread::scope(|scope| {
        let swept: Vec<_> = endpoints
            .into_iter()
            .take(MAX_PEERS)
            .map(|(peer, endpoint)| {
                // Headers of IP and UDP, and what WireGuard adds. What is longer than the way out goes in fragments.
                let full = tun + if endpoint.is_ipv4() { 60 } else { 80 };
                scope.spawn(move || PeerPath {
                    peer,
                    endpoint,
                    found: path_mtu::sweep(endpoint.ip(), full.min(underlay)).map_err(|e| e.to_string()),
                })
            })
            .collect();
        swept.into_iter().filter_map(|thread| thread.join().ok()).collect()
    })
}

/// MTU of the TUN, and of the smallest way out.
fn sizes(config: &Config) -> Result<(u32, u32), NetlinkError> {
    let mut netlink = Netlink::open()?;
    let links = link::list(&mut netlink)?;
    let own = links.iter().find(|l| l.name == config.interface.as_str());
    let tun = own.map(|l| l.mtu).or(config.mtu).unwrap_or(DEFAULT_MTU);
    let own: Vec<u32> = own.map(|l| l.index).into_iter().collect();
    let underlay = route::underlay_mtu(&mut netlink, &links, &own)?;
    Ok((tun, underlay.unwrap_or(1500)))
}

/// What others do with the mesh's addresses in this namespace.
fn foreign(config: &Config, overlay: Option<OverlayRange>) -> Result<Foreign, NetlinkError> {
    let mut found = Foreign::default();
    let Some(range) = overlay else { return Ok(found) };
    let mut netlink = Netlink::open()?;
    let links = link::list(&mut netlink)?;
    let (own, others): (Vec<_>, Vec<_>) = links.into_iter().partition(|l| l.name == config.interface.as_str());
    for other in others {
        let addresses = addr::list(&mut netlink, other.index)?;
        found.addresses.extend(
            addresses
                .into_iter()
                .filter(|a| range.contains(*a))
                .map(|a| (a, other.name.clone())),
        );
    }
    let own: Vec<u32> = own.iter().map(|l| l.index).collect();
    found.route = route::conflict(&mut netlink, range, &own)?.filter(|(at, _)| !found.addresses.iter().any(|(a, _)| a == at));
    Ok(found)
}

fn kernel(config: &Config) -> Kernel {
    let read = |path: &str| {
        std::fs::read_to_string(format!("/proc/sys/net/{path}"))
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    let is_on = |path: &str| read(path) == "1";
    let links = Netlink::open().and_then(|mut netlink| link::list(&mut netlink)).unwrap_or_default();
    let underlay = || links.iter().filter(|l| l.up && !l.loopback && l.name != config.interface.as_str());
    // The stricter of the two counts (ip-sysctl, rp_filter).
    let everywhere = is_on("ipv4/conf/all/rp_filter");
    let strict = underlay().filter(|l| everywhere || is_on(&format!("ipv4/conf/{}/rp_filter", l.name)));
    Kernel {
        forwards: is_on("ipv4/ip_forward") || is_on("ipv6/conf/all/forwarding"),
        strict: strict.map(|l| l.name.clone()).collect(),
        ways_out: underlay().count(),
        no_ipv6: !has_ipv6(),
    }
}

fn exposure(config: &Config, cached: Option<&Cached>) -> Exposure {
    let view = cached.and_then(|cached| cached.view.as_ref());
    view.map_or_else(Exposure::default, |view| exposure::look(config, view.content()))
}

/// The hosts file: what the running agent says of it, or whether it could be used.
fn hosts(config: &Config, running: Option<&Status>, us: Option<&Membership>) -> Option<(PathBuf, Result<usize, Unusable>)> {
    let HostsFile::At(path) = &config.hosts_file else { return None };
    if let Some(Names::Failed { file, why, hint }) = running.map(|status| &status.names) {
        let (why, fix) = (why.clone(), hint.clone());
        return Some((file.clone(), Err(Unusable { why, fix })));
    }
    let others = |content: &[u8]| owners(content).iter().filter(|host| us.is_none_or(|us| us.host != **host)).count();
    let looked = hosts_file::look(path).map(|content| others(&content)).map_err(|e| Unusable {
        why: e.to_string(),
        fix: e.hint(),
    });
    Some((path.clone(), looked))
}
