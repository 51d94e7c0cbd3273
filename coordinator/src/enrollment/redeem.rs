//! Enrollment as the coordinator's side of the join protocol goes: proof -> token -> host -> certificate. A renewal by identity key takes
//! the same way, without a token.
//!
//! Nothing here speaks to the network: the listener makes a challenge per stream, passes the request and the TLS exporter in, and sends
//! what comes out. All refusals are the one [`EnrollmentError::Denied`]; the cause is in the audit.

use std::net::IpAddr;
use std::sync::Arc;

use cloison_proto::control::join::{self, Challenge, EXPORTER_LEN, JoinRequest, Joined, RenewRequest};
use cloison_proto::control::rotate::{self, KeyChallenge, KeyProof};
use cloison_proto::id::HostId;
use cloison_proto::key::{BadSignature, IdentityKey, Secret32};
use cloison_proto::label::ComponentName;
use x25519_dalek::{PublicKey, StaticSecret};

use crate::audit::Cause;
use crate::entropy::EntropyError;
use crate::inventory::Host;
use crate::store::{RedeemError, Redemption, Store, StoreError};
use crate::trust::{HostLifetime, IssueError, Roots};

/// Enrolls hosts into one mesh. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Enrollment {
    store: Store,
    roots: Arc<Roots>,
    lifetime: HostLifetime,
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

    /// What a host is asked that changes its WireGuard key.
    #[must_use]
    pub fn key_challenge(&self) -> KeyChallenge {
        KeyChallenge {
            ephemeral: self.challenge().ephemeral,
        }
    }

    /// Checks the answer to [`Admission::key_challenge`] of the host with this identity key.
    ///
    /// # Errors
    /// [`BadSignature`].
    pub fn verify_key(
        &self,
        exporter: &[u8; EXPORTER_LEN],
        host: HostId,
        identity: &IdentityKey,
        proof: &KeyProof,
    ) -> Result<(), BadSignature> {
        rotate::verify(exporter, host, identity, proof, &self.ephemeral)
    }
}

