//! What a token binds a joining host to: its name, and where it may come from.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use cloison_proto::label::HostName;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Longest prefix of a pattern: what leaves room for six made-up characters in a name.
const MAX_PREFIX_LEN: usize = 63 - SUFFIX_LEN;

/// How many characters the coordinator makes up.
pub(crate) const SUFFIX_LEN: usize = 6;

/// Which name a joining host gets. A host never names itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NameRule {
    /// This one: given, so that `on: NAME` matches it.
    Exact(HostName),
    /// This prefix and six made-up characters: written `db-*`. Not a given name.
    Pattern(Box<str>),
    /// `host-` and six made-up characters: written `*`. Not a given name.
    Made,
}

/// Neither a name nor a pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no host name and no pattern: write db-1, db-* or *")]
pub struct BadNameRule(String);

impl NameRule {
    /// The name made of this rule and six characters.
    ///
    /// # Errors
    /// [`BadNameRule`] if that is no name, which the constructors rule out.
    pub(crate) fn name(&self, suffix: &str) -> Result<HostName, BadNameRule> {
        match self {
            Self::Exact(name) => Ok(name.clone()),
            Self::Pattern(prefix) => format!("{prefix}{suffix}").parse().map_err(|_| BadNameRule(self.to_string())),
            Self::Made => format!("host-{suffix}").parse().map_err(|_| BadNameRule(self.to_string())),
        }
    }
}

impl fmt::Display for NameRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => name.fmt(f),
            Self::Pattern(prefix) => write!(f, "{prefix}*"),
            Self::Made => f.write_str("*"),
        }
    }
}

impl FromStr for NameRule {
    type Err = BadNameRule;
    fn from_str(text: &str) -> Result<Self, BadNameRule> {
        let bad = || BadNameRule(text.chars().take(80).collect());
        match text.strip_suffix('*') {
            Some("") => Ok(Self::Made),
            Some(prefix) => {
                let example = format!("{prefix}000000");
                let good = prefix.len() <= MAX_PREFIX_LEN && example.parse::<HostName>().is_ok();
                if good { Ok(Self::Pattern(prefix.into())) } else { Err(bad()) }
            }
            None => text.parse().map(Self::Exact).map_err(|_| bad()),
        }
    }
}

/// The addresses from which a token may be used: a CIDR prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceRule {
    network: IpAddr,
    len: u8,
}

/// Not a CIDR prefix.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no prefix: write 192.0.2.0/24 or 2001:db8::/32, with zero bits behind the prefix")]
pub struct BadSourceRule(String);

impl SourceRule {
    /// Whether `address` lies in the prefix. A v4-mapped address counts as the IPv4 address it stands for.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let (network, bits) = address_bits(self.network);
        let (other, other_bits) = address_bits(address.to_canonical());
        bits == other_bits && network == other & prefix_mask(self.len, bits)
    }
}

/// The address as a number, and how many bits it has.
fn address_bits(address: IpAddr) -> (u128, u8) {
    match address {
        IpAddr::V4(a) => (u128::from(u32::from(a)), 32),
        IpAddr::V6(a) => (u128::from(a), 128),
    }
}

/// The upper `len` of `bits` bits.
fn prefix_mask(len: u8, bits: u8) -> u128 {
    let host_bits = u32::from(bits.saturating_sub(len));
    u128::MAX.checked_shl(host_bits).unwrap_or(0)
}

impl fmt::Display for SourceRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.len)
    }
}

impl FromStr for SourceRule {
    type Err = BadSourceRule;
    fn from_str(text: &str) -> Result<Self, BadSourceRule> {
        let bad = || BadSourceRule(text.chars().take(80).collect());
        let (network, len) = text.split_once('/').ok_or_else(bad)?;
        let network: IpAddr = network.parse().map_err(|_| bad())?;
        let len: u8 = len.parse().map_err(|_| bad())?;
        let (number, bits) = address_bits(network);
        if len > bits || number & !prefix_mask(len, bits) != 0 {
            return Err(bad());
        }
        Ok(Self { network, len })
    }
}

macro_rules! serde_as_text {
    ($($name:ident)*) => {$(
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}

serde_as_text!(NameRule SourceRule);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_rules_round_trip_and_others_are_refused() -> Result<(), BadNameRule> {
        for text in ["db-1", "db-*", "*", "a*"] {
            assert_eq!(text.parse::<NameRule>()?.to_string(), text);
        }
        for bad in ["", "-*", "DB-*", "d*b", "**", "a b", &format!("{}*", "a".repeat(58))] {
            assert!(bad.parse::<NameRule>().is_err(), "{bad}");
        }
        assert_eq!("db-*".parse::<NameRule>()?.name("x7k2p9")?.as_str(), "db-x7k2p9");
        Ok(())
    }

    #[test]
    fn a_source_rule_holds_exactly_its_prefix() -> Result<(), Box<dyn std::error::Error>> {
        let rule: SourceRule = "192.0.2.0/24".parse()?;
        assert!(rule.contains("192.0.2.255".parse()?) && rule.contains("::ffff:192.0.2.1".parse()?));
        assert!(!rule.contains("192.0.3.0".parse()?) && !rule.contains("2001:db8::1".parse()?));
        assert!("::/0".parse::<SourceRule>()?.contains("2001:db8::1".parse()?));
        assert!(
            !"::/0".parse::<SourceRule>()?.contains("192.0.2.1".parse()?),
            "one family never covers the other"
        );
        for bad in ["192.0.2.1/24", "192.0.2.0", "192.0.2.0/33", "x/8", "2001:db8::/129", "/8"] {
            assert!(bad.parse::<SourceRule>().is_err(), "{bad}");
        }
        Ok(())
    }
}
