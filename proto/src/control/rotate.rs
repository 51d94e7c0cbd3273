//! A host changes its WireGuard key while its link stands.
//!
//! The agent says [`KeyOffer`]; the coordinator answers with a [`KeyChallenge`] made for this offer alone; the agent proves both keys with a
//! [`KeyProof`]. As at a join, the identity key *signs* and the new WireGuard key *agrees*, both over this TLS session's exporter, so that
//! neither whoever holds a certificate without its key nor whoever saw a proof can give a host another key. There is no word for success:
//! the host's next view names the key. [`KeyDenied`] says why not.

use hmac::{Hmac, Mac as _};
use minicbor::{Decode, Encode};
use sha2::Sha256;
use x25519_dalek::{PublicKey, StaticSecret};

use super::join::EXPORTER_LEN;
use crate::id::HostId;
use crate::key::{BadSignature, IdentityKey, SigningKey, WgPrivateKey, WgPublicKey};

const CONTEXT: &str = "cloison/rotate/v1";

/// The agent wants to prove a new WireGuard key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct KeyOffer {}

/// What the proof of a new WireGuard key has to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct KeyChallenge {
    /// An X25519 public key made for this offer alone.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub ephemeral: [u8; 32],
}

/// The new WireGuard key, proven.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct KeyProof {
    /// The new key.
    #[n(0)]
    pub wg_key: WgPublicKey,
    /// Signature by the host's identity key.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub identity_proof: [u8; 64],
    /// MAC by the new key's agreement with the challenge.
    #[cbor(n(2), with = "minicbor::bytes")]
    pub wg_proof: [u8; 32],
    /// The host has none of the keys that its view names: a coordinator restored from a backup named a key that the host gave up. There is
    /// no overlap then: the former key is nobody's, or a thief's.
    #[n(3)]
    pub alone: Option<bool>,
}

/// The new key is not taken; the old one stays.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct KeyDenied {
    /// The key.
    #[n(0)]
    pub wg_key: WgPublicKey,
    /// Stable code: `proof`, `key_known`, `rate`, `unavailable`.
    #[n(1)]
    pub code: String,
}

/// An operator asks for a new WireGuard key: the agent makes one, as it does by itself from time to time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct RotateKey {}

/// The facts of one rotation, over which both proofs are made.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// The TLS session's exporter value.
    pub exporter: &'a [u8; EXPORTER_LEN],
    /// The host.
    pub host: HostId,
    /// The public half of the challenge.
    pub ephemeral: &'a [u8; 32],
    /// Whether the new key is the only one that the host has.
    pub alone: bool,
}

impl Facts<'_> {
    fn transcript(&self, identity: &IdentityKey, wg_key: &WgPublicKey) -> Vec<u8> {
        [
            &self.exporter[..],
            &self.host.0,
            identity.as_bytes(),
            wg_key.as_bytes(),
            self.ephemeral,
            &[u8::from(self.alone)],
        ]
        .concat()
    }
}

fn mac(shared: &[u8; 32], transcript: &[u8]) -> Hmac<Sha256> {
    match Hmac::<Sha256>::new_from_slice(shared) {
        Ok(mac) => mac.chain_update(CONTEXT.as_bytes()).chain_update([0]).chain_update(transcript),
        Err(_) => unreachable!("HMAC takes keys of any length (RFC 2104)"),
    }
}

/// Proves a new key, on the host.
#[must_use]
pub fn prove(facts: Facts<'_>, identity: &SigningKey, wg_key: &WgPrivateKey) -> KeyProof {
    let public = wg_key.public();
    let transcript = facts.transcript(&identity.identity(), &public);
    let shared = wg_key.to_secret().diffie_hellman(&PublicKey::from(*facts.ephemeral));
    KeyProof {
        wg_key: public,
        identity_proof: identity.sign(CONTEXT, &transcript),
        wg_proof: mac(shared.as_bytes(), &transcript).finalize().into_bytes().into(),
        alone: facts.alone.then_some(true),
    }
}

/// Checks both proofs of a new key for the host whose identity key this is, with the secret half of the challenge.
///
/// # Errors
/// [`BadSignature`] if either does not hold.
pub fn verify(
    exporter: &[u8; EXPORTER_LEN],
    host: HostId,
    identity: &IdentityKey,
    proof: &KeyProof,
    ephemeral: &StaticSecret,
) -> Result<(), BadSignature> {
    let public = PublicKey::from(ephemeral).to_bytes();
    let facts = Facts {
        exporter,
        host,
        ephemeral: &public,
        alone: proof.alone.unwrap_or(false),
    };
    let transcript = facts.transcript(identity, &proof.wg_key);
    identity.verify(CONTEXT, &transcript, &proof.identity_proof)?;
    let shared = ephemeral.diffie_hellman(&PublicKey::from(*proof.wg_key.as_bytes()));
    mac(shared.as_bytes(), &transcript)
        .verify_slice(&proof.wg_proof)
        .map_err(|_| BadSignature)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: HostId = HostId([3; 16]);

    fn proof(exporter: &[u8; 32], host: HostId, identity: u8, wg: u8, ephemeral: &StaticSecret) -> KeyProof {
        let public = PublicKey::from(ephemeral).to_bytes();
        let facts = Facts {
            exporter,
            host,
            ephemeral: &public,
            alone: false,
        };
        prove(facts, &SigningKey::from_seed(&[identity; 32]), &WgPrivateKey::from_bytes([wg; 32]))
    }

    #[test]
    fn a_new_key_is_proven_for_this_session_this_host_and_this_challenge_only() {
        let (ephemeral, other) = (StaticSecret::from([7; 32]), StaticSecret::from([8; 32]));
        let identity = SigningKey::from_seed(&[1; 32]).identity();
        let good = proof(&[5; 32], HOST, 1, 2, &ephemeral);
        assert_eq!(verify(&[5; 32], HOST, &identity, &good, &ephemeral), Ok(()));
        let refused = |exporter: &[u8; 32], host, proof: &KeyProof, ephemeral| {
            assert_eq!(verify(exporter, host, &identity, proof, ephemeral), Err(BadSignature));
        };
        refused(&[6; 32], HOST, &good, &ephemeral);
        refused(&[5; 32], HostId([4; 16]), &good, &ephemeral);
        refused(&[5; 32], HOST, &good, &other);
        let more_than_was_signed = KeyProof {
            alone: Some(true),
            ..good.clone()
        };
        refused(&[5; 32], HOST, &more_than_was_signed, &ephemeral);
        let stolen = KeyProof {
            wg_key: WgPrivateKey::from_bytes([9; 32]).public(),
            ..good.clone()
        };
        refused(&[5; 32], HOST, &stolen, &ephemeral);
        let without_the_identity_key = proof(&[5; 32], HOST, 9, 2, &ephemeral);
        refused(&[5; 32], HOST, &without_the_identity_key, &ephemeral);
        let without_the_wireguard_key = KeyProof {
            wg_proof: without_the_identity_key.wg_proof,
            ..good
        };
        refused(&[5; 32], HOST, &without_the_wireguard_key, &ephemeral);
    }
}
