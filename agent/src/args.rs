//! The command line. Every help text says what the command does, when it is used, and shows an example.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use cloison_proto::label::ComponentName;

use crate::config::{FileConfig, LogFormat};

/// Cloison's agent: enrolls this host in a mesh, and keeps its components apart from everything that no rule names.
///
/// A host joins once, with a token that an operator made (`cloison token create`), and then runs the agent as a service. The policy is not
/// kept here: it comes from the coordinator, signed, and is enforced on this host as long as its lease lasts.
#[derive(Debug, Parser)]
#[command(
    name = "cloison-agent",
    version,
    max_term_width = 110,
    after_help = "Exit status: 0 done or allowed, 1 error, 2 denied or (doctor) something to mend, 3 not authorised; of `run` also 78: only a person can help, starting again cannot.\n\nFirst steps:\n  cloison-agent join --token-file token\n  systemctl enable --now cloison-agent\n  cloison-agent status"
)]
pub struct Cli {
    /// Settings that all commands share.
    #[command(flatten)]
    pub common: Common,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Settings that all commands share.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// Configuration file (TOML); /etc/cloison/agent.toml if it is there
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Directory of keys, membership and the cached view [default: /var/lib/cloison-agent]
    #[arg(long, global = true, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Socket by which `status`, `explain` and `ping` ask the running agent [default: /run/cloison/agent.sock]
    #[arg(long, global = true, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Hosts file that gets the names of components, or `off` [default: /etc/hosts]
    #[arg(long, global = true, value_name = "PATH|off")]
    pub hosts_file: Option<String>,
    /// What to log: a level, or `module=level,...` [default: info]
    #[arg(long, global = true, value_name = "FILTER")]
    pub log: Option<String>,
    /// How to log [default: text]
    #[arg(long, global = true, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

/// All settings of the configuration file. A test reads them, so that none of them is misspelt here.
const RUN_HELP: &str = r#"Configuration file (flags stand above it; these are the defaults):

