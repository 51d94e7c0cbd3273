//! Signed objects: the exact bytes, who signed them, and the signature. Verify, then parse; nothing is re-encoded.

use minicbor::{Decode, Encode};

use crate::id::KeyId;
use crate::key::{BadSignature, SigningKey, VerifyingKey};
use crate::wire;

/// Bytes with a signature over a context, a zero byte and the bytes. The context says what kind of object it is and which version of it,
/// so that no object passes for another.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Signed {
    /// What is signed, in its own encoding.
    #[cbor(n(0), with = "minicbor::bytes")]
    body: Vec<u8>,
    /// The short name of the signing key.
    #[n(1)]
    signer: KeyId,
    /// Ed25519 (RFC 8032).
    #[cbor(n(2), with = "minicbor::bytes")]
    signature: [u8; 64],
}

/// Why a signed object is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum SignedError {
    /// None of the trusted keys has the name that the object gives.
    #[error("signed by {0}, which is not trusted here")]
    UnknownSigner(KeyId),
    /// The signature is wrong.
    #[error(transparent)]
    Signature(#[from] BadSignature),
    /// The signature holds, but its content cannot be read.
    #[error("the signed content cannot be read")]
    Content(#[source] minicbor::decode::Error),
}

/// The keys that are trusted for one kind of object.
pub trait Keys {
    /// The key of this short name, if it is trusted.
    fn key(&self, id: KeyId) -> Option<VerifyingKey>;
}

impl Keys for VerifyingKey {
    fn key(&self, id: KeyId) -> Option<VerifyingKey> {
        (self.id() == id).then_some(*self)
    }
}

impl Keys for [VerifyingKey] {
    fn key(&self, id: KeyId) -> Option<VerifyingKey> {
        self.iter().copied().find(|k| k.id() == id)
    }
}

impl Signed {
    /// Signs the encoding of `content`.
    #[must_use]
    pub fn new<T: Encode<()>>(context: &str, key: &SigningKey, content: &T) -> Self {
        let body = wire::encode(content);
        let signature = key.sign(context, &body);
        Self {
            body,
            signer: key.verifying().id(),
            signature,
        }
    }

    /// The content, if a trusted key signed exactly it for this context.
    ///
    /// # Errors
    /// [`SignedError`].
    pub fn open<'a, T: Decode<'a, ()>>(&'a self, context: &str, keys: &(impl Keys + ?Sized)) -> Result<T, SignedError> {
        let key = keys.key(self.signer).ok_or(SignedError::UnknownSigner(self.signer))?;
        key.verify(context, &self.body, &self.signature)?;
        wire::decode_all(&self.body).map_err(SignedError::Content)
    }

    /// Whether the content is a map with fields beyond the first `known`, or cannot be read as one.
    #[must_use]
    pub fn has_later_fields(&self, known: u32) -> bool {
        wire::has_later_fields(&self.body, known).unwrap_or(true)
    }

    /// The content, whoever signed it: to be shown, never to be trusted.
    ///
    /// # Errors
    /// [`SignedError::Content`].
    pub fn peek<'a, T: Decode<'a, ()>>(&'a self) -> Result<T, SignedError> {
        wire::decode_all(&self.body).map_err(SignedError::Content)
    }

    /// The object as bytes, to be stored or sent.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        wire::encode(self)
    }

    /// The object of these bytes, not verified yet.
    ///
    /// # Errors
    /// [`SignedError::Content`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SignedError> {
        wire::decode_all(bytes).map_err(SignedError::Content)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::version::Version;

    #[test]
    fn any_changed_bit_is_noticed() -> Result<(), SignedError> {
        let key = SigningKey::from_seed(&[1; 32]);
        let version = Version {
            generation: 1_700_000_000,
            revision: 4,
        };
        let bytes = Signed::new("test/v1", &key, &version).to_bytes();
        assert_eq!(Signed::from_bytes(&bytes)?.open::<Version>("test/v1", &key.verifying())?, version);
        for position in 0..bytes.len() {
            for bit in 0..8 {
                let mut changed = bytes.clone();
                if let Some(b) = changed.get_mut(position) {
                    *b ^= 1 << bit;
                }
                let opened = Signed::from_bytes(&changed).and_then(|s| s.open::<Version>("test/v1", &key.verifying()));
                assert!(opened.is_err(), "byte {position} bit {bit}");
            }
        }
        Ok(())
    }

    #[test]
    fn an_object_of_one_kind_does_not_pass_for_another() {
        let key = SigningKey::from_seed(&[1; 32]);
        let signed = Signed::new("lease/v1", &key, &Version::default());
        assert!(matches!(
            signed.open::<Version>("view/v1", &key.verifying()),
            Err(SignedError::Signature(_))
        ));
        let other = SigningKey::from_seed(&[2; 32]);
        assert!(matches!(
            signed.open::<Version>("lease/v1", &other.verifying()),
            Err(SignedError::UnknownSigner(_))
        ));
    }
}
