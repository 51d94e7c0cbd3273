//! Enrollment, and renewal by identity key, as `cloison_proto::control::join` lays them down: the stream. [`Enrollment`](crate::enrollment::Enrollment) judges.
//!
//! The coordinator opens the stream and speaks first, with a challenge made for it alone; the host answers once, and is told either what it
//! needs to link, or nothing. All refusals look alike and come no sooner than a floor of time, whatever their cause; the cause is in the
//! audit.

use std::net::IpAddr;
use std::time::Duration;

use cloison_proto::control::join::{self, Denied, EXPORTER_LABEL, EXPORTER_LEN, JoinMessage};
use quinn::Connection;
use tokio::time::{Instant, sleep_until, timeout};

use super::link::Fault;
use super::listener::Shared;
use super::serve::{LinkError, Wire};
use crate::enrollment::{EnrollmentError, Proven};

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
    /// It could not be judged.
    #[error(transparent)]
    Enrollment(#[from] EnrollmentError),
}

impl From<Fault> for JoinError {
    fn from(fault: Fault) -> Self {
        Self::Link(fault.into())
    }
}

/// One attempt, from `source`.
pub(super) async fn join(shared: &Shared, connection: &Connection, source: IpAddr) -> Result<(), JoinError> {
    let mut exporter = [0; EXPORTER_LEN];
    connection
        .export_keying_material(&mut exporter, EXPORTER_LABEL, &[])
        .map_err(|_| JoinError::Exporter)?;
    let admission = shared.enrollment.admit()?;
    let stream = timeout(ANSWER, connection.open_bi())
        .await
        .map_err(|_| LinkError::Slow("allow a stream"))?;
    let mut wire = Wire::new(stream.map_err(LinkError::from)?);
    wire.write(&JoinMessage::Challenge(admission.challenge()).to_frame()).await?;
    let request = timeout(ANSWER, wire.read())
        .await
        .map_err(|_| LinkError::Slow("answer the challenge"))??;
    let floor = Instant::now() + shared.config.answer_floor;
    let proven = Proven {
        exporter: &exporter,
        source: source.to_canonical(),
    };
    let judged = match JoinMessage::from_frame(&request).map_err(Fault::from)? {
        Some(JoinMessage::JoinRequest(request)) => shared.enrollment.join(admission, &request, proven).await,
        // The budget is the key's that signed, and only hosts' keys have one: nobody can use up another host's, nor fill the table of all.
        Some(JoinMessage::RenewRequest(request))
            if join::verify_renewal(&exporter, &request).is_err() || (shared.is_host(&request) && !shared.may_renew(&request.identity)) =>
        {
            Err(EnrollmentError::Denied)
        }
        Some(JoinMessage::RenewRequest(request)) => shared.enrollment.renew(&request, proven).await,
        Some(JoinMessage::Challenge(_) | JoinMessage::Joined(_) | JoinMessage::Denied(_)) | None => return Err(Fault::Order.into()),
    };
    sleep_until(floor).await;
    let answer = match judged {
        Ok(joined) => {
            tracing::info!(host = %joined.host, name = %joined.name, "a host joined, or renewed its certificate");
            JoinMessage::Joined(joined)
        }
        Err(EnrollmentError::Denied) => JoinMessage::Denied(Denied {}),
        Err(error) => return Err(error.into()),
    };
    wire.write(&answer.to_frame()).await?;
    wire.finish();
    let _ = timeout(DELIVERY, connection.closed()).await;
    Ok(())
}
