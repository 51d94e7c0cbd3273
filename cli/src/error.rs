//! What can go wrong, told in three parts: what failed, why, what to do.

use std::io::{self, Write};

use cloison_proto::api::{Problem, ProblemCode};

/// How the command ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done.
    Ok,
    /// Something failed.
    Error,
    /// There are differences, or what was asked about is denied.
    Differs,
    /// No credential, or one that does not allow this.
    NotAuthorised,
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// A file cannot be read or written.
    #[error("cannot {what} {path}")]
    File {
        what: &'static str,
        path: String,
        #[source]
        source: io::Error,
        hint: &'static str,
    },
    /// The configuration is wrong.
    #[error("the configuration in {path} is wrong: {why}")]
    Config { path: String, why: String },
    /// The coordinator cannot be reached, or is not the one that the root certificate speaks for.
    #[error("cannot reach the coordinator at {url}")]
    Unreachable {
        url: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The coordinator refused.
    #[error("{}", .0.detail)]
    Refused(Box<Problem>),
    /// The answer is not what this version understands.
    #[error("the coordinator's answer cannot be read")]
    Answer(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The input is wrong.
    #[error("{what}")]
    Input { what: String, hint: String },
}

impl CliError {
    /// The exit code that goes with it.
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::Refused(problem) if matches!(problem.code, ProblemCode::Unauthorised | ProblemCode::Forbidden) => Exit::NotAuthorised,
            Self::File { .. }
            | Self::Config { .. }
            | Self::Unreachable { .. }
            | Self::Refused(_)
            | Self::Answer(_)
            | Self::Input { .. } => Exit::Error,
        }
    }

    fn hint(&self) -> Option<&str> {
        match self {
            Self::File { hint, .. } => Some(hint),
            Self::Config { .. } => Some("`cloison-coordinator init` and `cloison login` write this file"),
            Self::Unreachable { .. } => {
                Some("is the coordinator running, and is `url` in the configuration right? `systemctl status cloison-coordinator` tells")
            }
            Self::Refused(problem) => problem.hint.as_deref(),
            Self::Answer(_) => Some("is this command as new as the coordinator?"),
            Self::Input { hint, .. } => Some(hint),
        }
    }

    /// Writes `error:`, the causes, the diagnostics of a policy, and `hint:`.
    pub(crate) fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        let (red, cyan, plain) = ("\u{1b}[1;31m", "\u{1b}[36m", "\u{1b}[0m");
        write!(out, "{red}error{plain}: {self}")?;
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            write!(out, ": {cause}")?;
            source = cause.source();
        }
        writeln!(out)?;
        if let Self::Refused(problem) = self {
            crate::render::diagnostics(out, &problem.diagnostics)?;
            if let Some(id) = &problem.request_id {
                writeln!(out, "  code {}, request {id}", problem.code.as_str())?;
            }
        }
        if let Some(hint) = self.hint() {
            writeln!(out, "{cyan}hint{plain}: {hint}")?;
        }
        Ok(())
    }
}
