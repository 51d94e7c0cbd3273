//! Whether one component may reach another, by which rule, and whether it works at this moment.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::RuleId;
use crate::label::{ComponentName, HostName};
use crate::net::PortSpec;
use crate::verdict::DropReason;
use crate::version::MeshTime;

/// The answer to `explain FROM TO:WHAT`. The verdict between two components follows from the policy; the pairs say where it works.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Explanation {
    /// Who begins.
    #[schema(value_type = String)]
    pub from: ComponentName,
    /// Who is reached.
    #[schema(value_type = String)]
    pub to: ComponentName,
    /// On what.
    #[schema(value_type = Vec<String>)]
    pub ports: Vec<PortSpec>,
    /// Whether all of these ports are allowed.
    pub allowed: bool,
    /// Why not.
    pub reason: Option<DropReason>,
    /// The rules that allow it, or would if they had not expired.
    pub rules: Vec<RuleSummary>,
    /// The same for each pair of instances.
    pub pairs: Vec<PairExplanation>,
    /// What to know or do, in sentences.
    pub notes: Vec<String>,
}

/// A rule, with what its author says of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RuleSummary {
    /// The rule.
    #[schema(value_type = String)]
    pub id: RuleId,
    /// Its canonical text.
    pub text: String,
    /// Why it is there.
    pub why: Option<String>,
    /// Whose it is.
    pub owner: Option<String>,
    /// Unix second of its end.
    #[schema(value_type = Option<u64>)]
    pub expires: Option<MeshTime>,
}

/// One pair of instances.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PairExplanation {
    /// Where it begins.
    pub from: End,
    /// Where it ends.
    pub to: End,
    /// Whether both ends' compiled tables allow it.
    pub allowed: bool,
    /// Whether it can work at this moment: allowed, and both ends have the view that says so in force.
    pub works: bool,
}

/// One end of a pair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct End {
    /// The host.
    #[schema(value_type = String)]
    pub host: HostName,
    /// Its IPv4 address.
    #[schema(value_type = String)]
    pub v4: std::net::Ipv4Addr,
    /// Its IPv6 address.
    #[schema(value_type = String)]
    pub v6: std::net::Ipv6Addr,
    /// What this end's table says: `allowed` or a drop reason.
    pub verdict: String,
    /// How the host does.
    pub state: EndState,
}

/// How a host does, as far as a pair needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EndState {
    /// Linked, and the view compiled last is in force.
    Applied,
    /// Linked, but the view compiled last is not in force yet.
    Pending,
    /// Not linked: it goes on with the view that it has until its lease ends.
    Offline,
    /// The agent cannot enforce this instance.
    Unenforced,
}
