//! Whom a host trusts: issuers of certificates, view-signing keys and coordinator addresses, each a signed statement with a not-before.
//!
//! The enrollment token pins the trust root's key; the root signs the first statements, and a trusted view-signing key may sign later ones,
//! so that every key and every address can change while old and new overlap. Certificates are told apart by role: their one URI says who
//! it is, their issuer and usage must fit ([`Role`]).

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use minicbor::{Decode, Encode};
use sha2::{Digest as _, Sha256};

use crate::id::{CoordinatorId, HostId, KeyId, MeshId};
use crate::key::{SigningKey, VerifyingKey};
use crate::signed::{Keys, Signed, SignedError};
use crate::version::MeshTime;
use crate::view::Items;

const CONTEXT: &str = "cloison/trust/v1";

/// How far the validity of a certificate begins before the moment of its issue: clocks that are a little behind take it at once, and whoever
/// was just given one learns from it what time it is.
pub const BACKDATED: Duration = Duration::from_secs(3600);

/// ALPN of a host's control link.
pub const ALPN_LINK: &[u8] = b"cloison-link/1";

/// ALPN of an enrollment, or of a renewal by identity key.
pub const ALPN_JOIN: &[u8] = b"cloison-join/1";

/// The DNS name in every coordinator's certificate: TLS libraries ask for one, identity is the URI.
pub const COORDINATOR_DNS_NAME: &str = "coordinator.cloison.internal";

/// What a certificate may speak for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A coordinator: `spiffe://<mesh>/coordinator/<id>`, for server authentication only.
    Coordinator(CoordinatorId),
    /// A host: `spiffe://<mesh>/host/<id>`, for client authentication only.
    Host(HostId),
}

/// The URI of a certificate: mesh and role (SPIFFE ID section 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpiffeId {
    /// The mesh.
    pub mesh: MeshId,
    /// Who in it.
    pub role: Role,
}

/// A URI that is not one of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected spiffe://<mesh>/host/<id> or spiffe://<mesh>/coordinator/<id>")]
pub struct BadSpiffeId;

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.role {
            Role::Coordinator(id) => write!(f, "spiffe://{}/coordinator/{id}", self.mesh),
            Role::Host(id) => write!(f, "spiffe://{}/host/{id}", self.mesh),
        }
    }
}

impl FromStr for SpiffeId {
    type Err = BadSpiffeId;
    fn from_str(text: &str) -> Result<Self, BadSpiffeId> {
        let mut parts = text.strip_prefix("spiffe://").ok_or(BadSpiffeId)?.split('/');
        let (mesh, role, id) = (parts.next(), parts.next(), parts.next());
        let (Some(mesh), Some(role), Some(id), None) = (mesh, role, id, parts.next()) else {
            return Err(BadSpiffeId);
        };
        let role = match role {
            "host" => Role::Host(id.parse().map_err(|_| BadSpiffeId)?),
            "coordinator" => Role::Coordinator(id.parse().map_err(|_| BadSpiffeId)?),
            _ => return Err(BadSpiffeId),
        };
        Ok(Self {
            mesh: mesh.parse().map_err(|_| BadSpiffeId)?,
            role,
        })
    }
}

/// What a token pins: SHA-256 of the root's SubjectPublicKeyInfo (RFC 8410 section 4).
#[must_use]
pub fn root_pin(root: &VerifyingKey) -> [u8; 32] {
    /// SEQUENCE { SEQUENCE { OID 1.3.101.112 }, BIT STRING }: all that stands before the key.
    const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
    Sha256::new()
        .chain_update(SPKI_PREFIX)
        .chain_update(root.as_bytes())
        .finalize()
        .into()
}

/// What a statement is about. An unknown kind cannot be read and so is trusted for nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
#[cbor(index_only)]
pub enum TrustKind {
    /// A certificate authority for hosts: DER of its certificate.
    #[n(1)]
    HostIssuer,
    /// A certificate authority for coordinators: DER of its certificate.
    #[n(2)]
    CoordinatorIssuer,
    /// A key that signs views, leases and trust items: its 32 bytes.
    #[n(3)]
    ViewSigner,
    /// Where a coordinator listens: `host:port` as text.
    #[n(4)]
    CoordinatorAddress,
}

/// One statement of trust.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Statement {
    /// The mesh.
    #[n(0)]
    pub mesh: MeshId,
    /// What it is about.
    #[n(1)]
    pub kind: TrustKind,
    /// The certificate, key or address.
    #[cbor(n(2), with = "minicbor::bytes")]
    pub value: Vec<u8>,
    /// From when on it counts.
    #[n(3)]
    pub not_before: MeshTime,
}

