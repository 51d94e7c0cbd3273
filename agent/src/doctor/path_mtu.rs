//! Which sizes pass to an endpoint: ICMP echoes that must not be fragmented, of the size that a full datagram of the mesh has. Peers answer
//! nothing else to strangers, and a path that loses long datagrams loses long echoes, too.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};
use socket2::{Domain, Protocol, Socket, Type};

/// How long an answer may take, and how often one is asked for.
const PATIENCE: Duration = Duration::from_millis(300);
const ATTEMPTS: u16 = 3;

/// A size that passes everywhere, in bytes with the IP header.
const SMALL: u32 = 100;

/// IP headers of both families, and that of an echo.
const V4_HEADER: usize = 20;
const V6_HEADER: usize = 40;
const ECHO_HEADER: usize = 8;

/// What was found about a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passes {
    /// Everything up to the size that was wanted, in bytes with the IP header.
    All(u32),
    /// What is longer than this gets lost, although `wanted` is sent.
    UpTo {
        /// The longest that passes.
        largest: u32,
        /// What is sent.
        wanted: u32,
    },
    /// The endpoint answers no echo at all.
    Unanswered,
}

/// Finds out whether packets of `wanted` bytes pass to `to`, and if not, which do.
///
/// # Errors
/// The kernel's: no privilege, no route.
pub fn sweep(to: IpAddr, wanted: u32) -> io::Result<Passes> {
    let mut echo = Echo::open(to)?;
    if !echo.passes(SMALL)? {
        return Ok(Passes::Unanswered);
    }
    if echo.passes(wanted)? {
        return Ok(Passes::All(wanted));
    }
    let largest = largest(SMALL, wanted, |size| echo.passes(size))?;
    Ok(Passes::UpTo { largest, wanted })
}

/// The largest size that passes, between one that does and one that does not.
fn largest(mut good: u32, mut bad: u32, mut passes: impl FnMut(u32) -> io::Result<bool>) -> io::Result<u32> {
    while bad.saturating_sub(good) > 1 {
        let middle = good.midpoint(bad);
        if passes(middle)? {
            good = middle;
        } else {
            bad = middle;
        }
    }
    Ok(good)
}

struct Echo {
    socket: UdpSocket,
    to: IpAddr,
    number: u16,
    id: u16,
}

