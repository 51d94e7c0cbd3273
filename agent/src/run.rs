//! The agent as a service: what starts in which order, and the one loop that owns everything that is not a packet.
//!
//! Start: lock -> on a first start, enrollment -> state -> data plane (socket and workers) -> cached view with what is left of its lease, base table first -> status socket
//! -> link. A view that comes: data plane -> disk -> ack. SIGTERM or SIGINT: the link says goodbye, what must survive is written, and the
//! data plane goes; the TUN with its addresses and routes, the base table and the unreachable routes stay.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use cloison_agent_core::engine::EngineConfig;
use cloison_agent_core::install::{Hint, LeaseTerm};
use cloison_agent_core::wg::boringtun::BoringKey;
use cloison_proto::filter::Table;
use cloison_proto::id::HostId;
use cloison_proto::key::SigningKey;
use cloison_proto::trust::{Role, SpiffeId};
use cloison_proto::version::Timestamp;
use parking_lot::Mutex;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use crate::attach::Unenforced;
use crate::attach::guard;
use crate::attach::nudge::Nudge;
use crate::config::Config;
use crate::control::certificate::{Window, check_host};
use crate::control::link::Link;
use crate::dataplane::{self, Dataplane, InForce, MeshEngine, StartError};
use crate::denials::Denials;
use crate::first_start::{self, FirstStartError};
use crate::manager::{Kept, Manager, Wanted, Watchdog};
use crate::names::keeper::Keeper;
use crate::names::resolved::Teller;
use crate::netlink::monitor::Monitor;
use crate::state::clock::{Moment, wall_now};
use crate::state::identity::{Membership, load_certificate};
use crate::state::incarnation::{self, StepWatch};
use crate::state::keys::HostKeys;
use crate::state::view_cache::{self, Cached, HeldLease};
use crate::state::wg_keys::WgKeys;
use crate::state::{File, StateDir, StateError};
use crate::status::{self, Listener, Question, SocketError};
use crate::sys::clock;

mod duties;
mod keys;
mod report;
mod session;

pub use session::Outcome;

/// How often the loop looks at the time.
const TICK: Duration = Duration::from_millis(100);

/// The kernel's TUN driver.
const TUN_DEVICE: &str = "/dev/net/tun";

/// Questions that may wait for the loop.
const QUESTIONS: usize = 16;

/// Why the agent does not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// There is no membership, and none could be had.
    #[error(transparent)]
    FirstStart(#[from] FirstStartError),
    /// There is a membership without keys.
    #[error("the keys of this host are missing from {}", path.display())]
    NoKeys {
        /// The state directory.
        path: std::path::PathBuf,
    },
    /// The agent lacks a privilege.
    #[error("cannot make network interfaces: this process lacks CAP_NET_ADMIN")]
    Privilege,
    /// The kernel's TUN driver is out of reach.
    #[error("cannot open {TUN_DEVICE}: {0}")]
    NoTun(std::io::Error),
    /// The data plane.
    #[error("cannot start the data plane: {}", crate::sys::with_causes(.0))]
    Start(#[from] StartError),
    /// The host cannot be made safe for overlay addresses.
    #[error("cannot make this host safe for the mesh's addresses: {}", crate::sys::with_causes(.0))]
    Prepare(#[from] Unenforced),
    /// The status socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The runtime or the signals.
    #[error("cannot start: {0}")]
    System(#[from] std::io::Error),
    /// The kernel gave no random bytes.
    #[error("the kernel gives no random bytes: {0}")]
    Entropy(getrandom::Error),
    /// A packet worker ended.
    #[error("a packet worker ended by itself")]
    Broken,
}

impl RunError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::State(e) => e.hint(),
            Self::FirstStart(e) => e.hint(),
            Self::NoKeys { .. } => File::IdentityKey.remedy().into(),
            Self::Privilege => "run the agent as root, or give its unit AmbientCapabilities=CAP_NET_ADMIN".into(),
            Self::NoTun(_) => {
                "load the kernel's driver (`modprobe tun`), or pass the device to the container that the agent runs in".into()
            }
            Self::Start(StartError::Udp(_)) => {
                "is another agent or WireGuard interface using the port? Choose another with `listen_port` or --listen-port".into()
            }
            Self::Start(_) | Self::System(_) | Self::Entropy(_) => "look at the limits of the agent's unit (files, threads, memory)".into(),
            Self::Prepare(_) => "the agent needs nftables in the kernel, and root or CAP_NET_ADMIN".into(),
            Self::Socket(e) => e.hint(),
            Self::Broken => "this is a fault of the agent: restart it, and report what its log says".into(),
        }
    }
}

