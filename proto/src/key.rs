//! Keys, one type per role, so that none can stand where another belongs. Private ones are zeroed when dropped, compared in constant time
//! or not at all, and never shown: their `Debug` says only what they are.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ed25519_dalek::Signer as _;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::id::KeyId;

/// Why a text or a byte string is not a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not base64 of 32 bytes.
    #[error("expected a key: 44 characters of base64")]
    Text,
    /// A point of low order: every agreement with it gives the same known secret.
    #[error("this key has low order: anyone could know its agreements")]
    LowOrder,
    /// Not a point on the curve.
    #[error("this is no Ed25519 public key")]
    NotAPoint,
}

/// A signature that does not verify.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the signature does not verify")]
pub struct BadSignature;

macro_rules! public_keys {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 32]);

        impl $name {
            /// The key's 32 bytes.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&STANDARD.encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = KeyError;
            fn from_str(text: &str) -> Result<Self, KeyError> {
                let bytes = STANDARD.decode(text).map_err(|_| KeyError::Text)?;
                Self::from_bytes(bytes.try_into().map_err(|_| KeyError::Text)?)
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }

        impl<C> minicbor::Encode<C> for $name {
            fn encode<W: minicbor::encode::Write>(
                &self,
                e: &mut minicbor::Encoder<W>,
                _: &mut C,
            ) -> Result<(), minicbor::encode::Error<W::Error>> {
                e.bytes(&self.0)?.ok()
            }
        }

        impl<'b, C> minicbor::Decode<'b, C> for $name {
            fn decode(d: &mut minicbor::Decoder<'b>, _: &mut C) -> Result<Self, minicbor::decode::Error> {
                let bytes = <[u8; 32]>::try_from(d.bytes()?)
                    .map_err(|_| minicbor::decode::Error::message("a key has 32 bytes"))?;
                Self::from_bytes(bytes).map_err(minicbor::decode::Error::message)
            }
        }
    )*};
}

public_keys! {
    /// A host's WireGuard key (X25519, RFC 7748). Never of low order.
    WgPublicKey;
    /// A host's identity key (Ed25519, RFC 8032): what its certificate speaks for. A valid point of large order.
    IdentityKey;
    /// A key with which a coordinator signs views, leases or trust items (Ed25519). A valid point of large order.
    VerifyingKey;
}

impl WgPublicKey {
    /// The key of these bytes.
    ///
    /// # Errors
    /// [`KeyError::LowOrder`] for the points whose agreement with any key is zero (RFC 7748 section 6.1).
    pub fn from_bytes(bytes: [u8; 32]) -> Result<Self, KeyError> {
        // A clamped scalar is a multiple of eight, so an agreement is zero exactly for the points of small order, whatever the scalar.
        let probe = x25519_dalek::x25519([0x42; 32], bytes);
        if probe == [0; 32] {
            Err(KeyError::LowOrder)
        } else {
            Ok(Self(bytes))
        }
    }
}

macro_rules! ed25519_public {
    ($($name:ident)*) => {$(
        impl $name {
            /// The key of these bytes.
            ///
            /// # Errors
            /// [`KeyError::NotAPoint`], and [`KeyError::LowOrder`] for points for which anyone can make signatures.
            pub fn from_bytes(bytes: [u8; 32]) -> Result<Self, KeyError> {
                let key = ed25519_dalek::VerifyingKey::from_bytes(&bytes).map_err(|_| KeyError::NotAPoint)?;
                if key.is_weak() { Err(KeyError::LowOrder) } else { Ok(Self(bytes)) }
            }

            /// Checks `signature` over `context`, a zero byte and `message` (strict verification, RFC 8032 section 5.1.7 with canonical S).
            ///
            /// # Errors
            /// [`BadSignature`].
            pub fn verify(&self, context: &str, message: &[u8], signature: &[u8; 64]) -> Result<(), BadSignature> {
                let key = ed25519_dalek::VerifyingKey::from_bytes(&self.0).map_err(|_| BadSignature)?;
                let signature = ed25519_dalek::Signature::from_bytes(signature);
                key.verify_strict(&signed_bytes(context, message), &signature).map_err(|_| BadSignature)
            }

            /// The short name of this key.
            #[must_use]
            pub fn id(&self) -> KeyId {
                key_id(&self.0)
            }
        }
    )*};
}

ed25519_public!(IdentityKey VerifyingKey);

fn signed_bytes(context: &str, message: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(context.len().saturating_add(message.len()).saturating_add(1));
    out.extend_from_slice(context.as_bytes());
    out.push(0);
    out.extend_from_slice(message);
    out
}

fn key_id(public: &[u8; 32]) -> KeyId {
    let digest = Sha256::digest(public);
    let mut id = [0; KeyId::LEN];
    for (to, from) in id.iter_mut().zip(digest) {
        *to = from;
    }
    KeyId(id)
}

/// A host's WireGuard private key. It is made on the host and never leaves it (I10).
#[derive(Zeroize, ZeroizeOnDrop)]
pub struct WgPrivateKey([u8; 32]);

impl WgPrivateKey {
    /// The key of these 32 random bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The key in WireGuard's text form (base64).
    ///
    /// # Errors
    /// [`KeyError::Text`].
    pub fn from_text(text: &str) -> Result<Self, KeyError> {
        let bytes = Zeroizing::new(STANDARD.decode(text.trim()).map_err(|_| KeyError::Text)?);
        let bytes: [u8; 32] = bytes.as_slice().try_into().map_err(|_| KeyError::Text)?;
        Ok(Self(bytes))
    }

