//! `/v1/explain`: the compiled tables' answer, with what people wrote about the rules and how the hosts do.

#![expect(
    unused_qualifications,
    reason = "the macro that describes an endpoint names its parameters by a longer path"
)]

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use cloison_proto::api::{End, EndState, Explanation, PairExplanation, Problem, RuleSummary};
use cloison_proto::id::HostId;
use cloison_proto::label::ComponentName;
use cloison_proto::policy::What;
use cloison_proto::verdict::DropReason;
use serde::Deserialize;
use utoipa::IntoParams;

use super::ApiState;
use super::error::ApiError;
use super::permit::{Permit, Read};
use super::policy::{compute, in_force, nothing_applied};
use crate::policy::Plan;
use crate::policy::explain::{self, EndVerdict, HostState, InstanceRef, PairAnswer, Question};

/// What is asked.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct Ask {
    /// The component that begins.
    from: String,
    /// The component that is reached, and on what: `postgres:sql`, `postgres:tcp/5432`, `postgres:icmp` or `postgres:*`.
    to: String,
}

/// Whether one component may reach another, by which rule, and whether it works right now.
#[utoipa::path(get, path = "/v1/explain", tag = "policy", params(Ask),
    responses((status = 200, body = Explanation), (status = 404, body = Problem), (status = 422, body = Problem)))]
pub(super) async fn explain(
    _: Permit<Read>,
    State(state): State<ApiState>,
    ask: Result<Query<Ask>, QueryRejection>,
) -> Result<Json<Explanation>, ApiError> {
    let question = question(&ask?.0)?;
    let answer = compute(move || {
        let inventory = state.store.inventory();
        if inventory.policy.is_none() {
            return Err(nothing_applied().into());
        }
        let plan = Plan::new(in_force(&state, &inventory)?, inventory)?;
        let answer = explain::explain(&plan, &question, state.store.now(), &*state.live)?;
        Ok(rendered(question, &answer))
    });
    answer.await.map(Json)
}

fn question(ask: &Ask) -> Result<Question, ApiError> {
    let hint = "write a component and what of it: postgres:sql, postgres:tcp/5432, postgres:icmp or postgres:*";
    let name = |text: &str| {
        text.parse::<ComponentName>()
            .map_err(|e| ApiError::invalid(format!("a component's name: {e}"), hint))
    };
    let (to, what) = ask
        .to
        .split_once(':')
        .ok_or_else(|| ApiError::invalid("the target says nothing behind the component", hint))?;
    let what = match what {
        "*" => What::AllServices,
        text if text == "icmp" || text.contains('/') => What::Ports(text.parse().map_err(|e| ApiError::invalid(format!("{e}"), hint))?),
        text => What::Service(
            text.parse()
                .map_err(|e| ApiError::invalid(format!("a service's name: {e}"), hint))?,
        ),
    };
    Ok(Question {
        from: name(&ask.from)?,
        to: name(to)?,
        what,
    })
}

fn rendered(question: Question, answer: &explain::Explanation) -> Explanation {
    let rules = answer.rules.iter().map(|(id, note)| RuleSummary {
        id: *id,
        text: note.arrow.clone(),
        why: note.why.as_ref().map(|n| n.as_str().to_owned()),
        owner: note.owner.as_ref().map(|n| n.as_str().to_owned()),
        expires: note.expires,
    });
    let pairs = answer
        .pairs
        .iter()
        .filter_map(|pair| rendered_pair(&question, answer, pair))
        .collect();
    let notes = notes(&question, answer);
    Explanation {
        from: question.from,
        to: question.to,
        ports: answer.ports.clone(),
        allowed: answer.by_document && answer.pairs.iter().all(PairAnswer::is_allowed),
        reason: reason(answer),
        rules: rules.collect(),
        pairs,
        notes,
    }
}

/// Why not, as the policy sees it: at the sender, a component that no rule pairs it with is an unknown destination, because its view does not
/// name it; to an operator that is a missing rule.
fn reason(answer: &explain::Explanation) -> Option<DropReason> {
    let all = answer
        .pairs
        .iter()
        .flat_map(|pair| &pair.answers)
        .flat_map(|answer| [answer.sender, answer.receiver]);
    let mut denied = all.filter_map(|end| match end {
        EndVerdict::Denied(reason) => Some(reason),
        EndVerdict::Allowed { .. } => None,
    });
    let is_denied = !answer.by_document || denied.clone().next().is_some();
    let expired = denied.any(|reason| reason == DropReason::RuleExpired);
    is_denied.then_some(if expired { DropReason::RuleExpired } else { DropReason::NoRule })
}

fn rendered_pair(question: &Question, answer: &explain::Explanation, pair: &PairAnswer) -> Option<PairExplanation> {
    let from = end(&answer.hosts, &question.from, &pair.from, pair.answers.iter().map(|a| a.sender))?;
    let to = end(&answer.hosts, &question.to, &pair.to, pair.answers.iter().map(|a| a.receiver))?;
    let allowed = pair.is_allowed();
    let works = allowed && from.state == EndState::Applied && to.state == EndState::Applied;
    Some(PairExplanation { from, to, allowed, works })
}

fn end(
    hosts: &BTreeMap<HostId, HostState>,
    component: &ComponentName,
    at: &InstanceRef,
    verdicts: impl Iterator<Item = EndVerdict>,
) -> Option<End> {
    let host = hosts.get(&at.host)?;
    let mut denied = verdicts.filter_map(|v| match v {
        EndVerdict::Denied(reason) => Some(reason.to_string()),
        EndVerdict::Allowed { .. } => None,
    });
    let state = match (host.live.linked, host.live.applied) {
        _ if host.live.unenforced.contains_key(component) => EndState::Unenforced,
        (false, _) => EndState::Offline,
        (true, false) => EndState::Pending,
        (true, true) => EndState::Applied,
    };
    let verdict = denied.next().unwrap_or_else(|| "allowed".into());
    Some(End {
        host: host.name.clone(),
        v4: at.addresses.v4,
        v6: at.addresses.v6,
        verdict,
        state,
    })
}

/// What the tables cannot say: who runs nowhere, what cannot be enforced, what was left out.
fn notes(question: &Question, answer: &explain::Explanation) -> Vec<String> {
    let mut notes = Vec::new();
    if answer.pairs.is_empty() {
        notes.push(format!(
            "{} or {} runs on no host yet: this is what the policy says, and no packet passes",
            question.from, question.to
        ));
    }
    for host in answer.hosts.values() {
        for component in [&question.from, &question.to] {
            notes.extend(
                host.live
                    .unenforced
                    .get(component)
                    .map(|why| format!("{} cannot enforce {component}: {why}", host.name)),
            );
        }
    }
    if answer.unlisted > 0 {
        notes.push(format!("{} more pairs of instances are not listed", answer.unlisted));
    }
    notes
}
