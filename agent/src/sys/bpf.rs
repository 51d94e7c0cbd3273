//! Programs that the kernel runs at cgroups, and the maps that they share with the agent (bpf(2)): loaded, attached, and pinned into a file system of
//! type `bpf`, by which the next agent finds them again. What they do is written in [`asm`].

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use asm::Code;

pub mod asm;

/// Commands of bpf(2) (linux/bpf.h).
const MAP_CREATE: libc::c_long = 0;
const MAP_UPDATE: libc::c_long = 2;
const MAP_DELETE: libc::c_long = 3;
const MAP_NEXT: libc::c_long = 4;
const PROG_LOAD: libc::c_long = 5;
const OBJ_PIN: libc::c_long = 6;
const OBJ_GET: libc::c_long = 7;
const PROG_ATTACH: libc::c_long = 8;
const PROG_DETACH: libc::c_long = 9;

/// `BPF_F_ALLOW_OVERRIDE`: one program a cgroup, and one further down may take its place there.
const ALLOW_OVERRIDE: u32 = 1;

/// `BPF_F_ALLOW_MULTI`: beside the programs of others, at the cgroup and above it; what one of them refuses is refused.
const ALLOW_MULTI: u32 = 2;

/// `BPF_F_REPLACE`: in the place of a program that is there.
const REPLACE: u32 = 4;

/// `BPF_F_NO_PREALLOC`.
const NO_PREALLOC: u32 = 1;

/// Where at a cgroup a program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// When a socket is made there: `struct bpf_sock` comes in.
    SocketMade,
    /// When a packet is about to be received by one of its sockets: `struct __sk_buff` comes in.
    Received,
    /// When one of its sockets sends a packet: `struct __sk_buff` comes in.
    Sent,
}

/// A program that was loaded.
#[derive(Debug)]
pub struct Program {
    fd: OwnedFd,
    hook: Hook,
}

/// A map from keys of eight bytes to values of four.
#[derive(Debug)]
pub struct Map(OwnedFd);

/// What PROG_LOAD reads of `union bpf_attr`, as far as we fill it in; the rest is zero.
#[repr(C)]
struct Load {
    program_type: u32,
    instructions_length: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
}

/// What PROG_ATTACH and PROG_DETACH read.
#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
    replaced: u32,
}

/// What MAP_CREATE reads.
#[repr(C)]
struct Create {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
    flags: u32,
    inner: u32,
    node: u32,
    name: [u8; 16],
}

/// What the calls about one element read; `value` is the next key's place for MAP_NEXT.
#[repr(C)]
struct Element {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// What OBJ_PIN and OBJ_GET read.
#[repr(C)]
struct Pin {
    path: u64,
    fd: u32,
    flags: u32,
}

impl Hook {
    /// `enum bpf_prog_type` and `enum bpf_attach_type` (linux/bpf.h).
    const fn numbers(self) -> (u32, u32) {
        match self {
            Self::SocketMade => (9, 2),
            Self::Received => (8, 0),
            Self::Sent => (8, 1),
        }
    }
}

impl Program {
    /// Has the kernel check a program and take it.
    ///
    /// # Errors
    /// EPERM without CAP_BPF (CAP_SYS_ADMIN before Linux 5.8) and CAP_NET_ADMIN; ENOSYS or EINVAL where the kernel does not have such programs.
    pub fn load(name: &str, hook: Hook, code: &Code) -> io::Result<Self> {
        let (program_type, expected_attach_type) = hook.numbers();
        let instructions = code.instructions()?;
        let license = *b"MIT\0";
        let request = Load {
            program_type,
            instructions_length: u32::try_from(instructions.len()).map_err(io::Error::other)?,
            instructions: address(instructions.as_ptr()),
            license: address(&raw const license),
            log_level: 0,
            log_size: 0,
            log: 0,
            kernel_version: 0,
            flags: 0,
            name: short(name),
            interface: 0,
            expected_attach_type,
        };
        Ok(Self {
            fd: descriptor(PROG_LOAD, &request)?,
            hook,
        })
    }

