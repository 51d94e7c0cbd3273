//! The coordinator's clocks: the only file that reads the time.
//!
//! The mesh's time is what [`MeshClock`] tells: the wall clock, but never earlier than what was told before. Agents take no lease that is
//! older than their last one, so a wall clock that was ahead for a while and is then set right must not take the mesh's time back with it.
//! It goes on from where it was, by the boot's clock and a little slower, until the wall clock has caught up.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cloison_proto::version::MeshTime;
use parking_lot::Mutex;
use rustix::time::{ClockId, clock_gettime};

/// A machine's clocks: the system's, or a test's.
pub trait Clock: fmt::Debug + Send + Sync {
    /// The wall clock, right or wrong: what has passed since the Unix epoch.
    fn wall(&self) -> Duration;
    /// What has passed since the machine's boot, suspend included.
    fn boot(&self) -> Duration;
    /// Which boot that is.
    fn boot_id(&self) -> String;
}

/// The machine's own clocks.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn wall(&self) -> Duration {
        // A clock before 1970 reads as 1970: every token and certificate made then has run out by any real clock.
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
    }

    fn boot(&self) -> Duration {
        let time = clock_gettime(ClockId::Boottime);
        let part = |number: i64| u64::try_from(number).unwrap_or(0);
        Duration::from_secs(part(time.tv_sec)).saturating_add(Duration::from_nanos(part(time.tv_nsec)))
    }

    fn boot_id(&self) -> String {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        id.trim().to_owned()
    }
}

/// The mesh's time. All clones are one clock.
#[derive(Debug, Clone)]
pub struct MeshClock(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    machine: Box<dyn Clock>,
    told: Mutex<Told>,
}

/// A moment to go on from.
#[derive(Debug)]
struct Told {
    /// The mesh's time then.
    time: Duration,
    /// When, on the boot's clock.
    at: Duration,
    /// Whether it was written down that the wall clock is behind.
    warned: bool,
}

/// What the mesh's time was at a moment of some boot: enough to go on from in another process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// The mesh's time at the moment.
    pub told: Duration,
    /// Which boot; empty if that is not known.
    pub boot: String,
    /// The moment, on that boot's clock.
    pub at: Duration,
}

impl MeshClock {
    /// How far the wall clock may be behind before people are told.
    const TOLERATED: Duration = Duration::from_secs(60);
    /// So much slower than the boot's clock time goes on until the wall clock has caught up: 43 s a day. Agents allow for twice that.
    const SLOWER_BY: u32 = 2_000;
    /// How far ahead of the wall clock time is kept. Beyond that no host of the mesh may renew its certificate, so that none was told such
    /// a time; a clock that showed another decade for a moment must not keep everybody out for as long.
    pub const LONGEST_LEAD: Duration = Duration::from_secs(30 * 86_400);

    /// The mesh's time by this machine's clocks.
    #[must_use]
    pub fn over(machine: impl Clock + 'static) -> Self {
        let told = Told {
            time: Duration::ZERO,
            at: machine.boot(),
            warned: false,
        };
        Self(Arc::new(Inner {
            machine: Box::new(machine),
            told: Mutex::new(told),
        }))
    }

    /// The mesh's time, in seconds since the Unix epoch. It never goes back.
    #[must_use]
    pub fn now(&self) -> MeshTime {
        MeshTime(self.look().told.as_secs())
    }

    /// How far the wall clock is behind the mesh's time, if that is more than a minute.
    #[must_use]
    pub fn lead(&self) -> Option<Duration> {
        let lead = self.look().lead;
        (lead > Self::TOLERATED).then_some(lead)
    }

    /// What another process needs to go on from this moment.
    #[must_use]
    pub fn mark(&self) -> Mark {
        let Look { told, at, .. } = self.look();
        Mark {
            told,
            boot: self.0.machine.boot_id(),
            at,
        }
    }

    /// Goes on from what another process told: exactly, in the same boot; in another one from `slack` behind the mark.
    pub fn resume(&self, mark: &Mark, slack: Duration) {
        let (boot, id) = (self.0.machine.boot(), self.0.machine.boot_id());
        let since = boot.checked_sub(mark.at).filter(|_| !id.is_empty() && id == mark.boot);
        self.not_before(mark.told.saturating_add(since.unwrap_or(slack)));
    }

    /// Tells no time before `floor` any more.
    pub fn not_before(&self, floor: Duration) {
        let Look { told, at, .. } = self.look();
        if floor > told {
            let mut state = self.0.told.lock();
            (state.time, state.at) = (floor, at);
        }
    }

    fn look(&self) -> Look {
        let mut told = self.0.told.lock();
        let (wall, at) = (self.0.machine.wall(), self.0.machine.boot());
        let passed = at.saturating_sub(told.at);
        let carried = told.time.saturating_add(passed.saturating_sub(passed / Self::SLOWER_BY));
        let lead = carried.saturating_sub(wall);
        if lead.is_zero() || lead > Self::LONGEST_LEAD {
            (told.time, told.at) = (wall, at);
            if std::mem::take(&mut told.warned) {
                tracing::info!("the mesh's time is the wall clock's again");
            }
            return Look {
                told: wall,
                at,
                lead: Duration::ZERO,
            };
        }
        if lead > Self::TOLERATED && !std::mem::replace(&mut told.warned, true) {
            let seconds = lead.as_secs();
            tracing::warn!(seconds, "the wall clock is behind the mesh's time, which goes on from where it was");
        }
        Look { told: carried, at, lead }
    }
}

/// All clocks at one moment.
struct Look {
    told: Duration,
    at: Duration,
    lead: Duration,
}

