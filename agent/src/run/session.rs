//! The link's IO inside the loop: an attempt that runs beside it, or frames that come. What the state machine decided is carried out here,
//! in order.

use std::collections::VecDeque;
use std::future::pending;
use std::time::Duration;

use cloison_proto::control::frame::Frame;
use cloison_proto::signed::Signed;
use cloison_proto::trust::Trust;
use tokio::task::JoinHandle;

use super::keys::local_keys;
use super::{Agent, blocking, own_window};
use crate::control::connection::{self, Attempt, ConnectionError, Frames};
use crate::control::link::{Offer, Output};
use crate::control::verifier::Anchors;
use crate::dataplane::InForce;
use crate::enroll::{self, EnrollError, NO_CERTIFICATE, Renewed};
use crate::state::identity::{Membership, store_certificate};
use crate::state::view_cache::{self, HeldLease};
use crate::sys::clock;

/// Why an attempt came to nothing.
#[derive(Debug)]
pub(super) struct Failure {
    why: String,
    certificate_refused: bool,
}

type Attempted = Result<(Frames, Option<Renewed>), Failure>;

/// Where the IO stands.
#[derive(Debug, Default)]
pub(super) enum Session {
    /// Nothing is under way.
    #[default]
    Idle,
    /// An attempt runs.
    Trying(JoinHandle<Attempted>),
    /// The link stands.
    Open(Box<Frames>),
}

/// What came of waiting.
#[derive(Debug)]
pub struct Outcome(What);

#[derive(Debug)]
enum What {
    Attempted(Box<Attempted>),
    Frame(Frame),
    Lost(ConnectionError),
}

impl Session {
    /// The next thing that happens; never, if nothing is under way. May be dropped and called again without losing anything.
    pub(super) async fn next(&mut self) -> Outcome {
        match self {
            Self::Idle => pending().await,
            Self::Trying(attempt) => {
                let result = attempt.await;
                let failed = |e: tokio::task::JoinError| Failure {
                    why: e.to_string(),
                    certificate_refused: false,
                };
                *self = Self::Idle;
                Outcome(What::Attempted(Box::new(result.map_err(failed).and_then(|attempted| attempted))))
            }
            Self::Open(frames) => match frames.next().await {
                Ok(frame) => Outcome(What::Frame(frame)),
                Err(e) => Outcome(What::Lost(e)),
            },
        }
    }

    /// Ends what is under way.
    pub(super) async fn close(&mut self, why: &str) {
        match std::mem::take(self) {
            Self::Idle => {}
            Self::Trying(attempt) => attempt.abort(),
            Self::Open(frames) => frames.close(why).await,
        }
    }

    /// The coordinator's address, if the link stands.
    pub(super) fn address(&self) -> Option<&str> {
        self.frames().map(Frames::address)
    }

    /// The link's connection, if it stands.
    pub(super) fn frames(&self) -> Option<&Frames> {
        match self {
            Self::Open(frames) => Some(frames),
            Self::Idle | Self::Trying(_) => None,
        }
    }
}

impl Agent {
    pub(super) async fn session_outcome(&mut self, Outcome(what): Outcome) {
        let now = clock::now();
        match what {
            What::Frame(frame) => {
                let outputs = self.link.frame(now, &frame);
                self.carry_out(outputs).await;
            }
            What::Lost(error) => self.lost(error).await,
            What::Attempted(attempted) => match *attempted {
                Ok((frames, renewed)) => {
                    if let Some(renewed) = renewed {
                        self.certificate = Some(renewed.certificate);
                        self.link.certificate(renewed.window, now);
                        let outputs = self.link.told_trust(&renewed.trust, now);
                        Box::pin(self.carry_out(outputs)).await;
                    }
                    self.clock_off = frames.clock_off();
                    self.link_warning = None;
                    tracing::info!(coordinator = frames.address(), "linked");
                    self.session = Session::Open(Box::new(frames));
                    self.key_link_begins();
                    self.announce().await;
                    let outputs = self.link.connected(now);
                    self.carry_out(outputs).await;
                }
                Err(failure) => {
                    tracing::info!(why = failure.why, "no link");
                    if failure.certificate_refused {
                        self.link.certificate_refused();
                    }
                    self.link.disconnected(now, failure.why);
                }
            },
        }
    }

    async fn lost(&mut self, error: ConnectionError) {
        tracing::info!(%error, "the link ended");
        if matches!(error, ConnectionError::CertificateRefused { .. }) {
            self.link.certificate_refused();
        }
        self.session.close("lost").await;
        self.link.disconnected(clock::now(), error.to_string());
    }

