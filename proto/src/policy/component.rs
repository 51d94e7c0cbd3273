//! One entry of `components`: where it runs, how its processes are known, its labels and services.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use super::attachment::{Attachment, AttachmentError, AttachmentKind};
use super::diagnostic::{Code, Findings, Placed, Span, did_you_mean, short};
use super::fields::{Fields, Keys, listed, map, name_hint, place, text, texts};
use super::model::{On, Services};
use super::yaml::{Entry, Node, Text, Value};
use crate::label::{ComponentName, LabelKey, LabelSet, LabelValue, MAX_LABELS, NameError, ServiceName};
use crate::net::PortSpec;

/// Most hosts that one component can name; beyond, a host label is meant.
pub const MAX_HOSTS: usize = 1_000;
/// Most services of one component.
pub const MAX_SERVICES: usize = 256;
/// Most port specifications of one service.
pub const MAX_PORTS: usize = 64;

const KEYS: Keys = Keys {
    of: "a component",
    known: &["on", "attach", "labels", "services"],
    later: &["lease"],
    hint: "write `{on: app-1, attach: {unit: n8n.service}}`",
};

const ON_HINT: &str = "say where it runs: `on: app-1`, `on: [app-1, app-2]` or `on: {role: db}`";

/// A component as far as it could be read; what has errors is `None`.
#[derive(Debug)]
pub(super) struct Draft {
    pub(super) name: Placed<ComponentName>,
    pub(super) on: Option<Placed<On>>,
    pub(super) attach: Option<Placed<Attachment>>,
    pub(super) labels: Option<LabelSet>,
    pub(super) services: Option<Services>,
}

/// Reads one entry of `components`. `None` only if its name is no name.
pub(super) fn read<'a>(entry: &Entry<'a>, findings: &mut Findings<'a>) -> Option<Draft> {
    let name = name::<ComponentName>(&entry.key, "a component's name", findings);
    let mut draft = Draft {
        name: Placed {
            at: entry.key.at,
            value: name?,
        },
        on: None,
        attach: None,
        labels: None,
        services: None,
    };
    let Some(fields) = Fields::of(&entry.value, entry.key.at, &KEYS, findings) else {
        return Some(draft);
    };
    draft.on = fields.require("on", ON_HINT, findings).and_then(|e| on(e, findings));
    let hint = "say which processes it is: `attach: {unit: n8n.service}`, or `attach: host` for every process of the host";
    draft.attach = fields.require("attach", hint, findings).and_then(|e| attach(e, findings));
    draft.labels = match fields.get("labels") {
        None => Some(LabelSet::new()),
        Some(e) => labels(&e.value, e.key.at, "`labels`", findings),
    };
    draft.services = fields
        .get("services")
        .map_or_else(|| Some(Services::new()), |e| services(e, findings));
    Some(draft)
}

fn on<'a>(entry: &Entry<'a>, findings: &mut Findings<'a>) -> Option<Placed<On>> {
    let at = place(&entry.value, entry.key.at);
    let value = if matches!(entry.value.value, Value::Map(_)) {
        let labels = labels(&entry.value, entry.key.at, "`on`", findings)?;
        if labels.is_empty() {
            findings.error(Code::Empty, at, "`on` must name at least one host or label");
            return None;
        }
        On::Labels(labels.into_iter().collect())
    } else {
        if matches!(entry.value.value, Value::Null) {
            findings
                .error(
                    Code::WrongType,
                    at,
                    "`on` must be a host's name, a list of them or labels, not nothing",
                )
                .hint(ON_HINT);
            return None;
        }
        let texts = texts(&entry.value, entry.key.at, "`on`", findings)?;
        limit(texts.len(), MAX_HOSTS, "hosts in `on`", at, findings)?;
        let names: Vec<_> = texts.into_iter().map(|t| name(t, "a host's name", findings)).collect();
        On::Hosts(names.into_iter().collect::<Option<BTreeSet<_>>>()?)
    };
    Some(Placed { at, value })
}

fn attach<'a>(entry: &Entry<'a>, findings: &mut Findings<'a>) -> Option<Placed<Attachment>> {
    let at = place(&entry.value, entry.key.at);
    let one = "an attachment is `host`, or a mapping with one key such as `{unit: n8n.service}`";
    let value = match &entry.value.value {
        Value::Refused => return None,
        Value::Text(text) if text.value == "host" => Attachment::Host,
        Value::Text(text) => {
            findings
                .error(Code::BadAttachment, at, format!("`{}` is no attachment", short(&text.value)))
                .hint(as_mapping(&text.value));
            return None;
        }
        Value::Map(entries) => match entries.as_slice() {
            [only] => attachment(only, findings)?,
            _ => {
                findings.error(Code::BadAttachment, at, "a component has one attachment").hint(one);
                return None;
            }
        },
        Value::Null | Value::List(_) => {
            findings
                .error(
                    Code::WrongType,
                    at,
                    format!("`attach` must be a mapping, not {}", entry.value.kind()),
                )
                .hint(one);
            return None;
        }
    };
    Some(Placed { at, value })
}

/// How an attachment that was written as a text should have been written.
fn as_mapping(written: &str) -> String {
    match written.split_once(':') {
        Some((kind, value)) if Attachment::from_str(written).is_ok() => format!("write `attach: {{{kind}: {}}}`", value.trim()),
        Some(_) | None => {
            let known = AttachmentKind::ALL.iter().map(|k| k.as_str());
            did_you_mean(written, known).unwrap_or_else(|| "write `host`, or a mapping such as `{unit: n8n.service}`".into())
        }
    }
}

