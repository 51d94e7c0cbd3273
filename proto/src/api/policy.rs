//! The policy, as the API takes and shows it. Its ETag is the policy's own version, so that a join does not make an edit stale.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::label::ComponentName;
use crate::net::PortSpec;
use crate::policy::Diagnostic;
use crate::version::MeshTime;

/// A policy to be checked or applied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PolicyRequest {
    /// The document: YAML or JSON.
    pub policy: String,
}

/// The policy in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PolicyAnswer {
    /// Its number, which is also its ETag; zero before the first.
    pub version: u64,
    /// The revision of the mesh at which it came into force.
    pub revision: u64,
    /// The document as its author wrote it.
    pub policy: String,
    /// Unix second at which it was applied.
    #[schema(value_type = Option<u64>)]
    pub applied_at: Option<MeshTime>,
    /// What the change opened and closed, in the answer to a change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change: Option<AccessChange>,
}

/// Whether a policy would be accepted, and what it would change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PolicyCheck {
    /// Whether it would be accepted.
    pub valid: bool,
    /// Errors and warnings, each with its place.
    pub diagnostics: Vec<Diagnostic>,
    /// What it would open and close.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change: Option<AccessChange>,
}

/// What a change of policy opens and closes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct AccessChange {
    /// Newly allowed.
    pub opened: Vec<Access>,
    /// No longer allowed: live flows are cut.
    pub closed: Vec<Access>,
}

/// One component may reach another on these ports.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
pub struct Access {
    /// Who begins.
    #[schema(value_type = String)]
    pub from: ComponentName,
    /// Who is reached.
    #[schema(value_type = String)]
    pub to: ComponentName,
    /// On what.
    #[schema(value_type = String)]
    pub ports: PortSpec,
}
