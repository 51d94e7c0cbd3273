//! `/v1/rotations`: the coordinator's own keys; and `/v1/verify/credentials`: whether what was replaced, used up or revoked is dead.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::http::StatusCode;
use cloison_proto::api::{CredentialCheck, CredentialReport, Problem, ProblemCode, RotationList, RotationRequest, RotationSummary};
use cloison_proto::id::HostId;
use cloison_proto::key::WgPublicKey;
use cloison_proto::trust::statement_values;
use cloison_proto::version::MeshTime;
use cloison_proto::view::{Items, View};

use super::ApiState;
use super::error::ApiError;
use super::permit::{Owner, Permit, Read};
use crate::audit::Action;
use crate::trust::{Part, RootsError, Stage, hex};

/// How far the rotations of the coordinator's keys are.
#[utoipa::path(get, path = "/v1/rotations", tag = "mesh", responses((status = 200, body = RotationList)))]
pub(super) async fn list(_: Permit<Read>, State(state): State<ApiState>) -> Json<RotationList> {
    Json(all(&state))
}

/// Begins to rotate a part of the trust: its next key is made and announced to all hosts. It is used once all trust it, and the former one
/// is retired a lease later.
#[utoipa::path(post, path = "/v1/rotations", tag = "mesh", request_body = RotationRequest,
    responses((status = 202, body = RotationList), (status = 409, body = Problem), (status = 422, body = Problem)))]
pub(super) async fn begin(
    permit: Permit<Owner>,
    State(state): State<ApiState>,
    body: Result<Json<RotationRequest>, JsonRejection>,
) -> Result<(StatusCode, Json<RotationList>), ApiError> {
    let what = body?.0.what;
    let part: Part = what
        .parse()
        .map_err(|_| ApiError::invalid("this cannot be rotated", "write signing-key, host-issuer or coordinator-issuer"))?;
    if state.roots.stage(part) != Stage::Settled {
        return Err(refused(&RootsError::UnderWay(part)));
    }
    state.store.note_rotation(permit.context(), Action::TrustAnnounce, part).await?;
    let (roots, env) = (Arc::clone(&state.roots), state.store.environment().clone());
    let announced = tokio::task::spawn_blocking(move || roots.announce(part, &env)).await;
    match announced {
        Ok(Ok(())) => Ok((StatusCode::ACCEPTED, Json(all(&state)))),
        Ok(Err(error)) => Err(refused(&error)),
        Err(error) => Err(ApiError::internal(&error)),
    }
}

fn refused(error: &RootsError) -> ApiError {
    match error {
        RootsError::UnderWay(_) => Problem::new(ProblemCode::Conflict, error.to_string()).into(),
        RootsError::Missing { .. }
        | RootsError::Exists { .. }
        | RootsError::TooOpen { .. }
        | RootsError::Damaged { .. }
        | RootsError::Io { .. }
        | RootsError::Entropy(_)
        | RootsError::Issue(_) => ApiError::internal(error),
    }
}

fn all(state: &ApiState) -> RotationList {
    let summary = |part: Part| {
        let (stage, since) = match state.roots.stage(part) {
            Stage::Settled => ("settled", MeshTime(0)),
            Stage::Announced(since) => ("announced", since),
            Stage::Switched(since) => ("switched", since),
        };
        RotationSummary {
            what: part.to_string(),
            stage: stage.into(),
            since,
            from_credential: state.roots.is_from_credential(part),
        }
    };
    RotationList {
        rotations: Part::ALL.into_iter().map(summary).collect(),
    }
}