    /// Carries out what the state machine decided, and what it decides upon that.
    pub(super) async fn carry_out(&mut self, outputs: Vec<Output>) {
        let mut queue = VecDeque::from(outputs);
        while let Some(output) = queue.pop_front() {
            match output {
                Output::Connect { renew } => self.session = Session::Trying(tokio::spawn(self.attempt(renew))),
                Output::Send(message) => {
                    if let Session::Open(frames) = &mut self.session
                        && let Err(error) = frames.send(&message.to_frame()).await
                    {
                        self.lost(error).await;
                    }
                }
                Output::Install(offer) => queue.extend(self.install(*offer).await),
                Output::Lease(held) => self.renew_lease(*held),
                Output::Hints(hints) => self.take_hints(hints),
                Output::Certificate(der) => self.keep_certificate(der),
                Output::Trust(items) => {
                    self.us.trust = items;
                    self.us.known_time = self.link.mesh_time(clock::now());
                    self.keep_trust();
                }
                Output::Key(news) => self.key_news(news).await,
                Output::Revoked => self.cut_off().await,
                Output::Close(why) => {
                    // A send before may have found the link lost, and said so.
                    if self.session.frames().is_some() {
                        self.session.close(why).await;
                        self.link.disconnected(clock::now(), why);
                    }
                }
                Output::Warning(text) => {
                    tracing::warn!("{text}");
                    self.link_warning = Some(text);
                }
            }
        }
    }

    /// An attempt at all coordinators in turn; with a renewal of the certificate before, if that is needed.
    fn attempt(&self, renew: bool) -> impl Future<Output = Attempted> + Send + use<> {
        let trust = self.link.trust();
        let addresses = addresses(&self.config.coordinators, trust.addresses(), &self.us.addresses);
        let attempt = Attempt {
            mesh: self.us.mesh,
            anchors: Anchors::of(trust),
            wall: super::wall_now(),
            past: self.link.mesh_time(clock::now()),
        };
        let (us, dir, identity) = (self.us.clone(), self.dir.clone(), self.identity.clone());
        let certificate = self.certificate.clone().filter(|_| !renew);
        async move {
            let mut whys = Vec::new();
            let mut certificate_refused = false;
            for address in addresses {
                let mut tried = match &certificate {
                    Some(der) => connection::link(&address, attempt.clone(), &identity, der).await,
                    None => Err(ConnectionError::Untrusted {
                        address: address.clone(),
                        why: "not asked yet".into(),
                    }),
                };
                // Without a certificate that is good, or at a coordinator whose issuer is not known here, the identity key is what counts.
                let mut renewed = None;
                if matches!(tried, Err(ConnectionError::Untrusted { .. })) {
                    let new = match enroll::renew(&dir, &us, &address, attempt.clone(), &identity).await {
                        Ok(new) => new,
                        Err(e) => {
                            whys.push(renewal_failed(&e));
                            continue;
                        }
                    };
                    let attempt = Attempt {
                        anchors: anchors(&us, &new.trust, &attempt),
                        ..attempt.clone()
                    };
                    tried = connection::link(&address, attempt, &identity, &new.certificate).await;
                    renewed = Some(new);
                }
                match tried {
                    Ok(frames) => return Ok((frames, renewed)),
                    Err(e) => {
                        certificate_refused |= matches!(e, ConnectionError::CertificateRefused { .. });
                        whys.push(e.to_string());
                    }
                }
            }
            if whys.is_empty() {
                whys.push("no coordinator's address is known; name one with --coordinator".into());
            }
            Err(Failure {
                why: whys.join("; "),
                certificate_refused,
            })
        }
    }

    /// A view: data plane, disk, then the state machine's ack.
    async fn install(&mut self, offer: Offer) -> Vec<Output> {
        let now = clock::now();
        let before = self.lease.take();
        self.lease = offer.lease.map(|held| self.ending(held));
        let keys = local_keys(&self.wg, Some(offer.view.content()), &self.local_keys);
        let in_force = InForce {
            view: offer.view.content().clone(),
            keys: keys.clone(),
            lease: self.lease_term(now),
        };
        let dataplane = self.dataplane.clone();
        let applied = blocking(move || dataplane.lock().apply(in_force)).await;
        let detail = match applied {
            Ok(Ok(installed)) => {
                let version = offer.view.header().version;
                tracing::info!(%version, ?installed, "view in force");
                self.table = std::sync::Arc::new(cloison_proto::filter::Table::new(offer.view.content()));
                self.problems.clear();
                self.name();
                self.local_keys = keys;
                self.duties.soon();
                self.announce().await;
                return self.save(&offer.view);
            }
            Ok(Err(conflict)) => conflict.to_string(),
            Err(e) => e.to_string(),
        };
        tracing::error!(detail, "a view could not be put in force; the one before stays");
        self.lease = before;
        self.problems = vec![format!("a newer view could not be put in force: {detail}")];
        self.link.not_applied(&detail)
    }

