//! The service manager above the agent (systemd, or whatever speaks its protocol): it is told how the agent does, is pinged as long as
//! everything moves, and keeps the TUNs open while there is no agent, so that a restart is a pause.
//!
//! Everything here goes by sd_notify(3): datagrams to the socket in `NOTIFY_SOCKET`, and descriptors passed back at the next start. Without
//! a service manager all of it does nothing. A message that does not arrive is logged and changes nothing else.
//!
//! Only TUNs are kept. A WireGuard socket is not worth it: what would wait in it is sealed for sessions that ended with the agent. Nothing
//! is taken back unseen: a descriptor that is no TUN of the wanted name in the wanted namespace is closed.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use cloison_proto::label::ComponentName;
use cloison_proto::version::Timestamp;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use sd_notify::NotifyState;

use crate::sys::inherited;
use crate::sys::netns::NetNs;
use crate::sys::tun::Tun;

/// How the name of a kept TUN begins; the component's follows.
const TUN: &str = "tun-";

/// Pings in one watchdog interval: one may come late, and one be lost.
const PINGS: u32 = 4;

/// A TUN that was kept open while there was no agent.
#[derive(Debug)]
pub struct Kept {
    /// Whose it was.
    pub component: String,
    /// The TUN.
    pub tun: Tun,
    /// Where it is.
    pub namespace: NetNs,
}

/// The service manager; by default there is none.
#[derive(Debug, Clone, Copy, Default)]
pub struct Manager {
    is_there: bool,
}

impl Manager {
    /// The one that started this process, if one did.
    #[must_use]
    pub fn of_this_process() -> Self {
        Self {
            is_there: std::env::var_os("NOTIFY_SOCKET").is_some(),
        }
    }

    /// Takes back what was kept. What is no live TUN is closed, and forgotten there. Once for a process, before it opens anything else.
    #[must_use]
    pub fn take_back(self) -> Vec<Kept> {
        let passed = inherited::take().unwrap_or_else(|error| {
            tracing::warn!(%error, "what the service manager passed cannot be used");
            Vec::new()
        });
        let adopted = passed.into_iter().filter_map(|(name, fd)| {
            let error = match (Tun::adopt(fd), name.strip_prefix(TUN)) {
                (Ok((tun, namespace)), Some(component)) => {
                    let component = component.to_owned();
                    return Some(Kept { component, tun, namespace });
                }
                (Ok(_), None) => "its name is not one of ours".to_owned(),
                (Err(error), _) => crate::sys::with_causes(&error),
            };
            tracing::warn!(name, error, "closing what was kept");
            self.forget_name(&name);
            None
        });
        adopted.collect()
    }

    /// Has the TUN of a component kept open when this process ends, in place of any other of that component.
    pub fn keep(self, component: &ComponentName, tun: &Tun) {
        let name = format!("{TUN}{component}");
        self.forget_name(&name);
        if self.is_there {
            let message = format!("FDSTORE=1\nFDNAME={name}\n");
            said(send_with(&message, tun.as_fd()));
        }
    }

    /// Has the TUN of a component kept no longer.
    pub fn forget(self, component: &str) {
        self.forget_name(&format!("{TUN}{component}"));
    }

    /// The data plane stands.
    pub fn ready(self) {
        self.tell(&[NotifyState::Ready]);
    }

    /// The agent is about to end.
    pub fn stopping(self) {
        self.tell(&[NotifyState::Stopping]);
    }

    /// A line for people, shown by `systemctl status`.
    pub fn status(self, line: &str) {
        self.tell(&[NotifyState::Status(line)]);
    }

    /// The start takes longer: this much more from now on.
    pub fn still_starting(self, more: Duration) {
        let more = u32::try_from(more.as_micros()).unwrap_or(u32::MAX);
        self.tell(&[NotifyState::ExtendTimeoutUsec(more)]);
    }

