//! `/v1/status`: the mesh at a glance.

use axum::Json;
use axum::extract::State;
use cloison_proto::api::{MeshStatus, NotApplied};

use super::ApiState;
use super::error::ApiError;
use super::permit::{Permit, Read};

/// Most hosts that are named because the view compiled last is not in force on them.
const MAX_NAMED: usize = 100;

/// The mesh at a glance.
#[utoipa::path(get, path = "/v1/status", tag = "mesh", responses((status = 200, body = MeshStatus)))]
pub(super) async fn status(_: Permit<Read>, State(state): State<ApiState>) -> Result<Json<MeshStatus>, ApiError> {
    let inventory = state.store.inventory();
    let policy = super::policy::in_force(&state, &inventory)?;
    let hosts: Vec<_> = inventory.hosts.values().map(|host| (host, state.live.live(host.id))).collect();
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let behind = hosts.iter().filter(|(_, live)| !live.applied);
    let not_applied = behind.take(MAX_NAMED).map(|(host, live)| NotApplied {
        host: host.name.clone(),
        linked: live.linked,
        nack: state.live.refusal(host.id),
    });
    let mut warnings = Vec::new();
    for (host, live) in &hosts {
        if host.contested {
            warnings.push(format!(
                "{} is contested: somebody else tried to use the token that it joined by",
                host.name
            ));
        }
        if state.live.is_cloned(host.id) {
            warnings.push(format!("{} may be cloned: two machines use its keys", host.name));
        }
        let here = inventory.instances_on(host.id);
        let unenforced = here.filter_map(|(component, _)| Some((component, live.unenforced.get(component)?)));
        warnings.extend(unenforced.map(|(component, why)| format!("{} cannot enforce {component}: {why}", host.name)));
    }
    Ok(Json(MeshStatus {
        mesh: inventory.mesh,
        software: env!("CARGO_PKG_VERSION").into(),
        version: state.live.published(),
        policy_version: inventory.policy.as_ref().map_or(0, |p| p.version.0),
        overlay: inventory.overlay.to_string(),
        lease_secs: inventory.lease.as_secs(),
        hosts: count(hosts.len()),
        linked: count(hosts.iter().filter(|(_, live)| live.linked).count()),
        applied: count(hosts.iter().filter(|(_, live)| live.applied).count()),
        components: count(policy.components().len()),
        rules: count(policy.rules().len()),
        instances: count(inventory.instances.values().map(|on| on.len()).sum()),
        not_applied: not_applied.collect(),
        read_only: inventory.read_only.map(|read_only| read_only.to_string()),
        warnings,
    }))
}
