//! Times: the boot's clock, the wall clock, and mesh time, which only signed leases tell.
//!
//! Mesh time = `issued_at` of the newest lease + what has passed since on the boot's clock. It is at most the true time, never ahead of it:
//! after a long pause without contact it may lie far behind. So it can say that something is over, never that something has not begun.
//!
//! What remains of a lease is kept on disk each minute. At a start in the same boot what has passed is known exactly. In another boot it is
//! what the wall clock says, never negative, and at least a minute: a wall clock that was set back buys nothing.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cloison_proto::version::{MeshTime, Timestamp};
use serde::{Deserialize, Serialize};

/// How often what remains of the lease is written, and the least that a boot costs.
pub const PERSIST_EVERY: Duration = Duration::from_secs(60);

/// The wall clock: seconds since the Unix epoch, right or wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WallTime(pub u64);

/// Which boot of the machine this is, as the kernel names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BootId(pub String);

/// One moment, on every clock there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moment {
    /// The boot.
    pub boot: BootId,
    /// The boot's clock.
    pub boottime: Timestamp,
    /// The wall clock.
    pub wall: WallTime,
}

impl Moment {
    /// This moment. A kernel without a boot id counts as another boot each time, which costs a minute and breaks nothing.
    #[must_use]
    pub fn now() -> Self {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self {
            boot: BootId(boot.trim().to_owned()),
            boottime: crate::sys::clock::now(),
            wall: wall_now(),
        }
    }
}

/// The wall clock's second.
#[must_use]
pub fn wall_now() -> WallTime {
    WallTime(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()))
}

/// Mesh time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MeshClock {
    base: MeshTime,
    at: Timestamp,
    /// Whether a lease told the time in this boot; before, it is the best guess.
    told: bool,
    /// What leases had told when a guess was made: the time then was no earlier.
    floor: MeshTime,
}

impl MeshClock {
    /// How far a told clock may be set back at once: two seconds, and a thousandth of the time since it was told, which is ten times what
    /// a bad oscillator drifts. So a lease that was held back on its way cannot buy time.
    const SLACK: Duration = Duration::from_secs(2);
    const DRIFT: u32 = 1_000;

    /// A clock by which it is probably `mesh` at the moment `at`. The first lease corrects it, in either direction.
    #[must_use]
    pub const fn guess(mesh: MeshTime, at: Timestamp) -> Self {
        Self {
            base: mesh,
            at,
            told: false,
            floor: MeshTime(0),
        }
    }

    /// A guess, made when leases had told at least `floor` before: what a lease that is sent again says of the time cannot take that back.
    #[must_use]
    pub const fn not_before(self, floor: MeshTime) -> Self {
        Self { floor, ..self }
    }

    /// The clock of an agent that ended in this boot, by which it was `mesh` at the moment `at`, as leases had told.
    #[must_use]
    pub const fn resumed(mesh: MeshTime, at: Timestamp) -> Self {
        Self {
            base: mesh,
            at,
            told: true,
            floor: mesh,
        }
    }

    /// Mesh time at the moment `at`.
    #[must_use]
    pub fn at(self, at: Timestamp) -> MeshTime {
        self.base.plus(at.since(self.at))
    }

    /// Mesh time at the moment `at`, if a lease told it since the agent started.
    #[must_use]
    pub fn told_at(self, at: Timestamp) -> Option<MeshTime> {
        self.told.then(|| self.at(at))
    }

    /// Takes up what a new signed lease said.
    pub fn learn(&mut self, issued_at: MeshTime, at: Timestamp) {
        let passed = at.since(self.at);
        let slack = Self::SLACK + passed / Self::DRIFT;
        let known = if self.told { self.at(at) } else { self.floor.plus(passed) };
        let earliest = MeshTime(known.0.saturating_sub(slack.as_secs()));
        *self = Self {
            base: issued_at.max(earliest),
            at,
            told: true,
            floor: self.floor,
        };
    }
}

/// What was left of a lease at some moment, as it is kept on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Remainder {
    /// What was left.
    pub secs: u64,
    /// In which boot.
    pub boot: BootId,
    /// When, on that boot's clock, in nanoseconds.
    pub boottime_nanos: u64,
    /// When, on the wall clock.
    pub wall: WallTime,
}

impl Remainder {
    /// What is left at `now`, to be kept.
    #[must_use]
    pub fn new(left: Duration, now: &Moment) -> Self {
        Self {
            secs: left.as_secs(),
            boot: now.boot.clone(),
            boottime_nanos: now.boottime.0,
            wall: now.wall,
        }
    }

    /// When this was, on the boot's clock of `now`; `None` in another boot.
    #[must_use]
    pub fn same_boot(&self, now: &Moment) -> Option<Timestamp> {
        (!self.boot.0.is_empty() && self.boot == now.boot && now.boottime.0 >= self.boottime_nanos)
            .then_some(Timestamp(self.boottime_nanos))
    }

