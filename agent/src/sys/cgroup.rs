//! Marks for the sockets of a cgroup: a program of four instructions at the cgroup, which the kernel runs when a socket is made there
//! (`BPF_PROG_TYPE_CGROUP_SOCK`, bpf(2)). The mark chooses the route, and with it the source address. It permits nothing.
//!
//! The program stays when this process ends, and goes with the cgroup. Attaching again takes the place of the one before.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

/// Commands of bpf(2) (linux/bpf.h).
const PROG_LOAD: libc::c_long = 5;
const PROG_ATTACH: libc::c_long = 8;
const PROG_DETACH: libc::c_long = 9;

/// `BPF_PROG_TYPE_CGROUP_SOCK` and `BPF_CGROUP_INET_SOCK_CREATE`.
const CGROUP_SOCK: u32 = 9;
const SOCK_CREATE: u32 = 2;

/// `BPF_F_ALLOW_OVERRIDE`: one program a cgroup, and one further down may take its place there.
const ALLOW_OVERRIDE: u32 = 1;

/// Offset of `mark` in `struct bpf_sock` (linux/bpf.h), in bytes.
const MARK_OFFSET: u16 = 16;

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
}

/// Has every socket that is made in the cgroup from now on carry `mark`.
///
/// # Errors
/// EPERM without CAP_BPF (CAP_SYS_ADMIN before Linux 5.8) and CAP_NET_ADMIN, or if another program is there that does not allow ours; ENOSYS or
/// EINVAL where the kernel has no such programs.
pub fn mark_sockets(cgroup: impl AsFd, mark: u32) -> io::Result<()> {
    let (program, cgroup) = (load(mark)?, cgroup.as_fd());
    let attach = Attach {
        target: number(cgroup)?,
        program: number(program.as_fd())?,
        attach_type: SOCK_CREATE,
        flags: ALLOW_OVERRIDE,
    };
    bpf(PROG_ATTACH, &attach).map(drop)
}

/// Takes the program away again.
///
/// # Errors
/// ENOENT if there is none; otherwise as [`mark_sockets`].
pub fn unmark_sockets(cgroup: impl AsFd) -> io::Result<()> {
    let cgroup = cgroup.as_fd();
    let detach = Attach {
        target: number(cgroup)?,
        program: 0,
        attach_type: SOCK_CREATE,
        flags: 0,
    };
    bpf(PROG_DETACH, &detach).map(drop)
}

fn load(mark: u32) -> io::Result<OwnedFd> {
    let [m0, m1, m2, m3] = mark.to_ne_bytes();
    let [o0, o1] = MARK_OFFSET.to_ne_bytes();
    let program: [[u8; 8]; 4] = [
        // r2 = mark (32 bits)
        [0xb4, register(2, 0), 0, 0, m0, m1, m2, m3],
        // *(u32 *)(r1 + offset) = r2
        [0x63, register(1, 2), o0, o1, 0, 0, 0, 0],
        // r0 = 1: the socket may be made
        [
            0xb7,
            register(0, 0),
            0,
            0,
            1u32.to_ne_bytes()[0],
            1u32.to_ne_bytes()[1],
            1u32.to_ne_bytes()[2],
            1u32.to_ne_bytes()[3],
        ],
        // exit
        [0x95, 0, 0, 0, 0, 0, 0, 0],
    ];
    let license = *b"MIT\0";
    let request = Load {
        program_type: CGROUP_SOCK,
        instructions_length: 4,
        instructions: address(&raw const program),
        license: address(&raw const license),
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"cloison_mark\0\0\0\0",
        interface: 0,
        expected_attach_type: SOCK_CREATE,
    };
    let fd = bpf(PROG_LOAD, &request)?;
    #[expect(unsafe_code, reason = "a number becomes a descriptor that is owned")]
    // SAFETY: PROG_LOAD gave a new descriptor, close-on-exec, that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The byte that names both registers of an instruction: destination in the lower half on little-endian machines, in the upper on others.
const fn register(destination: u8, source: u8) -> u8 {
    if cfg!(target_endian = "little") {
        source << 4 | destination
    } else {
        destination << 4 | source
    }
}

fn number(fd: BorrowedFd<'_>) -> io::Result<u32> {
    u32::try_from(fd.as_raw_fd()).map_err(io::Error::other)
}

fn address<T>(place: *const T) -> u64 {
    // The kernel takes it for an address again.
    place.expose_provenance() as u64
}

fn bpf<T>(command: libc::c_long, request: &T) -> io::Result<i32> {
    #[expect(unsafe_code, reason = "no safe crate calls bpf(2)")]
    // SAFETY: the kernel reads `size_of::<T>()` bytes behind the pointer, which live until the call returns, as do the program and the
    // licence that a `Load` points to. T is one of the two structures above, without padding.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(request), size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}
