//! What the compiler lets the store write: no change makes a view that an agent would refuse, or two components out of one host's
//! processes. And the policy in force, parsed once.

use std::sync::Arc;

use cloison_proto::policy::{self, Policy};
use parking_lot::Mutex;

use crate::inventory::Inventory;
use crate::policy::{Plan, ViewLimit};
use crate::store;
use crate::trust::Roots;

/// The policy in force cannot be read: a newer program wrote it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the policy in force cannot be read ({problem}): was it applied through a newer coordinator? apply it again")]
pub struct Unreadable {
    /// The first finding.
    problem: String,
}

/// Parses policies, and remembers the last one.
#[derive(Debug, Default)]
pub struct Policies(Mutex<Option<(Arc<str>, Arc<Policy>)>>);

impl Policies {
    /// The policy of an inventory; the empty one if none was ever applied.
    ///
    /// # Errors
    /// [`Unreadable`].
    pub fn in_force(&self, inventory: &Inventory) -> Result<Arc<Policy>, Unreadable> {
        let Some(stored) = &inventory.policy else {
            return Ok(Arc::default());
        };
        let mut last = self.0.lock();
        if let Some((text, policy)) = &*last
            && (Arc::ptr_eq(text, &stored.text) || text == &stored.text)
        {
            return Ok(Arc::clone(policy));
        }
        let policy = policy::parse(&stored.text).map_err(|findings| Unreadable {
            problem: findings.first().map(|finding| finding.message.clone()).unwrap_or_default(),
        })?;
        let policy = Arc::new(policy);
        *last = Some((Arc::clone(&stored.text), Arc::clone(&policy)));
        Ok(policy)
    }
}

/// Judges changes inside the store's transactions.
#[derive(Debug)]
pub struct Gate {
    policies: Policies,
    roots: Arc<Roots>,
}

impl Gate {
    /// A gate for the mesh of `roots`.
    #[must_use]
    pub fn new(roots: Arc<Roots>) -> Self {
        Self {
            policies: Policies::default(),
            roots,
        }
    }
}

impl store::Gate for Gate {
    fn check(&self, after: &Inventory) -> Result<(), store::GateRefusal> {
        let refuse = |code, detail| store::GateRefusal { code, detail };
        let policy = self
            .policies
            .in_force(after)
            .map_err(|error| refuse("policy_unreadable", error.to_string()))?;
        let limit = |error: ViewLimit| refuse(ViewLimit::CODE, error.to_string());
        let plan = Plan::new(policy, Arc::new(after.clone())).map_err(limit)?;
        if let Some(conflict) = plan.conflicts().into_iter().find(|conflict| conflict.whole_host) {
            return Err(refuse("attachment_conflict", conflict.to_string()));
        }
        plan.check_limits(&self.roots.statements(&after.addresses)).map_err(limit)
    }
}
