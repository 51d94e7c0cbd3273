//! The program's configuration: the optional file, and the forms of values that people write.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::str::FromStr;

use serde::Deserialize;

use crate::trust::HostLifetime;

/// Default port of control (udp) and API (tcp).
pub const DEFAULT_PORT: u16 = 7443;

/// Longest configuration file, in bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// The configuration file (TOML). What the command line says goes before it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Addresses and ports for hosts (udp) and the API (tcp); none means `[::]:7443`.
    pub listen: Vec<SocketAddr>,
    /// What to log, as `tracing`'s filters are written; none means `info`.
    pub log: Option<String>,
    /// How long the certificates of hosts live, from 10 s to 7 days, like `"24h"`, which it is if nothing is said.
    pub host_certificate_lifetime: HostLifetime,
}

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("{path} cannot be read")]
    Read {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its content is wrong.
    #[error("{path} is no configuration: {problem}")]
    Content {
        /// The file.
        path: String,
        /// What is wrong, and where.
        problem: String,
    },
}

impl Config {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let shown = path.display().to_string();
        let length = std::fs::metadata(path)
            .map_err(|source| ConfigError::Read {
                path: shown.clone(),
                source,
            })?
            .len();
        if length > MAX_CONFIG_BYTES {
            return Err(ConfigError::Content {
                path: shown,
                problem: "it is longer than 1 MiB".into(),
            });
        }
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: shown.clone(),
            source,
        })?;
        toml::from_str(&text).map_err(|error| ConfigError::Content {
            path: shown,
            problem: error.to_string(),
        })
    }
}

macro_rules! prefixes {
    ($($(#[$doc:meta])* $name:ident, $address:ty, $max:literal, $example:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub struct $name {
            /// The network's address.
            pub address: $address,
            /// The prefix's length.
            pub len: u8,
        }

        impl FromStr for $name {
            type Err = BadPrefix;
            fn from_str(text: &str) -> Result<Self, BadPrefix> {
                let bad = || BadPrefix { text: text.chars().take(80).collect(), example: $example };
                let (address, len) = text.split_once('/').ok_or_else(bad)?;
                let len = len.parse().ok().filter(|len| *len <= $max).ok_or_else(bad)?;
                Ok(Self { address: address.parse().map_err(|_| bad())?, len })
            }
        }
    )*};
}

prefixes! {
    /// An IPv4 prefix. Whether a mesh may have it is [`cloison_proto::net::OverlayRange`]'s to say.
    PrefixV4, Ipv4Addr, 32, "10.20.0.0/16";
    /// An IPv6 prefix. Whether a mesh may have it is [`cloison_proto::net::OverlayRange`]'s to say.
    PrefixV6, Ipv6Addr, 128, "fd12:3456:789a::/48";
}

/// Not a prefix.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no prefix: write it like {example}")]
pub struct BadPrefix {
    text: String,
    example: &'static str,
}

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
    /// An address and a port.
    #[must_use]
    pub fn of(address: std::net::IpAddr, port: u16) -> Self {
        Self {
            host: address.to_string(),
            port,
        }
    }

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
            Some(v6) => v6.parse::<Ipv6Addr>().is_ok(),
            None => host.parse::<Ipv4Addr>().is_ok() || is_dns_name(host),
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
    fn a_key_that_nobody_knows_is_an_error_with_its_place() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("c.toml");
        std::fs::write(&path, "listen = [\"127.0.0.1:1\"]\n")?;
        assert_eq!(Config::load(&path)?.listen, ["127.0.0.1:1".parse()?]);
        std::fs::write(&path, "\nlisen = []\n")?;
        let error = Config::load(&path).map_err(|e| e.to_string()).err().unwrap_or_default();
        assert!(error.contains("line 2") && error.contains("lisen"), "{error}");
        Ok(())
    }

    #[test]
    fn certificates_live_as_long_as_the_file_says_and_a_day_if_it_says_nothing() -> Result<(), Box<dyn std::error::Error>> {
        let lifetime = |text: &str| toml::from_str::<Config>(text).map(|config| config.host_certificate_lifetime.get().as_secs());
        assert_eq!(lifetime("")?, 86_400);
        for (text, seconds) in [("10s", 10), ("90m", 5_400), ("PT1H", 3_600), ("168h", 604_800)] {
            assert_eq!(lifetime(&format!("host_certificate_lifetime = \"{text}\""))?, seconds);
        }
        for bad in ["9s", "0s", "-1h", "169h"] {
            let error = lifetime(&format!("\nhost_certificate_lifetime = \"{bad}\""))
                .err()
                .ok_or(bad)?
                .to_string();
            assert!(error.contains("line 2") && error.contains("take 10s to 168h"), "{error}");
        }
        for bad in ["86400", "\"\"", "\"a day\"", "\"7d\""] {
            assert!(lifetime(&format!("host_certificate_lifetime = {bad}")).is_err(), "{bad}");
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