/// Runs the agent until a signal ends it.
///
/// # Errors
/// [`RunError`].
pub fn run(config: Config) -> Result<(), RunError> {
    // Before anything else is opened: what was passed has fixed numbers.
    let manager = Manager::of_this_process();
    let kept = manager.take_back();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let outcome = runtime.block_on(supervise(config, manager, kept));
    // A blocking call that hangs in the kernel does not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(2));
    outcome
}

async fn supervise(config: Config, manager: Manager, kept: Vec<Kept>) -> Result<(), RunError> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let dir = StateDir::open(&config.state_dir)?;
    let _lock = dir.lock()?;
    let us = tokio::select! {
        us = membership(&dir, &config, manager) => us?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    let mut agent = Agent::start(config, dir, us, manager, kept).await?;
    let (sender, questions) = mpsc::channel(QUESTIONS);
    let listener = Listener::bind(&agent.config.socket)?;
    let serving = tokio::spawn(status::serve(listener, sender));
    tracing::info!(host = %agent.us.name, mesh = %agent.us.mesh, port = agent.dataplane.lock().port(), "running");
    manager.ready();
    let ended = agent.work(questions, [&mut terminate, &mut interrupt]).await;
    manager.stopping();
    agent.stop().await;
    // The receiver is gone: the server ends, and with it the socket's file.
    let _ = serving.await;
    ended
}

/// Who this host is; on a first start, after it has enrolled.
async fn membership(dir: &StateDir, config: &Config, manager: Manager) -> Result<Membership, RunError> {
    if let Some(us) = Membership::load(dir)? {
        return Ok(us);
    }
    first_start::enroll(dir, config, manager, random()?).await?;
    let state = dir.path().into();
    Ok(Membership::load(dir)?.ok_or(FirstStartError::NoToken { state })?)
}

/// Everything that is not a packet.
struct Agent {
    config: Config,
    dir: StateDir,
    us: Membership,
    identity: Arc<SigningKey>,
    wg: WgKeys,
    rotation: keys::Rotation,
    /// The data plane's, the one for new handshakes first.
    local_keys: Vec<Arc<BoringKey>>,
    engine: Arc<MeshEngine>,
    dataplane: Arc<Mutex<Dataplane>>,
    link: Link,
    /// The table of the view in force, for `explain`.
    table: Arc<Table>,
    /// The lease of the view in force, and when it ends.
    lease: Option<(HeldLease, Timestamp)>,
    /// The share of it, in percent, that was warned of last.
    lease_warned: Option<u8>,
    certificate: Option<Vec<u8>>,
    session: session::Session,
    /// A view in force that is not on disk yet, because the disk refused it.
    unsaved: bool,
    /// The same of whom to trust.
    trust_unsaved: bool,
    incarnation: u64,
    steps: StepWatch,
    denials: Denials,
    /// What the coordinator was told of them.
    denials_told: report::Told,
    /// Where peers were last heard, in this run or before it.
    heard: BTreeMap<HostId, SocketAddr>,
    /// The peers with sessions, as they are on disk.
    live: Option<BTreeSet<HostId>>,
    started: Timestamp,
    duties: duties::Schedule,
    /// Heard when something changed on this host that the data plane depends on.
    nudge: Nudge,
    /// What was found damaged at the start.
    problems: Vec<String>,
    /// The last warning of the link, for `status`.
    link_warning: Option<String>,
    /// Whether the coordinator's certificate was not valid at this host's time.
    clock_off: bool,
    /// How far the wall clock is off, by what people were told last.
    clock_told: Option<i64>,
    manager: Manager,
    watchdog: Option<Watchdog>,
    /// The line that the service manager was told last.
    told: String,
    names: Keeper,
    /// Who tells systemd-resolved of them, if that is wanted.
    resolved: Option<Teller>,
    /// Tells of changes to addresses and nftables; without it, they are found when they are looked for.
    monitor: Option<Monitor>,
    /// This host's addresses on the underlay, as they were listed last.
    reachable_at: Option<BTreeSet<IpAddr>>,
}