    /// Keeps the view in force and its lease; the ack waits for the disk.
    fn save(&mut self, view: &cloison_proto::view::VerifiedView) -> Vec<Output> {
        self.persist_lease();
        self.unsaved = false;
        match view_cache::store_view(&self.dir, view) {
            Ok(()) => {
                let report = self.report();
                self.link.applied(clock::now(), report)
            }
            Err(error) => {
                tracing::error!(%error, "the view is in force but not on disk; trying again");
                self.unsaved = true;
                Vec::new()
            }
        }
    }

    fn keep_trust(&mut self) {
        let kept = self.us.store(&self.dir);
        if let Err(error) = &kept
            && !self.trust_unsaved
        {
            tracing::error!(%error, "whom to trust is in force but not on disk; trying again");
        }
        self.trust_unsaved = kept.is_err();
    }

    /// Tries again to keep what the disk refused: whom to trust, and a view.
    pub(super) async fn save_again(&mut self) {
        if self.trust_unsaved {
            self.keep_trust();
        }
        if let (true, Some(view)) = (self.unsaved, self.link.installing().cloned()) {
            let outputs = self.save(&view);
            self.carry_out(outputs).await;
        }
    }

    fn renew_lease(&mut self, held: HeldLease) {
        self.lease = Some(self.ending(held));
        if let Some(term) = self.lease_term(clock::now()) {
            self.dataplane.lock().renew(term);
        }
        self.name();
        self.persist_lease();
    }

    /// Nothing may pass any more, now and after a restart: the view stays, its lease ends.
    async fn cut_off(&mut self) {
        let now = clock::now();
        if let Some((_, ends)) = &mut self.lease {
            *ends = now;
        }
        // At once, whatever the machine needs to cut the flows as well.
        if let Some(term) = self.lease_term(now) {
            self.dataplane.lock().renew(term);
        }
        self.name();
        self.persist_lease();
        let Some(view) = self.link.installed_content().cloned() else {
            return;
        };
        let in_force = InForce {
            view,
            keys: self.local_keys.clone(),
            lease: None,
        };
        let dataplane = self.dataplane.clone();
        if let Ok(Err(conflict)) = blocking(move || dataplane.lock().apply(in_force)).await {
            tracing::error!(%conflict, "cannot cut the flows at once; they end with the lease");
        }
    }

    /// A lease, and when it ends on this host's clock.
    fn ending(&self, held: HeldLease) -> (HeldLease, cloison_proto::version::Timestamp) {
        let now = clock::now();
        let left = held.lease.ends_at().0.saturating_sub(self.link.mesh_time(now).0);
        let left = Duration::from_secs(left.min(held.lease.valid_for_secs));
        (held, now + left)
    }

    fn keep_certificate(&mut self, der: Vec<u8>) {
        let Some(window) = own_window(&der, &self.us, &self.identity) else {
            return;
        };
        if let Err(error) = store_certificate(&self.dir, &der) {
            tracing::error!(%error, "cannot keep the new certificate; asking again later");
            return;
        }
        tracing::info!(not_after = window.not_after, "certificate renewed");
        self.certificate = Some(der);
        self.link.certificate(window, clock::now());
    }
}

/// Whom to take for a coordinator after a renewal: by what it brought, if that goes forward.
fn anchors(us: &Membership, offered: &[Signed], attempt: &Attempt) -> Anchors {
    let forward = Trust::may_replace(us.mesh, us.root, &us.trust, offered);
    let trust = Trust::with_items(us.mesh, us.root, offered, attempt.past.max(Trust::made_by(offered)));
    match trust {
        Ok(trust) if forward => Anchors::of(&trust),
        Ok(_) | Err(_) => attempt.anchors.clone(),
    }
}

/// Where to look for a coordinator: only where the configuration says, if it says so; else at the addresses that the last view named, and in
/// the end where this host joined. Whoever answers has to show that it is a coordinator of this mesh.
fn addresses(configured: &[String], named: &[String], joined: &[String]) -> Vec<String> {
    if !configured.is_empty() {
        return configured.to_vec();
    }
    let further = joined.iter().filter(|address| !named.contains(address));
    named.iter().chain(further).cloned().collect()
}

fn renewal_failed(error: &EnrollError) -> String {
    if error.is_denied() {
        format!(
            "the coordinator gives this host {NO_CERTIFICATE}: it is revoked, or was away for more than 30 days; to join again, stop the agent, \
             run `cloison-agent leave`, have an operator run `cloison host revoke` unless it is, and `cloison-agent join` with a new token"
        )
    } else {
        format!("{NO_CERTIFICATE}: {error}")
    }
}
