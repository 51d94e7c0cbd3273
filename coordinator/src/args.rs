//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use jiff::SignedDuration;

use crate::config::{HostPort, PrefixV4, PrefixV6};
use crate::credential::Scope;

/// Where a coordinator's data is unless said otherwise.
const DEFAULT_DATA: &str = "/var/lib/cloison";

/// Coordinates a Cloison mesh: enrolls hosts, and tells each of them whom it may talk to.
#[derive(Debug, Parser)]
#[command(name = "cloison-coordinator", version, about, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a new mesh: trust roots, database, one owner credential, and the CLI's configuration
    Init(InitArgs),
    /// Run the coordinator
    Serve(ServeArgs),
    /// Make another API credential; works beside a running coordinator
    Credential(CredentialArgs),
    /// Write everything into one file, beside a running coordinator. The file holds the mesh's private keys
    Backup(BackupArgs),
    /// Make a data directory out of a backup; the coordinator changes nothing until `recover`
    Restore(RestoreArgs),
    /// After a restore: show what agents know better, and go on
    Recover(RecoverArgs),
    /// Print what a shell needs to complete this command; packages install it
    #[command(
        after_help = "Example:\n  cloison-coordinator completions bash > ~/.local/share/bash-completion/completions/cloison-coordinator"
    )]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Arguments of `init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// Directory for the mesh's keys and database; made if it does not exist
    #[arg(long, value_name = "DIR", default_value = DEFAULT_DATA)]
    pub data: PathBuf,
    /// Where hosts reach this coordinator, up to three times [default: this machine's address, port 7443]
    #[arg(long, value_name = "HOST:PORT")]
    pub address: Vec<HostPort>,
    /// IPv4 range of the mesh, /8 to /24 [default: a random /16 inside 10.0.0.0/8]
    #[arg(long, value_name = "PREFIX")]
    pub overlay_v4: Option<PrefixV4>,
    /// IPv6 range of the mesh, a /48 inside fd00::/8 [default: a random one]
    #[arg(long, value_name = "PREFIX")]
    pub overlay_v6: Option<PrefixV6>,
    /// How long hosts go on without contact with the coordinator, like 24h
    #[arg(long, value_name = "TIME", default_value = "24h")]
    pub lease: SignedDuration,
    /// Where to write the configuration of the `cloison` CLI [default: ~/.config/cloison/config.toml]
    #[arg(long, value_name = "PATH")]
    pub cli_config: Option<PathBuf>,
}

/// Arguments of `serve`.
#[derive(Debug, Args)]
#[command(
    after_help = "The configuration file (TOML) may say:\n  listen = [\"[::]:7443\"]                addresses and ports for hosts (udp) and the \
API (tcp)\n  log = \"info\"                          what to log, like \"warn,cloison_coordinator=debug\"\n  host_certificate_lifetime = \"24h\"     \
how long hosts' certificates live, 10s to 168h; renewed at half of it"
)]
pub struct ServeArgs {
    /// Directory that `init` made
    #[arg(long, value_name = "DIR", default_value = DEFAULT_DATA)]
    pub data: PathBuf,
    /// Address and port for hosts (udp) and the API (tcp), may be repeated (default: `[::]:7443`)
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Vec<SocketAddr>,
    /// Configuration file [default: DIR/coordinator.toml, if there is one]
    #[arg(long, value_name = "PATH")]
    pub config: Option<PathBuf>,
}

/// Arguments of `credential`.
#[derive(Debug, Args)]
pub struct CredentialArgs {
    /// Directory that `init` made
    #[arg(long, value_name = "DIR", default_value = DEFAULT_DATA)]
    pub data: PathBuf,
    /// What it allows, may be repeated: owner, policy, enroll, operate, read
    #[arg(long, required = true, value_delimiter = ',')]
    pub scope: Vec<Scope>,
    /// How long it is good, like 30d
    #[arg(long, value_name = "TIME", default_value = "720h")]
    pub expires: SignedDuration,
    /// What it is for
    #[arg(long, default_value = "made on the coordinator")]
    pub name: String,
}

/// Arguments of `backup`.
#[derive(Debug, Args)]
#[command(
    after_help = "Whoever has the file can be this coordinator: it holds the private keys of the mesh. It is made with mode 0600; keep it so."
)]
pub struct BackupArgs {
    /// Directory that `init` made
    #[arg(long, value_name = "DIR", default_value = DEFAULT_DATA)]
    pub data: PathBuf,
    /// The file to be written; it must not exist
    #[arg(long, value_name = "FILE")]
    pub to: PathBuf,
}

/// Arguments of `restore`.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// Directory for the mesh's keys and database; new or empty
    #[arg(long, value_name = "DIR", default_value = DEFAULT_DATA)]
    pub data: PathBuf,
    /// The backup
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// Arguments of `recover`.
#[derive(Debug, Args)]
#[command(
    after_help = "Without --yes, shows what would happen and changes nothing. Works beside the running coordinator, and best so: agents tell \
it what they know. Enrollment tokens and API credentials of the backup are revoked, because they may have been used or revoked since."
)]
pub struct RecoverArgs {
    /// Directory that `restore` made
    #[arg(long, value_name = "DIR", default_value = DEFAULT_DATA)]
    pub data: PathBuf,
    /// A host that must not come back, by name or id; may be repeated
    #[arg(long, value_name = "HOST")]
    pub revoke: Vec<String>,
    /// Leave the API credentials of the backup as they are
    #[arg(long)]
    pub keep_credentials: bool,
    /// Go on
    #[arg(long)]
    pub yes: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn times_and_prefixes_are_read_as_people_write_them() -> Result<(), clap::Error> {
        let cli = Cli::try_parse_from([
            "x",
            "init",
            "--lease",
            "36h",
            "--overlay-v4",
            "10.9.0.0/16",
            "--address",
            "a.example:7443",
        ])?;
        let Command::Init(init) = cli.command else {
            return Err(clap::Error::new(clap::error::ErrorKind::InvalidValue));
        };
        assert_eq!(init.lease.as_hours(), 36);
        for bad in [["--lease", "x"], ["--overlay-v4", "10.9.0.1/16x"], ["--address", "a"]] {
            assert!(Cli::try_parse_from(["x", "init", bad[0], bad[1]]).is_err(), "{bad:?}");
        }
        Ok(())
    }
}
