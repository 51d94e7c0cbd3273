//! A coordinator on the loopback with its store on disk, and the agent's side of joins and links: real QUIC, TLS and SQLite.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cloison_coordinator::audit::{Actor, Context};
use cloison_coordinator::control::listener::{Listener, ListenerConfig};
use cloison_coordinator::enrollment::token::NameRule;
use cloison_coordinator::entropy::Environment;
use cloison_coordinator::inventory::{CoordinatorAddress, On, Placement};
use cloison_coordinator::publish::{Gate, Publisher};
use cloison_coordinator::rotation::Keeper;
use cloison_coordinator::store::{IfMatch, NewMesh, NewToken, PolicyWrite, PolicyWritten, Store, StoreError, TokenSpec};
use cloison_coordinator::trust::{HostLifetime, Roots, ServerIdentity};
use cloison_proto::control::agent::{Ack, AgentMessage, Endpoint, Hello};
use cloison_proto::control::coordinator::{CoordinatorMessage, Goodbye, PeerHint};
use cloison_proto::control::frame::{Frame, FrameBuffer};
use cloison_proto::control::join::{EXPORTER_LABEL, JoinMessage, JoinRequest, Joined, RenewRequest, prove, prove_renewal};
use cloison_proto::control::rotate::{KeyChallenge, KeyDenied};
use cloison_proto::id::{HostId, MeshId};
use cloison_proto::key::{SigningKey, WgPrivateKey};
use cloison_proto::lease::Lease;
use cloison_proto::net::OverlayRange;
use cloison_proto::policy;
use cloison_proto::trust::{ALPN_JOIN, ALPN_LINK, COORDINATOR_DNS_NAME, Trust};
use cloison_proto::version::MeshTime;
use cloison_proto::view::{Floor, Items, VerifiedView};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, RecvStream, SendStream, VarInt};
use rustls::RootCertStore;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use tokio::time::timeout;

use crate::common::Outcome;

const PATIENCE: Duration = Duration::from_secs(20);

pub const LOCAL: Context = Context::of(Actor::Local);

/// A coordinator that serves.
pub struct Coordinator {
    pub store: Store,
    pub roots: Arc<Roots>,
    pub publisher: Arc<Publisher>,
    pub address: SocketAddr,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    stop: tokio::sync::oneshot::Sender<()>,
}

impl Coordinator {
    /// A new mesh in `dir`.
    pub async fn create(dir: &Path) -> Outcome<Self> {
        let (env, mesh) = (Environment::system(), MeshId([7; 16]));
        let roots = Roots::create(&dir.join("trust"), mesh, &env)?;
        let new = NewMesh {
            mesh,
            overlay: OverlayRange::new([10, 77, 0, 0].into(), 16, "fd12:3456:789a::".parse()?)?,
            lease: Duration::from_secs(86_400),
            addresses: vec![CoordinatorAddress {
                address: "192.0.2.1:7443".into(),
                not_before: MeshTime(0),
            }],
        };
        let store = Store::create(&dir.join("mesh.db"), env, new).await?;
        Self::serve(store, roots)
    }

    /// The mesh in `dir`, again.
    pub async fn reopen(dir: &Path) -> Outcome<Self> {
        let store = Store::open(&dir.join("mesh.db"), Environment::system()).await?;
        Self::serve(store, Roots::load(&dir.join("trust"))?)
    }

    fn serve(store: Store, roots: Roots) -> Outcome<Self> {
        let roots = Arc::new(roots);
        store.set_gate(Box::new(Gate::new(Arc::clone(&roots))));
        let publisher = Publisher::new(store.clone(), Arc::clone(&roots));
        let identity = ServerIdentity::new(Arc::clone(&roots), Environment::system())?;
        let config = ListenerConfig::at(([127, 0, 0, 1], 0).into(), HostLifetime::default());
        let listener = Listener::bind(
            config,
            Arc::clone(&identity),
            store.clone(),
            Arc::clone(&roots),
            Arc::clone(publisher.hub()),
        )?;
        let address = listener.local_addr()?;
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let tasks = vec![
            tokio::spawn(Arc::clone(&publisher).run()),
            tokio::spawn(
                Keeper::new(
                    store.clone(),
                    Arc::clone(publisher.hub()),
                    Arc::clone(&roots),
                    Arc::clone(&identity),
                )
                .run(),
            ),
            tokio::spawn(listener.run(async {
                let _ = stopped.await;
            })),
        ];
        Ok(Self {
            store,
            roots,
            publisher,
            address,
            tasks,
            stop,
        })
    }

