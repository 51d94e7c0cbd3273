//! The link's state machine: pure. The caller brings what happened (a frame, a moment, an outcome) and carries out the [`Output`]s in order.
//!
//! Rules that hold whatever comes in:
//! - only a [`VerifiedView`] is ever offered for installation, none older than the floor, and none of the floor's version with another
//!   content (I12);
//! - a view and its lease go together: a view waits up to [`LEASE_WAIT`] for its lease, so that live flows do not see a moment without;
//! - `Ack` follows the caller's word that the view is in force and on disk, never the arrival;
//! - a link asks for one certificate at most, and goes over to it;
//! - a lease never counts unless it is newer than the last one, signed, ours, and for a view that we hold.

use std::sync::Arc;
use std::time::Duration;

use cloison_proto::control::agent::{
    Ack, AgentMessage, Endpoint, Endpoints, Held, Hello, MAX_DETAIL, MAX_ENDPOINTS, Nack, RenewCertificate, Report,
};
use cloison_proto::control::coordinator::{CoordinatorMessage, Goodbye, PeerHint, ViewItems, ViewStart};
use cloison_proto::control::frame::Frame;
use cloison_proto::control::rotate::{KeyChallenge, KeyDenied, KeyOffer, KeyProof};
use cloison_proto::lease::Lease;
use cloison_proto::signed::{Signed, SignedError};
use cloison_proto::trust::Trust;
use cloison_proto::version::{MeshTime, Timestamp, Version};
use cloison_proto::view::{Floor, Header, VerifiedView, View};

use super::assembly::{Assembly, Refusal};
use super::backoff::Backoff;
use super::certificate::Window;
use crate::state::clock::MeshClock;
use crate::state::identity::Membership;
use crate::state::view_cache::{Cached, HeldLease};

/// How long a view waits for its lease before it is installed without one, which permits nothing.
pub const LEASE_WAIT: Duration = Duration::from_secs(1);

/// How long to wait for an answer to a request for a certificate before asking again.
const RENEW_AGAIN: Duration = Duration::from_secs(600);

/// Longest wait that a coordinator can ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);

/// What the caller is to do.
#[derive(Debug)]
pub enum Output {
    /// Make a link; by the identity key first, if the certificate has run out.
    Connect {
        /// Whether a new certificate is needed before.
        renew: bool,
    },
    /// Send a message.
    Send(AgentMessage),
    /// Put a view in force, then say [`Link::applied`] or [`Link::not_applied`].
    Install(Box<Offer>),
    /// Go on with the view in force under a new lease.
    Lease(Box<HeldLease>),
    /// Where peers may be.
    Hints(Vec<PeerHint>),
    /// Keep a new certificate (DER), then say [`Link::certificate`].
    Certificate(Vec<u8>),
    /// Keep these statements of trust.
    Trust(Vec<Signed>),
    /// What the coordinator says about a change of the WireGuard key.
    Key(KeyNews),
    /// This host is no member any more: nothing may pass.
    Revoked,
    /// End the link; [`Link::disconnected`] follows.
    Close(&'static str),
    /// Tell people.
    Warning(String),
}

/// What a coordinator says about a change of the WireGuard key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyNews {
    /// An operator asks for one.
    Asked,
    /// The next key is to be proven.
    Challenge(KeyChallenge),
    /// The next key is not taken.
    Denied(KeyDenied),
}

/// A verified view to be put in force, with its lease if one came.
#[derive(Debug)]
pub struct Offer {
    /// The view.
    pub view: VerifiedView,
    /// Its lease; without one, nothing is allowed.
    pub lease: Option<HeldLease>,
}

/// Why a coordinator ends the link with a host that was revoked.
pub const REVOKED: &str = "revoked";

/// Why there is no link before the first attempt.
pub const STARTING: &str = "starting";

/// Where the link stands, for `status`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkState {
    /// Waits to try again.
    Waiting {
        /// Until when.
        until: Timestamp,
        /// Why the last attempt ended.
        why: String,
    },
    /// An attempt is under way.
    Connecting,
    /// It stands.
    Linked {
        /// Since when.
        since: Timestamp,
    },
}

