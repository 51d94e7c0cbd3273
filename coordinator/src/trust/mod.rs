//! Whom the mesh trusts, from the coordinator's side: the keys that only it has ([`Roots`]), the certificates that they sign (`issue`),
//! and who a certificate chain speaks for (`verify`). Nothing of it is in the database.
//!
//! Two authorities under one root, one for each role: a host's certificate cannot stand where a coordinator's is asked for, because its
//! issuer, its usage and its URI are all of the other kind. Of a certificate request nothing is taken but its key.

mod folder;
mod issue;
mod ring;
mod roots;
mod server;
#[cfg(test)]
mod tests;
mod verify;

pub use issue::{BadHostLifetime, HostCertificate, HostLifetime, IssueError};
pub use ring::{Part, Retired, Stage, UnknownPart, hex};
pub use roots::{Roots, RootsError};
pub use server::{ServerError, ServerIdentity, server_config};
pub use verify::{HostVerifier, LinkedHost, VerifyError};

use cloison_proto::key::{IdentityKey, KeyError};

/// SEQUENCE { SEQUENCE { OID 1.3.101.112 }, BIT STRING }: all that stands before an Ed25519 key in a SubjectPublicKeyInfo (RFC 8410
/// section 4).
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// A key as the SubjectPublicKeyInfo of a certificate.
fn to_spki(key: &IdentityKey) -> Vec<u8> {
    [&SPKI_PREFIX[..], key.as_bytes()].concat()
}

/// The key of a SubjectPublicKeyInfo.
fn from_spki(der: &[u8]) -> Result<IdentityKey, KeyError> {
    let bytes = der
        .strip_prefix(&SPKI_PREFIX[..])
        .and_then(|key| key.try_into().ok())
        .ok_or(KeyError::NotAPoint)?;
    IdentityKey::from_bytes(bytes)
}
