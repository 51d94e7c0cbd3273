//! The keys that change: for each part of the trust, the key in use, the one that is announced to take its place, and the public half of the
//! one that it replaced. Pure: times come in, files are `folder`'s.
//!
//! A rotation has three steps, each one write of the index: *announce* (hosts learn the next key; the present one is used), *switch* (the next
//! one is used; hosts still trust the former), *retire* (the former is trusted no more). Of a former key no private half is left.

use std::sync::Arc;

use cloison_proto::key::SigningKey;
use cloison_proto::trust::TrustKind;
use cloison_proto::version::MeshTime;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::roots::Authority;

/// A part of the trust that can change. The root cannot: tokens and hosts pin it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// The key that signs views and leases.
    SigningKey,
    /// The authority for hosts' certificates.
    HostIssuer,
    /// The authority for coordinators' certificates.
    CoordinatorIssuer,
}

impl Part {
    /// Every part.
    pub const ALL: [Self; 3] = [Self::SigningKey, Self::HostIssuer, Self::CoordinatorIssuer];

    /// The part's word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::SigningKey => "signing-key",
            Self::HostIssuer => "host-issuer",
            Self::CoordinatorIssuer => "coordinator-issuer",
        }
    }

    /// What a statement about it is.
    pub(super) const fn kind(self) -> TrustKind {
        match self {
            Self::SigningKey => TrustKind::ViewSigner,
            Self::HostIssuer => TrustKind::HostIssuer,
            Self::CoordinatorIssuer => TrustKind::CoordinatorIssuer,
        }
    }

    /// What its files are called, as `init` makes them.
    pub(super) const fn stem(self) -> &'static str {
        match self {
            Self::SigningKey => "view",
            Self::HostIssuer => "host-issuer",
            Self::CoordinatorIssuer => "coordinator-issuer",
        }
    }
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// Not one of the parts' words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this can be rotated: signing-key, host-issuer, coordinator-issuer")]
pub struct UnknownPart;

impl std::str::FromStr for Part {
    type Err = UnknownPart;
    fn from_str(text: &str) -> Result<Self, UnknownPart> {
        Self::ALL.into_iter().find(|part| part.as_str() == text).ok_or(UnknownPart)
    }
}

/// How far a part's rotation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// None is under way.
    Settled,
    /// The next key is announced since then, and not used yet.
    Announced(MeshTime),
    /// The next key is used since then, and the former is still trusted.
    Switched(MeshTime),
}

/// What a key says in public: its bytes, or its certificate.
pub(super) trait Public {
    fn public(&self) -> Vec<u8>;
}

impl Public for SigningKey {
    fn public(&self) -> Vec<u8> {
        self.verifying().as_bytes().to_vec()
    }
}

impl Public for Authority {
    fn public(&self) -> Vec<u8> {
        self.certificate.to_vec()
    }
}

/// A key that is, or will be, used.
#[derive(Debug)]
pub(super) struct Held<K> {
    /// What its files are called.
    pub(super) stem: String,
    /// From when on hosts trust it.
    pub(super) since: MeshTime,
    pub(super) key: Arc<K>,
}

impl<K> Held<K> {
    pub(super) fn new(stem: String, since: MeshTime, key: K) -> Self {
        Self {
            stem,
            since,
            key: Arc::new(key),
        }
    }
}

impl<K> Clone for Held<K> {
    fn clone(&self) -> Self {
        Self {
            stem: self.stem.clone(),
            since: self.since,
            key: Arc::clone(&self.key),
        }
    }
}

/// What is left of a key that was replaced.
#[derive(Debug, Clone)]
pub(super) struct Former {
    pub(super) public: Vec<u8>,
    pub(super) since: MeshTime,
    /// Since when another one is used.
    pub(super) replaced: MeshTime,
}

/// The keys of one part.
#[derive(Debug)]
pub(super) struct Ring<K> {
    pub(super) current: Held<K>,
    pub(super) next: Option<Held<K>>,
    pub(super) former: Option<Former>,
}

impl<K> Clone for Ring<K> {
    fn clone(&self) -> Self {
        Self {
            current: self.current.clone(),
            next: self.next.clone(),
            former: self.former.clone(),
        }
    }
}

impl<K: Public> Ring<K> {
    /// A ring of one key.
    pub(super) fn of(stem: &str, since: MeshTime, key: K) -> Self {
        Self {
            current: Held::new(stem.to_owned(), since, key),
            next: None,
            former: None,
        }
    }

    /// What hosts are told to trust, each with its not-before.
    pub(super) fn trusted(&self) -> impl Iterator<Item = (Vec<u8>, MeshTime)> + '_ {
        let held = [Some(&self.current), self.next.as_ref()].into_iter().flatten();
        let held = held.map(|held| (held.key.public(), held.since));
        held.chain(self.former.iter().map(|former| (former.public.clone(), former.since)))
    }

    pub(super) fn stage(&self) -> Stage {
        match (&self.next, &self.former) {
            (Some(next), _) => Stage::Announced(next.since),
            (None, Some(former)) => Stage::Switched(former.replaced),
            (None, None) => Stage::Settled,
        }
    }

    /// With the announced key in use.
    pub(super) fn switched(&self, now: MeshTime) -> Option<Self> {
        let next = self.next.clone()?;
        let former = Former {
            public: self.current.key.public(),
            since: self.current.since,
            replaced: now,
        };
        Some(Self {
            current: next,
            next: None,
            former: Some(former),
        })
    }

    /// Without the former key, and which one that was.
    pub(super) fn retired(&self, now: MeshTime, part: Part) -> Option<(Self, Retired)> {
        let former = self.former.as_ref()?;
        let retired = Retired {
            part,
            digest: hex(&former.public),
            at: now,
        };
        let ring = Self {
            former: None,
            ..self.clone()
        };
        Some((ring, retired))
    }
}

/// A key that nobody may trust any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Retired {
    /// What it was.
    pub part: Part,
    /// SHA-256 of its public bytes, as hexadecimal digits.
    pub digest: String,
    /// Since when it is.
    pub at: MeshTime,
}

/// SHA-256 of a statement's value, as hexadecimal digits.
#[must_use]
pub fn hex(value: &[u8]) -> String {
    Sha256::digest(value).iter().map(|byte| format!("{byte:02x}")).collect()
}
