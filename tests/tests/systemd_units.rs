//! The systemd units as files: systemd finds nothing wrong with them, they are as closed as promised, every line is explained to operators,
//! and `make install` puts them where systemd looks. That the programs work inside of them is `e2e_systemd`'s to show.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

/// Each unit, the drop-in it is judged with, and the highest exposure that it may have.
const UNITS: [(&str, Option<&str>, f64); 4] = [
    ("cloison-agent.service", None, 2.0),
    ("cloison-agent.service", Some("attachments.conf"), 2.4),
    ("cloison-agent-prepare.service", None, 2.0),
    ("cloison-coordinator.service", None, 1.3),
];

#[test]
fn systemd_finds_nothing_wrong_with_the_units() -> Result<()> {
    let root = installed()?;
    let (units, dropins) = (root.path().join("usr/lib/systemd/system"), root.path().join("with-attachments"));
    copy(&units, &dropins, Some("attachments.conf"))?;
    for folder in [units, dropins] {
        let mut verify = Command::new("systemd-analyze");
        verify.args(["verify", "--man=no", "--recursive-errors=one"]);
        verify.args(UNITS.iter().map(|(unit, ..)| folder.join(unit)));
        let said = output(&mut verify)?;
        ensure!(said.is_empty(), "systemd-analyze verify says:\n{said}");
    }
    Ok(())
}

#[test]
fn a_misspelt_line_would_be_found() -> Result<()> {
    let root = installed()?;
    let unit = root.path().join("usr/lib/systemd/system/cloison-agent.service");
    let text = std::fs::read_to_string(&unit)?.replace("NoNewPrivileges=", "NoNewPrivilege=");
    std::fs::write(&unit, text)?;
    let said = output(
        Command::new("systemd-analyze")
            .args(["verify", "--man=no", "--recursive-errors=one"])
            .arg(&unit),
    )?;
    ensure!(said.contains("NoNewPrivilege"), "{said}");
    Ok(())
}

#[test]
fn the_units_are_as_closed_as_the_documentation_says() -> Result<()> {
    let readme = std::fs::read_to_string(sources().join("README.md"))?;
    for (unit, dropin, limit) in UNITS {
        let folder = tempfile::tempdir()?;
        copy(&sources(), folder.path(), dropin)?;
        let table = output(
            Command::new("systemd-analyze")
                .args(["security", "--offline=true", "--no-pager"])
                .arg(folder.path().join(unit)),
        )?;
        let exposure = table.rsplit_once("Overall exposure level for ").and_then(|(_, rest)| {
            let (_, level) = rest.split_once(": ")?;
            level.split_whitespace().next()?.parse::<f64>().ok()
        });
        let exposure = exposure.with_context(|| format!("no exposure of {unit} in:\n{table}"))?;
        ensure!(
            exposure <= limit,
            "{unit} with {dropin:?}: {exposure}, but at most {limit}\n{table}"
        );
        let name = dropin.unwrap_or(unit);
        let row = readme.lines().find(|line| line.starts_with('|') && line.contains(name));
        ensure!(
            row.is_some_and(|row| row.trim_end().ends_with(&format!("| {exposure:.1} |"))),
            "systemd/README.md does not say that {name} has an exposure of {exposure}: {row:?}"
        );
    }
    Ok(())
}

#[test]
fn every_line_of_every_unit_is_explained() -> Result<()> {
    let readme = std::fs::read_to_string(sources().join("README.md"))?;
    let mut missing = BTreeSet::new();
    for (unit, dropin, _) in UNITS {
        let path = dropin.map_or_else(|| sources().join(unit), |name| sources().join(format!("{unit}.d/{name}")));
        for line in std::fs::read_to_string(&path)?.lines() {
            let Some((key, _)) = line.split_once('=').filter(|_| !line.starts_with('#')) else {
                continue;
            };
            if !readme.contains(&format!("`{key}=")) {
                missing.insert(format!("{unit}: {key}="));
            }
        }
    }
    ensure!(missing.is_empty(), "systemd/README.md does not explain {missing:?}");
    Ok(())
}

