//! `/v1/policy`: read it, check one, put one into force. Walk 3 begins here.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse as _, Response};
use cloison_proto::api::{Access, AccessChange, PolicyAnswer, PolicyCheck, PolicyRequest, Problem, ProblemCode};
use cloison_proto::policy::{self, On, Policy};
use cloison_proto::version::MeshTime;
use tokio::sync::Semaphore;

use super::ApiState;
use super::error::ApiError;
use super::permit::{Permit, Policy as PolicyScope, Read};
use crate::inventory::{self, Inventory, Placement, PolicyVersion, StoredPolicy};
use crate::policy::diff::{self, AccessDiff};
use crate::store::{IfMatch, PolicyWrite};

/// The policy in force.
#[utoipa::path(get, path = "/v1/policy", tag = "policy", responses((status = 200, body = PolicyAnswer, headers(("ETag" = String, description = "The policy's version"))), (status = 404, body = Problem)))]
pub(super) async fn get(_: Permit<Read>, State(state): State<ApiState>) -> Result<Response, ApiError> {
    let inventory = state.store.inventory();
    let stored = inventory.policy.as_ref().ok_or_else(nothing_applied)?;
    Ok(answer(stored, inventory.version.revision, None))
}

/// Puts a policy into force. `If-Match` with the version that was read, or `If-None-Match: *` for the first, keeps two edits from
/// overwriting each other.
#[utoipa::path(put, path = "/v1/policy", tag = "policy", request_body = PolicyRequest,
    params(("If-Match" = Option<String>, Header, description = "ETag of the policy to replace, or `*`"), ("If-None-Match" = Option<String>, Header, description = "`*` for the first policy")),
    responses((status = 200, body = PolicyAnswer), (status = 409, body = Problem), (status = 412, body = Problem), (status = 422, body = Problem), (status = 428, body = Problem)))]
pub(super) async fn put(
    permit: Permit<PolicyScope>,
    State(state): State<ApiState>,
    headers: HeaderMap,
    body: Result<Json<PolicyRequest>, JsonRejection>,
) -> Result<Response, ApiError> {
    let condition = condition(&headers)?;
    let text = body?.0.policy;
    let reader = state.clone();
    let (write, change) = compute(move || {
        let after = policy::parse(&text).map_err(ApiError::policy)?;
        let change = change(&reader, &after, reader.store.now())?;
        let placements = placements(&after);
        Ok((PolicyWrite { text, placements }, change))
    })
    .await?;
    let written = state.store.put_policy(permit.context(), write, condition).await?;
    let stored = state.store.policy(written.version).await?;
    Ok(answer(&stored, written.revision, Some(change)))
}

/// Finds every mistake in a policy, and says what it would open and close. Changes nothing.
#[utoipa::path(post, path = "/v1/policy/check", tag = "policy", request_body = PolicyRequest, responses((status = 200, body = PolicyCheck)))]
pub(super) async fn check(
    _: Permit<Read>,
    State(state): State<ApiState>,
    body: Result<Json<PolicyRequest>, JsonRejection>,
) -> Result<Json<PolicyCheck>, ApiError> {
    let text = body?.0.policy;
    let check = compute(move || {
        let now = state.store.now();
        Ok(match policy::check(&text, now) {
            Err(diagnostics) => PolicyCheck {
                valid: false,
                diagnostics,
                change: None,
            },
            Ok(checked) => PolicyCheck {
                valid: true,
                diagnostics: checked.warnings,
                change: Some(change(&state, &checked.policy, now)?),
            },
        })
    });
    check.await.map(Json)
}

/// What is told where a policy is needed before the first was applied.
pub(super) fn nothing_applied() -> Problem {
    let problem = Problem::new(ProblemCode::NotFound, "no policy was applied yet: nothing is allowed");
    problem.hint("`cloison policy apply FILE` puts one into force")
}

/// The policy in force; the empty one before the first.
pub(super) fn in_force(state: &ApiState, inventory: &Inventory) -> Result<Arc<Policy>, ApiError> {
    let unreadable = |_| Problem::new(ProblemCode::Internal, "the policy in force cannot be read by this version").hint("apply it again");
    Ok(state.policies.in_force(inventory).map_err(unreadable)?)
}

/// Runs what takes long beside the tasks that serve links, two at a time.
pub(super) async fn compute<T: Send + 'static>(work: impl FnOnce() -> Result<T, ApiError> + Send + 'static) -> Result<T, ApiError> {
    static PLACES: Semaphore = Semaphore::const_new(2);
    let _place = PLACES.acquire().await.map_err(|e| ApiError::internal(&e))?;
    tokio::task::spawn_blocking(work).await.map_err(|e| ApiError::internal(&e))?
}

fn answer(stored: &StoredPolicy, revision: u64, change: Option<AccessChange>) -> Response {
    let PolicyVersion(version) = stored.version;
    let body = PolicyAnswer {
        version,
        revision,
        policy: stored.text.to_string(),
        applied_at: Some(stored.applied_at),
        change,
    };
    let mut response = Json(body).into_response();
    if let Ok(tag) = HeaderValue::from_str(&format!("\"{version}\"")) {
        response.headers_mut().insert(header::ETAG, tag);
    }
    response
}

/// The writer's belief about what is in force (RFC 9110 sections 13.1.1 and 13.1.2): exactly one of the two headers.
fn condition(headers: &HeaderMap) -> Result<IfMatch, ApiError> {
    let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or_default().trim());
    let needed = || {
        let problem = Problem::new(
            ProblemCode::PreconditionRequired,
            "`If-Match` or `If-None-Match` is needed, so that no edit is lost",
        );
        problem.hint("send the ETag of the policy that you read as `If-Match`, or `If-None-Match: *` for the first one")
    };
    match (text(header::IF_MATCH), text(header::IF_NONE_MATCH)) {
        (Some("*"), None) => Ok(IfMatch::Any),
        (None, Some("*")) => Ok(IfMatch::Absent),
        (Some(tag), None) => {
            let number = tag.strip_prefix('"').and_then(|t| t.strip_suffix('"')).and_then(|t| t.parse().ok());
            Ok(IfMatch::Version(PolicyVersion(number.ok_or_else(needed)?)))
        }
        _ => Err(needed().into()),
    }
}

fn placements(policy: &Policy) -> Vec<Placement> {
    let on = |on: &On| match on {
        On::Hosts(names) => names.iter().cloned().map(inventory::On::Name).collect(),
        On::Labels(labels) => vec![inventory::On::Labels(labels.clone())],
    };
    let components = policy.components().iter();
    components
        .map(|(name, component)| Placement {
            component: name.clone(),
            on: on(&component.on),
        })
        .collect()
}

fn change(state: &ApiState, after: &Policy, now: MeshTime) -> Result<AccessChange, ApiError> {
    let before = in_force(state, &state.store.inventory())?;
    let AccessDiff { added, removed, .. } = diff::diff(&before, after, now);
    let access = |a: diff::Access| Access {
        from: a.from,
        to: a.to,
        ports: a.ports,
    };
    Ok(AccessChange {
        opened: added.into_iter().map(access).collect(),
        closed: removed.into_iter().map(access).collect(),
    })
}
