//! `cloison host`: the machines of the mesh.

use std::io::{self, IsTerminal as _, Write};

use cloison_proto::api::{HostList, HostSummary, LabelRequest};

use super::Context;
use super::component::enforced;
use crate::args::{HostCommand, LabelChange};
use crate::client::percent_encoded;
use crate::error::{CliError, Exit};
use crate::render::{ago, list, print, style, table, yes_no};

pub(super) async fn run(context: &Context, command: HostCommand) -> Result<Exit, CliError> {
    match command {
        HostCommand::List => {
            let hosts: HostList = context.client.get("hosts").await?;
            print(context.output, &hosts, people_list)?;
        }
        HostCommand::Show { host } => {
            let host: HostSummary = context.client.get(&format!("hosts/{}", percent_encoded(&host))).await?;
            print(context.output, &host, people_one)?;
        }
        HostCommand::Label { host, changes } => {
            let path = format!("hosts/{}/labels", percent_encoded(&host));
            let host: HostSummary = context.client.post(&path, &request(changes)).await?;
            print(context.output, &host, people_one)?;
        }
        HostCommand::RotateKey { host } => {
            let path = format!("hosts/{}/rotate-key", percent_encoded(&host));
            let host: HostSummary = context.client.post(&path, &serde_json::json!({})).await?;
            print(context.output, &host, |out, host| {
                writeln!(
                    out,
                    "{} was asked for a new WireGuard key; `cloison host show {}` shows both while they overlap",
                    host.name, host.name
                )
            })?;
        }
        HostCommand::Revoke { host, yes } => {
            if !yes {
                confirm(&host)?;
            }
            let path = format!("hosts/{}/revoke", percent_encoded(&host));
            let host: HostSummary = context.client.post(&path, &serde_json::json!({})).await?;
            print(context.output, &host, |out, host| {
                writeln!(out, "{} is revoked: its flows are cut, and its keys never come back", host.name)
            })?;
        }
    }
    Ok(Exit::Ok)
}

fn request(changes: Vec<LabelChange>) -> LabelRequest {
    let mut request = LabelRequest::default();
    for change in changes {
        match change {
            LabelChange::Set(key, value) => drop(request.set.insert(key, value)),
            LabelChange::Remove(key) => drop(request.remove.insert(key)),
        }
    }
    request
}

/// Asks on a terminal; elsewhere `--yes` must stand.
fn confirm(host: &str) -> Result<(), CliError> {
    let refused = || CliError::Input {
        what: format!("`{host}` was not revoked"),
        hint: "a revoked host is cut off for good; confirm by its name, or with --yes".into(),
    };
    if !io::stdin().is_terminal() {
        return Err(refused());
    }
    anstream::eprint!("This cuts {host} off for good. Type its name to confirm: ");
    let mut typed = String::new();
    io::stdin().read_line(&mut typed).map_err(|_| refused())?;
    if typed.trim() == host { Ok(()) } else { Err(refused()) }
}

fn state(host: &HostSummary) -> String {
    let (colour, word) = match host {
        HostSummary { revoked_at: Some(_), .. } => (style::FAINT, "revoked"),
        HostSummary { contested: true, .. } => (style::BAD, "contested"),
        HostSummary { cloned: true, .. } => (style::BAD, "cloned?"),
        HostSummary {
            linked: true,
            applied: true,
            ..
        } => (style::GOOD, "applied"),
        HostSummary { linked: true, .. } => (style::WARN, "pending"),
        _ => (style::WARN, "offline"),
    };
    format!("{colour}{word}{}", style::PLAIN)
}

fn labels(host: &HostSummary) -> String {
    list(host.labels.iter().map(|(key, value)| format!("{key}={value}")))
}

fn people_list(out: &mut dyn Write, all: &HostList) -> io::Result<()> {
    let row = |h: &HostSummary| {
        vec![
            h.name.to_string(),
            state(h),
            ago(h.last_seen),
            labels(h),
            list(h.instances.iter().map(|i| &i.component)),
            h.id.to_string(),
        ]
    };
    table(
        out,
        &["name", "state", "last seen", "labels", "components", "id"],
        all.hosts.iter().map(row),
    )
}

fn people_one(out: &mut dyn Write, host: &HostSummary) -> io::Result<()> {
    writeln!(out, "{} ({}), {}", host.name, host.id, state(host))?;
    writeln!(out, "labels     {}", labels(host))?;
    writeln!(out, "enrolled   {}", ago(Some(host.enrolled_at)))?;
    writeln!(out, "last seen  {}", ago(host.last_seen))?;
    writeln!(out, "linked     {}", yes_no(host.linked))?;
    writeln!(out, "endpoints  {}", list(&host.endpoints))?;
    writeln!(out, "wg key     {}", host.wg_key)?;
    if let Some(next) = host.next_wg_key {
        writeln!(out, "next key   {next}, once all its peers have it")?;
    }
    let row = |i: &cloison_proto::api::InstanceSummary| vec![i.component.to_string(), i.v4.to_string(), i.v6.to_string(), enforced(i)];
    table(out, &["component", "ipv4", "ipv6", "enforced"], host.instances.iter().map(row))
}
