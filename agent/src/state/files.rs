//! The state directory: small files of mode 0600 in a directory of mode 0700, each replaced as a whole.
//!
//! A file is one header line (`cloison-agent <format> <name> <SHA-256>`) and its body. The checksum covers format, name and body, so that
//! a truncated, swapped or flipped file is told from a good one; what a damaged file means is decided by who reads it. A write goes to a
//! temporary file, is synced, renamed over the old one, and the directory is synced: after a power cut either the old or the new is there.

use std::fmt;
use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

/// Version of the layout of all files.
const FORMAT: u32 = 1;

/// Longest header line: the words, the longest name, 64 digits.
const MAX_HEADER: usize = 160;

/// A file of the state directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum File {
    /// Seed of the identity key.
    IdentityKey,
    /// The WireGuard key.
    WgKey,
    /// The WireGuard key that is to take its place.
    NextWgKey,
    /// Since when the WireGuard key is in use.
    KeySince,
    /// Which mesh, which host, whom to trust.
    Membership,
    /// The host's certificate.
    Certificate,
    /// The newest view that was in force.
    View,
    /// What a later view must not fall behind.
    Floor,
    /// The view's lease and what was left of it.
    Lease,
    /// The counter of starts.
    Incarnation,
    /// Where peers were last heard.
    Endpoints,
    /// The hosts file with this host's block, and a write to it that is under way.
    Hosts,
    /// The peers that there were sessions with.
    Live,
}

impl File {
    /// Every file, in no order that matters.
    pub const ALL: [Self; 13] = [
        Self::IdentityKey,
        Self::WgKey,
        Self::NextWgKey,
        Self::KeySince,
        Self::Membership,
        Self::Certificate,
        Self::View,
        Self::Floor,
        Self::Lease,
        Self::Incarnation,
        Self::Endpoints,
        Self::Hosts,
        Self::Live,
    ];

    /// The file's name in the directory.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::IdentityKey => "identity-key",
            Self::WgKey => "wireguard-key",
            Self::NextWgKey => "wireguard-key-next",
            Self::KeySince => "wireguard-key-since",
            Self::Membership => "membership",
            Self::Certificate => "certificate",
            Self::View => "view",
            Self::Floor => "floor",
            Self::Lease => "lease",
            Self::Incarnation => "incarnation",
            Self::Endpoints => "endpoints",
            Self::Hosts => "hosts",
            Self::Live => "live-peers",
        }
    }

    /// Whether it holds a private key.
    #[must_use]
    pub const fn is_secret(self) -> bool {
        match self {
            Self::IdentityKey | Self::WgKey | Self::NextWgKey => true,
            Self::KeySince
            | Self::Membership
            | Self::Certificate
            | Self::View
            | Self::Floor
            | Self::Lease
            | Self::Incarnation
            | Self::Endpoints
            | Self::Hosts
            | Self::Live => false,
        }
    }

    /// Most bytes of its body: a view is at most 16 MiB of items, and a third more with what stands around them; 16,384 endpoints of
    /// less than 128 bytes, and as many ids of 40; a hosts file of 8 MiB before and after a write, in base64; the others are small.
    const fn limit(self) -> usize {
        match self {
            Self::View | Self::Hosts => 24 * 1024 * 1024,
            Self::Endpoints => 2 * 1024 * 1024,
            Self::Membership | Self::Live => 1024 * 1024,
            Self::IdentityKey
            | Self::WgKey
            | Self::NextWgKey
            | Self::KeySince
            | Self::Certificate
            | Self::Floor
            | Self::Lease
            | Self::Incarnation => 64 * 1024,
        }
    }

    /// What to do when it is damaged.
    #[must_use]
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::IdentityKey | Self::WgKey | Self::Membership => {
                "restore the file from a backup; or run `cloison-agent leave --force`, have the host revoked at the coordinator (`cloison host \
                 revoke NAME`), and join again with a new token"
            }
            Self::NextWgKey => "remove the file: the agent makes another key and offers that",
            Self::Certificate => "remove the file: the agent asks for a new certificate by its identity key",
            Self::View | Self::Lease => "nothing needs to be done while the coordinator can be reached: the agent fetches it again",
            Self::Floor => {
                "remove the file only if you trust the coordinator not to publish an older policy; the agent then takes what it is sent"
            }
            Self::Incarnation | Self::Endpoints | Self::Hosts | Self::Live | Self::KeySince => "remove the file: the agent makes a new one",
        }
    }
}

/// Why something of the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file is not as it was written.
    #[error("{} is damaged: {why}", path.display())]
    Damaged {
        /// Which file.
        file: File,
        /// Where.
        path: PathBuf,
        /// How that shows.
        why: String,
    },
    /// The file has a format that this version does not know.
    #[error("{} has format {found}, but this version of the agent knows format {FORMAT} only", path.display())]
    Format {
        /// Where.
        path: PathBuf,
        /// The format found.
        found: String,
    },
    /// The directory is another user's.
    #[error("{} belongs to user {owner}, but the agent runs as user {us}", path.display())]
    Owner {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Who we are.
        us: u32,
    },
    /// Another process holds the lock.
    #[error("another cloison-agent uses {}", path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
    },
}

