//! A view: what one host must know to do its work, and nothing more. Immutable, signed.
//!
//! A view is a set of **items**, each kept as the exact bytes received, under (section, key). The **state hash** is the SHA-256 over the
//! sorted list of (section, key, SHA-256(bytes)). The signed [`Header`] names mesh, host, version and state hash. So the order of work is:
//! collect the items, hash them, compare with the header, verify the header, and only then parse ([`content`]).
//!
//! A delta is a list of [`Op`]s on a base. It is applied to a copy and hashed like a snapshot; there is no second way to a view.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use minicbor::{Decode, Encode};
use sha2::{Digest as _, Sha256};

use crate::id::{HostId, MeshId};
use crate::key::SigningKey;
use crate::signed::{Keys, Signed, SignedError};
use crate::version::Version;
use crate::wire;

mod content;
pub(crate) use content::put_trust;
pub use content::{Config, ContentError, Grant, LocalInstance, Peer, RemoteInstance, RuleItem, SelfHost, View, section};

const CONTEXT: &str = "cloison/view/v1";

/// Most items in one view: 16,384 peers, as many instances, rules and a margin.
pub const MAX_ITEMS: usize = 262_144;

/// Most bytes in one view, keys and items together.
pub const MAX_BYTES: usize = 16 * 1024 * 1024;

/// Most peers in one view.
pub const MAX_PEERS: usize = 16_384;

/// SHA-256 over all items of a view.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct StateHash(pub [u8; 32]);

wire::bytes_codec!(StateHash, 32);

impl fmt::Display for StateHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        crate::id::write_hex(f, &self.0)
    }
}

impl fmt::Debug for StateHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for StateHash {
    type Err = crate::id::IdError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        crate::id::parse_hex(text)
            .map(Self)
            .ok_or(crate::id::IdError::Digits { prefix: "", digits: 64 })
    }
}

/// Where an item stands: its section says what it is, its key which one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(map)]
pub struct ItemKey {
    /// What kind of item ([`section`]).
    #[n(0)]
    pub section: u16,
    /// Which one, unique in its section.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub key: Vec<u8>,
}

/// One change of a delta, or one item of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Op {
    /// Where.
    #[n(0)]
    pub at: ItemKey,
    /// The item's bytes; `None` takes it away.
    #[n(1)]
    pub bytes: Option<minicbor::bytes::ByteVec>,
}

/// The items of a view, each as the exact bytes received.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Items(BTreeMap<ItemKey, Arc<[u8]>>);

/// A view that grew past [`MAX_ITEMS`] or [`MAX_BYTES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the view is larger than {MAX_BYTES} bytes or {MAX_ITEMS} items")]
pub struct TooLarge;

impl Items {
    /// Puts an item in its place, over any that stands there.
    pub fn put(&mut self, section: u16, key: impl Into<Vec<u8>>, bytes: impl Into<Arc<[u8]>>) {
        self.0.insert(ItemKey { section, key: key.into() }, bytes.into());
    }

    /// Carries out the changes in order.
    pub fn apply(&mut self, ops: impl IntoIterator<Item = Op>) {
        for Op { at, bytes } in ops {
            match bytes {
                Some(bytes) => self.0.insert(at, Vec::from(bytes).into()),
                None => self.0.remove(&at),
            };
        }
    }

    /// The changes that make this set out of `base`, in the order of the keys.
    #[must_use]
    pub fn changes_since(&self, base: &Self) -> Vec<Op> {
        let gone = base.0.keys().filter(|k| !self.0.contains_key(k)).map(|at| Op {
            at: at.clone(),
            bytes: None,
        });
        let new = self.0.iter().filter(|(at, bytes)| base.0.get(at) != Some(bytes));
        gone.chain(new.map(|(at, bytes)| Op {
            at: at.clone(),
            bytes: Some(bytes.to_vec().into()),
        }))
        .collect()
    }