impl Agent {
    async fn start(config: Config, dir: StateDir, us: Membership, manager: Manager, kept: Vec<Kept>) -> Result<Self, RunError> {
        let no_keys = || RunError::NoKeys { path: dir.path().into() };
        let identity = Arc::new(HostKeys::load(&dir)?.ok_or_else(no_keys)?.identity);
        let wg = WgKeys::load(&dir)?.ok_or_else(no_keys)?;
        let moment = Moment::now();
        let incarnation = incarnation::raise(&dir, moment.wall)?;
        let cached = view_cache::load(&dir, &us, &moment)?;
        for problem in &cached.problems {
            tracing::warn!(problem, "state that cannot be used");
        }
        let certificate = load_certificate(&dir)?;
        let window = certificate.as_deref().and_then(|der| own_window(der, &us, &identity));
        let (seed, link_seed) = (random()?, random()?);
        check_means()?;
        let engine = Arc::new(MeshEngine::new(EngineConfig {
            seed,
            ..EngineConfig::default()
        }));
        let nudge = Nudge::default();
        let dataplane = Arc::new(Mutex::new(Dataplane::resume(
            plane_config(&config, nudge.clone()),
            engine.clone(),
            manager,
            kept,
        )?));
        let names = Keeper::start(config.hosts_file.clone(), dir.clone())?;
        let link = Link::new(us.clone(), &cached, window, incarnation, link_seed, moment.boottime);
        let mut agent = Self {
            local_keys: keys::local_keys(&wg, cached.view.as_ref().map(|view| &**view.content()), &[]),
            table: Arc::default(),
            lease: None,
            lease_warned: None,
            session: session::Session::default(),
            unsaved: false,
            trust_unsaved: false,
            steps: StepWatch::new(moment.wall, moment.boottime),
            denials: Denials::default(),
            denials_told: report::Told::new(),
            heard: view_cache::load_endpoints(&dir)?,
            live: view_cache::load_live(&dir)?,
            started: moment.boottime,
            duties: duties::Schedule::new(moment.boottime),
            nudge,
            problems: cached.problems.clone(),
            link_warning: None,
            clock_off: false,
            clock_told: None,
            manager,
            watchdog: manager.watchdog(moment.boottime),
            told: String::new(),
            names,
            resolved: config.resolved.then(Teller::start),
            monitor: Monitor::open(),
            reachable_at: None,
            config,
            dir,
            us,
            identity,
            wg,
            rotation: keys::Rotation::default(),
            engine,
            dataplane,
            link,
            certificate,
            incarnation,
        };
        agent.resume(cached).await?;
        Ok(agent)
    }

    /// Makes the host safe for the mesh's addresses, puts the cached view in force for what is left of its lease, and begins sessions with
    /// all its peers.
    async fn resume(&mut self, cached: Cached) -> Result<(), RunError> {
        if let Some(range) = cached.overlay {
            let dataplane = self.dataplane.clone();
            blocking(move || dataplane.lock().prepare(range))
                .await?
                .map_err(RunError::Prepare)?;
        }
        let Some(view) = cached.view else { return Ok(()) };
        let now = clock::now();
        self.lease = cached.lease.map(|(held, left)| (held, now + left));
        let in_force = InForce {
            view: view.content().clone(),
            keys: self.local_keys.clone(),
            lease: self.lease_term(now),
        };
        let dataplane = self.dataplane.clone();
        if let Err(conflict) = blocking(move || dataplane.lock().apply(in_force)).await? {
            // The coordinator may send a view that fits; until then there is none, and nothing is allowed.
            tracing::error!(%conflict, "the cached view cannot be put in force");
            self.problems.push(conflict.to_string());
            self.link.forget_view();
            self.lease = None;
            return Ok(());
        }
        self.table = Arc::new(Table::new(view.content()));
        self.name();
        for (host, endpoint) in &self.heard {
            self.engine.remember(*host, *endpoint);
        }
        // Whoever has a session goes on sealing for it. The engine paces these beginnings; the others begin when there is something to say.
        let was_live = |host: &&HostId| self.live.as_ref().is_none_or(|live| live.contains(host));
        for host in view.content().peers.keys().filter(was_live) {
            self.engine.want_handshake(*host);
        }
        self.dataplane.lock().tick_soon();
        tracing::info!(version = %view.header().version, lease_left = ?self.lease_left(now), "the cached view is in force");
        Ok(())
    }

