//! Enrollment, and renewal for a host whose certificate ran out.
//!
//! Both proofs are bound to this TLS session by its exporter, so that neither can be carried to another: the identity key *signs* the
//! transcript; the WireGuard key, which cannot sign, *agrees* with the coordinator's ephemeral key and keys a MAC over it. A host that
//! cannot show both keys enrolls nothing.

use hmac::{Hmac, Mac as _};
use minicbor::{Decode, Encode};
use sha2::Sha256;
use x25519_dalek::{PublicKey, StaticSecret};

use super::agent::messages;
use super::frame::{Frame, FrameError, Message};
use crate::id::{HostId, MeshId, TokenId};
use crate::key::{BadSignature, IdentityKey, SigningKey, WgPrivateKey, WgPublicKey};
use crate::label::HostName;
use crate::signed::Signed;

/// Label of the TLS exporter (RFC 8446 section 7.5) over which both proofs are made.
pub const EXPORTER_LABEL: &[u8] = b"EXPERIMENTAL cloison join v1";

/// Length of the exporter's value.
pub const EXPORTER_LEN: usize = 32;

const CONTEXT_JOIN: &str = "cloison/join/v1";
const CONTEXT_RENEW: &str = "cloison/renew/v1";

/// The coordinator's first message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Challenge {
    /// An X25519 public key made for this stream alone.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub ephemeral: [u8; 32],
}

/// A host asks to be enrolled.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct JoinRequest {
    /// Which token.
    #[n(0)]
    pub token: TokenId,
    /// The token's secret.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub secret: [u8; 32],
    /// The host's identity key.
    #[n(2)]
    pub identity: IdentityKey,
    /// The host's WireGuard key.
    #[n(3)]
    pub wg_key: WgPublicKey,
    /// Signature by the identity key.
    #[cbor(n(4), with = "minicbor::bytes")]
    pub identity_proof: [u8; 64],
    /// MAC by the WireGuard key's agreement with the challenge.
    #[cbor(n(5), with = "minicbor::bytes")]
    pub wg_proof: [u8; 32],
    /// The agent's software version, for people.
    #[n(6)]
    pub software: String,
}

impl std::fmt::Debug for JoinRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "JoinRequest({}, hidden)", self.token)
    }
}

/// A host asks for a certificate by its identity key.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct RenewRequest {
    /// The host.
    #[n(0)]
    pub host: HostId,
    /// Its identity key.
    #[n(1)]
    pub identity: IdentityKey,
    /// Signature by the identity key.
    #[cbor(n(2), with = "minicbor::bytes")]
    pub identity_proof: [u8; 64],
}

/// The host is enrolled, or its certificate renewed.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Joined {
    /// The mesh.
    #[n(0)]
    pub mesh: MeshId,
    /// The host's id.
    #[n(1)]
    pub host: HostId,
    /// The host's name.
    #[n(2)]
    pub name: HostName,
    /// DER of the host's certificate.
    #[cbor(n(3), with = "minicbor::bytes")]
    pub certificate: Vec<u8>,
    /// The root's key: the joiner compares it with the pin of its token.
    #[cbor(n(4), with = "minicbor::bytes")]
    pub root: [u8; 32],
    /// Whom to trust ([`crate::trust::Trust`]).
    #[n(5)]
    pub trust: Vec<Signed>,
    /// Components that the policy in force puts on this host, for the joiner's output.
    #[n(6)]
    pub components: Vec<crate::label::ComponentName>,
}

/// Refused. All refusals look alike from outside; the coordinator's audit has the cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Denied {}

messages! {
    /// Any message of a join stream.
    JoinMessage {
        201 Challenge,
        202 JoinRequest,
        203 RenewRequest,
        204 Joined,
        205 Denied,
    }
}

/// What both proofs are over: the exporter, the mesh's answerless facts and the keys.
fn transcript(exporter: &[u8; EXPORTER_LEN], token: TokenId, identity: &IdentityKey, wg_key: &WgPublicKey) -> Vec<u8> {
    [&exporter[..], &token.0, identity.as_bytes(), wg_key.as_bytes()].concat()
}

fn wg_mac(shared: &[u8; 32], transcript: &[u8]) -> Hmac<Sha256> {
    // HMAC takes keys of any length: this cannot fail, and an empty key would only make a MAC that does not verify.
    let mac = Hmac::<Sha256>::new_from_slice(shared).or_else(|_| Hmac::<Sha256>::new_from_slice(&[]));
    match mac {
        Ok(mac) => mac.chain_update(CONTEXT_JOIN.as_bytes()).chain_update([0]).chain_update(transcript),
        Err(_) => unreachable!("HMAC takes keys of any length"),
    }
}

