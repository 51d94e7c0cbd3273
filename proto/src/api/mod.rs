//! Requests and answers of the REST API under `/v1`: JSON over TLS, bearer credentials, errors as problem documents.
//!
//! These types are the schema: the coordinator's handlers return them, the committed OpenAPI document is generated from them, and the
//! `cloison` command reads them. Fields are only ever added. No answer has a place for a secret but those that say so, once, at its creation.

mod address;
mod audit;
mod credential;
mod explain;
mod host;
mod policy;
mod problem;
mod rotation;
mod status;
mod token;

pub use address::{AddressList, AddressRequest, AddressSummary};
pub use audit::{AuditEntry, AuditList};
pub use credential::{CredentialCreated, CredentialList, CredentialRequest, CredentialRotation, CredentialSummary};
pub use explain::{End, EndState, Explanation, PairExplanation, RuleSummary};
pub use host::{ComponentList, ComponentSummary, DenialSummary, EnforcementState, HostList, HostSummary, InstanceSummary, LabelRequest};
pub use policy::{Access, AccessChange, PolicyAnswer, PolicyCheck, PolicyRequest};
pub use problem::{Problem, ProblemCode};
pub use rotation::{CredentialCheck, CredentialReport, RotationList, RotationRequest, RotationSummary};
pub use status::{MeshStatus, NotApplied};
pub use token::{TokenCreated, TokenList, TokenRequest, TokenSummary};

/// Media type of [`Problem`] (RFC 9457).
pub const PROBLEM_JSON: &str = "application/problem+json";

/// Largest request body, in bytes.
pub const MAX_BODY: usize = 64 * 1024;

/// Largest body of a request with a policy, in bytes: the policy's own limit and what surrounds it.
pub const MAX_POLICY_BODY: usize = 4 * 1024 * 1024 + 64 * 1024;

/// Most entries of one page of a list.
pub const MAX_PAGE: u32 = 500;
