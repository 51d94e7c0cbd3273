//! `/v1/hosts` and `/v1/components`.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use cloison_proto::api::{
    ComponentList, ComponentSummary, DenialSummary, EnforcementState, HostList, HostSummary, InstanceSummary, LabelRequest, Problem,
    ProblemCode,
};
use cloison_proto::id::HostId;
use cloison_proto::label::{ComponentName, HostName};
use cloison_proto::net::AddressPair;
use cloison_proto::policy::Component;
use cloison_proto::version::Version;

use super::ApiState;
use super::error::ApiError;
use super::permit::{Operate, Permit, Read};
use crate::inventory::Inventory;
use crate::policy::explain::HostLive;
use crate::store::{HostRecord, LabelChange};

/// All hosts, revoked ones too.
#[utoipa::path(get, path = "/v1/hosts", tag = "hosts", responses((status = 200, body = HostList), (status = 401, body = Problem)))]
pub(super) async fn list(_: Permit<Read>, State(state): State<ApiState>) -> Result<Json<HostList>, ApiError> {
    let inventory = state.store.inventory();
    let records = state.store.list_hosts(true).await?;
    let mut hosts: Vec<_> = records.iter().map(|record| summary(&state, &inventory, record)).collect();
    hosts.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
    Ok(Json(HostList { hosts }))
}

/// One host, by name or id.
#[utoipa::path(get, path = "/v1/hosts/{host}", tag = "hosts", params(("host" = String, Path, description = "Name or id")),
    responses((status = 200, body = HostSummary), (status = 404, body = Problem)))]
pub(super) async fn show(
    _: Permit<Read>,
    State(state): State<ApiState>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Json<HostSummary>, ApiError> {
    let id = find(&state, &path?.0).await?;
    answer(&state, id).await
}

/// Sets and removes labels of a host.
#[utoipa::path(post, path = "/v1/hosts/{host}/labels", tag = "hosts", params(("host" = String, Path, description = "Name or id")),
    request_body = LabelRequest, responses((status = 200, body = HostSummary), (status = 404, body = Problem), (status = 409, body = Problem)))]
pub(super) async fn label(
    permit: Permit<Operate>,
    State(state): State<ApiState>,
    path: Result<Path<String>, PathRejection>,
    body: Result<Json<LabelRequest>, JsonRejection>,
) -> Result<Json<HostSummary>, ApiError> {
    let Json(LabelRequest { set, remove }) = body?;
    let id = find(&state, &path?.0).await?;
    state.store.label_host(permit.context(), id, LabelChange { set, remove }).await?;
    answer(&state, id).await
}

/// Revokes a host, for good: its flows are cut, its keys never come back.
#[utoipa::path(post, path = "/v1/hosts/{host}/revoke", tag = "hosts", params(("host" = String, Path, description = "Name or id")),
    responses((status = 200, body = HostSummary), (status = 404, body = Problem)))]
pub(super) async fn revoke(
    permit: Permit<Operate>,
    State(state): State<ApiState>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Json<HostSummary>, ApiError> {
    let id = find(&state, &path?.0).await?;
    state.store.revoke_host(permit.context(), id).await?;
    answer(&state, id).await
}

/// Asks a host's agent for a new WireGuard key. Nothing is interrupted: both keys are good until the host's peers have the new one.
#[utoipa::path(post, path = "/v1/hosts/{host}/rotate-key", tag = "hosts", params(("host" = String, Path, description = "Name or id")),
    responses((status = 202, body = HostSummary), (status = 404, body = Problem), (status = 409, body = Problem)))]
pub(super) async fn rotate_key(
    permit: Permit<Operate>,
    State(state): State<ApiState>,
    path: Result<Path<String>, PathRejection>,
) -> Result<(StatusCode, Json<HostSummary>), ApiError> {
    let id = find(&state, &path?.0).await?;
    state.store.note_key_wish(permit.context(), id).await?;
    if !state.live.wish_for_key(id) {
        let problem = Problem::new(
            ProblemCode::Conflict,
            "the host's agent has no link at this moment, so that it cannot be asked",
        );
        return Err(problem
            .hint("ask again when it is back, or run `cloison-agent rotate-key` there")
            .into());
    }
    Ok((StatusCode::ACCEPTED, answer(&state, id).await?))
}

/// All components of the policy in force, with their instances.
#[utoipa::path(get, path = "/v1/components", tag = "hosts", responses((status = 200, body = ComponentList)))]
pub(super) async fn components(_: Permit<Read>, State(state): State<ApiState>) -> Result<Json<ComponentList>, ApiError> {
    let inventory = state.store.inventory();
    let policy = super::policy::in_force(&state, &inventory)?;
    let components = policy.components().iter();
    Ok(Json(ComponentList {
        components: components
            .map(|(name, component)| component_summary(&state, &inventory, name, component))
            .collect(),
    }))
}

/// One component of the policy in force: where it runs, and how each agent said last that it is enforced.
#[utoipa::path(get, path = "/v1/components/{component}", tag = "hosts", params(("component" = String, Path, description = "Name")),
    responses((status = 200, body = ComponentSummary), (status = 404, body = Problem)))]
