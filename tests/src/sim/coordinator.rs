//! The coordinator in memory: the real store, compiler, publisher and sessions, on the virtual clock.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use cloison_agent::state::identity::Membership;
use cloison_coordinator::audit::{Actor, Context};
use cloison_coordinator::clock::{ManualClock, MeshClock};
use cloison_coordinator::control::session::{Effect, Now, Peer, Session};
use cloison_coordinator::entropy::{Environment, SeededEntropy};
use cloison_coordinator::inventory::{CoordinatorAddress, Inventory, On, Placement};
use cloison_coordinator::publish::{Gate, Progress, Publisher};
use cloison_coordinator::store::{IfMatch, NewMesh, PolicyWrite, Redemption, Store, TokenSpec};
use cloison_coordinator::trust::Roots;
use cloison_proto::control::frame::Frame;
use cloison_proto::id::{HostId, MeshId};
use cloison_proto::key::{SigningKey, WgPrivateKey};
use cloison_proto::label::LabelSet;
use cloison_proto::policy::{self, Policy};
use cloison_proto::version::Timestamp;
use tokio::runtime::{Builder, Runtime};

use super::clock::{MESH_START, mesh_time};
use super::inventory::{overlay, policy};

const OPERATOR: Context = Context::of(Actor::Local);

/// A coordinator. When it restarts, its store stays, as a disk would.
pub struct Coordinator {
    runtime: Runtime,
    store: Store,
    roots: Arc<Roots>,
    publisher: Arc<Publisher>,
    clock: ManualClock,
}

impl Coordinator {
    /// The coordinator of a new mesh whose leases last that long.
    ///
    /// # Errors
    /// If there is no memory or no thread for it.
    pub fn new(seed: u64, lease: Duration) -> Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let clock = ManualClock::starting_at(MESH_START);
        let env = Environment {
            clock: MeshClock::over(clock.clone()),
            entropy: Arc::new(SeededEntropy::new(seed)),
        };
        let mesh = MeshId([7; 16]);
        let roots = Arc::new(Roots::generate(mesh, &env)?);
        let address = CoordinatorAddress {
            address: "192.0.2.1:7443".into(),
            not_before: MESH_START,
        };
        let new = NewMesh {
            mesh,
            overlay: overlay()?,
            lease,
            addresses: vec![address],
        };
        let store = runtime.block_on(Store::in_memory(env, new))?;
        store.set_gate(Box::new(Gate::new(Arc::clone(&roots))));
        let publisher = Publisher::new(store.clone(), Arc::clone(&roots));
        Ok(Self {
            runtime,
            store,
            roots,
            publisher,
            clock,
        })
    }

    /// Lets the coordinator's clock show this moment.
    pub fn set_time(&self, now: Timestamp) {
        let behind = mesh_time(now).0.saturating_sub(self.clock.now().0);
        self.clock.advance(Duration::from_secs(behind));
    }

    /// Joins a host of this name by a token made for it.
    ///
    /// # Errors
    /// If the store refuses it.
    pub fn join(&self, name: &str, key: &WgPrivateKey, identity: &SigningKey, source: IpAddr) -> Result<Membership> {
        let spec = TokenSpec {
            uses: 1,
            lifetime: Duration::from_secs(3_600),
            name: name.parse()?,
            labels: LabelSet::new(),
            source: None,
        };
        let token = self.runtime.block_on(self.store.create_token(OPERATOR, spec))?;
        let attempt = Redemption {
            token: token.id,
            secret: token.secret,
            wg_key: key.public(),
            identity: identity.identity(),
            source,
        };
        let joined = self.runtime.block_on(self.store.redeem_token(&attempt))?;
        Ok(Membership {
            mesh: self.store.inventory().mesh,
            host: joined.host.id,
            name: joined.host.name.clone(),
            root: self.roots.root_key(),
            trust: self.roots.statements(&self.store.inventory().addresses),
            known_time: self.clock.now(),
            addresses: Vec::new(),
        })
    }

    /// Puts a policy in force.
    ///
    /// # Errors
    /// If it is none, or is refused.
    pub fn apply(&self, text: &str) -> Result<Arc<Policy>> {
        let parsed = policy(text)?;
        let on = |on: &policy::On| match on {
            policy::On::Hosts(names) => names.iter().cloned().map(On::Name).collect(),
            policy::On::Labels(labels) => vec![On::Labels(labels.clone())],
        };
        let placements = parsed.components().iter().map(|(name, component)| Placement {
            component: name.clone(),
            on: on(&component.on),
        });
        let write = PolicyWrite {
            text: text.to_owned(),
            placements: placements.collect(),
        };
        self.runtime.block_on(self.store.put_policy(OPERATOR, write, IfMatch::Any))?;
        Ok(parsed)
    }

    /// Revokes a host.
    ///
    /// # Errors
    /// If there is none.
    pub fn revoke(&self, host: HostId) -> Result<()> {
        self.runtime.block_on(self.store.revoke_host(OPERATOR, host))?;
        Ok(())
    }

    /// Compiles and offers what changed.
    ///
    /// # Errors
    /// If nothing could be published.
    pub fn reconcile(&self) -> Result<()> {
        Ok(self.runtime.block_on(self.publisher.reconcile())?)
    }

    /// Begins anew with what is in the store. The links are for the caller to end.
    ///
    /// # Errors
    /// If nothing could be published.
    pub fn restart(&mut self) -> Result<()> {
        self.publisher = Publisher::new(self.store.clone(), Arc::clone(&self.roots));
        self.reconcile()
    }

    /// Opens a host's link with its first frame.
    ///
    /// # Errors
    /// If the mesh has no such host, or the frame is no greeting.
    pub fn open(&self, host: HostId, address: IpAddr, first: &Frame, now: Timestamp) -> Result<Session> {
        let record = self.runtime.block_on(self.store.host(host))?;
        let peer = Peer {
            host,
            address,
            incarnation: record.incarnation,
        };
        let (session, effects) = Session::open(self.publisher.hub(), peer, first, self.moment(now))?;
        for effect in effects {
            match effect {
                Effect::NoteSeen(incarnation) => self.runtime.block_on(self.store.record_seen(host, incarnation))?,
                Effect::NoteCloned => return Err(anyhow!("{host} was taken for a clone")),
                Effect::NoteHeld(_) | Effect::IssueCertificate | Effect::ChallengeKey | Effect::JudgeKey(_) => {}
            }
        }
        Ok(session)
    }

    /// Both times of the coordinator.
    #[must_use]
    pub fn moment(&self, now: Timestamp) -> Now {
        Now {
            mesh: self.clock.now(),
            monotonic: now,
        }
    }

    /// The mesh as it is.
    #[must_use]
    pub fn inventory(&self) -> Arc<Inventory> {
        self.store.inventory()
    }

    /// How far the views got.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.publisher.hub().progress()
    }

    /// Whether the audit log holds a leaf for every change, unbroken.
    ///
    /// # Errors
    /// If it does not.
    pub fn verify_audit(&self) -> Result<u64> {
        self.runtime.block_on(self.store.verify_audit()).context("the audit log is broken")
    }
}
