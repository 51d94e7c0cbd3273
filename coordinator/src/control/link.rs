//! One link, as a state machine: frames and offers in, frames and events out. No IO, no clock, no lock.
//!
//! A view goes as a delta if the base is known to be what the agent holds once it has carried out all that was sent before, and as a
//! snapshot otherwise. A new one is put together only when everything before it was taken out by [`Link::next_frame`]: what became outdated
//! while a slow agent was reading is never sent. Behind a view, and whenever there is a new one, comes the lease; behind that, hints.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use cloison_proto::control::agent::{Ack, AgentMessage, Endpoint, Hello, MAX_DETAIL, MAX_ENDPOINTS, MAX_INSTANCES, Nack, Report};
use cloison_proto::control::coordinator::{
    Certificate, CoordinatorMessage, Goodbye, Hints, LeaseGrant, PeerHint, ViewEnd, ViewItems, ViewStart,
};
use cloison_proto::control::frame::{Frame, FrameError, MAX_VIEW_CHUNK};
use cloison_proto::control::rotate::{KeyChallenge, KeyDenied, KeyProof, RotateKey};
use cloison_proto::id::HostId;
use cloison_proto::signed::Signed;
use cloison_proto::version::{MeshTime, Timestamp, Version};
use cloison_proto::view::{Items, Op, StateHash};

use super::limit::Bucket;
use crate::publish::{Farewell, Offer};

/// Frames of an agent: this many in a second, and a burst.
const FRAMES_PER_SECOND: u32 = 20;
const FRAME_BURST: u32 = 100;

/// How often a host may say in a minute where it is: all its peers are told each time. An agent says it when it changed, twice at most.
const MOVES_PER_MINUTE: u32 = 30;

/// Peers in one frame of hints: with eight endpoints each, half of what a frame holds.
const HINTS_PER_FRAME: usize = 256;

/// Most instances that a report is heard about: a host has no more than a few.
const MAX_UNENFORCED: usize = 1024;

/// Why a link cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// More frames than an agent may send.
    #[error("more than {FRAMES_PER_SECOND} frames a second, or {MOVES_PER_MINUTE} changes of place a minute")]
    Rate,
    /// A frame that is not what its kind asks for.
    #[error(transparent)]
    Malformed(#[from] FrameError),
    /// The first frame is no greeting, or a later one is.
    #[error("a link begins with one greeting")]
    Order,
}

/// What an agent said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The view is in force.
    Acked(Ack),
    /// The view was refused.
    Nacked(Nack),
    /// Where the host may be reached.
    Moved(Vec<Endpoint>),
    /// Which view it has in force, as somebody signed it.
    Held(Signed),
    /// How it does.
    Reported(Report),
    /// It wants a new certificate.
    RenewCertificate,
    /// It wants to prove a new WireGuard key.
    KeyOffered,
    /// It proves a new WireGuard key.
    KeyProven(Box<KeyProof>),
}

/// What was sent, and what the agent makes of it.
#[derive(Debug)]
struct Sent {
    version: Version,
    state_hash: StateHash,
    /// Whether the agent could refuse it for want of a base.
    by_delta: bool,
}

/// A link that was opened by a greeting.
#[derive(Debug)]
pub struct Link {
    budget: Bucket,
    moves: Bucket,
    /// What the agent holds once it has carried out all that was sent.
    base: Option<(StateHash, Arc<Items>)>,
    sent: Option<Sent>,
    /// A view that the agent will not have: it is not sent again on this link, nor a lease for it.
    refused: Option<(Version, StateHash)>,
    leased_at: Option<MeshTime>,
    hinted: BTreeMap<HostId, PeerHint>,
    offer: Option<Arc<Offer>>,
    hints: Option<Vec<PeerHint>>,
    outgoing: VecDeque<Frame>,
}

