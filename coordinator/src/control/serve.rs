//! Moves the bytes of one link between its stream and its [`Session`], and does what the session asks for.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use cloison_proto::control::frame::{Frame, FrameBuffer, FrameError};
use cloison_proto::control::join::{EXPORTER_LABEL, EXPORTER_LEN, RenewRequest};
use cloison_proto::control::rotate::{KeyDenied, KeyProof};
use cloison_proto::id::HostId;
use cloison_proto::key::IdentityKey;
use cloison_proto::version::{MeshTime, Timestamp};
use quinn::{Connection, ReadError, RecvStream, SendStream, WriteError};
use tokio::time::{Instant, timeout};

use super::link::{Fault, goodbye};
use super::listener::Shared;
use super::session::{Effect, Now, OpenError, Peer, Session};
use crate::enrollment::{Admission, EnrollmentError};
use crate::publish::Farewell;
use crate::store::{KeyOffered, StoreError};
use crate::trust::LinkedHost;

/// How long an agent may take to open its stream and to greet.
const GREETING: Duration = Duration::from_secs(10);

/// How long one frame may take: a link that does not read is none.
const WRITE: Duration = Duration::from_secs(30);

/// How often a link that nothing happens on looks around, and notes that the host is in contact.
const TICK: Duration = Duration::from_secs(60);

/// Bytes taken off a stream at once.
const READ: usize = 16 * 1024;