/// Clocks that move only when told to: for tests and the simulation.
#[derive(Debug, Clone, Default)]
pub struct ManualClock(Arc<Mutex<Hands>>);

#[derive(Debug, Default)]
struct Hands {
    wall: Duration,
    boot: Duration,
    boots: u32,
}

impl ManualClock {
    /// Clocks of which the wall clock shows `start`.
    #[must_use]
    pub fn starting_at(start: MeshTime) -> Self {
        let clock = Self::default();
        clock.set_wall(start);
        clock
    }

    /// What the wall clock shows.
    #[must_use]
    pub fn now(&self) -> MeshTime {
        MeshTime(self.0.lock().wall.as_secs())
    }

    /// Lets time pass.
    pub fn advance(&self, span: Duration) {
        let mut hands = self.0.lock();
        hands.wall = hands.wall.saturating_add(span);
        hands.boot = hands.boot.saturating_add(span);
    }

    /// Sets the wall clock, while no time passes.
    pub fn set_wall(&self, time: MeshTime) {
        self.0.lock().wall = Duration::from_secs(time.0);
    }

    /// Boots the machine, which takes no time.
    pub fn reboot(&self) {
        let mut hands = self.0.lock();
        (hands.boot, hands.boots) = (Duration::ZERO, hands.boots.saturating_add(1));
    }
}

impl Clock for ManualClock {
    fn wall(&self) -> Duration {
        self.0.lock().wall
    }

    fn boot(&self) -> Duration {
        self.0.lock().boot
    }

    fn boot_id(&self) -> String {
        format!("boot {}", self.0.lock().boots)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 1_800_000_000;
    const HOUR: u64 = 3_600;

    fn clocks() -> (ManualClock, MeshClock) {
        let machine = ManualClock::starting_at(MeshTime(START));
        (machine.clone(), MeshClock::over(machine))
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_step_forward_is_followed_at_once() {
        let (machine, clock) = clocks();
        assert_eq!(clock.now(), MeshTime(START));
        machine.set_wall(MeshTime(START + 3 * HOUR));
        assert_eq!((clock.now(), clock.lead()), (MeshTime(START + 3 * HOUR), None));
        machine.advance(seconds(10));
        assert_eq!(clock.now(), MeshTime(START + 3 * HOUR + 10));
    }

    #[test]
    fn a_step_back_takes_nothing_back_and_time_goes_on() {
        let (machine, clock) = clocks();
        machine.set_wall(MeshTime(START + 3 * HOUR));
        assert_eq!(clock.now(), MeshTime(START + 3 * HOUR));
        machine.set_wall(MeshTime(START));
        assert_eq!((clock.now(), clock.lead()), (MeshTime(START + 3 * HOUR), Some(seconds(3 * HOUR))));
        machine.advance(seconds(100));
        assert_eq!(
            clock.now(),
            MeshTime(START + 3 * HOUR + 99),
            "a two thousandth slower, in whole seconds"
        );
        machine.set_wall(MeshTime(START - HOUR));
        assert_eq!(clock.now(), MeshTime(START + 3 * HOUR + 99), "another step back");
        machine.set_wall(MeshTime(START + 4 * HOUR));
        assert_eq!(
            (clock.now(), clock.lead()),
            (MeshTime(START + 4 * HOUR), None),
            "a wall clock that is ahead again"
        );
    }

    #[test]
    fn the_wall_clock_catches_up_by_itself_and_no_moment_is_earlier_than_the_one_before() {
        let (machine, clock) = clocks();
        machine.set_wall(MeshTime(START + 70));
        let mut last = clock.now();
        machine.set_wall(MeshTime(START));
        assert!(clock.lead().is_some());
        for _ in 0..2 * 24 {
            machine.advance(seconds(HOUR));
            let now = clock.now();
            assert!(now > last && now >= machine.now());
            last = now;
        }
        assert_eq!((last, clock.lead()), (machine.now(), None));
    }

    #[test]
    fn a_clock_that_showed_another_year_for_a_moment_is_not_followed_for_a_year() {
        let (machine, clock) = clocks();
        machine.set_wall(MeshTime(START + 365 * 24 * HOUR));
        assert_eq!(clock.now(), machine.now());
        machine.set_wall(MeshTime(START));
        assert_eq!((clock.now(), clock.lead()), (MeshTime(START), None));
    }

    #[test]
    fn in_the_same_boot_another_process_goes_on_exactly_where_the_last_one_was() {
        let (machine, clock) = clocks();
        machine.set_wall(MeshTime(START + 3 * HOUR));
        let mark = clock.mark();
        machine.set_wall(MeshTime(START));
        machine.advance(seconds(7));
        for _ in 0..100 {
            let next = MeshClock::over(machine.clone());
            next.resume(&mark, seconds(60));
            assert_eq!(
                next.now(),
                MeshTime(START + 3 * HOUR + 7),
                "restarting again and again is no way into the future"
            );
        }
    }

    #[test]
    fn in_another_boot_it_goes_on_behind_everything_that_may_have_been_told() {
        let (machine, clock) = clocks();
        machine.set_wall(MeshTime(START + 3 * HOUR));
        let mark = clock.mark();
        machine.advance(seconds(59));
        let last = clock.now();
        machine.reboot();
        machine.set_wall(MeshTime(START));
        let next = MeshClock::over(machine.clone());
        next.resume(&mark, seconds(60));
        assert!(next.now() > last);
        let right = MeshClock::over(ManualClock::starting_at(MeshTime(START + 5 * HOUR)));
        right.resume(&mark, seconds(60));
        assert_eq!(right.now(), MeshTime(START + 5 * HOUR), "a wall clock that is later counts");
    }
}
