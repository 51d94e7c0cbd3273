//! What is written down about every change, and about every refused attempt to join: typed, allow-listed fields, never free text from
//! outside. A leaf is kept as the exact bytes below and names the hash of the leaf before it; it is written in the same transaction as the
//! change it speaks of, so that neither exists without the other.
//!
//! Canonical bytes of a leaf: a CBOR array of ten entries in this order, every integer in its shortest form (minicbor's encoding):
//! `[1, seq, time, actor, action, [object, ..], outcome, cause or null, request or null, SHA-256 of the leaf before]`; texts are the words
//! below and the text forms of ids. A leaf's hash is SHA-256 over its bytes; the first leaf follows 32 zero bytes.

use std::fmt;
use std::net::IpAddr;

use cloison_proto::id::{CredentialId, HostId, TokenId};
use cloison_proto::version::MeshTime;
use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::inventory::PolicyVersion;
use crate::trust::Part;

/// Number of the leaf layout, the first entry of each leaf.
pub const LEAF_VERSION: u8 = 1;

/// Who did it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Actor {
    /// Somebody with root's access to the coordinator's machine, by its own program.
    Local,
    /// The holder of an API credential.
    Credential(CredentialId),
    /// An enrolled host, by its certificate.
    Host(HostId),
    /// Somebody who showed an enrollment token.
    Joiner(TokenId),
    /// The coordinator itself.
    Coordinator,
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => f.write_str("local"),
            Self::Credential(id) => id.fmt(f),
            Self::Host(id) => id.fmt(f),
            Self::Joiner(id) => id.fmt(f),
            Self::Coordinator => f.write_str("coordinator"),
        }
    }
}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$item:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($(#[$item])* $variant,)* }

        impl $name {
            /// The word that stands in the leaf.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }
    };
}

words! {
    /// What was done. A word is never used for anything else once it has been.
    Action {
        /// The mesh came into being.
        MeshInit = "mesh.init",
        /// The mesh's ranges, lease or addresses were set.
        MeshSet = "mesh.set",
        /// The database was restored from a backup.
        MeshRestore = "mesh.restore",
        /// An agent proved that the database is an old one.
        MeshBehind = "mesh.behind",
        /// An operator decided how to go on with an old database.
        MeshRecover = "mesh.recover",
        /// A policy was applied.
        PolicyApply = "policy.apply",
        /// A token was made.
        TokenCreate = "token.create",
        /// A token was revoked.
        TokenRevoke = "token.revoke",
        /// A host joined, or tried to.
        HostJoin = "host.join",
        /// A host was marked as contested, or an operator cleared the mark.
        HostContest = "host.contest",
        /// An operator cleared the mark of a contested host.
        HostSettle = "host.settle",
        /// A host's labels changed.
        HostLabel = "host.label",
        /// A host's name changed.
        HostRename = "host.rename",
        /// A host was revoked.
        HostRevoke = "host.revoke",
        /// Two links of one host at once, with diverging incarnations.
        HostCloned = "host.cloned",
        /// An operator asked a host for a new WireGuard key.
        HostKeyWish = "host.key_wish",
        /// A host proved the WireGuard key that is to take the place of the one it has.
        HostKeyOffer = "host.key_offer",
        /// A host's former WireGuard key was retired.
        HostKeyRetire = "host.key_retire",
        /// A certificate was issued.
        CertificateIssue = "certificate.issue",
        /// A credential was made.
        CredentialCreate = "credential.create",
        /// The next key of a part of the trust was announced.
        TrustAnnounce = "trust.announce",
        /// The announced key is in use.
        TrustSwitch = "trust.switch",
        /// The former key is trusted no more.
        TrustRetire = "trust.retire",
        /// A credential was made in the place of another, which ends soon.
        CredentialRotate = "credential.rotate",
        /// An address of the coordinator was added.
        AddressAdd = "address.add",
        /// An address of the coordinator was removed.
        AddressRemove = "address.remove",
        /// A credential was revoked.
        CredentialRevoke = "credential.revoke",
    }
}

words! {
    /// Why an attempt to join was refused. It is told to nobody but the audit.
    Cause {
        /// No such token.
        Unknown = "unknown",
        /// The token's secret is another one.
        WrongSecret = "wrong_secret",
        /// The token has no uses left.
        Used = "used",
        /// The token's time is over.
        Expired = "expired",
        /// The token was revoked.
        Revoked = "revoked",
        /// Not from where the token may be used.
        Source = "source",
        /// The token's name belongs to another host.
        NameTaken = "name_taken",
        /// The WireGuard or identity key belongs, or once belonged, to a host.
        KeyKnown = "key_known",
        /// No proof that the joiner has the private half of the WireGuard key it shows.
        NoProof = "no_proof",
        /// The mesh has as many hosts as it may have.
        HostLimit = "host_limit",
        /// No addresses are left.
        PoolExhausted = "pool_exhausted",
        /// A view would outgrow its limits.
        ViewLimit = "view_limit",
        /// The coordinator changes nothing at the moment.
        ReadOnly = "read_only",
    }
}

/// What it was done to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Object {
    /// The mesh.
    Mesh,
    /// A host.
    Host(HostId),
    /// A token.
    Token(TokenId),
    /// A credential.
    Credential(CredentialId),
    /// A part of the trust.
    Trust(Part),
    /// A policy, by its number.
    Policy(PolicyVersion),
    /// The text of a policy, by its SHA-256.
    Digest([u8; 32]),
    /// Where the attempt came from.
    Source(IpAddr),
    /// How many refusals before this one were counted without a leaf of their own.
    Suppressed(u64),
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mesh => f.write_str("mesh"),
            Self::Host(id) => id.fmt(f),
            Self::Token(id) => id.fmt(f),
            Self::Credential(id) => id.fmt(f),
            Self::Trust(part) => write!(f, "trust_{part}"),
            Self::Policy(version) => write!(f, "policy_{}", version.0),
            Self::Digest(hash) => hash.iter().try_fold(f.write_str("sha256_")?, |(), b| write!(f, "{b:02x}")),
            Self::Source(address) => write!(f, "source_{address}"),
            Self::Suppressed(count) => write!(f, "suppressed_{count}"),
        }
    }
}

