//! Container runtimes of a lab's host: a real Docker or Podman daemon of its own, whose folders, socket, namespaces and cgroups belong to the
//! lab, beside whatever runtime the machine has. Both are spoken to by Docker's command line.
//!
//! No image is fetched: the one there is has empty folders and links, and each container sees the machine's `/usr` and the programs of this
//! workspace, read-only. A container has no network but the mesh's (`--network none`), unless a test says otherwise.
//!
//! The daemon sees the files of the machine as they are, and makes its namespaces' files where the lab's programs see them come.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::host::Host;
use super::netns::{COMMAND_LIMIT, Netns};
use super::process::{self, Finished, Process};
use super::tool::Room;
use super::{cleanup, programs, wait_for};

/// The only image.
const IMAGE: &str = "lab";
const START_LIMIT: Duration = Duration::from_secs(30);

/// Which runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Docker.
    Docker,
    /// Podman.
    Podman,
}

/// A runtime. Its containers are removed and it is stopped when it is dropped; it has to be dropped before its lab.
#[derive(Debug)]
pub struct Runtime {
    kind: Kind,
    net: Netns,
    folder: PathBuf,
    cgroup: String,
    process: Option<Process>,
}

/// A container that was started.
#[derive(Debug, Clone)]
pub struct Container {
    name: String,
    socket: PathBuf,
    net: Netns,
}

/// The network namespace of a container, for programs that are none of its processes, and go on without its runtime.
#[derive(Debug, Clone)]
pub struct Inside {
    pid: u32,
    net: Netns,
}

