//! The RPM packages, installed by a real `rpm` into the root of a machine that is not running: their scripts run in it, with its shell and its
//! systemd's tools. What they hold, that they verify, that an upgrade keeps what a host has, and that they go without a trace.
//!
//! The first version holds the programs under test; the second one holds others, so that an upgrade changes every program.

#![forbid(unsafe_code)]

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use cloison_tests::lab::process::{self, Finished};
use cloison_tests::lab::programs;

const PACKAGES: [&str; 3] = ["cloison", "cloison-agent", "cloison-coordinator"];
const VERSION: &str = "0.9.1";
const NEXT: &str = "0.9.2";

/// What operators look for, and what systemd and shells do.
const FILES: [&str; 14] = [
    "/usr/bin/cloison",
    "/usr/bin/cloison-agent",
    "/usr/bin/cloison-coordinator",
    "/usr/lib/systemd/system/cloison-agent-prepare.service",
    "/usr/lib/systemd/system/cloison-agent.service",
    "/usr/lib/systemd/system/cloison-coordinator.service",
    "/usr/lib/sysusers.d/cloison-coordinator.conf",
    "/usr/share/bash-completion/completions/cloison-agent",
    "/usr/share/fish/vendor_completions.d/cloison-coordinator.fish",
    "/usr/share/zsh/site-functions/_cloison",
    "/usr/share/doc/cloison-agent/attachments.conf",
    "/usr/share/doc/cloison-agent/install.md",
    "/usr/share/doc/cloison-coordinator/LICENSE-MIT",
    "/usr/share/doc/cloison/CHANGELOG.md",
];

/// Units that are enabled by an installation.
const ENABLED: [&str; 3] = [
    "cloison-agent.service",
    "cloison-agent-prepare.service",
    "cloison-coordinator.service",
];

/// What `rpm` keeps of itself.
const DATABASE: &str = "/var/lib/rpm";

const LIMIT: Duration = Duration::from_secs(120);
const PACKING: Duration = Duration::from_secs(600);

/// The root of the machines, with files of its own laid over it: mounted for each command in a mount namespace of that command's own.
struct Root {
    base: PathBuf,
    folder: tempfile::TempDir,
}

impl Root {
    fn new() -> Result<Self> {
        let machines = programs::find("cloison")?.with_file_name("../machines/base");
        let base = std::fs::canonicalize(&machines).context("there is no root of machines: tests/scripts/setup-machines.sh makes it")?;
        let folder = tempfile::tempdir()?;
        for part in ["upper", "work", "root"] {
            std::fs::create_dir(folder.path().join(part))?;
        }
        Ok(Self { base, folder })
    }