impl Echo {
    fn open(to: IpAddr) -> io::Result<Self> {
        let (domain, protocol, any): (_, _, IpAddr) = match to {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, Ipv4Addr::UNSPECIFIED.into()),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, Ipv6Addr::UNSPECIFIED.into()),
        };
        let raw = Socket::new(domain, Type::RAW, Some(protocol))?;
        raw.bind(&SocketAddr::new(any, 0).into())?;
        // Never in fragments, and whatever the kernel believes to know of the path.
        match to {
            IpAddr::V4(_) => sockopt::set_ip_mtu_discover(&raw, Ipv4PathMtuDiscovery::PROBE)?,
            IpAddr::V6(_) => sockopt::set_ipv6_mtu_discover(&raw, Ipv6PathMtuDiscovery::PROBE)?,
        }
        let mut id = [0; 2];
        getrandom::fill(&mut id).map_err(|e| io::Error::other(e.to_string()))?;
        Ok(Self {
            socket: raw.into(),
            to,
            number: 0,
            id: u16::from_be_bytes(id),
        })
    }

    /// Whether a packet of `size` bytes, IP header included, is answered.
    fn passes(&mut self, size: u32) -> io::Result<bool> {
        for _ in 0..ATTEMPTS {
            self.number = self.number.wrapping_add(1);
            let request = request(self.to, (self.id, self.number), size);
            match self.socket.send_to(&request, SocketAddr::new(self.to, 0)) {
                Ok(_) => {}
                Err(e) if e.raw_os_error() == Some(libc::EMSGSIZE) => return Ok(false),
                Err(e) => return Err(e),
            }
            if self.is_answered()? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn is_answered(&self) -> io::Result<bool> {
        let until = Instant::now() + PATIENCE;
        let mut buffer = vec![0; 65_536];
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            self.socket.set_read_timeout(Some(left))?;
            match self.socket.recv_from(&mut buffer) {
                Ok((length, from)) if from.ip() == self.to => {
                    let packet = buffer.get(..length).unwrap_or_default();
                    if is_reply(self.to, (self.id, self.number), packet) {
                        return Ok(true);
                    }
                }
                Ok(_) => {}
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
                    ) => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// An echo request that makes a packet of `size` bytes (RFC 792, RFC 4443). The kernel makes the checksum of ICMPv6.
fn request(to: IpAddr, (id, number): (u16, u16), size: u32) -> Vec<u8> {
    let (kind, header) = match to {
        IpAddr::V4(_) => (8, V4_HEADER),
        IpAddr::V6(_) => (128, V6_HEADER),
    };
    let length = usize::try_from(size).unwrap_or(0).saturating_sub(header).max(ECHO_HEADER);
    let mut packet = vec![kind, 0, 0, 0];
    packet.extend(id.to_be_bytes());
    packet.extend(number.to_be_bytes());
    packet.resize(length, 0);
    if to.is_ipv4() {
        let sum = checksum(&packet).to_be_bytes();
        packet.splice(2..4, sum);
    }
    packet
}

/// Whether this is the answer. Of IPv4 the kernel hands over the IP header as well.
fn is_reply(to: IpAddr, (id, number): (u16, u16), packet: &[u8]) -> bool {
    let (kind, at) = match to {
        IpAddr::V4(_) => (0, packet.first().map_or(0, |first| usize::from(first & 0xf) * 4)),
        IpAddr::V6(_) => (129, 0),
    };
    let [id_high, id_low] = id.to_be_bytes();
    let [number_high, number_low] = number.to_be_bytes();
    let wanted = [kind, 0, id_high, id_low, number_high, number_low];
    let echo = packet.get(at..).unwrap_or_default();
    let found = echo.iter().take(2).chain(echo.iter().skip(4).take(4));
    echo.len() >= ECHO_HEADER && found.eq(&wanted)
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| match pair {
        [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
        [high] => u32::from(u16::from_be_bytes([*high, 0])),
        _ => 0,
    });
    let mut sum: u32 = words.fold(0, u32::wrapping_add);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_size_that_passes_is_found_exactly() -> io::Result<()> {
        for limit in [100, 576, 1279, 1280, 1400, 1499] {
            let mut asked = 0;
            let found = largest(SMALL, 1500, |size| {
                asked += 1;
                Ok(size <= limit)
            })?;
            assert_eq!(found, limit);
            assert!(asked <= 11, "{asked} questions");
        }
        Ok(())
    }

    #[test]
    fn a_request_has_its_size_and_a_right_checksum_and_only_its_own_answer_counts() {
        let v4 = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let asked = request(v4, (7, 9), 1400);
        assert_eq!(asked.len() + V4_HEADER, 1400);
        assert_eq!(checksum(&asked), 0, "over its own checksum, the sum is zero");
        let mut answer = vec![0x45; 20];
        answer.extend([0, 0, 1, 2, 0, 7, 0, 9]);
        assert!(is_reply(v4, (7, 9), &answer));
        assert!(!is_reply(v4, (7, 8), &answer) && !is_reply(v4, (7, 9), &answer[..24]));
        let v6 = IpAddr::V6(Ipv6Addr::LOCALHOST);
        assert_eq!(request(v6, (7, 9), 1400).len() + V6_HEADER, 1400);
        assert!(is_reply(v6, (7, 9), &[129, 0, 1, 2, 0, 7, 0, 9]) && !is_reply(v6, (7, 9), &[128, 0, 1, 2, 0, 7, 0, 9]));
    }
}
