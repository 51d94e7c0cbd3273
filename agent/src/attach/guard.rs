//! The guard of loopback: a component that is a unit or a cgroup is reached there by itself alone. The kernel asks two programs at each claimed
//! cgroup, at the very socket that would receive, however it was found: nothing before that knows for certain who it is (the rest of an older
//! stream, a Multipath TCP subflow, a socket that is bound to an interface or shares its port).
//!
//! A packet that came by loopback carries the mark of the component whose socket sent it, which the base table sees to
//! ([`super::claim_table`]). It is heard
//!
//! - by a listener if the mark is that of the deepest claimed cgroup which the socket is in;
//! - by a UDP socket if the mark is that one, or if it comes from a port that this very socket has asked something by loopback, before anybody of its own
//!   did so from there ([`Guard`]'s second program takes note of that): a server's answers open no port;
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

/// What is pinned in it; the map `asked` lives by the programs.
const HOMES: &str = "homes";
const ASKS: &str = "asks";
const HEARS: &str = "hears";

/// Whether listeners that share a port hand each other what they have taken (ip-sysctl, `tcp_migrate_req`).
const MIGRATES: &str = "/proc/sys/net/ipv4/tcp_migrate_req";

/// Most cgroups that are guarded at a time.
const MAX_HOMES: u32 = 4_096;

/// How many pairs of a UDP socket and a port, of all guarded components together, are remembered.
const MAX_ASKED: u32 = 16_384;

/// Who was the first to send between the two, by loopback: the socket itself, or somebody of its own component at that port.
const ASKED: i32 = 1;
const WAS_ASKED: i32 = 2;

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

/// `BPF_NOEXIST`: what is there stays.
const IF_NEW: i32 = 1;

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

/// Where a value is, or a part of a packet.
const VALUE: i16 = -16;

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
    /// Whose mark is in `homes`.
    known: BTreeSet<u64>,
    /// Those of them that are no cgroup any more.
    gone: BTreeSet<u64>,
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
    /// [`Guard::keep`].
    ///
    /// # Errors
    /// [`GuardError`]: the kernel does not take the programs, `place` cannot hold them, or they would not help.
    pub fn open(place: &Path) -> Result<Self, GuardError> {
        if std::fs::read_to_string(MIGRATES).is_ok_and(|text| text.trim() != "0") {
            return Err(GuardError::Migrates);
        }
        Self::take_up(place)
    }

    fn take_up(place: &Path) -> Result<Self, GuardError> {
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
        let (hears, asks, homes) = match found {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::pin(&folder),
            known => known,
        }
        .map_err(refused("cannot keep programs in"))?;
        let known = homes.keys().map_err(refused("cannot read a map in"))?.into_iter().collect();
        Ok(Self {
            hears,
            asks,
            homes,
            known,
            gone: BTreeSet::new(),
            closed: BTreeMap::new(),
        })
    }

    /// What is pinned there, all of it.
    fn pinned(folder: &Path) -> io::Result<(Program, Program, Map)> {
        let homes = Map::pinned(&folder.join(HOMES))?;
        let asks = Program::pinned(&folder.join(ASKS), Hook::Sent)?;
        Ok((Program::pinned(&folder.join(HEARS), Hook::Received)?, asks, homes))
    }

    /// Loads all of it, and pins it. A program knows the maps that it was loaded with: what is left of others goes first, and the last to be there
    /// is what makes it complete.
    fn pin(folder: &Path) -> io::Result<(Program, Program, Map)> {
        for name in [HEARS, ASKS, HOMES] {
            match std::fs::remove_file(folder.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        let homes = Map::create("cloison_homes", MAX_HOMES)?;
        let asked = Map::create_forgetful("cloison_asked", MAX_ASKED)?;
        let hears = Program::load("cloison_hears", Hook::Received, &hearing(&homes, &asked)?)?;
        let asks = Program::load("cloison_asks", Hook::Sent, &asking(&asked)?)?;
        homes.pin(&folder.join(HOMES))?;
        asks.pin(&folder.join(ASKS))?;
        hears.pin(&folder.join(HEARS))?;
        Ok((hears, asks, homes))
    }

    /// Has the cgroup of this id, which is open as `directory`, be reached on loopback by those with this mark alone.
    ///
    /// # Errors
    /// The kernel's: it is not guarded then.
    pub fn close(&mut self, id: u64, directory: BorrowedFd<'_>, mark: u32) -> io::Result<()> {
        // First the map, so that the programs know it from their first packet on; what it sends is noted before what it hears is judged.
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

    /// Opens all cgroups again but these, as far as they are still there: `there` says which of some others are, if that is known.
    ///
    /// # Errors
    /// The kernel's, after having tried all of it.
    pub fn keep(&mut self, ids: &BTreeSet<u64>, there: impl FnOnce(&BTreeSet<u64>) -> Option<BTreeSet<u64>>) -> io::Result<()> {
        self.closed.retain(|id, _| ids.contains(id));
        let others: BTreeSet<u64> = self.known.difference(ids).copied().filter(|id| !self.gone.contains(id)).collect();
        let there = if others.is_empty() { None } else { there(&others) };
        let Some(there) = there else { return Ok(()) };
        self.gone.extend(others.difference(&there));
        // Those that went first, if there are too many.
        let room = MAX_HOMES as usize / 2;
        let oldest = self.gone.iter().copied().take(self.gone.len().saturating_sub(room));
        let open: Vec<u64> = there.iter().copied().chain(oldest).collect();
        self.open_again(open)
    }

    fn open_again(&mut self, ids: Vec<u64>) -> io::Result<()> {
        let mut all = Ok(());
        for id in ids {
            match self.homes.remove(id) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => all = Err(error),
                _ => {
                    self.known.remove(&id);
                    self.gone.remove(&id);
                }
            }
        }
        all
    }

    /// Opens all cgroups again that an agent has left guarded. Its programs stay where they are, for one that guards them again.
    ///
    /// # Errors
    /// [`GuardError`].
    pub fn release(place: &Path) -> Result<Option<Self>, GuardError> {
        let own = place.join(FOLDER);
        if !own.join(HOMES).exists() {
            return Ok(None);
        }
        let mut guard = Self::take_up(place)?;
        let opened = guard.open_again(guard.known.iter().copied().collect());
        opened
            .map(|()| Some(guard))
            .map_err(|error| GuardError::Refused("cannot empty a map in", own, error))
    }

    /// The same, and takes the programs away, as far as they are attached to these cgroups.
    ///
    /// # Errors
    /// [`GuardError`].
    pub fn end<'a>(place: &Path, cgroups: impl IntoIterator<Item = BorrowedFd<'a>>) -> Result<(), GuardError> {
        let Some(guard) = Self::release(place)? else { return Ok(()) };
        for cgroup in cgroups {
            // Those that are left somewhere let everything pass.
            let _not_there = (guard.hears.detach(cgroup), guard.asks.detach(cgroup));
        }
        let own = place.join(FOLDER);
        std::fs::remove_dir_all(&own).map_err(|error| GuardError::Refused("cannot take away", own, error))
    }
}