/// The link of one host.
#[derive(Debug)]
pub struct Link {
    us: Membership,
    software: String,
    incarnation: u64,
    trust: Trust,
    clock: MeshClock,
    last_issued: MeshTime,
    floor: Option<Floor>,
    /// The view in force.
    in_force: Option<VerifiedView>,
    /// A verified view that waits for its lease, and since when.
    held: Option<(VerifiedView, Timestamp)>,
    /// A view handed out for installation.
    installing: Option<VerifiedView>,
    assembly: Option<Assembly>,
    state: LinkState,
    backoff: Backoff,
    /// Whether a frame came on this link: only then it counts as one that held.
    heard: bool,
    pause: Duration,
    /// Whether the next hello asks for a snapshot.
    wants_snapshot: bool,
    certificate: Option<Window>,
    /// Whether the link stands on a certificate before that one.
    outdated: bool,
    /// When the last certificate came.
    renewed: Option<Timestamp>,
    renewal_asked: Option<Timestamp>,
    must_renew: bool,
    endpoints: Vec<Endpoint>,
    report: Option<Report>,
}

impl Link {
    /// A link of the host `us` with what was found on disk; `seed` spreads the waits of many hosts.
    #[must_use]
    pub fn new(us: Membership, cached: &Cached, certificate: Option<Window>, incarnation: u64, seed: u64, now: Timestamp) -> Self {
        Self {
            us,
            software: env!("CARGO_PKG_VERSION").to_owned(),
            incarnation,
            trust: cached.trust.clone(),
            clock: cached.clock,
            last_issued: cached.lease.as_ref().map_or(MeshTime(0), |(held, _)| held.lease.issued_at),
            floor: cached.floor,
            in_force: cached.view.clone(),
            held: None,
            installing: None,
            assembly: None,
            state: LinkState::Waiting {
                until: now,
                why: STARTING.into(),
            },
            backoff: Backoff::new(seed),
            heard: false,
            pause: Duration::ZERO,
            wants_snapshot: false,
            must_renew: certificate.is_none(),
            certificate,
            outdated: false,
            renewed: None,
            renewal_asked: None,
            endpoints: Vec::new(),
            report: None,
        }
    }

    /// Time passed: connects when it is time, gives up waiting for a lease, asks for a certificate at half life, and goes over to a new one
    /// between two views.
    pub fn tick(&mut self, now: Timestamp) -> Vec<Output> {
        let mut out = Vec::new();
        if let Some((view, _)) = self.held.take_if(|(_, since)| now.since(*since) >= LEASE_WAIT) {
            out.push(Output::Warning(format!(
                "view {} came without a lease: nothing is allowed until one comes",
                view.header().version
            )));
            self.offer(view, None, &mut out);
        }
        match &self.state {
            LinkState::Waiting { until, .. } if *until <= now => {
                self.state = LinkState::Connecting;
                self.refresh_trust(now);
                out.push(Output::Connect {
                    renew: self.must_renew || self.certificate.is_some_and(|w| w.ended_at(self.clock.at(now))),
                });
            }
            LinkState::Linked { .. } if self.outdated && out.is_empty() && self.held.is_none() && self.assembly.is_none() => {
                out.push(Output::Close("going over to the new certificate"));
            }
            LinkState::Linked { .. } => self.ask_for_certificate(now, &mut out),
            LinkState::Waiting { .. } | LinkState::Connecting => {}
        }
        out
    }

    /// The link stands: says hello.
    pub fn connected(&mut self, now: Timestamp) -> Vec<Output> {
        self.state = LinkState::Linked { since: now };
        self.outdated = false;
        self.heard = false;
        self.assembly = None;
        self.renewal_asked = None;
        let mut out = vec![self.hello()];
        out.extend(self.newest().map(|view| {
            Output::Send(
                Held {
                    view: view.signed().clone(),
                }
                .into(),
            )
        }));
        out.extend(self.report.clone().map(|r| Output::Send(r.into())));
        out
    }