impl Link {
    /// Reads the first frame of a link.
    ///
    /// # Errors
    /// [`Fault::Malformed`], [`Fault::Order`].
    pub fn greeting(frame: &Frame) -> Result<Hello, Fault> {
        match AgentMessage::from_frame(frame)? {
            Some(AgentMessage::Hello(mut hello)) => {
                hello.endpoints.truncate(MAX_ENDPOINTS);
                cut(&mut hello.software);
                Ok(hello)
            }
            Some(_) | None => Err(Fault::Order),
        }
    }

    /// The link of an agent that greeted with `hello`; `base` are the items of the view that it has in force, if they are at hand.
    #[must_use]
    pub fn new(hello: &Hello, base: Option<Arc<Items>>, now: Timestamp) -> Self {
        let in_force = hello.version.zip(hello.state_hash);
        Self {
            budget: Bucket::new(FRAME_BURST, FRAMES_PER_SECOND, Duration::from_secs(1), now),
            moves: Bucket::new(MOVES_PER_MINUTE, MOVES_PER_MINUTE, Duration::from_secs(60), now),
            sent: in_force.map(|(version, state_hash)| Sent {
                version,
                state_hash,
                by_delta: false,
            }),
            base: hello.state_hash.zip(base),
            refused: None,
            leased_at: None,
            hinted: BTreeMap::new(),
            offer: None,
            hints: None,
            outgoing: VecDeque::new(),
        }
    }

    /// Takes a frame from the agent; `None` for a kind that is not known.
    ///
    /// # Errors
    /// [`Fault`]: the link has to end.
    pub fn on_frame(&mut self, frame: &Frame, now: Timestamp) -> Result<Option<Event>, Fault> {
        if !self.budget.take(now) {
            return Err(Fault::Rate);
        }
        Ok(match AgentMessage::from_frame(frame)? {
            None => None,
            Some(AgentMessage::Hello(_)) => return Err(Fault::Order),
            Some(AgentMessage::Ack(ack)) => Some(Event::Acked(ack)),
            Some(AgentMessage::Nack(mut nack)) => {
                cut(&mut nack.code);
                cut(&mut nack.detail);
                self.on_refusal(&nack);
                Some(Event::Nacked(nack))
            }
            Some(AgentMessage::Endpoints(_)) if !self.moves.take(now) => return Err(Fault::Rate),
            Some(AgentMessage::Endpoints(mut moved)) => {
                moved.endpoints.truncate(MAX_ENDPOINTS);
                Some(Event::Moved(moved.endpoints))
            }
            Some(AgentMessage::Report(mut report)) => {
                report.unenforced.truncate(MAX_UNENFORCED);
                report.unenforced.iter_mut().for_each(|instance| cut(&mut instance.reason));
                for instance in report.instances.iter_mut().flatten() {
                    cut(&mut instance.state);
                    cut(&mut instance.by);
                    instance.last_denial.iter_mut().for_each(|denial| cut(&mut denial.reason));
                }
                if let Some(instances) = &mut report.instances {
                    instances.truncate(MAX_INSTANCES);
                }
                Some(Event::Reported(report))
            }
            Some(AgentMessage::Held(held)) => Some(Event::Held(held.view)),
            Some(AgentMessage::RenewCertificate(_)) => Some(Event::RenewCertificate),
            Some(AgentMessage::KeyOffer(_)) => Some(Event::KeyOffered),
            Some(AgentMessage::KeyProof(proof)) => Some(Event::KeyProven(Box::new(proof))),
        })
    }

    /// A refused delta is followed by a snapshot, once; a refused snapshot by nothing, until there is another view.
    fn on_refusal(&mut self, nack: &Nack) {
        let Some(sent) = self.sent.as_ref().filter(|sent| sent.version == nack.version) else {
            return;
        };
        if !sent.by_delta {
            self.refused = Some((sent.version, sent.state_hash));
        }
        self.base = None;
        self.sent = None;
    }

    /// There is a view on offer, or another lease for the one that was.
    pub fn on_offer(&mut self, offer: Arc<Offer>) {
        self.offer = Some(offer);
    }

