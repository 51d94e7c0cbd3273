//! `/v1/addresses`: where hosts find the coordinator. They are told by their views, and keep the last ones on their disks.

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection};
use axum::extract::{Path, State};
use cloison_proto::api::{AddressList, AddressRequest, AddressSummary, Problem};

use super::ApiState;
use super::error::ApiError;
use super::permit::{Owner, Permit, Read};
use crate::config::HostPort;

/// All addresses that hosts are told.
#[utoipa::path(get, path = "/v1/addresses", tag = "mesh", responses((status = 200, body = AddressList)))]
pub(super) async fn list(_: Permit<Read>, State(state): State<ApiState>) -> Json<AddressList> {
    Json(all(&state))
}

/// Adds an address. Hosts try all in turn.
#[utoipa::path(post, path = "/v1/addresses", tag = "mesh", request_body = AddressRequest,
    responses((status = 200, body = AddressList), (status = 422, body = Problem)))]
pub(super) async fn add(
    permit: Permit<Owner>,
    State(state): State<ApiState>,
    body: Result<Json<AddressRequest>, JsonRejection>,
) -> Result<Json<AddressList>, ApiError> {
    let address = read(&body?.0.address)?;
    state.store.add_address(permit.context(), &address).await?;
    Ok(Json(all(&state)))
}

/// Removes an address. The last one stays.
#[utoipa::path(delete, path = "/v1/addresses/{address}", tag = "mesh", params(("address" = String, Path, description = "host:port")),
    responses((status = 200, body = AddressList), (status = 404, body = Problem), (status = 422, body = Problem)))]
pub(super) async fn remove(
    permit: Permit<Owner>,
    State(state): State<ApiState>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Json<AddressList>, ApiError> {
    let address = read(&path?.0)?;
    state.store.remove_address(permit.context(), &address).await?;
    Ok(Json(all(&state)))
}

fn read(text: &str) -> Result<HostPort, ApiError> {
    text.parse().map_err(|_| {
        ApiError::invalid(
            "this is no address",
            "write host:port, like coordinator.example.org:7443 or [2001:db8::1]:7443",
        )
    })
}

fn all(state: &ApiState) -> AddressList {
    let inventory = state.store.inventory();
    let summary = |one: &crate::inventory::CoordinatorAddress| AddressSummary {
        address: one.address.clone(),
        since: one.not_before,
    };
    AddressList {
        addresses: inventory.addresses.iter().map(summary).collect(),
    }
}
