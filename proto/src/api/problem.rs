//! Errors of the API (RFC 9457): a stable code, what failed and why, what to do. Never the request's content, SQL, paths or library texts.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::policy::Diagnostic;

macro_rules! codes {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal, $status:literal;)*) => {
        /// Stable code of a problem.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
        #[serde(rename_all = "snake_case")]
        pub enum ProblemCode {
            $($(#[doc = $doc])+ $name,)*
            /// A code of a later version.
            #[serde(other)]
            Unknown,
        }

        impl ProblemCode {
            /// The code's text.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* Self::Unknown => "unknown" }
            }

            /// The HTTP status that goes with it.
            #[must_use]
            pub const fn status(self) -> u16 {
                match self { $(Self::$name => $status,)* Self::Unknown => 500 }
            }

            /// What it means, in a sentence.
            #[must_use]
            pub const fn title(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+).trim_ascii(),)* Self::Unknown => "A code of a later version." }
            }
        }
    };
}

codes! {
    /// The request is not what this endpoint takes.
    BadRequest = "bad_request", 400;
    /// No credential, or none that is valid.
    Unauthorised = "unauthorised", 401;
    /// The credential does not allow this.
    Forbidden = "forbidden", 403;
    /// There is no such thing, or it is none of this credential's business.
    NotFound = "not_found", 404;
    /// This path does not take this method.
    MethodNotAllowed = "method_not_allowed", 405;
    /// The request took too long to arrive.
    Timeout = "timeout", 408;
    /// The change contradicts what there is.
    Conflict = "conflict", 409;
    /// A host's view would grow beyond its limits.
    ViewLimit = "view_limit", 409;
    /// There are no addresses left in the mesh's range.
    AddressPool = "address_pool", 409;
    /// Somebody else changed the policy in between.
    PolicyChanged = "policy_changed", 412;
    /// The request's body is too large.
    TooLarge = "too_large", 413;
    /// The request's body is not JSON.
    MediaType = "media_type", 415;
    /// The content cannot be accepted.
    Invalid = "invalid", 422;
    /// The policy has errors.
    PolicyInvalid = "policy_invalid", 422;
    /// `If-Match` or `If-None-Match` is needed, so that no edit is lost.
    PreconditionRequired = "precondition_required", 428;
    /// Too many requests.
    RateLimited = "rate_limited", 429;
    /// Something is wrong inside the coordinator.
    Internal = "internal", 500;
    /// The coordinator may be behind its own mesh, and changes nothing until `cloison-coordinator recover`.
    ReadOnly = "read_only", 503;
    /// The coordinator is not ready.
    Unavailable = "unavailable", 503;
    /// The coordinator's disk is full.
    StorageFull = "storage_full", 507;
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// `about:blank`: the code says more than a URI would.
    #[serde(rename = "type")]
    pub kind: String,
    /// What the code means.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// Stable code.
    pub code: ProblemCode,
    /// What failed and why.
    pub detail: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Names this request in the coordinator's log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// For `policy_invalid`: all errors, each with its place.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub diagnostics: Vec<Diagnostic>,
}

impl Problem {
    /// A problem with this code.
    #[must_use]
    pub fn new(code: ProblemCode, detail: impl Into<String>) -> Self {
        Self {
            kind: "about:blank".into(),
            title: code.title().into(),
            status: code.status(),
            code,
            detail: detail.into(),
            hint: None,
            request_id: None,
            diagnostics: Vec::new(),
        }
    }

    /// The problem with advice.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}