    /// The link, or an attempt at it, ended.
    pub fn disconnected(&mut self, now: Timestamp, why: impl Into<String>) {
        if self.heard {
            self.backoff.reset();
        }
        let wait = self.backoff.next_wait().max(std::mem::take(&mut self.pause));
        self.heard = false;
        self.assembly = None;
        self.state = LinkState::Waiting {
            until: now + wait,
            why: why.into(),
        };
    }

    /// The coordinator did not take this host's certificate: the next attempt asks for a new one by the identity key.
    pub const fn certificate_refused(&mut self) {
        self.must_renew = true;
    }

    /// A frame came.
    pub fn frame(&mut self, now: Timestamp, frame: &Frame) -> Vec<Output> {
        let mut out = Vec::new();
        let message = match CoordinatorMessage::from_frame(frame) {
            Ok(Some(message)) => message,
            // A kind of a later protocol.
            Ok(None) => return out,
            Err(_) => return vec![Output::Close("malformed")],
        };
        self.heard = true;
        match message {
            CoordinatorMessage::ViewStart(start) => self.view_start(start, &mut out),
            CoordinatorMessage::ViewItems(items) => self.view_items(items, &mut out),
            CoordinatorMessage::ViewEnd(_) => self.view_end(now, &mut out),
            CoordinatorMessage::LeaseGrant(grant) => self.lease(now, grant.lease, &mut out),
            CoordinatorMessage::Hints(hints) => out.push(Output::Hints(hints.peers)),
            CoordinatorMessage::Certificate(certificate) => out.push(Output::Certificate(certificate.der)),
            CoordinatorMessage::Goodbye(goodbye) => self.goodbye(&goodbye, &mut out),
            CoordinatorMessage::RotateKey(_) => out.push(Output::Key(KeyNews::Asked)),
            CoordinatorMessage::KeyChallenge(challenge) => out.push(Output::Key(KeyNews::Challenge(challenge))),
            CoordinatorMessage::KeyDenied(denied) => out.push(Output::Key(KeyNews::Denied(denied))),
        }
        out
    }

    /// The view that was offered last is in force and on disk; `report` says how the host does with it.
    pub fn applied(&mut self, now: Timestamp, report: Report) -> Vec<Output> {
        let Some(view) = self.installing.take() else { return Vec::new() };
        let mut out = Vec::new();
        self.take_up_trust(&view, now, &mut out);
        let header = view.header();
        let ack = Ack {
            version: header.version,
            state_hash: header.state_hash,
        };
        self.in_force = Some(view);
        self.say(ack, &mut out);
        self.reported(report, &mut out);
        out
    }

    /// The view that was offered last could not be put in force; the one before stays.
    pub fn not_applied(&mut self, detail: &str) -> Vec<Output> {
        let Some(view) = self.installing.take() else { return Vec::new() };
        let mut out = Vec::new();
        let nack = Nack {
            version: view.header().version,
            code: "not_applied".into(),
            detail: shorten(detail),
        };
        self.say(nack, &mut out);
        out
    }

    /// The view from disk could not be put in force: there is none, until the coordinator sends one. The floor stays.
    pub fn forget_view(&mut self) {
        self.in_force = None;
    }

    /// How the host does, when that changed by itself.
    pub fn report(&mut self, report: Report) -> Vec<Output> {
        let mut out = Vec::new();
        self.reported(report, &mut out);
        out
    }

    /// Offers the next WireGuard key; nothing without a link.
    #[must_use]
    pub fn offer_key(&self) -> Vec<Output> {
        let mut out = Vec::new();
        self.say(KeyOffer {}, &mut out);
        out
    }

    /// Proves the next WireGuard key.
    #[must_use]
    pub fn prove_key(&self, proof: KeyProof) -> Vec<Output> {
        let mut out = Vec::new();
        self.say(proof, &mut out);
        out
    }

