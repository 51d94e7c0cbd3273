//! `cloison credential`: what authorises calls of the API, like this command's own.

use std::io::{self, IsTerminal as _, Write};
use std::path::Path;

use cloison_proto::api::{CredentialCreated, CredentialList, CredentialRequest, CredentialRotation, CredentialSummary, MeshStatus};
use cloison_proto::id::CredentialId;

use super::Context;
use crate::args::{CredentialCommand, CredentialCreateArgs};
use crate::client::Client;
use crate::config::Config;
use crate::error::{CliError, Exit};
use crate::render::{ago, list, print, table};

pub(super) async fn run(context: &Context, command: CredentialCommand, path: &Path) -> Result<Exit, CliError> {
    match command {
        CredentialCommand::Create(args) => {
            let made: CredentialCreated = context.client.post("credentials", &request(args)).await?;
            print(context.output, &made, people_created)?;
        }
        CredentialCommand::List => {
            let all: CredentialList = context.client.get("credentials").await?;
            print(context.output, &all, people_list)?;
        }
        CredentialCommand::Revoke { credential } => {
            context.client.delete(&format!("credentials/{credential}")).await?;
            anstream::eprintln!("{credential} is revoked: it allows nothing any more");
        }
        CredentialCommand::Rotate {
            credential: Some(credential),
            overlap,
        } => {
            let made: CredentialCreated = rotated(context, credential, overlap).await?;
            print(context.output, &made, people_created)?;
        }
        CredentialCommand::Rotate { credential: None, overlap } => rotate_own(context, overlap, path).await?,
    }
    Ok(Exit::Ok)
}

async fn rotated(context: &Context, credential: CredentialId, overlap: u64) -> Result<CredentialCreated, CliError> {
    let rotation = CredentialRotation {
        overlap_secs: Some(overlap),
    };
    context.client.post(&format!("credentials/{credential}/rotate"), &rotation).await
}

/// Two phases: the new one is written down and tried before the former is revoked, so that whoever is interrupted has one that works.
async fn rotate_own(context: &Context, overlap: u64, path: &Path) -> Result<(), CliError> {
    let all: CredentialList = context.client.get("credentials").await?;
    let made = rotated(context, all.own, overlap).await?;
    let mut config = Config::load(path)?;
    config.credential.clone_from(&made.credential);
    config.save(path)?;
    let client = Client::new(&config)?;
    let _works: MeshStatus = client.get("status").await?;
    client.delete(&format!("credentials/{}", all.own)).await?;
    anstream::eprintln!(
        "{} took the place of {}, which is revoked; {} has the new one, which ends {}",
        made.id,
        all.own,
        path.display(),
        ago(Some(made.expires))
    );
    Ok(())
}

fn request(args: CredentialCreateArgs) -> CredentialRequest {
    CredentialRequest {
        name: args.name,
        scopes: args.scope,
        valid_for_secs: Some(args.valid_for),
    }
}

/// The credential alone on standard output, so that `> file` makes what `cloison login --credential-file` reads.
fn people_created(out: &mut dyn Write, made: &CredentialCreated) -> io::Result<()> {
    writeln!(out, "{}", made.credential)?;
    if io::stdout().is_terminal() {
        anstream::eprintln!("{} ends {}; it is not shown again", made.id, ago(Some(made.expires)));
    }
    Ok(())
}

fn people_list(out: &mut dyn Write, all: &CredentialList) -> io::Result<()> {
    let row = |c: &CredentialSummary| {
        let state = match c.revoked_at {
            Some(_) => "revoked".to_owned(),
            None => ago(Some(c.expires)),
        };
        let own = if c.id == all.own { " (this one)" } else { "" };
        vec![format!("{}{own}", c.id), c.name.clone(), list(&c.scopes), state, ago(c.last_used)]
    };
    table(out, &["id", "name", "scopes", "ends", "last used"], all.credentials.iter().map(row))
}