    /// Stops as a signal would have it.
    pub async fn stop(self) -> Outcome {
        let Self {
            mut tasks, stop, store, ..
        } = self;
        let _ = stop.send(());
        if let Some(listener) = tasks.pop() {
            timeout(PATIENCE, listener).await??;
        }
        tasks.iter().for_each(tokio::task::JoinHandle::abort);
        store.close().await;
        Ok(())
    }

    pub async fn apply(&self, text: &str) -> Outcome<PolicyWritten> {
        Ok(self.try_apply(text).await??)
    }

    pub async fn try_apply(&self, text: &str) -> Outcome<Result<PolicyWritten, StoreError>> {
        let policy = policy::parse(text).map_err(|findings| format!("{findings:?}"))?;
        let placements = policy.components().iter().map(|(component, c)| Placement {
            component: component.clone(),
            on: match &c.on {
                policy::On::Hosts(names) => names.iter().cloned().map(On::Name).collect(),
                policy::On::Labels(labels) => vec![On::Labels(labels.clone())],
            },
        });
        let write = PolicyWrite {
            text: text.into(),
            placements: placements.collect(),
        };
        Ok(self.store.put_policy(LOCAL, write, IfMatch::Any).await)
    }

    pub async fn token(&self, host: &str) -> Outcome<NewToken> {
        let spec = TokenSpec {
            uses: 1,
            lifetime: Duration::from_secs(3600),
            name: host.parse::<NameRule>()?,
            labels: Default::default(),
            source: None,
        };
        Ok(self.store.create_token(LOCAL, spec).await?)
    }

    /// Joins as the machine number `machine`, by a token for `host`.
    pub async fn enroll(&self, host: &str, machine: u8) -> Outcome<Agent> {
        let token = self.token(host).await?;
        let keys = Keys::of(machine);
        let joined = self.join(&token, &keys).await?.ok_or("the join was refused")?;
        Agent::new(keys, joined)
    }

    pub async fn join(&self, token: &NewToken, keys: &Keys) -> Outcome<Option<Joined>> {
        self.join_from(token, keys, [Ipv4Addr::LOCALHOST; 2]).await
    }

    /// Joins with a connection that begins at the first address and goes on from the second one.
    pub async fn join_from(&self, token: &NewToken, keys: &Keys, [first, then]: [Ipv4Addr; 2]) -> Outcome<Option<Joined>> {
        let stream = self.ask(first).await?;
        if then != first {
            stream.endpoint.rebind(UdpSocket::bind((then, 0))?)?;
        }
        let (identity_proof, wg_proof) = prove(&stream.exporter, token.id, &keys.identity, &keys.wg, &stream.challenge);
        let request = JoinRequest {
            token: token.id,
            secret: *token.secret.expose(),
            identity: keys.identity.identity(),
            wg_key: keys.wg.public(),
            identity_proof,
            wg_proof,
            software: "test".into(),
        };
        stream.answer(JoinMessage::JoinRequest(request)).await
    }

    pub async fn renew(&self, host: HostId, identity: &SigningKey) -> Outcome<Option<Joined>> {
        let stream = self.ask(Ipv4Addr::LOCALHOST).await?;
        let request = RenewRequest {
            host,
            identity: identity.identity(),
            identity_proof: prove_renewal(&stream.exporter, host, identity),
        };
        stream.answer(JoinMessage::RenewRequest(request)).await
    }

    /// A join stream up to its challenge.
    async fn ask(&self, from: Ipv4Addr) -> Outcome<JoinStream> {
        let (endpoint, connection) = self.connect_from(from, ALPN_JOIN, None).await?;
        let mut exporter = [0; 32];
        connection
            .export_keying_material(&mut exporter, EXPORTER_LABEL, &[])
            .map_err(|_| "no exporter")?;
        let mut wire = Wire::new(connection.clone(), timeout(PATIENCE, connection.accept_bi()).await??);
        let Some(JoinMessage::Challenge(challenge)) = JoinMessage::from_frame(&wire.read().await?)? else {
            return Err("no challenge".into());
        };
        Ok(JoinStream {
            endpoint,
            wire,
            exporter,
            challenge,
        })
    }

    pub async fn connect(&self, alpn: &[u8], client: Option<(&SigningKey, &[u8])>) -> Outcome<Connection> {
        Ok(self.connect_from(Ipv4Addr::LOCALHOST, alpn, client).await?.1)
    }

