//! From the store's state to each host's signed view: a reconciler.
//!
//! It is woken without being told why, and also now and then: it takes the inventory as it is, compiles what may have changed, compares each
//! view's hash with the one kept in the store, keeps the new hashes with the revision, signs, and gives the views to the [`Hub`], whose links
//! send them. Doing it twice changes nothing. What was not kept is not sent, so that after a restart nobody's version goes back (I12).
//!
//! Who joins, leaves or is revoked, and which policy is in force, all come this one way.

mod endpoint;
mod gate;
mod hub;
mod offer;
mod slot;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use cloison_proto::id::HostId;
use cloison_proto::signed::Signed;
use cloison_proto::version::Version;
use cloison_proto::view::{Header, Items, StateHash};
use sha2::{Digest as _, Sha256};
use tokio::time::{MissedTickBehavior, interval};

pub use endpoint::candidates;
pub use gate::{Gate, Policies, Unreadable};
pub use hub::{Hub, Progress, Refusal, Welcome};
pub use offer::Offer;
pub use slot::{Farewell, Slot};

use crate::failpoint::failpoint;
use crate::inventory::Inventory;
use crate::policy::{Plan, ViewLimit};
use crate::store::{Store, StoreError, ViewMark};
use crate::trust::Roots;

/// How often the reconciler looks without being woken.
const PERIOD: Duration = Duration::from_secs(30);

/// How long it waits after a failure.
const RETRY: Duration = Duration::from_secs(2);