    /// A coordinator said whom to trust, as this host asked by its identity key. It is taken up if it goes forward.
    pub fn told_trust(&mut self, items: &[Signed], now: Timestamp) -> Vec<Output> {
        if items == self.us.trust {
            return Vec::new();
        }
        if !Trust::may_replace(self.us.mesh, self.us.root, &self.us.trust, items) {
            return vec![Output::Warning(
                "a coordinator offered trust in keys that were replaced before: it is not taken up".into(),
            )];
        }
        // A host that was away may know an older time than that at which the root signed these.
        let made = Trust::made_by(items);
        if made > self.clock.at(now) {
            self.clock.learn(made, now);
        }
        match Trust::with_items(self.us.mesh, self.us.root, items, self.clock.at(now)) {
            Ok(trust) => {
                self.trust = trust;
                self.us.trust = items.to_vec();
                vec![Output::Trust(items.to_vec())]
            }
            Err(e) => vec![Output::Warning(format!("the trust that a coordinator offered does not hold: {e}"))],
        }
    }

    /// A new certificate is on disk. The next link uses it, and that is soon: the coordinator keeps one that was not used yet, so a link must not
    /// live to ask for a second one.
    pub const fn certificate(&mut self, window: Window, now: Timestamp) {
        self.certificate = Some(window);
        self.outdated = true;
        self.renewed = Some(now);
        self.must_renew = false;
        self.renewal_asked = None;
    }

    /// Where peers may reach this host changed.
    pub fn endpoints(&mut self, mut endpoints: Vec<Endpoint>) -> Vec<Output> {
        endpoints.truncate(MAX_ENDPOINTS);
        let mut out = Vec::new();
        if endpoints != self.endpoints {
            self.endpoints.clone_from(&endpoints);
            self.say(Endpoints { endpoints }, &mut out);
        }
        out
    }

    /// The host's incarnation was raised: the coordinator learns it by the hello of a new link.
    pub fn raised(&mut self, incarnation: u64) -> Vec<Output> {
        self.incarnation = incarnation;
        match self.state {
            LinkState::Linked { .. } => vec![Output::Close("incarnation")],
            LinkState::Waiting { .. } | LinkState::Connecting => Vec::new(),
        }
    }

    /// Where the link stands.
    #[must_use]
    pub const fn state(&self) -> &LinkState {
        &self.state
    }

    /// Mesh time at the moment `now`.
    #[must_use]
    pub fn mesh_time(&self, now: Timestamp) -> MeshTime {
        self.clock.at(now)
    }

    /// Mesh time at the moment `now`, if a lease told it since the agent started: before, it is a guess that may follow the wall clock.
    #[must_use]
    pub fn told_time(&self, now: Timestamp) -> Option<MeshTime> {
        self.clock.told_at(now)
    }

    /// Whom this host trusts.
    #[must_use]
    pub const fn trust(&self) -> &Trust {
        &self.trust
    }

    /// The view in force.
    #[must_use]
    pub const fn view(&self) -> Option<&VerifiedView> {
        self.in_force.as_ref()
    }

    /// The view that was offered for installation and not yet said to be applied.
    #[must_use]
    pub const fn installing(&self) -> Option<&VerifiedView> {
        self.installing.as_ref()
    }

    /// The header of the view that the data plane has: the one in force, or one whose way to the disk is not over.
    #[must_use]
    pub fn installed_header(&self) -> Option<&Header> {
        self.installing.as_ref().or(self.in_force.as_ref()).map(VerifiedView::header)
    }

    /// What that view says.
    #[must_use]
    pub fn installed_content(&self) -> Option<&Arc<View>> {
        self.installing.as_ref().or(self.in_force.as_ref()).map(VerifiedView::content)
    }

    /// What the next view must not fall behind.
    #[must_use]
    pub const fn floor(&self) -> Option<Floor> {
        self.floor
    }

    /// The header's signature is checked at once: nothing is collected for a stranger, and a refusal can name the version.
    fn view_start(&mut self, start: ViewStart, out: &mut Vec<Output>) {
        self.assembly = None;
        let header = match Header::open(&start.header, &self.trust) {
            Ok(header) => header,
            Err(e) => return self.refuse_signature(e, out),
        };
        match Assembly::start(start, header.version, self.newest()) {
            Ok(assembly) => self.assembly = Some(assembly),
            Err(refusal) => self.refuse(header.version, &refusal, out),
        }
    }

