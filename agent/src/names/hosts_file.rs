//! A hosts file, changed in place: it may be a bind mount, and others keep it open, so that it keeps its inode, owner and mode.
//!
//! [`update`] goes: open -> lock -> lease -> read -> complete a write that was cut off -> put the block in -> remember both contents -> write
//! -> length -> sync -> compare -> forget. Other agents wait for the lock; everybody else (an editor, `echo >>`) waits for the lease, where
//! the file system has leases. What else happens to the file meanwhile (another file in its place, a line that was added) is noticed, and all
//! of it is done again.
//!
//! What is no plain file of root or of this user, or too long, is refused and left alone.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read as _, Seek as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};

use super::block::{Owner, with_block};
use super::memory::{Left, Memory, Pending, Step, judge};
use crate::state::{self, StateDir, StateError};
use crate::sys::lease::Lease;

/// Longest hosts file that is read or written, in bytes.
pub const MAX_FILE: usize = 8 * 1024 * 1024;

/// How long to wait for the lock or the lease of another agent.
const LOCK_WAIT: Duration = Duration::from_secs(2);

/// How long to wait for the lease: readers close the file at once.
const LEASE_WAIT: Duration = Duration::from_millis(300);

/// How often the file is looked at again while waiting.
const LOOK: Duration = Duration::from_millis(5);

/// How often it all is done again because others changed the file meanwhile.
const ATTEMPTS: u32 = 5;

/// Why the block is not in the hosts file.
#[derive(Debug, thiserror::Error)]
pub enum HostsError {
    /// There is no such file.
    #[error("there is no {}", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// It is a symbolic link.
    #[error("{} is a symbolic link, which is not followed", path.display())]
    Link {
        /// The file.
        path: PathBuf,
    },
    /// It is a directory, a device, or the like.
    #[error("{} is not a plain file", path.display())]
    NotPlain {
        /// The file.
        path: PathBuf,
    },
    /// It belongs to somebody who could change what the agent writes.
    #[error("{} belongs to user {owner}, and neither to root nor to the agent's own user", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// It is or would become longer than [`MAX_FILE`].
    #[error("{} has or would get {length} bytes, and the limit is {MAX_FILE}", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length.
        length: usize,
    },
    /// Another program holds its lock.
    #[error("another program holds the lock of {}", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// Others change it all the time.
    #[error("{} was changed by others each time it was written", path.display())]
    Changing {
        /// The file.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// What is done could not be remembered; without that, nothing is written.
    #[error(transparent)]
    State(#[from] StateError),
}

impl HostsError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::Missing { path } => format!(
                "make it (`touch {}`), or name another file with `hosts_file`, or set that to \"off\"",
                path.display()
            ),
            Self::Link { .. } => "name the real file with `hosts_file`, or set that to \"off\"".into(),
            Self::NotPlain { .. } => "name a plain file with `hosts_file`, or set that to \"off\"".into(),
            Self::Foreign { path, .. } => format!("`chown root {}`, or name another file with `hosts_file`", path.display()),
            Self::TooLong { .. } => "take out of it what is not needed, or set `hosts_file` to \"off\" and serve the names by DNS".into(),
            Self::Locked { .. } => "find out who holds it with `fuser`; the agent tries again every few seconds".into(),
            Self::Changing { .. } => "find out which program writes it; the agent tries again every few seconds".into(),
            Self::Io { source, .. } if source.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                "let the agent write it (`ReadWritePaths=` in its unit; after an editor has replaced the file: `systemctl restart \
                 cloison-agent`), or set `hosts_file` to \"off\""
                    .into()
            }
            Self::Io { .. } => {
                "look at the file's mode and attributes (`ls -l`, `lsattr`) and at the disk, or set `hosts_file` to \"off\"".into()
            }
            Self::State(error) => error.hint(),
        }
    }
}

/// What a file looks like from outside; as long as that stays, it need not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seal {
    place: (u64, u64),
    length: u64,
    changed: [i64; 4],
}

impl Seal {
    /// What is at `path` now; `None` if nothing is.
    #[must_use]
    pub fn of(path: &Path) -> Option<Self> {
        std::fs::symlink_metadata(path).ok().map(|found| Self::new(&found))
    }

    fn new(found: &Metadata) -> Self {
        Self {
            place: (found.dev(), found.ino()),
            length: found.len(),
            changed: [found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec()],
        }
    }
}

