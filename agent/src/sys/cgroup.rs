//! Marks for the sockets of a cgroup: a program of four instructions at the cgroup, which the kernel runs when a socket is made there. The mark
//! chooses the route, and with it the source address. It permits nothing.
//!
//! The program stays when this process ends, and goes with the cgroup. Attaching again takes the place of the one before.

use std::io;
use std::os::fd::AsFd;

use super::bpf::asm::{Code, Register, Size};
use super::bpf::{self, Hook, Program};

/// Offset of `mark` in `struct bpf_sock` (linux/bpf.h), in bytes.
const MARK_OFFSET: i16 = 16;

/// Has every socket that is made in the cgroup from now on carry `mark`.
///
/// # Errors
/// EPERM without CAP_BPF (CAP_SYS_ADMIN before Linux 5.8) and CAP_NET_ADMIN, or if another program is there that does not allow ours; ENOSYS or
/// EINVAL where the kernel has no such programs.
pub fn mark_sockets(cgroup: impl AsFd, mark: u32) -> io::Result<()> {
    let mut code = Code::default();
    code.set(Register::R2, mark.cast_signed());
    code.store(Size::Word, Register::R1, MARK_OFFSET, Register::R2);
    // The socket may be made.
    code.set(Register::R0, 1);
    code.exit();
    Program::load("cloison_mark", Hook::SocketMade, &code)?.attach_alone(cgroup.as_fd())
}

/// Takes the program away again.
///
/// # Errors
/// ENOENT if there is none; otherwise as [`mark_sockets`].
pub fn unmark_sockets(cgroup: impl AsFd) -> io::Result<()> {
    bpf::detach_any(Hook::SocketMade, cgroup.as_fd())
}