    /// A signer that is not trusted here: this host may have been away while it changed. By its identity key it asks whom to trust.
    fn refuse_signature(&mut self, error: SignedError, out: &mut Vec<Output>) {
        let is_unknown = matches!(error, SignedError::UnknownSigner(_));
        self.refuse(Version::default(), &Refusal::View(error.into()), out);
        if is_unknown {
            self.must_renew = true;
            out.push(Output::Close("an unknown signer"));
        }
    }

    /// The parts that follow a refusal are skipped: it was said once.
    fn view_items(&mut self, items: ViewItems, out: &mut Vec<Output>) {
        let Some(assembly) = &mut self.assembly else { return };
        let version = assembly.version();
        if let Err(refusal) = assembly.items(items) {
            self.refuse(version, &refusal, out);
        }
    }

    fn view_end(&mut self, now: Timestamp, out: &mut Vec<Output>) {
        let Some(assembly) = self.assembly.take() else { return };
        let version = assembly.version();
        match assembly.finish(&self.trust, (self.us.mesh, self.us.host), self.floor) {
            Err(refusal) => self.refuse(version, &refusal, out),
            Ok(view) => {
                self.floor = Some(view.floor());
                self.wants_snapshot = false;
                let header = *view.header();
                if self.held.is_none() && self.in_force.as_ref().is_some_and(|v| *v.header() == header) {
                    let ack = Ack {
                        version: header.version,
                        state_hash: header.state_hash,
                    };
                    self.say(ack, out);
                } else {
                    // A newer view takes the place of one that still waits.
                    self.held = Some((view, now));
                }
            }
        }
    }

    fn lease(&mut self, now: Timestamp, signed: Signed, out: &mut Vec<Output>) {
        let lease = match Lease::open(&signed, &self.trust) {
            Ok(lease) if (lease.mesh, lease.host) == (self.us.mesh, self.us.host) => lease,
            Ok(_) => return out.push(Output::Warning("a lease for another host came".into())),
            Err(e) => return out.push(Output::Warning(format!("a lease came that does not hold: {e}"))),
        };
        if lease.issued_at < self.last_issued {
            return out.push(Output::Warning("a lease came that is older than the last one".into()));
        }
        let held = HeldLease { signed, lease };
        let for_held = self.held.take_if(|(view, _)| held.covers(view));
        let mut ours = self.installing.iter().chain(&self.in_force);
        if for_held.is_none() && !ours.any(|view| held.covers(view)) {
            return;
        }
        // The same lease again says nothing new of the time: told often enough, it would hold the clock back.
        if lease.issued_at > self.last_issued || self.clock.told_at(now).is_none() {
            self.clock.learn(lease.issued_at, now);
        }
        self.last_issued = lease.issued_at;
        match for_held {
            Some((view, _)) => self.offer(view, Some(held), out),
            None => out.push(Output::Lease(Box::new(held))),
        }
    }

    fn offer(&mut self, view: VerifiedView, lease: Option<HeldLease>, out: &mut Vec<Output>) {
        self.installing = Some(view.clone());
        out.push(Output::Install(Box::new(Offer { view, lease })));
    }

    fn goodbye(&mut self, goodbye: &Goodbye, out: &mut Vec<Output>) {
        self.pause = Duration::from_secs(goodbye.retry_after_secs).min(LONGEST_PAUSE);
        let (warning, why) = match goodbye.code.as_str() {
            REVOKED => {
                out.push(Output::Revoked);
                (
                    "the coordinator says that this host is revoked: nothing is allowed any more; `cloison audit` tells who did it",
                    REVOKED,
                )
            }
            "replaced" => (
                "another link of this host took this one's place: is its state directory in use on a second machine?",
                "replaced by another link of this host",
            ),
            "rate" => ("the coordinator says that this agent sends too much", "too many frames"),
            _ => return out.push(Output::Close("the coordinator is stopping")),
        };
        out.push(Output::Warning(warning.into()));
        out.push(Output::Close(why));
    }

