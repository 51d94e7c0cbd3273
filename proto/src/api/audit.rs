//! The audit log, as the API shows it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::version::MeshTime;

/// One page of the audit log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditList {
    /// In the order in which things happened.
    pub entries: Vec<AuditEntry>,
    /// Ask with `after=` this for the next page; none at the end.
    pub next: Option<u64>,
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditEntry {
    /// Its number, counted from one without gaps.
    pub seq: u64,
    /// Unix second.
    #[schema(value_type = u64)]
    pub at: MeshTime,
    /// Who: `credential cred_…`, `host host_…`, `local root`, `coordinator`.
    pub actor: String,
    /// What, like `policy.put` or `host.revoke`.
    pub action: String,
    /// On what.
    pub objects: Vec<String>,
    /// `ok`, or why it was refused.
    pub outcome: String,
    /// The request that did it.
    pub request_id: Option<String>,
}