    /// The program that is pinned there, which has to be one for this hook.
    ///
    /// # Errors
    /// The kernel's; `NotFound` if there is none.
    pub fn pinned(path: &Path, hook: Hook) -> io::Result<Self> {
        Ok(Self { fd: get(path)?, hook })
    }

    /// Keeps the program alive by a name in a file system of type `bpf`.
    ///
    /// # Errors
    /// The kernel's; `AlreadyExists` if the name is taken.
    pub fn pin(&self, path: &Path) -> io::Result<()> {
        pin(self.fd.as_fd(), path)
    }

    /// Has the kernel run it at the cgroup in the place of one that allows it, until the cgroup goes.
    ///
    /// # Errors
    /// EPERM if another program is there that does not allow ours.
    pub fn attach_alone(&self, cgroup: BorrowedFd<'_>) -> io::Result<()> {
        self.attach(cgroup, ALLOW_OVERRIDE)
    }

    /// Has the kernel run it at the cgroup beside those of others, until the cgroup goes. One that is there already stays.
    ///
    /// # Errors
    /// EPERM if another program is there, or above, that stands no other; E2BIG if there are too many.
    pub fn attach_beside_others(&self, cgroup: BorrowedFd<'_>) -> io::Result<()> {
        match self.attach(cgroup, ALLOW_MULTI) {
            // What is attached is not attached twice, but takes its own place.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => self.attach(cgroup, ALLOW_MULTI | REPLACE),
            done => done,
        }
    }

    /// Takes it away from the cgroup.
    ///
    /// # Errors
    /// ENOENT if it is not there; otherwise as for attaching.
    pub fn detach(&self, cgroup: BorrowedFd<'_>) -> io::Result<()> {
        bpf(PROG_DETACH, &self.request(cgroup, 0)?).map(drop)
    }

    fn attach(&self, cgroup: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
        bpf(PROG_ATTACH, &self.request(cgroup, flags)?).map(drop)
    }

    fn request(&self, cgroup: BorrowedFd<'_>, flags: u32) -> io::Result<Attach> {
        let program = number(self.fd.as_fd())?;
        Ok(Attach {
            target: number(cgroup)?,
            program,
            attach_type: self.hook.numbers().1,
            flags,
            replaced: if flags & REPLACE == 0 { 0 } else { program },
        })
    }
}

/// Takes away whatever program runs alone at the cgroup for this hook.
///
/// # Errors
/// ENOENT if there is none; otherwise as for attaching.
pub fn detach_any(hook: Hook, cgroup: BorrowedFd<'_>) -> io::Result<()> {
    let request = Attach {
        target: number(cgroup)?,
        program: 0,
        attach_type: hook.numbers().1,
        flags: 0,
        replaced: 0,
    };
    bpf(PROG_DETACH, &request).map(drop)
}

impl Map {
    /// An empty map; a full one refuses more.
    ///
    /// # Errors
    /// As for loading a program.
    pub fn create(name: &str, entries: u32) -> io::Result<Self> {
        // BPF_MAP_TYPE_HASH
        Self::make(name, entries, 1, NO_PREALLOC, 0)
    }

    /// An empty map that forgets what was not used for longest when it is full.
    ///
    /// # Errors
    /// As for loading a program.
    pub fn create_forgetful(name: &str, entries: u32) -> io::Result<Self> {
        // BPF_MAP_TYPE_LRU_HASH
        Self::make(name, entries, 9, 0, 0)
    }

    /// An empty map whose values are maps like this one.
    ///
    /// # Errors
    /// As for loading a program.
    pub fn create_of_maps(name: &str, entries: u32, like: &Self) -> io::Result<Self> {
        // BPF_MAP_TYPE_HASH_OF_MAPS
        Self::make(name, entries, 13, NO_PREALLOC, number(like.as_fd())?)
    }

    fn make(name: &str, entries: u32, map_type: u32, flags: u32, inner: u32) -> io::Result<Self> {
        let request = Create {
            map_type,
            key_size: 8,
            value_size: 4,
            entries,
            flags,
            inner,
            node: 0,
            name: short(name),
        };
        descriptor(MAP_CREATE, &request).map(Self)
    }

