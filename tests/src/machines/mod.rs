//! Machines that boot: a small Debian with a real systemd as its first process, on the wire of a lab.
//!
//! All machines share one root, made by `tests/scripts/setup-machines.sh`; each lays its own files over it, in the folder of its lab: its
//! *disk*. A boot takes a fresh network namespace with one interface on the wire, mounts disk over root in a mount namespace of its own, and
//! starts systemd there by `systemd-nspawn`. What a boot made besides the disk (interfaces, routes, nftables tables, processes) goes with
//! the namespaces when the machine goes down, as it does with a real one.
//!
//! A machine goes down in order ([`Machine::power_off`], [`Machine::reboot`]) or not ([`Machine::cut_power`]). The latter ends all processes
//! at once; what they wrote and did not sync is still there, so it shows what a crash does, and not what a disk without power forgets.
//!
//! A machine that does not boot is an error that shows its console and its journal; nothing is skipped. See [`boot`] for how it is started.

mod boot;
pub mod packages;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use self::boot::Boot;
use crate::lab::process::{self, Finished, Process};
use crate::lab::{Folder, Lab, programs, wire_v4};

/// How long a machine may take to boot, on a machine of ours that does other things too.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// How long it may take to go down in order.
const DOWN_LIMIT: Duration = Duration::from_secs(40);
/// How long a command in it may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// What `systemd-nspawn` ends with when its guest wants to boot again.
const REBOOT_STATUS: i32 = 133;

/// A machine, up or down. It goes down when it is dropped.
#[derive(Debug)]
pub struct Machine {
    name: String,
    number: u8,
    prefix: String,
    disk: PathBuf,
    boots: u32,
    folder: Arc<Folder>,
    running: Option<Boot>,
}

impl Machine {
    /// A machine that is down, with an empty disk but for its name, its id and its address. `number` is that of its address on the wire.
    ///
    /// # Errors
    /// If there is no root for machines: `tests/scripts/setup-machines.sh` makes it.
    pub fn new(lab: &Lab, name: &str, number: u8) -> Result<Self> {
        let disk = lab.folder().join("machines").join(name);
        std::fs::create_dir_all(disk.join("upper")).with_context(|| format!("making {}", disk.display()))?;
        let machine = Self {
            name: name.to_owned(),
            number,
            prefix: lab.prefix().to_owned(),
            disk,
            boots: 0,
            folder: Arc::clone(lab.shared_folder()),
            running: None,
        };
        base()?;
        machine.write("/etc/hostname", &format!("{name}\n"))?;
        // Every machine has an id of its own, and the same one at each boot.
        machine.write("/etc/machine-id", &format!("{:032x}\n", 0xc101_0000_u32 + u32::from(number)))?;
        let network = format!(
            "[Match]\nName=eth0\n\n[Network]\nAddress={}/24\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n",
            machine.v4()
        );
        machine.write("/etc/systemd/network/eth0.network", &network)?;
        Ok(machine)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address on the wire.
    #[must_use]
    pub fn v4(&self) -> std::net::Ipv4Addr {
        wire_v4(self.number)
    }

    /// Boots it, and waits until systemd has started everything.
    ///
    /// # Errors
    /// If it does not come up, or a unit of it fails; what it logged is part of the error.
    pub fn boot(&mut self, lab: &Lab) -> Result<()> {
        ensure!(self.running.is_none(), "{} is up already", self.name);
        self.boots += 1;
        let namespace = format!("{}.{}", self.name, self.boots);
        let boot = Boot::start(lab, &self.name, &namespace, &self.disk, &base()?, &self.cgroup())?;
        let boot = self.running.insert(boot);
        if let Err(error) = boot.wait_until_up(BOOT_LIMIT) {
            bail!("{} does not boot: {error:#}\n{}", self.name, self.told());
        }
        Ok(())
    }

    /// Brings it down in order.
    ///
    /// # Errors
    /// If it does not go down in time, or not in order.
    pub fn power_off(&mut self) -> Result<()> {
        self.go_down("poweroff", 0)
    }

    /// Brings it down in order and up again.
    ///
    /// # Errors
    /// As [`Machine::power_off`] and [`Machine::boot`].
    pub fn reboot(&mut self, lab: &Lab) -> Result<()> {
        self.go_down("reboot", REBOOT_STATUS)?;
        self.boot(lab)
    }

    /// Ends all its processes at once.
    ///
    /// # Errors
    /// If it is down already.
    pub fn cut_power(&mut self) -> Result<()> {
        self.up()?;
        self.running.take().map_or(Ok(()), Boot::cut)
    }

    /// Runs a program in it to its end.
    ///
    /// # Errors
    /// If the machine is down, or the program does not end in time.
    pub fn run(&self, line: &[&str]) -> Result<Finished> {
        let (program, arguments) = line.split_first().context("an empty command line")?;
        let mut command = self.up()?.command(program);
        command.args(arguments);
        process::run(command, COMMAND_LIMIT).with_context(|| format!("on {}", self.name))
    }

    /// Runs a program in it that has to succeed, and gives what it printed.
    ///
    /// # Errors
    /// As [`Machine::run`], or if it fails.
    pub fn ok(&self, line: &[&str]) -> Result<String> {
        Ok(self.run(line)?.ok().with_context(|| format!("on {}", self.name))?.stdout)
    }

    /// Runs a script of the shell in it, which has to succeed, and gives what it printed.
    ///
    /// # Errors
    /// As [`Machine::ok`].
    pub fn sh(&self, script: &str) -> Result<String> {
        self.ok(&["sh", "-ec", script])
    }

    /// Starts a program in it that goes on until the machine goes down.
    ///
    /// # Errors
    /// If the machine is down.
    pub fn start(&self, name: &str, line: &[&str]) -> Result<Process> {
        let (program, arguments) = line.split_first().context("an empty command line")?;
        let mut command = self.up()?.command(program);
        command.args(arguments);
        Process::start(&format!("{}-{name}", self.name), command, &self.folder)
    }

    /// A property of one of its units, as `systemctl show` gives it.
    ///
    /// # Errors
    /// As [`Machine::ok`].
    pub fn property(&self, unit: &str, name: &str) -> Result<String> {
        let value = self.ok(&["systemctl", "show", "--value", &format!("--property={name}"), unit])?;
        Ok(value.trim().to_owned())
    }

    /// What a unit logged since the machine last booted.
    ///
    /// # Errors
    /// As [`Machine::ok`].
    pub fn journal(&self, unit: &str) -> Result<String> {
        self.ok(&["journalctl", "--no-pager", "--quiet", "--output=short-precise", "--unit", unit])
    }

    /// Writes a file of mode 0644 to its disk, up or down.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        let path = self.on_disk(path)?;
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    }

