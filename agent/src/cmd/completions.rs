//! `cloison-agent completions`: what a shell needs to complete this command. Needs no configuration.

use std::io::{self, Write as _};

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::{Done, Failure};
use crate::args::Cli;

/// Prints the script for `shell`.
///
/// # Errors
/// [`Failure::Output`].
pub fn run(shell: Shell) -> Result<Done, Failure> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "cloison-agent", &mut text);
    io::stdout().write_all(&text)?;
    Ok(Done::Well)
}