pub(super) async fn component(
    _: Permit<Read>,
    State(state): State<ApiState>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Json<ComponentSummary>, ApiError> {
    let unknown = || ApiError::not_found("component");
    let name: ComponentName = path?.parse().map_err(|_| unknown())?;
    let inventory = state.store.inventory();
    let policy = super::policy::in_force(&state, &inventory)?;
    let component = policy.components().get(&name).ok_or_else(unknown)?;
    Ok(Json(component_summary(&state, &inventory, &name, component)))
}

fn component_summary(state: &ApiState, inventory: &Inventory, name: &ComponentName, component: &Component) -> ComponentSummary {
    ComponentSummary {
        name: name.clone(),
        attach: component.attach.clone(),
        labels: component.labels.clone(),
        services: component.services.clone(),
        instances: instances_of(state, inventory, name),
    }
}

fn instances_of(state: &ApiState, inventory: &Inventory, name: &ComponentName) -> Vec<InstanceSummary> {
    let on = inventory.instances.get(name).into_iter().flatten();
    let known = on.filter_map(|(id, pair)| Some((inventory.hosts.get(id)?, *pair)));
    known
        .map(|(host, pair)| instance(name, &host.name, pair, &state.live.live(host.id)))
        .collect()
}

/// The host of this id, or the host of this name: the one that is not revoked, or else the one that joined last.
async fn find(state: &ApiState, text: &str) -> Result<HostId, ApiError> {
    if let Ok(id) = text.parse::<HostId>() {
        return Ok(state.store.host(id).await?.host.id);
    }
    let named = state
        .store
        .list_hosts(true)
        .await?
        .into_iter()
        .filter(|record| record.host.name.as_str() == text);
    let last = named.max_by_key(|record| (record.revoked_at.is_none(), record.host.enrolled_at, record.host.id));
    last.map(|record| record.host.id).ok_or_else(|| ApiError::not_found("host"))
}

async fn answer(state: &ApiState, id: HostId) -> Result<Json<HostSummary>, ApiError> {
    let record = state.store.host(id).await?;
    Ok(Json(summary(state, &state.store.inventory(), &record)))
}

fn summary(state: &ApiState, inventory: &Arc<Inventory>, record: &HostRecord) -> HostSummary {
    let (host, live) = (&record.host, state.live.live(record.host.id));
    let version = record.view.map(|mark| Version {
        generation: inventory.version.generation,
        revision: mark.revision,
    });
    HostSummary {
        id: host.id,
        name: host.name.clone(),
        labels: host.labels.clone(),
        wg_key: host.wg_key,
        next_wg_key: host.next.map(|next| next.key),
        enrolled_at: host.enrolled_at,
        last_seen: record.last_seen,
        revoked_at: record.revoked_at,
        linked: live.linked,
        applied: live.applied && record.revoked_at.is_none(),
        version,
        contested: host.contested,
        cloned: state.live.is_cloned(host.id),
        endpoints: state.live.endpoints(host.id),
        instances: inventory
            .instances_on(host.id)
            .map(|(component, pair)| instance(component, &host.name, pair, &live))
            .collect(),
    }
}

fn instance(component: &ComponentName, host: &HostName, pair: AddressPair, live: &HostLive) -> InstanceSummary {
    let unenforced = live.unenforced.get(component).cloned();
    let said = live.instances.get(component);
    let enforcement = match &unenforced {
        Some(_) => EnforcementState::Unenforced,
        None => said.map_or(EnforcementState::Unknown, |said| EnforcementState::from_code(&said.state)),
    };
    let by = said.filter(|said| enforcement != EnforcementState::Unenforced && !said.by.is_empty());
    let last_denial = said.and_then(|said| said.last_denial.as_ref()).map(|denial| DenialSummary {
        at: denial.at,
        outbound: denial.outbound,
        reason: denial.reason.clone(),
    });
    InstanceSummary {
        component: component.clone(),
        host: host.clone(),
        v4: pair.v4,
        v6: pair.v6,
        unenforced,
        enforcement,
        by: by.map(|said| said.by.clone()),
        last_denial,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use cloison_proto::control::agent::{InstanceReport, LastDenial};
    use cloison_proto::version::MeshTime;

    use super::*;

    fn shown(live: &HostLive) -> Result<InstanceSummary, Box<dyn std::error::Error>> {
        let pair = AddressPair {
            v4: [10, 77, 1, 0].into(),
            v6: "fd12:3456:789a::100".parse()?,
        };
        Ok(instance(&"n8n".parse()?, &"app-1".parse()?, pair, live))
    }

    #[test]
    fn an_instance_is_shown_as_its_agent_said_and_as_unknown_if_it_said_nothing() -> Result<(), Box<dyn std::error::Error>> {
        let said = |state: &str| -> Result<HostLive, Box<dyn std::error::Error>> {
            let report = InstanceReport {
                component: "n8n".parse()?,
                state: state.into(),
                by: "unit n8n.service".into(),
                last_denial: Some(LastDenial {
                    at: MeshTime(7),
                    outbound: true,
                    reason: "no_rule".into(),
                }),
            };
            Ok(HostLive {
                instances: Arc::new(BTreeMap::from([(report.component.clone(), report)])),
                ..HostLive::default()
            })
        };
        let bound = shown(&said("bound")?)?;
        assert_eq!(
            (bound.enforcement, bound.by.as_deref()),
            (EnforcementState::Bound, Some("unit n8n.service"))
        );
        assert_eq!(
            bound.last_denial.map(|d| (d.at, d.outbound, d.reason)),
            Some((MeshTime(7), true, "no_rule".into()))
        );
        assert_eq!(
            shown(&said("tomorrow's")?)?.enforcement,
            EnforcementState::Unknown,
            "newer than this coordinator"
        );
        assert_eq!(
            shown(&HostLive::default())?.enforcement,
            EnforcementState::Unknown,
            "an older agent"
        );

        // What cannot be enforced is said by older agents, too, and comes before everything else.
        let mut unenforced = said("bound")?;
        unenforced.unenforced.insert("n8n".parse()?, "no such user".into());
        let unenforced = shown(&unenforced)?;
        assert_eq!((unenforced.enforcement, unenforced.by), (EnforcementState::Unenforced, None));
        assert_eq!(unenforced.unenforced.as_deref(), Some("no such user"));
        Ok(())
    }
}
