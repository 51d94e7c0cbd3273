//! The guard of loopback: a component that is a unit or a cgroup is reached there by itself alone. The kernel asks two programs at each claimed
//! cgroup, at the very socket that would receive, however it was found: nothing before that knows for certain who it is (the rest of an older
//! stream, a Multipath TCP subflow, a socket that is bound to an interface or shares its port). What they say is in [`programs`].
//!
//! Programs and maps are pinned ([`place`]) and survive the agent: with it away, who was guarded stays guarded. A cgroup whose entry is taken
//! from the map `homes` is nobody's again, and everybody is heard there, though the programs are attached until it goes. The entry of one that is
//! gone stays, since a socket may outlive the cgroup that it was made in, and a cgroup's number is not used again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::DirBuilder;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use crate::sys::bpf::{Hook, Map, Program};

mod programs;

use programs::{asking, hearing};

/// Where a file system of type `bpf` is looked for: `/sys/fs/bpf`, and where our unit shows it to the agent, which sees `/sys` read-only.
const PLACES: [&str; 2] = ["/run/cloison/bpf", "/sys/fs/bpf"];

/// The folder of programs and maps in it, with their state: another number for whatever changes in them, so that an agent of another version never
/// takes these for its own.
const FOLDER: &str = "cloison/guard-1";

/// What is pinned in it.
const HOMES: &str = "homes";
const TALKS: &str = "talks";
const ASKS: &str = "asks";
const HEARS: &str = "hears";

/// Whether listeners that share a port hand each other what they have taken (ip-sysctl, `tcp_migrate_req`).
const MIGRATES: &str = "/proc/sys/net/ipv4/tcp_migrate_req";

/// Most cgroups that are guarded at a time.
const MAX_HOMES: u32 = 4_096;

/// How many pairs of a UDP socket and a port are remembered of each component: one cannot have those of another forgotten.
const MAX_TALKS: u32 = 2_048;

/// The programs, and who is guarded by them.
#[derive(Debug)]
pub struct Guard {
    /// At each guarded cgroup, when something is about to be received.
    hears: Program,
    /// When something was sent.
    asks: Program,
    /// The mark of each guarded cgroup, by its id.
    homes: Map,
    /// For each mark, a map of who talks by UDP: which of its sockets has asked which port, and which of its ports is asked by its own.
    talks: Map,
    /// Whose mark is in `homes`.
    known: BTreeSet<u64>,
    /// Which marks are in `talks`.
    talking: BTreeSet<u64>,
    /// Of which cgroups it is known that programs are attached, with their marks.
    closed: BTreeMap<u64, u32>,
}

/// Why loopback cannot be guarded.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// There is nothing that programs could be pinned in.
    #[error("{0} is no file system of type bpf: `mount -t bpf -o mode=0700 bpf /sys/fs/bpf`, and restart the agent")]
    NoPlace(PathBuf),
    /// Somebody else may change what is pinned.
    #[error("{0} is not root's alone: find out who made it, remove it, and restart the agent")]
    Foreign(PathBuf),
    /// Listeners leave their streams to each other.
    #[error("net.ipv4.tcp_migrate_req is on, by which a stream that one listener has taken is handed to another one: switch it off")]
    Migrates,
    /// The kernel refused.
    #[error("{0} {1}")]
    Refused(&'static str, PathBuf, #[source] io::Error),
}

/// Where programs are pinned on this host.
#[must_use]
pub fn place() -> PathBuf {
    let [shown, usual] = PLACES.map(PathBuf::from);
    if is_for_programs(&shown) { shown } else { usual }
}

fn is_for_programs(place: &Path) -> bool {
    rustix::fs::statfs(place).is_ok_and(|found| found.f_type == libc::BPF_FS_MAGIC)
}

