//! Socket options that no safe crate offers.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};

/// Lets the kernel fragment what `socket` sends, like kernel WireGuard does: no DF bit on IPv4, fragmentation at the source on IPv6.
///
/// # Errors
/// The kernel's; none for a UDP socket of that family.
pub fn allow_fragments(socket: impl AsFd, v6: bool) -> io::Result<()> {
    let socket = socket.as_fd();
    if !v6 {
        return Ok(sockopt::set_ip_mtu_discover(socket, Ipv4PathMtuDiscovery::DONT)?);
    }
    sockopt::set_ipv6_mtu_discover(socket, Ipv6PathMtuDiscovery::DONT)?;
    let off: libc::c_int = 0;
    let length = libc::socklen_t::try_from(size_of_val(&off)).map_err(io::Error::other)?;
    #[expect(unsafe_code, reason = "rustix and socket2 lack IPV6_DONTFRAG")]
    // SAFETY: the descriptor is open for the length of the borrow, and the kernel reads `length` bytes behind a pointer to an int that lives
    // until the call returns.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IPV6,
            libc::IPV6_DONTFRAG,
            (&raw const off).cast(),
            length,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
