//! Two hosts on one wire with real data planes, and views made by hand: what a coordinator would have compiled.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cloison_agent::attach::Accepted;
use cloison_agent::attach::nudge::Nudge;
use cloison_agent::dataplane::{Config, Dataplane, InForce, MeshEngine};
use cloison_agent::sys::clock;
use cloison_agent::sys::netns::NetNs;
use cloison_agent_core::engine::EngineConfig;
use cloison_agent_core::install::{Hint, Installed, LeaseTerm};
use cloison_agent_core::wg::LocalKey as _;
use cloison_agent_core::wg::boringtun::BoringKey;
use cloison_proto::id::{HostId, RuleId};
use cloison_proto::key::WgPrivateKey;
use cloison_proto::net::AddressPair;
use cloison_proto::policy::Attachment;
use cloison_proto::version::MeshTime;
use cloison_proto::view::{Config as MeshConfig, Grant, LocalInstance, Peer, RemoteInstance, RuleItem, SelfHost, View};

use crate::{Outcome, addresses, fresh, inside, range, wired_pair};

/// A component of the mesh: its name, the host it is on (1 or 2), and its attachment there.
pub(crate) struct Component {
    pub(crate) name: &'static str,
    pub(crate) host: u8,
    pub(crate) attachment: String,
}