/// Looks whether everything that was replaced, used up or revoked is dead: in the store as it judges, and in the views that hosts have in
/// force. A host that has not acknowledged its last view may still trust what it had, until its lease ends: that is unproven.
#[utoipa::path(get, path = "/v1/verify/credentials", tag = "mesh", responses((status = 200, body = CredentialReport)))]
pub(super) async fn verify(_: Permit<Read>, State(state): State<ApiState>) -> Result<Json<CredentialReport>, ApiError> {
    let now = state.store.now();
    let mut checks = Vec::new();
    for token in state.store.list_tokens().await? {
        let why = match (token.revoked_at, token.uses_left) {
            (Some(_), _) => "revoked",
            (None, 0) => "used up",
            (None, _) if token.expires <= now => "expired",
            (None, _) => continue,
        };
        let alive = state.store.would_admit(token.id).await?;
        checks.push(check(
            "token",
            token.id.to_string(),
            alive,
            format!("{why}: a join by it is refused"),
        ));
    }
    for credential in state.store.list_credentials().await? {
        let why = match credential.revoked_at {
            Some(_) => "revoked",
            None if credential.expires <= now => "expired",
            None => continue,
        };
        let alive = state.store.is_live(credential.id).await?;
        checks.push(check(
            "credential",
            credential.id.to_string(),
            alive,
            format!("{why}: calls with it are refused"),
        ));
    }
    let (dead, retired) = (state.store.dead_wg_keys().await?, state.roots.retired());
    let (views, lease) = (state.live.in_force(), state.store.inventory().lease);
    let mut gone = BTreeSet::new();
    for record in state.store.list_hosts(false).await? {
        let last = record.last_seen.unwrap_or(record.host.enrolled_at);
        if last.plus(lease) < now && !state.live.live(record.host.id).linked {
            gone.insert(record.host.id);
        }
    }
    let found = tokio::task::spawn_blocking(move || Found::of(&views, &gone)).await;
    let found = found.map_err(|error| ApiError::internal(&error))?;
    checks.extend(dead.keys().map(|key| found.wg_key(key)));
    let current: BTreeSet<_> = state
        .roots
        .statements(&[])
        .iter()
        .flat_map(statement_values)
        .map(|value| hex(&value))
        .collect();
    checks.extend(retired.iter().map(|retired| {
        let alive = current.contains(&retired.digest);
        found.statement(retired.part.as_str(), &retired.digest, alive)
    }));
    let count = |wanted: &str| checks.iter().filter(|check| check.state == wanted).count();
    Ok(Json(CredentialReport {
        alive: count("alive"),
        unproven: count("unproven"),
        checks,
    }))
}

/// What hosts' views name.
#[derive(Default)]
struct Found {
    keys: BTreeMap<WgPublicKey, HostId>,
    values: BTreeMap<String, HostId>,
    unknown: BTreeSet<HostId>,
}

impl Found {
    /// Of a host that is `gone`, because its lease has ended, nothing counts.
    fn of(views: &[(HostId, Option<Arc<Items>>)], gone: &BTreeSet<HostId>) -> Self {
        let mut found = Self::default();
        for (host, items) in views.iter().filter(|(host, _)| !gone.contains(host)) {
            let view = items.as_ref().and_then(|items| View::parse(items, *host).ok());
            let Some(view) = view else {
                found.unknown.insert(*host);
                continue;
            };
            let keys = view.peers.values().flat_map(|peer| &peer.wg_keys).chain(&view.host.wg_keys);
            found.keys.extend(keys.map(|key| (*key, *host)));
            let values = view.trust.iter().flat_map(statement_values);
            found.values.extend(values.map(|value| (hex(&value), *host)));
        }
        found
    }

    fn wg_key(&self, key: &WgPublicKey) -> CredentialCheck {
        self.judge("wireguard key", key.to_string(), self.keys.get(key))
    }

    fn statement(&self, what: &str, digest: &str, alive: bool) -> CredentialCheck {
        let id = digest.chars().take(16).collect::<String>();
        if alive {
            return check(what, id, true, "the coordinator still announces it".into());
        }
        self.judge(what, id, self.values.get(digest))
    }

    fn judge(&self, what: &str, id: String, named_by: Option<&HostId>) -> CredentialCheck {
        if let Some(host) = named_by {
            return check(what, id, true, format!("the view in force on {host} names it"));
        }
        if self.unknown.is_empty() {
            return check(what, id, false, "no view in force names it".into());
        }
        let hosts: Vec<_> = self.unknown.iter().take(5).map(ToString::to_string).collect();
        CredentialCheck {
            what: what.into(),
            id,
            state: "unproven".into(),
            detail: format!(
                "{} hosts have not acknowledged their view: {}",
                self.unknown.len(),
                hosts.join(", ")
            ),
        }
    }
}

fn check(what: &str, id: String, alive: bool, detail: String) -> CredentialCheck {
    CredentialCheck {
        what: what.into(),
        id,
        state: if alive { "alive" } else { "dead" }.into(),
        detail,
    }
}
