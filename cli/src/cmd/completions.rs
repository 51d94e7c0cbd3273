//! `cloison completions`: what a shell needs to complete this command. Needs neither a configuration nor a coordinator.

use std::io::Write as _;

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::args::Args;
use crate::error::{CliError, Exit};
use crate::render::written;

pub(super) fn run(shell: Shell) -> Result<Exit, CliError> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "cloison", &mut text);
    written(std::io::stdout().write_all(&text))?;
    Ok(Exit::Ok)
}