    /// The map that is pinned there.
    ///
    /// # Errors
    /// The kernel's; `NotFound` if there is none.
    pub fn pinned(path: &Path) -> io::Result<Self> {
        get(path).map(Self)
    }

    /// Keeps the map alive by a name in a file system of type `bpf`.
    ///
    /// # Errors
    /// The kernel's; `AlreadyExists` if the name is taken.
    pub fn pin(&self, path: &Path) -> io::Result<()> {
        pin(self.0.as_fd(), path)
    }

    /// Writes an element.
    ///
    /// # Errors
    /// E2BIG if the map is full.
    pub fn set(&self, key: u64, value: u32) -> io::Result<()> {
        bpf(MAP_UPDATE, &self.element(Some(&key), &raw const value)?).map(drop)
    }

    /// Makes a map an element of a map of maps, which keeps it alive.
    ///
    /// # Errors
    /// E2BIG if the map is full; EINVAL if the other is not like those that it is for.
    pub fn set_map(&self, key: u64, value: &Self) -> io::Result<()> {
        self.set(key, number(value.as_fd())?)
    }

    /// Removes an element.
    ///
    /// # Errors
    /// ENOENT if there is none.
    pub fn remove(&self, key: u64) -> io::Result<()> {
        bpf(MAP_DELETE, &self.element(Some(&key), std::ptr::null::<u32>())?).map(drop)
    }

    /// All keys.
    ///
    /// # Errors
    /// The kernel's.
    pub fn keys(&self) -> io::Result<Vec<u64>> {
        let (mut keys, mut next) = (Vec::new(), 0u64);
        loop {
            // SAFETY of what the kernel writes: see `bpf`; `next` is written to by MAP_NEXT.
            let request = self.element(keys.last(), &raw mut next)?;
            match bpf(MAP_NEXT, &request) {
                Ok(_) => keys.push(next),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(keys),
                Err(error) => return Err(error),
            }
        }
    }

    fn element<T>(&self, key: Option<&u64>, value: *const T) -> io::Result<Element> {
        Ok(Element {
            map: number(self.0.as_fd())?,
            padding: 0,
            key: key.map_or(0, |key| address(std::ptr::from_ref(key))),
            value: address(value),
            flags: 0,
        })
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn get(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let request = Pin {
        path: address(path.as_ptr()),
        fd: 0,
        flags: 0,
    };
    descriptor(OBJ_GET, &request)
}

fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let request = Pin {
        path: address(path.as_ptr()),
        fd: number(fd)?,
        flags: 0,
    };
    bpf(OBJ_PIN, &request).map(drop)
}

/// A name as the kernel takes it: at most 15 characters and a zero.
fn short(name: &str) -> [u8; 16] {
    let mut short = [0; 16];
    short.iter_mut().zip(name.bytes().take(15)).for_each(|(to, from)| *to = from);
    short
}

fn number(fd: BorrowedFd<'_>) -> io::Result<u32> {
    u32::try_from(fd.as_raw_fd()).map_err(io::Error::other)
}

fn address<T>(place: *const T) -> u64 {
    // The kernel takes it for an address again.
    place.expose_provenance() as u64
}

/// A call that gives a new descriptor.
fn descriptor<T>(command: libc::c_long, request: &T) -> io::Result<OwnedFd> {
    let fd = bpf(command, request)?;
    #[expect(unsafe_code, reason = "a number becomes a descriptor that is owned")]
    // SAFETY: the commands that this is called with give a new descriptor, close-on-exec, that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf<T>(command: libc::c_long, request: &T) -> io::Result<i32> {
    #[expect(unsafe_code, reason = "no safe crate calls bpf(2)")]
    // SAFETY: the kernel reads `size_of::<T>()` bytes behind the pointer, which live until the call returns, as does all that their addresses
    // point to: instructions, licence, a path that ends with zero, a key of eight bytes and a value of four, and for MAP_NEXT eight bytes that
    // it may write to. T is one of the structures above, without padding.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(request), size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}
