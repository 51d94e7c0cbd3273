//! `join`: reads the token, enrolls, and says what comes next.

use std::fmt::Write as _;
use std::path::Path;

use zeroize::Zeroizing;

use super::{Done, Failure, print_text};
use crate::args::Join;
use crate::config::Config;
use crate::enroll::{self, Enrolled};
use crate::first_start;
use crate::state::StateDir;
use crate::state::clock::wall_now;

/// Enrolls this host.
///
/// # Errors
/// [`Failure`].
pub fn run(config: &Config, args: &Join) -> Result<Done, Failure> {
    let token = read_token(args.token_file.as_deref())?;
    let dir = StateDir::open(&config.state_dir)?;
    let _lock = dir.lock()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let coordinators = if args.coordinator.is_empty() {
        &config.coordinators
    } else {
        &args.coordinator
    };
    let enrolled = runtime.block_on(enroll::join(&dir, &token, coordinators, wall_now()))?;
    for warning in &enrolled.warnings {
        eprintln!("warning: {warning}");
    }
    print_text(&text(&enrolled))?;
    Ok(Done::Well)
}

/// The token, from a file or standard input.
fn read_token(file: Option<&Path>) -> Result<Zeroizing<String>, Failure> {
    let (name, read) = match file.filter(|path| *path != Path::new("-")) {
        Some(path) => (
            path.display().to_string(),
            std::fs::File::open(path).and_then(first_start::read_token),
        ),
        None => ("standard input".to_owned(), first_start::read_token(std::io::stdin())),
    };
    match read {
        Ok(token) if token.trim().is_empty() => Err(Failure::Other {
            what: format!("cannot read the token from {name}: there is nothing in it"),
            hint: "an operator makes one with `cloison token create --host NAME`".into(),
        }),
        Ok(token) => Ok(token),
        Err(e) => Err(Failure::Other {
            what: format!("cannot read the token from {name}: {e}"),
            hint: "give the file that holds the token with --token-file, or pipe the token into the command".into(),
        }),
    }
}

fn text(enrolled: &Enrolled) -> String {
    let mut text = format!("Enrolled as {} ({}) in {}.\n", enrolled.name, enrolled.host, enrolled.mesh);
    // Writing to a string cannot fail.
    let _ = if enrolled.components.is_empty() {
        writeln!(
            text,
            "The policy puts no component on this host yet; `cloison policy apply` at the coordinator changes that."
        )
    } else {
        let names: Vec<_> = enrolled.components.iter().map(ToString::to_string).collect();
        writeln!(text, "Components here: {}.", names.join(", "))
    };
    text.push_str("\nNext: start the agent with `systemctl enable --now cloison-agent` (or `cloison-agent run`), then look at `cloison-agent status`.");
    text
}