/// Makes `lines` the block of `owner` in the file at `path`; no lines take the block away. What is under way is remembered in `dir`.
///
/// # Errors
/// [`HostsError`]. The file is then as it was, or the next call completes it.
pub fn update(dir: &StateDir, path: &Path, owner: &Owner, lines: &str) -> Result<Seal, HostsError> {
    for _ in 0..ATTEMPTS {
        if let Some(seal) = attempt(dir, path, owner, lines)? {
            return Ok(seal);
        }
    }
    Err(HostsError::Changing { path: path.into() })
}

/// The content of a hosts file, if it is one that would be written.
///
/// # Errors
/// [`HostsError`].
pub fn read(path: &Path) -> Result<Vec<u8>, HostsError> {
    read_all(&open(path, false)?, path)
}

/// The same as [`read`], of a file that could be written as well.
///
/// # Errors
/// [`HostsError`].
pub fn look(path: &Path) -> Result<Vec<u8>, HostsError> {
    read_all(&open(path, true)?, path)
}

/// One attempt; `None` if somebody else changed the file meanwhile.
fn attempt(dir: &StateDir, path: &Path, owner: &Owner, lines: &str) -> Result<Option<Seal>, HostsError> {
    let file = open(path, true)?;
    lock(&file, path)?;
    if !is_at(&file, path) {
        return Ok(None);
    }
    let lease = lease(&file);
    let content = read_all(&file, path)?;
    let known = Memory::load(dir)?.filter(|memory| memory.path == path);
    let new = with_block(
        &without_former(known.as_ref(), owner, completed(known.as_ref(), &content, path)),
        owner,
        lines,
    );
    let is_same = new == content;
    let mut settled = Memory {
        path: path.into(),
        owner: *owner,
        pending: None,
    };
    if !is_same {
        if new.len() > MAX_FILE {
            let length = new.len();
            return Err(HostsError::TooLong { path: path.into(), length });
        }
        reserve(&file, new.len()).map_err(failed("write", path))?;
        // Without a lease, somebody may have added a line since it was read.
        if lease.is_none() && read_all(&file, path)? != content {
            return Ok(None);
        }
        let pending = Pending::new(content, new.clone());
        settled.pending = Some(pending.clone());
        settled.store(dir)?;
        write(&file, &pending).map_err(failed("write", path))?;
        settled.pending = None;
    }
    let written = read_all(&file, path)?;
    let seal = Seal::new(&file.metadata().map_err(failed("look at", path))?);
    drop(lease);
    let is_there = written == new && is_at(&file, path);
    if lines.is_empty() && is_there {
        dir.remove(state::File::Hosts)?;
    } else if !is_same || known.as_ref() != Some(&settled) {
        settled.store(dir)?;
    }
    Ok(is_there.then_some(seal))
}

/// A host that enrolled again has another id: the block of the former goes.
fn without_former(known: Option<&Memory>, owner: &Owner, content: Vec<u8>) -> Vec<u8> {
    match known.map(|memory| memory.owner).filter(|former| former.host != owner.host) {
        Some(former) => with_block(&content, &former, ""),
        None => content,
    }
}

/// The file as it was meant to be, if a write to it was cut off, and as it is otherwise.
fn completed(known: Option<&Memory>, content: &[u8], path: &Path) -> Vec<u8> {
    let pending = known.and_then(|memory| memory.pending.as_ref());
    match pending.map(|pending| (pending, judge(pending, content))) {
        None | Some((_, Left::Whole)) => content.to_vec(),
        Some((pending, Left::Mixed)) => {
            tracing::warn!(path = %path.display(), "a write of the hosts file was cut off; completing it");
            pending.new_content().to_vec()
        }
        Some((pending, Left::Changed)) => {
            let missing = pending.missing_in(content);
            tracing::warn!(path = %path.display(), ?missing, "a write of the hosts file was cut off, and somebody else wrote it since: see whether these lines are wanted");
            content.to_vec()
        }
    }
}

