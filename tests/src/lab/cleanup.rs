//! Who owns which lab name, and taking away what a lab made.
//!
//! A name is claimed by a lock on a file below `/run/cloison-lab`, so two runs of one test wait for each other instead of tearing each
//! other's namespaces down. The file holds the path of the lab's folder: whoever claims the name next removes what a killed run left.
//!
//! Only processes inside namespaces and cgroups that carry the claimed prefix are ended, by their number; those are made by the lab alone.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};

use super::netns;
use super::wait_for;

/// First part of all names that labs give to namespaces and folders.
pub const FAMILY: &str = "cloison-lab";
const CLAIMS: &str = "/run/cloison-lab";
/// How long a lab waits for another run of the same name to end.
const CLAIM_WAIT: Duration = Duration::from_secs(300);

/// The right to use a lab name, until dropped.
#[derive(Debug)]
pub struct Claim {
    prefix: String,
    file: File,
    folder: Option<PathBuf>,
    keep: bool,
}

impl Claim {
    /// Takes a name, waiting while another process has it, and removes what an earlier owner left.
    ///
    /// # Errors
    /// If the name is not of lower-case letters, digits and `-`, or stays taken for five minutes.
    pub fn take(name: &str) -> Result<Self> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        ensure!(
            !name.is_empty() && name.len() <= 80 && name.chars().all(plain),
            "`{name}` is not a name for a lab"
        );
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(CLAIMS)
            .with_context(|| format!("making {CLAIMS}"))?;
        let path = Path::new(CLAIMS).join(name);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = file.with_context(|| format!("opening {}", path.display()))?;
        wait_for(&format!("the other run of the lab `{name}`"), CLAIM_WAIT, || {
            Ok(flock(&file, FlockOperation::NonBlockingLockExclusive).ok())
        })?;
        let prefix = prefix_of(name);
        end_cgroups(&prefix)?;
        remove_namespaces(&prefix)?;
        let mut folder = String::new();
        file.read_to_string(&mut folder)?;
        remove_folder(Path::new(folder.trim()), &prefix)?;
        Ok(Self {
            prefix,
            file,
            folder: None,
            keep: false,
        })
    }

    /// The prefix of everything this claim covers; ends in a dot, which no name contains.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Leaves the folder in place, for the next owner of the name to remove.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// Makes the folder of the lab and notes its path. Every user may pass through it: PostgreSQL runs as its own.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn make_folder(&mut self) -> Result<PathBuf> {
        let folder = tempfile::Builder::new()
            .prefix(&self.prefix)
            .tempdir()
            .context("making the lab's folder")?
            .keep();
        std::fs::set_permissions(&folder, std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
        self.file.set_len(0)?;
        self.file.rewind()?;
        writeln!(self.file, "{}", folder.display())?;
        self.folder = Some(folder.clone());
        Ok(folder)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if let Some(folder) = &self.folder {
            let _ = remove_folder(folder, &self.prefix);
        }
        // The file itself stays: another run may be waiting for its lock, and removing it would hand that run a lock on nothing.
        let _ = self.file.set_len(0);
    }
}

/// The prefix of everything that a lab of this name makes; it ends in a dot, which no name contains.
#[must_use]
pub fn prefix_of(name: &str) -> String {
    format!("{FAMILY}.{name}.")
}

/// Removes the namespaces and folders of a lab of this process that is still running, for programs that are interrupted.
///
/// # Errors
/// If something cannot be removed.
pub fn remove_lab(prefix: &str) -> Result<()> {
    end_cgroups(prefix)?;
    remove_namespaces(prefix)?;
    remove_folders(prefix)
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Whether this program was interrupted, and is taking its lab away.
#[must_use]
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// From here on, SIGINT and SIGTERM take the lab of this name away and end the program. For programs; tests are cleaned up after by the next
/// run of the same name.
pub fn on_interrupt(name: &'static str) {
    std::thread::spawn(move || -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut end = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
            tokio::select! {
                outcome = tokio::signal::ctrl_c() => outcome,
                _ = end.recv() => Ok(()),
            }
        })?;
        INTERRUPTED.store(true, Ordering::Relaxed);
        eprintln!("\ninterrupted: removing what was made");
        let outcome = remove_lab(&prefix_of(name));
        if let Err(error) = &outcome {
            eprintln!("{error:#}");
        }
        // 128 + SIGINT, as shells count.
        std::process::exit(if outcome.is_ok() { 130 } else { 1 });
    });
}

/// Ends all processes in the namespaces whose name starts with `prefix`, and removes the namespaces.
///
/// # Errors
/// If a namespace is still there afterwards.
pub fn remove_namespaces(prefix: &str) -> Result<()> {
    let names: Vec<String> = netns::list()?.into_iter().filter(|n| n.starts_with(prefix)).collect();
    if names.is_empty() {
        return Ok(());
    }
    for signal in [Signal::TERM, Signal::KILL] {
        // Whatever ignores the first signal gets the second; whatever survives that makes the namespace's end fail.
        end(&processes_in(&names), signal);
    }
    // All of them, also if one refuses: what is left is named once, at the end.
    let outcomes: Vec<Result<()>> = names.iter().map(|name| netns::delete(name)).collect();
    outcomes.into_iter().collect()
}

