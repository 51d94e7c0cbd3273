//! A service manager for one program, as systemd is one: it hears what the program notifies, keeps the descriptors that it is given, and
//! passes them on at the next start. It speaks the same protocol (sd_notify(3), sd_listen_fds(3)) and nothing else of systemd.

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Most descriptors in one message, the kernel's own limit being 253.
const MAX_FDS: usize = 16;
/// How often the threads look whether they are to end.
const LOOK: Duration = Duration::from_millis(50);

/// The manager. Its threads end with it, and what it keeps is closed.
#[derive(Debug)]
pub struct Manager {
    folder: PathBuf,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    said: Mutex<Vec<(Instant, String)>>,
    kept: Mutex<BTreeMap<String, Vec<OwnedFd>>>,
    ending: AtomicBool,
}

impl Manager {
    /// A manager whose sockets are in this folder.
    ///
    /// # Errors
    /// If they cannot be made.
    pub fn new(folder: &Path) -> Result<Self> {
        let manager = Self {
            folder: folder.to_owned(),
            shared: Arc::default(),
        };
        let (notify, pass) = (manager.notify_socket(), manager.pass_socket());
        for path in [&notify, &pass] {
            let _ = std::fs::remove_file(path);
        }
        let heard = UnixDatagram::bind(&notify).with_context(|| format!("binding {}", notify.display()))?;
        heard.set_read_timeout(Some(LOOK))?;
        let asked = UnixListener::bind(&pass).with_context(|| format!("binding {}", pass.display()))?;
        asked.set_nonblocking(true)?;
        let (hearing, passing) = (Arc::clone(&manager.shared), Arc::clone(&manager.shared));
        std::thread::spawn(move || hearing.hear(&heard));
        std::thread::spawn(move || passing.pass(&asked));
        Ok(manager)
    }

    /// Where the program notifies.
    #[must_use]
    pub fn notify_socket(&self) -> PathBuf {
        self.folder.join("notify.sock")
    }

    /// Where `lab-tool with-kept` fetches what is kept.
    #[must_use]
    pub fn pass_socket(&self) -> PathBuf {
        self.folder.join("pass.sock")
    }

    /// Everything that the program said, line by line, with the time.
    #[must_use]
    pub fn said(&self) -> Vec<(Instant, String)> {
        locked(&self.shared.said).clone()
    }

    /// How often it said this line since a moment.
    #[must_use]
    pub fn count(&self, line: &str, since: Instant) -> usize {
        self.said().iter().filter(|(at, said)| *at >= since && said == line).count()
    }

    /// The names of what is kept.
    #[must_use]
    pub fn kept(&self) -> Vec<String> {
        let kept = locked(&self.shared.kept);
        kept.iter().flat_map(|(name, fds)| fds.iter().map(move |_| name.clone())).collect()
    }

    /// Adds a descriptor of the test's own to what is kept.
    pub fn keep(&self, name: &str, fd: OwnedFd) {
        locked(&self.shared.kept).entry(name.to_owned()).or_default().push(fd);
    }

    /// Closes all that is kept, as a stop of the unit does.
    pub fn drop_kept(&self) {
        locked(&self.shared.kept).clear();
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Release);
    }
}

impl Shared {
    fn hear(&self, socket: &UnixDatagram) {
        while !self.ending.load(Ordering::Acquire) {
            let Some((text, fds)) = receive(socket) else { continue };
            let value = |key: &str| text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('=')).map(str::to_owned);
            let name = value("FDNAME").unwrap_or_else(|| "stored".to_owned());
            if value("FDSTOREREMOVE").is_some() {
                locked(&self.kept).remove(&name);
            } else if value("FDSTORE").is_some() {
                locked(&self.kept).entry(name).or_default().extend(fds);
            }
            locked(&self.said).extend(text.lines().map(|line| (Instant::now(), line.to_owned())));
        }
    }

    fn pass(&self, listener: &UnixListener) {
        while !self.ending.load(Ordering::Acquire) {
            let Ok((stream, _)) = listener.accept() else {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            };
            let kept = locked(&self.kept);
            let pairs: Vec<(&str, &OwnedFd)> = kept.iter().flat_map(|(n, fds)| fds.iter().map(|fd| (n.as_str(), fd))).collect();
            let names = pairs.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(":") + "\n";
            let fds: Vec<_> = pairs.iter().map(|(_, fd)| fd.as_fd()).collect();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                ancillary.push(SendAncillaryMessage::ScmRights(&fds));
            }
            if let Err(error) = sendmsg(&stream, &[IoSlice::new(names.as_bytes())], &mut ancillary, SendFlags::empty()) {
                eprintln!("cannot pass on what is kept: {error}");
            }
        }
    }
}

/// Fetches what a manager keeps, at its socket: names and descriptors in the same order.
///
/// # Errors
/// If the manager does not answer.
pub fn fetch(socket: &Path) -> Result<(String, Vec<OwnedFd>)> {
    let stream = std::os::unix::net::UnixStream::connect(socket)?;
    receive(&stream)
        .map(|(names, fds)| (names.trim().to_owned(), fds))
        .context("nothing was passed")
}

fn receive(socket: impl AsFd) -> Option<(String, Vec<OwnedFd>)> {
    let mut bytes = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC).ok()?;
    let fds = ancillary.drain().filter_map(|message| {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            Some(fds)
        } else {
            None
        }
    });
    let fds = fds.flatten().collect();
    let text = String::from_utf8_lossy(bytes.get(..received.bytes)?).into_owned();
    Some((text, fds))
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