impl StateError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                "run the agent as root, or choose another directory with --state-dir".into()
            }
            Self::Io { .. } => "check the disk and the directory; another one can be chosen with --state-dir".into(),
            Self::Damaged { file, .. } => file.remedy().into(),
            Self::Format { .. } => "install the version of the agent that wrote it, or a later one".into(),
            Self::Owner { owner, .. } => format!("change its owner, or run the agent as user {owner}"),
            Self::Locked { .. } => {
                "stop the other agent (`systemctl stop cloison-agent`), or give this one a state directory of its own with --state-dir"
                    .into()
            }
        }
    }
}

/// The state directory of one agent.
#[derive(Debug, Clone)]
pub struct StateDir {
    path: PathBuf,
}

/// Held as long as the agent runs: nobody else uses the directory.
#[derive(Debug)]
pub struct Lock {
    _file: fs::File,
}

impl StateDir {
    /// Opens the directory; makes it, with mode 0700, if it is not there.
    ///
    /// # Errors
    /// [`StateError::Io`]; [`StateError::Owner`] for a directory of somebody else.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, StateError> {
        let path = path.into();
        let io = |action| io_error(action, &path);
        DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(io("make"))?;
        let found = fs::metadata(&path).map_err(io("look at"))?;
        let us = rustix::process::geteuid().as_raw();
        if found.uid() != us {
            return Err(StateError::Owner {
                path: path.clone(),
                owner: found.uid(),
                us,
            });
        }
        if found.permissions().mode() & 0o077 != 0 {
            fs::set_permissions(&path, Permissions::from_mode(0o700)).map_err(io("close to others"))?;
        }
        Ok(Self { path })
    }

    /// The directory as it is, to look at: nothing is made or changed.
    #[must_use]
    pub const fn existing(path: PathBuf) -> Self {
        Self { path }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where one file is.
    #[must_use]
    pub fn path_of(&self, file: File) -> PathBuf {
        self.path.join(file.name())
    }

    /// Takes the directory for this process; the kernel gives it back when the process ends, however it ends.
    ///
    /// # Errors
    /// [`StateError::Locked`] if somebody else has it.
    pub fn lock(&self) -> Result<Lock, StateError> {
        let path = self.path.join("lock");
        let file = private().write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(io_error("open", &path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Lock { _file: file }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(StateError::Locked { path: self.path.clone() }),
            Err(e) => Err(io_error("lock", &path)(e.into())),
        }
    }

    /// The body of a file; `None` if there is no such file.
    ///
    /// # Errors
    /// [`StateError::Damaged`] unless the file is exactly as it was written.
    pub fn read(&self, file: File) -> Result<Option<Zeroizing<Vec<u8>>>, StateError> {
        let path = self.path_of(file);
        let opened = match private().read(true).open(&path) {
            Ok(opened) => opened,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io_error("open", &path)(e)),
        };
        let limit = MAX_HEADER + file.limit();
        let mut all = Zeroizing::new(Vec::new());
        let read = opened.take(limit as u64 + 1).read_to_end(&mut all);
        read.map_err(io_error("read", &path))?;
        if all.len() > limit {
            return Err(self.damaged(file, "it is longer than such a file can be"));
        }
        self.body(file, &all).map(|body| Some(Zeroizing::new(body.to_vec())))
    }

    /// The body in `all`, if the header is exactly the one that was written for it.
    fn body<'a>(&self, file: File, all: &'a [u8]) -> Result<&'a [u8], StateError> {
        let end = all.iter().take(MAX_HEADER).position(|b| *b == b'\n');
        let Some((head, body)) = end.and_then(|end| all.split_at_checked(end + 1)) else {
            return Err(self.damaged(file, "its first line is missing"));
        };
        if head == header(file, body).as_bytes() {
            return Ok(body);
        }
        let text = std::str::from_utf8(head).unwrap_or_default();
        match text.strip_prefix("cloison-agent ").and_then(|rest| rest.split(' ').next()) {
            Some(found) if found.parse::<u32>().is_ok_and(|n| n > FORMAT) => Err(StateError::Format {
                path: self.path_of(file),
                found: found.into(),
            }),
            _ => Err(self.damaged(file, "its checksum does not fit its content")),
        }
    }

    /// Replaces a file as a whole, durably.
    ///
    /// # Errors
    /// [`StateError::Io`]; the former content is then still there.
    pub fn write(&self, file: File, body: &[u8]) -> Result<(), StateError> {
        let path = self.path_of(file);
        let temporary = self.path.join(format!(".{}.new", file.name()));
        let io = |action| io_error(action, &path);
        // One writer holds the lock, so that what stands under this name is left over from a write that was cut off.
        match fs::remove_file(&temporary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io("replace")(e)),
            Ok(()) | Err(_) => {}
        }
        let mut new = private().write(true).create_new(true).open(&temporary).map_err(io("write"))?;
        new.write_all(header(file, body).as_bytes()).map_err(io("write"))?;
        new.write_all(body).map_err(io("write"))?;
        new.sync_all().map_err(io("write"))?;
        fs::rename(&temporary, &path).map_err(io("replace"))?;
        self.sync()
    }

    /// Takes a file away, durably; one that is not there is fine.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn remove(&self, file: File) -> Result<(), StateError> {
        let path = self.path_of(file);
        match fs::remove_file(&path) {
            Ok(()) => self.sync(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(io_error("remove", &path)(e)),
        }
    }

    fn sync(&self) -> Result<(), StateError> {
        let io = |action| io_error(action, &self.path);
        fs::File::open(&self.path).and_then(|dir| dir.sync_all()).map_err(io("sync"))
    }

    /// The error for a file whose checksum holds and whose content does not.
    pub(crate) fn damaged(&self, file: File, why: impl fmt::Display) -> StateError {
        StateError::Damaged {
            file,
            path: self.path_of(file),
            why: why.to_string(),
        }
    }
}

