//! What a host is offered: its view, signed, with a lease that is signed anew as often as it is due.

use std::sync::Arc;
use std::time::Duration;

use cloison_proto::id::HostId;
use cloison_proto::lease::{Lease, RENEWALS_PER_LEASE};
use cloison_proto::signed::Signed;
use cloison_proto::version::MeshTime;
use cloison_proto::view::{Header, Items, section};

use crate::trust::Roots;

/// A host's view as it is offered, with a lease for it.
#[derive(Debug, Clone)]
pub struct Offer {
    /// What was signed about the view.
    pub header: Header,
    /// The signed header.
    pub signed: Signed,
    /// The items.
    pub items: Arc<Items>,
    /// The lease.
    pub lease: Signed,
    /// When the lease was issued.
    pub leased_at: MeshTime,
    valid_for: Duration,
    pub(super) peers: Arc<[HostId]>,
}

impl Offer {
    /// Signs a view and a first lease for it.
    #[must_use]
    pub fn new(roots: &Roots, header: Header, items: Arc<Items>, valid_for: Duration, now: MeshTime) -> Self {
        let peers = items.iter().filter(|(at, _)| at.section == section::PEER);
        let peers = peers.filter_map(|(at, _)| at.key.as_slice().try_into().ok().map(HostId));
        Self {
            header,
            signed: header.sign(&roots.view_key()),
            peers: peers.collect(),
            items,
            lease: lease(roots, &header, valid_for, now),
            leased_at: now,
            valid_for,
        }
    }

    /// The same view with a new lease.
    #[must_use]
    pub fn leased_anew(&self, roots: &Roots, now: MeshTime) -> Self {
        Self {
            lease: lease(roots, &self.header, self.valid_for, now),
            leased_at: now,
            ..self.clone()
        }
    }

    /// When a new lease is due.
    #[must_use]
    pub fn lease_due(&self) -> MeshTime {
        self.leased_at.plus(self.valid_for / RENEWALS_PER_LEASE)
    }
}

fn lease(roots: &Roots, header: &Header, valid_for: Duration, now: MeshTime) -> Signed {
    let lease = Lease {
        mesh: header.mesh,
        host: header.host,
        version: header.version,
        state_hash: header.state_hash,
        issued_at: now,
        valid_for_secs: valid_for.as_secs(),
    };
    lease.sign(&roots.view_key())
}