    /// What is known of where peers are.
    pub fn on_hints(&mut self, hints: Vec<PeerHint>) {
        self.hints = Some(hints);
    }

    /// Sends a new certificate.
    pub fn on_certificate(&mut self, der: Vec<u8>) {
        self.push(Certificate { der });
    }

    /// Challenges the agent to prove a new WireGuard key.
    pub fn on_key_challenge(&mut self, challenge: KeyChallenge) {
        self.push(challenge);
    }

    /// Says that a new WireGuard key is not taken.
    pub fn on_key_denied(&mut self, denied: KeyDenied) {
        self.push(denied);
    }

    /// Asks the agent for a new WireGuard key.
    pub fn ask_for_key(&mut self) {
        self.push(RotateKey {});
    }

    /// The next frame to be sent.
    pub fn next_frame(&mut self) -> Option<Frame> {
        if self.outgoing.is_empty()
            && let Some(offer) = self.offer.take()
        {
            self.send_offer(&offer);
        }
        if self.outgoing.is_empty()
            && let Some(hints) = self.hints.take()
        {
            self.send_hints(hints);
        }
        self.outgoing.pop_front()
    }

    fn send_offer(&mut self, offer: &Offer) {
        let header = &offer.header;
        if self.refused == Some((header.version, header.state_hash)) {
            return;
        }
        let is_sent = |sent: &Sent| (sent.version, sent.state_hash) == (header.version, header.state_hash);
        if !self.sent.as_ref().is_some_and(is_sent) {
            self.send_view(offer);
        } else if self.leased_at == Some(offer.leased_at) {
            return;
        }
        self.leased_at = Some(offer.leased_at);
        self.push(LeaseGrant {
            lease: offer.lease.clone(),
        });
    }

    fn send_view(&mut self, offer: &Offer) {
        let base = self.base.take();
        let ops = match &base {
            Some((_, items)) => offer.items.changes_since(items),
            None => offer.items.changes_since(&Items::default()),
        };
        self.push(ViewStart {
            header: offer.signed.clone(),
            base: base.as_ref().map(|(hash, _)| *hash),
        });
        for ops in chunks(ops) {
            self.push(ViewItems { ops });
        }
        self.push(ViewEnd {});
        self.sent = Some(Sent {
            version: offer.header.version,
            state_hash: offer.header.state_hash,
            by_delta: base.is_some(),
        });
        self.base = Some((offer.header.state_hash, Arc::clone(&offer.items)));
    }

    /// Sends the hints that are not what was sent before.
    fn send_hints(&mut self, hints: Vec<PeerHint>) {
        let known = std::mem::take(&mut self.hinted);
        let news: Vec<_> = hints.iter().filter(|hint| known.get(&hint.host) != Some(hint)).cloned().collect();
        self.hinted = hints.into_iter().map(|hint| (hint.host, hint)).collect();
        for peers in news.chunks(HINTS_PER_FRAME) {
            self.push(Hints { peers: peers.to_vec() });
        }
    }

    fn push(&mut self, message: impl Into<CoordinatorMessage>) {
        self.outgoing.push_back(message.into().to_frame());
    }
}

/// The last frame of a link.
#[must_use]
pub fn goodbye(farewell: Farewell) -> Frame {
    let goodbye = Goodbye {
        code: farewell.code().to_owned(),
        retry_after_secs: farewell.retry_after().as_secs(),
    };
    CoordinatorMessage::Goodbye(goodbye).to_frame()
}

/// Changes in pieces of at most [`MAX_VIEW_CHUNK`] bytes.
fn chunks(ops: Vec<Op>) -> Vec<Vec<Op>> {
    /// A change's map, its numbers and the heads of its byte strings.
    const AROUND: usize = 24;
    let mut chunks = Vec::new();
    let (mut chunk, mut len) = (Vec::new(), 0);
    for op in ops {
        let size = AROUND + op.at.key.len() + op.bytes.as_ref().map_or(0, |bytes| bytes.len());
        if len + size > MAX_VIEW_CHUNK && !chunk.is_empty() {
            chunks.push(std::mem::take(&mut chunk));
            len = 0;
        }
        len += size;
        chunk.push(op);
    }
    if !chunk.is_empty() {
        chunks.push(chunk);
    }
    chunks
}

