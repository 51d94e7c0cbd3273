//! `cloison`: the operator's command line. It speaks to the coordinator's REST API and knows nothing else: what it prints comes from there.
//!
//! Exit codes: 0 done, 1 error, 2 differences or denied, 3 not authorised.

#![forbid(unsafe_code)]

mod args;
mod client;
mod cmd;
mod config;
mod error;
mod render;
mod tls;

use std::process::ExitCode;

use clap::Parser as _;

use crate::args::Args;
use crate::error::{CliError, Exit};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse();
    match cmd::run(args).await {
        Ok(exit) => exit.into(),
        Err(error) => {
            report(&error);
            error.exit().into()
        }
    }
}

fn report(error: &CliError) {
    use std::io::Write as _;
    // A terminal that is gone cannot be told so.
    let _ = error.write_to(&mut anstream::stderr()).and_then(|()| anstream::stderr().flush());
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Ok => 0,
            Exit::Error => 1,
            Exit::Differs => 2,
            Exit::NotAuthorised => 3,
        })
    }
}
