//! The data plane of a host: makes the machine look as the view in force says, and keeps it so.
//!
//! A view goes: [`attach::plan`] -> sites (base tables, TUNs, addresses, routes) -> [`Engine::install`] -> workers. An instance whose place
//! cannot be made gets no TUN, so that nothing reaches it and it reaches nothing; the [`Report`] says why.
//!
//! All calls block for milliseconds, and work in other namespaces on threads of their own: they belong on a thread that may wait. When a
//! [`Dataplane`] is dropped, the host's TUN stays with its addresses and routes, for the next agent to take up; so do those in other
//! namespaces that the service manager keeps open. Nobody reads them meanwhile, and everything that keeps overlay addresses from leaving in
//! clear stays as well. [`leave`] takes all that away.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use cloison_agent_core::TunId;
use cloison_agent_core::engine::Engine;
use cloison_agent_core::install::{Installed, LeaseTerm, Plan};
use cloison_agent_core::path_policy::Mesh;
use cloison_agent_core::wg::boringtun::BoringKey;
use cloison_agent_core::worker::Worker;
use cloison_proto::label::ComponentName;
use cloison_proto::net::OverlayRange;
use cloison_proto::view::View;
use tokio::runtime::Handle;

use crate::attach::base_table::TableName;
use crate::attach::cgroups::Tree;
use crate::attach::claim_table::ClaimTable;
use crate::attach::claims::{Claims, Kernel};
use crate::attach::container::Containers;
use crate::attach::nudge::Nudge;
use crate::attach::owners;
use crate::attach::selftest::Trial;
use crate::attach::site::{Common, Site};
use crate::attach::{self, Accepted, AddressConflict, Place, Unenforced, host, netns};
use crate::denials::notebook::Kept as Denied;
use crate::manager::{Kept, Manager};
use crate::names::dns::Resolvers;
use crate::netlink::NetlinkError;
use crate::netlink::monitor::RulesMonitor;
use crate::netlink::nftables::Nftables;
use crate::sys::InterfaceName;
use crate::sys::clock;
use crate::sys::netns::{NetNs, NetNsError};
use crate::sys::tun::{Tun, VNET_HEADER_LEN};
use crate::sys::with_causes;
use crate::udp::{Udp, UdpError};
use crate::worker::{KernelCounts, Tuns, Workers};

mod naming;
mod places;

use places::wanted;

/// The engine that the agent runs.
pub type MeshEngine = Engine<Mesh, BoringKey>;

/// What the agent's own configuration says about the data plane.
#[derive(Debug, Clone)]
pub struct Config {
    /// Name of each TUN.
    pub tun: InterfaceName,
    /// Name of each base table.
    pub table: TableName,
    /// WireGuard port; 0 takes any free one.
    pub port: u16,
    /// How many threads carry packets.
    pub workers: usize,
    /// MTU of each TUN in bytes; `None` finds it from the underlay.
    pub mtu: Option<u32>,
    /// Which attachments are accepted.
    pub accepted: Accepted,
    /// Whether a component that is a unit or a cgroup is reached on loopback by itself alone.
    pub loopback_guard: bool,
    /// Where the programs of that guard are pinned ([`attach::guard::place`]).
    pub guard_place: PathBuf,
    /// Whether names are answered by DNS in each namespace with a TUN, on the runtime of who starts the data plane.
    pub resolver: bool,
    /// Given when something changed that [`Dataplane::check`] should look at.
    pub nudge: Nudge,
}