/// Never through a link, never readable by others, never handed on to a child process.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
    options
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io { action, path, source }
}

fn header(file: File, body: &[u8]) -> String {
    let start = format!("cloison-agent {FORMAT} {}", file.name());
    let digest = Sha256::new()
        .chain_update(&start)
        .chain_update([b'\n'])
        .chain_update(body)
        .finalize();
    let hex: String = digest.iter().map(|b| format!("{b:02x}")).collect();
    format!("{start} {hex}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    #[test]
    fn a_file_reads_back_and_only_its_owner_can_read_it() -> Outcome {
        let folder = tempfile::tempdir()?;
        let dir = StateDir::open(folder.path().join("state"))?;
        assert!(dir.read(File::Lease)?.is_none());
        dir.write(File::Lease, b"one")?;
        dir.write(File::Lease, b"two")?;
        assert_eq!(dir.read(File::Lease)?.as_deref().map(Vec::as_slice), Some(&b"two"[..]));
        let mode = |path: &Path| fs::metadata(path).map(|m| m.permissions().mode() & 0o777);
        assert_eq!((mode(dir.path())?, mode(&dir.path_of(File::Lease))?), (0o700, 0o600));
        dir.remove(File::Lease)?;
        assert!(dir.read(File::Lease)?.is_none());
        Ok(())
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_is_an_error_for_every_file() -> Outcome {
        let folder = tempfile::tempdir()?;
        let dir = StateDir::open(folder.path())?;
        for file in File::ALL {
            dir.write(file, b"the body\nof a file")?;
            let good = fs::read(dir.path_of(file))?;
            let refused = |bytes: &[u8]| {
                fs::write(dir.path_of(file), bytes)?;
                let error = dir.read(file).err().ok_or("read in spite of the damage")?;
                let clear = matches!(error, StateError::Damaged { .. } | StateError::Format { .. }) && !error.hint().is_empty();
                Ok::<_, Box<dyn std::error::Error>>(clear)
            };
            for length in 0..good.len() {
                assert!(refused(good.get(..length).unwrap_or_default())?, "{file:?} cut at {length}");
            }
            for bit in 0..good.len() * 8 {
                let mut flipped = good.clone();
                if let Some(byte) = flipped.get_mut(bit / 8) {
                    *byte ^= 1 << (bit % 8);
                }
                assert!(refused(&flipped)?, "{file:?} bit {bit}");
            }
        }
        Ok(())
    }

    #[test]
    fn one_file_does_not_pass_for_another() -> Outcome {
        let folder = tempfile::tempdir()?;
        let dir = StateDir::open(folder.path())?;
        dir.write(File::IdentityKey, &[7; 32])?;
        fs::copy(dir.path_of(File::IdentityKey), dir.path_of(File::WgKey))?;
        assert!(matches!(dir.read(File::WgKey), Err(StateError::Damaged { .. })));
        Ok(())
    }

    #[test]
    fn a_second_agent_on_the_same_directory_is_refused() -> Outcome {
        let folder = tempfile::tempdir()?;
        let dir = StateDir::open(folder.path())?;
        let lock = dir.lock()?;
        assert!(matches!(dir.lock(), Err(StateError::Locked { .. })));
        drop(lock);
        dir.lock()?;
        Ok(())
    }

    #[test]
    fn a_link_in_place_of_a_file_is_not_followed() -> Outcome {
        let folder = tempfile::tempdir()?;
        let dir = StateDir::open(folder.path().join("state"))?;
        let target = folder.path().join("target");
        fs::write(&target, "untouched")?;
        std::os::unix::fs::symlink(&target, dir.path().join(".lease.new"))?;
        dir.write(File::Lease, b"x")?;
        assert_eq!(fs::read_to_string(&target)?, "untouched");
        std::os::unix::fs::symlink(&target, dir.path_of(File::View))?;
        assert!(matches!(dir.read(File::View), Err(StateError::Io { .. })));
        Ok(())
    }
}