/// How many fields a [`Statement`] has.
const STATEMENT_FIELDS: u32 = 4;

impl Statement {
    /// Signs the statement with the root or a view-signing key.
    #[must_use]
    pub fn sign(&self, key: &SigningKey) -> Signed {
        Signed::new(CONTEXT, key, self)
    }
}

/// Writes a trust item into a view.
pub fn put_in(items: &mut Items, item: &Signed) {
    crate::view::put_trust(items, item);
}

/// The value of a statement, whoever signed it: for looking whether a view names a key, never for trusting it.
#[must_use]
pub fn statement_values(item: &Signed) -> Option<Vec<u8>> {
    let statement: Statement = item.peek().ok()?;
    Some(statement.value)
}

/// All that a host or a coordinator trusts in one mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trust {
    mesh: MeshId,
    root: VerifyingKey,
    signers: Vec<VerifyingKey>,
    host_issuers: Vec<Vec<u8>>,
    coordinator_issuers: Vec<Vec<u8>>,
    addresses: Vec<String>,
}

/// Why a statement is not taken up.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// Not signed by the root or a trusted signer.
    #[error("the trust item's signature")]
    Signature(#[from] SignedError),
    /// About another mesh.
    #[error("the trust item is about {0}")]
    OtherMesh(MeshId),
    /// Its value is not what its kind asks for.
    #[error("the trust item's value is no {0}")]
    Value(&'static str),
}

impl Keys for Trust {
    /// A view-signing key, or the root.
    fn key(&self, id: KeyId) -> Option<VerifyingKey> {
        self.signers.iter().chain([&self.root]).copied().find(|k| k.id() == id)
    }
}

impl Trust {
    /// Trust in nothing but the root.
    #[must_use]
    pub const fn new(mesh: MeshId, root: VerifyingKey) -> Self {
        Self {
            mesh,
            root,
            signers: Vec::new(),
            host_issuers: Vec::new(),
            coordinator_issuers: Vec::new(),
            addresses: Vec::new(),
        }
    }

    /// Trust in the root and what `items` add at mesh time `now`; statements that do not count yet are left out.
    ///
    /// # Errors
    /// [`TrustError`] for the first item that does not hold.
    pub fn with_items<'a>(
        mesh: MeshId,
        root: VerifyingKey,
        items: impl IntoIterator<Item = &'a Signed>,
        now: MeshTime,
    ) -> Result<Self, TrustError> {
        let mut trust = Self::new(mesh, root);
        let mut waiting: Vec<&Signed> = items.into_iter().collect();
        // An item may be signed by a key that another item introduces: take up what holds until nothing more does.
        loop {
            let before = waiting.len();
            let mut refused = None;
            waiting.retain(|item| match trust.admit(item, now) {
                Ok(()) => false,
                Err(error) => {
                    refused.get_or_insert(error);
                    true
                }
            });
            match refused {
                None => return Ok(trust),
                Some(error) if waiting.len() == before => return Err(error),
                Some(_) => {}
            }
        }
    }

    /// Whether `offered` may take the place of `held` although no view vouches for it, because the host was away when its view's signer
    /// changed. Statements are signed by the root and never run out; so what is offered must go forward for issuers and signers: it holds
    /// the newest that is known or a newer one, and nothing older than that which the host did not hold. A retired key stays dead for
    /// every host that knew of its retirement.
    #[must_use]
    pub fn may_replace(mesh: MeshId, root: VerifyingKey, held: &[Signed], offered: &[Signed]) -> bool {
        let end = MeshTime(u64::MAX);
        let (Ok(old), Ok(new)) = (Self::with_items(mesh, root, held, end), Self::with_items(mesh, root, offered, end)) else {
            return false;
        };
        // No view vouches for what is offered: the root alone does.
        let root = Self::new(mesh, root);
        if offered.iter().any(|item| item.open::<Statement>(CONTEXT, &root).is_err()) {
            return false;
        }
        let (old, new) = (old.read(held), new.read(offered));
        let kinds = [TrustKind::HostIssuer, TrustKind::CoordinatorIssuer, TrustKind::ViewSigner];
        let has_issuer = new.iter().any(|statement| statement.kind == TrustKind::CoordinatorIssuer);
        let forward = |kind: &TrustKind| {
            let newest = |all: &[Statement]| all.iter().filter(|s| s.kind == *kind).map(|s| s.not_before).max();
            let (known, best) = (newest(&old), newest(&new));
            let fresh = |s: &&Statement| s.kind == *kind && !old.contains(s);
            best >= known && new.iter().filter(fresh).all(|s| Some(s.not_before) > known)
        };
        has_issuer && kinds.iter().all(forward)
    }

    /// A time that is certainly past: when the youngest of these statements was made. They must have been verified before.
    #[must_use]
    pub fn made_by(items: &[Signed]) -> MeshTime {
        let made = items.iter().filter_map(|item| item.peek::<Statement>().ok());
        made.map(|statement| statement.not_before).max().unwrap_or_default()
    }

    /// The statements that hold.
    fn read(&self, items: &[Signed]) -> Vec<Statement> {
        items.iter().filter_map(|item| item.open(CONTEXT, self).ok()).collect()
    }

    /// Takes up one statement, unless it does not count yet.
    ///
    /// # Errors
    /// [`TrustError`].
    pub fn admit(&mut self, item: &Signed, now: MeshTime) -> Result<(), TrustError> {
        let statement = match item.open::<Statement>(CONTEXT, &*self) {
            // A later version's: of a kind that is not known here, or with a field that might narrow it. It adds nothing.
            Ok(_) if item.has_later_fields(STATEMENT_FIELDS) => return Ok(()),
            Err(SignedError::Content(_)) => return Ok(()),
            opened => opened?,
        };
        if statement.mesh != self.mesh {
            return Err(TrustError::OtherMesh(statement.mesh));
        }
        if statement.not_before > now {
            return Ok(());
        }
        match statement.kind {
            TrustKind::HostIssuer => add(&mut self.host_issuers, statement.value),
            TrustKind::CoordinatorIssuer => add(&mut self.coordinator_issuers, statement.value),
            TrustKind::ViewSigner => {
                let bytes = statement.value.try_into().map_err(|_| TrustError::Value("signing key"))?;
                add(
                    &mut self.signers,
                    VerifyingKey::from_bytes(bytes).map_err(|_| TrustError::Value("signing key"))?,
                );
            }
            TrustKind::CoordinatorAddress => {
                add(
                    &mut self.addresses,
                    String::from_utf8(statement.value).map_err(|_| TrustError::Value("address"))?,
                );
            }
        }
        Ok(())
    }

    /// The mesh.
    #[must_use]
    pub const fn mesh(&self) -> MeshId {
        self.mesh
    }

    /// The root's key.
    #[must_use]
    pub const fn root(&self) -> &VerifyingKey {
        &self.root
    }

    /// DER certificates of the authorities for hosts.
    #[must_use]
    pub fn host_issuers(&self) -> &[Vec<u8>] {
        &self.host_issuers
    }

    /// DER certificates of the authorities for coordinators.
    #[must_use]
    pub fn coordinator_issuers(&self) -> &[Vec<u8>] {
        &self.coordinator_issuers
    }

    /// Where coordinators listen, as `host:port`.
    #[must_use]
    pub fn addresses(&self) -> &[String] {
        &self.addresses
    }
}

