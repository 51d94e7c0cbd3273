//! What is left of a folder after a power cut: the other half of `tests/shim/disk.c`.
//!
//! A program that runs on the shim writes into its folder as ever. Beside it, the shadow holds what was synced. [`Disk::cut`] makes the folder
//! what it would be after the cut: everything that was synced, and of the rest either nothing, or a random choice of pages and names, some of
//! the pages torn in the middle.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use super::shim;
use crate::sim::random::Random;

/// The unit in which a disk writes, and in which the database does.
const SECTOR: usize = 512;
const PAGE: usize = 4096;

/// What becomes of what was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsynced {
    /// All of it is lost.
    Lost,
    /// Some of it is there: any pages, any names, some pages in part.
    Torn,
}

/// A folder on the disk that forgets.
#[derive(Debug)]
pub struct Disk {
    library: PathBuf,
    root: PathBuf,
    shadow: PathBuf,
}

/// The names in a directory: what each stands for.
type Names = BTreeMap<String, (String, bool)>;

impl Disk {
    /// Watches `root` from now on; what is there is on the disk. `shadow` must not exist.
    ///
    /// # Errors
    /// If the shim cannot be built, or the folder not be copied.
    pub fn watch(root: &Path, shadow: &Path) -> Result<Self> {
        let disk = Self {
            library: shim::build("disk")?,
            root: fs::canonicalize(root)?,
            shadow: shadow.to_owned(),
        };
        disk.begin()?;
        Ok(disk)
    }

    /// Puts a program on this disk.
    pub fn below(&self, command: &mut Command) {
        command.env("LD_PRELOAD", &self.library);
        command
            .env("CLOISON_DISK_ROOT", &self.root)
            .env("CLOISON_DISK_SHADOW", &self.shadow);
    }

    /// The power went: the folder holds what was on the disk, and some of the rest if `unsynced` says so. No program may be running.
    ///
    /// # Errors
    /// If the folder cannot be made.
    pub fn cut(&self, unsynced: Unsynced, random: &mut Random) -> Result<()> {
        let after = self.root.with_extension("after");
        let _ = fs::remove_dir_all(&after);
        self.survive(&self.root, &key(&self.root)?, &after, unsynced, random)?;
        fs::remove_dir_all(&self.root)?;
        fs::rename(&after, &self.root)?;
        fs::remove_dir_all(&self.shadow)?;
        self.begin()
    }

    fn begin(&self) -> Result<()> {
        fs::create_dir_all(self.shadow.join("content"))?;
        fs::create_dir_all(self.shadow.join("names"))?;
        self.copy_in(&self.root)
    }

    fn copy_in(&self, folder: &Path) -> Result<()> {
        let mut lines = Vec::new();
        for (name, (own, is_folder)) in live_names(folder)? {
            let path = folder.join(&name);
            if is_folder {
                self.copy_in(&path)?;
            } else {
                fs::copy(&path, self.shadow.join("content").join(&own))?;
            }
            writeln!(lines, "{own} {} {name}", if is_folder { 'd' } else { 'f' })?;
        }
        fs::write(self.shadow.join("names").join(key(folder)?), lines)?;
        Ok(())
    }

    /// Makes `to` what is left of the directory `live`, which is the one of `own`.
    fn survive(&self, live: &Path, own: &str, to: &Path, unsynced: Unsynced, random: &mut Random) -> Result<()> {
        use std::os::unix::fs::DirBuilderExt as _;
        fs::DirBuilder::new().mode(0o700).create(to)?;
        let mut names = self.synced_names(own)?;
        if unsynced == Unsynced::Torn {
            let now = live_names(live).unwrap_or_default();
            names.retain(|name, what| now.get(name) == Some(what) || random.happens(50));
            for (name, what) in now {
                if !names.contains_key(&name) && random.happens(50) {
                    names.insert(name, what);
                }
            }
        }
        for (name, (key, is_folder)) in names {
            let (from, to) = (live.join(&name), to.join(&name));
            if is_folder {
                self.survive(&from, &key, &to, unsynced, random)?;
            } else if !name.ends_with("-shm") {
                let synced = fs::read(self.shadow.join("content").join(&key)).unwrap_or_default();
                let written = fs::read(&from).ok().filter(|_| self::key(&from).is_ok_and(|now| now == key));
                let content = match written.filter(|_| unsynced == Unsynced::Torn) {
                    Some(written) => torn(&synced, &written, random),
                    None => synced,
                };
                write_private(&to, &content)?;
            }
        }
        Ok(())
    }

    fn synced_names(&self, own: &str) -> Result<Names> {
        // A directory that was never synced has no names.
        let text = fs::read_to_string(self.shadow.join("names").join(own)).unwrap_or_default();
        let line = |line: &str| {
            let (key, rest) = line.split_once(' ').context("no key")?;
            let (kind, name) = rest.split_once(' ').context("no kind")?;
            Ok((name.to_owned(), (key.to_owned(), kind == "d")))
        };
        text.lines().map(line).collect()
    }
}

/// Of two states of a file, one that the disk may have: each page of the old or the new one, or its first sectors new and the others old.
fn torn(old: &[u8], new: &[u8], random: &mut Random) -> Vec<u8> {
    let mut content = old.to_vec();
    for (number, page) in new.chunks(PAGE).enumerate() {
        let at = number * PAGE;
        if old.get(at..at + page.len()) == Some(page) {
            continue;
        }
        let written = match random.below(10) {
            0..=4 => 0,
            5..=7 => page.len(),
            _ => usize::try_from(random.below(8)).unwrap_or(0) * SECTOR,
        };
        let written = written.min(page.len());
        if written == 0 {
            continue;
        }
        if content.len() < at + written {
            content.resize(at + written, 0);
        }
        if let (Some(to), Some(from)) = (content.get_mut(at..at + written), page.get(..written)) {
            to.copy_from_slice(from);
        }
    }
    content
}

fn live_names(folder: &Path) -> Result<Names> {
    let mut names = Names::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().into_string().ok().context("a name that is no text")?;
        names.insert(name, (key(&entry.path())?, entry.file_type()?.is_dir()));
    }
    Ok(names)
}

/// As the shim names a file.
fn key(path: &Path) -> Result<String> {
    let found = statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS | StatxFlags::BTIME)?;
    ensure!(
        found.stx_mask & StatxFlags::BTIME.bits() != 0,
        "{} is on a file system without birth times",
        path.display()
    );
    let born = found.stx_btime;
    Ok(format!("{}-{}-{}", found.stx_ino, born.tv_sec, born.tv_nsec))
}

fn write_private(path: &Path, content: &[u8]) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    Ok(file.write_all(content)?)
}
