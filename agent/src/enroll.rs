//! Enrollment: [`join`] reads top to bottom. What this host can see by itself (a token that was copied badly, a mesh that it is in already)
//! is named here; what the coordinator refuses looks always the same, so that a token's holder learns nothing by asking.

use cloison_proto::control::frame::FrameError;
use cloison_proto::control::join::{JoinMessage, JoinRequest, Joined, RenewRequest, prove, prove_renewal};
use cloison_proto::id::{HostId, MeshId};
use cloison_proto::key::{SigningKey, VerifyingKey};
use cloison_proto::label::{ComponentName, HostName};
use cloison_proto::signed::Signed;
use cloison_proto::token::{EnrollmentToken, TokenError};
use cloison_proto::trust::{Role, SpiffeId, Trust, TrustError, root_pin};
use cloison_proto::version::MeshTime;
use tokio::time::timeout;

use crate::control::certificate::{CertificateError, Window, check_host};
use crate::control::connection::{self, Attempt, ConnectionError, Frames, PATIENCE};
use crate::control::verifier::Anchors;
use crate::state::clock::WallTime;
use crate::state::identity::{Membership, store_certificate};
use crate::state::keys::{HostKeys, KeysError};
use crate::state::{StateDir, StateError};

/// What a join ended with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enrolled {
    /// The mesh.
    pub mesh: MeshId,
    /// The host's id.
    pub host: HostId,
    /// The host's name.
    pub name: HostName,
    /// Components that the policy puts on it.
    pub components: Vec<ComponentName>,
    /// What people should know.
    pub warnings: Vec<String>,
}

/// What is said of an answer that is not what a coordinator of this mesh would say.
pub const NOT_HOLDING: &str = "the coordinator's answer does not hold";

/// What is said of a renewal that failed.
pub const NO_CERTIFICATE: &str = "no new certificate";

/// Why a host was not enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// The text is no token.
    #[error("this is no enrollment token: {0}")]
    Token(#[from] TokenError),
    /// This state directory belongs to an enrolled host.
    #[error("this host is already enrolled: it is `{name}` of {mesh}")]
    AlreadyEnrolled {
        /// Its name.
        name: HostName,
        /// Its mesh.
        mesh: MeshId,
    },
    /// It is enrolled, and the token is for another mesh.
    #[error("this host is enrolled in {mesh} as `{name}`, and the token is for {other}")]
    OtherMesh {
        /// Its name.
        name: HostName,
        /// Its mesh.
        mesh: MeshId,
        /// The token's.
        other: MeshId,
    },
    /// Refused, and by this host's clock the token has ended.
    #[error("enroll_denied: by this host's clock the token ended {ago} s ago")]
    Expired {
        /// How long ago, in seconds.
        ago: u64,
    },
    /// Refused.
    #[error("enroll_denied: the coordinator refused the token")]
    Denied,
    /// No coordinator could be asked.
    #[error("no coordinator could be asked: {}", .tried.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Unreachable {
        /// What was tried.
        tried: Vec<ConnectionError>,
    },
    /// The answer is not what a coordinator of this mesh would say.
    #[error("{NOT_HOLDING}: {0}")]
    Answer(&'static str),
    /// The certificate in the answer is not ours.
    #[error("{NOT_HOLDING}: {0}")]
    Certificate(#[from] CertificateError),
    /// The trust in the answer does not hold.
    #[error("{NOT_HOLDING}: {0}")]
    Trust(#[from] TrustError),
    /// The connection failed in the middle.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// The keys.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
}

impl EnrollError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::Token(_) => "copy the whole token, one line that starts with `cloison1_`, as `cloison token create` printed it".into(),
            Self::AlreadyEnrolled { .. } => {
                "start the agent with `cloison-agent run`; to enroll anew, run `cloison-agent leave` first".into()
            }
            Self::OtherMesh { .. } => {
                "run `cloison-agent leave` first, or use another --state-dir: one directory holds one host of one mesh".into()
            }
            Self::Expired { .. } => "make a new token with `cloison token create`; if this host's clock is wrong, set it".into(),
            Self::Denied => {
                "a token is refused when it was used before, has ended, was withdrawn, or is meant for another address or host; \
                 `cloison audit` at the coordinator says which (host.join, refused). `cloison token create` makes a new one"
                    .into()
            }
            Self::Unreachable { tried } if tried.iter().any(|e| matches!(e, ConnectionError::Untrusted { .. })) => {
                "the server at this address is not the coordinator that made the token: was the mesh made anew, or is something in between?"
                    .into()
            }
            Self::Unreachable { .. } => {
                "check that the coordinator runs, and that this host can reach its address over UDP (port 7443 unless set otherwise)".into()
            }
            Self::Answer(_) | Self::Certificate(_) | Self::Trust(_) => {
                "nothing was stored; look at the coordinator's log, and compare the versions of agent and coordinator".into()
            }
            Self::Connection(_) => "nothing is lost: run the same command again within ten minutes".into(),
            Self::Keys(KeysError::Entropy(_)) => "try again".into(),
            Self::Keys(KeysError::State(e)) | Self::State(e) => e.hint(),
        }
    }

    /// Whether it was the coordinator's decision.
    #[must_use]
    pub const fn is_denied(&self) -> bool {
        matches!(self, Self::Denied | Self::Expired { .. })
    }
}