    /// The watchdog, if the service manager wants to be pinged.
    #[must_use]
    pub fn watchdog(self, now: Timestamp) -> Option<Watchdog> {
        let limit = sd_notify::watchdog_enabled().filter(|limit| self.is_there && !limit.is_zero())?;
        let every = limit / PINGS;
        Some(Watchdog {
            manager: self,
            every,
            due: now,
            seen: None,
        })
    }

    fn forget_name(self, name: &str) {
        self.tell(&[
            NotifyState::Custom("FDSTOREREMOVE=1"),
            NotifyState::Custom(&format!("FDNAME={name}")),
        ]);
    }

    fn tell(self, what: &[NotifyState<'_>]) {
        if self.is_there {
            said(sd_notify::notify(what));
        }
    }
}

/// Pings the service manager as long as everything moves. Whoever asks is the control side's loop, so that it moves is shown by the asking;
/// each packet worker shows it by having begun and ended a round since it was last woken.
#[derive(Debug)]
pub struct Watchdog {
    manager: Manager,
    every: Duration,
    due: Timestamp,
    /// How many rounds each worker had ended when they were last woken.
    seen: Option<Vec<u64>>,
}

/// What the watchdog wants of whoever owns the workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Nothing yet.
    Nothing,
    /// To wake all workers, so that each has a round to end.
    Wake,
}

impl Watchdog {
    /// A moment of the loop; `rounds` are the rounds that each worker has ended so far. A ping is due four times in the manager's interval,
    /// and goes out only if every worker ended a round since the last look: one that is stuck lets the watchdog bite.
    pub fn look(&mut self, now: Timestamp, rounds: &[u64]) -> Wanted {
        if now < self.due {
            return Wanted::Nothing;
        }
        let Some(stuck) = self.stuck(rounds) else {
            self.manager.tell(&[NotifyState::Watchdog]);
            self.due = now + self.every;
            self.seen = Some(rounds.to_vec());
            return Wanted::Wake;
        };
        tracing::warn!(
            worker = stuck,
            "a packet worker does not move: the watchdog is not told that all is well"
        );
        self.due = now + self.every;
        Wanted::Wake
    }

    /// The first worker that has ended no round since it was last woken.
    fn stuck(&self, rounds: &[u64]) -> Option<usize> {
        let seen = self.seen.as_ref()?;
        rounds.iter().zip(seen).position(|(now, before)| now == before)
    }
}

fn said(outcome: io::Result<()>) {
    if let Err(error) = outcome {
        tracing::warn!(%error, "the service manager cannot be told");
    }
}

/// Sends a message with a descriptor. The crate would want another one for this.
fn send_with(message: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return Ok(());
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect(path)?;
    let fds = [fd];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    sendmsg(&socket, &[IoSlice::new(message.as_bytes())], &mut ancillary, SendFlags::empty())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watchdog() -> Watchdog {
        Watchdog {
            manager: Manager::default(),
            every: Duration::from_secs(1),
            due: Timestamp(0),
            seen: None,
        }
    }

    #[test]
    fn a_ping_is_due_four_times_in_an_interval_and_wakes_the_workers() {
        let at = |ms: u64| Timestamp(ms * 1_000_000);
        let mut dog = watchdog();
        assert_eq!(dog.look(at(0), &[0, 0]), Wanted::Wake);
        assert_eq!(dog.look(at(999), &[1, 1]), Wanted::Nothing);
        assert_eq!(dog.look(at(1_000), &[1, 1]), Wanted::Wake);
        assert_eq!(dog.stuck(&[2, 2]), None);
    }

    #[test]
    fn one_worker_that_does_not_move_is_enough() {
        let at = |s: u64| Timestamp(s * 1_000_000_000);
        let mut dog = watchdog();
        dog.look(at(0), &[5, 5]);
        assert_eq!(dog.stuck(&[9, 5]), Some(1));
        dog.look(at(1), &[9, 5]);
        assert_eq!(dog.stuck(&[12, 5]), Some(1), "what counts is the last look at which all moved");
        assert_eq!(dog.stuck(&[12, 6]), None, "it moves again");
    }
}