fn add<T: PartialEq>(all: &mut Vec<T>, one: T) {
    if !all.contains(&one) {
        all.push(one);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MESH: MeshId = MeshId([5; 16]);

    fn signer(seed: u8) -> SigningKey {
        SigningKey::from_seed(&[seed; 32])
    }

    fn signer_item(key: &SigningKey, by: &SigningKey, not_before: u64) -> Signed {
        let value = key.verifying().as_bytes().to_vec();
        Statement {
            mesh: MESH,
            kind: TrustKind::ViewSigner,
            value,
            not_before: MeshTime(not_before),
        }
        .sign(by)
    }

    #[test]
    fn trust_passes_from_the_root_through_signers_in_any_order() -> Result<(), TrustError> {
        let (root, first, second) = (signer(1), signer(2), signer(3));
        let items = [signer_item(&second, &first, 0), signer_item(&first, &root, 0)];
        let trust = Trust::with_items(MESH, root.verifying(), &items, MeshTime(10))?;
        assert!(trust.key(second.verifying().id()).is_some());
        Ok(())
    }

    /// A statement as a later version might make it.
    #[derive(Encode)]
    #[cbor(map)]
    struct Later {
        #[n(0)]
        mesh: MeshId,
        #[n(1)]
        kind: u32,
        #[cbor(n(2), with = "minicbor::bytes")]
        value: Vec<u8>,
        #[n(3)]
        not_before: MeshTime,
        #[n(4)]
        not_after: Option<u64>,
    }

    #[test]
    fn what_a_later_version_states_adds_nothing_and_hinders_nothing() -> Result<(), TrustError> {
        let (root, known, narrowed) = (signer(1), signer(2), signer(3));
        let later = |kind: u32, key: &SigningKey, not_after| {
            let value = key.verifying().as_bytes().to_vec();
            let statement = Later {
                mesh: MESH,
                kind,
                value,
                not_before: MeshTime(0),
                not_after,
            };
            Signed::new(CONTEXT, &root, &statement)
        };
        let items = [
            later(99, &narrowed, None),
            later(3, &narrowed, Some(5)),
            signer_item(&known, &root, 0),
        ];
        let trust = Trust::with_items(MESH, root.verifying(), &items, MeshTime(10))?;
        assert!(trust.key(known.verifying().id()).is_some(), "what is understood counts");
        assert!(trust.key(narrowed.verifying().id()).is_none(), "a field that may narrow it");
        let same = [later(3, &narrowed, None)];
        let trust = Trust::with_items(MESH, root.verifying(), &same, MeshTime(10))?;
        assert!(trust.key(narrowed.verifying().id()).is_some(), "the same without the field");
        Ok(())
    }

    #[test]
    fn a_key_that_nobody_trusts_introduces_nobody() {
        let (root, stranger) = (signer(1), signer(9));
        let items = [signer_item(&stranger, &stranger, 0)];
        assert!(Trust::with_items(MESH, root.verifying(), &items, MeshTime(10)).is_err());
    }

    #[test]
    fn a_statement_does_not_count_before_its_time() -> Result<(), TrustError> {
        let (root, later) = (signer(1), signer(2));
        let items = [signer_item(&later, &root, 100)];
        assert!(
            Trust::with_items(MESH, root.verifying(), &items, MeshTime(99))?
                .key(later.verifying().id())
                .is_none()
        );
        assert!(
            Trust::with_items(MESH, root.verifying(), &items, MeshTime(100))?
                .key(later.verifying().id())
                .is_some()
        );
        Ok(())
    }

    #[test]
    fn what_is_offered_without_a_view_goes_forward_only() {
        let root = signer(1);
        let item = |kind, value: u8, not_before| {
            let value = match kind {
                TrustKind::ViewSigner => signer(value).verifying().as_bytes().to_vec(),
                TrustKind::HostIssuer | TrustKind::CoordinatorIssuer | TrustKind::CoordinatorAddress => vec![value],
            };
            Statement {
                mesh: MESH,
                kind,
                value,
                not_before: MeshTime(not_before),
            }
            .sign(&root)
        };
        let issuer = |value, at| item(TrustKind::CoordinatorIssuer, value, at);
        let key = |value, at| item(TrustKind::ViewSigner, value, at);
        let may = |held: &[Signed], offered: &[Signed]| Trust::may_replace(MESH, root.verifying(), held, offered);
        let (first, both, second) = (
            vec![issuer(1, 10), key(2, 10)],
            vec![issuer(1, 10), key(2, 10), key(3, 20)],
            vec![issuer(1, 10), key(3, 20)],
        );
        assert!(may(&first, &first) && may(&first, &both) && may(&first, &second) && may(&both, &second));
        assert!(!may(&both, &first), "the newest must not go");
        assert!(!may(&second, &first) && !may(&second, &both), "a retired key does not come back");
        assert!(may(&second, &[issuer(1, 10), key(3, 20), key(4, 30)]));
        assert!(!may(&first, &[key(2, 10)]), "no issuer of coordinators");
        let stranger = signer_item(&signer(9), &signer(8), 90);
        assert!(!may(&first, &[issuer(1, 10), key(2, 10), stranger]));
    }

    #[test]
    fn roles_are_told_apart_by_their_uri() {
        let id = SpiffeId {
            mesh: MESH,
            role: Role::Host(HostId([1; 16])),
        };
        assert_eq!(id.to_string().parse(), Ok(id));
        let text = id.to_string();
        for bad in [
            text.replace("/host/", "/coordinator/"),
            format!("{text}/x"),
            text.replace("spiffe", "https"),
            text.to_uppercase(),
        ] {
            assert_eq!(bad.parse::<SpiffeId>(), Err(BadSpiffeId), "{bad}");
        }
    }
}