/// Opens what is at `path`, if it is a plain file of root or of this user. Nothing is followed, and nothing that would wait is waited for.
fn open(path: &Path, writing: bool) -> Result<File, HostsError> {
    let flags = libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY;
    let found = std::fs::symlink_metadata(path).map_err(|source| {
        if source.kind() == io::ErrorKind::NotFound {
            HostsError::Missing { path: path.into() }
        } else {
            failed("look at", path)(source)
        }
    })?;
    if found.is_symlink() {
        return Err(HostsError::Link { path: path.into() });
    }
    if !found.is_file() {
        return Err(HostsError::NotPlain { path: path.into() });
    }
    let file = patiently(|| OpenOptions::new().read(true).write(writing).custom_flags(flags).open(path)).map_err(failed("open", path))?;
    let found = file.metadata().map_err(failed("look at", path))?;
    if !found.is_file() {
        return Err(HostsError::NotPlain { path: path.into() });
    }
    if ![0, rustix::process::geteuid().as_raw()].contains(&found.uid()) {
        return Err(HostsError::Foreign {
            path: path.into(),
            owner: found.uid(),
        });
    }
    Ok(file)
}

fn lock(file: &File, path: &Path) -> Result<(), HostsError> {
    let locked = patiently(|| Ok(flock(file, FlockOperation::NonBlockingLockExclusive)?));
    locked.map_err(|error| match error.kind() == io::ErrorKind::WouldBlock {
        true => HostsError::Locked { path: path.into() },
        false => failed("lock", path)(error),
    })
}

/// Tries again for a while what another agent's lock or lease is in the way of.
fn patiently<T>(mut work: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let began = Instant::now();
    loop {
        match work() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && began.elapsed() < LOCK_WAIT => std::thread::sleep(LOOK),
            done => return done,
        }
    }
}

/// The lease, if it is to be had: somebody may keep the file open for good, and not all file systems have leases.
fn lease(file: &File) -> Option<Lease<'_>> {
    let began = Instant::now();
    loop {
        match Lease::take(file) {
            Ok(lease) => return Some(lease),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && began.elapsed() < LEASE_WAIT => std::thread::sleep(LOOK),
            Err(error) => {
                tracing::debug!(%error, "the hosts file is written without a lease");
                return None;
            }
        }
    }
}

/// Whether `file` is still what is at `path`.
fn is_at(file: &File, path: &Path) -> bool {
    let place = |found: Metadata| (found.dev(), found.ino());
    let here = file.metadata().map(place);
    let there = std::fs::symlink_metadata(path).map(place);
    matches!((here, there), (Ok(here), Ok(there)) if here == there)
}

fn read_all(mut file: &File, path: &Path) -> Result<Vec<u8>, HostsError> {
    let mut content = Vec::new();
    file.rewind().map_err(failed("read", path))?;
    let limit = u64::try_from(MAX_FILE).unwrap_or(u64::MAX).saturating_add(1);
    file.take(limit).read_to_end(&mut content).map_err(failed("read", path))?;
    if content.len() > MAX_FILE {
        let length = file
            .metadata()
            .map_or(content.len(), |found| usize::try_from(found.len()).unwrap_or(usize::MAX));
        return Err(HostsError::TooLong { path: path.into(), length });
    }
    Ok(content)
}

/// Makes sure that the disk has room before the first byte is written.
fn reserve(file: &File, length: usize) -> io::Result<()> {
    let length = u64::try_from(length).map_err(io::Error::other)?;
    match fallocate(file, FallocateFlags::KEEP_SIZE, 0, length) {
        // A file system that cannot promise it.
        Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS | rustix::io::Errno::INVAL) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Carries the write out. One that fails is taken back, as far as the disk allows.
fn write(file: &File, pending: &Pending) -> io::Result<()> {
    let carried_out = pending
        .steps()
        .into_iter()
        .try_for_each(|step| carry_out(file, step))
        .and_then(|()| file.sync_all());
    if carried_out.is_err() {
        let undone = carry_out(file, Step::Write(0, pending.old())).and_then(|()| carry_out(file, Step::Length(pending.old().len())));
        if let Err(error) = undone {
            tracing::error!(%error, "the hosts file is written in part; it is completed as soon as that is possible");
        }
    }
    carried_out
}

fn carry_out(file: &File, step: Step<'_>) -> io::Result<()> {
    match step {
        Step::Write(at, bytes) => file.write_all_at(bytes, u64::try_from(at).map_err(io::Error::other)?),
        Step::Length(length) => file.set_len(u64::try_from(length).map_err(io::Error::other)?),
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> HostsError {
    let path = path.to_owned();
    move |source| HostsError::Io { action, path, source }
}

#[cfg(test)]
#[path = "hosts_file_tests.rs"]
mod tests;
