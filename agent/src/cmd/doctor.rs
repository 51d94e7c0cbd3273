//! `doctor`: looks at this host, and prints what it found.

use std::fmt::Write as _;

use super::{Done, Failure, print_json, print_text};
use crate::args::{Format, Output};
use crate::config::Config;
use crate::doctor::{Level, Report, gather, judge};

/// Looks and prints. Something to mend is exit status 2.
///
/// # Errors
/// [`Failure`].
pub fn run(config: &Config, args: Output) -> Result<Done, Failure> {
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::Other {
            what: "only root can look at all of this".into(),
            hint: "run the command with sudo".into(),
        });
    }
    let report = judge::findings(&gather::facts(config));
    if args.output == Format::Json {
        print_json(&report)?;
    } else {
        print_text(&text(&report))?;
    }
    Ok(if report.has_work() { Done::Denied } else { Done::Well })
}

/// The findings as a table for people.
#[must_use]
pub fn text(report: &Report) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        let level = match finding.level {
            Level::Ok => "ok",
            Level::Note => "note",
            Level::Warning => "WARNING",
            Level::Problem => "PROBLEM",
        };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{level:<8} {:<12} {}", finding.check, finding.what);
        if !finding.fix.is_empty() {
            let _ = writeln!(text, "{:<21} -> {}", "", finding.fix);
        }
    }
    let count = |level| report.findings.iter().filter(|f| f.level == level).count();
    let _ = match (count(Level::Problem), count(Level::Warning)) {
        (0, 0) => writeln!(text, "\nNothing to mend."),
        (problems, warnings) => writeln!(text, "\n{problems} problems, {warnings} warnings."),
    };
    text
}
