//! The host's incarnation: a number that is raised at each start, and whenever the wall clock stepped back. Peers learn it as a hint and
//! make their session with this host anew, because a WireGuard responder refuses handshakes whose TAI64N stamps do not grow.
//!
//! It is raised by a random number of steps: two machines that begin with copies of one disk are then told apart by their numbers, whichever
//! starts first and however often.
//!
//! A lost counter starts at the wall clock's second, so that it is above the old one in all but the strangest cases.

use super::clock::WallTime;
use super::{File, StateDir, StateError};

/// Raises the counter on disk and gives its new value.
///
/// # Errors
/// [`StateError`]; a damaged counter is replaced, not an error.
pub fn raise(dir: &StateDir, wall: WallTime) -> Result<u64, StateError> {
    let last = match dir.read(File::Incarnation) {
        Ok(body) => body.and_then(|b| std::str::from_utf8(&b).ok()?.parse::<u64>().ok()),
        Err(StateError::Damaged { path, why, .. }) => {
            tracing::warn!(path = %path.display(), why, "the incarnation counter is lost; starting above it by the wall clock");
            None
        }
        Err(e) => return Err(e),
    };
    let next = last.map_or(wall.0, |last| last.saturating_add(1)).saturating_add(steps());
    dir.write(File::Incarnation, next.to_string().as_bytes())?;
    Ok(next)
}

/// Anything up to 2^16 - 1; nothing if the kernel gives no random bytes.
fn steps() -> u64 {
    let mut bytes = [0; 2];
    getrandom::fill(&mut bytes).map_or(0, |()| u64::from(u16::from_ne_bytes(bytes)))
}

/// Notices backward steps of the wall clock: it watches the difference between that clock and the one that never steps.
#[derive(Debug, Clone, Copy)]
pub struct StepWatch {
    /// Wall time less boot time, in seconds, at the last look.
    offset: i128,
}

impl StepWatch {
    /// Steps smaller than this are left to the session's own tolerance: TAI64N stamps of one second follow each other.
    const TOLERANCE: i128 = 1;

    /// Begins to watch.
    #[must_use]
    pub fn new(wall: WallTime, boot: cloison_proto::version::Timestamp) -> Self {
        Self {
            offset: Self::offset(wall, boot),
        }
    }

    /// Whether the wall clock stepped back since the last look.
    pub fn stepped_back(&mut self, wall: WallTime, boot: cloison_proto::version::Timestamp) -> bool {
        let before = std::mem::replace(&mut self.offset, Self::offset(wall, boot));
        self.offset < before - Self::TOLERANCE
    }

    fn offset(wall: WallTime, boot: cloison_proto::version::Timestamp) -> i128 {
        i128::from(wall.0) - i128::from(boot.0 / 1_000_000_000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cloison_proto::version::Timestamp;

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    #[test]
    fn each_start_raises_it_and_a_lost_counter_goes_on_above() -> Outcome {
        let folder = tempfile::tempdir()?;
        let dir = StateDir::open(folder.path())?;
        let first = raise(&dir, WallTime(1_000))?;
        assert!(raise(&dir, WallTime(0))? > first, "whatever the wall clock says");
        std::fs::write(dir.path_of(File::Incarnation), "damaged")?;
        assert!(raise(&dir, WallTime(1_000_000))? > first + 1);
        Ok(())
    }

    #[test]
    fn copies_of_one_disk_are_told_apart() -> Outcome {
        let start = |folder: &std::path::Path| -> Result<Vec<u64>, Box<dyn std::error::Error>> {
            let dir = StateDir::open(folder)?;
            dir.write(File::Incarnation, b"7")?;
            (0..8).map(|_| Ok(raise(&dir, WallTime(0))?)).collect()
        };
        let (one, two) = (tempfile::tempdir()?, tempfile::tempdir()?);
        assert_ne!(start(one.path())?, start(two.path())?);
        Ok(())
    }

    #[test]
    fn only_steps_back_are_noticed() {
        let at = |s: u64| Timestamp(s * 1_000_000_000);
        let mut watch = StepWatch::new(WallTime(1_000), at(10));
        assert!(!watch.stepped_back(WallTime(1_060), at(70)));
        assert!(!watch.stepped_back(WallTime(5_000), at(80)), "a step forward");
        assert!(watch.stepped_back(WallTime(1_100), at(90)));
        assert!(!watch.stepped_back(WallTime(1_110), at(100)), "noticed once");
    }
}
