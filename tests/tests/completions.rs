//! What shells need to complete our commands: each program prints it for each shell, without a configuration, and the shell can read it.

#![forbid(unsafe_code)]

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use cloison_tests::lab::{process, programs};

const LIMIT: Duration = Duration::from_secs(20);

/// Each program, a command of it and an option of that.
const PROGRAMS: [(&str, &str, &str); 3] = [
    ("cloison", "policy", "--config"),
    ("cloison-agent", "join", "--token-file"),
    ("cloison-coordinator", "restore", "--data"),
];

fn printed(program: &str, shell: &str) -> Result<String> {
    let mut command = Command::new(programs::find(program)?);
    // Nothing is read: neither of these is there.
    command
        .args(["completions", shell])
        .env_clear()
        .env("CLOISON_CONFIG", "/nonexistent");
    Ok(process::run(command, LIMIT)?.ok()?.stdout)
}

/// Gives a script to a shell by its standard input.
fn fed(shell: &str, arguments: &[&str], script: &str) -> Result<String> {
    let mut command = Command::new(shell);
    command
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("starting {shell}"))?;
    child.stdin.take().context("no input")?.write_all(script.as_bytes())?;
    let done = child.wait_with_output()?;
    ensure!(done.status.success(), "{shell}: {}", String::from_utf8_lossy(&done.stderr));
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

#[test]
fn every_program_prints_what_each_shell_needs_to_complete_it() -> Result<()> {
    for (program, command, option) in PROGRAMS {
        for shell in ["bash", "zsh", "fish"] {
            let script = printed(program, shell)?;
            let option = if shell == "fish" { option.trim_start_matches('-') } else { option };
            for word in [program, command, option] {
                ensure!(script.contains(word), "the script of {program} for {shell} does not know {word}");
            }
        }
        let mut refused = Command::new(programs::find(program)?);
        refused.args(["completions", "cmd.exe"]);
        let refused = process::run(refused, LIMIT)?.refused()?;
        ensure!(refused.stderr.contains("bash"), "{}", refused.stderr);
    }
    Ok(())
}

#[test]
fn bash_reads_the_scripts_and_completes_commands_by_them() -> Result<()> {
    for (program, command, _) in PROGRAMS {
        let script = printed(program, "bash")?;
        fed("bash", &["-n"], &script)?;
        let begun = command.get(..3).context("a longer command")?;
        let asked = format!(
            "{script}\nfunction=$(complete -p {program} | sed 's/.*-F \\([^ ]*\\).*/\\1/')\nCOMP_WORDS=({program} {begun}) COMP_CWORD=1\n\
             \"$function\" {program} {begun} {program}\nprintf '%s\\n' \"${{COMPREPLY[@]}}\"\n"
        );
        let offered = fed("bash", &["--norc", "--noprofile"], &asked)?;
        ensure!(
            offered.lines().any(|line| line == command),
            "{program} offers {offered:?} for {begun}"
        );
    }
    Ok(())
}