impl Guard {
    /// Takes up what an agent before has left at `place`, or loads the programs and pins them there. Who was guarded stays guarded until
    /// [`Guard::open_again`].
    ///
    /// # Errors
    /// [`GuardError`]: the kernel does not take the programs, `place` cannot hold them, or they would not help.
    pub fn open(place: &Path) -> Result<Self, GuardError> {
        if std::fs::read_to_string(MIGRATES).is_ok_and(|text| text.trim() != "0") {
            return Err(GuardError::Migrates);
        }
        if !is_for_programs(place) {
            return Err(GuardError::NoPlace(place.to_owned()));
        }
        let folder = place.join(FOLDER);
        let refused = |what| {
            let folder = folder.clone();
            move |error| GuardError::Refused(what, folder, error)
        };
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&folder);
        made.map_err(refused("cannot make the directory"))?;
        for directory in [folder.as_path(), folder.parent().unwrap_or(place)] {
            let found = std::fs::metadata(directory).map_err(refused("cannot look at"))?;
            if found.uid() != rustix::process::geteuid().as_raw() || found.mode() & 0o022 != 0 {
                return Err(GuardError::Foreign(directory.to_owned()));
            }
        }
        let found = Self::pinned(&folder);
        let mut guard = match found {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::pin(&folder),
            known => known,
        }
        .map_err(refused("cannot keep programs in"))?;
        guard.known = guard.homes.keys().map_err(refused("cannot read a map in"))?.into_iter().collect();
        guard.talking = guard.talks.keys().map_err(refused("cannot read a map in"))?.into_iter().collect();
        Ok(guard)
    }

    /// What is pinned there, all of it.
    fn pinned(folder: &Path) -> io::Result<Self> {
        Ok(Self {
            homes: Map::pinned(&folder.join(HOMES))?,
            talks: Map::pinned(&folder.join(TALKS))?,
            asks: Program::pinned(&folder.join(ASKS), Hook::Sent)?,
            hears: Program::pinned(&folder.join(HEARS), Hook::Received)?,
            known: BTreeSet::new(),
            talking: BTreeSet::new(),
            closed: BTreeMap::new(),
        })
    }

    /// Loads all of it, and pins it. A program knows the maps that it was loaded with: what is left of others goes first, and the last to be there
    /// is what makes it complete.
    fn pin(folder: &Path) -> io::Result<Self> {
        for name in [HEARS, ASKS, TALKS, HOMES] {
            match std::fs::remove_file(folder.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        let homes = Map::create("cloison_homes", MAX_HOMES)?;
        let talks = Map::create_of_maps("cloison_talks", MAX_HOMES, &new_talks()?)?;
        let hears = Program::load("cloison_hears", Hook::Received, &hearing(&homes, &talks)?)?;
        let asks = Program::load("cloison_asks", Hook::Sent, &asking(&homes, &talks)?)?;
        homes.pin(&folder.join(HOMES))?;
        talks.pin(&folder.join(TALKS))?;
        asks.pin(&folder.join(ASKS))?;
        hears.pin(&folder.join(HEARS))?;
        Self::pinned(folder)
    }

    /// Has the cgroup of this id, which is open as `directory`, be reached on loopback by those with this mark alone.
    ///
    /// # Errors
    /// The kernel's: it is not guarded then.
    pub fn close(&mut self, id: u64, directory: BorrowedFd<'_>, mark: u32) -> io::Result<()> {
        // First the maps, so that the programs know it from their first packet on; what it sends is noted before what it hears is judged.
        if !self.talking.contains(&mark.into()) {
            self.talks.set_map(mark.into(), &new_talks()?)?;
            self.talking.insert(mark.into());
        }
        self.homes.set(id, mark)?;
        self.known.insert(id);
        self.asks.attach_beside_others(directory)?;
        self.hears.attach_beside_others(directory)?;
        self.closed.insert(id, mark);
        Ok(())
    }

    /// Whether the cgroup of this id is guarded as the home of this mark.
    #[must_use]
    pub fn is_closed(&self, id: u64, mark: u32) -> bool {
        self.closed.get(&id) == Some(&mark)
    }

    /// Those whom an agent before has left guarded, and who are not guarded by this one yet.
    #[must_use]
    pub fn left(&self) -> BTreeSet<u64> {
        self.known.iter().copied().filter(|id| !self.closed.contains_key(id)).collect()
    }

    /// Opens a cgroup again.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open_again(&mut self, id: u64) -> io::Result<()> {
        self.closed.remove(&id);
        match self.homes.remove(id) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => {
                self.known.remove(&id);
                Ok(())
            }
        }
    }

    /// That a cgroup has gone. Its sockets may be somewhere still.
    pub fn has_gone(&mut self, id: u64) {
        self.closed.remove(&id);
    }

    /// Forgets cgroups that are gone, the first to go first, and the talks of who is no component any more, if there are too many. To be called
    /// when all that are there are closed.
    pub fn make_room(&mut self) {
        let many = |all: usize| all.saturating_sub(MAX_HOMES as usize / 2);
        // The numbers of cgroups grow.
        for id in self.left().into_iter().take(many(self.known.len())) {
            let _stays = self.open_again(id);
        }
        let homes: BTreeSet<u64> = self.closed.values().map(|mark| u64::from(*mark)).collect();
        let silent: Vec<u64> = self.talking.difference(&homes).copied().collect();
        for mark in silent.into_iter().take(many(self.talking.len())) {
            if self.talks.remove(mark).is_ok() {
                self.talking.remove(&mark);
            }
        }
    }

    /// Opens all cgroups again that agents of other versions have left guarded, and takes away what they have pinned.
    ///
    /// # Errors
    /// [`GuardError`].
    pub fn end_others(place: &Path) -> Result<(), GuardError> {
        for folder in folders(place).filter(|folder| !folder.ends_with(FOLDER)) {
            empty(&folder)
                .and_then(|()| std::fs::remove_dir_all(&folder))
                .map_err(|error| GuardError::Refused("cannot take away", folder, error))?;
        }
        Ok(())
    }

    /// Opens all cgroups again that an agent has left guarded. Its programs stay where they are, for one that guards them again.
    ///
    /// # Errors
    /// [`GuardError`].
    pub fn release(place: &Path) -> Result<(), GuardError> {
        let emptied = |folder: PathBuf| empty(&folder).map_err(|error| GuardError::Refused("cannot empty a map in", folder, error));
        folders(place).try_for_each(emptied)
    }

    /// The same, and takes the programs away, as far as they are attached to these cgroups.
    ///
    /// # Errors
    /// [`GuardError`].
    pub fn end<'a>(place: &Path, cgroups: impl IntoIterator<Item = BorrowedFd<'a>>) -> Result<(), GuardError> {
        Self::release(place)?;
        let own = place.join(FOLDER);
        if let Ok(guard) = Self::pinned(&own) {
            for cgroup in cgroups {
                // Those that are left somewhere let everything pass.
                let _not_there = (guard.hears.detach(cgroup), guard.asks.detach(cgroup));
            }
        }
        let all = own.parent().unwrap_or(&own);
        match std::fs::remove_dir_all(all) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(GuardError::Refused("cannot take away", all.to_owned(), error)),
            _ => Ok(()),
        }
    }
}

/// The folders of all versions.
fn folders(place: &Path) -> impl Iterator<Item = PathBuf> {
    let all = place.join(FOLDER).parent().map(std::fs::read_dir);
    all.into_iter().flatten().flatten().flatten().map(|entry| entry.path())
}

/// Takes everybody from the map `homes` that is pinned there.
fn empty(folder: &Path) -> io::Result<()> {
    let homes = match Map::pinned(&folder.join(HOMES)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        homes => homes?,
    };
    homes.keys()?.into_iter().try_for_each(|id| homes.remove(id))
}

/// Where nobody has talked yet.
fn new_talks() -> io::Result<Map> {
    Map::create_forgetful("cloison_talks", MAX_TALKS)
}
