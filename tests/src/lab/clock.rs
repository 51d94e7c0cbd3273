//! The clocks of a program under test, moved while it runs: see `tests/shim/clock.c`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

use super::shim;

/// Offset of each number in the file that the shim maps.
const WALL: u64 = 0;
const BOOT: u64 = 8;
const HOLD: u64 = 16;

/// The clocks of one program.
#[derive(Debug)]
pub struct Clock {
    path: PathBuf,
    file: File,
    library: PathBuf,
}

impl Clock {
    /// Clocks that are right, kept in this folder.
    ///
    /// # Errors
    /// If the shim cannot be compiled, or the file not be made.
    pub fn new(folder: &Path) -> Result<Self> {
        let path = folder.join("clock");
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let file = file.with_context(|| format!("making {}", path.display()))?;
        file.write_all_at(&[0; 24], 0)?;
        Ok(Self {
            path,
            file,
            library: shim::build("clock")?,
        })
    }

    /// What a program needs in its environment to have these clocks.
    #[must_use]
    pub fn environment(&self) -> [(String, String); 2] {
        [
            ("LD_PRELOAD".to_owned(), self.library.display().to_string()),
            ("CLOISON_TEST_CLOCK".to_owned(), self.path.display().to_string()),
        ]
    }

    /// Puts the wall clock this many seconds ahead of the true time, or behind it.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn wall_off_by(&self, seconds: i64) -> Result<()> {
        self.set(WALL, seconds.saturating_mul(1_000_000_000))
    }

    /// Sets the wall clock to this Unix second.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn wall_at(&self, second: i64) -> Result<()> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
        self.wall_off_by(second.saturating_sub(i64::try_from(now)?))
    }

    /// Has the machine have been suspended for so long, all in all.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn suspended_for(&self, time: Duration) -> Result<()> {
        self.set(BOOT, i64::try_from(time.as_nanos())?)
    }

    /// Has the first packet worker stand still, or go on.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn hold_worker(&self, hold: bool) -> Result<()> {
        self.set(HOLD, i64::from(hold))
    }

    fn set(&self, at: u64, number: i64) -> Result<()> {
        self.file.write_all_at(&number.to_ne_bytes(), at).context("moving a clock")
    }
}
