//! API credentials, as the API shows them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::CredentialId;
use crate::version::MeshTime;

/// A credential to be made.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CredentialRequest {
    /// What it is for, 1 to 63 characters.
    pub name: String,
    /// What it allows: `owner`, `policy`, `enroll`, `operate`, `read`.
    pub scopes: Vec<String>,
    /// For how many seconds: at most 400 days, 30 days if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_for_secs: Option<u64>,
}

/// A change of a credential's secret.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CredentialRotation {
    /// For how many seconds the former one stays good: at most a day, an hour if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlap_secs: Option<u64>,
}

/// A credential just made. Its text is shown here and never again.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct CredentialCreated {
    /// Its id.
    #[schema(value_type = String)]
    pub id: CredentialId,
    /// The credential: a secret.
    pub credential: String,
    /// Unix second of its end.
    #[schema(value_type = u64)]
    pub expires: MeshTime,
}

impl std::fmt::Debug for CredentialCreated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CredentialCreated({}, hidden)", self.id)
    }
}

/// All credentials.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CredentialList {
    /// The newest first.
    pub credentials: Vec<CredentialSummary>,
    /// The one that asked.
    #[schema(value_type = String)]
    pub own: CredentialId,
}

/// One credential, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CredentialSummary {
    /// Its id.
    #[schema(value_type = String)]
    pub id: CredentialId,
    /// What it is for.
    pub name: String,
    /// What it allows.
    pub scopes: Vec<String>,
    /// Unix second of its making.
    #[schema(value_type = u64)]
    pub created_at: MeshTime,
    /// Unix second of its end.
    #[schema(value_type = u64)]
    pub expires: MeshTime,
    /// Unix second of its last use, to about five minutes.
    #[schema(value_type = Option<u64>)]
    pub last_used: Option<MeshTime>,
    /// Unix second of its revocation.
    #[schema(value_type = Option<u64>)]
    pub revoked_at: Option<MeshTime>,
}
