//! Hosts and components, as the API shows them.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::HostId;
use crate::key::WgPublicKey;
use crate::label::{ComponentName, HostName, LabelKey, LabelSet, ServiceName};
use crate::net::PortSpec;
use crate::policy::Attachment;
use crate::version::{MeshTime, Version};

/// All hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostList {
    /// In the order of their names.
    pub hosts: Vec<HostSummary>,
}

/// One host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostSummary {
    /// Its id.
    #[schema(value_type = String)]
    pub id: HostId,
    /// Its name.
    #[schema(value_type = String)]
    pub name: HostName,
    /// Its labels.
    #[schema(value_type = std::collections::BTreeMap<String, String>)]
    pub labels: LabelSet,
    /// Its WireGuard key.
    #[schema(value_type = String)]
    pub wg_key: WgPublicKey,
    /// The WireGuard key that is to take its place, while it changes keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub next_wg_key: Option<WgPublicKey>,
    /// Unix second of its enrollment.
    #[schema(value_type = u64)]
    pub enrolled_at: MeshTime,
    /// Unix second of the last contact.
    #[schema(value_type = Option<u64>)]
    pub last_seen: Option<MeshTime>,
    /// Unix second of its revocation.
    #[schema(value_type = Option<u64>)]
    pub revoked_at: Option<MeshTime>,
    /// Whether its agent has a link at this moment.
    pub linked: bool,
    /// Whether the view in force on it is the one compiled last.
    pub applied: bool,
    /// Version of the view compiled last.
    #[schema(value_type = Option<Object>)]
    pub version: Option<Version>,
    /// Somebody else tried to use the token that this host joined by: one of the two is not who the operator meant.
    pub contested: bool,
    /// Two machines use this host's keys.
    pub cloned: bool,
    /// Where the coordinator and the agent say that it can be reached.
    pub endpoints: Vec<String>,
    /// Its instances.
    pub instances: Vec<InstanceSummary>,
}

/// One instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstanceSummary {
    /// The component.
    #[schema(value_type = String)]
    pub component: ComponentName,
    /// The host.
    #[schema(value_type = String)]
    pub host: HostName,
    /// Its IPv4 address.
    #[schema(value_type = String)]
    pub v4: std::net::Ipv4Addr,
    /// Its IPv6 address.
    #[schema(value_type = String)]
    pub v6: std::net::Ipv6Addr,
    /// Why the agent cannot enforce it, if it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unenforced: Option<String>,
    /// How the agent said last that it is enforced.
    #[serde(default)]
    pub enforcement: EnforcementState,
    /// By which namespace, container, unit or user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
    /// What was denied to it or by it last, if the agent told of anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_denial: Option<DenialSummary>,
}

/// How it is enforced that only an instance's own processes can be it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EnforcementState {
    /// They have a network namespace of their own.
    Isolated,
    /// The kernel binds its addresses to them.
    Bound,
    /// Any process of the host that no other component claims can be it.
    Shared,
    /// Nothing reaches it and it reaches nothing.
    Unenforced,
    /// The agent did not say, or said something newer than this.
    #[default]
    #[serde(other)]
    Unknown,
}

impl EnforcementState {
    /// The state of this code.
    #[must_use]
    pub fn from_code(code: &str) -> Self {
        match code {
            "isolated" => Self::Isolated,
            "bound" => Self::Bound,
            "shared" => Self::Shared,
            "unenforced" => Self::Unenforced,
            _ => Self::Unknown,
        }
    }

    /// Its stable code.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Isolated => "isolated",
            Self::Bound => "bound",
            Self::Shared => "shared",
            Self::Unenforced => "unenforced",
            Self::Unknown => "unknown",
        }
    }
}

/// A denial, as an agent told of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DenialSummary {
    /// Unix second, by the agent's mesh time.
    #[schema(value_type = u64)]
    pub at: MeshTime,
    /// Whether the component was the sender.
    pub outbound: bool,
    /// Why: the text of a drop reason.
    pub reason: String,
}

/// All components.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ComponentList {
    /// In the order of their names.
    pub components: Vec<ComponentSummary>,
}

/// One component.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ComponentSummary {
    /// Its name.
    #[schema(value_type = String)]
    pub name: ComponentName,
    /// How hosts know its processes.
    #[schema(value_type = String)]
    pub attach: Attachment,
    /// Its labels.
    #[schema(value_type = std::collections::BTreeMap<String, String>)]
    pub labels: LabelSet,
    /// Its services.
    #[schema(value_type = std::collections::BTreeMap<String, Vec<String>>)]
    pub services: std::collections::BTreeMap<ServiceName, Vec<PortSpec>>,
    /// Its instances.
    pub instances: Vec<InstanceSummary>,
}

/// A change of a host's labels.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LabelRequest {
    /// Labels that it has afterwards.
    #[serde(default)]
    #[schema(value_type = std::collections::BTreeMap<String, String>)]
    pub set: LabelSet,
    /// Labels that it does not have afterwards.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub remove: BTreeSet<LabelKey>,
}