/// Why the data plane cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No WireGuard socket.
    #[error(transparent)]
    Udp(#[from] UdpError),
    /// The agent's own namespace cannot be opened.
    #[error(transparent)]
    Namespace(#[from] NetNsError),
    /// No connection to nftables.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// No threads.
    #[error("cannot start the packet workers")]
    Workers(#[source] io::Error),
}

/// How an instance is enforced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Enforcement {
    /// Only the processes of a namespace can be it: which one, for people.
    Isolated(String),
    /// It shares the host's TUN, and the kernel binds its addresses to its processes: to which ones, for people. There may be none now.
    Bound(String),
    /// Every process of the host that no other component claims can be it.
    Shared,
    /// It is not attached; the reason.
    Unenforced(String),
}

impl Enforcement {
    /// Whether the instance has its addresses here.
    #[must_use]
    pub const fn is_attached(&self) -> bool {
        match self {
            Self::Isolated(_) | Self::Bound(_) | Self::Shared => true,
            Self::Unenforced(_) => false,
        }
    }
}

/// How each instance of this host is enforced.
pub type Report = BTreeMap<ComponentName, Enforcement>;

/// A view and what goes with it.
#[derive(Clone)]
pub struct InForce {
    /// What the view says.
    pub view: Arc<View>,
    /// Our keys, the one for new handshakes first.
    pub keys: Vec<Arc<BoringKey>>,
    /// How long it may be used; `None`: not at all, until [`Dataplane::renew`].
    pub lease: Option<LeaseTerm>,
}

/// The running data plane.
pub struct Dataplane {
    config: Config,
    engine: Arc<MeshEngine>,
    /// Takes the results of installations.
    installer: Worker<Mesh, BoringKey>,
    workers: Workers,
    host: Site,
    /// By where they were found, with who is there, for people.
    namespaces: BTreeMap<Place, (Site, String)>,
    containers: Containers,
    claims: Claims,
    /// The load of the host's base table whose sets were filled.
    filled: u64,
    /// Who answers for names there; declared behind the sites, and emptied before one of them goes.
    resolvers: Option<Resolvers>,
    tuns: BTreeMap<ComponentName, (TunId, Arc<Tun>)>,
    next_tun: u32,
    in_force: Option<InForce>,
    report: Report,
    /// Whether an instance is unenforced for a reason that may pass.
    retry: bool,
    /// Who keeps the TUNs open over a restart.
    manager: Manager,
    /// Which TUNs it keeps, each by the name of one of its components.
    handed: BTreeMap<ComponentName, TunId>,
    /// TUNs of the agent before, until the first view says where they belong.
    kept: Vec<Kept>,
    /// Whose TUNs were kept, until then.
    kept_for: Vec<String>,
}

/// Where each instance hangs, or why it does not.
type Settled = BTreeMap<ComponentName, Result<(Arc<Tun>, Enforcement), Unenforced>>;

impl Dataplane {
    /// Listens on the WireGuard port and starts the workers. Nothing passes until [`Dataplane::apply`].
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start(config: Config, engine: Arc<MeshEngine>) -> Result<Self, StartError> {
        Self::resume(config, engine, Manager::default(), Vec::new())
    }

    /// The same, with the TUNs that `manager` kept open while there was no agent; it is given each TUN from now on.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn resume(config: Config, engine: Arc<MeshEngine>, manager: Manager, kept: Vec<Kept>) -> Result<Self, StartError> {
        let mut host = Site::lasting(NetNs::current()?);
        let kept_for = kept.iter().map(|kept| kept.component.clone()).collect();
        let (at_host, kept): (Vec<_>, Vec<_>) = kept.into_iter().partition(|kept| kept.namespace.id() == host.id());
        at_host.into_iter().for_each(|kept| host.keep(kept.tun, &config.tun));
        let (nftables, rules) = host
            .namespace()
            .run(|| (Nftables::open(&config.table.to_string()), RulesMonitor::open()))?;
        let kernel = Kernel {
            nftables: nftables?,
            rules: rules.map_err(StartError::Workers)?,
            trial: Trial::new(host.namespace().run(NetNs::current)??, config.table.clone()),
            guard: config.guard_place.clone(),
        };
        let sockets = Udp::listen(config.port, config.workers)?;
        let claims = Claims::new(Tree::find(), Some(kernel), config.nudge.clone());
        let workers = Workers::start(&engine, sockets, claims.owners().clone(), config.nudge.clone()).map_err(StartError::Workers)?;
        Ok(Self {
            containers: Containers::new(&config.accepted, config.nudge.clone()),
            claims,
            filled: 0,
            resolvers: config.resolver.then(Handle::try_current).and_then(Result::ok).map(Resolvers::new),
            config,
            installer: engine.worker(),
            engine,
            workers,
            host,
            namespaces: BTreeMap::new(),
            tuns: BTreeMap::new(),
            next_tun: 0,
            in_force: None,
            report: Report::new(),
            retry: false,
            manager,
            handed: BTreeMap::new(),
            kept,
            kept_for,
        })
    }

    /// Makes a host that is of the mesh safe for its addresses, before there is a view: the base table and the `unreachable` routes, whatever
    /// other routes there are. What local programs send to the mesh must not follow those in clear.
    ///
    /// # Errors
    /// [`Unenforced`].
    pub fn prepare(&mut self, range: OverlayRange) -> Result<(), Unenforced> {
        let common = self.common(range)?;
        self.host.protect(&common)
    }

    /// Puts a view in force. When this returns, nothing passes that it does not allow.
    ///
    /// # Errors
    /// [`AddressConflict`]: this host uses the mesh's addresses for something else. Nothing was changed then.
    pub fn apply(&mut self, new: InForce) -> Result<Installed, AddressConflict> {
        let range = new.view.config.overlay;
        // A host that cannot even be looked at is not in conflict; `settle` says what is wrong with it.
        if let Ok(Some(conflict)) = self.host.conflict(range, &self.config.table) {
            // Any neighbour on the link can bring a route about, by a router advertisement. It must not keep a withdrawn rule in force.
            if self.in_force.as_ref().is_none_or(|held| held.view.config.overlay != range) {
                return Err(conflict);
            }
            tracing::warn!(%conflict, "what follows this route to the mesh's addresses is dropped");
        }
        let settled = self.settle(&new.view);
        let gone = self.take_tuns(settled);
        let installed = self.install(&new, &gone);
        self.serve_names(&new.view);
        self.forget_namespaces(&new.view);
        self.forget_kept();
        self.in_force = Some(new);
        Ok(installed)
    }

    /// Renews the lease of the view in force.
    pub fn renew(&mut self, term: LeaseTerm) {
        if let Some(in_force) = &mut self.in_force {
            in_force.lease = Some(term);
            self.engine.renew(term);
        }
    }

    /// Looks whether the machine still is as it was made, and repairs it: a base table that somebody removed, a TUN that was deleted, a
    /// namespace that came or went. To be called every few seconds. Returns whether the report changed.
    pub fn check(&mut self) -> bool {
        let Some(in_force) = self.in_force.clone() else { return false };
        if self.is_healthy() && !self.retry {
            self.serve_names(&in_force.view);
            return self.show_claims();
        }
        let (report, tuns) = (self.report.clone(), self.tun_ids());
        let settled = self.settle(&in_force.view);
        let gone = self.take_tuns(settled);
        if self.tun_ids() != tuns {
            self.install(&in_force, &gone);
        }
        self.serve_names(&in_force.view);
        self.report != report
    }

    /// How each instance of this host is enforced.
    #[must_use]
    pub const fn report(&self) -> &Report {
        &self.report
    }

    /// Whose the sockets and addresses of the host's own namespace are.
    #[must_use]
    pub const fn owners(&self) -> &owners::Shared {
        self.claims.owners()
    }

    /// Whether there are claims and this kernel does not tell whose sockets are: components that are a user's receive nothing then.
    #[must_use]
    pub fn is_blind(&self) -> bool {
        self.workers.host_sockets().is_blind()
    }

    /// The WireGuard port.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.workers.port()
    }

    /// What the kernel made of the workers' results so far.
    #[must_use]
    pub fn counts(&self) -> KernelCounts {
        self.workers.counts()
    }

    /// Whether a worker ended by itself: the agent is to be restarted.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.workers.is_broken()
    }

    /// What was refused since this was last asked, as far as it was noted, with how many packets it was.
    #[must_use]
    pub fn take_denials(&self) -> HashMap<Denied, u64> {
        self.workers.notebook().take()
    }

    /// How many rounds each packet worker has ended.
    #[must_use]
    pub fn rounds(&self) -> Vec<u64> {
        self.workers.rounds()
    }

    /// Has every packet worker run a round, to show that it moves.
    pub fn wake(&self) {
        self.workers.wake();
    }

    /// Has handshakes that are wanted go out at once.
    pub fn tick_soon(&self) {
        self.workers.tick_soon();
    }

    fn common(&self, range: OverlayRange) -> Result<Common, Unenforced> {
        let found = host::mtu(self.host.namespace(), self.host.tun().map(|t| t.index()))?;
        self.workers.set_underlay_mtu(usize::try_from(found.underlay).unwrap_or(usize::MAX));
        let (tun, table) = (self.config.tun.clone(), self.config.table.clone());
        Ok(Common {
            tun,
            table,
            range,
            mtu: self.config.mtu.unwrap_or(found.tun),
            resolver: self.resolvers.is_some(),
        })
    }

    /// Gives each TUN its number and makes the report. Returns the TUNs that are no longer there, by their old numbers.
    fn take_tuns(&mut self, settled: Settled) -> Tuns {
        let old = std::mem::take(&mut self.tuns);
        self.report.clear();
        self.retry = false;
        for (component, attached) in settled {
            let enforcement = match attached {
                Ok((tun, enforcement)) => {
                    // Components of one place share its TUN, and a TUN keeps its number.
                    let mut known = old.values().chain(self.tuns.values());
                    let id = known.find(|(_, known)| Arc::ptr_eq(known, &tun)).map(|(id, _)| *id);
                    let id = id.unwrap_or_else(|| {
                        self.next_tun = self.next_tun.wrapping_add(1);
                        TunId(self.next_tun)
                    });
                    self.tuns.insert(component.clone(), (id, tun));
                    enforcement
                }
                Err(why) => {
                    self.retry |= why.may_pass();
                    Enforcement::Unenforced(with_causes(&why))
                }
            };
            self.report.insert(component, enforcement);
        }
        self.hand_to_manager();
        let mut gone: Tuns = old.into_values().collect();
        gone.retain(|id, _| self.tuns.values().all(|(kept, _)| kept != id));
        gone
    }

    /// Has the service manager keep each TUN once, by the name of the first component that uses it.
    fn hand_to_manager(&mut self) {
        let mut wanted: BTreeMap<ComponentName, (TunId, Arc<Tun>)> = BTreeMap::new();
        for (component, (id, tun)) in &self.tuns {
            if wanted.values().all(|(known, _)| known != id) {
                wanted.insert(component.clone(), (*id, tun.clone()));
            }
        }
        for component in self.handed.keys().filter(|component| !wanted.contains_key(*component)) {
            self.manager.forget(component.as_str());
        }
        for (component, (id, tun)) in &wanted {
            if self.handed.get(component) != Some(id) {
                self.manager.keep(component, tun);
            }
        }
        self.handed = wanted.into_iter().map(|(component, (id, _))| (component, id)).collect();
    }

    fn install(&mut self, new: &InForce, gone: &Tuns) -> Installed {
        let tun = |component: &ComponentName| self.tuns.get(component).map(|(id, _)| *id);
        let plan = Plan::from_view(
            &new.view,
            new.keys.clone(),
            new.lease,
            |instance| tun(&instance.component),
            |_, _| None,
        );
        let at_host = self
            .host
            .tun()
            .and_then(|tun| self.tuns.values().find(|(_, known)| Arc::ptr_eq(known, tun)));
        self.workers.set_host_tun(at_host.map(|(id, tun)| (*id, &**tun)));
        let installed = self.engine.install(&mut self.installer, plan, clock::now());
        let tuns: Tuns = self.tuns.values().cloned().collect();
        // Local ends of flows that were cut are told, also on a TUN that is about to go.
        for (packet, to) in self.installer.tun() {
            if let Some(tun) = tuns.get(&to).or_else(|| gone.get(&to)) {
                let _lost = tun.write(&[0; VNET_HEADER_LEN], packet);
            }
        }
        self.installer.end();
        self.workers.set_tuns(tuns);
        installed
    }

    /// Lets go of what was kept for components that have no TUN any more.
    fn forget_kept(&mut self) {
        self.kept.clear();
        for component in std::mem::take(&mut self.kept_for) {
            if !self.handed.keys().any(|handed| handed.as_str() == component) {
                self.manager.forget(&component);
            }
        }
    }

    fn tun_ids(&self) -> BTreeMap<ComponentName, TunId> {
        self.tuns.iter().map(|(component, (id, _))| (component.clone(), *id)).collect()
    }
}

