//! Where a host may be reached: what its agent says, sieved, and what the coordinator sees.
//!
//! Hints permit nothing, but they make agents send datagrams. So no host can name a place that is none of the underlay's: its peer's own
//! loopback, a multicast group, or the overlay itself.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use cloison_proto::control::agent::{Endpoint, MAX_ENDPOINTS};
use cloison_proto::net::OverlayRange;

/// The candidates of a host in the order in which peers try them: what its agent says, then the address that its link comes from, with the
/// port that the agent gave.
#[must_use]
pub fn candidates(said: &[Endpoint], seen: Option<IpAddr>, overlay: OverlayRange) -> Vec<Endpoint> {
    let mut found: Vec<Endpoint> = Vec::new();
    let port = said.first().map(|endpoint| endpoint.0.port());
    let seen = seen.zip(port).map(|(address, port)| SocketAddr::new(address, port));
    // Room is kept for what the coordinator sees: it is the one that no agent can know.
    let said = said.iter().map(|endpoint| endpoint.0).take(MAX_ENDPOINTS.saturating_sub(1));
    for endpoint in said.chain(seen) {
        let endpoint = Endpoint(SocketAddr::new(endpoint.ip().to_canonical(), endpoint.port()));
        if endpoint.0.port() != 0 && is_underlay(endpoint.0.ip(), overlay) && !found.contains(&endpoint) {
            found.push(endpoint);
        }
    }
    found
}

/// Whether an agent may send to this address at all.
fn is_underlay(address: IpAddr, overlay: OverlayRange) -> bool {
    let unusable = match address {
        IpAddr::V4(a) => {
            let [first, ..] = a.octets();
            first == 0 || first >= 240 || a.is_loopback() || a.is_link_local() || a.is_multicast() || a == Ipv4Addr::BROADCAST
        }
        IpAddr::V6(a) => {
            let link_local = a.segments()[0] & 0xffc0 == 0xfe80;
            a.is_unspecified() || a.is_loopback() || a.is_multicast() || link_local
        }
    };
    !unusable && !overlay.contains(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    type TestResult = Result<(), Box<dyn std::error::Error>>;

    fn sieved(said: &[&str], seen: Option<&str>) -> Result<Vec<String>, Box<dyn std::error::Error>> {
        let overlay = OverlayRange::new([10, 77, 0, 0].into(), 16, "fd12:3456:789a::".parse()?)?;
        let said = said.iter().map(|text| text.parse()).collect::<Result<Vec<_>, _>>()?;
        let seen = seen.map(str::parse).transpose()?;
        Ok(candidates(&said, seen, overlay).iter().map(ToString::to_string).collect())
    }

    #[test]
    fn no_host_sends_its_peers_to_places_outside_the_underlay() -> TestResult {
        let bad = [
            "127.0.0.1:1",
            "0.0.0.0:1",
            "169.254.1.1:1",
            "224.0.0.1:1",
            "255.255.255.255:1",
            "10.77.3.4:1",
            "192.0.2.1:0",
            "[::1]:1",
            "[::]:1",
            "[fe80::1]:1",
            "[ff02::1]:1",
            "[fd12:3456:789a::5]:1",
            "[::ffff:127.0.0.1]:1",
            "[::ffff:10.77.3.4]:1",
        ];
        for bad in bad {
            assert_eq!(sieved(&[bad], None)?, Vec::<String>::new(), "{bad}");
        }
        Ok(())
    }

    #[test]
    fn what_the_coordinator_sees_comes_last_and_always_has_room() -> TestResult {
        assert_eq!(
            sieved(&["192.0.2.1:51820"], Some("198.51.100.7"))?,
            ["192.0.2.1:51820", "198.51.100.7:51820"]
        );
        assert_eq!(
            sieved(&["192.0.2.1:51820"], Some("::ffff:192.0.2.1"))?,
            ["192.0.2.1:51820"],
            "once is enough"
        );
        assert_eq!(sieved(&[], Some("198.51.100.7"))?, Vec::<String>::new(), "no port is known");
        let many: Vec<_> = (1..=20).map(|n| format!("192.0.2.{n}:51820")).collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        let kept = sieved(&many, Some("198.51.100.7"))?;
        assert_eq!(
            (kept.len(), kept.last().map(String::as_str)),
            (MAX_ENDPOINTS, Some("198.51.100.7:51820"))
        );
        Ok(())
    }
}
