//! `cloison token`: what lets hosts join.

use std::io::{self, IsTerminal as _, Write};

use cloison_proto::api::{TokenCreated, TokenList, TokenRequest, TokenSummary};

use super::Context;
use crate::args::{TokenCommand, TokenCreateArgs};
use crate::error::{CliError, Exit};
use crate::render::{ago, list, print, table};

pub(super) async fn run(context: &Context, command: TokenCommand) -> Result<Exit, CliError> {
    match command {
        TokenCommand::Create(args) => {
            let token: TokenCreated = context.client.post("tokens", &request(args)).await?;
            print(context.output, &token, people_created)?;
        }
        TokenCommand::List => {
            let tokens: TokenList = context.client.get("tokens").await?;
            print(context.output, &tokens, people_list)?;
        }
        TokenCommand::Revoke { token } => {
            context.client.delete(&format!("tokens/{token}")).await?;
            anstream::eprintln!("{token} is revoked: nobody joins by it any more");
        }
    }
    Ok(Exit::Ok)
}

fn request(args: TokenCreateArgs) -> TokenRequest {
    TokenRequest {
        host: args.host,
        labels: args.labels.into_iter().collect(),
        uses: Some(args.uses),
        valid_for_secs: Some(args.valid_for),
        source: args.source,
    }
}

/// The token alone on standard output, so that `> token` makes the file for `cloison-agent join`; advice goes to standard error.
fn people_created(out: &mut dyn Write, token: &TokenCreated) -> io::Result<()> {
    writeln!(out, "{}", token.token)?;
    if io::stdout().is_terminal() {
        anstream::eprintln!(
            "{} ends {}; it is not shown again. On the host: cloison-agent join --token-stdin",
            token.id,
            ago(Some(token.expires))
        );
    }
    Ok(())
}

fn people_list(out: &mut dyn Write, all: &TokenList) -> io::Result<()> {
    let state = |t: &TokenSummary| match (t.revoked_at, t.uses_left) {
        (Some(_), _) => "revoked".to_owned(),
        (None, 0) => "used".to_owned(),
        (None, left) => format!("{left} left"),
    };
    let row = |t: &TokenSummary| {
        let host = t.host.clone().unwrap_or_else(|| "-".into());
        let labels = list(t.labels.iter().map(|(key, value)| format!("{key}={value}")));
        vec![t.id.to_string(), host, state(t), ago(Some(t.expires)), labels, list(&t.redeemed_by)]
    };
    table(
        out,
        &["id", "host", "uses", "ends", "labels", "joined by it"],
        all.tokens.iter().map(row),
    )
}
