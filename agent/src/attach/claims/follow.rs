//! The thread that follows the cgroups of this host: woken by the kernel's word of new and gone ones (inotify(7)), by a change of the claims, and
//! by somebody's change of nftables.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::fs::inotify;
use rustix::io::Errno;

use super::State;
use crate::netlink::monitor::RulesMonitor;
use crate::sys::poll::{Poller, Waker};
use crate::sys::with_causes;

/// How often the thread looks at the cgroups without being told of a change.
const LOOK_EVERY: Duration = Duration::from_secs(3);

/// How often the thread looks again, at once, for what came while it looked.
const ROUNDS: usize = 4;

/// How long it leaves everything to others then: it holds what views need, and cgroups may come without end.
const PAUSE: Duration = Duration::from_millis(1);

/// Most events of the kernel that are taken one by one; the others are found by the look at everything.
const EVENTS: usize = 256;

/// The running thread. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Thread {
    waker: Arc<Waker>,
    stopping: Arc<AtomicBool>,
    /// Whether the base table is to be looked at, though nobody told of a change.
    compares: Arc<AtomicBool>,
    handle: Option<JoinHandle<Option<RulesMonitor>>>,
}

impl Thread {
    /// Starts it; it listens to `rules`, too.
    pub(super) fn start(state: &Arc<Mutex<State>>, mut rules: Option<RulesMonitor>) -> io::Result<Self> {
        let (waker, stopping) = (Arc::new(Waker::new()?), Arc::new(AtomicBool::new(false)));
        let compares = Arc::new(AtomicBool::new(false));
        let watch = Watch::new()?;
        let (poller, state) = (Poller::new()?, Arc::downgrade(state));
        poller.add(&waker, 0)?;
        poller.add(&watch.inotify, 1)?;
        if let Some(rules) = &rules {
            poller.add(rules, 2)?;
        }
        let (woken, stop, compare) = (waker.clone(), stopping.clone(), compares.clone());
        let run = move || {
            let (mut watch, mut ready) = (watch, Vec::new());
            while poller.wait(&mut ready, LOOK_EVERY).is_ok() && !stop.load(Ordering::Acquire) {
                woken.clear();
                let new = watch.read();
                let Some(state) = state.upgrade() else { break };
                let mut state = state.lock();
                state.greet(&new);
                if rules.as_mut().is_some_and(RulesMonitor::look) || compare.swap(false, Ordering::AcqRel) {
                    state.close_without_table();
                }
                if let Err(error) = state.follow() {
                    tracing::warn!(error = with_causes(&error), "cannot follow the cgroups of this host");
                    // Whatever is in the sets now: the table is loaded and filled anew.
                    state.filled = None;
                    state.store_owners(true);
                    state.nudge.give();
                }
                // What came while a directory was not watched yet is found by looking once more; who makes cgroups without end is left behind.
                for _ in 0..ROUNDS {
                    if stop.load(Ordering::Acquire) || !watch.follow(&state.scan.watched) {
                        break;
                    }
                    let _ = state.follow();
                }
                drop(state);
                std::thread::sleep(PAUSE);
            }
            rules
        };
        let handle = std::thread::Builder::new().name("cgroups".into()).spawn(run)?;
        Ok(Self {
            waker,
            stopping,
            compares,
            handle: Some(handle),
        })
    }

    /// Has it look at once.
    pub(super) fn wake(&self) {
        self.waker.wake();
    }

    /// Has it look whether the base table is what was loaded.
    pub(super) fn look_at_rules(&self) {
        self.compares.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Ends it, and gives back what it listened to.
    pub(super) fn end(mut self) -> Option<RulesMonitor> {
        self.join()
    }

    /// Whether it ended by itself.
    pub(super) fn has_ended(&self) -> bool {
        self.handle.as_ref().is_none_or(JoinHandle::is_finished)
    }

    fn join(&mut self) -> Option<RulesMonitor> {
        self.stopping.store(true, Ordering::Release);
        self.waker.wake();
        let ended = self.handle.take()?.join();
        ended.unwrap_or_else(|_| {
            tracing::error!("the thread that follows cgroups panicked");
            None
        })
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        let _rules = self.join();
    }
}

/// The directories that the kernel tells about.
#[derive(Debug)]
struct Watch {
    inotify: OwnedFd,
    /// By the number of the watch.
    watched: BTreeMap<(PathBuf, u64), i32>,
    /// Whether it was said that there are too few watches.
    is_short: bool,
}

impl Watch {
    fn new() -> io::Result<Self> {
        Ok(Self {
            inotify: inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?,
            watched: BTreeMap::new(),
            is_short: false,
        })
    }

    /// Watches these directories; whether one of them is new. One that went takes its watch along.
    fn follow(&mut self, wanted: &BTreeSet<(PathBuf, u64)>) -> bool {
        self.watched.retain(|one, _| wanted.contains(one));
        let mut is_new = false;
        for one in wanted {
            let flags = inotify::WatchFlags::CREATE | inotify::WatchFlags::DELETE | inotify::WatchFlags::ONLYDIR;
            if self.watched.contains_key(one) {
                continue;
            }
            match inotify::add_watch(&self.inotify, &one.0, flags) {
                Ok(number) => is_new |= self.watched.insert(one.clone(), number).is_none(),
                Err(Errno::NOSPC) if !self.is_short => {
                    self.is_short = true;
                    tracing::warn!("no more watches (fs.inotify.max_user_watches): units that start are found after seconds only");
                }
                // It went meanwhile.
                Err(_) => {}
            }
        }
        is_new
    }

    /// What the kernel told: the directories that are new, by their parent's path and id and their name. Whatever else it told of is not
    /// lost, since everything is looked at next.
    fn read(&self) -> Vec<(PathBuf, u64, OsString)> {
        let mut buffer = [MaybeUninit::uninit(); 16 * 1024];
        let mut reader = inotify::Reader::new(&self.inotify, &mut buffer);
        let mut new = Vec::new();
        for _ in 0..EVENTS {
            let Ok(event) = reader.next() else { break };
            let is_new = event.events().contains(inotify::ReadFlags::CREATE | inotify::ReadFlags::ISDIR);
            let parent = self.watched.iter().find(|(_, number)| **number == event.wd());
            if let (true, Some(((path, id), _)), Some(name)) = (is_new, parent, event.file_name()) {
                new.push((path.clone(), *id, OsStr::from_bytes(name.to_bytes()).to_owned()));
            }
        }
        new
    }
}