/// Enrolls this host with the token in `text`.
///
/// # Errors
/// [`EnrollError`]; unless it says otherwise, the same token can be used again by this host.
pub async fn join(dir: &StateDir, text: &str, coordinators: &[String], wall: WallTime) -> Result<Enrolled, EnrollError> {
    // What can be seen without asking anybody.
    let token: EnrollmentToken = text.parse()?;
    if let Some(us) = Membership::load(dir)? {
        return Err(already(us, token.mesh));
    }

    // Keys are made here and stay here. A join that was cut off is repeated with the same ones.
    let keys = HostKeys::load_or_make(dir)?;

    // The first coordinator that answers as one of this mesh is asked.
    let addresses = if coordinators.is_empty() { &*token.addresses } else { coordinators };
    let mut frames = reach(addresses, &token, wall).await?;
    let mut warnings = Vec::new();
    if frames.clock_off() {
        warnings.push(CLOCK_OFF.to_owned());
    }

    // It challenges; both keys are proven for this very connection.
    let answer = ask(&mut frames, |challenge, exporter| {
        let (identity_proof, wg_proof) = prove(exporter, token.id, &keys.identity, &keys.wg, challenge);
        let request = JoinRequest {
            token: token.id,
            secret: *token.secret.expose(),
            identity: keys.identity.identity(),
            wg_key: keys.wg.public(),
            identity_proof,
            wg_proof,
            software: env!("CARGO_PKG_VERSION").into(),
        };
        request.into()
    })
    .await?;
    frames.close("done").await;
    let Some(joined) = answer else { return Err(denied(&token, wall)) };

    // The answer must hold by what the token pins, before any of it is kept.
    let root = pinned_root(&joined, &token)?;
    let (mut membership, _) = accept(&joined, token.mesh, root, &keys.identity)?;
    membership.addresses = addresses.to_vec();
    store_certificate(dir, &joined.certificate)?;
    membership.store(dir)?;
    Ok(Enrolled {
        mesh: joined.mesh,
        host: joined.host,
        name: joined.name,
        components: joined.components,
        warnings,
    })
}

/// What is said about a wall clock outside the validity of the coordinator's certificate.
pub const CLOCK_OFF: &str =
    "this host's clock and the coordinator's certificate disagree: check the time here (`timedatectl`); nothing stops because of it";

/// What a renewal by the identity key brought.
#[derive(Debug, Clone)]
pub struct Renewed {
    /// DER of the certificate.
    pub certificate: Vec<u8>,
    /// When it holds.
    pub window: Window,
    /// Whom the coordinator says to trust: it counts as far as [`Trust::may_replace`] lets it.
    pub trust: Vec<Signed>,
}

/// Asks for a new certificate by the identity key, for a host whose certificate ran out or whose trust is outdated, and stores what comes. A
/// coordinator whose issuer is not trusted here must show a chain to the root that this host pins: the host may have been away while the
/// issuer changed.
///
/// # Errors
/// [`EnrollError`]; [`EnrollError::Denied`] for a host that is revoked or was away for too long.
pub async fn renew(
    dir: &StateDir,
    us: &Membership,
    address: &str,
    attempt: Attempt,
    identity: &SigningKey,
) -> Result<Renewed, EnrollError> {
    let mut frames = match connection::join(address, attempt.clone()).await {
        Err(ConnectionError::Untrusted { .. }) => {
            let anchors = Anchors::Pin(root_pin(&us.root));
            connection::join(address, Attempt { anchors, ..attempt }).await?
        }
        reached => reached?,
    };
    let answer = ask(&mut frames, |_, exporter| {
        let request = RenewRequest {
            host: us.host,
            identity: identity.identity(),
            identity_proof: prove_renewal(exporter, us.host, identity),
        };
        request.into()
    })
    .await?;
    frames.close("done").await;
    let joined = answer.ok_or(EnrollError::Denied)?;
    if joined.host != us.host {
        return Err(EnrollError::Answer("it is about another host"));
    }
    let (_, window) = accept(&joined, us.mesh, us.root, identity)?;
    store_certificate(dir, &joined.certificate)?;
    Ok(Renewed {
        certificate: joined.certificate,
        window,
        trust: joined.trust,
    })
}

