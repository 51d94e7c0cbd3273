//! Identifiers: opaque, compared as bytes, each with its own type and text prefix, so that a host id can never stand where a token id belongs.
//!
//! Text form: prefix, underscore, lower-case hexadecimal of all bytes (`host_3f0a…`). Parsing is exact: other lengths, upper case and
//! missing prefixes are errors.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Why a text is not an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The text does not start with the prefix of this kind of id.
    #[error("expected an id that starts with `{expected}_`")]
    Prefix {
        /// The prefix that was expected, without its underscore.
        expected: &'static str,
    },
    /// The part behind the prefix is not the right number of lower-case hexadecimal digits.
    #[error("expected {digits} lower-case hexadecimal digits behind `{prefix}_`")]
    Digits {
        /// The prefix of this kind of id.
        prefix: &'static str,
        /// How many digits belong behind it.
        digits: usize,
    },
}

/// Writes `bytes` as lower-case hexadecimal.
pub(crate) fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|b| write!(f, "{b:02x}"))
}

/// Reads exactly `N` bytes of lower-case hexadecimal; `None` if the text is anything else.
pub(crate) fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |c: u8| match c {
        b'0'..=b'9' => c.checked_sub(b'0'),
        b'a'..=b'f' => c.checked_sub(b'a').and_then(|d| d.checked_add(10)),
        _ => None,
    };
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if pairs.len() != N || !rest.is_empty() {
        return None;
    }
    let mut out = [0; N];
    for (to, [high, low]) in out.iter_mut().zip(pairs) {
        *to = (digit(*high)? << 4) | digit(*low)?;
    }
    Some(out)
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident, $len:literal, $prefix:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            /// Text prefix of this kind of id, without its underscore.
            pub const PREFIX: &'static str = $prefix;
            /// Length in bytes.
            pub const LEN: usize = $len;
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!($prefix, "_"))?;
                write_hex(f, &self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                let digits = text
                    .strip_prefix(concat!($prefix, "_"))
                    .ok_or(IdError::Prefix { expected: $prefix })?;
                parse_hex(digits)
                    .map(Self)
                    .ok_or(IdError::Digits { prefix: $prefix, digits: $len * 2 })
            }
        }

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

        crate::wire::bytes_codec!($name, $len);
    )*};
}

ids! {
    /// One deployment: one set of trust roots, one address plan, one policy.
    MeshId, 16, "mesh";
    /// An enrolled machine. Random, drawn by the coordinator at enrollment; a host that enrolls again is another host.
    HostId, 16, "host";
    /// A rule: given by its author, or the hash of its canonical text.
    RuleId, 16, "rule";
    /// An enrollment token. Public: its secret is another part of the token's text.
    TokenId, 8, "token";
    /// A credential that authorises API calls. Public: its secret is another part of the credential's text.
    CredentialId, 8, "cred";
    /// The certificate authority, coordinator process or signing key that a certificate or signature names: the first bytes of the
    /// SHA-256 of its public key.
    KeyId, 8, "key";
    /// One coordinator process's identity, in its certificate.
    CoordinatorId, 16, "coordinator";
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn text_round_trips(bytes: [u8; 16]) {
            let id = HostId(bytes);
            prop_assert_eq!(id.to_string().parse::<HostId>(), Ok(id));
        }

        #[test]
        fn any_other_text_is_refused_without_panic(text in ".{0,50}") {
            if let Ok(id) = text.parse::<TokenId>() {
                prop_assert_eq!(id.to_string(), text);
            }
        }
    }

    #[test]
    fn an_id_of_another_kind_is_refused() {
        let host = HostId([7; 16]).to_string();
        assert_eq!(host.parse::<RuleId>(), Err(IdError::Prefix { expected: "rule" }));
        assert_eq!(host.to_uppercase().parse::<HostId>(), Err(IdError::Prefix { expected: "host" }));
        assert!("host_ABCD".parse::<HostId>().is_err());
    }
}
