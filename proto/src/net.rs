//! Addresses, protocols and ports: parse-only constructors, so that an address that may not stand inside the mesh never becomes a value.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

/// Why something is not an address, a prefix, a port or a protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetError {
    /// Not usable as an instance's address.
    #[error("{0} cannot be an overlay address")]
    NotOverlay(IpAddr),
    /// The prefix is outside the ranges from which a mesh may draw.
    #[error(
        "{0} cannot be an overlay prefix: IPv4 needs a /8 to /24 inside 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16 or 100.64.0.0/10, IPv6 a /48 inside fd00::/8"
    )]
    NotPrefix(String),
    /// A port range that is empty, inverted or no number.
    #[error("`{0}` is no port or port range: write 5432 or 8000-8100")]
    Ports(String),
    /// Not `tcp`, `udp` or `icmp`.
    #[error("`{0}` is no protocol: write tcp, udp or icmp")]
    Protocol(String),
}

/// What a rule can grant. ICMP means echo in both families.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cbor(index_only)]
pub enum Protocol {
    /// TCP.
    #[n(6)]
    Tcp,
    /// UDP.
    #[n(17)]
    Udp,
    /// ICMP and ICMPv6 echo.
    #[n(1)]
    Icmp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        })
    }
}

impl FromStr for Protocol {
    type Err = NetError;
    fn from_str(text: &str) -> Result<Self, NetError> {
        match text {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            "icmp" => Ok(Self::Icmp),
            other => Err(NetError::Protocol(other.into())),
        }
    }
}

/// Ports `first..=last`, never empty, never zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    /// Every port.
    pub const ALL: Self = Self { first: 1, last: u16::MAX };

    /// The range `first..=last`; an error if it is empty or begins at zero.
    ///
    /// # Errors
    /// [`NetError::Ports`].
    pub fn new(first: u16, last: u16) -> Result<Self, NetError> {
        if first == 0 || first > last {
            return Err(NetError::Ports(format!("{first}-{last}")));
        }
        Ok(Self { first, last })
    }

    /// The first port.
    #[must_use]
    pub const fn first(self) -> u16 {
        self.first
    }

    /// The last port.
    #[must_use]
    pub const fn last(self) -> u16 {
        self.last
    }

    /// Whether `port` lies in the range.
    #[must_use]
    pub const fn contains(self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

impl FromStr for PortRange {
    type Err = NetError;
    fn from_str(text: &str) -> Result<Self, NetError> {
        let port = |t: &str| match t.as_bytes().first() {
            Some(b'1'..=b'9') => t.parse::<u16>().ok(),
            _ => None,
        };
        let range = match text.split_once('-') {
            None => port(text).map(|p| (p, p)),
            Some((first, last)) => port(first).zip(port(last)),
        };
        range
            .and_then(|(first, last)| Self::new(first, last).ok())
            .ok_or_else(|| NetError::Ports(text.into()))
    }
}

/// What a rule or a service opens: a protocol, and its ports unless the protocol has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PortSpec {
    /// TCP to these ports.
    Tcp(PortRange),
    /// UDP to these ports.
    Udp(PortRange),
    /// ICMP and ICMPv6 echo.
    Icmp,
}

impl PortSpec {
    /// The protocol.
    #[must_use]
    pub const fn protocol(self) -> Protocol {
        match self {
            Self::Tcp(_) => Protocol::Tcp,
            Self::Udp(_) => Protocol::Udp,
            Self::Icmp => Protocol::Icmp,
        }
    }

    /// Whether a packet of `protocol` to destination port `port` is meant; for ICMP echo the port does not count.
    #[must_use]
    pub const fn covers(self, protocol: Protocol, port: u16) -> bool {
        match (self, protocol) {
            (Self::Tcp(range), Protocol::Tcp) | (Self::Udp(range), Protocol::Udp) => range.contains(port),
            (Self::Icmp, Protocol::Icmp) => true,
            _ => false,
        }
    }
}

impl fmt::Display for PortSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(range) => write!(f, "tcp/{range}"),
            Self::Udp(range) => write!(f, "udp/{range}"),
            Self::Icmp => f.write_str("icmp"),
        }
    }
}

impl FromStr for PortSpec {
    type Err = NetError;
    fn from_str(text: &str) -> Result<Self, NetError> {
        match text.split_once('/') {
            None if text == "icmp" => Ok(Self::Icmp),
            None => Err(NetError::Protocol(text.into())),
            Some((protocol, ports)) => match protocol.parse()? {
                Protocol::Tcp => ports.parse().map(Self::Tcp),
                Protocol::Udp => ports.parse().map(Self::Udp),
                Protocol::Icmp => Err(NetError::Ports(ports.into())),
            },
        }
    }
}

crate::wire::text_codec!(PortSpec);