    async fn connect_from(
        &self,
        from: Ipv4Addr,
        alpn: &[u8],
        client: Option<(&SigningKey, &[u8])>,
    ) -> Outcome<(quinn::Endpoint, Connection)> {
        let mut anchors = RootCertStore::empty();
        anchors.add(CertificateDer::from_pem_slice(self.roots.root_pem().as_bytes())?)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13])?;
        let builder = builder.with_root_certificates(anchors);
        let mut tls = match client {
            None => builder.with_no_client_auth(),
            Some((key, certificate)) => {
                let key = PrivatePkcs8KeyDer::from(key.to_pkcs8().to_vec());
                builder.with_client_auth_cert(vec![certificate.to_vec().into()], key.into())?
            }
        };
        tls.alpn_protocols = vec![alpn.to_vec()];
        let mut endpoint = quinn::Endpoint::client((from, 0).into())?;
        endpoint.set_default_client_config(ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?)));
        let connection = timeout(PATIENCE, endpoint.connect(self.address, COORDINATOR_DNS_NAME)?).await??;
        Ok((endpoint, connection))
    }
}

struct JoinStream {
    endpoint: quinn::Endpoint,
    wire: Wire,
    exporter: [u8; 32],
    challenge: cloison_proto::control::join::Challenge,
}

impl JoinStream {
    /// What the coordinator says to the request; `None` if it denies.
    async fn answer(mut self, request: JoinMessage) -> Outcome<Option<Joined>> {
        self.wire.write(&request.to_frame()).await?;
        let answer = JoinMessage::from_frame(&self.wire.read().await?)?;
        self.wire.connection.close(VarInt::from_u32(0), b"");
        match answer {
            Some(JoinMessage::Joined(joined)) => Ok(Some(joined)),
            Some(JoinMessage::Denied(_)) => Ok(None),
            other => Err(format!("{other:?} is no answer").into()),
        }
    }
}

/// The private keys of a machine.
pub struct Keys {
    pub identity: SigningKey,
    pub wg: WgPrivateKey,
}

impl Keys {
    pub fn of(machine: u8) -> Self {
        Self {
            identity: SigningKey::from_seed(&[machine; 32]),
            wg: WgPrivateKey::from_bytes([machine; 32]),
        }
    }
}

/// A stream of frames.
pub struct Wire {
    pub connection: Connection,
    send: SendStream,
    recv: RecvStream,
    buffer: FrameBuffer,
}

impl Wire {
    pub fn new(connection: Connection, (send, recv): (SendStream, RecvStream)) -> Self {
        Self {
            connection,
            send,
            recv,
            buffer: FrameBuffer::default(),
        }
    }

    pub async fn read(&mut self) -> Outcome<Frame> {
        let mut chunk = [0; 4096];
        loop {
            if let Some(frame) = self.buffer.next_frame()? {
                return Ok(frame);
            }
            let len = timeout(PATIENCE, self.recv.read(&mut chunk)).await??.ok_or("the stream ended")?;
            self.buffer.push(&chunk[..len]);
        }
    }

    pub async fn write(&mut self, frame: &Frame) -> Outcome {
        Ok(self.send.write_all(&frame.to_bytes()?).await?)
    }
}

/// An agent: what it has on its disk.
pub struct Agent {
    pub keys: Keys,
    pub joined: Joined,
    pub certificate: Vec<u8>,
    pub view: Option<VerifiedView>,
    pub endpoints: Vec<Endpoint>,
    pub incarnation: u64,
}

impl Agent {
    fn new(keys: Keys, joined: Joined) -> Outcome<Self> {
        Ok(Self {
            keys,
            certificate: joined.certificate.clone(),
            joined,
            view: None,
            endpoints: Vec::new(),
            incarnation: 1,
        })
    }

    pub fn host(&self) -> HostId {
        self.joined.host
    }

    /// Whether the coordinator takes no link of this agent; it may say so before the greeting is out.
    pub async fn is_refused(&self, coordinator: &Coordinator) -> bool {
        match self.link(coordinator).await {
            Ok(mut link) => link.next(self).await.is_err(),
            Err(_) => true,
        }
    }

    pub async fn link(&self, coordinator: &Coordinator) -> Outcome<Link> {
        let connection = coordinator
            .connect(ALPN_LINK, Some((&self.keys.identity, &self.certificate)))
            .await?;
        let stream = connection.open_bi().await?;
        let mut wire = Wire::new(connection, stream);
        let floor = self.view.as_ref().map(VerifiedView::floor);
        let hello = Hello {
            software: "test".into(),
            version: floor.map(|f| f.version),
            state_hash: floor.map(|f| f.state_hash),
            incarnation: self.incarnation,
            endpoints: self.endpoints.clone(),
        };
        wire.write(&AgentMessage::Hello(hello).to_frame()).await?;
        self.over(wire, coordinator)
    }