/// Why nothing was published. Whatever was before stays, until its leases end.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The policy in force cannot be read.
    #[error(transparent)]
    Policy(#[from] Unreadable),
    /// The mesh is too large.
    #[error(transparent)]
    Limit(#[from] ViewLimit),
    /// The store could not keep or give what was needed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The compiler failed.
    #[error("the compiler stopped in the middle")]
    Compiler,
}

/// Keeps every host's offered view in step with the store.
#[derive(Debug)]
pub struct Publisher {
    store: Store,
    roots: Arc<Roots>,
    hub: Arc<Hub>,
    policies: Policies,
    memory: tokio::sync::Mutex<Memory>,
}

/// What was published last.
#[derive(Debug, Default)]
struct Memory {
    /// Generation of that inventory.
    generation: u64,
    /// Content revision of the inventory that it was compiled from, and a hash over the statements of trust.
    content: Option<(u64, [u8; 32])>,
    fingerprints: HashMap<HostId, [u8; 32]>,
    /// As kept in the store; read at the first pass.
    marks: Option<BTreeMap<HostId, ViewMark>>,
}

/// A view that was compiled.
struct Compiled {
    host: HostId,
    items: Arc<Items>,
    hash: StateHash,
}

/// All that one pass compiled.
struct Pass {
    fingerprints: HashMap<HostId, [u8; 32]>,
    compiled: Vec<Compiled>,
    failed: Vec<(HostId, ViewLimit)>,
}

impl Publisher {
    /// A publisher of what `store` holds, signed by `roots`.
    #[must_use]
    pub fn new(store: Store, roots: Arc<Roots>) -> Arc<Self> {
        let hub = Hub::new(Arc::clone(&roots), store.inventory().overlay);
        Arc::new(Self {
            store,
            roots,
            hub: Arc::new(hub),
            policies: Policies::default(),
            memory: tokio::sync::Mutex::default(),
        })
    }

    /// Where the views go.
    #[must_use]
    pub const fn hub(&self) -> &Arc<Hub> {
        &self.hub
    }

    /// Publishes whatever changes, for ever.
    pub async fn run(self: Arc<Self>) {
        let mut changes = self.store.subscribe();
        let mut keys = self.roots.subscribe();
        let mut period = interval(PERIOD);
        period.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = period.tick() => {}
                changed = changes.changed() => if changed.is_err() { return },
                changed = keys.changed() => if changed.is_err() { return },
            }
            if let Err(error) = self.reconcile().await {
                tracing::error!(%error, "views could not be published; hosts keep what they have until their leases end");
                tokio::time::sleep(RETRY).await;
                period.reset_immediately();
            }
        }
    }

    /// Brings every offered view up to the store's state. Nothing happens if it is there already.
    ///
    /// # Errors
    /// [`PublishError`]; nothing was published then.
    pub async fn reconcile(&self) -> Result<(), PublishError> {
        let mut memory = self.memory.lock().await;
        let inventory = self.store.inventory();
        // Revocation must not wait for the compiler.
        self.hub.set_hosts(inventory.hosts.keys().copied(), inventory.overlay);
        if inventory.read_only.is_some() || memory.generation != inventory.version.generation {
            // Another generation: what was compiled for the one before says nothing.
            *memory = Memory {
                generation: inventory.version.generation,
                ..Memory::default()
            };
        }
        if inventory.read_only.is_some() {
            self.hub.suspend();
            return Ok(());
        }
        let trust = self.roots.statements(&inventory.addresses);
        let digest = trust_digest(&trust);
        if memory.content == Some((inventory.content_revision, digest)) {
            self.hub.publish(inventory.version, digest, Vec::new());
            return Ok(());
        }
        if memory.marks.is_none() {
            memory.marks = Some(self.store.view_marks().await?);
        }
        let known = std::mem::take(&mut memory.fingerprints);
        let policy = self.policies.in_force(&inventory)?;
        let source = Arc::clone(&inventory);
        let pass = tokio::task::spawn_blocking(move || {
            let plan = Plan::new(policy, source)?;
            Ok::<_, ViewLimit>(compile(&plan, &trust, &known))
        });
        let pass = pass.await.map_err(|_| PublishError::Compiler)??;
        failpoint!(Compiled);
        self.keep(&mut memory, &inventory, &pass).await?;
        failpoint!(ViewsKept);
        let offers = self.sign(&memory, &inventory, pass.compiled);
        for (host, error) in &pass.failed {
            tracing::error!(%host, %error, "a host's view could not be compiled; its lease is not renewed");
            self.hub.withdraw(*host);
        }
        memory.fingerprints = pass.fingerprints;
        memory.content = Some((inventory.content_revision, digest));
        self.hub.publish(inventory.version, digest, offers);
        Ok(())
    }

    /// Signs what was compiled, each view at the revision of its mark.
    fn sign(&self, memory: &Memory, inventory: &Inventory, compiled: Vec<Compiled>) -> Vec<Offer> {
        let now = self.store.now();
        let offers = compiled.into_iter().filter_map(|view| {
            let mark = memory.marks.as_ref()?.get(&view.host)?;
            let header = Header {
                mesh: inventory.mesh,
                host: view.host,
                version: Version {
                    generation: inventory.version.generation,
                    revision: mark.revision,
                },
                state_hash: view.hash,
            };
            Some(Offer::new(&self.roots, header, view.items, inventory.lease, now))
        });
        offers.collect()
    }

    /// Keeps the marks of views that changed.
    async fn keep(&self, memory: &mut Memory, inventory: &Inventory, pass: &Pass) -> Result<(), StoreError> {
        let marks = memory.marks.get_or_insert_default();
        let differs = |view: &&Compiled| marks.get(&view.host).is_none_or(|mark| mark.state_hash != view.hash.0);
        let changed: Vec<_> = pass.compiled.iter().filter(differs).collect();
        // A view that changes without the mesh's state (by another compiler, or an authority) needs a revision of its own: one version
        // never has two contents.
        let taken = changed.iter().any(|view| {
            marks
                .get(&view.host)
                .is_some_and(|mark| mark.revision >= inventory.version.revision)
        });
        let revision = if taken {
            self.store.raise_revision().await?
        } else {
            inventory.version.revision
        };
        let new = |view: &Compiled| {
            (
                view.host,
                ViewMark {
                    revision,
                    state_hash: view.hash.0,
                },
            )
        };
        let changed: Vec<_> = changed.into_iter().map(new).collect();
        self.store.record_view_marks(&changed).await?;
        marks.extend(changed);
        marks.retain(|host, _| inventory.hosts.contains_key(host));
        Ok(())
    }
}

/// A hash over statements of trust.
#[must_use]
pub fn trust_digest(trust: &[Signed]) -> [u8; 32] {
    let mut items: Vec<_> = trust.iter().map(Signed::to_bytes).collect();
    items.sort_unstable();
    let mut hash = Sha256::new();
    items.iter().for_each(|item| hash.update(Sha256::digest(item)));
    hash.finalize().into()
}

/// Compiles the view of every host whose fingerprint is not the known one.
fn compile(plan: &Plan, trust: &[Signed], known: &HashMap<HostId, [u8; 32]>) -> Pass {
    let mut pass = Pass {
        fingerprints: plan.fingerprints(trust),
        compiled: Vec::new(),
        failed: Vec::new(),
    };
    let mut hosts: Vec<_> = plan.inventory().hosts.keys().copied().collect();
    hosts.retain(|host| known.get(host) != pass.fingerprints.get(host));
    for host in hosts {
        match plan.items(host, trust) {
            Ok(Some(items)) => pass.compiled.push(Compiled {
                host,
                hash: items.hash(),
                items: Arc::new(items),
            }),
            Ok(None) => {}
            Err(error) => {
                pass.fingerprints.remove(&host);
                pass.failed.push((host, error));
            }
        }
    }
    pass
}

#[cfg(test)]
mod tests;