impl Serialize for PortSpec {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PortSpec {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Whether an address may stand in an inner packet at all: no multicast, broadcast, loopback, unspecified, link-local or v4-mapped address.
#[must_use]
pub fn is_unicast_overlay(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => {
            let [first, ..] = a.octets();
            !(first == 0 || a.is_loopback() || a.is_link_local() || first >= 224)
        }
        IpAddr::V6(a) => {
            let link_local = a.segments().first().is_some_and(|s| s & 0xffc0 == 0xfe80);
            !(a.is_multicast() || a.is_loopback() || a.is_unspecified() || link_local || a.to_ipv4_mapped().is_some())
        }
    }
}

/// The two addresses of one instance. **The overlay source address is the identity**: exact, never a prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressPair {
    /// The IPv4 address (/32).
    pub v4: Ipv4Addr,
    /// The IPv6 address (/128).
    pub v6: Ipv6Addr,
}

impl AddressPair {
    /// Both addresses.
    #[must_use]
    pub const fn both(self) -> [IpAddr; 2] {
        [IpAddr::V4(self.v4), IpAddr::V6(self.v6)]
    }

    /// The address of the same family as `other`.
    #[must_use]
    pub const fn of_family(self, other: IpAddr) -> IpAddr {
        match other {
            IpAddr::V4(_) => IpAddr::V4(self.v4),
            IpAddr::V6(_) => IpAddr::V6(self.v6),
        }
    }
}

/// The ranges from which a mesh draws its addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverlayRange {
    /// Network address of the IPv4 range.
    v4: Ipv4Addr,
    /// Length of the IPv4 prefix, 8 to 24.
    v4_len: u8,
    /// Network address of the IPv6 /48.
    v6: Ipv6Addr,
}

impl OverlayRange {
    /// Prefix length of every mesh's IPv6 range (RFC 4193 section 3.1).
    pub const V6_LEN: u8 = 48;

    /// How many addresses at the start of both ranges are never an instance's.
    pub const RESERVED: u32 = 256;

    /// The number of the resolver's addresses, in IPv4 and IPv6 as people write it: `10.77.0.53`, `fd12:3456:789a::53`.
    const RESOLVER: (u32, u128) = (53, 0x53);

    /// The ranges `v4/v4_len` and `v6/48`; host bits must be zero.
    ///
    /// # Errors
    /// [`NetError::NotPrefix`].
    pub fn new(v4: Ipv4Addr, v4_len: u8, v6: Ipv6Addr) -> Result<Self, NetError> {
        let inside = |net: [u8; 4], len: u8| v4_len >= len && u32::from(v4) & mask4(len) == u32::from(Ipv4Addr::from(net));
        let private = [
            ([10, 0, 0, 0], 8),
            ([172, 16, 0, 0], 12),
            ([192, 168, 0, 0], 16),
            ([100, 64, 0, 0], 10),
        ];
        let v4_good =
            (8..=24).contains(&v4_len) && u32::from(v4) & !mask4(v4_len) == 0 && private.iter().any(|(net, len)| inside(*net, *len));
        if !v4_good {
            return Err(NetError::NotPrefix(format!("{v4}/{v4_len}")));
        }
        let v6_good = v6.octets().first() == Some(&0xfd) && u128::from(v6) & !mask6() == 0;
        if !v6_good {
            return Err(NetError::NotPrefix(format!("{v6}/48")));
        }
        Ok(Self { v4, v4_len, v6 })
    }

    /// The IPv4 network address and prefix length.
    #[must_use]
    pub const fn v4(self) -> (Ipv4Addr, u8) {
        (self.v4, self.v4_len)
    }

    /// The IPv6 network address; its prefix length is [`OverlayRange::V6_LEN`].
    #[must_use]
    pub const fn v6(self) -> (Ipv6Addr, u8) {
        (self.v6, Self::V6_LEN)
    }

    /// Whether `address` lies in the range of its family.
    #[must_use]
    pub fn contains(self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(a) => u32::from(a) & mask4(self.v4_len) == u32::from(self.v4),
            IpAddr::V6(a) => u128::from(a) & mask6() == u128::from(self.v6),
        }
    }

    /// How many instances the IPv4 range has room for: all but the reserved ones and the last.
    #[must_use]
    pub fn capacity(self) -> u32 {
        (!mask4(self.v4_len)).saturating_sub(Self::RESERVED)
    }

    /// The pair of addresses number `index` (0 to `capacity() - 1`), behind the reserved ones; `None` beyond.
    #[must_use]
    pub fn nth(self, index: u32) -> Option<AddressPair> {
        if index >= self.capacity() {
            return None;
        }
        let offset = index.checked_add(Self::RESERVED)?;
        Some(AddressPair {
            v4: Ipv4Addr::from(u32::from(self.v4) | offset),
            v6: Ipv6Addr::from(u128::from(self.v6) | u128::from(offset)),
        })
    }

    /// The reserved addresses at which each agent answers for names, inside its host alone: number 53 of the IPv4 range, `::53` of the IPv6
    /// range. Never an instance's.
    #[must_use]
    pub fn resolver(self) -> AddressPair {
        let (v4, v6) = Self::RESOLVER;
        AddressPair {
            v4: Ipv4Addr::from(u32::from(self.v4) | v4),
            v6: Ipv6Addr::from(u128::from(self.v6) | v6),
        }
    }
}

