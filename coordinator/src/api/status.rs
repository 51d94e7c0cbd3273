//! `/v1/status`: the mesh at a glance.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use cloison_proto::api::{MeshStatus, NotApplied};
use cloison_proto::label::HostName;
use cloison_proto::lease::warned_at;
use jiff::SignedDuration;

use super::ApiState;
use super::error::ApiError;
use super::permit::{Permit, Read};
use crate::inventory::Inventory;
use crate::store::HostRecord;

/// Most hosts that are named because the view compiled last is not in force on them.
const MAX_NAMED: usize = 100;

/// The mesh at a glance.
#[utoipa::path(get, path = "/v1/status", tag = "mesh", responses((status = 200, body = MeshStatus)))]
pub(super) async fn status(_: Permit<Read>, State(state): State<ApiState>) -> Result<Json<MeshStatus>, ApiError> {
    // First: what is published meanwhile is in force nowhere yet, and must not seem to be.
    let version = state.live.published();
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
    if let Some(lead) = state.store.environment().clock.lead() {
        warnings.push(format!(
            "the coordinator's wall clock is {:#} behind the mesh's time, which goes on from where it was and lets the clock catch up by itself, \
             43 s a day: nothing stops; `timedatectl` shows whether the clock is right",
            SignedDuration::try_from(Duration::from_secs(lead.as_secs())).unwrap_or(SignedDuration::MAX)
        ));
    }
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
    let mut silent = silent(&state, &inventory).await?;
    silent.sort_by_key(|(_, used)| std::cmp::Reverse(*used));
    for (name, used) in silent.iter().take(MAX_NAMED) {
        warnings.push(match used {
            100.. => format!("{name} was not in contact for longer than its lease: nothing is allowed there"),
            _ => format!("{name} was not in contact for {used} % of its lease: at its end nothing is allowed there"),
        });
    }
    Ok(Json(MeshStatus {
        mesh: inventory.mesh,
        software: env!("CARGO_PKG_VERSION").into(),
        version,
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

/// Hosts that have no link and a used share of their lease, in percent, that is worth a warning: 50, 80, 95, or 100 when it has ended.
pub(super) async fn silent(state: &ApiState, inventory: &Inventory) -> Result<Vec<(HostName, u8)>, ApiError> {
    let now = state.store.now();
    let lease = inventory.lease;
    let used = |record: &HostRecord| {
        let since = Duration::from_secs(now.0.saturating_sub(record.last_seen?.0));
        let left = lease.saturating_sub(since);
        let percent = if left.is_zero() { 100 } else { warned_at(left, lease)? };
        (!state.live.live(record.host.id).linked).then(|| (record.host.name.clone(), percent))
    };
    Ok(state.store.list_hosts(false).await?.iter().filter_map(used).collect())
}
