//! `cloison policy`: check, apply, show.

use std::io::{self, IsTerminal as _, Write};
use std::time::{Duration, Instant};

use cloison_proto::api::{Access, AccessChange, MeshStatus, PolicyAnswer, PolicyCheck, PolicyRequest, ProblemCode};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use reqwest::header::{IF_MATCH, IF_NONE_MATCH};

use super::{Context, read_text};
use crate::args::PolicyCommand;
use crate::error::{CliError, Exit};
use crate::render::{diagnostics, print, style};

/// How often to ask while waiting: often enough that people do not notice, seldom enough for a coordinator with many hosts.
const ASK_EVERY: Duration = Duration::from_millis(100);

pub(super) async fn run(context: &Context, command: PolicyCommand) -> Result<Exit, CliError> {
    match command {
        PolicyCommand::Check { file } => {
            let request = PolicyRequest { policy: read_text(&file)? };
            let check: PolicyCheck = context.client.post("policy/check", &request).await?;
            print(context.output, &check, people_check)?;
            Ok(if check.valid { Exit::Ok } else { Exit::Differs })
        }
        PolicyCommand::Apply {
            file,
            wait,
            force,
            timeout,
        } => {
            let answer = apply(context, &PolicyRequest { policy: read_text(&file)? }, force).await?;
            print(context.output, &answer, people_applied)?;
            if wait {
                wait_until_applied(context, answer.revision, Duration::from_secs(timeout)).await
            } else {
                Ok(Exit::Ok)
            }
        }
        PolicyCommand::Show => {
            let answer: PolicyAnswer = context.client.get("policy").await?;
            print(context.output, &answer, |out, answer| out.write_all(answer.policy.as_bytes()))?;
            Ok(Exit::Ok)
        }
    }
}

/// Replaces the policy that is in force at this moment; if somebody else is quicker, nothing happens unless `force`.
async fn apply(context: &Context, request: &PolicyRequest, force: bool) -> Result<PolicyAnswer, CliError> {
    let condition = match context.client.get::<PolicyAnswer>("policy").await {
        _ if force => (IF_MATCH, "*".to_owned()),
        Ok(current) => (IF_MATCH, format!("\"{}\"", current.version)),
        Err(CliError::Refused(problem)) if problem.code == ProblemCode::NotFound => (IF_NONE_MATCH, "*".to_owned()),
        Err(error) => return Err(error),
    };
    match context.client.put("policy", condition, request).await {
        // `If-Match: *` asks for a policy to replace; before the first there is none.
        Err(CliError::Refused(problem)) if force && problem.code == ProblemCode::PolicyChanged => {
            context.client.put("policy", (IF_NONE_MATCH, "*".to_owned()), request).await
        }
        answer => answer,
    }
}

async fn wait_until_applied(context: &Context, revision: u64, timeout: Duration) -> Result<Exit, CliError> {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    if !io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    if let Ok(look) = ProgressStyle::with_template("{spinner} in force on {pos} of {len} hosts") {
        bar.set_style(look);
    }
    let begin = Instant::now();
    loop {
        let status: MeshStatus = context.client.get("status").await?;
        bar.set_length(status.hosts.into());
        bar.set_position(status.applied.into());
        bar.tick();
        if status.version.revision >= revision && status.applied == status.hosts {
            bar.finish_and_clear();
            anstream::eprintln!(
                "in force on {} of {} hosts after {} ms",
                status.applied,
                status.hosts,
                begin.elapsed().as_millis()
            );
            return Ok(Exit::Ok);
        }
        if begin.elapsed() > timeout {
            bar.finish_and_clear();
            anstream::eprintln!(
                "{}in force on {} of {} hosts only{}:",
                style::WARN,
                status.applied,
                status.hosts,
                style::PLAIN
            );
            for host in &status.not_applied {
                anstream::eprintln!("  {} ({})", host.host, if host.linked { "linked" } else { "not linked" });
            }
            return Ok(Exit::Differs);
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

fn people_check(out: &mut dyn Write, check: &PolicyCheck) -> io::Result<()> {
    diagnostics(out, &check.diagnostics)?;
    if check.valid {
        writeln!(out, "{}the policy is good{}", style::GOOD, style::PLAIN)?;
    } else {
        writeln!(out, "{}the policy would be refused{}", style::BAD, style::PLAIN)?;
    }
    check
        .change
        .as_ref()
        .map_or(Ok(()), |change| people_change(out, change, "would open", "would close"))
}

fn people_applied(out: &mut dyn Write, answer: &PolicyAnswer) -> io::Result<()> {
    writeln!(out, "policy {} is in force since revision {}", answer.version, answer.revision)?;
    answer
        .change
        .as_ref()
        .map_or(Ok(()), |change| people_change(out, change, "opened", "closed"))
}

fn people_change(out: &mut dyn Write, change: &AccessChange, opened: &str, closed: &str) -> io::Result<()> {
    let mut all = |colour: &str, sign: char, title: &str, accesses: &[Access]| -> io::Result<()> {
        if !accesses.is_empty() {
            writeln!(out, "{title}:")?;
        }
        accesses
            .iter()
            .try_for_each(|a| writeln!(out, "  {colour}{sign} {} -> {}:{}{}", a.from, a.to, a.ports, style::PLAIN))
    };
    all(style::GOOD, '+', opened, &change.opened)?;
    all(style::BAD, '-', closed, &change.closed)?;
    if change.opened.is_empty() && change.closed.is_empty() {
        writeln!(out, "who may talk to whom does not change")?;
    }
    Ok(())
}