/// Cuts a text from outside at [`MAX_DETAIL`] bytes, and takes out what is no plain text.
fn cut(text: &mut String) {
    text.truncate(text.floor_char_boundary(MAX_DETAIL));
    text.retain(|c| !c.is_control());
}

#[cfg(test)]
mod tests {
    use cloison_proto::control::agent::Endpoints;
    use cloison_proto::id::MeshId;
    use cloison_proto::version::Version;
    use cloison_proto::view::Header;

    use super::*;
    use crate::entropy::Environment;
    use crate::trust::Roots;

    type TestResult = Result<(), Box<dyn std::error::Error>>;

    const START: Timestamp = Timestamp(0);

    fn hello() -> Hello {
        Hello {
            software: String::new(),
            version: None,
            state_hash: None,
            incarnation: 1,
            endpoints: Vec::new(),
        }
    }

    /// A view of `count` items of `len` bytes, at a revision, leased at a time.
    fn offer(revision: u64, count: u32, len: usize, leased_at: u64) -> Result<Arc<Offer>, Box<dyn std::error::Error>> {
        let roots = Roots::generate(MeshId([7; 16]), &Environment::system())?;
        let mut items = Items::default();
        for n in 0..count {
            items.put(9, n.to_be_bytes(), vec![u8::try_from(revision)?; len]);
        }
        let header = Header {
            mesh: MeshId([7; 16]),
            host: HostId([1; 16]),
            version: Version { generation: 1, revision },
            state_hash: items.hash(),
        };
        let valid_for = Duration::from_secs(86_400);
        Ok(Arc::new(Offer::new(
            &roots,
            header,
            Arc::new(items),
            valid_for,
            MeshTime(leased_at),
        )))
    }

    fn drain(link: &mut Link) -> Vec<Frame> {
        std::iter::from_fn(|| link.next_frame()).collect()
    }

    fn kinds(frames: &[Frame]) -> Vec<u16> {
        frames.iter().map(|frame| frame.kind).collect()
    }

    #[test]
    fn a_long_view_goes_in_frames_that_fit_and_adds_up() -> TestResult {
        let offer = offer(1, 5_000, 200, 0)?;
        let mut link = Link::new(&hello(), None, START);
        link.on_offer(Arc::clone(&offer));
        let frames = drain(&mut link);
        let mut items = Items::default();
        for frame in &frames {
            frame.to_bytes()?;
            if let Some(CoordinatorMessage::ViewItems(more)) = CoordinatorMessage::from_frame(frame)? {
                items.apply(more.ops);
            }
        }
        assert_eq!(items.hash(), offer.header.state_hash);
        assert_eq!(kinds(&frames)[..2], [101, 102]);
        assert_eq!(kinds(&frames)[frames.len() - 2..], [103, 104], "the lease comes behind the view");
        assert!(frames.len() > 10 && drain(&mut link).is_empty());
        Ok(())
    }

    #[test]
    fn what_was_outdated_before_it_was_sent_is_never_sent() -> TestResult {
        let mut link = Link::new(&hello(), None, START);
        link.on_offer(offer(1, 2, 10, 0)?);
        let first = link.next_frame().map(|frame| frame.kind);
        assert_eq!(first, Some(101));
        link.on_offer(offer(2, 2, 10, 0)?);
        let last = offer(3, 2, 10, 0)?;
        link.on_offer(Arc::clone(&last));
        let frames = drain(&mut link);
        assert_eq!(
            kinds(&frames),
            [102, 103, 104, 101, 102, 103, 104],
            "the first is completed, the second skipped"
        );
        let Some(CoordinatorMessage::ViewStart(start)) = CoordinatorMessage::from_frame(&frames[3])? else {
            return Err("no view".into());
        };
        assert_eq!(start.header, last.signed);
        Ok(())
    }

