//! `doctor`: what is wrong with this host, and what to do about each of it. Works while the agent runs, and while it does not.
//!
//! [`gather::facts`] looks at the machine, the state directory, the running agent, the coordinators and the peers, and changes nothing;
//! [`judge::findings`] makes findings of that, each with its fix, and is a pure function. What could not be looked at is a note, never a
//! silence.

pub mod exposure;
pub mod facts;
pub mod gather;
pub mod judge;
pub mod path_mtu;

use serde::Serialize;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Worth knowing; nothing is to be done.
    Note,
    /// It works, and may not for long or not everywhere.
    Warning,
    /// Something does not work.
    Problem,
}

/// What was found about one thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at: a stable word.
    pub check: &'static str,
    /// How bad it is.
    pub level: Level,
    /// What was found.
    pub what: String,
    /// What to do about it; empty if there is nothing to do.
    pub fix: String,
}

impl Finding {
    fn new(check: &'static str, level: Level, what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            check,
            level,
            what: what.into(),
            fix: fix.into(),
        }
    }

    fn ok(check: &'static str, what: impl Into<String>) -> Self {
        Self::new(check, Level::Ok, what, "")
    }

    fn note(check: &'static str, what: impl Into<String>) -> Self {
        Self::new(check, Level::Note, what, "")
    }

    fn warning(check: &'static str, what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(check, Level::Warning, what, fix)
    }

    fn problem(check: &'static str, what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(check, Level::Problem, what, fix)
    }
}

/// Everything that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether the agent runs.
    pub running: bool,
    /// The findings, in the order in which a packet would meet what they are about.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Whether something is to be done.
    #[must_use]
    pub fn has_work(&self) -> bool {
        self.findings.iter().any(|f| f.level >= Level::Warning)
    }
}