/// The proofs of a [`JoinRequest`], made by the host: signature of the identity key and MAC of the WireGuard key.
#[must_use]
pub fn prove(
    exporter: &[u8; EXPORTER_LEN],
    token: TokenId,
    identity: &SigningKey,
    wg_key: &WgPrivateKey,
    challenge: &Challenge,
) -> ([u8; 64], [u8; 32]) {
    let transcript = transcript(exporter, token, &identity.identity(), &wg_key.public());
    let shared = wg_key.to_secret().diffie_hellman(&PublicKey::from(challenge.ephemeral));
    let mac = wg_mac(shared.as_bytes(), &transcript).finalize().into_bytes().into();
    (identity.sign(CONTEXT_JOIN, &transcript), mac)
}

/// Checks both proofs of a [`JoinRequest`], with the secret half of the challenge.
///
/// # Errors
/// [`BadSignature`] if either proof does not hold.
pub fn verify(exporter: &[u8; EXPORTER_LEN], request: &JoinRequest, ephemeral: &StaticSecret) -> Result<(), BadSignature> {
    let transcript = transcript(exporter, request.token, &request.identity, &request.wg_key);
    request.identity.verify(CONTEXT_JOIN, &transcript, &request.identity_proof)?;
    let shared = ephemeral.diffie_hellman(&PublicKey::from(*request.wg_key.as_bytes()));
    wg_mac(shared.as_bytes(), &transcript)
        .verify_slice(&request.wg_proof)
        .map_err(|_| BadSignature)
}

/// The proof of a [`RenewRequest`].
#[must_use]
pub fn prove_renewal(exporter: &[u8; EXPORTER_LEN], host: HostId, identity: &SigningKey) -> [u8; 64] {
    identity.sign(CONTEXT_RENEW, &[&exporter[..], &host.0].concat())
}

/// Checks the proof of a [`RenewRequest`].
///
/// # Errors
/// [`BadSignature`].
pub fn verify_renewal(exporter: &[u8; EXPORTER_LEN], request: &RenewRequest) -> Result<(), BadSignature> {
    request
        .identity
        .verify(CONTEXT_RENEW, &[&exporter[..], &request.host.0].concat(), &request.identity_proof)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(exporter: &[u8; 32], challenge: &Challenge) -> JoinRequest {
        let (identity, wg_key) = (SigningKey::from_seed(&[1; 32]), WgPrivateKey::from_bytes([2; 32]));
        let token = TokenId([3; 8]);
        let (identity_proof, wg_proof) = prove(exporter, token, &identity, &wg_key, challenge);
        JoinRequest {
            token,
            secret: [4; 32],
            identity: identity.identity(),
            wg_key: wg_key.public(),
            identity_proof,
            wg_proof,
            software: String::new(),
        }
    }

    #[test]
    fn both_keys_are_proven_for_this_session_only() {
        let ephemeral = StaticSecret::from([7; 32]);
        let challenge = Challenge {
            ephemeral: PublicKey::from(&ephemeral).to_bytes(),
        };
        let good = request(&[8; 32], &challenge);
        assert_eq!(verify(&[8; 32], &good, &ephemeral), Ok(()));
        assert_eq!(verify(&[9; 32], &good, &ephemeral), Err(BadSignature), "another session's exporter");
        assert_eq!(
            verify(&[8; 32], &good, &StaticSecret::from([6; 32])),
            Err(BadSignature),
            "another challenge"
        );
        let other_key = JoinRequest {
            wg_key: WgPrivateKey::from_bytes([5; 32]).public(),
            ..good.clone()
        };
        assert_eq!(
            verify(&[8; 32], &other_key, &ephemeral),
            Err(BadSignature),
            "a WireGuard key that it does not hold"
        );
        let other_token = JoinRequest {
            token: TokenId([0; 8]),
            ..good
        };
        assert_eq!(verify(&[8; 32], &other_token, &ephemeral), Err(BadSignature), "another token");
    }

    #[test]
    fn the_secret_of_a_token_is_not_shown() {
        let challenge = Challenge {
            ephemeral: PublicKey::from(&StaticSecret::from([7; 32])).to_bytes(),
        };
        let shown = format!("{:?}", request(&[8; 32], &challenge));
        assert!(!shown.contains("4, 4") && shown.contains("hidden"), "{shown}");
    }
}