fn attachment<'a>(entry: &Entry<'a>, findings: &mut Findings<'a>) -> Option<Attachment> {
    let Ok(kind) = entry.key.value.parse::<AttachmentKind>() else {
        let message = format!("`{}` is no kind of attachment", short(&entry.key.value));
        let known: Vec<_> = AttachmentKind::ALL.iter().map(|k| k.as_str()).collect();
        let hint = did_you_mean(&entry.key.value, known.iter().copied());
        findings
            .error(Code::BadAttachment, entry.key.at, message)
            .hint(hint.unwrap_or_else(|| format!("the kinds are {}", listed(&known))));
        return None;
    };
    if kind == AttachmentKind::Host {
        findings
            .error(Code::BadAttachment, entry.key.at, "`host` has no value")
            .hint("write `attach: host`");
        return None;
    }
    let value = text(&entry.value, entry.key.at, &format!("`{kind}`"), findings)?;
    match Attachment::new(kind, Some(&value.value)) {
        Ok(attachment) => Some(attachment),
        Err(error) => {
            let message = format!("`{}` is no {kind}: {error}", short(&value.value));
            findings
                .error(Code::BadAttachment, value.at, message)
                .hint_if(attachment_hint(kind, &value.value, &error));
            None
        }
    }
}

fn attachment_hint(kind: AttachmentKind, value: &str, error: &AttachmentError) -> Option<String> {
    let guess = match kind {
        AttachmentKind::Unit => format!("{value}.service"),
        AttachmentKind::Container => format!("docker:{value}"),
        AttachmentKind::Netns => format!("/run/netns/{value}"),
        AttachmentKind::Cgroup => format!("/{value}"),
        AttachmentKind::Host | AttachmentKind::User => String::new(),
    };
    if *error == AttachmentError::Root || value == "/" {
        return Some("for every process of a host, write `attach: host`".into());
    }
    Attachment::new(kind, Some(&guess))
        .is_ok()
        .then(|| format!("did you mean `{guess}`?"))
}

fn labels<'a>(node: &Node<'a>, at: Span, what: &str, findings: &mut Findings<'a>) -> Option<LabelSet> {
    let entries = map(node, at, what, "write `{tier: app}`", findings)?;
    limit(entries.len(), MAX_LABELS, &format!("labels in {what}"), at, findings)?;
    let mut found = Vec::with_capacity(entries.len());
    for entry in entries {
        let key = name::<LabelKey>(&entry.key, "a label's key", findings);
        let value = text(&entry.value, entry.key.at, "a label's value", findings);
        let value = value.and_then(|v| name::<LabelValue>(v, "a label's value", findings));
        found.push(key.zip(value));
    }
    found.into_iter().collect()
}

fn services<'a>(entry: &Entry<'a>, findings: &mut Findings<'a>) -> Option<Services> {
    let entries = map(&entry.value, entry.key.at, "`services`", "write `{sql: tcp/5432}`", findings)?;
    limit(entries.len(), MAX_SERVICES, "services in one component", entry.key.at, findings)?;
    let found: Vec<_> = entries.iter().map(|e| service(e, findings)).collect();
    found.into_iter().collect::<Option<BTreeMap<_, _>>>()
}

fn service<'a>(entry: &Entry<'a>, findings: &mut Findings<'a>) -> Option<(ServiceName, Vec<PortSpec>)> {
    let mut name = name::<ServiceName>(&entry.key, "a service's name", findings);
    if matches!(&*entry.key.value, "icmp" | "tcp" | "udp") {
        let message = format!("a service cannot be called `{}`: in a rule, that is a protocol", entry.key.value);
        findings
            .error(Code::ReservedName, entry.key.at, message)
            .hint("give it another name, such as `ping`");
        name = None;
    }
    let texts = texts(&entry.value, entry.key.at, "a service", findings)?;
    limit(texts.len(), MAX_PORTS, "ports in one service", entry.key.at, findings)?;
    let ports: Vec<_> = texts.into_iter().map(|t| ports(t, findings)).collect();
    let ports = ports.into_iter().collect::<Option<BTreeSet<_>>>()?;
    Some((name?, ports.into_iter().collect()))
}

fn ports<'a>(text: &Text<'a>, findings: &mut Findings<'a>) -> Option<PortSpec> {
    match text.value.parse() {
        Ok(ports) => Some(ports),
        Err(error) => {
            let guess = format!("tcp/{}", text.value);
            let hint = if guess.parse::<PortSpec>().is_ok() {
                format!("write `{guess}` or `udp/{}`", text.value)
            } else {
                "write `tcp/5432`, `udp/8000-8100` or `icmp`".into()
            };
            findings.error(Code::BadPort, text.at, error.to_string()).hint(hint);
            None
        }
    }
}

/// A name of any kind.
pub(super) fn name<'a, T: FromStr<Err = NameError>>(text: &Text<'a>, what: &str, findings: &mut Findings<'a>) -> Option<T> {
    match text.value.parse() {
        Ok(name) => Some(name),
        Err(error) => {
            findings
                .error(Code::BadName, text.at, format!("not {what}: {error}"))
                .hint_if(name_hint::<T>(&text.value));
            None
        }
    }
}

fn limit(found: usize, most: usize, what: &str, at: Span, findings: &mut Findings<'_>) -> Option<()> {
    if found > most {
        findings.error(Code::TooLarge, at, format!("there are {found} {what}; at most {most} are allowed"));
        return None;
    }
    Some(())
}
