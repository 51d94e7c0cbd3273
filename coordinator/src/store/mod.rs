//! The store: the mesh's whole state, as use cases. All SQL of the project is in this folder.
//!
//! A change goes: begin the one writing transaction ([`change`]) -> judge and write -> audit leaf, revision + 1, new inventory, gate ->
//! commit, fsync -> hand the new inventory to whoever waits. What is not committed was never seen by anybody; a commit that fails on IO
//! ends the process, because nobody can say what is on the disk then.
//!
//! The files: `db` opens and maps errors; `change` is the transaction; `snapshot` reads an inventory; `addresses` gives instances their
//! addresses; `policy`, `hosts`, `certificates`, `tokens`, `redeem`, `credentials`, `mesh`, `log` are the use cases.

mod error;
mod model;

pub use error::{OpenError, RedeemError, StoreError};
pub use model::*;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use cloison_proto::id::{CredentialId, HostId, TokenId};
use cloison_proto::key::IdentityKey;
use cloison_proto::label::HostName;
use cloison_proto::version::MeshTime;
use tokio::sync::watch;

use crate::audit::Context;
use crate::credential::Principal;
use crate::entropy::Environment;
use crate::inventory::{Inventory, PolicyVersion, StoredPolicy};

/// The mesh's state. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Store(Arc<()>);

impl Store {
    /// Makes the database of a new mesh at `path`.
    pub async fn create(_path: &Path, _env: Environment, _mesh: NewMesh) -> Result<Self, OpenError> { todo!() }
    /// Opens the database at `path`, brings its schema up to date and checks that it is sound.
    pub async fn open(_path: &Path, _env: Environment) -> Result<Self, OpenError> { todo!() }
    /// A new mesh in memory, for tests and the simulation: the same code on the same engine.
    pub async fn in_memory(_env: Environment, _mesh: NewMesh) -> Result<Self, OpenError> { todo!() }
    /// Sets who judges every change of policy, hosts and labels from now on (the compiler's limits).
    pub fn set_gate(&self, _gate: Arc<dyn Gate>) { todo!() }
    /// Sets what happens when a commit fails on IO; unset, the process ends with exit code 74.
    pub fn set_fatal_hook(&self, _hook: Arc<dyn Fn(&str) + Send + Sync>) { todo!() }
    /// Closes the database, after the last change.
    pub async fn close(&self) { todo!() }

    /// The mesh as of the last committed change. Costs nothing.
    pub fn inventory(&self) -> Arc<Inventory> { todo!() }
    /// Wakes with each committed change: the publisher's alarm. It carries the inventory, and skips to the last one.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Inventory>> { todo!() }
    /// The time, as the store judges tokens and credentials by it.
    pub fn now(&self) -> MeshTime { todo!() }

    // mesh
    pub async fn set_mesh(&self, _cx: Context, _change: MeshChange) -> Result<u64, StoreError> { todo!() }

    // policy
    pub async fn put_policy(&self, _cx: Context, _write: PolicyWrite, _if_match: IfMatch) -> Result<PolicyWritten, StoreError> { todo!() }
    /// A policy of the last 32.
    pub async fn policy(&self, _version: PolicyVersion) -> Result<StoredPolicy, StoreError> { todo!() }

    // hosts (revision + 1 each; the new revision is returned)
    /// All hosts ordered by name; revoked ones too if asked for.
    pub async fn list_hosts(&self, _with_revoked: bool) -> Result<Vec<HostRecord>, StoreError> { todo!() }
    pub async fn host(&self, _id: HostId) -> Result<HostRecord, StoreError> { todo!() }
    pub async fn label_host(&self, _cx: Context, _id: HostId, _change: LabelChange) -> Result<u64, StoreError> { todo!() }
    pub async fn rename_host(&self, _cx: Context, _id: HostId, _name: HostName) -> Result<u64, StoreError> { todo!() }
    /// Final: name and addresses become free (the addresses after 30 days), the keys never.
    pub async fn revoke_host(&self, _cx: Context, _id: HostId) -> Result<u64, StoreError> { todo!() }
    /// Clears the `contested` mark.
    pub async fn settle_host(&self, _cx: Context, _id: HostId) -> Result<u64, StoreError> { todo!() }

    // contact with hosts (no leaf, no revision)
    pub async fn record_seen(&self, _id: HostId, _incarnation: u64) -> Result<(), StoreError> { todo!() }
    /// Audits that two links of one host with diverging incarnations were seen.
    pub async fn record_cloned(&self, _id: HostId) -> Result<(), StoreError> { todo!() }
    /// Keeps at which revision which hosts' views last changed, all in one transaction, before they are sent.
    pub async fn record_view_marks(&self, _marks: &[(HostId, ViewMark)]) -> Result<(), StoreError> { todo!() }
    pub async fn view_marks(&self) -> Result<BTreeMap<HostId, ViewMark>, StoreError> { todo!() }

    // certificates (audited, no revision)
    /// Keeps a certificate before it is given out; the one in use stays good until this one is used.
    pub async fn record_certificate(&self, _id: HostId, _serial: Serial, _not_after: MeshTime) -> Result<(), StoreError> { todo!() }
    /// Judges the certificate that a host's link was opened with, and promotes it if it is the next one.
    pub async fn admit_certificate(&self, _id: HostId, _serial: Serial) -> Result<Result<(), HostRefusal>, StoreError> { todo!() }
    /// Whose identity key this is, if that host may have a new certificate by it alone.
    pub async fn renewable(&self, _identity: &IdentityKey) -> Result<Result<HostId, HostRefusal>, StoreError> { todo!() }

    // tokens
    pub async fn create_token(&self, _cx: Context, _spec: TokenSpec) -> Result<NewToken, StoreError> { todo!() }
    pub async fn list_tokens(&self) -> Result<Vec<TokenRecord>, StoreError> { todo!() }
    pub async fn revoke_token(&self, _cx: Context, _id: TokenId) -> Result<(), StoreError> { todo!() }
    /// Consumes the token, creates the host, gives addresses, audits: all or nothing.
    pub async fn redeem_token(&self, _attempt: &Redemption) -> Result<Redeemed, RedeemError> { todo!() }

    // credentials
    pub async fn create_credential(&self, _cx: Context, _spec: CredentialSpec) -> Result<NewCredential, StoreError> { todo!() }
    pub async fn list_credentials(&self) -> Result<Vec<CredentialRecord>, StoreError> { todo!() }
    pub async fn revoke_credential(&self, _cx: Context, _id: CredentialId) -> Result<(), StoreError> { todo!() }
    /// Who shows this bearer text; `None` for every kind of wrong one.
    pub async fn authenticate(&self, _bearer: &str) -> Result<Option<Principal>, StoreError> { todo!() }

    // audit
    /// Leaves with a position above `after`, in order.
    pub async fn audit_page(&self, _after: u64, _limit: u32) -> Result<AuditPage, StoreError> { todo!() }
}