    /// Where it is mounted, for the command alone.
    fn path(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    /// Runs a command of this machine with the root mounted.
    fn beside(&self, arguments: &[&str]) -> Result<Finished> {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-ec"]);
        command.arg("mount -t overlay none -o \"lowerdir=$1,upperdir=$2/upper,workdir=$2/work\" \"$2/root\"; shift 2; exec \"$@\"");
        command.arg("sh").arg(&self.base).arg(self.folder.path()).args(arguments);
        process::run(command, LIMIT)
    }

    /// Runs a command of the root in it.
    fn inside(&self, script: &str) -> Result<Finished> {
        self.beside(&["chroot", &self.path().display().to_string(), "sh", "-ec", script])
    }

    /// `rpm` on the packages of the root. Those of a Debian root are unknown to it, so that none of ours finds what it needs.
    fn rpm(&self, arguments: &[&str]) -> Result<Finished> {
        let root = self.path().display().to_string();
        let own = ["rpm", "--root", &root, "--dbpath", DATABASE, "--nosignature"];
        let asks = arguments.first() == Some(&"--query");
        let more: &[&str] = if asks { &[] } else { &["--nodeps"] };
        self.beside(&[&own[..], arguments, more].concat())
    }

    /// Insists that every file of the packages is as it was packed.
    fn must_verify(&self) -> Result<()> {
        let said = self.rpm(&[&["--verify"], &PACKAGES[..]].concat())?;
        ensure!(said.status.success() && said.stdout.is_empty(), "{said:?}");
        Ok(())
    }

    /// Insists that these units start at boot, or that none of them does.
    fn must_be_enabled(&self, wanted: bool) -> Result<()> {
        for unit in ENABLED {
            let enabled = self.inside(&format!("systemctl is-enabled {unit}"))?;
            ensure!(enabled.status.success() == wanted, "{unit}: {enabled:?}");
        }
        Ok(())
    }

    /// Digests of what coordinator and agent keep.
    fn state(&self) -> Result<String> {
        let script = "find /etc/cloison /var/lib/cloison /var/lib/cloison-agent -type f -exec sha256sum {} + | sort; \
                      stat -c '%n %a %U' /var/lib/cloison /var/lib/cloison-agent";
        Ok(self.inside(script)?.ok()?.stdout)
    }
}

/// Makes the packages of one version from these programs, and gives their paths.
fn make_packages(folder: &Path, version: &str, put: impl Fn(&str, &Path) -> Result<()>) -> Result<Vec<String>> {
    let target = folder.join(version);
    std::fs::create_dir_all(target.join("debug"))?;
    let tools = programs::find("cloison")?.with_file_name("../tools");
    std::os::unix::fs::symlink(
        std::fs::canonicalize(tools).context("no tools: tests/scripts/setup-machines.sh")?,
        target.join("tools"),
    )?;
    for name in PACKAGES {
        put(name, &target.join("debug").join(name))?;
    }
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../systemd/package.sh");
    let mut command = Command::new(recipe);
    command
        .args(["rpm", "debug"])
        .arg(folder)
        .arg(version)
        .env("CARGO_TARGET_DIR", &target);
    process::run(command, PACKING)?.ok()?;
    let architecture = std::env::consts::ARCH;
    let path = |name: &str| folder.join(format!("{name}-{version}-1.{architecture}.rpm")).display().to_string();
    Ok(PACKAGES.map(path).into())
}

/// The program under test, without what only debuggers need.
fn stripped(name: &str, to: &Path) -> Result<()> {
    let mut command = Command::new("strip");
    command.arg("-o").arg(to).arg(programs::find(name)?);
    process::run(command, LIMIT)?.ok().map(drop)
}

/// Another program of that name.
fn other(name: &str, to: &Path) -> Result<()> {
    std::fs::write(to, format!("#!/bin/sh\necho {name} {NEXT}\n"))?;
    Ok(std::fs::set_permissions(to, std::fs::Permissions::from_mode(0o755))?)
}

#[test]
fn packages_install_verify_upgrade_with_their_state_and_go_without_a_trace() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let first = make_packages(folder.path(), VERSION, stripped)?;
    let next = make_packages(folder.path(), NEXT, other)?;
    let root = Root::new()?;
    fn words<'a>(action: &[&'a str], packages: &'a [String]) -> Vec<&'a str> {
        action.iter().copied().chain(packages.iter().map(String::as_str)).collect()
    }

    root.rpm(&words(&["--install"], &first))?.ok()?;
    root.must_verify()?;
    let listed = root.rpm(&[&["--query", "--list"], &PACKAGES[..]].concat())?.ok()?.stdout;
    let missing: Vec<_> = FILES.iter().filter(|file| !listed.lines().any(|line| line == **file)).collect();
    ensure!(missing.is_empty(), "{missing:?} not in\n{listed}");
    for name in PACKAGES {
        let said = root.inside(&format!("{name} --version"))?.ok()?.stdout;
        ensure!(said.starts_with(&format!("{name} ")), "{said}");
    }
    root.must_be_enabled(true)?;
    let needs = root.rpm(&["--query", "--requires", "cloison-agent"])?.ok()?.stdout;
    ensure!(needs.contains("nftables") && needs.contains("systemd >= 252"), "{needs}");

    // What a host has by the time of an upgrade: a mesh, an identity, a configuration.
    root.inside(
        "cloison-coordinator init --data /var/lib/cloison --address 192.0.2.1:7443 --cli-config /root/cli.toml >/dev/null; \
         chown -R cloison: /var/lib/cloison; mkdir -p /etc/cloison; echo 'log = \"info\"' >/etc/cloison/agent.toml; \
         mkdir -m 700 /var/lib/cloison-agent; echo secret >/var/lib/cloison-agent/identity; rm /root/cli.toml",
    )?
    .ok()?;
    let state = root.state()?;
    ensure!(
        state.contains("/var/lib/cloison/trust/root.key") && state.contains("/var/lib/cloison 700 cloison"),
        "{state}"
    );
    root.rpm(&words(&["--upgrade"], &next))?.ok()?;
    root.must_verify()?;
    root.must_be_enabled(true)?;
    ensure!(root.state()? == state, "before:\n{state}\nafter:\n{}", root.state()?);
    let all = root.rpm(&["--query", "--all"])?.ok()?.stdout;
    ensure!(all.lines().count() == 3 && all.lines().all(|line| line.contains(NEXT)), "{all}");
    ensure!(root.inside("cloison-agent")?.ok()?.stdout.trim() == format!("cloison-agent {NEXT}"));
    let back = root.rpm(&words(&["--upgrade"], &first))?;
    ensure!(
        !back.status.success() && back.stderr.contains("newer"),
        "an older version took its place: {back:?}"
    );

    // A file that somebody changed is found.
    root.inside("echo '#' >>/usr/lib/systemd/system/cloison-agent.service")?.ok()?;
    let said = root.rpm(&["--verify", "cloison-agent"])?;
    ensure!(!said.status.success() && said.stdout.contains("cloison-agent.service"), "{said:?}");

    root.rpm(&[&["--erase"], &PACKAGES[..]].concat())?.ok()?;
    ensure!(root.state()? == state, "an erasure takes what only a person may take");
    root.must_be_enabled(false)?;
    // As docs/install.md says.
    root.inside("rm -r /var/lib/cloison /var/lib/cloison-agent /etc/cloison; userdel cloison")?
        .ok()?;
    let left =
        root.inside("find / -xdev -iname '*cloison*' ! -path '/proc/*' ! -path '/sys/*'; grep cloison /etc/passwd /etc/group || true")?;
    ensure!(left.clone().ok()?.stdout.is_empty(), "these stay:\n{}", left.stdout);
    Ok(())
}
