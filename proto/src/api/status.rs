//! The mesh at a glance.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::MeshId;
use crate::label::HostName;
use crate::version::Version;

/// The mesh at a glance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MeshStatus {
    /// The mesh.
    #[schema(value_type = String)]
    pub mesh: MeshId,
    /// The coordinator's software version.
    pub software: String,
    /// Generation and revision of the state.
    #[schema(value_type = Object)]
    pub version: Version,
    /// The policy's number; zero before the first.
    pub policy_version: u64,
    /// The ranges of the overlay's addresses.
    pub overlay: String,
    /// How long a lease lasts, in seconds.
    pub lease_secs: u64,
    /// Hosts enrolled and not revoked.
    pub hosts: u32,
    /// Hosts with a link at this moment.
    pub linked: u32,
    /// Hosts on which the view compiled last is in force.
    pub applied: u32,
    /// Components of the policy.
    pub components: u32,
    /// Rules of the policy.
    pub rules: u32,
    /// Instances.
    pub instances: u32,
    /// The hosts on which the view compiled last is not in force, at most 100 of them.
    pub not_applied: Vec<NotApplied>,
    /// Why the coordinator changes and publishes nothing until `cloison-coordinator recover`; absent in all other meshes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_only: Option<String>,
    /// What an operator should look at.
    pub warnings: Vec<String>,
}

/// A host on which the view compiled last is not in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NotApplied {
    /// The host.
    #[schema(value_type = String)]
    pub host: HostName,
    /// Whether it has a link.
    pub linked: bool,
    /// Why it refused the view, if it did.
    pub nack: Option<String>,
}
