//! `cloison explain`: allowed or denied, by which rule, and whether it works right now.

use std::io::{self, Write};

use cloison_proto::api::{EndState, Explanation, PairExplanation};

use super::Context;
use crate::args::ExplainArgs;
use crate::error::{CliError, Exit};
use crate::render::{print, style, table, utc, yes_no};

pub(super) async fn run(context: &Context, args: &ExplainArgs) -> Result<Exit, CliError> {
    let query = [("from", args.from.as_str()), ("to", args.to.as_str())];
    let explanation: Explanation = context.client.query("explain", &query).await?;
    print(context.output, &explanation, people)?;
    Ok(if explanation.allowed { Exit::Ok } else { Exit::Differs })
}

fn people(out: &mut dyn Write, answer: &Explanation) -> io::Result<()> {
    let ports: Vec<_> = answer.ports.iter().map(ToString::to_string).collect();
    let arrow = format!("{} -> {}:{}", answer.from, answer.to, ports.join(","));
    match (answer.allowed, answer.reason) {
        (true, _) => writeln!(out, "{}allowed{}  {arrow}", style::GOOD, style::PLAIN)?,
        (false, reason) => {
            let why = reason.map_or_else(String::new, |r| format!(" ({r}: {})", r.explanation().trim_end_matches('.')));
            writeln!(out, "{}denied{}   {arrow}{why}", style::BAD, style::PLAIN)?;
        }
    }
    for rule in &answer.rules {
        writeln!(out, "by       {}  {}", rule.text, rule.id)?;
        let notes = [
            ("why", rule.why.clone()),
            ("owner", rule.owner.clone()),
            ("until", rule.expires.map(utc)),
        ];
        for (name, text) in notes.into_iter().filter_map(|(name, text)| Some((name, text?))) {
            writeln!(out, "  {name:<6} {text}")?;
        }
    }
    if !answer.pairs.is_empty() {
        let row = |p: &PairExplanation| vec![side(&p.from), side(&p.to), yes_no(p.allowed), yes_no(p.works)];
        table(out, &["from", "to", "allowed", "works now"], answer.pairs.iter().map(row))?;
    }
    answer.notes.iter().try_for_each(|note| writeln!(out, "note: {note}"))
}

fn side(end: &cloison_proto::api::End) -> String {
    let state = match end.state {
        EndState::Applied => "",
        EndState::Pending => " (pending)",
        EndState::Offline => " (offline)",
        EndState::Unenforced => " (unenforced)",
    };
    format!("{} {}{state}", end.host, end.v4)
}