    /// What is still left at `now`.
    #[must_use]
    pub fn left_at(&self, now: &Moment) -> Duration {
        let passed = match self.same_boot(now) {
            // Rounded up, and no second is ever won by restarting.
            Some(then) => now.boottime.since(then) + Duration::from_secs(1),
            None => Duration::from_secs(now.wall.0.saturating_sub(self.wall.0)).max(PERSIST_EVERY),
        };
        Duration::from_secs(self.secs).saturating_sub(passed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn moment(boot: &str, boottime: u64, wall: u64) -> Moment {
        Moment {
            boot: BootId(boot.into()),
            boottime: Timestamp(boottime * 1_000_000_000),
            wall: WallTime(wall),
        }
    }

    #[test]
    fn in_the_same_boot_the_wall_clock_does_not_matter() {
        let kept = Remainder::new(Duration::from_secs(1_000), &moment("a", 100, 5_000));
        assert_eq!(kept.left_at(&moment("a", 200, 0)), Duration::from_secs(899));
        assert_eq!(kept.left_at(&moment("a", 200, 9_999_999)), Duration::from_secs(899));
    }

    #[test]
    fn in_another_boot_the_wall_clock_counts_and_a_minute_at_least() {
        let kept = Remainder::new(Duration::from_secs(1_000), &moment("a", 100, 5_000));
        assert_eq!(kept.left_at(&moment("b", 1, 5_600)), Duration::from_secs(400));
        assert_eq!(kept.left_at(&moment("b", 1, 4_000)), Duration::from_secs(940), "set back");
        assert_eq!(
            kept.left_at(&moment("b", 1, 5_010)),
            Duration::from_secs(940),
            "too short to be a boot"
        );
        assert_eq!(kept.left_at(&moment("b", 1, 6_001)), Duration::ZERO);
    }

    #[test]
    fn mesh_time_runs_on_the_boot_s_clock() {
        let at = |s: u64| Timestamp(s * 1_000_000_000);
        let mut clock = MeshClock::guess(MeshTime(9_000), at(0));
        assert_eq!(clock.at(at(5)), MeshTime(9_005));
        clock.learn(MeshTime(1_000), at(6));
        assert_eq!(clock.at(at(7)), MeshTime(1_001), "a guess gives way to what is told");
        clock.learn(MeshTime(1_011), at(16));
        assert_eq!(clock.at(at(16)), MeshTime(1_011), "a little ahead");
        clock.learn(MeshTime(1_020), at(26));
        assert_eq!(clock.at(at(26)), MeshTime(1_020), "a little behind");
    }

    #[test]
    fn a_lease_that_was_held_back_buys_no_time() {
        let at = |s: u64| Timestamp(s * 1_000_000_000);
        let mut clock = MeshClock::guess(MeshTime(0), at(0));
        clock.learn(MeshTime(1_000), at(0));
        clock.learn(MeshTime(1_100), at(3_600));
        assert_eq!(clock.at(at(3_600)), MeshTime(4_600 - 5));
    }

    #[test]
    fn a_lease_that_is_sent_again_after_a_restart_takes_back_no_time() {
        let at = |s: u64| Timestamp(s * 1_000_000_000);
        let mut same_boot = MeshClock::resumed(MeshTime(5_000), at(100));
        same_boot.learn(MeshTime(1_000), at(200));
        assert_eq!(same_boot.at(at(200)), MeshTime(5_100 - 2));
        let mut other_boot = MeshClock::guess(MeshTime(9_000), at(10)).not_before(MeshTime(5_000));
        other_boot.learn(MeshTime(1_000), at(20));
        assert_eq!(
            other_boot.at(at(20)),
            MeshTime(5_010 - 2),
            "a guess may be too late, what was told is not"
        );
        let mut never_told = MeshClock::guess(MeshTime(9_000), at(10));
        never_told.learn(MeshTime(1_000), at(20));
        assert_eq!(never_told.at(at(20)), MeshTime(1_000));
    }

    proptest! {
        #[test]
        fn restarting_never_lengthens_a_lease(
            left in 0u64..100_000,
            starts in proptest::collection::vec((any::<bool>(), 0u64..100_000, 0u64..100_000), 1..10),
        ) {
            let mut now = moment("0", 1, 50_000);
            let mut kept = Remainder::new(Duration::from_secs(left), &now);
            for (number, (reboot, passed, wall)) in starts.into_iter().enumerate() {
                let (boot, boottime) = if reboot { (number.to_string(), passed) } else { (now.boot.0.clone(), now.boottime.0 / 1_000_000_000 + passed) };
                now = moment(&boot, boottime, wall);
                let next = kept.left_at(&now);
                prop_assert!(next < Duration::from_secs(kept.secs) || kept.secs == 0);
                kept = Remainder::new(next, &now);
            }
        }
    }
}
