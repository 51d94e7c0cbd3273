//! The guard of loopback: a component that is a unit or a cgroup is reached there by itself alone. The kernel asks two programs at each claimed
//! cgroup, at the very socket that would receive, however it was found: nothing before that knows for certain who it is (the rest of an older
//! stream, a Multipath TCP subflow, a socket that is bound to an interface or shares its port).
//!
//! A packet that came by loopback carries the mark of the component whose socket sent it, which the base table sees to
//! ([`super::claim_table`]). It is heard
//!
//! - by a listener if the mark is that of the deepest claimed cgroup which the socket is in;
//! - by a UDP socket if the mark is that one, or if it comes from a port that this very socket has asked something by loopback, and from which nobody of
//!   its own has asked its port ([`Guard`]'s second program takes note of that): a server's answers open no port, also not from a socket for each client;
//! - by a TCP socket that is no listener in any case: who began was heard before, or it was itself;
//! - by any other socket but those for ICMP if the mark is that one.
//!
//! Programs and maps are pinned ([`place`]) and survive the agent: with it away, who was guarded stays guarded. A cgroup whose entry is taken
//! from the map `homes` is nobody's again, and everybody is heard there, though the programs are attached until it goes. The entry of one that is
//! gone stays, since a socket may outlive the cgroup that it was made in, and a cgroup's number is not used again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::DirBuilder;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use crate::sys::bpf::asm::Helper::{AncestorCgroup, FullSocket, LoadBytes, MapLookup, MapUpdate, SocketCookie};
use crate::sys::bpf::asm::Register::{Fp, R0, R1, R2, R3, R4, R6, R7, R8, R9};
use crate::sys::bpf::asm::Size::{Byte, Double, Half, Word};
use crate::sys::bpf::asm::{Code, Label, Register};
use crate::sys::bpf::{Hook, Map, Program};

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

/// How deep a claimed cgroup may be below the root of all, that of the machine that this host is a container of.
const MAX_LEVELS: i32 = 32;

/// Offsets in `struct __sk_buff` (linux/bpf.h), in bytes.
const PACKET_TYPE: i16 = 4;
const PACKET_MARK: i16 = 8;
const PACKET_INTERFACE: i16 = 40;
const PACKET_SOCKET: i16 = 168;

/// Offsets in `struct bpf_sock`.
const SOCKET_TYPE: i16 = 8;
const SOCKET_PROTOCOL: i16 = 12;
const SOCKET_OWN_PORT: i16 = 44;
const SOCKET_PEER_PORT: i16 = 48;
const SOCKET_STATE: i16 = 72;

/// The index of `lo` in every namespace (`LOOPBACK_IFINDEX`).
const LOOPBACK: i32 = 1;

/// What is sent to a group comes back by the interface that it left by (`PACKET_LOOPBACK`, linux/if_packet.h).
const CAME_BACK: i32 = 5;

/// `TCP_LISTEN` (linux/tcp.h).
const LISTEN: i32 = 10;

/// `SOCK_RAW` (linux/net.h).
const RAW: i32 = 3;

/// Protocol numbers; the last one is no packet's.
const TCP: i32 = 6;
const UDP: i32 = 17;
const UDP_LITE: i32 = 136;
const ICMP: i32 = 1;
const ICMPV6: i32 = 58;
const NO_PROTOCOL: i32 = 255;

/// Offsets of the ports in the header of a datagram (RFC 768).
const SOURCE_PORT: i32 = 0;
const DESTINATION_PORT: i32 = 2;

/// Where on the stack a key of a map is: eight bytes.
const KEY: i16 = -8;

/// Where a value is, or a part of a packet, and the port at the other end.
const VALUE: i16 = -16;
const PORT: i16 = -24;

/// What the kernel is told.
const REFUSED: i32 = 0;
const PASSES: i32 = 1;

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