/// Why a link ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    /// This side ended it.
    #[error("the link was ended: {}", .0.code())]
    Dismissed(Farewell),
    /// The agent did not do what a link asks for.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// It did not begin.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The agent took too long.
    #[error("the agent took too long to {0}")]
    Slow(&'static str),
    /// The agent closed its stream.
    #[error("the agent closed the link")]
    Closed,
    /// The connection broke.
    #[error(transparent)]
    Connection(#[from] quinn::ConnectionError),
    /// The stream broke.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The stream broke.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A frame of ours that no frame can hold.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The store did not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No certificate could be made.
    #[error(transparent)]
    Certificate(#[from] EnrollmentError),
}

impl LinkError {
    /// What the agent is told, in the last frame and as the reason of the close.
    pub(super) const fn farewell(&self) -> Option<Farewell> {
        match self {
            Self::Dismissed(farewell) => Some(*farewell),
            Self::Fault(Fault::Rate) => Some(Farewell::Rate),
            Self::Fault(Fault::Malformed(_) | Fault::Order)
            | Self::Open(_)
            | Self::Slow(_)
            | Self::Closed
            | Self::Connection(_)
            | Self::Read(_)
            | Self::Write(_)
            | Self::Frame(_)
            | Self::Store(_)
            | Self::Certificate(_) => None,
        }
    }
}

/// A stream of frames.
pub(super) struct Wire {
    send: SendStream,
    recv: RecvStream,
    buffer: FrameBuffer,
    chunk: Box<[u8]>,
}

impl Wire {
    pub(super) fn new((send, recv): (SendStream, RecvStream)) -> Self {
        Self {
            send,
            recv,
            buffer: FrameBuffer::default(),
            chunk: vec![0; READ].into(),
        }
    }

    /// The next frame. May be dropped while it waits: nothing is lost.
    pub(super) async fn read(&mut self) -> Result<Frame, LinkError> {
        loop {
            if let Some(frame) = self.buffer.next_frame().map_err(Fault::from)? {
                return Ok(frame);
            }
            let len = self.recv.read(&mut self.chunk).await?.ok_or(LinkError::Closed)?;
            self.buffer.push(&self.chunk[..len]);
        }
    }

    /// Sends a whole frame.
    pub(super) async fn write(&mut self, frame: &Frame) -> Result<(), LinkError> {
        let bytes = frame.to_bytes()?;
        timeout(WRITE, self.send.write_all(&bytes))
            .await
            .map_err(|_| LinkError::Slow("read"))??;
        Ok(())
    }

    /// Says that nothing more comes.
    pub(super) fn finish(&mut self) {
        // A stream that is closed already needs no end.
        let _ = self.send.finish();
    }
}

/// One link, from its first frame to its end.
pub(super) async fn link(shared: &Shared, connection: &Connection, linked: LinkedHost) -> Result<(), LinkError> {
    let stream = timeout(GREETING, connection.accept_bi())
        .await
        .map_err(|_| LinkError::Slow("open a stream"))??;
    let mut wire = Wire::new(stream);
    let first = timeout(GREETING, wire.read()).await.map_err(|_| LinkError::Slow("greet"))??;
    let record = shared.store.host(linked.host).await?;
    // A host that joined a moment ago may be faster than the publisher.
    shared.hub.knows(linked.host, GREETING).await;
    let peer = Peer {
        host: linked.host,
        address: connection.remote_address().ip(),
        incarnation: record.incarnation,
    };
    shared.store.record_sighting(linked.host, None, peer.address.to_canonical()).await?;
    let (mut session, effects) = Session::open(&shared.hub, peer, &first, shared.now())?;
    tracing::info!(host = %linked.host, "a host linked");
    let certificates = [record.certificates.current, record.certificates.next].into_iter().flatten();
    let ends = certificates
        .filter(|(serial, _)| *serial == linked.serial)
        .map(|(_, ends)| ends)
        .max();
    let mut link = Served {
        shared,
        connection,
        linked,
        // A restored coordinator admits certificates younger than its database, and has to hear what their hosts know.
        ends: match shared.store.inventory().read_only {
            Some(_) => ends.unwrap_or(shared.store.now().plus(shared.config.host_lifetime.get())),
            None => ends.unwrap_or_default(),
        },
        reissued: false,
        challenge: None,
    };
    for effect in effects {
        link.perform(&mut session, effect).await?;
    }
    let ended = link.talk(&mut session, &mut wire).await;
    if let Err(error) = &ended
        && let Some(farewell) = error.farewell()
    {
        // A stream that is stuck in the middle of a frame cannot carry it; the reason of the close says the same.
        let _ = timeout(Duration::from_secs(1), wire.write(&goodbye(farewell))).await;
        wire.finish();
        let _ = timeout(Duration::from_millis(200), wire.send.stopped()).await;
    }
    ended
}

/// A link that is served.
struct Served<'a> {
    shared: &'a Shared,
    connection: &'a Connection,
    linked: LinkedHost,
    /// When the certificate ends that the link was opened with.
    ends: MeshTime,
    /// Whether the host was given a certificate of the authority that took the place of its own one's.
    reissued: bool,
    /// The challenge that the next proof of a WireGuard key has to answer.
    challenge: Option<Admission>,
}

impl Served<'_> {
    async fn talk(&mut self, session: &mut Session, wire: &mut Wire) -> Result<(), LinkError> {
        let (shared, slot) = (self.shared, Arc::clone(session.slot()));
        let mut noted = Instant::now();
        loop {
            if let Some(farewell) = session.farewell() {
                return Err(LinkError::Dismissed(farewell));
            }
            if shared.store.now() >= self.ends {
                return Err(LinkError::Dismissed(Farewell::Expired));
            }
            if !shared.verifier.trusts(&self.linked) {
                return Err(LinkError::Dismissed(Farewell::Expired));
            }
            if !self.reissued && !shared.verifier.is_current(&self.linked) {
                self.reissued = true;
                self.perform(session, Effect::IssueCertificate).await?;
            }
            if let Some(frame) = session.next_frame() {
                self.send(session, wire, &frame).await?;
                continue;
            }
            tokio::select! {
                frame = wire.read() => {
                    if let Some(effect) = session.on_frame(&frame?, shared.now())? {
                        self.perform(session, effect).await?;
                    }
                }
                () = slot.woken() => session.refresh(shared.store.now()),
                () = tokio::time::sleep(until(session.lease_due(), self.ends, shared.store.now())) => {
                    session.on_address(self.connection.remote_address().ip());
                    session.refresh(shared.store.now());
                    if noted.elapsed() >= TICK {
                        noted = Instant::now();
                        self.perform(session, session.contact()).await?;
                    }
                }
            }
        }
    }

    /// Sends a frame, unless the link has to end before the agent took it.
    async fn send(&self, session: &mut Session, wire: &mut Wire, frame: &Frame) -> Result<(), LinkError> {
        let slot = Arc::clone(session.slot());
        let mut write = pin!(wire.write(frame));
        loop {
            tokio::select! {
                written = &mut write => return written,
                () = slot.woken() => match session.farewell() {
                    Some(farewell) => return Err(LinkError::Dismissed(farewell)),
                    None => session.refresh(self.shared.store.now()),
                },
            }
        }
    }
}

