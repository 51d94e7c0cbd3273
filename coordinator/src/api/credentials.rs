//! `/v1/credentials`. A credential's text leaves the coordinator in the answer to its creation or rotation, and never again.

use std::time::Duration;

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use cloison_proto::api::{CredentialCreated, CredentialList, CredentialRequest, CredentialRotation, CredentialSummary, Problem};
use cloison_proto::id::CredentialId;

use super::ApiState;
use super::error::ApiError;
use super::permit::{Owner, Permit, Read};
use crate::store::{CredentialRecord, CredentialSpec, NewCredential};

/// How long a credential lives unless its maker says otherwise.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(30 * 86_400);

/// How long the former one stays good at a rotation unless its maker says otherwise.
const DEFAULT_OVERLAP: Duration = Duration::from_secs(3_600);

/// Makes a credential.
#[utoipa::path(post, path = "/v1/credentials", tag = "mesh", request_body = CredentialRequest,
    responses((status = 201, body = CredentialCreated), (status = 422, body = Problem)))]
pub(super) async fn create(
    permit: Permit<Owner>,
    State(state): State<ApiState>,
    body: Result<Json<CredentialRequest>, JsonRejection>,
) -> Result<(StatusCode, Json<CredentialCreated>), ApiError> {
    let Json(request) = body?;
    let scopes = request.scopes.iter().map(|scope| scope.parse());
    let scopes = scopes.collect::<Result<_, _>>();
    let spec = CredentialSpec {
        name: request.name,
        scopes: scopes.map_err(|_| ApiError::invalid("this is no scope", "write owner, policy, enroll, operate or read"))?,
        lifetime: request.valid_for_secs.map_or(DEFAULT_LIFETIME, Duration::from_secs),
    };
    let made = state.store.create_credential(permit.context(), spec).await?;
    Ok((StatusCode::CREATED, Json(created(&made))))
}

/// All credentials, the newest first, without their secrets.
#[utoipa::path(get, path = "/v1/credentials", tag = "mesh", responses((status = 200, body = CredentialList)))]
pub(super) async fn list(permit: Permit<Owner>, State(state): State<ApiState>) -> Result<Json<CredentialList>, ApiError> {
    let records = state.store.list_credentials().await?;
    Ok(Json(CredentialList {
        credentials: records.into_iter().map(summary).collect(),
        own: permit.principal.id,
    }))
}

/// Revokes a credential: one's own with any scope, another with `owner`.
#[utoipa::path(delete, path = "/v1/credentials/{credential}", tag = "mesh", params(("credential" = String, Path, description = "The credential's id")),
    responses((status = 204, description = "It allows nothing any more"), (status = 404, body = Problem)))]
pub(super) async fn revoke(
    permit: Permit<Read>,
    State(state): State<ApiState>,
    path: Result<Path<String>, PathRejection>,
) -> Result<StatusCode, ApiError> {
    let id = read(&path?.0)?;
    state.store.revoke_credential(permit.context(), id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Makes a credential that takes another one's place: the same name, scopes and lifetime. The former ends soon.
#[utoipa::path(post, path = "/v1/credentials/{credential}/rotate", tag = "mesh", params(("credential" = String, Path, description = "The credential's id")),
    request_body = CredentialRotation, responses((status = 201, body = CredentialCreated), (status = 404, body = Problem), (status = 422, body = Problem)))]
pub(super) async fn rotate(
    permit: Permit<Owner>,
    State(state): State<ApiState>,
    path: Result<Path<String>, PathRejection>,
    body: Result<Json<CredentialRotation>, JsonRejection>,
) -> Result<(StatusCode, Json<CredentialCreated>), ApiError> {
    let (id, Json(request)) = (read(&path?.0)?, body?);
    let overlap = request.overlap_secs.map_or(DEFAULT_OVERLAP, Duration::from_secs);
    let made = state.store.rotate_credential(permit.context(), id, overlap).await?;
    Ok((StatusCode::CREATED, Json(created(&made))))
}

fn read(text: &str) -> Result<CredentialId, ApiError> {
    text.parse().map_err(|_| ApiError::not_found("credential"))
}

fn created(made: &NewCredential) -> CredentialCreated {
    CredentialCreated {
        id: made.text.id,
        credential: made.text.reveal().to_string(),
        expires: made.expires,
    }
}

fn summary(record: CredentialRecord) -> CredentialSummary {
    CredentialSummary {
        id: record.id,
        name: record.name,
        scopes: record.scopes.iter().map(ToString::to_string).collect(),
        created_at: record.created_at,
        expires: record.expires,
        last_used: record.last_used,
        revoked_at: record.revoked_at,
    }
}