/// A rule: from, to, and what it opens.
pub(crate) type Rule = (&'static str, &'static str, &'static str);

/// What both hosts' views are made of.
pub(crate) struct Mesh {
    pub(crate) components: Vec<Component>,
    pub(crate) rules: Vec<Rule>,
}

/// A host in a namespace of its own, with the real data plane.
pub(crate) struct Host {
    pub(crate) number: u8,
    pub(crate) ns: NetNs,
    pub(crate) engine: Arc<MeshEngine>,
    pub(crate) dataplane: Dataplane,
    pub(crate) nudge: Nudge,
}

/// Hosts 1 and 2 on one wire, with the mesh's views in force and knowing each other's endpoints.
pub(crate) fn two_hosts(mesh: &Mesh) -> Outcome<[Host; 2]> {
    let (a, b) = wired_pair()?;
    let mut hosts = [Host::start(1, a, 2)?, Host::start(2, b, 1)?];
    apply(&mut hosts, mesh)?;
    Ok(hosts)
}

/// Puts the mesh's views in force at both hosts.
pub(crate) fn apply(hosts: &mut [Host; 2], mesh: &Mesh) -> Outcome<[Installed; 2]> {
    let port = hosts.each_ref().map(|h| h.dataplane.port());
    let [one, two] = hosts;
    let installed = [one.apply(mesh)?, two.apply(mesh)?];
    for (host, peer, port) in [(one, 2, port[1]), (two, 1, port[0])] {
        let candidates = vec![SocketAddr::from(([192, 0, 2, peer], port))];
        host.engine.hint(
            id(peer),
            &Hint {
                candidates,
                incarnation: 1,
            },
        );
    }
    Ok(installed)
}

pub(crate) fn config() -> Outcome<Config> {
    Ok(Config {
        tun: "cloison0".parse()?,
        table: "cloison_test".parse()?,
        port: 0,
        workers: 1,
        mtu: None,
        accepted: Accepted::default(),
        loopback_guard: false,
        guard_place: "/nowhere".into(),
        resolver: false,
        nudge: Nudge::default(),
    })
}

impl Host {
    /// A host with `workers` packet workers and no view.
    pub(crate) fn start(number: u8, ns: NetNs, workers: usize) -> Outcome<Self> {
        Self::configured(number, ns, Config { workers, ..config()? })
    }

    fn configured(number: u8, ns: NetNs, config: Config) -> Outcome<Self> {
        let engine = Arc::new(MeshEngine::new(EngineConfig {
            seed: u64::from(number),
            // What is denied is answered from the first packet on: no stream of before is to be spared.
            reset_grace: Duration::ZERO,
            ..EngineConfig::default()
        }));
        let nudge = config.nudge.clone();
        let dataplane = inside(&ns, || Ok(Dataplane::start(config, engine.clone())?))?;
        Ok(Self {
            number,
            ns,
            engine,
            dataplane,
            nudge,
        })
    }

    pub(crate) fn alone(number: u8) -> Outcome<Self> {
        Self::start(number, fresh()?, 1)
    }

    /// A host in `ns`, whose loopback is guarded or not, with the programs of the guard pinned at `place`.
    pub(crate) fn guarded(ns: NetNs, is_guarded: bool, place: &Path) -> Outcome<Self> {
        let config = Config {
            loopback_guard: is_guarded,
            guard_place: place.to_owned(),
            ..config()?
        };
        Self::configured(1, ns, config)
    }

    pub(crate) fn apply(&mut self, mesh: &Mesh) -> Outcome<Installed> {
        let now = clock::now();
        let ends = now + Duration::from_secs(3600);
        let lease = LeaseTerm {
            at: now,
            mesh: MeshTime(1_800_000_000),
            ends,
        };
        let keys = vec![Arc::new(BoringKey::new(&key(self.number)))];
        Ok(self.dataplane.apply(InForce {
            view: Arc::new(mesh.view(self.number)?),
            keys,
            lease: Some(lease),
        })?)
    }

    /// A listener on this host.
    pub(crate) fn listen(&self, address: IpAddr, port: u16) -> Outcome<TcpListener> {
        inside(&self.ns, || Ok(TcpListener::bind((address, port))?))
    }

    /// A stream from this host to `to`.
    pub(crate) fn connect(&self, to: IpAddr, port: u16) -> Outcome<std::io::Result<TcpStream>> {
        connect_in(&self.ns, to, port)
    }
}

pub(crate) fn connect_in(ns: &NetNs, to: IpAddr, port: u16) -> Outcome<std::io::Result<TcpStream>> {
    inside(ns, || Ok(TcpStream::connect_timeout(&(to, port).into(), Duration::from_secs(5))))
}

/// Sends a line each way over a new stream to `listener`, and returns both ends and the source that the listener saw.
pub(crate) fn talk(stream: TcpStream, listener: &TcpListener) -> Outcome<(TcpStream, TcpStream, IpAddr)> {
    let (mut there, from) = listener.accept()?;
    let mut here = stream;
    here.set_read_timeout(Some(Duration::from_secs(5)))?;
    there.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut got = [0; 4];
    here.write_all(b"ping")?;
    there.read_exact(&mut got)?;
    there.write_all(&got)?;
    here.read_exact(&mut got)?;
    assert_eq!(&got, b"ping");
    Ok((here, there, from.ip()))
}

impl Mesh {
    pub(crate) fn address(&self, name: &str) -> Outcome<AddressPair> {
        let index = self.components.iter().position(|c| c.name == name).ok_or("no such component")?;
        addresses(u32::try_from(index)?)
    }

    pub(crate) fn view(&self, us: u8) -> Outcome<View> {
        let (mut instances, mut remotes) = (BTreeMap::new(), Vec::new());
        for Component { name, host, attachment } in &self.components {
            let (component, addresses) = (name.parse()?, self.address(name)?);
            if *host == us {
                let attachment: Attachment = attachment.parse()?;
                instances.insert(
                    name.parse()?,
                    LocalInstance {
                        component,
                        attachment,
                        addresses,
                    },
                );
            } else {
                remotes.push(RemoteInstance {
                    component,
                    host: id(*host),
                    addresses,
                });
            }
        }
        let rule = |(number, (from, to, ports)): (usize, &Rule)| {
            let grants = vec![Grant {
                ports: ports.parse()?,
                service: None,
            }];
            let number = u8::try_from(number)?;
            Ok(RuleItem {
                id: RuleId([number; 16]),
                from: from.parse()?,
                to: to.parse()?,
                grants,
                expires: MeshTime::NEVER,
            })
        };
        let peer = |number| {
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(Peer {
                id: id(number),
                name: format!("host-{number}").parse()?,
                wg_keys: vec![key(number).public()],
                psk_generation: 0,
            })
        };
        let others = [1, 2].into_iter().filter(|n| *n != us).map(|n| Ok((id(n), peer(n)?)));
        Ok(View {
            config: MeshConfig {
                overlay: range()?,
                lease: Duration::from_secs(86_400),
            },
            host: SelfHost {
                id: id(us),
                name: format!("host-{us}").parse()?,
                wg_keys: vec![key(us).public()],
            },
            instances,
            peers: others.collect::<Outcome<_>>()?,
            remotes,
            rules: self.rules.iter().enumerate().map(rule).collect::<Outcome<_>>()?,
            trust: Vec::new(),
            ignored: 0,
        })
    }
}

fn id(host: u8) -> HostId {
    HostId([host; 16])
}

fn key(host: u8) -> WgPrivateKey {
    WgPrivateKey::from_bytes([host.wrapping_mul(41); 32])
}