    /// The state hash.
    #[must_use]
    pub fn hash(&self) -> StateHash {
        let mut all = Sha256::new();
        for (at, bytes) in &self.0 {
            all.update(at.section.to_be_bytes());
            all.update(u64::try_from(at.key.len()).unwrap_or(u64::MAX).to_be_bytes());
            all.update(&at.key);
            all.update(Sha256::digest(bytes));
        }
        StateHash(all.finalize().into())
    }

    /// An error if the set is larger than a view may be.
    ///
    /// # Errors
    /// [`TooLarge`].
    pub fn check_size(&self) -> Result<(), TooLarge> {
        let bytes = self.0.iter().fold(0usize, |sum, (at, bytes)| {
            sum.saturating_add(at.key.len()).saturating_add(bytes.len())
        });
        if self.0.len() > MAX_ITEMS || bytes > MAX_BYTES {
            Err(TooLarge)
        } else {
            Ok(())
        }
    }

    /// All items in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&ItemKey, &[u8])> {
        self.0.iter().map(|(at, bytes)| (at, bytes.as_ref()))
    }

    /// How many items there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What a coordinator signs about a view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Header {
    /// The mesh.
    #[n(0)]
    pub mesh: MeshId,
    /// The host that the view is for.
    #[n(1)]
    pub host: HostId,
    /// The view's version.
    #[n(2)]
    pub version: Version,
    /// The hash of its items.
    #[n(3)]
    pub state_hash: StateHash,
}

impl Header {
    /// Signs the header with a view-signing key.
    #[must_use]
    pub fn sign(&self, key: &SigningKey) -> Signed {
        Signed::new(CONTEXT, key, self)
    }

    /// The header in `signed`, if a trusted key signed it; says nothing about the items.
    ///
    /// # Errors
    /// [`SignedError`].
    pub fn open(signed: &Signed, keys: &(impl Keys + ?Sized)) -> Result<Self, SignedError> {
        signed.open(CONTEXT, keys)
    }
}

/// Why a view is Nacked. What one agent cannot enforce is not among these: it is `unenforced` for that instance alone.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// Not signed by a trusted key.
    #[error("the view's signature")]
    Signature(#[from] SignedError),
    /// For another mesh or host.
    #[error("the view is for {host} of {mesh}, not for this host")]
    NotForUs {
        /// The mesh that it is for.
        mesh: MeshId,
        /// The host that it is for.
        host: HostId,
    },
    /// Older than the newest accepted.
    #[error("the view has version {offered}, but {held} was accepted before: agents never go back")]
    Older {
        /// Version offered.
        offered: Version,
        /// Newest version accepted.
        held: Version,
    },
    /// The same version as one accepted before, with other content: somebody signed two views of one version.
    #[error("a second view of version {0} with other content")]
    Forked(Version),
    /// The items are not those that were signed.
    #[error("the view's items hash to {actual}, but {signed} was signed")]
    Hash {
        /// Hash of the items received.
        actual: StateHash,
        /// Hash in the signed header.
        signed: StateHash,
    },
    /// Too large.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// The content contradicts itself.
    #[error(transparent)]
    Content(#[from] ContentError),
}

impl ViewError {
    /// Stable code for the Nack, the log and the audit.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Signature(_) => "signature",
            Self::NotForUs { .. } => "not_for_us",
            Self::Older { .. } => "older",
            Self::Forked(_) => "forked",
            Self::Hash { .. } => "hash",
            Self::TooLarge(_) => "too_large",
            Self::Content(e) => e.code(),
        }
    }
}

/// What a host already holds: a new view must not be older (I12).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Floor {
    /// Version of the newest view accepted.
    pub version: Version,
    /// Its state hash.
    pub state_hash: StateHash,
}

/// A view that was verified whole: signature, addressee, version, hash, content. There is no other way to make one.
#[derive(Debug, Clone)]
pub struct VerifiedView {
    signed: Signed,
    header: Header,
    items: Items,
    content: Arc<View>,
}