impl Runtime {
    /// Makes the folders of a runtime on this host, and starts it. Agents that start behind this see its namespaces' files.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(host: &Host, kind: Kind) -> Result<Self> {
        let mut runtime = Self::prepare(host, kind)?;
        runtime.serve()?;
        runtime.import()?;
        Ok(runtime)
    }

    /// Makes the folders of a runtime on this host.
    ///
    /// # Errors
    /// If they cannot be made.
    pub fn prepare(host: &Host, kind: Kind) -> Result<Self> {
        let folder = host.folder().join(match kind {
            Kind::Docker => "docker",
            // Podman takes no longer paths than 50 bytes.
            Kind::Podman => "pods",
        });
        let runtime = Self {
            kind,
            net: host.net().clone().with_all_files(),
            cgroup: format!("/{}", host.net().name()),
            process: None,
            folder,
        };
        let (run, settings) = (runtime.folder.join("run"), runtime.folder.join("settings"));
        std::fs::create_dir_all(&run)?;
        // An own file, so that the machine's does not count. Podman would raise limits that a lab may not raise.
        std::fs::write(
            &settings,
            match kind {
                Kind::Docker => "{}\n",
                Kind::Podman => "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=4096:4096\"]\npids_limit = 0\n",
            },
        )?;
        // As on a booted machine: what is mounted here is seen by programs that have a mount namespace of their own.
        let mount = |arguments: &[&str]| {
            let mut command = Command::new("mount");
            command.args(arguments).arg(&run);
            process::run(command, COMMAND_LIMIT)?.ok()
        };
        mount(&["--bind", &run.display().to_string()])?;
        mount(&["--make-shared"])?;
        Ok(runtime)
    }

    /// Starts the daemon, and returns when it answers.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn serve(&mut self) -> Result<()> {
        let path = |name: &str| self.folder.join(name).display().to_string();
        let (socket, settings) = (format!("unix://{}", self.socket().display()), path("settings"));
        let (data, run) = (path("data"), path("run"));
        let command = match self.kind {
            Kind::Docker => {
                let mut command = self.net.command("dockerd");
                command.args([
                    "--host",
                    &socket,
                    "--config-file",
                    &settings,
                    "--data-root",
                    &data,
                    "--exec-root",
                    &run,
                ]);
                command.args(["--pidfile", &path("pid"), "--cgroup-parent", &self.cgroup]);
                command.args(["--exec-opt", "native.cgroupdriver=cgroupfs", "--live-restore", "--bridge=none"]);
                command.args([
                    "--iptables=false",
                    "--ip6tables=false",
                    "--ip-forward=false",
                    "--userland-proxy=false",
                ]);
                command
            }
            Kind::Podman => {
                let mut command = self.net.command("podman");
                command.args(["--root", &data, "--runroot", &run, "--tmpdir", &path("tmp"), "--runtime=runc"]);
                command.args(["--cgroup-manager=cgroupfs", "--events-backend=file"]);
                command
                    .args(["system", "service", "--time=0", &socket])
                    .env("CONTAINERS_CONF", &settings);
                command
            }
        };
        let name = match self.kind {
            Kind::Docker => "dockerd",
            Kind::Podman => "podman",
        };
        let mut process = self.net.start(name, command)?;
        wait_for(&format!("{name} to answer"), START_LIMIT, || {
            if let Some(status) = process.ended()? {
                bail!("{name} ended with {status}:\n{}", process.log());
            }
            Ok(self.cli(&["ps"])?.ok().ok())
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.join("socket")
    }

    /// The line of an agent's configuration that names it.
    #[must_use]
    pub fn setting(&self) -> String {
        let key = match self.kind {
            Kind::Docker => "docker_socket",
            Kind::Podman => "podman_socket",
        };
        format!("{key} = {:?}\n", self.socket().display().to_string())
    }

    /// Runs a command of the runtime's command line.
    ///
    /// # Errors
    /// If it cannot be started. A failing command is no error here.
    pub fn cli(&self, arguments: &[&str]) -> Result<Finished> {
        let mut command = cli(&self.net, &self.socket());
        command.args(arguments);
        process::run(command, COMMAND_LIMIT)
    }

    /// Starts a container that does nothing but stay, with these arguments for `run` before the image.
    ///
    /// # Errors
    /// If it does not start.
    pub fn run(&self, name: &str, arguments: &[&str]) -> Result<Container> {
        self.run_line(name, arguments, &["sleep", "infinity"])
    }

    /// Starts a container that runs this line.
    ///
    /// # Errors
    /// If it does not start.
    pub fn run_line(&self, name: &str, arguments: &[&str], line: &[&str]) -> Result<Container> {
        let programs = programs::target_folder()?;
        let programs = format!("{0}:{0}:ro", programs.display());
        let mut all = vec!["run", "--detach", "--name", name, "--init=false", "--cgroup-parent", &self.cgroup];
        all.extend(["--volume", "/usr:/usr:ro", "--volume", &programs]);
        if !arguments.iter().any(|argument| argument.starts_with("--network")) {
            all.push("--network=none");
        }
        all.extend(arguments.iter().chain(&[IMAGE]).chain(line));
        self.cli(&all)?.ok()?;
        Ok(self.named(name))
    }

    /// The container of this name, whether there is one or not.
    #[must_use]
    pub fn named(&self, name: &str) -> Container {
        Container {
            name: name.to_owned(),
            socket: self.socket(),
            net: self.net.clone(),
        }
    }

    /// Ends the daemon as a power cut would; its containers go on.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().map_or(Ok(()), |mut p| p.kill())?;
        // Docker's containerd ends with it, and would be taken for one that lives for as long as nobody has noticed.
        let noted = self.folder.join("run/containerd/containerd.pid");
        let Ok(pid) = std::fs::read_to_string(&noted) else { return Ok(()) };
        let pid = pid.trim().parse().ok().and_then(rustix::process::Pid::from_raw);
        let pid = pid.context("no number of a process")?;
        wait_for("containerd to end", START_LIMIT, || Ok(cleanup::has_ended(&pid).then_some(())))?;
        Ok(std::fs::remove_file(noted)?)
    }

    /// Ends all its containers without asking it.
    ///
    /// # Errors
    /// If they cannot be listed.
    pub fn end_containers(&self) -> Result<()> {
        cleanup::end_cgroups(self.net.name())
    }

    /// Makes the image: folders, and the links by which the machine's `/usr` is a root.
    fn import(&self) -> Result<()> {
        let root = self.folder.join("image");
        for folder in ["dev", "etc", "proc", "run", "sys", "tmp", "usr", "var"] {
            std::fs::create_dir_all(root.join(folder))?;
        }
        for link in ["bin", "lib", "lib64", "sbin"] {
            std::os::unix::fs::symlink(format!("usr/{link}"), root.join(link))?;
        }
        let archive = self.folder.join("image.tar").display().to_string();
        let mut tar = Command::new("tar");
        tar.args(["--create", "--file", &archive, "--directory"]).arg(&root).arg(".");
        process::run(tar, COMMAND_LIMIT)?.ok()?;
        self.cli(&["import", &archive, IMAGE])?.ok()?;
        Ok(())
    }

    fn take_away(&mut self) -> Result<()> {
        if self.process.is_some() {
            let all = self.cli(&["ps", "--all", "--quiet"])?.ok()?.stdout;
            let all: Vec<&str> = all.split_whitespace().collect();
            if !all.is_empty() {
                self.cli(&[&["rm", "--force"], all.as_slice()].concat())?;
            }
        }
        self.process.take().map_or(Ok(()), |mut p| p.stop().map(drop))?;
        cleanup::end_cgroups(self.net.name())?;
        cleanup::unmount_below(&self.folder)
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        if let Err(error) = self.take_away() {
            eprintln!("cannot take a container runtime away: {error:#}");
        }
    }
}