/// Whether what is about to be received may be.
fn hearing(homes: impl AsFd, asked: impl AsFd) -> io::Result<Code> {
    let mut code = Code::default();
    let [local, raw, stream, judge, found, own, answer, heard, refused, passes] = std::array::from_fn(|_| code.label());
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
    // The deepest cgroup that is somebody's home.
    for level in (1..=MAX_LEVELS).rev() {
        let next = code.label();
        code.copy(R1, R6);
        code.set(R2, level);
        code.call(AncestorCgroup);
        code.jump_if(R0, 0, next);
        code.store(Double, Fp, KEY, R0);
        look_up(&mut code, &homes)?;
        code.jump_unless(R0, 0, found);
        code.here(next);
    }
    code.jump(passes);
    code.here(found);
    code.load(Word, R9, R0, 0);
    code.load(Word, R2, R6, PACKET_MARK);
    code.jump_if_same(R2, R9, own);
    code.jump_if(R8, UDP, answer);
    code.jump_unless(R8, UDP_LITE, refused);
    code.here(answer);
    find_talk(&mut code, SOURCE_PORT, refused);
    look_up(&mut code, &asked)?;
    code.jump_if(R0, 0, refused);
    code.load(Word, R2, R0, 0);
    code.jump_if(R2, ASKED, passes);
    code.here(refused);
    code.set(R0, REFUSED);
    code.exit();
    code.here(own);
    code.jump_if(R8, UDP, heard);
    code.jump_unless(R8, UDP_LITE, passes);
    code.here(heard);
    find_talk(&mut code, SOURCE_PORT, passes);
    take_note(&mut code, &asked, WAS_ASKED)?;
    code.here(passes);
    code.set(R0, PASSES);
    code.exit();
    Ok(code)
}

/// Takes note of what was asked on loopback by a UDP socket. It refuses nothing.
fn asking(asked: impl AsFd) -> io::Result<Code> {
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
    find_talk(&mut code, DESTINATION_PORT, passes);
    take_note(&mut code, &asked, ASKED)?;
    code.here(passes);
    code.set(R0, PASSES);
    code.exit();
    Ok(code)
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

/// Key = the socket's number, and the port at the other end: that which the socket is connected to, whatever nftables makes of it on the way, or one
/// of the ports of the packet, which begins at the IP header (RFC 791 section 3.1, RFC 8200 section 3). The addresses say nothing: whoever has a
/// port of one local address may write any other on what it sends.
fn find_talk(code: &mut Code, port: i32, none: Label) {
    let [version_4, ports, key] = std::array::from_fn(|_| code.label());
    code.load(Half, R2, R7, SOCKET_PEER_PORT);
    code.store(Half, Fp, VALUE, R2);
    code.jump_unless(R2, 0, key);
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
    code.here(key);
    code.copy(R1, R6);
    code.call(SocketCookie);
    code.shift_left(R0, 16);
    code.load(Half, R1, Fp, VALUE);
    code.add_register(R0, R1);
    code.store(Double, Fp, KEY, R0);
}

/// Writes of the key who was first, if nothing is known yet.
fn take_note(code: &mut Code, map: impl AsFd, who: i32) -> io::Result<()> {
    code.set(R1, who);
    code.store(Word, Fp, VALUE, R1);
    code.set_map(R1, map)?;
    point_to(code, R2, KEY);
    point_to(code, R3, VALUE);
    code.set(R4, IF_NEW);
    code.call(MapUpdate);
    Ok(())
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

/// `R0` = what the map says of the key, or null.
fn look_up(code: &mut Code, map: impl AsFd) -> io::Result<()> {
    code.set_map(R1, map)?;
    point_to(code, R2, KEY);
    code.call(MapLookup);
    Ok(())
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
        let code = [hearing(&map, &map)?.instructions()?, asking(&map)?.instructions()?].concat();
        let digest = Sha256::digest(code.concat());
        let known = (
            "cloison/guard-1",
            "a61d13b63b2a360fe79c315308cfaeedafec0fcc92953b9a966c9e475b067550",
        );
        assert_eq!(
            (FOLDER, format!("{digest:x}").as_str()),
            known,
            "an agent must not take the programs of another version for its own: raise the number of the folder, then change this"
        );
        Ok(())
    }
}
