//! The thread that keeps the block in the hosts file: writes it when names change, and looks every few seconds whether it still is there. A
//! file system that hangs holds up this thread and nothing else.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use cloison_proto::status::Names;
use parking_lot::Mutex;

use super::block::{Owner, owners};
use super::hosts_file::{HostsError, Seal, read, update};
use super::memory::Memory;
use super::{Entry, Lines, ZONE, render};
use crate::attach::site::has_ipv6;
use crate::config::HostsFile;
use crate::state::{File, StateDir};

/// How often the file is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(3);

/// How often it is read although it looks unchanged: every so many looks.
const READ_EVERY: u32 = 20;

/// How long the end of the agent waits for a write under way; one that takes longer is completed by the next start.
const END_WITHIN: Duration = Duration::from_secs(1);

/// What is to be in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Whose block.
    pub owner: Owner,
    /// The instances to name.
    pub entries: Vec<Entry>,
}

/// The handle of the thread.
#[derive(Debug)]
pub struct Keeper {
    orders: Option<Sender<Wanted>>,
    last: Option<Wanted>,
    state: Arc<Mutex<Names>>,
    ended: Receiver<()>,
}

impl Keeper {
    /// Starts the thread. A write that an earlier run did not finish is finished, and what that run wrote into a file that is no longer
    /// the one to be written goes.
    ///
    /// # Errors
    /// There are no threads.
    pub fn start(place: HostsFile, dir: StateDir) -> std::io::Result<Self> {
        let (orders, receiver) = channel();
        let (end, ended) = channel();
        let state = Arc::new(Mutex::new(match &place {
            HostsFile::Off => Names::Off,
            HostsFile::At(path) => Names::Waiting { file: path.clone() },
        }));
        let mut work = Work {
            place,
            dir,
            wanted: None,
            lines: Lines::default(),
            seal: None,
            looks: 0,
            state: state.clone(),
        };
        std::thread::Builder::new().name("hosts-file".into()).spawn(move || {
            work.run(&receiver);
            drop(end);
        })?;
        Ok(Self {
            orders: Some(orders),
            last: None,
            state,
            ended,
        })
    }

    /// Says what is to be in the file from now on.
    pub fn want(&mut self, wanted: Wanted) {
        if self.last.as_ref() == Some(&wanted) {
            return;
        }
        if let Some(orders) = &self.orders {
            // A thread that has ended said so in its state.
            let _ = orders.send(wanted.clone());
        }
        self.last = Some(wanted);
    }

    /// How it does.
    #[must_use]
    pub fn state(&self) -> Names {
        self.state.lock().clone()
    }
}

impl Drop for Keeper {
    /// The block stays. What is being written is awaited, but not for long.
    fn drop(&mut self) {
        self.orders = None;
        let _ = self.ended.recv_timeout(END_WITHIN);
    }
}

struct Work {
    place: HostsFile,
    dir: StateDir,
    wanted: Option<Wanted>,
    lines: Lines,
    seal: Option<Seal>,
    looks: u32,
    state: Arc<Mutex<Names>>,
}

impl Work {
    fn run(&mut self, orders: &Receiver<Wanted>) {
        if let Err(error) = self.forget_elsewhere() {
            tracing::warn!(%error, hint = error.hint(), "cannot take this host's block out of the hosts file of before");
        }
        loop {
            match orders.recv_timeout(LOOK_EVERY) {
                Ok(wanted) => {
                    // What came meanwhile is newer.
                    let wanted = orders.try_iter().last().unwrap_or(wanted);
                    self.lines = render(&wanted.entries, has_ipv6());
                    self.wanted = Some(wanted);
                    self.seal = None;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.look();
        }
    }

    /// Takes the block out of another file than the configured one.
    fn forget_elsewhere(&self) -> Result<(), HostsError> {
        let Some(memory) = Memory::load(&self.dir)? else { return Ok(()) };
        let HostsFile::At(path) = &self.place else {
            return remove(&self.dir, &memory);
        };
        if memory.path == *path { Ok(()) } else { remove(&self.dir, &memory) }
    }

    fn look(&mut self) {
        let (HostsFile::At(path), Some(wanted)) = (&self.place, &self.wanted) else {
            return;
        };
        self.looks = self.looks.wrapping_add(1);
        if self.seal.is_some() && self.seal == Seal::of(path) && !self.looks.is_multiple_of(READ_EVERY) {
            return;
        }
        let state = match update(&self.dir, path, &wanted.owner, &self.lines.text) {
            Ok(seal) => {
                self.seal = Some(seal);
                Names::Kept {
                    file: path.clone(),
                    instances: self.lines.named,
                    left_out: self.lines.left_out,
                }
            }
            Err(error) => {
                self.seal = None;
                Names::Failed {
                    file: path.clone(),
                    why: error.to_string(),
                    hint: error.hint(),
                }
            }
        };
        let mut held = self.state.lock();
        if *held != state {
            match &state {
                Names::Failed { why, hint, .. } => tracing::warn!(why, hint, "the names of components are not in the hosts file"),
                Names::Kept { file, instances, left_out } => {
                    tracing::info!(file = %file.display(), instances, left_out, "names below {ZONE} are in the hosts file");
                }
                Names::Off | Names::Waiting { .. } => {}
            }
            *held = state;
        }
    }
}

/// Takes this host's block out of the hosts file that is remembered in `dir`, and out of the one that is configured; for `leave`. Returns the
/// files that had one.
///
/// # Errors
/// [`HostsError`]; it can be tried again.
pub fn leave(dir: &StateDir, place: &HostsFile, owner: Option<Owner>) -> Result<Vec<PathBuf>, HostsError> {
    let mut cleaned = Vec::new();
    if let Some(memory) = Memory::load(dir)? {
        remove(dir, &memory)?;
        cleaned.push(memory.path);
    }
    // What was remembered may be lost.
    if let (HostsFile::At(path), Some(owner)) = (place, owner)
        && read(path).is_ok_and(|content| owners(&content).contains(&owner.host))
    {
        update(dir, path, &owner, "")?;
        cleaned.push(path.clone());
    }
    Ok(cleaned)
}

fn remove(dir: &StateDir, memory: &Memory) -> Result<(), HostsError> {
    match update(dir, &memory.path, &memory.owner, "") {
        Ok(_) => Ok(()),
        // What is gone has no block.
        Err(HostsError::Missing { .. }) => Ok(dir.remove(File::Hosts)?),
        Err(error) => Err(error),
    }
}
