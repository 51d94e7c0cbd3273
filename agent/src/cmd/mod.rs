//! The commands. Results go to standard output, errors to standard error as `error: what: why` and a `hint:` line; the exit status is 0 for
//! done or allowed, 1 for an error, 2 for denied or (`doctor`) something to mend, 3 for not authorised, 78 for a service that only a person can help.

pub mod completions;
pub mod debug;
pub mod doctor;
pub mod explain;
pub mod join;
pub mod leave;
pub mod metrics;
pub mod ping;
pub mod prepare;
pub mod show;
pub mod status;

use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::Parser as _;
use cloison_proto::status::{Answer, Request};
use serde::Serialize;

use crate::args::{Cli, Command, Common};
use crate::config::{Config, ConfigError, FileConfig};
use crate::enroll::EnrollError;
use crate::run::{self, RunError};
use crate::state::StateError;
use crate::status::{SocketError, ask};
use crate::telemetry;

/// Exit status of `run` when starting it again would change nothing (EX_CONFIG of sysexits.h): for `RestartPreventExitStatus=`.
const NEEDS_A_PERSON: u8 = 78;

/// How a command ended that did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Done {
    /// As wished.
    Well,
    /// The answer is no.
    Denied,
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The configuration.
    #[error("configuration: {0}")]
    Config(#[from] ConfigError),
    /// The join.
    #[error("cannot enroll: {0}")]
    Enroll(#[from] EnrollError),
    /// The service.
    #[error("cannot run: {0}")]
    Run(#[from] RunError),
    /// The status socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// Something that has no type of its own.
    #[error("{what}")]
    Other {
        /// What failed and why.
        what: String,
        /// What to do.
        hint: String,
    },
    /// Nothing can be written to standard output.
    #[error("cannot write the result: {0}")]
    Output(#[from] io::Error),
}

impl Failure {
    fn hint(&self) -> String {
        match self {
            Self::Config(e) => e.hint(),
            Self::Enroll(e) => e.hint(),
            Self::Run(e) => e.hint(),
            Self::Socket(e) => e.hint(),
            Self::State(e) => e.hint(),
            Self::Other { hint, .. } => hint.clone(),
            Self::Output(_) => "the reader of the output may have ended".into(),
        }
    }

    fn exit(&self) -> ExitCode {
        match self {
            Self::Socket(SocketError::NotAllowed { .. }) | Self::Run(RunError::Privilege) => ExitCode::from(3),
            Self::Enroll(e) if e.is_denied() => ExitCode::from(3),
            Self::Run(RunError::FirstStart(e)) if e.needs_a_person() => ExitCode::from(NEEDS_A_PERSON),
            Self::Config(_) | Self::Enroll(_) | Self::Run(_) | Self::Socket(_) | Self::State(_) | Self::Other { .. } | Self::Output(_) => {
                ExitCode::FAILURE
            }
        }
    }
}

/// The program.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version are no errors; there is nobody to tell if this cannot be printed.
            let _ = e.print();
            return if e.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    match command(&cli) {
        Ok(Done::Well) => ExitCode::SUCCESS,
        Ok(Done::Denied) => ExitCode::from(2),
        Err(Failure::Output(e)) if e.kind() == io::ErrorKind::BrokenPipe => ExitCode::FAILURE,
        Err(failure) => {
            let hint = failure.hint();
            let _ = writeln!(io::stderr(), "error: {failure}\nhint: {hint}");
            failure.exit()
        }
    }
}

fn command(cli: &Cli) -> Result<Done, Failure> {
    if let Command::Run(args) = &cli.command {
        let config = configured(&cli.common, args.settings(&cli.common))?;
        telemetry::start(&config)?;
        run::run(config)?;
        return Ok(Done::Well);
    }
    if let Command::Completions { shell } = cli.command {
        return completions::run(shell);
    }
    let config = configured(&cli.common, cli.common.settings())?;
    match &cli.command {
        Command::Run(_) | Command::Completions { .. } => Ok(Done::Well),
        Command::Join(args) => join::run(&config, args),
        Command::Prepare => prepare::run(&config),
        Command::Status(args) => status::run(&config, args),
        Command::Explain(args) => explain::run(&config, args),
        Command::Ping(args) => ping::run(&config, args),
        Command::Metrics => metrics::run(&config),
        Command::Flows(args) => show::flows(&config, args.output),
        Command::Denials(args) => show::denials(&config, args.output),
        Command::RotateKey(args) => show::rotate_key(&config, args.output),
        Command::Debug(args) => debug::run(&config, args),
        Command::Doctor(args) => doctor::run(&config, *args),
        Command::Leave(args) => leave::run(&config, args),
    }
}

fn configured(common: &Common, flags: FileConfig) -> Result<Config, ConfigError> {
    FileConfig::read(common.config.as_deref())?.overridden_by(flags).complete()
}

/// Asks the running agent; an answer of another kind is an error.
fn asked<T>(config: &Config, request: &Request, wanted: impl FnOnce(Answer) -> Option<T>) -> Result<T, Failure> {
    let answer = ask(&config.socket, request)?;
    if let Answer::Error(problem) = answer {
        return Err(Failure::Other {
            what: problem.what,
            hint: problem.hint,
        });
    }
    wanted(answer).ok_or_else(|| Failure::Other {
        what: "the agent's answer is of another kind than the question".into(),
        hint: "compare the versions of the command and the running agent".into(),
    })
}

fn print_json<T: Serialize>(value: &T) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(io::Error::other)?;
    print_text(&text)
}

/// Prints a text and a newline.
fn print_text(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}", text.trim_end())?;
    Ok(out.flush()?)
}

/// Lays rows out in columns, two spaces apart.
fn columns(rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..rows.iter().map(Vec::len).max().unwrap_or(0)).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        format!("  {}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

/// A span of time as people say it: `45 s`, `12 min`, `23 h 10 min`.
pub(crate) fn span(secs: u64) -> String {
    match secs {
        0..120 => format!("{secs} s"),
        120..7_200 => format!("{} min", secs / 60),
        7_200..172_800 => format!("{} h {} min", secs / 3600, secs % 3600 / 60),
        _ => format!("{} d {} h", secs / 86_400, secs % 86_400 / 3600),
    }
}

/// A number of bytes as people say it.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 4] = ["B", "KiB", "MiB", "GiB"];
    let (mut value, mut unit) = (count, 0);
    while value >= 10_240 && unit < UNITS.len() - 1 {
        value /= 1024;
        unit += 1;
    }
    format!("{value} {}", UNITS.get(unit).unwrap_or(&"B"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_sizes_are_said_as_people_say_them() {
        assert_eq!(
            [span(5), span(130), span(86_399), span(200_000)],
            ["5 s", "2 min", "23 h 59 min", "2 d 7 h"]
        );
        assert_eq!(
            [bytes(0), bytes(10_239), bytes(1 << 20), bytes(u64::MAX)],
            ["0 B", "10239 B", "1024 KiB", "17179869183 GiB"]
        );
    }

    #[test]
    fn columns_stand_below_each_other() {
        let row = |cells: &[&str]| cells.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(columns(&[row(&["a", "b"]), row(&["long", "c"])]), "  a     b\n  long  c\n");
    }
}