/// Whether what is about to be received may be.
fn hearing(homes: impl AsFd, talks: impl AsFd) -> io::Result<Code> {
    let mut code = Code::default();
    let [local, raw, stream, judge, own, answer, heard, refused, passes] = std::array::from_fn(|_| code.label());
    code.copy(R6, R1);
    code.load(Word, R2, R6, PACKET_INTERFACE);
    code.jump_if(R2, LOOPBACK, local);
    code.load(Word, R2, R6, PACKET_TYPE);
    code.jump_unless(R2, CAME_BACK, passes);
    code.here(local);
    find_socket(&mut code, refused);
    code.jump_if(R8, ICMP, passes);
    code.jump_if(R8, ICMPV6, passes);
    code.load(Word, R2, R7, SOCKET_TYPE);
    code.jump_if(R2, RAW, raw);
    code.jump_if(R8, TCP, stream);
    code.jump(judge);
    code.here(raw);
    code.set(R8, NO_PROTOCOL);
    code.jump(judge);
    code.here(stream);
    code.load(Word, R2, R7, SOCKET_STATE);
    code.jump_unless(R2, LISTEN, passes);
    code.here(judge);
    find_home(&mut code, homes, passes)?;
    code.load(Word, R2, R6, PACKET_MARK);
    code.jump_if_same(R2, R9, own);
    code.jump_if(R8, UDP, answer);
    code.jump_unless(R8, UDP_LITE, refused);
    code.here(answer);
    find_talks(&mut code, &talks, refused)?;
    find_port(&mut code, SOURCE_PORT, refused);
    key_of_question(&mut code);
    look_up(&mut code);
    code.jump_unless(R0, 0, passes);
    code.here(refused);
    code.set(R0, REFUSED);
    code.exit();
    code.here(own);
    code.jump_if(R8, UDP, heard);
    code.jump_unless(R8, UDP_LITE, passes);
    code.here(heard);
    // What is no answer of its own to its own is a question.
    find_talks(&mut code, &talks, passes)?;
    find_port(&mut code, SOURCE_PORT, passes);
    key_of_question(&mut code);
    look_up(&mut code);
    code.jump_unless(R0, 0, passes);
    key_of_service(&mut code);
    take_note(&mut code);
    code.here(passes);
    code.set(R0, PASSES);
    code.exit();
    Ok(code)
}

/// Takes note of what was asked on loopback by a UDP socket. It refuses nothing.
fn asking(homes: impl AsFd, talks: impl AsFd) -> io::Result<Code> {
    let mut code = Code::default();
    let [datagram, passes] = std::array::from_fn(|_| code.label());
    code.copy(R6, R1);
    code.load(Word, R2, R6, PACKET_INTERFACE);
    code.jump_unless(R2, LOOPBACK, passes);
    find_socket(&mut code, passes);
    code.load(Word, R2, R7, SOCKET_TYPE);
    code.jump_if(R2, RAW, passes);
    code.jump_if(R8, UDP, datagram);
    code.jump_unless(R8, UDP_LITE, passes);
    code.here(datagram);
    find_home(&mut code, homes, passes)?;
    find_talks(&mut code, talks, passes)?;
    find_port(&mut code, DESTINATION_PORT, passes);
    // What goes to a port from which this one was asked is an answer.
    key_of_service(&mut code);
    look_up(&mut code);
    code.jump_unless(R0, 0, passes);
    key_of_question(&mut code);
    take_note(&mut code);
    code.here(passes);
    code.set(R0, PASSES);
    code.exit();
    Ok(code)
}

/// `R9` = the mark of the deepest cgroup around the socket that is somebody's home.
fn find_home(code: &mut Code, homes: impl AsFd, none: Label) -> io::Result<()> {
    let found = code.label();
    for level in (1..=MAX_LEVELS).rev() {
        let next = code.label();
        code.copy(R1, R6);
        code.set(R2, level);
        code.call(AncestorCgroup);
        code.jump_if(R0, 0, next);
        code.store(Double, Fp, KEY, R0);
        code.set_map(R1, &homes)?;
        look_up_in(code);
        code.jump_unless(R0, 0, found);
        code.here(next);
    }
    code.jump(none);
    code.here(found);
    code.load(Word, R9, R0, 0);
    Ok(())
}

/// `R8` = the map of who talks in the home `R9`.
fn find_talks(code: &mut Code, talks: impl AsFd, none: Label) -> io::Result<()> {
    code.store(Double, Fp, KEY, R9);
    code.set_map(R1, talks)?;
    look_up_in(code);
    code.jump_if(R0, 0, none);
    code.copy(R8, R0);
    Ok(())
}

/// `R7` = the socket that the packet is sent by or for, `R8` = its protocol.
fn find_socket(code: &mut Code, none: Label) {
    code.load(Double, R1, R6, PACKET_SOCKET);
    code.jump_if(R1, 0, none);
    code.call(FullSocket);
    code.jump_if(R0, 0, none);
    code.copy(R7, R0);
    code.load(Word, R8, R7, SOCKET_PROTOCOL);
}