fn already(us: Membership, other: MeshId) -> EnrollError {
    if us.mesh == other {
        EnrollError::AlreadyEnrolled {
            name: us.name,
            mesh: us.mesh,
        }
    } else {
        EnrollError::OtherMesh {
            name: us.name,
            mesh: us.mesh,
            other,
        }
    }
}

/// All refusals look alike, but a token that has ended by our own reading is the likeliest cause. It is asked nevertheless: the clock here
/// may be the one that is wrong.
const fn denied(token: &EnrollmentToken, wall: WallTime) -> EnrollError {
    match wall.0.checked_sub(token.expires.0) {
        Some(ago) if ago > 0 => EnrollError::Expired { ago },
        Some(_) | None => EnrollError::Denied,
    }
}

async fn reach(addresses: &[String], token: &EnrollmentToken, wall: WallTime) -> Result<Frames, EnrollError> {
    let attempt = Attempt {
        mesh: token.mesh,
        anchors: Anchors::Pin(token.root_pin),
        wall,
        past: MeshTime(0),
    };
    let mut tried = Vec::new();
    for address in addresses {
        match connection::join(address, attempt.clone()).await {
            Ok(frames) => return Ok(frames),
            Err(e) => tried.push(e),
        }
    }
    Err(EnrollError::Unreachable { tried })
}

/// Challenge, request, answer; `None` for a refusal.
async fn ask(
    frames: &mut Frames,
    request: impl FnOnce(&cloison_proto::control::join::Challenge, &[u8; 32]) -> JoinMessage,
) -> Result<Option<Joined>, EnrollError> {
    let JoinMessage::Challenge(challenge) = next(frames).await? else {
        return Err(EnrollError::Answer("it did not begin with a challenge"));
    };
    let exporter = frames.exporter()?;
    frames.send(&request(&challenge, &exporter).to_frame()).await?;
    match next(frames).await? {
        JoinMessage::Joined(joined) => Ok(Some(joined)),
        JoinMessage::Denied(_) => Ok(None),
        JoinMessage::Challenge(_) | JoinMessage::JoinRequest(_) | JoinMessage::RenewRequest(_) => {
            Err(EnrollError::Answer("it is neither a yes nor a no"))
        }
    }
}

/// The next message of a kind that we know; the answer to a join may take a transaction and a signature, and no longer than twice our patience.
async fn next(frames: &mut Frames) -> Result<JoinMessage, EnrollError> {
    let address = frames.address().to_owned();
    let message = async {
        loop {
            let frame = frames.next().await?;
            match JoinMessage::from_frame(&frame) {
                Ok(Some(message)) => return Ok(message),
                Ok(None) => {}
                Err(source) => return Err(malformed(&address, source)),
            }
        }
    };
    match timeout(PATIENCE * 2, message).await {
        Ok(message) => message,
        Err(_) => Err(ConnectionError::Ended {
            address: address.clone(),
            why: "no answer".into(),
        }
        .into()),
    }
}

fn malformed(address: &str, source: FrameError) -> EnrollError {
    EnrollError::Connection(ConnectionError::Frames {
        address: address.into(),
        source,
    })
}

fn pinned_root(joined: &Joined, token: &EnrollmentToken) -> Result<VerifyingKey, EnrollError> {
    let root = VerifyingKey::from_bytes(joined.root).map_err(|_| EnrollError::Answer("its root is no key"))?;
    if root_pin(&root) == token.root_pin {
        Ok(root)
    } else {
        Err(EnrollError::Answer("its root is not the one that the token pins"))
    }
}

/// Checks an answer against mesh, root and our own key, and makes a membership of it.
fn accept(joined: &Joined, mesh: MeshId, root: VerifyingKey, identity: &SigningKey) -> Result<(Membership, Window), EnrollError> {
    if joined.mesh != mesh {
        return Err(EnrollError::Answer("it is about another mesh"));
    }
    let wanted = SpiffeId {
        mesh,
        role: Role::Host(joined.host),
    };
    let window = check_host(&joined.certificate, wanted, &identity.identity())?;
    // The certificate was made a moment ago, so it tells the time: better than a wall clock that may be off by years, or by those seconds
    // by which the mesh itself is older.
    let known_time = MeshTime(window.issued_at());
    let trust = Trust::with_items(mesh, root, &joined.trust, known_time)?;
    if trust.coordinator_issuers().is_empty() {
        return Err(EnrollError::Answer("it names no issuer of coordinators"));
    }
    let membership = Membership {
        mesh,
        host: joined.host,
        name: joined.name.clone(),
        root,
        trust: joined.trust.clone(),
        known_time,
        addresses: Vec::new(),
    };
    Ok((membership, window))
}

#[cfg(test)]
#[path = "enroll_tests.rs"]
mod tests;