impl fmt::Display for OverlayRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}, {}/{}", self.v4, self.v4_len, self.v6, Self::V6_LEN)
    }
}

/// The netmask of an IPv4 prefix; `len` is at most 32.
fn mask4(len: u8) -> u32 {
    u32::MAX.checked_shl(32u32.saturating_sub(u32::from(len))).unwrap_or(0)
}

fn mask6() -> u128 {
    u128::MAX << (128 - 48)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range() -> Result<OverlayRange, NetError> {
        OverlayRange::new(
            [10, 77, 0, 0].into(),
            16,
            "fd12:3456:789a::".parse().map_err(|_| NetError::NotPrefix(String::new()))?,
        )
    }

    proptest! {
        #[test]
        fn port_specs_round_trip(first in 1u16.., last in 1u16.., tcp: bool) {
            if let Ok(ports) = PortRange::new(first, last) {
                let spec = if tcp { PortSpec::Tcp(ports) } else { PortSpec::Udp(ports) };
                prop_assert_eq!(spec.to_string().parse(), Ok(spec));
            } else {
                prop_assert!(first > last);
            }
        }

        #[test]
        fn every_drawn_address_lies_in_the_range_and_is_usable(index in 0u32..70_000) {
            let range = range().map_err(|e| TestCaseError::fail(e.to_string()))?;
            match range.nth(index) {
                Some(pair) => for a in pair.both() {
                    prop_assert!(range.contains(a) && is_unicast_overlay(a));
                },
                None => prop_assert!(index >= range.capacity()),
            }
        }
    }

    #[test]
    fn the_pool_ends_before_the_broadcast_address() -> Result<(), NetError> {
        let range = range()?;
        assert_eq!(range.capacity(), 65_536 - 256 - 1);
        assert_eq!(range.nth(range.capacity() - 1).map(|p| p.v4), Some([10, 77, 255, 254].into()));
        assert_eq!(range.nth(0).map(|p| p.v4), Some([10, 77, 1, 0].into()));
        Ok(())
    }

    #[test]
    fn the_resolver_has_reserved_addresses_that_read_as_53() -> Result<(), NetError> {
        let resolver = range()?.resolver();
        assert_eq!(resolver.both().map(|a| a.to_string()), ["10.77.0.53", "fd12:3456:789a::53"]);
        let first = range()?.nth(0).map(|pair| (u32::from(pair.v4), u128::from(pair.v6)));
        assert!(first.is_some_and(|(v4, v6)| u32::from(resolver.v4) < v4 && u128::from(resolver.v6) < v6));
        Ok(())
    }

    #[test]
    fn prefixes_that_are_public_or_have_host_bits_are_refused() {
        let v6: Ipv6Addr = [0xfd12, 0, 0, 0, 0, 0, 0, 0].into();
        assert!(OverlayRange::new([11, 0, 0, 0].into(), 16, v6).is_err());
        assert!(OverlayRange::new([10, 0, 0, 1].into(), 16, v6).is_err());
        assert!(OverlayRange::new([10, 0, 0, 0].into(), 7, v6).is_err());
        assert!(OverlayRange::new([10, 0, 0, 0].into(), 16, [0x2001, 0, 0, 0, 0, 0, 0, 0].into()).is_err());
        assert!(OverlayRange::new([10, 0, 0, 0].into(), 16, [0xfd12, 0, 0, 1, 0, 0, 0, 0].into()).is_err());
    }

    #[test]
    fn port_texts_are_exact() {
        for bad in ["", "0", "65536", "-1", "1-", "-", "2-1", "0-5", "+1", "01", "1-2-3", " 1"] {
            assert!(bad.parse::<PortRange>().is_err(), "{bad:?}");
        }
        assert!("icmp/1".parse::<PortSpec>().is_err() && "sctp/1".parse::<PortSpec>().is_err());
    }

    #[test]
    fn special_addresses_never_stand_inside_the_mesh() {
        for bad in [
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "169.254.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "ff02::1",
            "fe80::1",
            "::ffff:10.0.0.1",
        ] {
            assert!(!bad.parse().is_ok_and(is_unicast_overlay), "{bad}");
        }
    }
}