/// Names one API request, so that an answer, the log and the audit can be brought together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RequestId(pub [u8; 8]);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_fold(f.write_str("req_")?, |(), b| write!(f, "{b:02x}"))
    }
}

/// Who asks for a change, and by which request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Context {
    /// Who.
    pub actor: Actor,
    /// The API request, if it came by one.
    pub request: Option<RequestId>,
}

impl Context {
    /// A change that comes by no API request.
    #[must_use]
    pub const fn of(actor: Actor) -> Self {
        Self { actor, request: None }
    }
}

/// A leaf as read back: exactly what its bytes say.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[cbor(array)]
pub struct Leaf {
    /// [`LEAF_VERSION`].
    #[n(0)]
    pub layout: u8,
    /// Position, from 1, without gaps.
    #[n(1)]
    pub seq: u64,
    /// When.
    #[n(2)]
    pub time: MeshTime,
    /// Who: an id, `local` or `coordinator`.
    #[n(3)]
    pub actor: String,
    /// What: one of [`Action`]'s words.
    #[n(4)]
    pub action: String,
    /// To what: the text forms of [`Object`].
    #[n(5)]
    pub objects: Vec<String>,
    /// `done` or `refused`.
    #[n(6)]
    pub outcome: String,
    /// One of [`Cause`]'s words, if refused.
    #[n(7)]
    pub cause: Option<String>,
    /// The API request.
    #[n(8)]
    pub request: Option<String>,
    /// Hash of the leaf before this one.
    #[n(9)]
    #[cbor(with = "minicbor::bytes")]
    #[serde(skip)]
    pub previous: [u8; 32],
}

/// What a change says about itself; the store adds position, time and chain.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) context: Context,
    pub(crate) action: Action,
    pub(crate) objects: Vec<Object>,
    pub(crate) refused: Option<Cause>,
}

impl Entry {
    pub(crate) fn done(context: Context, action: Action, objects: &[Object]) -> Self {
        Self {
            context,
            action,
            objects: objects.to_vec(),
            refused: None,
        }
    }

    /// The leaf at `seq`, behind the one whose hash is `previous`.
    pub(crate) fn leaf(&self, seq: u64, time: MeshTime, previous: [u8; 32]) -> Leaf {
        Leaf {
            layout: LEAF_VERSION,
            seq,
            time,
            actor: self.context.actor.to_string(),
            action: self.action.to_string(),
            objects: self.objects.iter().map(Object::to_string).collect(),
            outcome: if self.refused.is_some() { "refused" } else { "done" }.into(),
            cause: self.refused.map(|cause| cause.to_string()),
            request: self.context.request.map(|id| id.to_string()),
            previous,
        }
    }
}

/// Hash of a leaf's bytes: what the next leaf names.
#[must_use]
pub fn leaf_hash(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}