    /// The key's text form, to be kept in a file of mode 0600.
    #[must_use]
    pub fn to_text(&self) -> Zeroizing<String> {
        Zeroizing::new(STANDARD.encode(self.0))
    }

    /// The key as the type of the curve's library: the only way to the secret, for the session layer and for the proof of possession.
    #[must_use]
    pub fn to_secret(&self) -> x25519_dalek::StaticSecret {
        x25519_dalek::StaticSecret::from(self.0)
    }

    /// The public key that belongs to this one.
    #[must_use]
    pub fn public(&self) -> WgPublicKey {
        // The product of the base point and a clamped scalar never has low order.
        WgPublicKey(x25519_dalek::PublicKey::from(&self.to_secret()).to_bytes())
    }
}

impl fmt::Debug for WgPrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WgPrivateKey(hidden)")
    }
}

/// A 32-byte secret: of a token, of a credential, or a pairwise PSK.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Secret32([u8; 32]);

impl Secret32 {
    /// The secret of these random bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes: for the one place that uses them.
    #[must_use]
    pub const fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    /// What is kept at rest: SHA-256. The secret has 256 bits of entropy, so that a slow hash would add nothing.
    #[must_use]
    pub fn hash(&self) -> [u8; 32] {
        Sha256::digest(self.0).into()
    }

    /// Whether this is the secret of that hash, in constant time.
    #[must_use]
    pub fn matches(&self, hash: &[u8; 32]) -> bool {
        subtle::ConstantTimeEq::ct_eq(self.hash().as_slice(), hash.as_slice()).into()
    }
}

impl fmt::Debug for Secret32 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret32(hidden)")
    }
}

/// An Ed25519 private key: a host's identity, or a coordinator's signing key.
pub struct SigningKey(ed25519_dalek::SigningKey);

impl SigningKey {
    /// The key of this 32-byte random seed (RFC 8032 section 5.1.5).
    #[must_use]
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(ed25519_dalek::SigningKey::from_bytes(seed))
    }

    /// The seed, to be kept in a file of mode 0600.
    #[must_use]
    pub fn seed(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.0.to_bytes())
    }

    /// The key in PKCS #8 (RFC 8410, version 1), as TLS libraries want it.
    #[must_use]
    pub fn to_pkcs8(&self) -> Zeroizing<Vec<u8>> {
        /// SEQUENCE { INTEGER 0, SEQUENCE { OID 1.3.101.112 }, OCTET STRING { OCTET STRING } }: all that stands before the seed.
        const PREFIX: [u8; 16] = [
            0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20,
        ];
        let mut der = Zeroizing::new(Vec::with_capacity(48));
        der.extend_from_slice(&PREFIX);
        der.extend_from_slice(self.seed().as_slice());
        der
    }

    /// The public key, as a coordinator's.
    #[must_use]
    pub fn verifying(&self) -> VerifyingKey {
        VerifyingKey(self.0.verifying_key().to_bytes())
    }

    /// The public key, as a host's identity.
    #[must_use]
    pub fn identity(&self) -> IdentityKey {
        IdentityKey(self.0.verifying_key().to_bytes())
    }

    /// Signs `context`, a zero byte and `message`. Each kind of object has a context of its own.
    #[must_use]
    pub fn sign(&self, context: &str, message: &[u8]) -> [u8; 64] {
        self.0.sign(&signed_bytes(context, message)).to_bytes()
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey({}, hidden)", self.verifying().id())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_secret_is_shown() {
        let seed = [0xa5; 32];
        let shown = format!(
            "{:?} {:?} {:?}",
            WgPrivateKey::from_bytes(seed),
            SigningKey::from_seed(&seed),
            Secret32::from_bytes(seed)
        );
        assert!(
            !shown.to_lowercase().contains("a5a5") && !shown.contains(&STANDARD.encode(seed)),
            "{shown}"
        );
    }

    #[test]
    fn low_order_points_are_no_keys() {
        // The list of RFC 7748's small-order points, as kept by the reference implementations.
        let mut order8 = [0; 32];
        order8.copy_from_slice(
            &crate::id::parse_hex::<32>("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800").unwrap_or_default(),
        );
        let mut one = [0; 32];
        one[0] = 1;
        for point in [[0; 32], one, order8] {
            assert_eq!(WgPublicKey::from_bytes(point), Err(KeyError::LowOrder));
        }
        assert!(IdentityKey::from_bytes(one).is_err());
    }

    #[test]
    fn a_signature_holds_for_its_context_only() {
        let key = SigningKey::from_seed(&[3; 32]);
        let signature = key.sign("a/v1", b"x");
        assert_eq!(key.verifying().verify("a/v1", b"x", &signature), Ok(()));
        assert_eq!(key.verifying().verify("a/v2", b"x", &signature), Err(BadSignature));
        assert_eq!(key.verifying().verify("a/v1", b"y", &signature), Err(BadSignature));
    }

    #[test]
    fn keys_round_trip_through_text() {
        let private = WgPrivateKey::from_bytes([9; 32]);
        let public = private.public();
        assert_eq!(public.to_string().parse(), Ok(public));
        assert_eq!(WgPrivateKey::from_text(&private.to_text()).map(|k| k.public()), Ok(public));
        assert!("AAAA".parse::<WgPublicKey>().is_err());
    }
}
