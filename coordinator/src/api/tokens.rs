//! `/v1/tokens`. A token's text leaves the coordinator in the answer to its creation, and never again.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use cloison_proto::api::{Problem, TokenCreated, TokenList, TokenRequest, TokenSummary};
use cloison_proto::id::TokenId;
use cloison_proto::token::{EnrollmentToken, MAX_ADDRESSES};

use super::ApiState;
use super::error::ApiError;
use super::permit::{Enroll, Permit, Read};
use crate::enrollment::token::NameRule;
use crate::store::{TokenRecord, TokenSpec};

/// How long a token lives unless its maker says otherwise.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60 * 60);

/// Makes a token.
#[utoipa::path(post, path = "/v1/tokens", tag = "tokens", request_body = TokenRequest,
    responses((status = 201, body = TokenCreated), (status = 409, body = Problem), (status = 422, body = Problem)))]
pub(super) async fn create(
    permit: Permit<Enroll>,
    State(state): State<ApiState>,
    body: Result<Json<TokenRequest>, JsonRejection>,
) -> Result<(StatusCode, Json<TokenCreated>), ApiError> {
    let spec = spec(body?.0)?;
    let inventory = state.store.inventory();
    let now = state.store.now();
    // The newest first: a coordinator that moves has added where it goes.
    let current = inventory.addresses.iter().rev().filter(|a| a.not_before <= now);
    let addresses: Vec<_> = current.map(|a| a.address.clone()).take(MAX_ADDRESSES).collect();
    let token = state.store.create_token(permit.context(), spec).await?;
    let text = EnrollmentToken {
        id: token.id,
        secret: token.secret,
        mesh: inventory.mesh,
        root_pin: state.token_facts.root_pin,
        expires: token.expires,
        addresses,
    };
    let text = text.to_text().map_err(|e| ApiError::internal(&e))?;
    let created = TokenCreated {
        id: token.id,
        token: text.to_string(),
        expires: token.expires,
    };
    Ok((StatusCode::CREATED, Json(created)))
}

/// All tokens, the newest first, without their secrets.
#[utoipa::path(get, path = "/v1/tokens", tag = "tokens", responses((status = 200, body = TokenList)))]
pub(super) async fn list(_: Permit<Read>, State(state): State<ApiState>) -> Result<Json<TokenList>, ApiError> {
    let mut records = state.store.list_tokens().await?;
    records.sort_by_key(|t| (std::cmp::Reverse(t.created_at), t.id));
    let hosts = state.store.list_hosts(true).await?;
    let names: BTreeMap<_, _> = hosts.iter().map(|record| (record.host.id, &record.host.name)).collect();
    let summary = |t: TokenRecord| TokenSummary {
        id: t.id,
        host: (t.name != NameRule::Made).then(|| t.name.to_string()),
        labels: t.labels,
        uses_left: t.uses_left,
        expires: t.expires,
        created_at: t.created_at,
        revoked_at: t.revoked_at,
        source: t.source.map(|s| s.to_string()),
        redeemed_by: t
            .redeemed
            .iter()
            .filter_map(|(host, _)| names.get(host).copied().cloned())
            .collect(),
    };
    Ok(Json(TokenList {
        tokens: records.into_iter().map(summary).collect(),
    }))
}

/// Makes a token useless. Hosts that joined by it stay.
#[utoipa::path(delete, path = "/v1/tokens/{token}", tag = "tokens", params(("token" = String, Path, description = "The token's id")),
    responses((status = 204), (status = 404, body = Problem)))]
pub(super) async fn revoke(
    permit: Permit<Enroll>,
    State(state): State<ApiState>,
    path: Result<Path<String>, PathRejection>,
) -> Result<StatusCode, ApiError> {
    let id: TokenId = path?.0.parse().map_err(|_| ApiError::not_found("token"))?;
    state.store.revoke_token(permit.context(), id).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn spec(request: TokenRequest) -> Result<TokenSpec, ApiError> {
    let name = match request.host {
        None => NameRule::Made,
        Some(text) => text
            .parse()
            .map_err(|e| ApiError::invalid(format!("host: {e}"), "a name is 1 to 63 characters of a-z, 0-9 and hyphens"))?,
    };
    let source = request.source.map(|text| text.parse()).transpose();
    Ok(TokenSpec {
        uses: request.uses.unwrap_or(1),
        lifetime: request.valid_for_secs.map_or(DEFAULT_LIFETIME, Duration::from_secs),
        name,
        labels: request.labels,
        source: source.map_err(|e| ApiError::invalid(format!("source: {e}"), "leave it out to allow any address"))?,
    })
}
