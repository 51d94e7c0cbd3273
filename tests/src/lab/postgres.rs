//! A real PostgreSQL server on a host of the lab, and its real clients.
//!
//! The cluster is made fresh in the host's folder and runs as the user `postgres` that Debian's package makes. Everyone who reaches it may
//! log in: what is tested is who reaches it. Its data is not kept, so it does not wait for the disk.

use std::fmt::Display;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use super::host::Host;
use super::netns::Netns;
use super::process::{self, Finished, Process};
use super::wait_for;

/// The port it listens on.
pub const PORT: u16 = 5432;
const USER: &str = "postgres";
const START_LIMIT: Duration = Duration::from_secs(30);
const PACKAGES: &str = "/usr/lib/postgresql";

/// A running server. See the module documentation.
#[derive(Debug)]
pub struct Postgres {
    process: Process,
    listen: Vec<IpAddr>,
    data: PathBuf,
}

impl Postgres {
    /// Makes a cluster and starts it on these addresses, trying again while they do not exist yet.
    ///
    /// # Errors
    /// If PostgreSQL is not installed, or does not answer within 30 s.
    pub fn start(host: &Host, listen: &[IpAddr]) -> Result<Self> {
        Self::start_in(host, host.net(), listen)
    }

    /// The same in a namespace of a component on that host.
    ///
    /// # Errors
    /// As [`Postgres::start`].
    pub fn start_in(host: &Host, net: &Netns, listen: &[IpAddr]) -> Result<Self> {
        let data = host.folder().join("postgres");
        init(net, &data)?;
        let addresses: Vec<String> = listen.iter().map(IpAddr::to_string).collect();
        let settings = [
            format!("listen_addresses={}", addresses.join(",")),
            format!("port={PORT}"),
            format!("unix_socket_directories={}", data.display()),
            "fsync=off".to_owned(),
            "shared_buffers=16MB".to_owned(),
            "max_connections=60".to_owned(),
            "log_connections=on".to_owned(),
            "log_disconnections=on".to_owned(),
        ];
        let process = wait_for("PostgreSQL to start", START_LIMIT, || {
            let mut command = net.command_as(USER, &program("postgres")?);
            command.arg("-D").arg(&data).args(settings.iter().flat_map(|s| ["-c", s]));
            let mut process = net.start("postgres", command)?;
            // It goes on without an address that it cannot bind if it has another: only all of them count.
            let ready = process.wait_for_line("database system is ready to accept connections", START_LIMIT);
            if ready.is_ok() && !process.log().contains("could not bind") {
                return Ok(Some(process));
            }
            ensure!(
                process.log().contains("could not bind"),
                "PostgreSQL did not start:\n{}",
                process.log()
            );
            process.stop_by(Signal::INT)?;
            std::thread::sleep(Duration::from_millis(200));
            Ok(None)
        })?;
        Ok(Self {
            process,
            listen: listen.to_vec(),
            data,
        })
    }

    /// Admits clients from these addresses alone from now on, as `pg_hba.conf` says it.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn admit_only(&self, clients: &[IpAddr]) -> Result<()> {
        let line = |client: &IpAddr| format!("host all all {client}/{} trust\n", if client.is_ipv4() { 32 } else { 128 });
        let text = clients
            .iter()
            .fold("local all all trust\n".to_owned(), |text, client| text + &line(client));
        std::fs::write(self.data.join("pg_hba.conf"), text)?;
        self.process.signal(Signal::HUP)
    }

    /// Where it listens.
    #[must_use]
    pub fn addresses(&self) -> &[IpAddr] {
        &self.listen
    }

    /// Its log: a line for each client that comes and goes.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// How many clients have reached it over the network.
    #[must_use]
    pub fn clients_seen(&self) -> usize {
        self.log()
            .lines()
            .filter(|l| l.contains("connection received: host=") && !l.contains("host=[local]"))
            .count()
    }

    /// Stops it at once, as its own fast shutdown does.
    ///
    /// # Errors
    /// If it had to be killed.
    pub fn stop(&mut self) -> Result<()> {
        self.process.stop_by(Signal::INT).map(drop)
    }
}

/// Runs one query of the server at an address or name from a namespace, with a connect timeout in whole seconds.
///
/// # Errors
/// If psql cannot be started, or hangs. A refused query is no error here.
pub fn query(from: &Netns, at: impl Display, sql: &str, connect_timeout_s: u32) -> Result<Finished> {
    query_by(from.command("psql"), at, sql, connect_timeout_s)
}

/// The same by a `psql` that begins as this command does.
///
/// # Errors
/// As [`query`].
pub fn query_by(mut command: Command, at: impl Display, sql: &str, connect_timeout_s: u32) -> Result<Finished> {
    command.args([
        "-X",
        "-A",
        "-t",
        "-h",
        &at.to_string(),
        "-p",
        &PORT.to_string(),
        "-U",
        USER,
        "-c",
        sql,
        "postgres",
    ]);
    command.env("PGCONNECT_TIMEOUT", connect_timeout_s.to_string());
    process::run(command, super::netns::COMMAND_LIMIT)
}

/// Makes and fills the tables of pgbench from a namespace.
///
/// # Errors
/// If pgbench cannot be started.
pub fn fill(from: &Netns, at: impl Display, scale: u32) -> Result<Finished> {
    let (at, scale) = (at.to_string(), scale.to_string());
    from.run(&[&program("pgbench")?, "-i", "-q", "-s", &scale, "-h", &at, "-U", USER, "postgres"])
}

/// Runs pgbench from a namespace for some seconds and gives its report.
///
/// # Errors
/// If pgbench cannot be started.
pub fn bench(from: &Netns, at: impl Display, seconds: u32, arguments: &[&str]) -> Result<Finished> {
    let mut command = from.command(&program("pgbench")?);
    command
        .args([
            "-h",
            &at.to_string(),
            "-p",
            &PORT.to_string(),
            "-U",
            USER,
            "-T",
            &seconds.to_string(),
            "-n",
        ])
        .args(arguments)
        .arg("postgres");
    process::run(command, Duration::from_secs(u64::from(seconds) + 60))
}

fn init(net: &Netns, data: &Path) -> Result<()> {
    std::fs::create_dir(data).with_context(|| format!("making {}", data.display()))?;
    let mut owner = Command::new("chown");
    owner.arg(format!("{USER}:")).arg(data);
    process::run(owner, START_LIMIT)?
        .ok()
        .context("PostgreSQL is not installed: run tests/scripts/setup.sh")?;
    let mut command = net.command_as(USER, &program("initdb")?);
    command
        .arg("-D")
        .arg(data)
        .args(["--no-sync", "--auth=trust", "--encoding=UTF8", "--locale=C"]);
    process::run(command, START_LIMIT)?.ok()?;
    let everyone = "local all all trust\nhost all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n";
    std::fs::write(data.join("pg_hba.conf"), everyone)?;
    Ok(())
}

/// The path of one of PostgreSQL's programs, of the newest version installed.
fn program(name: &str) -> Result<String> {
    let mut versions: Vec<(u32, PathBuf)> = std::fs::read_dir(PACKAGES)
        .context("PostgreSQL is not installed: run tests/scripts/setup.sh")?
        .flatten()
        .filter_map(|e| Some((e.file_name().to_str()?.parse().ok()?, e.path().join("bin").join(name))))
        .filter(|(_, path)| path.is_file())
        .collect();
    versions.sort();
    let (_, path) = versions
        .pop()
        .with_context(|| format!("no {name} below {PACKAGES}: run tests/scripts/setup.sh"))?;
    Ok(path.display().to_string())
}