    #[test]
    fn an_offer_with_a_new_lease_sends_the_lease_alone_and_the_same_one_nothing() -> TestResult {
        let first = offer(1, 2, 10, 0)?;
        let roots = Roots::generate(MeshId([7; 16]), &Environment::system())?;
        let renewed = Arc::new(first.leased_anew(&roots, MeshTime(3600)));
        let mut link = Link::new(&hello(), None, START);
        link.on_offer(Arc::clone(&first));
        drain(&mut link);
        link.on_offer(first);
        assert!(drain(&mut link).is_empty());
        link.on_offer(renewed);
        assert_eq!(kinds(&drain(&mut link)), [104]);
        Ok(())
    }

    #[test]
    fn a_refused_snapshot_is_not_sent_again_nor_leased() -> TestResult {
        let offer = offer(1, 2, 10, 0)?;
        let mut link = Link::new(&hello(), None, START);
        link.on_offer(Arc::clone(&offer));
        drain(&mut link);
        let nack = Nack {
            version: offer.header.version,
            code: "hash".into(),
            detail: "\u{1b}[31m".repeat(500),
        };
        let event = link.on_frame(&AgentMessage::Nack(nack).to_frame(), START)?;
        let Some(Event::Nacked(heard)) = event else {
            return Err("no event".into());
        };
        assert!(
            heard.detail.len() <= MAX_DETAIL && !heard.detail.contains('\u{1b}'),
            "text from outside is cut and plain"
        );
        link.on_offer(offer);
        assert!(drain(&mut link).is_empty());
        Ok(())
    }

    #[test]
    fn only_hints_that_changed_are_sent() {
        let hint = |host: u8, incarnation| PeerHint {
            host: HostId([host; 16]),
            endpoints: Vec::new(),
            incarnation,
        };
        let mut link = Link::new(&hello(), None, START);
        let mut sent = |hints: Vec<PeerHint>| {
            link.on_hints(hints);
            let frames = drain(&mut link);
            let read = |frame: &Frame| match CoordinatorMessage::from_frame(frame) {
                Ok(Some(CoordinatorMessage::Hints(hints))) => hints.peers,
                _ => Vec::new(),
            };
            frames.iter().flat_map(read).map(|hint| hint.host.0[0]).collect::<Vec<_>>()
        };
        assert_eq!(sent(vec![hint(1, 1), hint(2, 1)]), [1, 2]);
        assert_eq!(sent(vec![hint(1, 1), hint(2, 2)]), [2]);
        assert_eq!(sent(vec![hint(2, 2)]), [0_u8; 0]);
        assert_eq!(sent(vec![hint(1, 1), hint(2, 2)]), [1], "a peer that was away is told anew");
    }

    #[test]
    fn a_host_that_moves_all_the_time_is_cut_off_although_it_sends_few_frames() {
        let mut link = Link::new(&hello(), None, START);
        let moved = AgentMessage::Endpoints(Endpoints { endpoints: Vec::new() }).to_frame();
        let at = |second: u32| START + Duration::from_secs(second.into());
        let mut say = |second| link.on_frame(&moved, at(second)).is_ok();
        assert!((0..MOVES_PER_MINUTE).all(|_| say(0)) && !say(0));
        assert!((1..=MOVES_PER_MINUTE).all(|n| say(60 + 2 * n)), "one in two seconds may go on");
    }

    #[test]
    fn a_link_begins_with_one_greeting() {
        let moved = AgentMessage::Endpoints(Endpoints { endpoints: Vec::new() }).to_frame();
        assert!(matches!(Link::greeting(&moved), Err(Fault::Order)));
        let again = AgentMessage::Hello(hello()).to_frame();
        assert!(Link::greeting(&again).is_ok());
        assert!(matches!(
            Link::new(&hello(), None, START).on_frame(&again, START),
            Err(Fault::Order)
        ));
    }
}