impl Container {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its first process, as the machine numbers it.
    ///
    /// # Errors
    /// If it does not run.
    pub fn pid(&self) -> Result<u32> {
        let shown = self.cli(&["inspect", "--format", "{{.State.Pid}}", &self.name])?.ok()?;
        shown.stdout.trim().parse().context("no number of a process")
    }

    /// Its network namespace, as it is now.
    ///
    /// # Errors
    /// If it does not run.
    pub fn inside(&self) -> Result<Inside> {
        Ok(Inside {
            pid: self.pid()?,
            net: self.net.clone(),
        })
    }

    /// A command of the runtime's command line, to its end.
    ///
    /// # Errors
    /// If it cannot be started. A failing command is no error here.
    pub fn cli(&self, arguments: &[&str]) -> Result<Finished> {
        let mut command = cli(&self.net, &self.socket);
        command.args(arguments);
        process::run(command, COMMAND_LIMIT)
    }

    /// Runs a program inside, as the container's root with the container's capabilities.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn exec(&self, line: &[&str]) -> Result<Finished> {
        self.cli(&[&["exec", &self.name], line].concat())
    }

    /// Ends its processes and starts them anew: the same container, another first process and namespace.
    ///
    /// # Errors
    /// If it does not start.
    pub fn restart(&self) -> Result<()> {
        self.cli(&["restart", "--time", "0", &self.name])?.ok().map(drop)
    }

    /// Removes it, running or not.
    ///
    /// # Errors
    /// If the runtime cannot.
    pub fn remove(&self) -> Result<()> {
        self.cli(&["rm", "--force", &self.name])?.ok().map(drop)
    }
}

impl Room for Container {
    fn start_tool(&self, name: &str, arguments: &[&str]) -> Result<Process> {
        let mut command = cli(&self.net, &self.socket);
        command.args(["exec", &self.name]).arg(programs::find("lab-tool")?).args(arguments);
        self.net.start(&format!("{}-{name}", self.name), command)
    }
}

impl Room for Inside {
    fn start_tool(&self, name: &str, arguments: &[&str]) -> Result<Process> {
        let mut command = self.net.command("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.pid)).arg("--");
        command.arg(programs::find("lab-tool")?).args(arguments);
        self.net.start(name, command)
    }
}

fn cli(net: &Netns, socket: &Path) -> Command {
    let mut command = net.command("docker");
    // Its settings and plugins are not the machine's.
    command.env("DOCKER_CONFIG", "/nonexistent");
    command.args(["--host", &format!("unix://{}", socket.display())]);
    command
}
