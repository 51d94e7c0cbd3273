//! The project's packages on a machine: made of the programs that are built, by the project's own recipe, and installed offline.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::Machine;
use crate::lab::process;

/// Makes all packages, in this version, in a folder.
///
/// # Errors
/// If the recipe fails.
pub fn make(folder: &Path, version: &str) -> Result<()> {
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../systemd/package.sh");
    let mut command = Command::new(recipe);
    command.args(["deb", "debug"]).arg(folder).arg(version);
    process::run(command, Duration::from_secs(300))?.ok()?;
    Ok(())
}

/// Where a package is that [`make`] made.
#[must_use]
pub fn path(folder: &Path, name: &str, version: &str) -> PathBuf {
    folder.join(format!("{name}_{version}_{}.deb", architecture()))
}

/// Installs packages on a machine, as `dpkg --install`.
///
/// # Errors
/// If they cannot be copied or installed.
pub fn install(machine: &Machine, packages: &[PathBuf]) -> Result<()> {
    let mut line = vec!["dpkg".to_owned(), "--install".to_owned()];
    for package in packages {
        let name = package
            .file_name()
            .and_then(|name| name.to_str())
            .context("a package without a name")?;
        machine.copy(package, &format!("/var/tmp/{name}"))?;
        line.push(format!("/var/tmp/{name}"));
    }
    machine.ok(&line.iter().map(String::as_str).collect::<Vec<_>>())?;
    machine.sh("rm /var/tmp/cloison*.deb")?;
    Ok(())
}

/// No unit of the machine has failed.
///
/// # Errors
/// If one has.
pub fn healthy(machine: &Machine) -> Result<()> {
    let failed = machine.ok(&["systemctl", "--failed", "--plain", "--no-legend"])?;
    ensure!(failed.trim().is_empty(), "on {} failed: {failed}", machine.name());
    Ok(())
}

/// As Debian calls it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
