//! Rotations of the coordinator's own keys, and whether what was replaced is dead, as the API shows them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::version::MeshTime;

/// What is to be rotated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RotationRequest {
    /// `signing-key`, `host-issuer` or `coordinator-issuer`.
    pub what: String,
}

/// How far the rotations are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RotationList {
    /// One for each part of the trust that can change.
    pub rotations: Vec<RotationSummary>,
}

/// How far one rotation is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RotationSummary {
    /// `signing-key`, `host-issuer` or `coordinator-issuer`.
    pub what: String,
    /// `settled`; `announced`: hosts learn the next one; `switched`: the next one is used, and the former is still trusted.
    pub stage: String,
    /// Unix second since which it is so.
    #[schema(value_type = u64)]
    pub since: MeshTime,
    /// Whether the key in use comes from a systemd credential, which an operator has to replace by the new key.
    pub from_credential: bool,
}

/// Whether everything that was replaced, used up or revoked is dead.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CredentialReport {
    /// What was looked at.
    pub checks: Vec<CredentialCheck>,
    /// How many of them are still alive.
    pub alive: usize,
    /// How many could not be proven dead.
    pub unproven: usize,
}

/// One thing that must be dead.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CredentialCheck {
    /// What it is: `token`, `credential`, `wireguard key`, `signing-key`, `host-issuer`, `coordinator-issuer`.
    pub what: String,
    /// Which one: an id, a public key, or the beginning of a fingerprint; never a secret.
    pub id: String,
    /// `dead`, `alive`, or `unproven`.
    pub state: String,
    /// How that is known.
    pub detail: String,
}
