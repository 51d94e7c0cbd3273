//! `cloison-agent`: the commands of the agent. What each does is in [`cloison_agent::cmd`].

use std::process::ExitCode;

fn main() -> ExitCode {
    cloison_agent::cmd::main()
}
