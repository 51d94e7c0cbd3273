//! The real agent on a host of the lab. Everything that it writes or binds is below the host's own folder or inside its namespace.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::host::Host;
use super::manager::Manager;
use super::netns::Netns;
use super::process::{self, Finished, Process};
use super::{programs, wait_for};

/// The agent's UDP port.
pub const PORT: u16 = 51_820;
/// The agent's TUN interface.
pub const INTERFACE: &str = "cloison0";
const START_LIMIT: Duration = Duration::from_secs(20);

/// An agent. See the module documentation.
#[derive(Debug)]
pub struct Agent {
    host: String,
    net: Netns,
    folder: PathBuf,
    process: Option<Process>,
    log_filter: String,
    environment: Vec<(String, String)>,
    manager: Option<Manager>,
    /// Its capabilities, if it has not all of root's.
    capabilities: Option<String>,
}

impl Agent {
    /// Writes the configuration of an agent of this host; `more` is appended to it. Nothing is running yet.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn configure(host: &Host, more: &str) -> Result<Self> {
        let agent = Self {
            host: host.name().to_owned(),
            net: host.net().clone(),
            folder: host.folder(),
            process: None,
            log_filter: "info".to_owned(),
            environment: Vec::new(),
            manager: None,
            capabilities: None,
        };
        let mut text = String::new();
        writeln!(text, "state_dir = {:?}", agent.state().display().to_string())?;
        writeln!(text, "socket = {:?}", agent.socket().display().to_string())?;
        writeln!(text, "interface = {INTERFACE:?}")?;
        writeln!(text, "listen_port = {PORT}")?;
        if !more.contains("hosts_file") {
            writeln!(text, "hosts_file = {:?}", host.hosts_file().display().to_string())?;
        }
        text.push_str(more);
        std::fs::write(agent.config(), text)?;
        Ok(agent)
    }

    /// Adds lines to its configuration, which count from its next start on.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn add_settings(&self, lines: &str) -> Result<()> {
        let text = std::fs::read_to_string(self.config())? + lines;
        Ok(std::fs::write(self.config(), text)?)
    }

    /// Name of its host.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Its namespace.
    #[must_use]
    pub fn net(&self) -> &Netns {
        &self.net
    }

    /// Its configuration file.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.folder.join("agent.toml")
    }

    /// Its folder of state.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.folder.join("agent")
    }

    /// Its status socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.join("agent.sock")
    }

    /// What it logs from its next start on, as `RUST_LOG` says it.
    pub fn set_log_filter(&mut self, filter: &str) {
        filter.clone_into(&mut self.log_filter);
    }

    /// Runs it, and its commands, with further variables from now on.
    pub fn set_environment(&mut self, more: impl IntoIterator<Item = (String, String)>) {
        self.environment.extend(more);
    }

    /// Runs it from its next start on under a service manager, which wants to be pinged within `watchdog`.
    ///
    /// # Errors
    /// If the manager's sockets cannot be made.
    pub fn manage(&mut self, watchdog: Duration) -> Result<&Manager> {
        let manager = Manager::new(&self.folder)?;
        self.environment.extend([
            ("NOTIFY_SOCKET".to_owned(), manager.notify_socket().display().to_string()),
            ("WATCHDOG_USEC".to_owned(), watchdog.as_micros().to_string()),
        ]);
        Ok(self.manager.insert(manager))
    }

    /// Runs it from its next start on with these capabilities alone, as its unit does: `net_admin,sys_admin`.
    pub fn confine(&mut self, capabilities: &str) {
        self.capabilities = Some(capabilities.to_owned());
    }

    /// Its service manager.
    ///
    /// # Errors
    /// If it has none.
    pub fn manager(&self) -> Result<&Manager> {
        self.manager
            .as_ref()
            .with_context(|| format!("nothing manages the agent of {}", self.host))
    }

    /// Joins by a token. The token goes through a file, never over the command line.
    ///
    /// # Errors
    /// If the agent cannot be started. A refused token is no error here.
    pub fn join(&self, token: &str) -> Result<Finished> {
        let file = self.folder.join("token");
        std::fs::write(&file, token)?;
        let file = file.display().to_string();
        self.command(&["join", "--token-file", &file])
    }

    /// Starts it, and returns when it says that it is running.
    ///
    /// # Errors
    /// If it ends, or does not answer in time.
    pub fn start(&mut self) -> Result<()> {
        let mut process = self.spawn()?;
        wait_for(&format!("the agent of {} to run", self.host), START_LIMIT, || {
            if let Some(status) = process.ended()? {
                bail!(
                    "the agent of {} ended with {status}:\n{}{}",
                    self.host,
                    process.output(),
                    process.log()
                );
            }
            Ok(self.command(&["status", "-o", "json"])?.ok().ok())
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// Starts it without waiting for anything: for agents that shall fail.
    ///
    /// # Errors
    /// If the program is missing.
    pub fn spawn(&self) -> Result<Process> {
        let program = programs::find("cloison-agent")?;
        let mut line = Vec::new();
        if let Some(manager) = &self.manager {
            let (tool, socket) = (programs::find("lab-tool")?, manager.pass_socket());
            line.extend([tool, "with-kept".into(), socket, "--".into()].map(|part| part.display().to_string()));
        }
        if let Some(capabilities) = &self.capabilities {
            let wanted = format!("-all,+{}", capabilities.replace(',', ",+"));
            line.extend(["setpriv", "--no-new-privs", "--inh-caps=-all", "--bounding-set", &wanted, "--"].map(str::to_owned));
        }
        line.push(program.display().to_string());
        let (first, rest) = line.split_first().context("an empty line")?;
        let mut command = self.net.command(first);
        command
            .args(rest)
            .arg("run")
            .arg("--config")
            .arg(self.config())
            .env("RUST_LOG", &self.log_filter)
            .envs(self.environment.iter().cloned());
        self.net.start("agent", command)
    }

    /// Starts it, and returns when its program does: it is not running yet.
    ///
    /// # Errors
    /// If the program is missing.
    pub fn launch(&mut self) -> Result<()> {
        self.process = Some(self.spawn()?);
        Ok(())
    }

    /// Its process.
    ///
    /// # Errors
    /// If it is not running.
    pub fn process(&mut self) -> Result<&mut Process> {
        self.process
            .as_mut()
            .with_context(|| format!("the agent of {} is not running", self.host))
    }

    /// Everything that it logged since its last start.
    ///
    /// # Errors
    /// If it is not running.
    pub fn log(&self) -> Result<String> {
        let process = self
            .process
            .as_ref()
            .with_context(|| format!("the agent of {} is not running", self.host))?;
        Ok(process.log() + &process.output())
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

    /// Runs a command of `cloison-agent` with this agent's configuration.
    ///
    /// # Errors
    /// If it cannot be started. A failing command is no error here.
    pub fn command(&self, arguments: &[&str]) -> Result<Finished> {
        let mut command = self.net.command(&programs::find("cloison-agent")?.display().to_string());
        let (name, rest) = arguments.split_first().context("no command for the agent")?;
        command.arg(name).arg("--config").arg(self.config()).args(rest);
        command.envs(self.environment.iter().filter(|(name, _)| name != "NOTIFY_SOCKET").cloned());
        process::run(command, super::netns::COMMAND_LIMIT)
    }

    /// `cloison-agent status -o json`.
    ///
    /// # Errors
    /// If it is not running.
    pub fn status(&self) -> Result<Value> {
        self.command(&["status", "-o", "json"])?.ok()?.json()
    }
}
