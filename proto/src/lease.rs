//! The lease: a signed permission to go on using one view without contact with the coordinator.
//!
//! It names the view by version and state hash, and covers nothing else. The agent counts it on a clock that runs through suspend; what
//! it says of the time (`issued_at`) is the only source of mesh time.

use std::time::Duration;

use minicbor::{Decode, Encode};

use crate::id::{HostId, MeshId};
use crate::key::SigningKey;
use crate::signed::{Keys, Signed, SignedError};
use crate::version::{MeshTime, Version};
use crate::view::StateHash;

/// How long a lease lasts unless the mesh says otherwise.
pub const DEFAULT_VALID_FOR: Duration = Duration::from_secs(24 * 60 * 60);

/// A lease is issued again at least this often in its life time, so that a host that stays linked always has most of it left.
pub const RENEWALS_PER_LEASE: u32 = 24;

/// Shares of a lease, in percent, at whose use people are warned: one who renews has used a 24th of it at most.
pub const WARNED_AT: [u8; 3] = [50, 80, 95];

/// The highest of [`WARNED_AT`] that is reached when `left` of a lease of `valid_for` is left; `None` below the first.
#[must_use]
pub fn warned_at(left: Duration, valid_for: Duration) -> Option<u8> {
    let used = valid_for.saturating_sub(left).as_millis();
    let reached = |percent: &u8| used.saturating_mul(100) >= valid_for.as_millis().saturating_mul(u128::from(*percent));
    WARNED_AT.into_iter().rev().find(reached)
}

const CONTEXT: &str = "cloison/lease/v1";

/// What a lease says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Lease {
    /// The mesh.
    #[n(0)]
    pub mesh: MeshId,
    /// The host that may use the view.
    #[n(1)]
    pub host: HostId,
    /// Version of the view.
    #[n(2)]
    pub version: Version,
    /// State hash of the view.
    #[n(3)]
    pub state_hash: StateHash,
    /// When it was signed.
    #[n(4)]
    pub issued_at: MeshTime,
    /// For how many seconds from then the view may be used.
    #[n(5)]
    pub valid_for_secs: u64,
}

impl Lease {
    /// Signs the lease with a view-signing key.
    #[must_use]
    pub fn sign(&self, key: &SigningKey) -> Signed {
        Signed::new(CONTEXT, key, self)
    }

    /// The lease in `signed`, if a trusted key signed it.
    ///
    /// # Errors
    /// [`SignedError`].
    pub fn open(signed: &Signed, keys: &(impl Keys + ?Sized)) -> Result<Self, SignedError> {
        signed.open(CONTEXT, keys)
    }

    /// When it ends, in mesh time.
    #[must_use]
    pub fn ends_at(&self) -> MeshTime {
        MeshTime(self.issued_at.0.saturating_add(self.valid_for_secs))
    }

    /// Whether it is for exactly this host's view.
    #[must_use]
    pub fn covers(&self, mesh: MeshId, host: HostId, version: Version, state_hash: StateHash) -> bool {
        (self.mesh, self.host, self.version, self.state_hash) == (mesh, host, version, state_hash)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_warning_begins_at_its_share_and_a_renewed_lease_has_none() {
        let day = DEFAULT_VALID_FOR;
        let left = |percent: u32| day.saturating_mul(percent) / 100;
        assert_eq!(warned_at(day.saturating_sub(day / RENEWALS_PER_LEASE), day), None);
        for (share, at) in [
            (51, None),
            (50, Some(50)),
            (21, Some(50)),
            (20, Some(80)),
            (6, Some(80)),
            (5, Some(95)),
            (0, Some(95)),
        ] {
            assert_eq!(warned_at(left(share), day), at, "{share} % left");
        }
        assert_eq!(
            warned_at(Duration::ZERO, Duration::ZERO),
            Some(95),
            "no lease at all is the last warning"
        );
        assert_eq!(warned_at(Duration::MAX, day), None, "more than all of it is left");
    }
}
