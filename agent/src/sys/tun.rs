//! TUN interfaces: one file descriptor, single queue, one IP packet a read or write behind a virtio-net header of 10 bytes.
//!
//! The header is there from the first day, so that offloads can come without another interface; no offload is switched on, so the header
//! is all zero in both directions and a packet never exceeds the MTU. The interface belongs to the namespace of the thread that creates it
//! and goes when the descriptor closes, unless it was told to [stay](Tun::persist).

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::InterfaceName;
use super::netns::NetNs;

/// Length of the virtio-net header in front of each packet, in bytes (virtio 1.2 section 5.1.6, without `num_buffers`).
pub const VNET_HEADER_LEN: usize = 10;

const DEVICE: &str = "/dev/net/tun";

/// What our TUNs are: layer 3, no packet information, the virtio-net header.
const FLAGS: libc::c_int = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Gives the network namespace of a TUN: `_IO('T', 227)`, linux/if_tun.h since 5.2.
const TUNGETDEVNETNS: libc::Ioctl = 0x54e3;

/// Why there is no TUN.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// The kernel's TUN driver cannot be reached.
    #[error(
        "cannot open {DEVICE}: there is no such device; load the kernel's driver (`modprobe tun`), or pass the device to the container that the agent runs in"
    )]
    NoDevice(#[source] io::Error),
    /// The agent lacks a privilege.
    #[error("cannot make the TUN {0}: not permitted; the agent needs CAP_NET_ADMIN (run it as root, or grant that capability in its unit)")]
    NotPermitted(InterfaceName, #[source] io::Error),
    /// The name is another interface's, or another process holds the TUN.
    #[error(
        "cannot make the TUN {0}: an interface of that name exists; stop the other agent, or set another `tun` in the agent's configuration"
    )]
    NameTaken(InterfaceName, #[source] io::Error),
    /// Anything else.
    #[error("cannot make the TUN {0}")]
    Other(InterfaceName, #[source] io::Error),
    /// A descriptor that was kept is no TUN of ours.
    #[error("what was kept is no TUN of ours: {0}")]
    NotOurs(&'static str, #[source] io::Error),
}

/// A TUN interface.
pub struct Tun {
    fd: OwnedFd,
    name: InterfaceName,
    index: u32,
}

impl Tun {
    /// Makes the interface in the network namespace of the calling thread. It is down and has no address.
    ///
    /// # Errors
    /// [`TunError`].
    pub fn create(name: &InterfaceName) -> Result<Self, TunError> {
        if interface_index(name).is_ok() {
            // Attaching to an interface that is already there would inherit somebody else's addresses.
            return Err(TunError::NameTaken(name.clone(), Errno::EXIST.into()));
        }
        Self::open(name)
    }

    /// Takes up a TUN that [stayed](Self::persist) in the network namespace of the calling thread: its addresses, routes and state are as
    /// they were left.
    ///
    /// # Errors
    /// [`TunError::NameTaken`] if somebody holds it, or it is no TUN.
    pub fn attach(name: &InterfaceName) -> Result<Self, TunError> {
        interface_index(name).map_err(|e| TunError::Other(name.clone(), e))?;
        Self::open(name)
    }

    /// Takes up a TUN whose descriptor somebody kept open, wherever it is; nothing that waits in it is lost. Says in which namespace it is.
    ///
    /// # Errors
    /// [`TunError::NotOurs`] for anything but a live TUN of our kind; the descriptor is closed then.
    pub fn adopt(fd: OwnedFd) -> Result<(Self, NetNs), TunError> {
        let not_ours = |what| move |e| TunError::NotOurs(what, e);
        let (name, flags) = interface(&fd).map_err(not_ours("it is no TUN, or its interface is gone"))?;
        if flags & (FLAGS | libc::IFF_TAP | libc::IFF_MULTI_QUEUE) != FLAGS {
            return Err(TunError::NotOurs("its flags are others", Errno::INVAL.into()));
        }
        let namespace = device_namespace(&fd).map_err(not_ours("its network namespace cannot be opened"))?;
        let index = namespace.run(|| interface_index(&name)).map_err(io::Error::other);
        let index = index.and_then(|found| found).map_err(not_ours("its interface is gone"))?;
        let flags = rustix::fs::fcntl_getfl(&fd).and_then(|flags| rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK));
        flags.map_err(|e| TunError::Other(name.clone(), e.into()))?;
        set_header_length(&fd).map_err(|e| TunError::Other(name.clone(), e))?;
        Ok((Self { fd, name, index }, namespace))
    }

    /// Has the interface stay when the descriptor closes, for root alone to take up again: with it stay its addresses and routes, and what
    /// is sent there meanwhile is dropped.
    ///
    /// # Errors
    /// The kernel's; none in ordinary operation.
    pub fn persist(&self) -> io::Result<()> {
        // The owner first: a TUN without one is anybody's who can open the device.
        set_number(&self.fd, libc::TUNSETOWNER, 0)?;
        set_number(&self.fd, libc::TUNSETPERSIST, 1)
    }

    /// Has the interface go when the descriptor closes.
    ///
    /// # Errors
    /// The kernel's: the interface is gone already.
    pub fn let_go(&self) -> io::Result<()> {
        set_number(&self.fd, libc::TUNSETPERSIST, 0)
    }

    fn open(name: &InterfaceName) -> Result<Self, TunError> {
        let fd = rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty()).map_err(|e| match e {
            Errno::ACCESS | Errno::PERM => TunError::NotPermitted(name.clone(), e.into()),
            Errno::NOENT | Errno::NODEV | Errno::NXIO => TunError::NoDevice(e.into()),
            other => TunError::Other(name.clone(), other.into()),
        })?;
        set_interface(&fd, name).map_err(|e| match e.raw_os_error() {
            Some(libc::EPERM) => TunError::NotPermitted(name.clone(), e),
            Some(libc::EBUSY | libc::EINVAL) => TunError::NameTaken(name.clone(), e),
            _ => TunError::Other(name.clone(), e),
        })?;
        set_header_length(&fd).map_err(|e| TunError::Other(name.clone(), e))?;
        let index = interface_index(name).map_err(|e| TunError::Other(name.clone(), e))?;
        Ok(Self {
            fd,
            name: name.clone(),
            index,
        })
    }

    /// The interface's name.
    #[must_use]
    pub const fn name(&self) -> &InterfaceName {
        &self.name
    }

    /// The interface's index in its namespace.
    #[must_use]
    pub const fn index(&self) -> u32 {
        self.index
    }

    /// Reads one packet and its header; the packet's length is returned. A packet longer than `packet` is cut by the kernel, so `packet` must
    /// have room for the MTU.
    ///
    /// # Errors
    /// `WouldBlock` if there is none; EBADFD once the interface is gone.
    pub fn read(&self, header: &mut [u8; VNET_HEADER_LEN], packet: &mut [u8]) -> io::Result<usize> {
        let length = rustix::io::readv(&self.fd, &mut [IoSliceMut::new(header), IoSliceMut::new(packet)])?;
        length
            .checked_sub(VNET_HEADER_LEN)
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    /// Throws away what waits to be read.
    pub fn discard(&self) {
        let (mut header, mut packet) = ([0; VNET_HEADER_LEN], [0; 1]);
        // A queue is shorter than this; what comes meanwhile is not what waited.
        for _ in 0..4096 {
            if self.read(&mut header, &mut packet).is_err() {
                return;
            }
        }
    }

    /// Writes one packet with its header.
    ///
    /// # Errors
    /// EIO while the interface is down; EINVAL if `packet` is no IP packet.
    pub fn write(&self, header: &[u8; VNET_HEADER_LEN], packet: &[u8]) -> io::Result<()> {
        rustix::io::writev(&self.fd, &[IoSlice::new(header), IoSlice::new(packet)])?;
        Ok(())
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl fmt::Debug for Tun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tun({}, index {})", self.name, self.index)
    }
}

/// The index of an interface in the namespace of the calling thread.
///
/// # Errors
/// ENODEV if there is none of that name.
pub fn interface_index(name: &InterfaceName) -> io::Result<u32> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    Ok(rustix::net::netdevice::name_to_index(socket, name.as_str())?)
}

