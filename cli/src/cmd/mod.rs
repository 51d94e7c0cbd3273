//! The commands: one file each, one path through each: ask, print, decide how to end.

mod audit;
mod completions;
mod component;
mod coordinator;
mod credential;
mod explain;
mod host;
mod login;
mod policy;
mod rotate;
mod status;
mod token;

use crate::args::{Args, Command, Output};
use crate::client::Client;
use crate::config::{Config, default_path};
use crate::error::{CliError, Exit};

/// What a command has to work with.
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) output: Output,
}

/// Runs what was typed.
pub(crate) async fn run(args: Args) -> Result<Exit, CliError> {
    let path = args.config.unwrap_or_else(default_path);
    if let Command::Completions { shell } = args.command {
        return completions::run(shell);
    }
    if let Command::Login(login) = args.command {
        return login::run(&login, &path).await;
    }
    let context = Context {
        client: Client::new(&Config::load(&path)?)?,
        output: args.output,
    };
    match args.command {
        Command::Login(_) | Command::Completions { .. } => Ok(Exit::Ok),
        Command::Status => status::run(&context).await,
        Command::Host(command) => host::run(&context, command).await,
        Command::Component(command) => component::run(&context, command).await,
        Command::Token(command) => token::run(&context, command).await,
        Command::Credential(command) => credential::run(&context, command, &path).await,
        Command::Rotate(command) => rotate::run(&context, command).await,
        Command::Verify(command) => rotate::verify(&context, command, Config::load(&path)?).await,
        Command::Coordinator(command) => coordinator::run(&context, command).await,
        Command::Policy(command) => policy::run(&context, command).await,
        Command::Explain(explain) => explain::run(&context, &explain).await,
        Command::Audit(audit) => audit::run(&context, &audit).await,
    }
}

/// Reads a file, or standard input for `-`.
fn read_text(path: &std::path::Path) -> Result<String, CliError> {
    let failed = |source| CliError::File {
        what: "read",
        path: path.display().to_string(),
        source,
        hint: "is the path right, and may you read it?",
    };
    if path == std::path::Path::new("-") {
        std::io::read_to_string(std::io::stdin())
    } else {
        std::fs::read_to_string(path)
    }
    .map_err(failed)
}
