//! From what the store says to what a caller is told. Details that only an operator of the coordinator may see go to the log.

use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use cloison_proto::api::{PROBLEM_JSON, Problem, ProblemCode};
use cloison_proto::policy::Diagnostic;

use crate::policy::ViewLimit;
use crate::policy::explain::ExplainError;
use crate::store::StoreError;

/// A refusal, ready to be sent.
#[derive(Debug)]
pub(super) struct ApiError(Box<Problem>);

impl From<Problem> for ApiError {
    fn from(problem: Problem) -> Self {
        Self(Box::new(problem))
    }
}

impl ApiError {
    /// The content cannot be accepted.
    pub(super) fn invalid(detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Problem::new(ProblemCode::Invalid, detail).hint(hint).into()
    }

    /// There is no such thing.
    pub(super) fn not_found(what: &str) -> Self {
        Problem::new(ProblemCode::NotFound, format!("there is no such {what}")).into()
    }

    /// A policy with errors.
    pub(super) fn policy(diagnostics: Vec<Diagnostic>) -> Self {
        let detail = format!("the policy has {} error(s); nothing was changed", diagnostics.len());
        let mut problem =
            Problem::new(ProblemCode::PolicyInvalid, detail).hint("`cloison policy check` shows them all without applying anything");
        problem.diagnostics = diagnostics;
        problem.into()
    }

    /// Something that only the log is told about.
    pub(super) fn internal(cause: &(dyn std::error::Error + 'static)) -> Self {
        tracing::error!(cause, "a request failed for a reason inside the coordinator");
        Problem::new(
            ProblemCode::Internal,
            "something is wrong inside the coordinator; its log says what",
        )
        .into()
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        let code = match &error {
            StoreError::NotFound(_) => ProblemCode::NotFound,
            StoreError::PolicyChanged { .. } => ProblemCode::PolicyChanged,
            StoreError::NameTaken { .. } | StoreError::Revoked(_) => ProblemCode::Conflict,
            StoreError::PoolExhausted { .. } => ProblemCode::AddressPool,
            StoreError::Refused(refusal) => match refusal.code {
                "view_limit" => ProblemCode::ViewLimit,
                _ => ProblemCode::Conflict,
            },
            StoreError::Invalid { .. } => ProblemCode::Invalid,
            StoreError::NotAuthorised => ProblemCode::Forbidden,
            StoreError::ReadOnly(_) => ProblemCode::ReadOnly,
            StoreError::StorageFull => ProblemCode::StorageFull,
            StoreError::Corrupt { .. } | StoreError::Entropy(_) | StoreError::Database(_) => return Self::internal(&error),
        };
        let text = error.to_string();
        match text.split_once([':', ';']) {
            Some((detail, hint)) => Problem::new(code, detail.trim()).hint(hint.trim()).into(),
            None if code == ProblemCode::Invalid => Problem::new(code, text).hint("GET /v1/openapi.json describes every field").into(),
            None => Problem::new(code, text).into(),
        }
    }
}

impl From<ViewLimit> for ApiError {
    fn from(error: ViewLimit) -> Self {
        Problem::new(ProblemCode::ViewLimit, error.to_string()).into()
    }
}

impl From<ExplainError> for ApiError {
    fn from(error: ExplainError) -> Self {
        let code = match error {
            ExplainError::UnknownComponent(_) => ProblemCode::NotFound,
            ExplainError::UnknownService { .. } | ExplainError::NoServices(_) => ProblemCode::Invalid,
        };
        Problem::new(code, error.to_string())
            .hint("`cloison policy show` names all components and their services")
            .into()
    }
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        let problem = match rejection.status() {
            StatusCode::UNSUPPORTED_MEDIA_TYPE => Problem::new(ProblemCode::MediaType, "the body must be application/json"),
            StatusCode::PAYLOAD_TOO_LARGE => Problem::new(ProblemCode::TooLarge, "the body is larger than this endpoint takes"),
            // The library's text could repeat the request: say what is expected instead.
            _ => Problem::new(ProblemCode::Invalid, "the body is not the JSON object that this endpoint takes"),
        };
        problem.hint("GET /v1/openapi.json describes every endpoint").into()
    }
}

impl From<QueryRejection> for ApiError {
    fn from(_: QueryRejection) -> Self {
        Problem::new(ProblemCode::BadRequest, "the query is not what this endpoint takes")
            .hint("GET /v1/openapi.json describes every endpoint")
            .into()
    }
}

impl From<PathRejection> for ApiError {
    fn from(_: PathRejection) -> Self {
        Self::not_found("path")
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, axum::Json(*self.0)).into_response();
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        if status == StatusCode::UNAUTHORIZED {
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
