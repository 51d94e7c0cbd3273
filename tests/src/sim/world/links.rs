//! The links of a world: frames on their way between agents' link machines and the coordinator's sessions, which are woken as the listener
//! wakes them.

use std::collections::VecDeque;
use std::pin::pin;
use std::task::{Context, Waker};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use cloison_coordinator::control::link::goodbye;
use cloison_coordinator::control::session::Session;
use cloison_proto::control::coordinator::Goodbye;
use cloison_proto::control::frame::{Frame, Message as _};
use cloison_proto::version::Timestamp;

use super::{Number, World};

/// How long a frame of a link is under way.
pub(super) const FRAME: Duration = Duration::from_millis(5);

/// Frames that are sent again at once: one view with its lease, and the beginning of the next.
const REPLAYED: usize = 5;

/// What a coordinator does that lost its mind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Confusion {
    /// It sends the last frame first.
    Reversed,
    /// It sends each frame twice.
    Doubled,
    /// It leaves frames out.
    Thinned,
    /// It changes a bit in each.
    Damaged,
    /// It takes one host for another.
    Foreign,
}

/// A link between a host and the coordinator.
#[derive(Default)]
pub(super) struct Wire {
    /// The coordinator's end, once it was greeted.
    pub(super) session: Option<Session>,
    pub(super) up: VecDeque<(Timestamp, Frame)>,
    pub(super) down: VecDeque<(Timestamp, Frame)>,
    /// The coordinator has said goodbye.
    closed: bool,
}

impl World {
    /// The host is sent again what it was sent before, from this frame on, as a coordinator would that somebody holds an old copy of. Nothing
    /// happens while anything else is on its way.
    pub fn replay(&mut self, number: Number, from: usize) {
        let frames = self.recorded_from(number, from);
        self.inject(number, frames);
    }

    /// The host is sent what a coordinator says that lost its mind: frames of this or another host, changed, and then the link ends.
    ///
    /// # Errors
    /// If an invariant breaks.
    pub fn confuse(&mut self, number: Number, of: Number, how: Confusion, from: usize) -> Result<()> {
        let mut frames = self.recorded_from(of, from);
        match how {
            Confusion::Reversed => frames.reverse(),
            Confusion::Doubled => frames = frames.iter().flat_map(|frame| [frame.clone(), frame.clone()]).collect(),
            Confusion::Thinned => {
                frames = frames
                    .into_iter()
                    .enumerate()
                    .filter(|(n, _)| !(n + from).is_multiple_of(3))
                    .map(|(_, frame)| frame)
                    .collect()
            }
            Confusion::Damaged => {
                for frame in &mut frames {
                    let at = from.checked_rem(frame.body.len()).unwrap_or(0);
                    frame.body.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << (from % 8));
                }
            }
            Confusion::Foreign => {}
        }
        self.inject(number, frames);
        self.pass(FRAME * 4)?;
        self.unlink(number, "the coordinator lost its mind")
    }

    fn recorded_from(&self, number: Number, from: usize) -> Vec<Frame> {
        let recorded = self.recorded.get(&number).map(Vec::as_slice).unwrap_or_default();
        let start = from.checked_rem(recorded.len()).unwrap_or(0);
        let frames = recorded.iter().skip(start).take(REPLAYED);
        // A goodbye keeps an agent away for as long as it says: that is the coordinator's right.
        frames.filter(|frame| frame.kind != Goodbye::KIND).cloned().collect()
    }

    fn inject(&mut self, number: Number, frames: Vec<Frame>) {
        let at = self.now + FRAME;
        if let Some(wire) = self.wires.get_mut(&number).filter(|wire| wire.down.is_empty() && !wire.closed) {
            wire.down.extend(frames.into_iter().map(|frame| (at, frame)));
        }
    }

    /// Has sessions that were woken, or whose lease is due, look for news; takes what they have to send, and ends those that have to end.
    pub(super) fn refresh_sessions(&mut self) {
        let (now, mesh) = (self.now, self.coordinator.moment(self.now).mesh);
        for (number, wire) in &mut self.wires {
            let Some(session) = &mut wire.session else { continue };
            if is_woken(session) || session.lease_due().is_some_and(|due| due <= mesh) {
                session.refresh(mesh);
            }
            let farewell = session.farewell();
            let frames = std::iter::from_fn(|| session.next_frame()).take_while(|_| farewell.is_none());
            let frames: Vec<_> = frames.chain(farewell.map(goodbye)).collect();
            self.recorded.entry(*number).or_default().extend(frames.iter().cloned());
            wire.down.extend(frames.into_iter().map(|frame| (now + FRAME, frame)));
            if farewell.is_some() {
                (wire.session, wire.closed) = (None, true);
            }
        }
    }

    pub(super) fn move_frames(&mut self) -> Result<()> {
        let numbers: Vec<_> = self.wires.keys().copied().collect();
        for number in numbers {
            while let Some(frame) = self.due(number, |wire| &mut wire.up) {
                self.tell_coordinator(number, &frame)?;
            }
            while let Some(frame) = self.due(number, |wire| &mut wire.down) {
                let now = self.now;
                let member = self.member(number)?;
                let outputs = member.link.frame(now, &frame);
                let deeds = member.carry_out(outputs, now)?;
                self.carry_out(number, deeds)?;
            }
        }
        self.refresh_sessions();
        Ok(())
    }

    fn due(&mut self, number: Number, queue: impl Fn(&mut Wire) -> &mut VecDeque<(Timestamp, Frame)>) -> Option<Frame> {
        let queue = queue(self.wires.get_mut(&number)?);
        let (_, frame) = queue.pop_front_if(|(at, _)| *at <= self.now)?;
        Some(frame)
    }

    fn tell_coordinator(&mut self, number: Number, frame: &Frame) -> Result<()> {
        let (host, address) = (self.members[number].id(), self.members[number].underlay.ip());
        let moment = self.coordinator.moment(self.now);
        let Some(wire) = self.wires.get_mut(&number).filter(|wire| !wire.closed) else {
            return Ok(());
        };
        match &mut wire.session {
            Some(session) => {
                session.on_frame(frame, moment).with_context(|| format!("the link of {host}"))?;
            }
            // The coordinator knows no revoked host's certificate any more.
            None => match self.coordinator.open(host, address, frame, self.now) {
                Ok(session) => wire.session = Some(session),
                Err(error) => {
                    ensure!(self.revoked.contains(&number), "a link of {host} was refused: {error:#}");
                    self.unlink(number, "refused")?;
                }
            },
        }
        Ok(())
    }

    pub(super) fn unlink(&mut self, number: Number, why: &str) -> Result<()> {
        let now = self.now;
        if self.wires.remove(&number).is_some() {
            self.member(number)?.link.disconnected(now, why);
        }
        Ok(())
    }
}

/// Whether the hub has woken the link since it was last asked.
fn is_woken(session: &Session) -> bool {
    let woken = pin!(session.slot().woken());
    woken.poll(&mut Context::from_waker(Waker::noop())).is_ready()
}
