//! The coordinator's program: reads the command line, does what it says, and ends with a code that says how it went.
//!
//! Exit codes: 0 done; 1 failed; 64 wrong command line; 74 a change could not be made durable; 78 wrong configuration or data directory.

#![forbid(unsafe_code)]

use std::error::Error;
use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};
use cloison_coordinator::args::{BackupArgs, Cli, Command, CredentialArgs, InitArgs, RecoverArgs, RestoreArgs, ServeArgs};
use cloison_coordinator::backup::{self, BackupError};
use cloison_coordinator::entropy::Environment;
use cloison_coordinator::init::{self, InitError};
use cloison_coordinator::recover::{self, RecoverError};
use cloison_coordinator::run::{self, RunError};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// sysexits.h: `EX_USAGE`.
const EXIT_USAGE: u8 = 64;
/// sysexits.h: `EX_CONFIG`.
const EXIT_CONFIG: u8 = 78;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let failed = error.use_stderr();
            // What cannot be printed cannot be reported either.
            let _ = error.print();
            return if failed { ExitCode::from(EXIT_USAGE) } else { ExitCode::SUCCESS };
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&error, 1),
    };
    match cli.command {
        Command::Init(args) => runtime.block_on(make_mesh(args)),
        Command::Serve(args) => runtime.block_on(serve(args)),
        Command::Credential(args) => runtime.block_on(make_credential(args)),
        Command::Backup(args) => runtime.block_on(make_backup(args)),
        Command::Restore(args) => runtime.block_on(restore(args)),
        Command::Recover(args) => runtime.block_on(recover_mesh(args)),
        Command::Completions { shell } => completions(shell),
    }
}

async fn make_mesh(args: InitArgs) -> ExitCode {
    let data = args.data.clone();
    let made = match init::init(args, &Environment::system()).await {
        Ok(made) => made,
        Err(error) => return report_init(&error),
    };
    let addresses: Vec<String> = made.addresses.iter().map(ToString::to_string).collect();
    say(&format!(
        "Made {mesh}.\n\n  hosts reach it at   {addresses}\n  overlay             {overlay}\n  CLI configuration   {config}\n  owner credential    \
         {credential}\n                      shown this once; good until {until}\n\nNext: `cloison-coordinator serve --data {data}`, then \
         `cloison policy apply policy.yaml`.\n",
        mesh = made.mesh,
        addresses = addresses.join(", "),
        overlay = made.overlay,
        config = made.cli_config.display(),
        credential = *made.credential.text.reveal(),
        until = init::shown_time(made.credential.expires),
        data = data.display(),
    ))
}

async fn make_credential(args: CredentialArgs) -> ExitCode {
    match init::credential(args, &Environment::system()).await {
        Ok(made) => {
            eprintln!("Good until {}; shown this once.", init::shown_time(made.expires));
            say(&format!("{}\n", *made.text.reveal()))
        }
        Err(error) => report_init(&error),
    }
}

async fn make_backup(args: BackupArgs) -> ExitCode {
    match backup::backup(&args, &Environment::system()).await {
        Ok(made) => say(&format!(
            "Wrote {path}: {mesh} at version {version}, schema {schema}, {files} files, {length} bytes.\n\nIt holds the private keys of the mesh: \
             whoever has it can be this coordinator. Keep it where nobody else reads it.\n",
            path = made.path.display(),
            mesh = made.manifest.mesh,
            version = made.manifest.version,
            schema = made.manifest.schema,
            files = made.manifest.files.len(),
            length = made.length,
        )),
        Err(error) => report_backup(&error),
    }
}

async fn restore(args: RestoreArgs) -> ExitCode {
    match backup::restore(&args, &Environment::system()).await {
        Ok(restored) => say(&format!(
            "Restored {mesh} at version {version} into {data}, as it was at {made}.\n\nIt is read-only: it changes, publishes and enrolls nothing \
             until you recover it, because hosts may know better. Hosts go on until their leases end.\n\nNext: `cloison-coordinator serve --data \
             {data}`, wait until hosts have linked, then `cloison-coordinator recover --data {data}`.\n",
            mesh = restored.manifest.mesh,
            version = restored.manifest.version,
            made = init::shown_time(restored.manifest.made_at),
            data = args.data.display(),
        )),
        Err(error) => report_backup(&error),
    }
}

async fn recover_mesh(args: RecoverArgs) -> ExitCode {
    match recover::recover(&args, &Environment::system()).await {
        Ok(outcome) => say(&outcome.to_string()),
        Err(RecoverError::DataDir(error)) => report(&error, EXIT_CONFIG),
        Err(error) => report(&error, 1),
    }
}

async fn serve(args: ServeArgs) -> ExitCode {
    let config = match run::load_config(&args) {
        Ok(config) => config,
        Err(error) => return report(&error, EXIT_CONFIG),
    };
    let filter = config.log.as_deref().unwrap_or("info");
    let filter = match EnvFilter::try_new(filter) {
        Ok(filter) => filter,
        Err(error) => return report(&error, EXIT_CONFIG),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let stop = match stop_signals() {
        Ok(stop) => stop,
        Err(error) => return report(&error, 1),
    };
    match run::serve(&args, &config, Environment::system(), stop).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ (RunError::DataDir(_) | RunError::Config(_) | RunError::Roots(_) | RunError::Mixed { .. })) => {
            report(&error, EXIT_CONFIG)
        }
        Err(error) => report(&error, 1),
    }
}

fn completions(shell: clap_complete::Shell) -> ExitCode {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "cloison-coordinator", &mut text);
    say(&String::from_utf8_lossy(&text))
}

/// Completes with the first request to stop.
fn stop_signals() -> std::io::Result<impl Future<Output = ()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

fn say(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report(&error, 1),
    }
}

fn report_init(error: &InitError) -> ExitCode {
    match error {
        InitError::DataDir(_) | InitError::Roots(_) | InitError::CliConfigExists { .. } => report(error, EXIT_CONFIG),
        InitError::Overlay(_) | InitError::TooManyAddresses(_) | InitError::Negative(_) => report(error, EXIT_USAGE),
        InitError::Open(_) | InitError::Store(_) | InitError::Entropy(_) | InitError::CliConfig { .. } => report(error, 1),
    }
}

fn report_backup(error: &BackupError) -> ExitCode {
    match error {
        BackupError::DataDir(_) | BackupError::OtherMesh { .. } | BackupError::Occupied { .. } => report(error, EXIT_CONFIG),
        BackupError::Open(_)
        | BackupError::Store(_)
        | BackupError::Roots(_)
        | BackupError::Exists { .. }
        | BackupError::Changing { .. }
        | BackupError::Foreign { .. }
        | BackupError::Damaged { .. }
        | BackupError::Newer { .. }
        | BackupError::Io { .. } => report(error, 1),
    }
}

/// Says what failed and why, each cause once.
fn report(error: &dyn Error, code: u8) -> ExitCode {
    let mut text = format!("error: {error}");
    let mut cause = error.source();
    while let Some(next) = cause {
        text.push_str(&format!(": {next}"));
        cause = next.source();
    }
    eprintln!("{text}");
    ExitCode::from(code)
}