    /// The newest view that was accepted: what a delta may be for.
    fn newest(&self) -> Option<&VerifiedView> {
        let held = self.held.as_ref().map(|(view, _)| view);
        held.or(self.installing.as_ref()).or(self.in_force.as_ref())
    }

    /// Says why; a coordinator answers a refused delta with a snapshot, and if it does not, the next hello asks for one.
    fn refuse(&mut self, version: Version, refusal: &Refusal, out: &mut Vec<Output>) {
        self.assembly = None;
        self.wants_snapshot |= refusal.asks_for_snapshot();
        out.push(Output::Warning(format!("a view was refused ({}): {refusal}", refusal.code())));
        let nack = Nack {
            version,
            code: refusal.code().into(),
            detail: shorten(&refusal.to_string()),
        };
        self.say(nack, out);
    }

    fn hello(&self) -> Output {
        let base = self.newest().filter(|_| !self.wants_snapshot).map(VerifiedView::header);
        let hello = Hello {
            software: self.software.clone(),
            version: base.map(|h| h.version),
            state_hash: base.map(|h| h.state_hash),
            incarnation: self.incarnation,
            endpoints: self.endpoints.clone(),
        };
        Output::Send(hello.into())
    }

    /// Sends, if there is a link.
    fn say(&self, message: impl Into<AgentMessage>, out: &mut Vec<Output>) {
        if matches!(self.state, LinkState::Linked { .. }) {
            out.push(Output::Send(message.into()));
        }
    }

    fn reported(&mut self, report: Report, out: &mut Vec<Output>) {
        if self.report.as_ref() != Some(&report) {
            self.report = Some(report.clone());
            self.say(report, out);
        }
    }

    fn ask_for_certificate(&mut self, now: Timestamp, out: &mut Vec<Output>) {
        if self.outdated {
            return;
        }
        let due = self.must_renew || self.certificate.is_none_or(|w| w.half_spent_at(self.clock.at(now)));
        // Where mesh time is ahead of the issuer's, a certificate is half spent when it comes.
        let half = Duration::from_secs(self.certificate.map_or(0, Window::life) / 2);
        let is_new = self.renewed.is_some_and(|came| now.since(came) < half.min(RENEW_AGAIN));
        if due && !is_new && self.renewal_asked.is_none_or(|asked| now.since(asked) >= RENEW_AGAIN) {
            self.renewal_asked = Some(now);
            out.push(Output::Send(RenewCertificate {}.into()));
        }
    }

    /// The statements of the view in force are the whole trust, if they hold; otherwise what was trusted before stays.
    fn take_up_trust(&mut self, view: &VerifiedView, now: Timestamp, out: &mut Vec<Output>) {
        let items = &view.content().trust;
        if items.is_empty() || *items == self.us.trust {
            return self.refresh_trust(now);
        }
        match Trust::with_items(self.us.mesh, self.us.root, items, self.clock.at(now)) {
            Ok(trust) if !trust.coordinator_issuers().is_empty() => {
                self.trust = trust;
                self.us.trust.clone_from(items);
                out.push(Output::Trust(items.clone()));
            }
            Ok(_) => out.push(Output::Warning(
                "the view names no issuer of coordinators: the former ones stay".into(),
            )),
            Err(e) => out.push(Output::Warning(format!("the view's trust does not hold, the former stays: {e}"))),
        }
    }

    /// Statements that did not count yet may count by now.
    fn refresh_trust(&mut self, now: Timestamp) {
        if let Ok(trust) = self.us.trust_at(self.clock.at(now)) {
            self.trust = trust;
        }
    }
}

/// A text for the other side, cut to what it may be.
fn shorten(text: &str) -> String {
    let end = text.floor_char_boundary(MAX_DETAIL);
    text.get(..end).unwrap_or_default().to_owned()
}

#[cfg(test)]
#[path = "link_tests.rs"]
mod tests;
