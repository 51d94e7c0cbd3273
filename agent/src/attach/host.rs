//! The host's own namespace: there is always a site for it, so that overlay addresses never leave in clear, with or without a component
//! attached there; and its underlay decides the MTU of every TUN.

use super::{Unenforced, site};
use crate::netlink::{Netlink, link, route};
use crate::sys::netns::NetNs;

/// Largest overhead of a WireGuard datagram: IPv6 and UDP headers (48 bytes), message header and tag (32 bytes; WireGuard paper section 5.4.6).
const OVERHEAD: u32 = 80;

/// The smallest MTU that IPv6 allows (RFC 8200 section 5); below it, the outer datagram is fragmented.
const MIN_MTU: u32 = 1280;

/// The MTU over an underlay of 1500 bytes, and the largest chosen without being told to: a longer packet would be cut apart on the first
/// ordinary link of its path.
pub const DEFAULT_MTU: u32 = 1420;

/// MTU of Ethernet, assumed where no route tells.
const ETHERNET_MTU: u32 = 1500;

/// What an underlay offers, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mtu {
    /// The smallest MTU of the routes that leave this host.
    pub underlay: u32,
    /// What is left for the TUNs.
    pub tun: u32,
}

/// The MTU that the underlay in `namespace` offers. `own` is the index of our TUN there.
///
/// # Errors
/// [`Unenforced`].
pub fn mtu(namespace: &NetNs, own: Option<u32>) -> Result<Mtu, Unenforced> {
    let found = namespace.run(|| {
        let mut netlink = Netlink::open()?;
        let links = link::list(&mut netlink)?;
        let left = links.iter().filter(|l| site::is_marked(l)).map(|l| l.index);
        let own: Vec<u32> = left.chain(own).collect();
        route::underlay_mtu(&mut netlink, &links, &own)
    })??;
    Ok(Mtu::over(found.unwrap_or(ETHERNET_MTU)))
}

impl Mtu {
    fn over(underlay: u32) -> Self {
        let tun = underlay.saturating_sub(OVERHEAD).clamp(MIN_MTU, DEFAULT_MTU);
        Self { underlay, tun }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tun_has_room_for_the_overhead_but_never_less_than_ipv6_needs() {
        for (underlay, tun) in [(1500, 1420), (9000, 1420), (1492, 1412), (1400, 1320), (1300, 1280), (576, 1280)] {
            assert_eq!(Mtu::over(underlay), Mtu { underlay, tun });
        }
    }
}
