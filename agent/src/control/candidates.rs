//! Where peers may reach this host, by its own knowledge: the addresses of its interfaces with the WireGuard port, and what the operator
//! configured. They are hints: a peer believes none of them before it made a handshake there.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use cloison_proto::control::agent::{Endpoint, MAX_ENDPOINTS};
use cloison_proto::net::{OverlayRange, is_unicast_overlay};

use crate::netlink::{Netlink, NetlinkError, addr, link};

/// What is known beside the interfaces.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// The WireGuard port.
    pub port: u16,
    /// The configured endpoints, which come first.
    pub configured: &'a [SocketAddr],
    /// The address by which the coordinator is reached, which comes next: it has a route to somewhere.
    pub towards_coordinator: Option<IpAddr>,
    /// The mesh's own addresses, which are never endpoints.
    pub overlay: Option<OverlayRange>,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The candidates, the likeliest first.
    pub endpoints: Vec<Endpoint>,
    /// The addresses of this host's interfaces that peers may use; unlike the candidates, they do not change with the link.
    pub addresses: BTreeSet<IpAddr>,
    /// Whether the address by which the coordinator was reached is no longer this host's.
    pub lost_coordinator: bool,
}

/// Lists the candidates of the calling thread's namespace.
///
/// # Errors
/// [`NetlinkError`].
pub fn list(mut known: Known<'_>) -> Result<Listed, NetlinkError> {
    let mut netlink = Netlink::open()?;
    let (mut found, mut all) = (Vec::new(), Vec::new());
    for interface in link::list(&mut netlink)?.iter().filter(|l| l.up) {
        let addresses = addr::list(&mut netlink, interface.index)?;
        all.extend(addresses.iter().copied());
        if !interface.loopback {
            found.extend(addresses);
        }
    }
    let lost = known
        .towards_coordinator
        .filter(|address| !address.is_loopback() && !all.contains(address));
    if lost.is_some() {
        known.towards_coordinator = None;
    }
    let addresses = found.iter().copied().filter(|a| is_outside(*a, known.overlay)).collect();
    Ok(Listed {
        endpoints: choose(known, found),
        addresses,
        lost_coordinator: lost.is_some(),
    })
}

fn choose(known: Known<'_>, found: Vec<IpAddr>) -> Vec<Endpoint> {
    let mut chosen: Vec<SocketAddr> = known.configured.to_vec();
    let outside = |a: &IpAddr| is_outside(*a, known.overlay);
    // IPv4 before IPv6: where both are there, NATs and firewalls are likelier to know the former.
    let (v4, v6): (Vec<_>, Vec<_>) = found.into_iter().partition(IpAddr::is_ipv4);
    let all = known.towards_coordinator.into_iter().chain(v4).chain(v6);
    for address in all.filter(outside) {
        let endpoint = SocketAddr::new(address, known.port);
        if !chosen.contains(&endpoint) {
            chosen.push(endpoint);
        }
    }
    chosen.truncate(MAX_ENDPOINTS);
    chosen.into_iter().map(Endpoint).collect()
}

/// Whether an address can be an endpoint: neither the mesh's own nor one that means something on this host or link alone.
fn is_outside(address: IpAddr, overlay: Option<OverlayRange>) -> bool {
    is_unicast_overlay(address) && overlay.is_none_or(|range| !range.contains(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlay_loopback_and_link_local_addresses_are_no_candidates() -> Result<(), Box<dyn std::error::Error>> {
        let configured = ["203.0.113.9:4000".parse()?];
        let known = Known {
            port: 51_820,
            configured: &configured,
            towards_coordinator: Some("192.0.2.5".parse()?),
            overlay: Some(OverlayRange::new([10, 77, 0, 0].into(), 16, "fd12:3456:789a::".parse()?)?),
        };
        let found = [
            "127.0.0.1",
            "fe80::1",
            "2001:db8::7",
            "10.77.1.4",
            "fd12:3456:789a::1",
            "192.0.2.5",
            "198.51.100.1",
        ];
        let found = found.iter().map(|a| a.parse()).collect::<Result<Vec<_>, _>>()?;
        let chosen: Vec<String> = choose(known, found).iter().map(ToString::to_string).collect();
        assert_eq!(
            chosen,
            ["203.0.113.9:4000", "192.0.2.5:51820", "198.51.100.1:51820", "[2001:db8::7]:51820"]
        );
        let many = (1..40).map(|n| IpAddr::from([198, 51, 100, n])).collect();
        assert_eq!(choose(known, many).len(), MAX_ENDPOINTS);
        Ok(())
    }
}
