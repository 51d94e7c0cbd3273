//! `/v1/metrics`: the Prometheus text format (version 0.0.4), with a credential that may read. Numbers only, no names of hosts.

use std::fmt::Write as _;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use cloison_proto::lease::WARNED_AT;

use super::ApiState;
use super::error::ApiError;
use super::permit::{Permit, Read};
use crate::inventory::Inventory;

/// Metrics of the coordinator.
#[utoipa::path(get, path = "/v1/metrics", tag = "mesh", responses((status = 200, content_type = "text/plain", body = String)))]
pub(super) async fn metrics(_: Permit<Read>, State(state): State<ApiState>) -> Result<Response, ApiError> {
    let inventory = state.store.inventory();
    let live: Vec<_> = inventory.hosts.keys().map(|id| state.live.live(*id)).collect();
    let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
    let instances = inventory.instances.values().map(|on| on.len()).sum();
    let gauges = [
        ("cloison_hosts", "Hosts enrolled and not revoked.", count(live.len())),
        (
            "cloison_hosts_linked",
            "Hosts whose agent is linked.",
            count(live.iter().filter(|l| l.linked).count()),
        ),
        (
            "cloison_hosts_applied",
            "Hosts on which the view compiled last is in force.",
            count(live.iter().filter(|l| l.applied).count()),
        ),
        ("cloison_instances", "Components on hosts.", count(instances)),
        (
            "cloison_instances_unenforced",
            "Instances that their agent cannot enforce.",
            count(live.iter().map(|l| l.unenforced.len()).sum()),
        ),
        (
            "cloison_policy_version",
            "Number of the policy in force.",
            inventory.policy.as_ref().map_or(0, |p| p.version.0),
        ),
        ("cloison_revision", "Revision of the mesh's state.", inventory.version.revision),
        (
            "cloison_revision_published",
            "Revision that was compiled and offered last.",
            state.live.published().revision,
        ),
        (
            "cloison_audit_entries",
            "Entries of the audit log.",
            state.store.audit_head().await?,
        ),
    ];
    let silent = lease_used(&state, &inventory).await?;
    let mut text = String::new();
    for (name, help, value) in gauges {
        // Writing to a String cannot fail.
        let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}\n");
    }
    let name = "cloison_hosts_lease_used";
    let _ = write!(
        text,
        "# HELP {name} Hosts without a link whose lease is used up to at least this share.\n# TYPE {name} gauge\n"
    );
    for (percent, hosts) in silent {
        let _ = writeln!(text, "{name}{{at_least_percent=\"{percent}\"}} {hosts}");
    }
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}

/// How many hosts without a link have used how much of their lease, as far as their last contact tells.
async fn lease_used(state: &ApiState, inventory: &Inventory) -> Result<[(u8, usize); 3], ApiError> {
    let hosts = super::status::silent(state, inventory).await?;
    Ok(WARNED_AT.map(|percent| (percent, hosts.iter().filter(|(_, used)| *used >= percent).count())))
}
