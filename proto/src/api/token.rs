//! Enrollment tokens, as the API shows them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::TokenId;
use crate::label::{HostName, LabelSet};
use crate::version::MeshTime;

/// A token to be made.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// The name of the host that joins by it, or a pattern with one `*` such as `worker-*`, which the coordinator fills. Without one, the
    /// coordinator makes a name, which no `on: NAME` matches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Labels of the host.
    #[serde(default, skip_serializing_if = "LabelSet::is_empty")]
    #[schema(value_type = std::collections::BTreeMap<String, String>)]
    pub labels: LabelSet,
    /// How many hosts may join by it: 1 to 100, 1 if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uses: Option<u32>,
    /// For how many seconds: at most 30 days, one hour if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_for_secs: Option<u64>,
    /// From which addresses it may be used, like `192.0.2.0/24`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
}

/// A token just made. The text is shown here and never again.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct TokenCreated {
    /// Its id.
    #[schema(value_type = String)]
    pub id: TokenId,
    /// The token: a secret.
    pub token: String,
    /// Unix second of its end.
    #[schema(value_type = u64)]
    pub expires: MeshTime,
}

impl std::fmt::Debug for TokenCreated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TokenCreated({}, hidden)", self.id)
    }
}

/// All tokens that are not forgotten yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenList {
    /// The newest first.
    pub tokens: Vec<TokenSummary>,
}

/// One token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenSummary {
    /// Its id.
    #[schema(value_type = String)]
    pub id: TokenId,
    /// The name or the pattern of names that it gives.
    pub host: Option<String>,
    /// Labels that it gives.
    #[schema(value_type = std::collections::BTreeMap<String, String>)]
    pub labels: LabelSet,
    /// How many hosts may still join by it.
    pub uses_left: u32,
    /// Unix second of its end.
    #[schema(value_type = u64)]
    pub expires: MeshTime,
    /// Unix second of its making.
    #[schema(value_type = u64)]
    pub created_at: MeshTime,
    /// Unix second of its revocation.
    #[schema(value_type = Option<u64>)]
    pub revoked_at: Option<MeshTime>,
    /// From which addresses it may be used.
    pub source: Option<String>,
    /// Names of the hosts that joined by it.
    #[schema(value_type = Vec<String>)]
    pub redeemed_by: Vec<HostName>,
}
