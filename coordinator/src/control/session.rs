//! A link and the hub: what an agent says goes to the hub, what the hub offers goes to the agent. Without IO, clock or store: what has to be
//! done there comes out as an [`Effect`]. The QUIC listener and the simulation drive the same [`Session`].

use std::net::IpAddr;
use std::sync::Arc;

use cloison_proto::control::frame::Frame;
use cloison_proto::control::rotate::{KeyChallenge, KeyDenied, KeyProof};
use cloison_proto::id::HostId;
use cloison_proto::version::{MeshTime, Timestamp, Version};

use super::link::{Event, Fault, Link};
use crate::publish::{Farewell, Hub, Slot};

/// Who is at the other end, as the listener found out.
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    /// The host, by its certificate.
    pub host: HostId,
    /// Where its link comes from.
    pub address: IpAddr,
    /// The highest incarnation that the store knows of it.
    pub incarnation: Option<u64>,
}

/// The two times that a link depends on.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// For leases.
    pub mesh: MeshTime,
    /// For budgets.
    pub monotonic: Timestamp,
}

/// What has to be done outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Note that the host is in contact.
    NoteSeen(u64),
    /// The host proved by this coordinator's own signature that it was given this version: note it, if the store is behind it.
    NoteHeld(Version),
    /// Audit that its keys are used by two machines.
    NoteCloned,
    /// Issue a certificate, and give it to [`Session::on_certificate`].
    IssueCertificate,
    /// Make a challenge, and give its public half to [`Session::on_key_challenge`].
    ChallengeKey,
    /// Judge the proof of a new WireGuard key; what is not taken goes to [`Session::on_key_denied`].
    JudgeKey(Box<KeyProof>),
}

/// A link that is open.
#[derive(Debug)]
pub struct Session {
    hub: Arc<Hub>,
    host: HostId,
    slot: Arc<Slot>,
    link: Link,
    incarnation: u64,
    lease_due: Option<MeshTime>,
}

/// Why a link does not begin.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The agent did not greet.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// The mesh has no such host, or takes no links at the moment.
    #[error("the mesh has no host {0}, or its coordinator is stopping")]
    NotHere(HostId),
}

impl Session {
    /// Opens a link with its first frame.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(hub: &Arc<Hub>, peer: Peer, first: &Frame, now: Now) -> Result<(Self, Vec<Effect>), OpenError> {
        let hello = Link::greeting(first)?;
        let welcome = hub
            .attach(peer.host, peer.address, peer.incarnation, &hello)
            .ok_or(OpenError::NotHere(peer.host))?;
        let mut effects = vec![Effect::NoteSeen(welcome.incarnation)];
        if welcome.cloned {
            effects.push(Effect::NoteCloned);
        }
        let mut session = Self {
            hub: Arc::clone(hub),
            host: peer.host,
            slot: welcome.slot,
            link: Link::new(&hello, welcome.base, now.monotonic),
            incarnation: welcome.incarnation,
            lease_due: None,
        };
        session.refresh(now.mesh);
        Ok((session, effects))
    }

    /// Takes a frame from the agent.
    ///
    /// # Errors
    /// [`Fault`]: the link has to end.
    pub fn on_frame(&mut self, frame: &Frame, now: Now) -> Result<Option<Effect>, Fault> {
        match self.link.on_frame(frame, now.monotonic)? {
            None => {}
            Some(Event::Acked(ack)) => self.hub.acked(self.host, &self.slot, &ack),
            Some(Event::Nacked(nack)) => {
                self.hub.nacked(self.host, &self.slot, &nack);
                self.refresh(now.mesh);
            }
            Some(Event::Moved(endpoints)) => self.hub.moved(self.host, &self.slot, endpoints),
            Some(Event::Reported(report)) => self.hub.reported(self.host, &self.slot, report),
            Some(Event::Held(view)) => return Ok(self.hub.held(self.host, &view).map(Effect::NoteHeld)),
            Some(Event::RenewCertificate) => return Ok(Some(Effect::IssueCertificate)),
            Some(Event::KeyOffered) => return Ok(Some(Effect::ChallengeKey)),
            Some(Event::KeyProven(proof)) => return Ok(Some(Effect::JudgeKey(proof))),
        }
        Ok(None)
    }

    /// Takes what the hub has for this host: after [`Slot::woken`], and when [`Session::lease_due`] has come.
    pub fn refresh(&mut self, now: MeshTime) {
        if let Some(offer) = self.hub.offer(self.host, now) {
            self.lease_due = Some(offer.lease_due());
            self.link.on_offer(offer);
        }
        self.link.on_hints(self.hub.hints(self.host));
        if self.hub.take_key_wish(self.host, &self.slot) {
            self.link.ask_for_key();
        }
    }

    /// The link comes from this address by now.
    pub fn on_address(&self, address: IpAddr) {
        self.hub.seen(self.host, &self.slot, address);
    }

    /// Sends a certificate.
    pub fn on_certificate(&mut self, der: Vec<u8>) {
        self.link.on_certificate(der);
    }

    /// Challenges the agent to prove a new WireGuard key.
    pub fn on_key_challenge(&mut self, challenge: KeyChallenge) {
        self.link.on_key_challenge(challenge);
    }

    /// Says that a new WireGuard key is not taken.
    pub fn on_key_denied(&mut self, denied: KeyDenied) {
        self.link.on_key_denied(denied);
    }

    /// The next frame to be sent.
    pub fn next_frame(&mut self) -> Option<Frame> {
        self.link.next_frame()
    }

    /// When [`Session::refresh`] is due for a lease.
    #[must_use]
    pub const fn lease_due(&self) -> Option<MeshTime> {
        self.lease_due
    }

    /// Why the link has to end, if it has to.
    #[must_use]
    pub fn farewell(&self) -> Option<Farewell> {
        self.slot.farewell()
    }

    /// What wakes the link.
    #[must_use]
    pub const fn slot(&self) -> &Arc<Slot> {
        &self.slot
    }

    /// What is to be noted from time to time.
    #[must_use]
    pub const fn contact(&self) -> Effect {
        Effect::NoteSeen(self.incarnation)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.hub.detach(self.host, &self.slot);
    }
}
