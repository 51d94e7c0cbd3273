//! Enrollment as the coordinator's side of the join protocol goes: proof -> token -> host -> certificate. A renewal by identity key takes
//! the same way, without a token.
//!
//! Nothing here speaks to the network: the listener makes a challenge per stream, passes the request and the TLS exporter in, and sends
//! what comes out. All refusals are the one [`EnrollmentError::Denied`]; the cause is in the audit.

use std::net::IpAddr;
use std::sync::Arc;

use cloison_proto::control::join::{self, Challenge, EXPORTER_LEN, JoinRequest, Joined, RenewRequest};
use cloison_proto::id::HostId;
use cloison_proto::key::{IdentityKey, Secret32};
use cloison_proto::label::ComponentName;
use x25519_dalek::{PublicKey, StaticSecret};

use crate::audit::Cause;
use crate::entropy::EntropyError;
use crate::inventory::Host;
use crate::store::{RedeemError, Redemption, Store, StoreError};
use crate::trust::{IssueError, Roots};

/// Enrolls hosts into one mesh. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Enrollment {
    store: Store,
    roots: Arc<Roots>,
}

/// One stream's challenge: sent to the joiner, kept until its request has come.
pub struct Admission {
    ephemeral: StaticSecret,
}

/// What ties a request to its TLS session.
#[derive(Debug, Clone, Copy)]
pub struct Proven<'a> {
    /// The session's exporter value for [`join::EXPORTER_LABEL`].
    pub exporter: &'a [u8; EXPORTER_LEN],
    /// Where the joiner is.
    pub source: IpAddr,
}

/// Why a host is not enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrollmentError {
    /// Refused. The peer learns no more than that; the cause was audited.
    #[error("enroll_denied")]
    Denied,
    /// It could not be judged.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The certificate could not be made.
    #[error(transparent)]
    Issue(#[from] IssueError),
    /// There is no randomness.
    #[error(transparent)]
    Entropy(#[from] EntropyError),
}

impl Admission {
    /// What the joiner is asked.
    #[must_use]
    pub fn challenge(&self) -> Challenge {
        Challenge {
            ephemeral: PublicKey::from(&self.ephemeral).to_bytes(),
        }
    }
}

impl Enrollment {
    /// Enrollment into the mesh of `store`, with certificates of `roots`.
    #[must_use]
    pub const fn new(store: Store, roots: Arc<Roots>) -> Self {
        Self { store, roots }
    }

    /// Begins one stream.
    ///
    /// # Errors
    /// [`EnrollmentError::Entropy`].
    pub fn admit(&self) -> Result<Admission, EnrollmentError> {
        Ok(Admission {
            ephemeral: StaticSecret::from(self.store.environment().random::<32>()?),
        })
    }

    /// Enrolls the host that shows a token and both keys, or answers the same join again.
    ///
    /// # Errors
    /// [`EnrollmentError`].
    pub async fn join(&self, admission: Admission, request: &JoinRequest, proven: Proven<'_>) -> Result<Joined, EnrollmentError> {
        if join::verify(proven.exporter, request, &admission.ephemeral).is_err() {
            self.store.record_refusal(request.token, proven.source, Cause::NoProof).await?;
            return Err(EnrollmentError::Denied);
        }
        let attempt = Redemption {
            token: request.token,
            secret: Secret32::from_bytes(request.secret),
            wg_key: request.wg_key,
            identity: request.identity,
            source: proven.source,
        };
        let redeemed = self.store.redeem_token(&attempt).await.map_err(|error| match error {
            RedeemError::Denied(_) => EnrollmentError::Denied,
            RedeemError::Store(error) => error.into(),
        })?;
        let components = redeemed.instances.into_iter().map(|(component, _)| component).collect();
        self.welcome(&redeemed.host, components).await
    }

    /// Gives a host another certificate by its identity key alone: the one it had ran out, or was lost.
    ///
    /// # Errors
    /// [`EnrollmentError`].
    pub async fn renew(&self, request: &RenewRequest, proven: Proven<'_>) -> Result<Joined, EnrollmentError> {
        if join::verify_renewal(proven.exporter, request).is_err() {
            return Err(EnrollmentError::Denied);
        }
        match self.store.renewable(&request.identity).await? {
            Ok(host) if host == request.host => {}
            Ok(_) => return Err(EnrollmentError::Denied),
            Err(refusal) => {
                tracing::info!(host = %request.host, source = %proven.source, %refusal, "a renewal was refused");
                return Err(EnrollmentError::Denied);
            }
        }
        let host = self.store.host(request.host).await?.host;
        let components = self
            .store
            .inventory()
            .instances_on(host.id)
            .map(|(component, _)| component.clone())
            .collect();
        self.welcome(&host, components).await
    }

    /// A certificate for a linked host whose present one is at half its life, recorded before it is given out: DER.
    ///
    /// # Errors
    /// [`EnrollmentError`].
    pub async fn certificate(&self, host: HostId, identity: &IdentityKey) -> Result<Vec<u8>, EnrollmentError> {
        let issued = self.roots.issue_host(host, identity, self.store.environment())?;
        match self.store.record_certificate(host, issued.serial, issued.not_after).await {
            Ok(()) => Ok(issued.certificate.to_vec()),
            Err(StoreError::Revoked(_) | StoreError::NotFound(_)) => Err(EnrollmentError::Denied),
            Err(other) => Err(other.into()),
        }
    }

    async fn welcome(&self, host: &Host, components: Vec<ComponentName>) -> Result<Joined, EnrollmentError> {
        let inventory = self.store.inventory();
        Ok(Joined {
            mesh: self.roots.mesh(),
            host: host.id,
            name: host.name.clone(),
            certificate: self.certificate(host.id, &host.identity).await?,
            root: *self.roots.root_key().as_bytes(),
            trust: self.roots.statements(&inventory.addresses),
            components,
        })
    }
}
