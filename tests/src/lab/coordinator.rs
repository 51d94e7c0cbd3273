//! The real coordinator on a host of the lab, and the operator's command line beside it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use cloison_proto::api::{Explanation, HostSummary, MeshStatus};
use serde::de::DeserializeOwned;

use super::host::Host;
use super::netns::Netns;
use super::process::{self, Finished, Process};
use super::{programs, wait_for};

/// The port of the control link (UDP) and of the API (TCP).
pub const PORT: u16 = 7443;
const START_LIMIT: Duration = Duration::from_secs(20);

/// A coordinator. See the module documentation.
#[derive(Debug)]
pub struct Coordinator {
    net: Netns,
    folder: PathBuf,
    process: Option<Process>,
    /// What `init` printed, with the owner credential in it.
    init: Finished,
    environment: Vec<(String, String)>,
}

impl Coordinator {
    /// Initialises a mesh on this host; `arguments` go to `init` behind those that every mesh of the lab has. Nothing is running yet.
    ///
    /// # Errors
    /// If `cloison-coordinator init` fails.
    pub fn init(host: &Host, arguments: &[&str]) -> Result<Self> {
        let folder = host.folder();
        let addresses: Vec<String> = host.addresses().iter().map(|a| SocketAddr::new(*a, PORT).to_string()).collect();
        let mut command = host.net().command(&programs::find("cloison-coordinator")?.display().to_string());
        command.arg("init").arg("--data").arg(folder.join("coordinator"));
        command.args(addresses.iter().flat_map(|a| ["--address", a]));
        command.arg("--cli-config").arg(folder.join("cloison.toml")).args(arguments);
        let init = process::run(command, START_LIMIT)?.ok()?;
        Ok(Self {
            net: host.net().clone(),
            folder,
            process: None,
            init,
            environment: Vec::new(),
        })
    }