    /// The link of this agent over a stream on which it has greeted.
    pub fn over(&self, wire: Wire, coordinator: &Coordinator) -> Outcome<Link> {
        Ok(Link {
            wire,
            trust: Trust::with_items(
                self.joined.mesh,
                coordinator.roots.root_key(),
                &self.joined.trust,
                MeshTime(u64::MAX - 1),
            )?,
        })
    }
}

/// A link, from the agent's side.
pub struct Link {
    pub wire: Wire,
    trust: Trust,
}

/// What came on a link.
#[derive(Debug)]
pub enum News {
    /// A view that holds, and whether it came as a delta.
    View(Box<VerifiedView>, bool),
    Lease(Lease),
    Hints(Vec<PeerHint>),
    Certificate(Vec<u8>),
    Challenge(KeyChallenge),
    Denied(KeyDenied),
    RotateKey,
    Goodbye(Goodbye),
}

impl Link {
    pub async fn say(&mut self, message: impl Into<AgentMessage>) -> Outcome {
        self.wire.write(&message.into().to_frame()).await
    }

    /// The next whole thing that comes.
    pub async fn next(&mut self, agent: &Agent) -> Outcome<News> {
        loop {
            match CoordinatorMessage::from_frame(&self.wire.read().await?)? {
                Some(CoordinatorMessage::ViewStart(start)) => {
                    let mut items = Items::default();
                    if let Some(base) = start.base {
                        let held = agent.view.as_ref().filter(|view| view.header().state_hash == base);
                        items = held.ok_or("a delta on a base that is not ours")?.items().clone();
                    }
                    loop {
                        match CoordinatorMessage::from_frame(&self.wire.read().await?)? {
                            Some(CoordinatorMessage::ViewItems(more)) => items.apply(more.ops),
                            Some(CoordinatorMessage::ViewEnd(_)) => break,
                            other => return Err(format!("{other:?} inside a view").into()),
                        }
                    }
                    let floor: Option<Floor> = agent.view.as_ref().map(VerifiedView::floor);
                    let view = VerifiedView::open(start.header, items, &self.trust, (agent.joined.mesh, agent.host()), floor)?;
                    return Ok(News::View(Box::new(view), start.base.is_some()));
                }
                Some(CoordinatorMessage::LeaseGrant(grant)) => return Ok(News::Lease(Lease::open(&grant.lease, &self.trust)?)),
                Some(CoordinatorMessage::Hints(hints)) => return Ok(News::Hints(hints.peers)),
                Some(CoordinatorMessage::Certificate(certificate)) => return Ok(News::Certificate(certificate.der)),
                Some(CoordinatorMessage::Goodbye(goodbye)) => return Ok(News::Goodbye(goodbye)),
                Some(CoordinatorMessage::KeyChallenge(challenge)) => return Ok(News::Challenge(challenge)),
                Some(CoordinatorMessage::KeyDenied(denied)) => return Ok(News::Denied(denied)),
                Some(CoordinatorMessage::RotateKey(_)) => return Ok(News::RotateKey),
                Some(other) => return Err(format!("{other:?} outside a view").into()),
                None => {}
            }
        }
    }

    /// Takes what comes until a view came, puts it in force and acknowledges it; returns whether it was a delta.
    pub async fn take_view(&mut self, agent: &mut Agent) -> Outcome<bool> {
        loop {
            if let News::View(view, by_delta) = self.next(agent).await? {
                let ack = Ack {
                    version: view.header().version,
                    state_hash: view.header().state_hash,
                };
                let (root, items) = (*self.trust.root(), &view.content().trust);
                self.trust = Trust::with_items(agent.joined.mesh, root, items, MeshTime(u64::MAX - 1))?;
                agent.joined.trust.clone_from(items);
                agent.view = Some(*view);
                self.say(ack).await?;
                return Ok(by_delta);
            }
        }
    }

    /// Takes what comes until the link says goodbye, and returns its code.
    pub async fn take_goodbye(&mut self, agent: &Agent) -> Outcome<String> {
        loop {
            if let News::Goodbye(goodbye) = self.next(agent).await? {
                return Ok(goodbye.code);
            }
        }
    }

    /// Takes what comes until a lease came.
    pub async fn take_lease(&mut self, agent: &Agent) -> Outcome<Lease> {
        loop {
            if let News::Lease(lease) = self.next(agent).await? {
                return Ok(lease);
            }
        }
    }
}
