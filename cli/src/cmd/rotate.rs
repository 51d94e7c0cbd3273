//! `cloison rotate`: the coordinator's own keys; and `cloison verify credentials`: whether what was replaced is dead.

use std::io::{self, Write};
use std::path::PathBuf;

use cloison_proto::api::{CredentialCheck, CredentialReport, MeshStatus, RotationList, RotationRequest, RotationSummary};

use super::{Context, read_text};
use crate::args::{RotateCommand, VerifyCommand};
use crate::client::Client;
use crate::config::Config;
use crate::error::{CliError, Exit};
use crate::render::{print, style, table, utc};

pub(super) async fn run(context: &Context, command: RotateCommand) -> Result<Exit, CliError> {
    let begin = |what: &str| RotationRequest { what: what.into() };
    let request = match command {
        RotateCommand::Status => None,
        RotateCommand::SigningKey => Some(begin("signing-key")),
        RotateCommand::HostIssuer => Some(begin("host-issuer")),
        RotateCommand::CoordinatorIssuer => Some(begin("coordinator-issuer")),
    };
    let all: RotationList = match request {
        None => context.client.get("rotations").await?,
        Some(request) => context.client.post("rotations", &request).await?,
    };
    print(context.output, &all, people)?;
    if all.rotations.iter().any(|rotation| rotation.from_credential) {
        anstream::eprintln!(
            "A key in use comes from a systemd credential. A next key is written to the trust folder: put it into a credential of its own name, \
             and take the former credential away once `cloison rotate status` says settled."
        );
    }
    Ok(Exit::Ok)
}

fn people(out: &mut dyn Write, all: &RotationList) -> io::Result<()> {
    let row = |r: &RotationSummary| {
        let since = if r.since.0 == 0 { "-".into() } else { utc(r.since) };
        let source = if r.from_credential { "systemd credential" } else { "trust folder" };
        vec![r.what.clone(), r.stage.clone(), since, source.into()]
    };
    table(out, &["what", "stage", "since", "key from"], all.rotations.iter().map(row))
}

pub(super) async fn verify(context: &Context, command: VerifyCommand, config: Config) -> Result<Exit, CliError> {
    let VerifyCommand::Credentials { former } = command;
    let mut report: CredentialReport = context.client.get("verify/credentials").await?;
    for path in former {
        let check = try_former(&config, path).await?;
        report.alive = report.alive.saturating_add(usize::from(check.state == "alive"));
        report.checks.push(check);
    }
    print(context.output, &report, people_report)?;
    Ok(if report.alive == 0 && report.unproven == 0 {
        Exit::Ok
    } else {
        Exit::Differs
    })
}

/// Makes a call with a credential that must be dead.
async fn try_former(config: &Config, path: PathBuf) -> Result<CredentialCheck, CliError> {
    let former = Config {
        url: config.url.clone(),
        root_certificate: config.root_certificate.clone(),
        credential: read_text(&path)?.trim().to_owned(),
    };
    let answer: Result<MeshStatus, CliError> = Client::new(&former)?.get("status").await;
    let (state, detail) = match answer {
        Ok(_) => ("alive", "a call with it was answered"),
        Err(CliError::Refused(problem)) if problem.status == 401 => ("dead", "a call with it was refused"),
        Err(other) => return Err(other),
    };
    Ok(CredentialCheck {
        what: "credential".into(),
        id: path.display().to_string(),
        state: state.into(),
        detail: detail.into(),
    })
}

fn people_report(out: &mut dyn Write, report: &CredentialReport) -> io::Result<()> {
    let row = |c: &CredentialCheck| {
        let colour = match c.state.as_str() {
            "dead" => style::GOOD,
            "alive" => style::BAD,
            _ => style::WARN,
        };
        vec![
            c.what.clone(),
            c.id.clone(),
            format!("{colour}{}{}", c.state, style::PLAIN),
            c.detail.clone(),
        ]
    };
    table(out, &["what", "which", "state", "how that is known"], report.checks.iter().map(row))?;
    writeln!(
        out,
        "{} checked, {} alive, {} unproven",
        report.checks.len(),
        report.alive,
        report.unproven
    )
}
