//! What the kernel and the file system say: CPU time, memory, sizes, and which machine and programs this is.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use cloison_tests::lab::host::Host;
use cloison_tests::lab::mesh::Mesh;
use cloison_tests::lab::{netns, programs};
use serde::Serialize;

use crate::BYSTANDER;

/// The programs that are installed.
const PROGRAMS: [&str; 3] = ["cloison-agent", "cloison-coordinator", "cloison"];
/// Unit of CPU time in `/proc`, USER_HZ: a part of the kernel's interface, 100 on all architectures that we build for (proc(5)).
const TICKS_PER_SECOND: u64 = 100;
/// Above this share of its CPUs, a machine does something else too.
const BUSY: f64 = 0.5;

/// Where the figures are from.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Machine {
    /// `release` or `debug`, by the folder of the programs.
    pub(crate) profile: String,
    /// That folder.
    pub(crate) programs: String,
    /// Kind of CPU.
    pub(crate) cpu: String,
    /// How many there are.
    pub(crate) cpus: usize,
    /// Version of the kernel.
    pub(crate) kernel: String,
    /// Load of the minute before the measurement.
    pub(crate) load: f64,
}

/// Resident memory, in KiB.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Memory {
    /// Of the agent that has one peer and no traffic.
    pub(crate) agent_kib: u64,
    /// Of the coordinator of three linked hosts.
    pub(crate) coordinator_kib: u64,
}

impl Machine {
    /// Whether something else was running before the measurement.
    pub(crate) fn is_busy(&self) -> bool {
        u32::try_from(self.cpus).is_ok_and(|cpus| self.load > BUSY * f64::from(cpus))
    }
}

/// Describes this machine, before anything is measured.
pub(crate) fn describe() -> Result<Machine> {
    let program = programs::find("cloison-agent")?;
    let folder = program.parent().context("a program is in no folder")?;
    let name = folder.file_name().map(|n| n.to_string_lossy().into_owned());
    let cpu = std::fs::read_to_string("/proc/cpuinfo")?;
    let cpu = cpu
        .lines()
        .find_map(|l| l.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown", |(_, model)| model);
    let load = std::fs::read_to_string("/proc/loadavg")?;
    Ok(Machine {
        profile: name
            .filter(|n| n == "release" || n == "debug")
            .unwrap_or_else(|| "unknown".to_owned()),
        programs: folder.display().to_string(),
        cpu: cpu.to_owned(),
        cpus: std::thread::available_parallelism()?.get(),
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        load: load.split(' ').next().context("an empty load")?.parse()?,
    })
}

/// Memory of the agent that nothing is asked of, and of the coordinator.
pub(crate) fn memory(mesh: &mut Mesh) -> Result<Memory> {
    let coordinator = mesh.coordinator.process().context("the coordinator is not running")?.id();
    Ok(Memory {
        agent_kib: resident_kib(mesh.agent_mut(BYSTANDER)?.process()?.id())?,
        coordinator_kib: resident_kib(coordinator)?,
    })
}

/// CPU time of all these processes together, in user and kernel mode.
pub(crate) fn cpu_time(processes: &[u32]) -> Result<Duration> {
    let mut ticks = 0;
    for id in processes {
        let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).with_context(|| format!("process {id}"))?;
        // The name, in parentheses, may contain anything; utime and stime are fields 14 and 15, the first behind the name is 3.
        let (_, fields) = stat.rsplit_once(") ").context("an odd /proc/PID/stat")?;
        for field in fields.split(' ').skip(11).take(2) {
            ticks += field.parse::<u64>()?;
        }
    }
    Ok(Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND))
}

/// The process of this name in a host's namespace.
pub(crate) fn process_in(host: &Host, name: &str) -> Result<u32> {
    let inode = netns::inode(host.net().name())?;
    let matches = |id: u32| {
        let folder = Path::new("/proc").join(id.to_string());
        let inside = std::fs::metadata(folder.join("ns/net")).is_ok_and(|m| m.ino() == inode);
        inside && std::fs::read_to_string(folder.join("comm")).is_ok_and(|comm| comm.trim() == name)
    };
    std::fs::read_dir("/proc")?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .find(|id| matches(*id))
        .with_context(|| format!("no {name} runs on {}", host.name()))
}

/// Bytes of each release program: of those that were measured, or of those beside them. `None` if they have not been built.
pub(crate) fn sizes() -> Result<Option<BTreeMap<String, u64>>> {
    let program = programs::find("cloison-agent")?;
    let folder = program
        .parent()
        .and_then(Path::parent)
        .context("a program is in no folder")?
        .join("release");
    let size = |name: &str| Some((name.to_owned(), folder.join(name).metadata().ok()?.len()));
    Ok(PROGRAMS.into_iter().map(size).collect())
}

/// Resident memory of a process, in KiB.
pub(crate) fn resident_kib(process: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix("VmRSS:"))
        .context("a process without memory")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse()?)
}
