//! One boot of a machine: from the network namespace to a systemd that has started everything, and to its end.
//!
//! The traps of running systemd below a first process that is not systemd, each met by a word of [`SCRIPT`] or [`Boot::start`]: there may
//! be no cgroup v2 where systemd looks for it, so it is mounted; `--keep-unit` makes systemd-nspawn end with status 133 for a reboot instead
//! of booting again; without CAP_BPF and the call `bpf`, `DevicePolicy=` and `IPAddressDeny=` would silently not be enforced, and the units
//! would be tested with a part of their sandbox missing; the guest's first process takes SIGTERM for a wish to be executed anew.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::lab::netns::Netns;
use crate::lab::process::{self, Process};
use crate::lab::{Lab, netns, wait_for};

/// Mounts the disk over the root and starts the guest in a cgroup of its own, in a mount namespace that goes with it.
/// Arguments: root, disk, cgroup, name, namespace.
const SCRIPT: &str = r#"
set -eu
base=$1 disk=$2 cgroup=/sys/fs/cgroup/$3 name=$4 namespace=$5
mkdir -p "$disk/upper" "$disk/work" "$disk/root"
mount -t overlay overlay -o "lowerdir=$base,upperdir=$disk/upper,workdir=$disk/work" "$disk/root"
mount -t cgroup2 none /sys/fs/cgroup
mkdir -p "$cgroup"
status=0
(
  sh -c 'echo $PPID' >"$cgroup/cgroup.procs"
  export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1
  exec setpriv --pdeathsig KILL -- systemd-nspawn --quiet --boot --directory="$disk/root" --machine="$name" --hostname="$name" \
    --register=no --keep-unit --console=pipe --resolv-conf=off --timezone=off --link-journal=no --network-namespace-path="$namespace" \
    --bind=/dev/net/tun --capability=CAP_NET_ADMIN,CAP_NET_RAW,CAP_BPF,CAP_PERFMON,CAP_SYS_ADMIN --system-call-filter=bpf
) || status=$?
find "$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null || true
exit $status
"#;

/// A running machine.
#[derive(Debug)]
pub(super) struct Boot {
    /// The shell around systemd-nspawn.
    outer: Process,
    /// The guest's first process, once there is one.
    leader: Option<Pid>,
    net: Netns,
}

impl Boot {
    /// Starts it; nothing is up yet.
    pub(super) fn start(lab: &Lab, name: &str, namespace: &str, disk: &Path, base: &Path, cgroup: &str) -> Result<Self> {
        let net = Netns::create(lab.prefix(), namespace, lab.shared_folder())?;
        lab.wire().plug(&net, name)?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "unshare", "--mount", "--propagation", "private", "--"]);
        command
            .args(["sh", "-c", SCRIPT, "boot"])
            .arg(base)
            .arg(disk)
            .args([cgroup, name])
            .arg(net.path());
        let outer = Process::start(&format!("{name}-console"), command, lab.shared_folder())?;
        Ok(Self { outer, leader: None, net })
    }

    /// Waits until systemd says that everything is started.
    pub(super) fn wait_until_up(&mut self, within: Duration) -> Result<()> {
        let leader = wait_for("systemd to start", within, || {
            if let Some(status) = self.outer.ended()? {
                bail!("it ended with {status}");
            }
            Ok(first_process(self.outer.id()))
        })?;
        self.leader = Some(leader);
        let mut state = String::new();
        let up = wait_for("systemd to have started everything", within, || {
            if let Some(status) = self.outer.ended()? {
                bail!("it ended with {status}");
            }
            let mut ask = self.command("systemctl");
            ask.arg("is-system-running");
            state = process::run(ask, within)?.stdout.trim().to_owned();
            Ok(matches!(state.as_str(), "running" | "degraded").then_some(()))
        });
        up.with_context(|| format!("it is `{state}`"))?;
        ensure!(state == "running", "a unit failed");
        Ok(())
    }

    /// A command that will run in the machine as root, with what a login would have in its environment.
    pub(super) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        let leader = self.leader.map_or(0, |pid| pid.as_raw_nonzero().get());
        command.args(["--target", &leader.to_string()]);
        command.args([
            "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd", "--", "env", "-i",
        ]);
        command.args([
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME=/root",
            "LANG=C.UTF-8",
        ]);
        command.args(["DEBIAN_FRONTEND=noninteractive", program]);
        command
    }

    /// Its file system, as it sees it.
    pub(super) fn root(&self) -> PathBuf {
        let leader = self.leader.map_or(0, |pid| pid.as_raw_nonzero().get());
        PathBuf::from(format!("/proc/{leader}/root"))
    }

    /// What it wrote to its console.
    pub(super) fn console(&self) -> String {
        self.outer.output() + &self.outer.log()
    }

    /// Waits for its end.
    pub(super) fn wait(&mut self, within: Duration) -> Result<ExitStatus> {
        self.outer.wait(within)
    }

    /// Ends all that is left of it at once, and takes its network away.
    pub(super) fn cut(mut self) -> Result<()> {
        if let (Some(leader), None) = (self.leader, self.outer.ended()?) {
            // With the first process of a process namespace all others go.
            let _ = kill_process(leader, Signal::KILL);
            drop(self.outer.wait(Duration::from_secs(10)));
        }
        if self.outer.ended()?.is_none() {
            self.outer.kill()?;
        }
        netns::delete(self.net.name())
    }
}

/// The guest's systemd: the child of systemd-nspawn, which is below the shell `outer`.
fn first_process(outer: u32) -> Option<Pid> {
    let processes = processes();
    let children = |parent: u32| processes.iter().filter(move |p| p.parent == parent);
    let nspawn = children(outer).find(|p| p.name == "systemd-nspawn").or_else(|| {
        // Where the shell forks once more.
        children(outer).flat_map(|p| children(p.id)).find(|p| p.name == "systemd-nspawn")
    })?;
    let first = children(nspawn.id).find(|p| p.name == "systemd")?;
    i32::try_from(first.id).ok().and_then(Pid::from_raw)
}

struct Entry {
    id: u32,
    parent: u32,
    name: String,
}

fn processes() -> Vec<Entry> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let parse = |entry: std::fs::DirEntry| {
        let id = entry.file_name().to_str()?.parse().ok()?;
        // PID (NAME) STATE PPID ...
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        let (front, back) = stat.rsplit_once(") ")?;
        let (_, name) = front.split_once(" (")?;
        let parent = back.split_whitespace().nth(1)?.parse().ok()?;
        Some(Entry {
            id,
            parent,
            name: name.to_owned(),
        })
    };
    entries.flatten().filter_map(parse).collect()
}
