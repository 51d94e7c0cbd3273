//! From drafts to a policy: every selector must meet a component, every service must exist, no rule may stand twice and no two
//! components may claim the same processes.
//!
//! A component whose own entry has errors still counts as being there, so that one mistake is reported once. What depends on the
//! inventory (labels of hosts) is checked by the coordinator.

use std::collections::{BTreeMap, BTreeSet};

use super::attachment::{Attachment, User, UserName};
use super::diagnostic::{Code, Findings, Placed, Position, Span, did_you_mean, nearest, short};
use super::index::{Index, Member};
use super::model::{Component, On, Policy, Rule, Services, Target, What};
use super::{component, document, rule};
use crate::id::RuleId;
use crate::label::{ComponentName, HostName, LabelKey, LabelValue, Selector, ServiceName};
use crate::version::MeshTime;

/// Where the parts of a policy stand in its text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Positions {
    /// Of each component: its name.
    pub components: BTreeMap<ComponentName, Position>,
    /// Of each rule.
    pub rules: BTreeMap<RuleId, Position>,
}

/// What the checks know about each component's services: `None` if they could not be read.
type Known<'d> = Index<'d, Option<&'d Services>>;

/// Checks the drafts; the policy is meaningful only if `findings` has no error afterwards. Without a time, nothing counts as expired.
pub(super) fn check(draft: document::Draft, now: Option<MeshTime>, findings: &mut Findings<'_>) -> (Policy, Positions) {
    attachments(&draft.components, findings);
    let checked = {
        let nothing = BTreeMap::new();
        let member = |c| member(c, &nothing);
        let rules = Rules {
            known: Index::new(draft.components.iter().map(member)),
            labels_unknown: draft.incomplete || draft.components.iter().any(|c| c.labels.is_none()),
            findings,
            arrows: BTreeMap::new(),
            ids: BTreeMap::new(),
        };
        rules.check(draft.rules, now)
    };
    let mut positions = Positions {
        components: BTreeMap::new(),
        rules: checked.iter().map(|r| (r.value.id, r.at.position)).collect(),
    };
    let mut policy = Policy {
        components: BTreeMap::new(),
        rules: checked.into_iter().map(|r| r.value).collect(),
    };
    policy.rules.sort_by(|a, b| (&a.from, &a.to).cmp(&(&b.from, &b.to)));
    for component in draft.components {
        let component::Draft {
            name,
            on: Some(on),
            attach: Some(attach),
            labels: Some(labels),
            services: Some(services),
        } = component
        else {
            continue;
        };
        positions.components.insert(name.value.clone(), name.at.position);
        policy.components.insert(
            name.value,
            Component {
                on: on.value,
                attach: attach.value,
                labels,
                services,
            },
        );
    }
    (policy, positions)
}

fn member<'d>(draft: &'d component::Draft, nothing: &'d BTreeMap<LabelKey, LabelValue>) -> Member<'d, Option<&'d Services>> {
    Member {
        name: &draft.name.value,
        labels: draft.labels.as_ref().unwrap_or(nothing),
        extra: draft.services.as_ref(),
    }
}

/// No two components may claim the same processes of the same host: nobody could tell them apart. Hosts that are meant by label are known to
/// the coordinator alone.
fn attachments(components: &[component::Draft], findings: &mut Findings<'_>) {
    let mut claimed: BTreeMap<(&HostName, Attachment), (&Placed<ComponentName>, &Attachment)> = BTreeMap::new();
    for component in components {
        let (
            Some(Placed {
                value: On::Hosts(hosts), ..
            }),
            Some(attach),
        ) = (&component.on, &component.attach)
        else {
            continue;
        };
        for host in hosts {
            let Some((first, held)) = claimed.insert((host, claim(&attach.value)), (&component.name, &attach.value)) else {
                continue;
            };
            let message = format!(
                "`{}` has the attachment `{held}` on host `{host}` already, so its processes could not be told from those of `{}`",
                first.value, component.name.value
            );
            let line = first.at.position.line;
            findings
                .error(Code::AttachmentConflict, attach.at, message)
                .hint(format!("the other component is on line {line}"));
            break;
        }
    }
    overlaps(components, &claimed, findings);
}