impl VerifiedView {
    /// Verifies `signed` over `items`, for this mesh and host, not older than `floor`.
    ///
    /// # Errors
    /// [`ViewError`], and then nothing of the view may be used.
    pub fn open(
        signed: Signed,
        items: Items,
        keys: &(impl Keys + ?Sized),
        (mesh, host): (MeshId, HostId),
        floor: Option<Floor>,
    ) -> Result<Self, ViewError> {
        let header: Header = signed.open(CONTEXT, keys)?;
        if (header.mesh, header.host) != (mesh, host) {
            return Err(ViewError::NotForUs {
                mesh: header.mesh,
                host: header.host,
            });
        }
        if let Some(floor) = floor {
            if header.version < floor.version {
                return Err(ViewError::Older {
                    offered: header.version,
                    held: floor.version,
                });
            }
            if header.version == floor.version && header.state_hash != floor.state_hash {
                return Err(ViewError::Forked(header.version));
            }
        }
        items.check_size()?;
        let actual = items.hash();
        if actual != header.state_hash {
            return Err(ViewError::Hash {
                actual,
                signed: header.state_hash,
            });
        }
        let content = Arc::new(View::parse(&items, host)?);
        Ok(Self {
            signed,
            header,
            items,
            content,
        })
    }

    /// The signed header, as received.
    #[must_use]
    pub const fn signed(&self) -> &Signed {
        &self.signed
    }

    /// What was signed.
    #[must_use]
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// What a later view must not fall behind.
    #[must_use]
    pub const fn floor(&self) -> Floor {
        Floor {
            version: self.header.version,
            state_hash: self.header.state_hash,
        }
    }

    /// The items as received.
    #[must_use]
    pub const fn items(&self) -> &Items {
        &self.items
    }

    /// What they say.
    #[must_use]
    pub fn content(&self) -> &Arc<View> {
        &self.content
    }

    /// The view as one byte string, for the disk: the signed header and all items.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let items = Items::default();
        wire::encode(&Stored {
            signed: self.signed.clone(),
            items: self.items.changes_since(&items),
        })
    }

    /// Takes a stored view apart; [`VerifiedView::open`] decides whether it is good.
    ///
    /// # Errors
    /// [`SignedError::Content`] if the bytes are no stored view.
    pub fn parts_from_bytes(bytes: &[u8]) -> Result<(Signed, Items), SignedError> {
        let stored: Stored = wire::decode_all(bytes).map_err(SignedError::Content)?;
        let mut items = Items::default();
        items.apply(stored.items);
        Ok((stored.signed, items))
    }
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Stored {
    #[n(0)]
    signed: Signed,
    #[n(1)]
    items: Vec<Op>,
}

/// The host that [`fuzz_view`] reads views for.
#[doc(hidden)]
pub const FUZZ_HOST: HostId = HostId([2; 16]);

/// The body of the fuzz target: any bytes as a stored view are refused, or hold items that read back; and the items of any host, signed or
/// not, are refused, or give a table that opens nothing between others and knows no address outside of the mesh's ranges.
#[doc(hidden)]
#[must_use]
pub fn fuzz_view(data: &[u8]) -> bool {
    let Ok((signed, items)) = VerifiedView::parts_from_bytes(data) else {
        return true;
    };
    let again = wire::encode(&Stored {
        signed,
        items: items.changes_since(&Items::default()),
    });
    let reads_back = VerifiedView::parts_from_bytes(&again).is_ok_and(|(_, back)| back == items && back.hash() == items.hash());
    let is_sound = View::parse(&items, FUZZ_HOST).map_or(true, |view| {
        let table = crate::filter::Table::new(&view);
        let is_ours = |index| table.instance(index).is_some_and(|instance| instance.local);
        let mut addresses = table.instances().iter().flat_map(|instance| instance.addresses.both());
        table.open_pairs().all(|(from, to)| is_ours(from) || is_ours(to)) && addresses.all(|address| view.config.overlay.contains(address))
    });
    reads_back && is_sound
}

#[cfg(test)]
mod tests;
