//! Network namespaces: opened by path without following links, or by a process that is held; entered by a thread of its own.
//!
//! A thread's namespace is never changed and changed back: [`NetNs::run`] starts a thread, moves it, lets it work and end. What is opened
//! there (TUNs, netlink and UDP sockets) keeps its namespace wherever it is used later.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use super::process::Process;

/// The file system that namespaces live on (`NSFS_MAGIC` in linux/magic.h).
const NSFS_MAGIC: u64 = 0x6e73_6673;

/// Longest content of a pid file, in bytes.
const LONGEST_PID: i64 = 16;

/// What the times of processes are counted in, twice.
const PID_FILE_GRAIN: Duration = Duration::from_millis(20);

/// Why a namespace cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NetNsError {
    /// The path is not below any of the directories that the agent accepts.
    #[error(
        "the namespace {0} is not below a directory that this agent accepts; add its directory to `netns_dirs` in the agent's configuration"
    )]
    NotAllowed(PathBuf),
    /// Nothing is there.
    #[error("the namespace {0} does not exist; start what makes it (`ip netns add`, or its unit)")]
    Missing(PathBuf),
    /// A link stands in the path.
    #[error("the namespace {0} is reached through a link, which is not followed; name the real path")]
    Link(PathBuf),
    /// What is there is no network namespace.
    #[error("{0} is neither a network namespace nor a file with the number of a process")]
    NotNamespace(PathBuf),
    /// A file with the number of a process that cannot be relied on.
    #[error("the pid file {0} {1}")]
    PidFile(PathBuf, &'static str),
    /// The process has ended.
    #[error("the process {0} has ended")]
    Ended(i32),
    /// The kernel does not let us look at the process.
    #[error("cannot look at the network namespace of the process {0}; the agent needs CAP_SYS_PTRACE for that")]
    Hidden(i32, #[source] io::Error),
    /// The kernel refused.
    #[error("cannot {what} the network namespace; the agent needs CAP_SYS_ADMIN for that")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

fn kernel(what: &'static str) -> impl Fn(Errno) -> NetNsError {
    move |e| NetNsError::Kernel { what, source: e.into() }
}

/// What is at `path`, which must lie below one of the `allowed` directories: no links on the way, no `..`. It is found, and not opened.
fn place(path: &Path, allowed: &[PathBuf]) -> Result<OwnedFd, NetNsError> {
    let below = allowed.iter().find_map(|dir| path.strip_prefix(dir).ok().map(|rest| (dir, rest)));
    let Some((dir, rest)) = below.filter(|(_, rest)| !rest.as_os_str().is_empty()) else {
        return Err(NetNsError::NotAllowed(path.into()));
    };
    let why = |e: Errno| match e {
        Errno::NOENT | Errno::NOTDIR => NetNsError::Missing(path.into()),
        Errno::LOOP => NetNsError::Link(path.into()),
        Errno::XDEV => NetNsError::NotAllowed(path.into()),
        other => kernel("open")(other),
    };
    let dir = rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(why)?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(&dir, rest, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve).map_err(why)
}

/// Opens for reading what was found.
fn reopen(place: &OwnedFd) -> Result<OwnedFd, Errno> {
    let found = format!("/proc/self/fd/{}", place.as_raw_fd());
    rustix::fs::openat(CWD, found, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

/// What tells two namespaces apart, as long as both are held open: the kernel uses numbers of closed ones again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetNsId {
    filesystem: u64,
    inode: u64,
}

/// A network namespace, held open: it lives at least as long as this value.
#[derive(Debug)]
pub struct NetNs {
    fd: OwnedFd,
    id: NetNsId,
}

impl NetNs {
    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// [`NetNsError::Kernel`]: /proc is not mounted.
    pub fn current() -> Result<Self, NetNsError> {
        let fd = rustix::fs::open("/proc/thread-self/ns/net", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(kernel("open"))?;
        Self::held(fd).map_err(kernel("read"))
    }

    /// Opens the namespace at `path`, which must lie below one of the `allowed` directories: no links on the way, no `..`, and what is there
    /// must be a network namespace. Nothing else at that path is even opened for reading.
    ///
    /// # Errors
    /// [`NetNsError`].
    pub fn open(path: &Path, allowed: &[PathBuf]) -> Result<Self, NetNsError> {
        let place = place(path, allowed)?;
        let kind = rustix::fs::fstatfs(&place).map_err(kernel("read"))?.f_type;
        if u64::try_from(kind) != Ok(NSFS_MAGIC) {
            return Err(NetNsError::NotNamespace(path.into()));
        }
        let opened = Self::held(reopen(&place).map_err(kernel("open"))?).map_err(kernel("read"))?;
        match opened.run(|| ()) {
            Err(NetNsError::Kernel { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
                Err(NetNsError::NotNamespace(path.into()))
            }
            entered => entered.map(|()| opened),
        }
    }

    /// The namespace of the process whose number stands in the file at `path`, which must lie below one of the `allowed` directories and be root's
    /// alone. A process that began behind the file's last change is another one, which was given the number of the former.
    ///
    /// # Errors
    /// [`NetNsError`]; `NotNamespace` if it is no such file.
    pub fn of_pid_file(path: &Path, allowed: &[PathBuf]) -> Result<Self, NetNsError> {
        let place = place(path, allowed)?;
        let refused = |why| NetNsError::PidFile(path.into(), why);
        let file = rustix::fs::fstat(&place).map_err(kernel("read"))?;
        if FileType::from_raw_mode(file.st_mode) != FileType::RegularFile || file.st_size > LONGEST_PID {
            return Err(NetNsError::NotNamespace(path.into()));
        }
        if file.st_uid != 0 || file.st_mode & 0o022 != 0 {
            return Err(refused("may be written by others than root; `chown root` and `chmod 644` it"));
        }
        let (mut text, changed) = (
            String::new(),
            SystemTime::UNIX_EPOCH.checked_add(Duration::new(
                u64::try_from(file.st_mtime).unwrap_or(0),
                u32::try_from(file.st_mtime_nsec).unwrap_or(0),
            )),
        );
        let mut file = File::from(reopen(&place).map_err(kernel("open"))?);
        let _length = file.read_to_string(&mut text).map_err(|_| NetNsError::NotNamespace(path.into()))?;
        let number = text.trim().parse::<i32>().ok().filter(|number| *number > 1).and_then(Pid::from_raw);
        let number = number.ok_or_else(|| NetNsError::NotNamespace(path.into()))?;
        let ended = |_| refused("names a process that has ended; start what writes it");
        let process = Process::open(number).map_err(ended)?;
        let started = process.started().map_err(ended)?;
        if changed.is_none_or(|changed| started > changed + PID_FILE_GRAIN) {
            return Err(refused(
                "is older than the process of that number, which is another one; start what writes it anew",
            ));
        }
        Self::of_process(&process)
    }

    /// The namespace in which a process is now.
    ///
    /// # Errors
    /// [`NetNsError::Ended`], [`NetNsError::Hidden`].
    pub fn of_process(process: &Process) -> Result<Self, NetNsError> {
        let pid = process.pid().as_raw_nonzero().get();
        let opened = rustix::fs::open(format!("/proc/{pid}/ns/net"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        // What was opened is its own only if it lives behind the opening, too: else the number may be another's.
        if process.has_ended() {
            return Err(NetNsError::Ended(pid));
        }
        // Where /proc hides what may not be looked at, a process that lives is not there.
        let fd = opened.map_err(|e| match e {
            Errno::ACCESS | Errno::PERM | Errno::NOENT => NetNsError::Hidden(pid, e.into()),
            other => kernel("open")(other),
        })?;
        Self::held(fd).map_err(kernel("read"))
    }

    /// A new namespace without a name: it ends when this value and all that was opened in it are gone.
    ///
    /// # Errors
    /// [`NetNsError::Kernel`]: not permitted.
    pub fn fresh() -> Result<Self, NetNsError> {
        on_a_thread(|| {
            #[expect(
                unsafe_code,
                reason = "rustix offers unshare only as unsafe, because some of its flags break the standard library"
            )]
            // SAFETY: NEWNET changes nothing but the network namespace of this thread, which exists for this call alone; no file
            // descriptor table is unshared.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.map_err(kernel("make"))?;
            Self::current()
        })
    }

    /// What tells it apart from others.
    #[must_use]
    pub const fn id(&self) -> NetNsId {
        self.id
    }

    /// Runs `work` on a thread of its own inside the namespace, and waits for it. Where the calling thread is there already, nothing is
    /// entered, and no privilege is needed: the kernel asks for CAP_SYS_ADMIN even for the way home.
    ///
    /// # Errors
    /// [`NetNsError::Kernel`] if the namespace cannot be entered; `work` did not run then.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetNsError> {
        let here = Self::current()?.id == self.id;
        on_a_thread(|| {
            if !here {
                rustix::thread::move_into_link_name_space(self.fd.as_fd(), Some(LinkNameSpaceType::Network)).map_err(kernel("enter"))?;
            }
            Ok(work())
        })
    }

    pub(super) fn held(fd: OwnedFd) -> rustix::io::Result<Self> {
        let stat = rustix::fs::fstat(&fd)?;
        Ok(Self {
            fd,
            id: NetNsId {
                filesystem: stat.st_dev,
                inode: stat.st_ino,
            },
        })
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