  state_dir    = "/var/lib/cloison-agent"
  socket       = "/run/cloison/agent.sock"
  interface    = "cloison0"
  listen_port  = 51820
  table        = "cloison"
  attachments  = ["host", "user", "unit", "cgroup", "container", "netns"]   # kinds that this host accepts
  netns_dirs   = ["/run/netns"]
  docker_socket = "/run/docker.sock"          # asked only if a component is one of its containers
  podman_socket = "/run/podman/podman.sock"   # likewise
  loopback_guard = false     # whether a unit's or cgroup's component is reached on 127.0.0.1 and ::1 by itself alone
  coordinators = []          # host:port; empty: those that the mesh names
  endpoints    = []          # ip:port; told to peers beside this host's interface addresses
  hosts_file   = "/etc/hosts"   # gets a block with the names of components; or "off"
  resolver     = true        # answers DNS for the names of components, in each namespace with an interface of the mesh
  resolved     = false       # tells systemd-resolved to ask there for these names
  key_lifetime = "30d"       # how long a WireGuard key is used, give or take a tenth; "never": until `cloison-agent rotate-key`
  log          = "info"
  log_format   = "text"      # or "json"
  # mtu        = 1420        # found from the underlay
  # workers    = 4           # the number of processors, 4 at most"#;

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Enroll this host in a mesh, once
    ///
    /// Reads an enrollment token, makes this host's keys (they never leave it), proves them to the coordinator, and stores the certificate.
    /// Only a coordinator of the mesh that made the token is told the token's secret. If the command is cut off, run it again.
    #[command(
        after_help = "Examples:\n  cloison-agent join --token-file token\n  ssh admin cloison token create --host db-1 | cloison-agent join"
    )]
    Join(Join),
    /// Run the agent
    ///
    /// Needs root or CAP_NET_ADMIN, and /dev/net/tun. Stops at SIGTERM or SIGINT; the interface, its addresses and what keeps them from
    /// leaving in clear stay in place until `cloison-agent leave`, so that a restart is a pause.
    ///
    /// A host that is not enrolled enrolls by itself if its service has the credential `cloison.token` (systemd's LoadCredential=): it tries
    /// until a coordinator answers. Without a token, or with one that is refused, it ends with status 78: a unit should not start it again
    /// then (RestartPreventExitStatus=78).
    #[command(after_long_help = RUN_HELP)]
    Run(Box<Run>),
    /// Make this host safe for the mesh's addresses, while it boots
    ///
    /// Loads the base table and lays the `unreachable` routes, as the last view said. For a unit that runs before the network is there. Does
    /// nothing, and says so, on a host that is not enrolled.
    Prepare,
    /// Show how the running agent does: view, lease, link, components, peers, drops
    Status(StatusArgs),
    /// Say whether this host may reach a component, and whether it works right now
    ///
    /// Answers from this host's own view. A component that this host has nothing to do with and one that does not exist get the same
    /// answer; an operator sees the whole mesh with `cloison explain`.
    #[command(after_help = "Examples:\n  cloison-agent explain postgres:sql\n  cloison-agent explain postgres:tcp/5432 --from n8n")]
    Explain(Explain),
    /// Make a handshake with the hosts of a component, and say whether an echo would be allowed
    Ping(Ping),
    /// Print the agent's metrics in the Prometheus text format
    ///
    /// The agent listens on no port for this: have a timer write them where the node exporter's textfile collector reads.
    #[command(
        after_help = "Example:\n  cloison-agent metrics > /var/lib/prometheus/node-exporter/cloison.prom.new &&\n    mv /var/lib/prometheus/node-exporter/cloison.prom.new /var/lib/prometheus/node-exporter/cloison.prom"
    )]
    Metrics,
    /// List the conversations that pass right now
    Flows(Output),
    /// List the last denials
    Denials(Output),
    /// Change this host's WireGuard key now, without an interruption
    ///
    /// The agent makes a new key, proves it to the coordinator, and uses both until every peer has the new one, or for one lease. The old key is
    /// dead then. This also happens by itself, every 30 days unless `key_lifetime` says otherwise.
    #[command(after_help = "Example:\n  cloison-agent rotate-key\n  cloison-agent status      # shows how far it is")]
    RotateKey(Output),
    /// Look for what is wrong on this host, and say what to do about each finding
    ///
    /// Looks at the state directory, the TUN driver, the port, the base table, the clock, the coordinators, the certificate, the lease, the
    /// peers (a handshake with each, and which sizes pass), the addresses and routes, the kernel's settings and the hosts file. Changes
    /// nothing. Works while the agent runs, and while it does not. Run it as root.
    ///
    /// Exit status: 0 nothing to do, 2 something to mend, 1 it could not look.
    #[command(
        after_help = "Examples:\n  sudo cloison-agent doctor\n  sudo cloison-agent doctor -o json | jq '.findings[] | select(.fix != \"\")'"
    )]
    Doctor(Output),
    /// Put together what somebody who helps needs to see
    #[command(subcommand)]
    Debug(Debug),
    /// Take this host out of its mesh: remove the base table, the routes, and all state with its keys
    ///
    /// Refused while the agent runs. The coordinator is not told: an operator removes the host there with `cloison host revoke`.
    Leave(Leave),
    /// Print what a shell needs to complete this command; packages install it
    #[command(after_help = "Example:\n  cloison-agent completions bash > ~/.local/share/bash-completion/completions/cloison-agent")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Arguments of `join`.
#[derive(Debug, Args)]
pub struct Join {
    /// File with the token; `-` or nothing reads standard input. Never on the command line, where other users could see it
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Coordinator to ask instead of those in the token; can be given several times
    #[arg(long, value_name = "HOST:PORT")]
    pub coordinator: Vec<String>,
}

/// Arguments of `run`.
#[derive(Debug, Args)]
pub struct Run {
    /// Name of the TUN interface [default: cloison0]
    #[arg(long, value_name = "NAME")]
    pub interface: Option<String>,
    /// UDP port of WireGuard; 0 takes any free one [default: 51820]
    #[arg(long, value_name = "PORT")]
    pub listen_port: Option<u16>,
    /// Name of the nftables table [default: cloison]
    #[arg(long, value_name = "NAME")]
    pub table: Option<String>,
    /// MTU of the TUN [default: found from the underlay, 1420 at most]
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u32>,
    /// Threads that carry packets [default: the number of processors, 4 at most]
    #[arg(long, value_name = "NUMBER")]
    pub workers: Option<usize>,
    /// Directory below which namespaces of components may lie; can be given several times [default: /run/netns]
    #[arg(long, value_name = "DIR")]
    pub netns_dirs: Vec<PathBuf>,
    /// Docker's socket, for components that are containers [default: /run/docker.sock]
    #[arg(long, value_name = "PATH")]
    pub docker_socket: Option<PathBuf>,
    /// Podman's socket, likewise [default: /run/podman/podman.sock]
    #[arg(long, value_name = "PATH")]
    pub podman_socket: Option<PathBuf>,
    /// Coordinator to use instead of those that the mesh names; can be given several times
    #[arg(long = "coordinator", value_name = "HOST:PORT")]
    pub coordinators: Vec<String>,
    /// Endpoint to tell peers beside this host's interface addresses, like a forwarded port; can be given several times
    #[arg(long = "endpoint", value_name = "IP:PORT")]
    pub endpoints: Vec<SocketAddr>,
}

