//! The program's configuration: the data directory's layout, the optional file in it, and the forms of values that people write.

use std::fmt;
use std::str::FromStr;

/// `host:port` as people write it and as agents are told: an IPv4 address, a bracketed IPv6 address or a DNS name, and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort {
    host: String,
    port: u16,
}

/// Not `host:port`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no address: write host:port, like coordinator.example.org:7443, 192.0.2.1:7443 or [2001:db8::1]:7443")]
pub struct BadHostPort(String);

impl HostPort {
    /// The host: an address without brackets, or a name.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let brackets = self.host.contains(':');
        if brackets {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for HostPort {
    type Err = BadHostPort;
    fn from_str(text: &str) -> Result<Self, BadHostPort> {
        let bad = || BadHostPort(text.chars().take(80).collect());
        let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
        let port = port
            .parse::<u16>()
            .ok()
            .filter(|p| *p > 0 && !port.starts_with('+'))
            .ok_or_else(bad)?;
        let unbracketed = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        let good = match unbracketed {
            Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
            None => host.parse::<std::net::Ipv4Addr>().is_ok() || is_dns_name(host),
        };
        // A token has room for 72 characters of an address.
        if !good || text.len() > cloison_proto::token::MAX_ADDRESS_LEN {
            return Err(bad());
        }
        Ok(Self {
            host: unbracketed.unwrap_or(host).to_owned(),
            port,
        })
    }
}

/// Whether `text` is a name of DNS labels (RFC 1123 section 2.1) that cannot be mistaken for an address.
fn is_dns_name(text: &str) -> bool {
    let label = |l: &str| {
        let inside = l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        (1..=63).contains(&l.len()) && inside && !l.starts_with('-') && !l.ends_with('-')
    };
    let numeric_end = text.rsplit('.').next().is_some_and(|l| l.bytes().all(|b| b.is_ascii_digit()));
    text.len() <= 253 && text.split('.').all(label) && !numeric_end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_round_trip() -> Result<(), BadHostPort> {
        for text in ["192.0.2.1:7443", "[2001:db8::1]:7443", "coordinator.example.org:1", "c-1:65535"] {
            assert_eq!(text.parse::<HostPort>()?.to_string(), text);
        }
        Ok(())
    }

    #[test]
    fn other_texts_are_no_addresses() {
        for bad in [
            "",
            ":1",
            "a",
            "a:",
            "a:0",
            "a:65536",
            "a:+1",
            "2001:db8::1:7443",
            "[192.0.2.1]:1",
            "1.2.3:1",
            "a b:1",
            "-a:1",
            "a..b:1",
        ] {
            assert!(bad.parse::<HostPort>().is_err(), "{bad:?}");
        }
    }
}