/// What an attachment claims, in one form: the cgroup that systemd makes for a unit is that unit.
fn claim(attachment: &Attachment) -> Attachment {
    let unit = || {
        let Attachment::Cgroup(path) = attachment else { return None };
        let (slices, unit) = path.as_str().rsplit_once('/')?;
        let below_slices = slices.split('/').skip(1).all(|slice| slice.ends_with(".slice"));
        if below_slices { unit.parse().ok() } else { None }
    };
    unit().map_or_else(|| attachment.clone(), Attachment::Unit)
}

/// A service that bears the name of a user who is another component: which processes are whose is certain, and hardly what is meant.
fn overlaps(
    components: &[component::Draft],
    claimed: &BTreeMap<(&HostName, Attachment), (&Placed<ComponentName>, &Attachment)>,
    findings: &mut Findings<'_>,
) {
    for component in components {
        let (
            Some(Placed {
                value: On::Hosts(hosts), ..
            }),
            Some(attach),
        ) = (&component.on, &component.attach)
        else {
            continue;
        };
        let Attachment::Unit(unit) = claim(&attach.value) else { continue };
        let stem = unit.as_str().split(['.', '@']).next().unwrap_or_default();
        let Ok(user) = stem.parse::<UserName>() else {
            continue;
        };
        let user = Attachment::User(User::Name(user));
        let other = hosts.iter().find_map(|host| Some((host, claimed.get(&(host, user.clone()))?)));
        if let Some((host, (first, held))) = other {
            let message = format!(
                "`{}` has the attachment `{held}` on host `{host}`: if `{unit}` runs as that user, its processes are `{}`, and all others of \
                 the user are `{}`",
                first.value, component.name.value, first.value
            );
            findings.warning(Code::AttachmentOverlap, attach.at, message).hint(format!(
                "the other component is on line {}; one of the two is enough for one program",
                first.at.position.line
            ));
        }
    }
}

struct Rules<'d, 'f, 'a> {
    known: Known<'d>,
    labels_unknown: bool,
    findings: &'f mut Findings<'a>,
    arrows: BTreeMap<String, u32>,
    ids: BTreeMap<RuleId, u32>,
}