/// How long to wait for what is due at mesh time `due`, or for the end of the link's certificate: at most a tick, because the wall clock may
/// be set forward.
fn until(due: Option<MeshTime>, ends: MeshTime, now: MeshTime) -> Duration {
    let first = due.map_or(ends, |due| due.min(ends));
    Duration::from_secs(first.0.saturating_sub(now.0)).clamp(Duration::from_millis(200), TICK)
}

impl Served<'_> {
    async fn perform(&mut self, session: &mut Session, effect: Effect) -> Result<(), LinkError> {
        let (shared, linked) = (self.shared, &self.linked);
        match effect {
            Effect::NoteSeen(incarnation) => shared.store.record_seen(linked.host, incarnation).await?,
            Effect::NoteCloned => {
                tracing::warn!(host = %linked.host, "two machines use this host's keys, by all appearance");
                shared.store.record_cloned(linked.host).await?;
            }
            Effect::NoteHeld(version) => {
                let source = self.connection.remote_address().ip().to_canonical();
                shared.store.record_sighting(linked.host, Some(version), source).await?;
            }
            // Nothing is issued meanwhile. The agent asks again.
            Effect::IssueCertificate if shared.store.inventory().read_only.is_some() => {}
            Effect::IssueCertificate => {
                if !shared.may_renew(&linked.identity) {
                    tracing::warn!(host = %linked.host, "a host asks for certificates too often");
                    return Ok(());
                }
                let certificate = shared.enrollment.certificate(linked.host, &linked.identity).await?;
                session.on_certificate(certificate);
            }
            Effect::ChallengeKey => {
                let admission = shared.enrollment.admit()?;
                session.on_key_challenge(admission.key_challenge());
                self.challenge = Some(admission);
            }
            Effect::JudgeKey(proof) => {
                if let Some(code) = self.judge_key(&proof).await? {
                    tracing::warn!(host = %self.linked.host, code, "a new WireGuard key was not taken");
                    let code = code.to_owned();
                    session.on_key_denied(KeyDenied {
                        wg_key: proof.wg_key,
                        code,
                    });
                }
            }
        }
        Ok(())
    }

    /// Judges the proof of a new WireGuard key, and keeps the key if it holds; otherwise the code of what is wrong. A challenge is good for
    /// one proof.
    async fn judge_key(&mut self, proof: &KeyProof) -> Result<Option<&'static str>, LinkError> {
        let (shared, linked) = (self.shared, &self.linked);
        let Some(challenge) = self.challenge.take() else {
            return Ok(Some("proof"));
        };
        let mut exporter = [0; EXPORTER_LEN];
        if self.connection.export_keying_material(&mut exporter, EXPORTER_LABEL, &[]).is_err() {
            return Ok(Some("proof"));
        }
        if challenge.verify_key(&exporter, linked.host, &linked.identity, proof).is_err() {
            return Ok(Some("proof"));
        }
        if !shared.may_rotate(linked.host) {
            return Ok(Some("rate"));
        }
        match shared
            .store
            .offer_wg_key(linked.host, &linked.identity, &proof.wg_key, proof.alone == Some(true))
            .await
        {
            Ok(KeyOffered::Taken) => {
                tracing::info!(host = %linked.host, key = %proof.wg_key, "a host changes its WireGuard key");
                Ok(None)
            }
            Ok(KeyOffered::Known) => Ok(Some("key_known")),
            Ok(KeyOffered::Foreign) => Ok(Some("proof")),
            Err(StoreError::StorageFull | StoreError::ReadOnly(_) | StoreError::Refused(_)) => Ok(Some("unavailable")),
            Err(error) => Err(error.into()),
        }
    }
}

impl Shared {
    /// Whether the host with this key may have another certificate already.
    pub(super) fn may_renew(&self, identity: &IdentityKey) -> bool {
        self.renewals.take(*identity, self.now().monotonic)
    }

    /// Whether the host may have another WireGuard key already.
    fn may_rotate(&self, host: HostId) -> bool {
        self.rotations.take(host, self.now().monotonic)
    }

    /// Whether the request names a host of the mesh together with that host's key.
    pub(super) fn is_host(&self, request: &RenewRequest) -> bool {
        let inventory = self.store.inventory();
        inventory
            .hosts
            .get(&request.host)
            .is_some_and(|host| host.identity == request.identity)
    }

    /// Both times.
    pub(super) fn now(&self) -> Now {
        let since = u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        Now {
            mesh: self.store.now(),
            monotonic: Timestamp(since),
        }
    }
}
