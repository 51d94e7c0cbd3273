//! Enrollment, and renewal by identity key, as `cloison_proto::control::join` lays them down.
//!
//! The coordinator opens the stream and speaks first, with a challenge made for it alone; the host answers once, is judged, and is told
//! either what it needs to link, or nothing. All refusals look alike and come no sooner than a floor of time, whatever their cause; the cause
//! is in the audit.

use std::net::IpAddr;
use std::time::Duration;

use cloison_proto::control::frame::Frame;
use cloison_proto::control::join::{self, Challenge, Denied, EXPORTER_LABEL, EXPORTER_LEN, JoinMessage, JoinRequest, Joined, RenewRequest};
use cloison_proto::key::{IdentityKey, Secret32};
use cloison_proto::label::ComponentName;
use quinn::Connection;
use tokio::time::{Instant, sleep_until, timeout};
use x25519_dalek::{PublicKey, StaticSecret};

use super::link::Fault;
use super::listener::Shared;
use super::serve::{LinkError, Wire};
use crate::audit::Cause;
use crate::entropy::EntropyError;
use crate::inventory::Host;
use crate::store::{RedeemError, Redemption, StoreError};
use crate::trust::IssueError;

/// How long a host may take for its answer.
const ANSWER: Duration = Duration::from_secs(10);

/// How long the last frame may take to arrive.
const DELIVERY: Duration = Duration::from_secs(5);

/// Why an attempt came to no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum JoinError {
    /// The stream did not carry it.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The TLS session gives no exporter.
    #[error("the TLS session exports no keying material")]
    Exporter,
    /// No randomness for a challenge.
    #[error(transparent)]
    Entropy(#[from] EntropyError),
    /// The store did not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No certificate could be made.
    #[error(transparent)]
    Issue(#[from] IssueError),
}

impl From<Fault> for JoinError {
    fn from(fault: Fault) -> Self {
        Self::Link(fault.into())
    }
}

/// One attempt.
pub(super) async fn join(shared: &Shared, connection: &Connection) -> Result<(), JoinError> {
    let mut exporter = [0; EXPORTER_LEN];
    connection
        .export_keying_material(&mut exporter, EXPORTER_LABEL, &[])
        .map_err(|_| JoinError::Exporter)?;
    let ephemeral = StaticSecret::from(shared.store.environment().random::<32>()?);
    let challenge = Challenge {
        ephemeral: PublicKey::from(&ephemeral).to_bytes(),
    };
    let stream = timeout(ANSWER, connection.open_bi())
        .await
        .map_err(|_| LinkError::Slow("allow a stream"))?;
    let mut wire = Wire::new(stream.map_err(LinkError::from)?);
    wire.write(&JoinMessage::Challenge(challenge).to_frame()).await?;
    let answer = timeout(ANSWER, wire.read())
        .await
        .map_err(|_| LinkError::Slow("answer the challenge"))??;
    let floor = Instant::now() + shared.config.answer_floor;
    let source = connection.remote_address().ip();
    let joined = match JoinMessage::from_frame(&answer).map_err(Fault::from)? {
        Some(JoinMessage::JoinRequest(request)) => enroll(shared, source, &exporter, request, &ephemeral).await?,
        Some(JoinMessage::RenewRequest(request)) => renew(shared, &exporter, &request).await?,
        Some(JoinMessage::Challenge(_) | JoinMessage::Joined(_) | JoinMessage::Denied(_)) | None => return Err(Fault::Order.into()),
    };
    sleep_until(floor).await;
    let answer: Frame = joined
        .map_or_else(|| JoinMessage::Denied(Denied {}), JoinMessage::Joined)
        .to_frame();
    wire.write(&answer).await?;
    wire.finish();
    let _ = timeout(DELIVERY, connection.closed()).await;
    Ok(())
}

/// Makes a host out of a token. `None`: refused.
async fn enroll(
    shared: &Shared,
    source: IpAddr,
    exporter: &[u8; EXPORTER_LEN],
    request: JoinRequest,
    ephemeral: &StaticSecret,
) -> Result<Option<Joined>, JoinError> {
    if join::verify(exporter, &request, ephemeral).is_err() {
        shared.store.record_refusal(request.token, source, Cause::NoProof).await?;
        return Ok(None);
    }
    let attempt = Redemption {
        token: request.token,
        secret: Secret32::from_bytes(request.secret),
        wg_key: request.wg_key,
        identity: request.identity,
        source,
    };
    match shared.store.redeem_token(&attempt).await {
        Ok(redeemed) => {
            tracing::info!(host = %redeemed.host.id, name = %redeemed.host.name, repeated = redeemed.repeated, "a host joined");
            let components = redeemed.instances.into_iter().map(|(component, _)| component).collect();
            admit(shared, &redeemed.host, components).await.map(Some)
        }
        Err(RedeemError::Denied(_)) => Ok(None),
        Err(RedeemError::Store(error)) => Err(error.into()),
    }
}

/// Renews by identity key for a host whose certificate ran out. `None`: refused.
async fn renew(shared: &Shared, exporter: &[u8; EXPORTER_LEN], request: &RenewRequest) -> Result<Option<Joined>, JoinError> {
    if join::verify_renewal(exporter, request).is_err() {
        return Ok(None);
    }
    let refused = |why: &dyn std::fmt::Display| tracing::info!(host = %request.host, %why, "a renewal was refused");
    match shared.store.renewable(&request.identity).await? {
        Ok(host) if host == request.host => {}
        Ok(_) => {
            refused(&"the key belongs to another host");
            return Ok(None);
        }
        Err(why) => {
            refused(&why);
            return Ok(None);
        }
    }
    let inventory = shared.store.inventory();
    let Some(host) = inventory.hosts.get(&request.host) else {
        return Ok(None);
    };
    if !shared.renewals.take(host.id, shared.now().monotonic) {
        refused(&"too many certificates in a short time");
        return Ok(None);
    }
    let components = inventory.instances_on(host.id).map(|(component, _)| component.clone()).collect();
    admit(shared, host, components).await.map(Some)
}

/// A certificate for the host, and whom to trust.
async fn admit(shared: &Shared, host: &Host, components: Vec<ComponentName>) -> Result<Joined, JoinError> {
    let identity: &IdentityKey = &host.identity;
    let issued = shared.roots.issue_host(host.id, identity, shared.store.environment())?;
    shared.store.record_certificate(host.id, issued.serial, issued.not_after).await?;
    let inventory = shared.store.inventory();
    Ok(Joined {
        mesh: inventory.mesh,
        host: host.id,
        name: host.name.clone(),
        certificate: issued.certificate.to_vec(),
        root: *shared.roots.root_key().as_bytes(),
        trust: shared.roots.statements(&inventory.addresses),
        components,
    })
}
