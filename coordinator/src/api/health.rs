//! `/v1/healthz` and `/v1/readyz`: for probes, without a credential, without a word about the mesh.

use axum::extract::State;
use axum::http::StatusCode;
use cloison_proto::api::{Problem, ProblemCode};

use super::ApiState;
use super::error::ApiError;

/// The process answers.
#[utoipa::path(get, path = "/v1/healthz", tag = "mesh", security(()), responses((status = 204, description = "The process answers")))]
pub(super) async fn healthz() -> StatusCode {
    StatusCode::NO_CONTENT
}

/// The store answers, and what it holds was compiled and published.
#[utoipa::path(get, path = "/v1/readyz", tag = "mesh", security(()), responses((status = 204, description = "Ready"), (status = 503, body = Problem)))]
pub(super) async fn readyz(State(state): State<ApiState>) -> Result<StatusCode, ApiError> {
    let not_ready = |why: &str| ApiError::from(Problem::new(ProblemCode::Unavailable, why));
    state.store.audit_head().await.map_err(|_| not_ready("the store does not answer"))?;
    if let Some(read_only) = state.store.inventory().read_only {
        return Err(Problem::new(ProblemCode::ReadOnly, read_only.to_string()).into());
    }
    if state.live.published().generation == 0 {
        return Err(not_ready("the first views are not compiled yet"));
    }
    Ok(StatusCode::NO_CONTENT)
}
