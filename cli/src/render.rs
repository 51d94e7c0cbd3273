//! Tables, times and colours for people. Colours are escape sequences that the output stream drops when it is no terminal.

use std::io::{self, Write};

use cloison_proto::policy::Diagnostic;
use cloison_proto::version::MeshTime;
use comfy_table::{ContentArrangement, Table};
use serde::Serialize;

use crate::args::Output;
use crate::error::CliError;

/// Escape sequences, by what they mean here.
pub(crate) mod style {
    pub(crate) const GOOD: &str = "\u{1b}[32m";
    pub(crate) const BAD: &str = "\u{1b}[31m";
    pub(crate) const WARN: &str = "\u{1b}[33m";
    pub(crate) const FAINT: &str = "\u{1b}[2m";
    pub(crate) const PLAIN: &str = "\u{1b}[0m";
}

/// Prints the answer: as JSON, or as `people` writes it. A closed pipe is no error.
pub(crate) fn print<T: Serialize>(
    output: Output,
    answer: &T,
    people: impl FnOnce(&mut dyn Write, &T) -> io::Result<()>,
) -> Result<(), CliError> {
    let mut out = anstream::stdout().lock();
    let written = match output {
        Output::Json => serde_json::to_writer_pretty(&mut out, answer)
            .map_err(io::Error::from)
            .and_then(|()| writeln!(out)),
        Output::Table => people(&mut out, answer),
    };
    self::written(written.and_then(|()| out.flush()))
}

/// How a write to standard output ended. A closed pipe is no error.
pub(crate) fn written(done: io::Result<()>) -> Result<(), CliError> {
    match done {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(CliError::File {
            what: "write",
            path: "standard output".into(),
            source: e,
            hint: "is the disk full?",
        }),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// A table without lines: columns that `grep` and `awk` can use.
pub(crate) fn table(out: &mut dyn Write, head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> io::Result<()> {
    let mut table = Table::new();
    table
        .load_style(comfy_table::presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(head.iter().map(|h| h.to_uppercase()));
    for row in rows {
        table.add_row(row);
    }
    for line in table.lines() {
        writeln!(out, "{}", line.trim())?;
    }
    Ok(())
}

/// A time as people read it: how long ago, or in how long.
pub(crate) fn ago(time: Option<MeshTime>) -> String {
    let Some(time) = time else { return "never".into() };
    let now = u64::try_from(jiff::Timestamp::now().as_second()).unwrap_or(0);
    if time.0 > now {
        format!("in {}", span(time.0.saturating_sub(now)))
    } else {
        format!("{} ago", span(now.saturating_sub(time.0)))
    }
}

/// A span in its largest unit.
pub(crate) fn span(secs: u64) -> String {
    match secs {
        0..120 => format!("{secs} s"),
        120..7_200 => format!("{} min", secs / 60),
        7_200..172_800 => format!("{} h", secs / 3_600),
        _ => format!("{} d", secs / 86_400),
    }
}

/// A time in UTC, to the second.
pub(crate) fn utc(time: MeshTime) -> String {
    let time = i64::try_from(time.0).ok().and_then(|s| jiff::Timestamp::from_second(s).ok());
    time.map_or_else(|| "?".into(), |t| t.strftime("%Y-%m-%d %H:%M:%SZ").to_string())
}

/// `yes` or `no`.
pub(crate) fn yes_no(yes: bool) -> String {
    if yes { "yes" } else { "no" }.into()
}

/// A list, or a dash.
pub(crate) fn list<T: ToString>(all: impl IntoIterator<Item = T>) -> String {
    let all: Vec<_> = all.into_iter().map(|t| t.to_string()).collect();
    if all.is_empty() { "-".into() } else { all.join(",") }
}

/// The mistakes in a policy, each with its place.
pub(crate) fn diagnostics(out: &mut (impl Write + ?Sized), all: &[Diagnostic]) -> io::Result<()> {
    for diagnostic in all {
        writeln!(out, "  {diagnostic}")?;
    }
    Ok(())
}
