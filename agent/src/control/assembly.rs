//! Puts a view together out of its frames: a copy of the base, the changes, the signed header. Nothing of it counts before it was verified
//! whole, and what is collected stays within the limits of a view.

use cloison_proto::control::coordinator::{ViewItems, ViewStart};
use cloison_proto::id::{HostId, MeshId};
use cloison_proto::signed::Signed;
use cloison_proto::trust::Trust;
use cloison_proto::version::Version;
use cloison_proto::view::{Floor, Items, MAX_BYTES, MAX_ITEMS, VerifiedView, ViewError};

/// Why a view on the link came to nothing; the last good one stays in force.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// It changes a view that this host does not hold.
    #[error("the changes are for a view that this host does not hold")]
    BaseUnknown,
    /// More changes than a view has room for.
    #[error("the view has more than {MAX_ITEMS} changes or {MAX_BYTES} bytes")]
    TooMuch,
    /// It does not hold.
    #[error(transparent)]
    View(#[from] ViewError),
}

impl Refusal {
    /// Stable code for the Nack.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::BaseUnknown => "base_unknown",
            Self::TooMuch => "too_large",
            Self::View(e) => e.code(),
        }
    }

    /// Whether a snapshot may help where the changes did not.
    #[must_use]
    pub const fn asks_for_snapshot(&self) -> bool {
        matches!(self, Self::BaseUnknown | Self::View(ViewError::Hash { .. }))
    }
}

/// A view on its way.
#[derive(Debug)]
pub struct Assembly {
    header: Signed,
    version: Version,
    items: Items,
    ops: usize,
    bytes: usize,
}

impl Assembly {
    /// Begins with `base`, if the view is a delta on it, or with nothing; `version` is that of its header.
    ///
    /// # Errors
    /// [`Refusal::BaseUnknown`].
    pub fn start(start: ViewStart, version: Version, base: Option<&VerifiedView>) -> Result<Self, Refusal> {
        let items = match start.base {
            None => Items::default(),
            Some(wanted) => match base {
                Some(base) if base.header().state_hash == wanted => base.items().clone(),
                Some(_) | None => return Err(Refusal::BaseUnknown),
            },
        };
        Ok(Self {
            header: start.header,
            version,
            items,
            ops: 0,
            bytes: 0,
        })
    }

    /// The version that the header signs.
    #[must_use]
    pub const fn version(&self) -> Version {
        self.version
    }

    /// Takes up changes.
    ///
    /// # Errors
    /// [`Refusal::TooMuch`].
    pub fn items(&mut self, items: ViewItems) -> Result<(), Refusal> {
        let size = |op: &cloison_proto::view::Op| op.at.key.len() + op.bytes.as_ref().map_or(0, |b| b.len());
        self.ops = self.ops.saturating_add(items.ops.len());
        self.bytes = items.ops.iter().map(size).fold(self.bytes, usize::saturating_add);
        // A delta may take every item away and put another in its place; more than that is no honest one.
        if self.ops > 2 * MAX_ITEMS || self.bytes > 2 * MAX_BYTES {
            return Err(Refusal::TooMuch);
        }
        self.items.apply(items.ops);
        Ok(())
    }

    /// The whole, verified.
    ///
    /// # Errors
    /// [`Refusal::View`].
    pub fn finish(self, trust: &Trust, us: (MeshId, HostId), floor: Option<Floor>) -> Result<VerifiedView, Refusal> {
        Ok(VerifiedView::open(self.header, self.items, trust, us, floor)?)
    }
}