impl Enrollment {
    /// Enrollment into the mesh of `store`, with certificates of `roots` that live for `lifetime`.
    #[must_use]
    pub const fn new(store: Store, roots: Arc<Roots>, lifetime: HostLifetime) -> Self {
        Self { store, roots, lifetime }
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
        let issued = self.roots.issue_host(host, identity, self.lifetime, self.store.environment())?;
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

#[cfg(test)]
mod tests {
    use cloison_proto::key::{SigningKey, WgPrivateKey};
    use cloison_proto::trust::Trust;

    use super::*;
    use crate::store::testing::{LOCAL, START, TestResult, environment, in_memory, new_mesh, policy, spec};
    use crate::store::{IfMatch, NewToken};
    use crate::trust::HostVerifier;

    const EXPORTER: [u8; EXPORTER_LEN] = [5; EXPORTER_LEN];

    fn proven() -> Proven<'static> {
        Proven {
            exporter: &EXPORTER,
            source: IpAddr::from([192, 0, 2, 1]),
        }
    }

    async fn enrollment() -> Result<(Enrollment, Arc<Roots>), Box<dyn std::error::Error>> {
        let roots = Arc::new(Roots::generate(new_mesh()?.mesh, &environment().0)?);
        let (store, _) = in_memory().await?;
        Ok((Enrollment::new(store, roots.clone(), HostLifetime::default()), roots))
    }

    fn request(token: &NewToken, exporter: &[u8; 32], challenge: &Challenge) -> JoinRequest {
        let (identity, wg_key) = (SigningKey::from_seed(&[1; 32]), WgPrivateKey::from_bytes([2; 32]));
        let (identity_proof, wg_proof) = join::prove(exporter, token.id, &identity, &wg_key, challenge);
        JoinRequest {
            token: token.id,
            secret: *token.secret.expose(),
            identity: identity.identity(),
            wg_key: wg_key.public(),
            identity_proof,
            wg_proof,
            software: "test".into(),
        }
    }

    #[tokio::test]
    async fn a_joiner_gets_its_name_certificate_trust_and_components() -> TestResult {
        let (enrollment, roots) = enrollment().await?;
        enrollment
            .store
            .put_policy(LOCAL, policy(&[("postgres", &["db-1"])])?, IfMatch::Absent)
            .await?;
        let token = enrollment.store.create_token(LOCAL, spec("db-1")?).await?;
        let admission = enrollment.admit()?;
        let request = request(&token, &EXPORTER, &admission.challenge());
        let joined = enrollment.join(admission, &request, proven()).await?;
        assert_eq!((joined.name.as_str(), joined.components), ("db-1", vec!["postgres".parse()?]));
        assert_eq!(joined.root, *roots.root_key().as_bytes());
        let trust = Trust::with_items(joined.mesh, roots.root_key(), &joined.trust, START)?;
        assert_eq!(trust.addresses(), ["192.0.2.1:7443"]);
        let linked = HostVerifier::new(roots).host_of(&[joined.certificate.into()], START)?;
        assert_eq!((linked.host, linked.identity), (joined.host, request.identity));
        assert_eq!(enrollment.store.admit_certificate(linked.host, linked.serial).await?, Ok(()));
        Ok(())
    }

    #[tokio::test]
    async fn a_proof_of_another_session_enrolls_nothing_and_keeps_the_token() -> TestResult {
        let (enrollment, _) = enrollment().await?;
        let token = enrollment.store.create_token(LOCAL, spec("db-1")?).await?;
        let admission = enrollment.admit()?;
        let carried = request(&token, &[6; 32], &admission.challenge());
        assert!(matches!(
            enrollment.join(admission, &carried, proven()).await,
            Err(EnrollmentError::Denied)
        ));
        assert!(enrollment.store.inventory().hosts.is_empty());
        let admission = enrollment.admit()?;
        let good = request(&token, &EXPORTER, &admission.challenge());
        let replayed = JoinRequest { ..good.clone() };
        enrollment.join(admission, &good, proven()).await?;
        let next = enrollment.admit()?;
        assert!(
            matches!(enrollment.join(next, &replayed, proven()).await, Err(EnrollmentError::Denied)),
            "another challenge"
        );
        Ok(())
    }

    #[tokio::test]
    async fn a_host_renews_by_its_identity_key_and_nobody_else_does() -> TestResult {
        let (enrollment, roots) = enrollment().await?;
        let token = enrollment.store.create_token(LOCAL, spec("db-1")?).await?;
        let admission = enrollment.admit()?;
        let request = request(&token, &EXPORTER, &admission.challenge());
        let host = enrollment.join(admission, &request, proven()).await?.host;
        let renewal = |seed: u8, host| {
            let key = SigningKey::from_seed(&[seed; 32]);
            RenewRequest {
                host,
                identity: key.identity(),
                identity_proof: join::prove_renewal(&EXPORTER, host, &key),
            }
        };
        let renewed = enrollment.renew(&renewal(1, host), proven()).await?;
        assert_eq!(HostVerifier::new(roots).host_of(&[renewed.certificate.into()], START)?.host, host);
        assert!(
            enrollment.renew(&renewal(9, host), proven()).await.is_err(),
            "a key that nobody enrolled"
        );
        assert!(
            enrollment.renew(&renewal(1, HostId([0; 16])), proven()).await.is_err(),
            "another host's id"
        );
        let stolen = RenewRequest {
            identity: request.identity,
            ..renewal(9, host)
        };
        assert!(enrollment.renew(&stolen, proven()).await.is_err(), "a key that it does not hold");
        enrollment.store.revoke_host(LOCAL, host).await?;
        assert!(enrollment.renew(&renewal(1, host), proven()).await.is_err(), "revoked");
        Ok(())
    }
}