/// Ends all processes in the cgroups whose name starts with `prefix`, in every hierarchy, and removes these cgroups: the containers of a lab.
///
/// # Errors
/// If the cgroups that are there cannot be listed.
pub fn end_cgroups(prefix: &str) -> Result<()> {
    let root = Path::new("/sys/fs/cgroup");
    // With the first version of cgroups, each controller has a hierarchy of its own.
    for hierarchy in subfolders(root)?.into_iter().chain([root.to_owned()]) {
        let ours = |path: &PathBuf| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix));
        for cgroup in subfolders(&hierarchy)?.into_iter().filter(ours) {
            let mut all = vec![cgroup];
            let mut position = 0;
            while let Some(next) = all.get(position).cloned() {
                all.extend(subfolders(&next)?);
                position += 1;
            }
            let lines = all
                .iter()
                .map(|c| std::fs::read_to_string(c.join("cgroup.procs")).unwrap_or_default());
            let pids: Vec<Pid> = lines
                .flat_map(|l| l.lines().filter_map(|l| Pid::from_raw(l.parse().ok()?)).collect::<Vec<_>>())
                .collect();
            end(&pids, Signal::KILL);
            for cgroup in all.iter().rev() {
                // One that is still in use is found by the next run.
                let _ = std::fs::remove_dir(cgroup);
            }
        }
    }
    Ok(())
}

/// Takes away everything that is mounted below a folder, and on it.
///
/// # Errors
/// If the mounts cannot be listed, or one cannot be taken away.
pub fn unmount_below(folder: &Path) -> Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    let below: Vec<&str> = points.filter(|point| Path::new(point).starts_with(folder)).collect();
    for point in below.iter().rev() {
        let mut command = std::process::Command::new("umount");
        command.args(["--lazy", point]);
        super::process::run(command, netns::COMMAND_LIMIT)?.ok()?;
    }
    Ok(())
}

/// Sends a signal to processes, and waits a while for their end.
fn end(all: &[Pid], signal: Signal) {
    for pid in all {
        let _ = kill_process(*pid, signal);
    }
    drop(wait_for("processes to end", Duration::from_secs(3), || {
        Ok(all.iter().all(has_ended).then_some(()))
    }));
}

fn subfolders(folder: &Path) -> Result<Vec<PathBuf>> {
    match std::fs::read_dir(folder) {
        Ok(entries) => Ok(entries
            .flatten()
            .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
            .map(|e| e.path())
            .collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("reading {}", folder.display())),
    }
}

/// Removes the namespaces and folders of all labs, running or not: what `make clean-lab` does.
///
/// # Errors
/// If something cannot be removed.
pub fn remove_all() -> Result<()> {
    let prefix = format!("{FAMILY}.");
    remove_lab(&prefix)?;
    match std::fs::remove_dir_all(CLAIMS) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).with_context(|| format!("removing {CLAIMS}")),
        _ => Ok(()),
    }
}

fn remove_folders(prefix: &str) -> Result<()> {
    std::fs::read_dir(std::env::temp_dir())?
        .flatten()
        .try_for_each(|entry| remove_folder(&entry.path(), prefix))
}

/// Removes a folder if it is there, is no link, and its name starts with the prefix; leaves everything else alone.
fn remove_folder(folder: &Path, prefix: &str) -> Result<()> {
    let ours = folder.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix));
    if !ours || !folder.symlink_metadata().is_ok_and(|m| m.is_dir()) {
        return Ok(());
    }
    unmount_below(folder)?;
    // A program that is just ending may still write a file.
    let removed = wait_for("the folder to stay empty", Duration::from_secs(3), || {
        Ok(std::fs::remove_dir_all(folder).ok())
    });
    ensure!(removed.is_ok() || !folder.exists(), "{} cannot be removed", folder.display());
    Ok(())
}

/// All processes whose network namespace is one of these.
fn processes_in(names: &[String]) -> Vec<Pid> {
    let inodes: Vec<u64> = names.iter().filter_map(|n| netns::inode(n).ok()).collect();
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let inside = |entry: std::fs::DirEntry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let namespace = std::fs::metadata(entry.path().join("ns/net")).ok()?;
        inodes
            .contains(&std::os::unix::fs::MetadataExt::ino(&namespace))
            .then(|| Pid::from_raw(pid))
            .flatten()
    };
    entries
        .flatten()
        .filter_map(inside)
        .filter(|pid| *pid != rustix::process::getpid())
        .collect()
}

/// Whether a process is gone, or waits for its parent to notice.
pub(super) fn has_ended(pid: &Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z'))
}