/// What the base table of the host says, besides what it says everywhere, for this view.
#[must_use]
pub fn claim_table(config: &Config, view: &View) -> Option<ClaimTable> {
    Claims::table_of(wanted(&attach::plan(view, &config.accepted), config))
}

/// Takes away everything that a data plane with this configuration leaves behind on the host, and in the namespaces of its view, as far as
/// that is known. The data plane must have ended.
///
/// # Errors
/// The first [`Unenforced`], after having tried all of it.
pub fn leave(config: &Config, range: OverlayRange, view: Option<&View>) -> Result<(), Unenforced> {
    let clear = |namespace: Result<NetNs, Unenforced>| Site::new(namespace?).clear(range, &config.table);
    let home = NetNs::current()?;
    let id = home.id();
    let plan = view.map(|view| attach::plan(view, &config.accepted)).unwrap_or_default();
    Claims::unmark(Tree::find().as_ref(), &wanted(&plan, config).members, &config.guard_place);
    let sites = plan.sites;
    let mut containers = Containers::new(&config.accepted, Nudge::default());
    let namespaces = sites.into_values().filter_map(|(place, _)| match place {
        Place::Host | Place::Claimed(_) => None,
        Place::Netns(path) => Some(clear(netns::open(&path, &config.accepted, id))),
        Place::Container(engine, which) => Some(clear(containers.open(engine, &which).map(|found| found.namespace))),
    });
    // A namespace that is gone needs no cleaning.
    let gone = |error: &Unenforced| matches!(error, Unenforced::Namespace(NetNsError::Missing(_)) | Unenforced::Container(_));
    let namespaces = namespaces.filter(|result| !result.as_ref().is_err_and(gone));
    let results: Vec<_> = namespaces.chain(std::iter::once_with(|| clear(Ok(home)))).collect();
    results.into_iter().collect()
}

/// Makes this host safe for the mesh's addresses without a data plane: the base table and the `unreachable` routes. What is there already,
/// also of a running agent, stays.
///
/// # Errors
/// [`Unenforced`].
pub fn prepare(config: &Config, range: OverlayRange) -> Result<(), Unenforced> {
    let (tun, table) = (config.tun.clone(), config.table.clone());
    Site::new(NetNs::current()?).protect(&Common {
        tun,
        table,
        range,
        mtu: host::DEFAULT_MTU,
        resolver: config.resolver,
    })
}
