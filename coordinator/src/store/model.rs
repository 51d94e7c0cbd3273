//! What goes into the store and comes out of it, besides the inventory.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use cloison_proto::id::{CredentialId, HostId, MeshId, TokenId};
use cloison_proto::key::{IdentityKey, Secret32, WgPublicKey};
use cloison_proto::label::{ComponentName, LabelKey, LabelSet};
use cloison_proto::net::{AddressPair, OverlayRange};
use cloison_proto::version::MeshTime;

use crate::audit::Leaf;
use crate::credential::{CredentialText, Scope};
use crate::enrollment::token::{NameRule, SourceRule};
use crate::inventory::{CoordinatorAddress, Host, Inventory, Placement, PolicyVersion};

/// What a mesh begins with.
#[derive(Debug, Clone)]
pub struct NewMesh {
    /// Which mesh: chosen by `init`, which writes it into the certificates too.
    pub mesh: MeshId,
    /// Where addresses are drawn from.
    pub overlay: OverlayRange,
    /// How long a view may be used without contact with the coordinator.
    pub lease: Duration,
    /// Where agents reach the coordinator.
    pub addresses: Vec<CoordinatorAddress>,
}

/// Settings of the mesh that can change while it runs. `None` leaves a setting as it is.
#[derive(Debug, Clone, Default)]
pub struct MeshChange {
    /// Another range; refused while any instance has an address of the present one.
    pub overlay: Option<OverlayRange>,
    /// Another lease: 10 seconds to 90 days.
    pub lease: Option<Duration>,
    /// Other addresses of the coordinator.
    pub addresses: Option<Vec<CoordinatorAddress>>,
}

/// A policy to be stored. Its author's text was parsed, checked and tested before.
#[derive(Debug, Clone)]
pub struct PolicyWrite {
    /// The document.
    pub text: String,
    /// Where each component runs.
    pub placements: Vec<Placement>,
}

/// Which policy the writer believes to be in force (RFC 9110 sections 13.1.1 and 13.1.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IfMatch {
    /// Whatever it is.
    Any,
    /// None yet.
    Absent,
    /// This one.
    Version(PolicyVersion),
}

/// A stored policy's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PolicyWritten {
    /// The policy's own.
    pub version: PolicyVersion,
    /// The mesh's revision at which it came into force.
    pub revision: u64,
}

/// Says whether the mesh may look like this: called inside the transaction of every change of policy, hosts or labels, with the inventory
/// as it would be. What it refuses does not happen.
pub trait Gate: Send + Sync {
    /// Judges `after`.
    ///
    /// # Errors
    /// The code and the explanation for whoever asked for the change.
    fn check(&self, after: &Inventory) -> Result<(), GateRefusal>;
}

/// Why the mesh may not look like this.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GateRefusal {
    /// Stable code for the API, like `view_limit`.
    pub code: &'static str,
    /// What would be wrong, and what to do.
    pub detail: String,
}

/// Everything known about a host, for lists and for the link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostRecord {
    /// Who it is.
    pub host: Arc<Host>,
    /// Its certificates.
    pub certificates: Certificates,
    /// When it was last in contact.
    pub last_seen: Option<MeshTime>,
    /// Its incarnation as last heard.
    pub incarnation: Option<u64>,
    /// Which view was last compiled for it.
    pub view: Option<ViewMark>,
    /// When it was revoked. A revoked host's record and keys stay forever.
    pub revoked_at: Option<MeshTime>,
}

/// A certificate's serial number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Serial(pub [u8; 16]);

/// A host's certificates: the one it uses, and one that was issued and not yet seen in use. Both are good until the second is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Certificates {
    /// In use: serial and end.
    pub current: Option<(Serial, MeshTime)>,
    /// Issued.
    pub next: Option<(Serial, MeshTime)>,
}

/// The revision at which a host's view last changed, and that view's hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ViewMark {
    /// Revision.
    pub revision: u64,
    /// SHA-256 over the view's items.
    pub state_hash: [u8; 32],
}

/// A change of a host's labels.
#[derive(Debug, Clone, Default)]
pub struct LabelChange {
    /// Labels that it has afterwards.
    pub set: LabelSet,
    /// Labels that it does not have afterwards.
    pub remove: BTreeSet<LabelKey>,
}