    /// Copies a file of ours to its disk, up or down.
    ///
    /// # Errors
    /// If it cannot be copied.
    pub fn copy(&self, from: &Path, to: &str) -> Result<()> {
        let path = self.on_disk(to)?;
        std::fs::copy(from, &path).with_context(|| format!("copying {} to {}", from.display(), path.display()))?;
        Ok(())
    }

    /// Where a file of it is for us; its folder is made if need be. While the machine is up, its disk belongs to the kernel, and we go
    /// through the first process's root.
    fn on_disk(&self, path: &str) -> Result<PathBuf> {
        let root = match &self.running {
            Some(boot) => boot.root(),
            None => self.disk.join("upper"),
        };
        let path = root.join(path.trim_start_matches('/'));
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        }
        Ok(path)
    }

    fn up(&self) -> Result<&Boot> {
        self.running.as_ref().with_context(|| format!("{} is down", self.name))
    }

    fn go_down(&mut self, how: &str, expected: i32) -> Result<()> {
        self.up()?;
        // The answer may get lost on the way down; whether it goes down is seen below.
        drop(self.run(&["systemctl", how]));
        let mut boot = self.running.take().with_context(|| format!("{} is down", self.name))?;
        let status = boot.wait(DOWN_LIMIT);
        let console = boot.console();
        boot.cut()?;
        let status = status.with_context(|| format!("{}: {how}\n{console}", self.name))?;
        ensure!(
            status.code() == Some(expected),
            "{} went down with {status}, not with {expected}:\n{console}",
            self.name
        );
        Ok(())
    }

    /// What the machine has to say about itself, for a test that failed: console, failed units, the end of the journal.
    #[must_use]
    pub fn told(&self) -> String {
        let mut told = self.running.as_ref().map(Boot::console).unwrap_or_default();
        for line in [
            &["systemctl", "--no-pager", "--failed"][..],
            &["systemctl", "--no-pager", "list-jobs"],
            &["journalctl", "--no-pager", "--quiet", "--lines=200"],
        ] {
            match self.run(line) {
                Ok(said) => told.push_str(&said.stdout),
                Err(error) => told.push_str(&format!("{error:#}\n")),
            }
        }
        told
    }

    fn cgroup(&self) -> String {
        format!("{}{}", self.prefix, self.name)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.running.take().map(Boot::cut) {
            eprintln!("{} does not go down: {error:#}", self.name);
        }
    }
}

/// The root that all machines share.
fn base() -> Result<PathBuf> {
    let target = programs::target_folder()?;
    let target = target.parent().context("the programs are in no target folder")?;
    let base = target.join("machines/base");
    ensure!(
        base.join("usr/lib/systemd/systemd").is_file(),
        "{} is missing: run tests/scripts/setup-machines.sh first",
        base.display()
    );
    Ok(base.canonicalize()?)
}
