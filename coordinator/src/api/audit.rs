//! `/v1/audit`: who changed what, and when.

#![expect(
    unused_qualifications,
    reason = "the macro that describes an endpoint names its parameters by a longer path"
)]

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use cloison_proto::api::{AuditEntry, AuditList, MAX_PAGE, Problem};
use serde::Deserialize;
use utoipa::IntoParams;

use super::ApiState;
use super::error::ApiError;
use super::permit::{Permit, Read};
use crate::audit::Leaf;

/// Which page.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct Page {
    /// Only entries behind this number.
    #[serde(default)]
    after: u64,
    /// How many: 1 to 500.
    #[serde(default = "max_page")]
    limit: u32,
}

const fn max_page() -> u32 {
    MAX_PAGE
}

/// One page of the audit log, in the order in which things happened.
#[utoipa::path(get, path = "/v1/audit", tag = "mesh", params(Page), responses((status = 200, body = AuditList), (status = 400, body = Problem)))]
pub(super) async fn list(
    _: Permit<Read>,
    State(state): State<ApiState>,
    page: Result<Query<Page>, QueryRejection>,
) -> Result<Json<AuditList>, ApiError> {
    let Query(Page { after, limit }) = page?;
    let page = state.store.audit_page(after, limit.clamp(1, MAX_PAGE)).await?;
    Ok(Json(AuditList {
        entries: page.leaves.into_iter().map(entry).collect(),
        next: page.next,
    }))
}

fn entry(leaf: Leaf) -> AuditEntry {
    let outcome = match leaf.cause {
        Some(cause) => format!("{}: {cause}", leaf.outcome),
        None => leaf.outcome,
    };
    AuditEntry {
        seq: leaf.seq,
        at: leaf.time,
        actor: leaf.actor,
        action: leaf.action,
        objects: leaf.objects,
        outcome,
        request_id: leaf.request,
    }
}