/// A token to be made.
#[derive(Debug, Clone)]
pub struct TokenSpec {
    /// How many hosts may join by it, 1 to 100.
    pub uses: u32,
    /// How long, from now: at most 30 days.
    pub lifetime: Duration,
    /// Which name the host gets.
    pub name: NameRule,
    /// Which labels the host gets.
    pub labels: LabelSet,
    /// From where it may be used.
    pub source: Option<SourceRule>,
}

/// A token just made. Its secret is nowhere else.
#[derive(Debug)]
pub struct NewToken {
    /// Its public part.
    pub id: TokenId,
    /// Its secret part.
    pub secret: Secret32,
    /// Until when.
    pub expires: MeshTime,
}

/// A token as listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRecord {
    /// Its public part.
    pub id: TokenId,
    /// How many hosts may still join by it.
    pub uses_left: u32,
    /// Until when.
    pub expires: MeshTime,
    /// Which name the host gets.
    pub name: NameRule,
    /// Which labels the host gets.
    pub labels: LabelSet,
    /// From where it may be used.
    pub source: Option<SourceRule>,
    /// When it was made.
    pub created_at: MeshTime,
    /// When it was revoked.
    pub revoked_at: Option<MeshTime>,
    /// Who joined by it, with the time.
    pub redeemed: Vec<(HostId, MeshTime)>,
}

/// An attempt to join. That the joiner has the private halves of both keys was proved before.
#[derive(Debug)]
pub struct Redemption {
    /// The token's public part.
    pub token: TokenId,
    /// The secret that the joiner showed.
    pub secret: Secret32,
    /// The joiner's WireGuard key.
    pub wg_key: WgPublicKey,
    /// The joiner's identity key: the one its TLS handshake was signed with.
    pub identity: IdentityKey,
    /// Where it came from.
    pub source: IpAddr,
}

/// A host that joined, now or up to ten minutes ago by the very same attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redeemed {
    /// The host.
    pub host: Arc<Host>,
    /// Whether this attempt repeated an earlier one.
    pub repeated: bool,
    /// The instances it has at this moment.
    pub instances: Vec<(ComponentName, AddressPair)>,
}

/// Why a host may not renew its certificate, or may not link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HostRefusal {
    /// No host has this identity key, or this id.
    #[error("no such host")]
    Unknown,
    /// The host was revoked.
    #[error("the host was revoked")]
    Revoked,
    /// The certificate is neither the one in use nor the one issued last.
    #[error("the certificate was replaced by a newer one that is in use")]
    Superseded,
    /// The host was out of contact for more than 30 days.
    #[error("the host was out of contact for more than 30 days: it has to join again")]
    TooLate,
}

/// A credential to be made.
#[derive(Debug, Clone)]
pub struct CredentialSpec {
    /// What it is for, 1 to 63 characters.
    pub name: String,
    /// What it allows. Not empty.
    pub scopes: BTreeSet<Scope>,
    /// How long, from now: at most 400 days.
    pub lifetime: Duration,
}

/// A credential just made. Its secret is nowhere else.
#[derive(Debug)]
pub struct NewCredential {
    /// Both parts: `text.reveal()` is what its holder keeps.
    pub text: CredentialText,
    /// Until when.
    pub expires: MeshTime,
}

/// A credential as listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CredentialRecord {
    /// Its public part.
    pub id: CredentialId,
    /// What it is for.
    pub name: String,
    /// What it allows.
    pub scopes: BTreeSet<Scope>,
    /// When it was made.
    pub created_at: MeshTime,
    /// Until when.
    pub expires: MeshTime,
    /// When it was last used, to about five minutes.
    pub last_used: Option<MeshTime>,
    /// When it was revoked.
    pub revoked_at: Option<MeshTime>,
}

/// Leaves in order, at most 500 a page.
#[derive(Debug, Clone)]
pub struct AuditPage {
    /// The leaves.
    pub leaves: Vec<Leaf>,
    /// What to ask with for the next page; none at the end.
    pub next: Option<u64>,
}