impl Rules<'_, '_, '_> {
    fn check(mut self, rules: Vec<rule::Draft>, now: Option<MeshTime>) -> Vec<Placed<Rule>> {
        let mut checked = Vec::with_capacity(rules.len());
        for draft in rules {
            if self.findings.is_full() {
                break;
            }
            draft.from.iter().flatten().for_each(|s| self.selector(&s.value, s.at));
            draft.to.iter().flatten().for_each(|t| self.target(&t.value, t.at));
            if let (Some(expires), Some(now)) = (&draft.expires, now)
                && expires.value <= now
            {
                self.findings
                    .warning(Code::Expired, expires.at, "this rule has expired: it allows nothing")
                    .hint("remove it, or prolong it");
            }
            if let rule::Draft {
                at,
                from: Some(from),
                to: Some(to),
                id,
                why,
                owner,
                expires,
            } = draft
            {
                let rule = Rule {
                    id: RuleId([0; RuleId::LEN]),
                    from: sorted(from),
                    to: sorted(to),
                    why,
                    owner,
                    expires: expires.map(|e| e.value),
                };
                checked.push(Placed {
                    at,
                    value: self.identified(rule, at, id),
                });
            }
        }
        checked
    }

    /// Gives the rule its id, and refuses it if its arrow or its id stands elsewhere.
    fn identified(&mut self, rule: Rule, at: Span, given: Option<Placed<RuleId>>) -> Rule {
        let arrow = rule.arrow();
        let own = Rule::id_of(&arrow);
        if let Some(line) = self.arrows.insert(arrow, at.position.line) {
            let message = format!("this rule stands on line {line} already");
            self.findings.error(Code::DuplicateRule, at, message).hint("remove one of the two");
            return rule;
        }
        let (id, id_at) = given.map_or((own, at), |g| (g.value, g.at));
        if let Some(line) = self.ids.insert(id, at.position.line) {
            let message = format!("the rule on line {line} has the id `{id}` already");
            self.findings
                .error(Code::DuplicateId, id_at, message)
                .hint("leave `id` out: a rule without one gets one from its arrow");
        }
        Rule { id, ..rule }
    }

    /// A selector that meets nobody is a mistake everywhere.
    fn selector(&mut self, selector: &Selector, at: Span) {
        if self.known.members(selector).next().is_some() {
            return;
        }
        match selector {
            Selector::Name(name) => {
                let hint = did_you_mean(name.as_str(), self.known.names());
                self.findings
                    .error(Code::UnknownComponent, at, format!("there is no component `{name}`"))
                    .hint(hint.unwrap_or_else(|| "add it to `components`, or select by `label=value`".into()));
            }
            Selector::Labels(_) if self.labels_unknown => {}
            Selector::Labels(labels) => {
                let hint = labels.iter().find_map(|(k, v)| self.label_hint(k, v));
                self.findings
                    .error(Code::NoMatch, at, format!("no component has `{selector}`"))
                    .hint(hint.unwrap_or_else(|| "each of these labels exists, but no component has all of them".into()));
            }
        }
    }

    /// What to write instead of a label that no component has; `None` if some component has it.
    fn label_hint(&self, key: &LabelKey, value: &LabelValue) -> Option<String> {
        let of_key: Vec<_> = self.known.labels().filter(|(k, _)| *k == key).map(|(_, v)| v).collect();
        if of_key.contains(&value) {
            return None;
        }
        if of_key.is_empty() {
            let guess = did_you_mean(key.as_str(), self.known.labels().map(|(k, _)| k.as_str()));
            return Some(guess.unwrap_or_else(|| format!("no component has a label `{key}`")));
        }
        let guess = nearest(value.as_str(), of_key.iter().map(|v| v.as_str()));
        Some(guess.map(|v| format!("did you mean `{key}={v}`?")).unwrap_or_else(|| {
            let some: Vec<_> = of_key.iter().take(8).map(|v| format!("`{key}={v}`")).collect();
            format!("components have {}", some.join(", "))
        }))
    }

    fn target(&mut self, target: &Target, at: Span) {
        self.selector(&target.selector, at);
        let mut members = self.known.members(&target.selector).peekable();
        let has = |services: &Services| match &target.what {
            What::Ports(_) => true,
            What::AllServices => !services.is_empty(),
            What::Service(name) => services.contains_key(name),
        };
        // Nobody to ask has been reported above; services that could not be read may be the ones.
        if members.peek().is_none() || members.any(|m| m.extra.is_none_or(has)) {
            return;
        }
        let (message, hint) = match &target.what {
            What::Service(name) => self.no_service(&target.selector, name),
            What::AllServices | What::Ports(_) => (
                format!("`{}` has no service, so `*` means nothing", target.selector),
                "declare `services` there, or name ports: `tcp/5432`".into(),
            ),
        };
        self.findings.error(Code::UnknownService, at, message).hint(hint);
    }

    fn no_service(&self, selector: &Selector, service: &ServiceName) -> (String, String) {
        let message = match selector {
            Selector::Name(name) => format!("`{name}` has no service `{service}`"),
            Selector::Labels(_) => format!("no component with `{selector}` has a service `{service}`"),
        };
        let names: BTreeSet<_> = self
            .known
            .members(selector)
            .filter_map(|m| m.extra)
            .flat_map(Services::keys)
            .map(ServiceName::as_str)
            .collect();
        let hint = if service.as_str().bytes().all(|b| b.is_ascii_digit()) {
            format!("for a port, write `{selector}:tcp/{service}`")
        } else if let Some(guess) = did_you_mean(service.as_str(), names.iter().copied()) {
            guess
        } else if names.is_empty() {
            "it declares no services: add `services: {sql: tcp/5432}` there, or name a port: `tcp/5432`".into()
        } else {
            let some: Vec<_> = names.iter().take(8).map(|n| format!("`{}`", short(n))).collect();
            format!("the services there are {}", some.join(", "))
        };
        (message, hint)
    }
}

/// The canonical order of one side: sorted, each entry once.
fn sorted<T: Ord>(side: Vec<Placed<T>>) -> Vec<T> {
    side.into_iter().map(|p| p.value).collect::<BTreeSet<_>>().into_iter().collect()
}