    /// Starts serving, and returns when the API says that it is ready.
    ///
    /// # Errors
    /// If it does not get ready in time.
    pub fn serve(&mut self) -> Result<()> {
        let mut process = self.spawn()?;
        let mut answer = None;
        let ready = wait_for("the coordinator to get ready", START_LIMIT, || {
            if let Some(status) = process.ended()? {
                anyhow::bail!("the coordinator ended with {status}:\n{}{}", process.output(), process.log());
            }
            let status = self.cli(&["-o", "json", "status"])?;
            Ok(answer.insert(status).status.success().then_some(()))
        });
        ready.with_context(|| {
            format!(
                "the last answer of `cloison status`: {}",
                answer.map_or_else(String::new, |a| a.stderr)
            )
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// Starts serving without waiting for anything: for coordinators that shall die soon.
    ///
    /// # Errors
    /// If the program is missing.
    pub fn launch(&mut self) -> Result<()> {
        self.process = Some(self.spawn()?);
        Ok(())
    }

    fn spawn(&self) -> Result<Process> {
        let mut command = self.net.command(&programs::find("cloison-coordinator")?.display().to_string());
        command.arg("serve").arg("--data").arg(self.data());
        command.envs(self.environment.iter().cloned());
        self.net.start("coordinator", command)
    }

    /// Runs it, and the command line that speaks with it, with further variables from now on.
    pub fn set_environment(&mut self, more: impl IntoIterator<Item = (String, String)>) {
        self.environment.extend(more);
    }

    /// Its folder of data.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.folder.join("coordinator")
    }

    /// The configuration of the command line that `init` wrote.
    #[must_use]
    pub fn cli_config(&self) -> PathBuf {
        self.folder.join("cloison.toml")
    }

    /// What `init` wrote to its outputs.
    #[must_use]
    pub fn init_output(&self) -> &Finished {
        &self.init
    }

    /// Its process, if it is running.
    pub fn process(&mut self) -> Option<&mut Process> {
        self.process.as_mut()
    }

    /// Stops it in order.
    ///
    /// # Errors
    /// If it had to be killed.
    pub fn stop(&mut self) -> Result<()> {
        self.process.take().map_or(Ok(()), |mut p| p.stop().map(drop))
    }

    /// Ends it as a power cut would.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().map_or(Ok(()), |mut p| p.kill())
    }

    /// Runs a command of `cloison-coordinator` on this coordinator's data, on its host.
    ///
    /// # Errors
    /// If it cannot be started. A failing command is no error here.
    pub fn command(&self, arguments: &[&str]) -> Result<Finished> {
        let mut command = self.net.command(&programs::find("cloison-coordinator")?.display().to_string());
        let (name, rest) = arguments.split_first().context("no command for the coordinator")?;
        command.arg(name).arg("--data").arg(self.data()).args(rest);
        process::run(command, START_LIMIT)
    }

    /// Writes the owner credential that a command printed into the command line's configuration.
    ///
    /// # Errors
    /// If it printed none.
    pub fn take_credential(&self, printed: &Finished) -> Result<()> {
        let line = printed.stdout.lines().find_map(|line| line.trim().strip_prefix("owner credential"));
        let new = line.context("no credential was printed")?.trim();
        let text = std::fs::read_to_string(self.cli_config())?;
        let lines = text.lines().map(|line| {
            let ours = line.starts_with("credential");
            if ours {
                format!("credential = {new:?}\n")
            } else {
                format!("{line}\n")
            }
        });
        Ok(std::fs::write(self.cli_config(), lines.collect::<String>())?)
    }

    /// Runs `cloison` with these arguments, with the configuration that `init` wrote, on the coordinator's host.
    ///
    /// # Errors
    /// If it cannot be started. A failing command is no error here.
    pub fn cli(&self, arguments: &[&str]) -> Result<Finished> {
        let mut command = self.net.command(&programs::find("cloison")?.display().to_string());
        command.arg("--config").arg(self.cli_config()).args(arguments);
        command.envs(self.environment.iter().cloned());
        process::run(command, super::netns::COMMAND_LIMIT)
    }

    /// Runs `cloison -o json` and reads the answer.
    ///
    /// # Errors
    /// If the command fails with another exit code than 0 or 2 (denied, differs), or answers something else.
    pub fn ask<T: DeserializeOwned>(&self, arguments: &[&str]) -> Result<T> {
        let answer = self.cli(&[&["-o", "json"], arguments].concat())?;
        let answer = if answer.status.code() == Some(2) { answer } else { answer.ok()? };
        serde_json::from_str(&answer.stdout).with_context(|| format!("reading the answer to {arguments:?}: {}", answer.stdout))
    }

    /// `cloison status`.
    ///
    /// # Errors
    /// As [`Coordinator::ask`].
    pub fn status(&self) -> Result<MeshStatus> {
        self.ask(&["status"])
    }

    /// `cloison host show`.
    ///
    /// # Errors
    /// As [`Coordinator::ask`].
    pub fn host(&self, name: &str) -> Result<HostSummary> {
        self.ask(&["host", "show", name])
    }

    /// `cloison explain`.
    ///
    /// # Errors
    /// As [`Coordinator::ask`].
    pub fn explain(&self, from: &str, to: &str) -> Result<Explanation> {
        self.ask(&["explain", from, to])
    }

    /// Makes a token for a host of this name, and gives its text.
    ///
    /// # Errors
    /// If the coordinator refuses.
    pub fn token(&self, host: &str) -> Result<String> {
        let answer = self.cli(&["token", "create", "--host", host])?.ok()?;
        Ok(answer.stdout.trim().to_owned())
    }

    /// Puts a policy into force and gives the time at which the answer was there. Does not wait for the agents.
    ///
    /// # Errors
    /// If the coordinator refuses it.
    pub fn apply(&self, policy: &str) -> Result<SystemTime> {
        self.apply_file(policy, &[])
    }

    /// Puts a policy into force, and returns when every host has it.
    ///
    /// # Errors
    /// If the coordinator refuses it, or a host does not have it after 30 s.
    pub fn apply_and_wait(&self, policy: &str) -> Result<()> {
        self.apply_file(policy, &["--wait"]).map(drop)
    }

    fn apply_file(&self, policy: &str, arguments: &[&str]) -> Result<SystemTime> {
        let file = self.folder.join("policy.yaml");
        std::fs::write(&file, policy)?;
        let file = file.display().to_string();
        Ok(self.cli(&[&["policy", "apply", &file], arguments].concat())?.ok()?.wrote_at)
    }
}