#[test]
fn what_the_documentation_explains_is_in_a_unit() -> Result<()> {
    let readme = std::fs::read_to_string(sources().join("README.md"))?;
    let mut units = String::new();
    for (unit, dropin, _) in UNITS {
        let path = dropin.map_or_else(|| sources().join(unit), |name| sources().join(format!("{unit}.d/{name}")));
        units.push_str(&std::fs::read_to_string(path)?);
    }
    let says = |span: &str| {
        let (key, values) = span.split_once('=').unwrap_or((span, ""));
        let mut lines = units.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        lines.any(|line| {
            values
                .split_whitespace()
                .all(|value| line.split_whitespace().any(|word| word == value))
        })
    };
    let mut wrong = Vec::new();
    for line in readme.lines().filter(|line| line.starts_with("- ")) {
        let spans = line.split('`').skip(1).step_by(2);
        let directives = spans.filter(|span| span.contains('=') && span.starts_with(|c: char| c.is_ascii_uppercase()));
        wrong.extend(directives.filter(|span| !says(span)).map(str::to_owned));
    }
    ensure!(wrong.is_empty(), "no unit says {wrong:?}");
    Ok(())
}

#[test]
fn make_install_puts_everything_below_its_prefix_and_uninstall_takes_it_away() -> Result<()> {
    let root = tempfile::tempdir()?;
    make("install", root.path(), "/opt/cloison")?;
    let prefix = root.path().join("opt/cloison");
    for file in [
        "bin/cloison",
        "bin/cloison-agent",
        "bin/cloison-coordinator",
        "lib/sysusers.d/cloison-coordinator.conf",
        "share/bash-completion/completions/cloison-agent",
        "share/zsh/site-functions/_cloison",
        "share/fish/vendor_completions.d/cloison-coordinator.fish",
        "share/doc/cloison/policy.md",
        "share/doc/cloison-agent/systemd.md",
        "share/doc/cloison-agent/attachments.conf",
        "share/doc/cloison-coordinator/LICENSE-MIT",
    ] {
        ensure!(prefix.join(file).is_file(), "{file} is not installed");
    }
    for (unit, ..) in UNITS {
        let text = std::fs::read_to_string(prefix.join("lib/systemd/system").join(unit))?;
        ensure!(
            text.contains("ExecStart=/opt/cloison/bin/"),
            "{unit} starts another program:\n{text}"
        );
        ensure!(!text.contains("/usr/"), "{unit} names a place that is not its prefix's:\n{text}");
    }
    make("uninstall", root.path(), "/opt/cloison")?;
    let left = output(Command::new("find").arg(root.path()).args(["-type", "f"]))?;
    ensure!(left.is_empty(), "these stay:\n{left}");
    Ok(())
}

/// A folder in which `make install` has put everything, with the prefix of the packages; the units start the programs there.
fn installed() -> Result<tempfile::TempDir> {
    let root = tempfile::tempdir()?;
    make("install", root.path(), "/usr")?;
    let units = root.path().join("usr/lib/systemd/system");
    for (unit, ..) in UNITS {
        let text = std::fs::read_to_string(units.join(unit))?;
        let programs = format!("={}/usr/bin/", root.path().display());
        std::fs::write(units.join(unit), text.replace("=/usr/bin/", &programs))?;
    }
    Ok(root)
}

/// Runs a target with small programs in the place of the real ones, which need not be built for this.
fn make(target: &str, destination: &Path, prefix: &str) -> Result<()> {
    let programs = tempfile::tempdir()?;
    for name in ["cloison", "cloison-agent", "cloison-coordinator"] {
        std::fs::copy("/bin/true", programs.path().join(name))?;
    }
    let mut command = Command::new("make");
    command.current_dir(project()).args(["--silent", target]);
    command
        .arg(format!("DESTDIR={}", destination.display()))
        .arg(format!("PREFIX={prefix}"));
    command.arg(format!("RELEASE={}", programs.path().display()));
    let done = command.output().context("make does not start")?;
    if !done.status.success() {
        bail!("make {target}: {}", String::from_utf8_lossy(&done.stderr));
    }
    Ok(())
}

/// Copies the units to a folder, and a drop-in to where systemd looks for it.
fn copy(from: &Path, to: &Path, dropin: Option<&str>) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for (unit, ..) in UNITS {
        std::fs::copy(from.join(unit), to.join(unit))?;
    }
    if let Some(name) = dropin {
        let folder = to.join("cloison-agent.service.d");
        std::fs::create_dir_all(&folder)?;
        std::fs::copy(sources().join("cloison-agent.service.d").join(name), folder.join(name))?;
    }
    Ok(())
}

fn output(command: &mut Command) -> Result<String> {
    let done = command
        .output()
        .with_context(|| format!("{command:?} does not start: run tests/scripts/setup.sh"))?;
    Ok(String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr))
}

fn sources() -> PathBuf {
    project().join("systemd")
}

fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}