/// Keeps the port at the other end: that which the socket is connected to, whatever nftables makes of it on the way, or one of the ports of the packet,
/// which begins at the IP header (RFC 791 section 3.1, RFC 8200 section 3). The addresses say nothing: whoever has a port of one local address may
/// write any other on what it sends.
fn find_port(code: &mut Code, port: i32, none: Label) {
    let [version_4, ports, found] = std::array::from_fn(|_| code.label());
    code.load(Half, R2, R7, SOCKET_PEER_PORT);
    code.store(Double, Fp, PORT, R2);
    code.jump_unless(R2, 0, found);
    load_bytes(code, 0, 1, none);
    code.load(Byte, R2, Fp, VALUE);
    code.copy(R3, R2);
    code.shift_right(R3, 4);
    code.jump_if(R3, 4, version_4);
    load_bytes(code, 6, 1, none);
    code.load(Byte, R3, Fp, VALUE);
    code.set(R2, 40);
    code.jump_if(R3, UDP, ports);
    code.jump_unless(R3, UDP_LITE, none);
    code.jump(ports);
    code.here(version_4);
    code.and(R2, 0xf);
    code.shift_left(R2, 2);
    code.here(ports);
    code.add(R2, port);
    load_bytes_at(code, 2, none);
    code.load(Half, R2, Fp, VALUE);
    code.store(Double, Fp, PORT, R2);
    code.here(found);
}

/// Key = that this very socket has asked the port.
fn key_of_question(code: &mut Code) {
    code.copy(R1, R6);
    code.call(SocketCookie);
    code.shift_left(R0, 16);
    code.load(Double, R1, Fp, PORT);
    code.add_register(R0, R1);
    code.store(Double, Fp, KEY, R0);
}

/// Key = that the socket's own port was asked from the port, by its own. No socket has a number with this upper bit.
fn key_of_service(code: &mut Code) {
    code.set(R0, 1);
    code.shift_left(R0, 63);
    code.load(Word, R1, R7, SOCKET_OWN_PORT);
    code.shift_left(R1, 16);
    code.add_register(R0, R1);
    code.load(Double, R1, Fp, PORT);
    code.add_register(R0, R1);
    code.store(Double, Fp, KEY, R0);
}

/// Writes down the key.
fn take_note(code: &mut Code) {
    code.set(R1, 1);
    code.store(Double, Fp, VALUE, R1);
    code.copy(R1, R8);
    point_to(code, R2, KEY);
    point_to(code, R3, VALUE);
    code.set(R4, 0);
    code.call(MapUpdate);
}

/// Loads so many bytes of the packet, from `offset` on, into the place of the value.
fn load_bytes(code: &mut Code, offset: i32, length: i32, none: Label) {
    code.set(R2, offset);
    load_bytes_at(code, length, none);
}

/// The same, from R2 on.
fn load_bytes_at(code: &mut Code, length: i32, none: Label) {
    code.copy(R1, R6);
    point_to(code, R3, VALUE);
    code.set(R4, length);
    code.call(LoadBytes);
    code.jump_unless(R0, 0, none);
}

/// `R0` = what the map of who talks says of the key, or null.
fn look_up(code: &mut Code) {
    code.copy(R1, R8);
    look_up_in(code);
}

/// The same of the map in `R1`.
fn look_up_in(code: &mut Code) {
    point_to(code, R2, KEY);
    code.call(MapLookup);
}

/// A pointer to a place on the stack.
fn point_to(code: &mut Code, to: Register, place: i16) {
    code.copy(to, Fp);
    code.add(to, place.into());
}

#[cfg(test)]
mod tests {
    use sha2::{Digest as _, Sha256};

    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn programs_that_changed_have_another_folder() -> Result<(), Box<dyn std::error::Error>> {
        // Any descriptor with the number 0.
        let map = io::stdin();
        let code = [hearing(&map, &map)?.instructions()?, asking(&map, &map)?.instructions()?].concat();
        let digest = Sha256::digest(code.concat());
        let known = (
            "cloison/guard-1",
            "692a8b33abb4c10bb2e96e00bf77f7b2e2017e1c16b4c4b5c7c5f75346176d0d",
        );
        assert_eq!(
            (FOLDER, format!("{digest:x}").as_str()),
            known,
            "an agent must not take the programs of another version for its own: raise the number of the folder, then change this"
        );
        Ok(())
    }
}