fn set_interface(fd: &OwnedFd, name: &InterfaceName) -> io::Result<()> {
    let mut request = empty_request();
    for (to, from) in request.ifr_name.iter_mut().zip(name.as_str().bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(FLAGS).map_err(io::Error::other)?;
    // The name is shorter than IFNAMSIZ, so it ends with a zero.
    request_interface(fd, libc::TUNSETIFF, &mut request)
}

/// Name and flags of the interface behind a descriptor.
fn interface(fd: &OwnedFd) -> io::Result<(InterfaceName, libc::c_int)> {
    let mut request = empty_request();
    request_interface(fd, libc::TUNGETIFF, &mut request)?;
    let name: Vec<u8> = request
        .ifr_name
        .iter()
        .map(|c| c.to_ne_bytes()[0])
        .take_while(|b| *b != 0)
        .collect();
    let name = std::str::from_utf8(&name).map_err(io::Error::other)?;
    #[expect(unsafe_code, reason = "the kernel's answer is a union")]
    // SAFETY: TUNGETIFF wrote the flags, and every bit pattern is a number.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((name.parse().map_err(io::Error::other)?, libc::c_int::from(flags) & 0xffff))
}

const fn empty_request() -> libc::ifreq {
    libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 },
    }
}

fn request_interface(fd: &OwnedFd, number: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    #[expect(unsafe_code, reason = "no safe crate makes a TUN")]
    // SAFETY: the descriptor is open, and both TUNSETIFF and TUNGETIFF read and write one `ifreq`, which lives until the call returns.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number, std::ptr::from_mut(request)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Settings of a TUN that are a number: TUNSETOWNER, TUNSETPERSIST.
fn set_number(fd: &OwnedFd, number: libc::Ioctl, value: libc::c_ulong) -> io::Result<()> {
    #[expect(unsafe_code, reason = "no safe crate makes a TUN persistent")]
    // SAFETY: the descriptor is open, and both requests take their argument by value.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number, value) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn device_namespace(fd: &OwnedFd) -> io::Result<NetNs> {
    #[expect(unsafe_code, reason = "no safe crate asks a TUN for its namespace")]
    // SAFETY: the descriptor is open, and the request has no argument. What it gives is a new descriptor, close-on-exec, that nobody else
    // has.
    let namespace = unsafe {
        let result = libc::ioctl(fd.as_raw_fd(), TUNGETDEVNETNS);
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(result)
    };
    Ok(NetNs::held(namespace)?)
}

fn set_header_length(fd: &OwnedFd) -> io::Result<()> {
    let length = libc::c_int::try_from(VNET_HEADER_LEN).map_err(io::Error::other)?;
    #[expect(unsafe_code, reason = "no safe crate sets the header length of a TUN")]
    // SAFETY: the descriptor is open, and TUNSETVNETHDRSZ reads one int, which lives until the call returns.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