/// How an answer is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// As it came, for programs.
    Json,
}

/// Output of commands that show something.
#[derive(Debug, Clone, Copy, Args)]
pub struct Output {
    /// How to print
    #[arg(short, long, value_enum, default_value = "text")]
    pub output: Format,
}

/// Arguments of `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// How to print.
    #[command(flatten)]
    pub output: Output,
    /// Show it again every two seconds, until interrupted
    #[arg(short, long)]
    pub watch: bool,
}

/// Arguments of `explain`.
#[derive(Debug, Args)]
pub struct Explain {
    /// Whom to reach: `postgres`, `postgres:sql`, `postgres:tcp/5432` or `postgres:icmp`
    #[arg(value_name = "TO")]
    pub to: String,
    /// Who begins; without it, any component of this host
    #[arg(long, value_name = "COMPONENT")]
    pub from: Option<ComponentName>,
    /// How to print.
    #[command(flatten)]
    pub output: Output,
}

/// Arguments of `ping`.
#[derive(Debug, Args)]
pub struct Ping {
    /// The component
    #[arg(value_name = "COMPONENT")]
    pub component: ComponentName,
    /// How to print.
    #[command(flatten)]
    pub output: Output,
}

/// What `debug` can do.
#[derive(Debug, Subcommand)]
pub enum Debug {
    /// Write status, flows, denials, view, settings, log, table, routes and versions into a tar file
    ///
    /// Private keys, tokens and credentials are not in it; names and addresses of this host's peers are. Run it as root.
    #[command(after_help = "Example:\n  sudo cloison-agent debug bundle --to bundle.tar")]
    Bundle(Bundle),
}

/// Arguments of `debug bundle`.
#[derive(Debug, Args)]
pub struct Bundle {
    /// The file to make; it must not be there yet
    #[arg(long, value_name = "FILE.tar")]
    pub to: PathBuf,
}

/// Arguments of `leave`.
#[derive(Debug, Args)]
pub struct Leave {
    /// Do it even if the agent runs or the state is damaged; keys and membership are lost
    #[arg(long)]
    pub force: bool,
}

impl Common {
    /// The settings among the arguments.
    #[must_use]
    pub fn settings(&self) -> FileConfig {
        FileConfig {
            state_dir: self.state_dir.clone(),
            socket: self.socket.clone(),
            hosts_file: self.hosts_file.clone(),
            log: self.log.clone(),
            log_format: self.log_format,
            ..FileConfig::default()
        }
    }
}

impl Run {
    /// The settings among the arguments, over those of `common`.
    #[must_use]
    pub fn settings(&self, common: &Common) -> FileConfig {
        let given = |list: &[String]| (!list.is_empty()).then(|| list.to_vec());
        FileConfig {
            interface: self.interface.clone(),
            listen_port: self.listen_port,
            table: self.table.clone(),
            mtu: self.mtu,
            workers: self.workers,
            netns_dirs: (!self.netns_dirs.is_empty()).then(|| self.netns_dirs.clone()),
            docker_socket: self.docker_socket.clone(),
            podman_socket: self.podman_socket.clone(),
            coordinators: given(&self.coordinators),
            endpoints: (!self.endpoints.is_empty()).then(|| self.endpoints.clone()),
            ..common.settings()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_well_formed_and_every_command_says_what_it_does() {
        let command = Cli::command();
        command.clone().debug_assert();
        for sub in command.get_subcommands() {
            assert!(
                sub.get_about().is_some_and(|about| !about.to_string().is_empty()),
                "{}",
                sub.get_name()
            );
        }
    }

    #[test]
    fn the_settings_that_help_shows_are_the_defaults() -> Result<(), Box<dyn std::error::Error>> {
        let (_, file) = RUN_HELP.split_once('\n').ok_or("no settings")?;
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("agent.toml");
        std::fs::write(&path, file.replace("# mtu", "mtu").replace("# workers", "workers"))?;
        let mut shown = FileConfig::read(Some(&path))?.complete()?;
        let defaults = FileConfig::default().complete()?;
        shown.mtu = defaults.mtu;
        shown.workers = defaults.workers;
        assert_eq!(format!("{shown:?}"), format!("{defaults:?}"));
        Ok(())
    }

    #[test]
    fn a_token_cannot_be_given_on_the_command_line() {
        assert!(Cli::try_parse_from(["cloison-agent", "join", "cloison1_abc"]).is_err());
        assert!(Cli::try_parse_from(["cloison-agent", "join", "--token", "cloison1_abc"]).is_err());
    }
}
