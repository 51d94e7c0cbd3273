//! `cloison status`: the mesh at a glance.

use std::io::{self, Write};

use cloison_proto::api::MeshStatus;

use super::Context;
use crate::error::{CliError, Exit};
use crate::render::{print, span, style};

pub(super) async fn run(context: &Context) -> Result<Exit, CliError> {
    let status: MeshStatus = context.client.get("status").await?;
    print(context.output, &status, people)?;
    Ok(Exit::Ok)
}

fn people(out: &mut dyn Write, status: &MeshStatus) -> io::Result<()> {
    let colour = if status.applied == status.hosts { style::GOOD } else { style::WARN };
    let plain = style::PLAIN;
    writeln!(out, "mesh        {}, version {}", status.mesh, status.version)?;
    writeln!(out, "overlay     {}", status.overlay)?;
    writeln!(out, "hosts       {}, {} linked", status.hosts, status.linked)?;
    writeln!(out, "components  {} with {} instances", status.components, status.instances)?;
    match status.policy_version {
        0 => writeln!(out, "policy      none yet: nothing is allowed")?,
        version => writeln!(
            out,
            "policy      {version} with {} rules, {colour}applied on {} of {}{plain} hosts",
            status.rules, status.applied, status.hosts
        )?,
    }
    writeln!(out, "lease       {}", span(status.lease_secs))?;
    for host in &status.not_applied {
        let why = match (&host.nack, host.linked) {
            (Some(nack), _) => format!("refused it: {nack}"),
            (None, true) => "has not confirmed it yet".into(),
            (None, false) => "is not linked".into(),
        };
        writeln!(out, "  {}{} {why}{plain}", style::WARN, host.host)?;
    }
    if let Some(why) = &status.read_only {
        writeln!(out, "{}read-only{plain}: {why}", style::WARN)?;
    }
    for warning in &status.warnings {
        writeln!(out, "{}warning{plain}: {warning}", style::WARN)?;
    }
    Ok(())
}