    /// The loop: until a signal, or a fault that only a restart repairs.
    async fn work(&mut self, mut questions: mpsc::Receiver<Question>, [terminate, interrupt]: [&mut Signal; 2]) -> Result<(), RunError> {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    let outputs = self.link.tick(clock::now());
                    self.carry_out(outputs).await;
                    self.duties().await;
                    self.show_that_all_moves();
                    if self.dataplane.lock().is_broken() {
                        return Err(RunError::Broken);
                    }
                }
                () = self.nudge.heard() => self.check().await,
                outcome = self.session.next() => self.session_outcome(outcome).await,
                Some(question) = questions.recv() => self.answer(question),
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
            }
        }
    }

    /// Pings the watchdog, as long as the packet workers move too.
    fn show_that_all_moves(&mut self) {
        let Some(watchdog) = &mut self.watchdog else { return };
        let dataplane = self.dataplane.lock();
        if watchdog.look(clock::now(), &dataplane.rounds()) == Wanted::Wake {
            dataplane.wake();
        }
    }

    async fn stop(&mut self) {
        tracing::info!("stopping");
        self.session.close("shutdown").await;
        self.persist_lease();
        if let Err(error) = self.persist_peers() {
            tracing::warn!(%error, "cannot keep where the peers are; the next start asks the coordinator");
        }
    }

    /// What is left of the lease at `now`.
    fn lease_left(&self, now: Timestamp) -> Duration {
        self.lease.as_ref().map_or(Duration::ZERO, |(_, ends)| ends.since(now))
    }

    fn lease_term(&self, now: Timestamp) -> Option<LeaseTerm> {
        let (_, ends) = self.lease.as_ref()?;
        Some(LeaseTerm {
            at: now,
            mesh: self.link.mesh_time(now),
            ends: *ends,
        })
    }

    fn persist_lease(&self) {
        let Some((held, ends)) = &self.lease else { return };
        let moment = Moment::now();
        let left = ends.since(moment.boottime);
        let told = self.link.told_time(moment.boottime).is_some();
        let mesh = (self.link.mesh_time(moment.boottime), told);
        if let Err(error) = view_cache::store_lease(&self.dir, held, left, mesh, &moment) {
            tracing::error!(%error, "cannot keep what is left of the lease; a restart may find less of it, or none");
        }
    }

    /// Keeps where peers were heard and with whom there are sessions, if that changed: the next start begins with them. It outlives a time
    /// without a view; of hosts that are no peers any more, nothing is kept. Returns whether something was written.
    ///
    /// # Errors
    /// [`StateError`]; it is tried again at the next change.
    fn persist_peers(&mut self) -> Result<bool, StateError> {
        let Some(view) = self.link.installed_content() else {
            return Ok(false);
        };
        let mut heard = self.heard.clone();
        heard.retain(|host, _| view.peers.contains_key(host));
        let mut live = BTreeSet::new();
        for peer in self.engine.peers(clock::now()) {
            heard.extend(peer.endpoint.map(|endpoint| (peer.host, endpoint.remote)));
            live.extend(peer.session_age.map(|_| peer.host));
        }
        let (moved, changed) = (self.heard != heard, self.live.as_ref() != Some(&live));
        if moved {
            view_cache::store_endpoints(&self.dir, &heard)?;
            self.heard = heard;
        }
        if changed {
            view_cache::store_live(&self.dir, &live)?;
            self.live = Some(live);
        }
        Ok(moved || changed)
    }

    fn take_hints(&self, hints: Vec<cloison_proto::control::coordinator::PeerHint>) {
        for hint in hints {
            let known = Hint {
                candidates: hint.endpoints.iter().map(|e| e.0).collect(),
                incarnation: hint.incarnation,
            };
            self.engine.hint(hint.host, &known);
        }
    }
}

/// The window of a certificate, if it is this host's for its key.
fn own_window(der: &[u8], us: &Membership, identity: &SigningKey) -> Option<Window> {
    let wanted = SpiffeId {
        mesh: us.mesh,
        role: Role::Host(us.host),
    };
    match check_host(der, wanted, &identity.identity()) {
        Ok(window) => Some(window),
        Err(error) => {
            tracing::warn!(%error, "the certificate on disk is of no use; asking for a new one");
            None
        }
    }
}

/// What the data plane needs to know of the configuration.
#[must_use]
pub fn plane_config(config: &Config, nudge: Nudge) -> dataplane::Config {
    dataplane::Config {
        tun: config.interface.clone(),
        table: config.table.clone(),
        port: config.listen_port,
        workers: config.workers,
        mtu: config.mtu,
        accepted: config.accepted.clone(),
        loopback_guard: config.loopback_guard,
        guard_place: guard::place(),
        resolver: config.resolver,
        nudge,
    }
}

/// Whether this process can make TUNs at all: better said once at the start than for each component. Opening the device makes nothing.
fn check_means() -> Result<(), RunError> {
    use rustix::thread::{CapabilitySet, capabilities};
    if !capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::NET_ADMIN)) {
        return Err(RunError::Privilege);
    }
    let device = std::fs::OpenOptions::new().read(true).write(true).open(TUN_DEVICE);
    device.map(drop).map_err(RunError::NoTun)
}

fn random() -> Result<u64, RunError> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(RunError::Entropy)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Runs what blocks where it may.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, std::io::Error> {
    tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other)
}
