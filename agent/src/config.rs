//! The agent's own configuration: a TOML file, and flags over it. Every path and port has its place here, so that many agents can live on
//! one machine. What the mesh decides (addresses, rules, names) is never configured here.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use cloison_proto::policy::AttachmentKind;
use serde::Deserialize;

use crate::attach::Accepted;
use crate::attach::base_table::TableName;
use crate::sys::InterfaceName;

/// Where the configuration is unless told otherwise. A missing file there means the defaults.
pub const DEFAULT_PATH: &str = "/etc/cloison/agent.toml";

/// Most packet workers by default: beyond four, the TUN's single queue is the limit.
const MAX_DEFAULT_WORKERS: usize = 4;

/// The configuration, complete.
#[derive(Debug, Clone)]
pub struct Config {
    /// Directory of keys, membership and the cached view.
    pub state_dir: PathBuf,
    /// The status socket.
    pub socket: PathBuf,
    /// Name of the TUNs.
    pub interface: InterfaceName,
    /// WireGuard port.
    pub listen_port: u16,
    /// Name of the nftables tables.
    pub table: TableName,
    /// MTU of the TUNs; `None` finds it from the underlay.
    pub mtu: Option<u32>,
    /// Packet worker threads.
    pub workers: usize,
    /// Attachments that this host accepts.
    pub accepted: Accepted,
    /// Whether a component that is a unit or a cgroup is reached on loopback by itself alone.
    pub loopback_guard: bool,
    /// Coordinators (`host:port`) to use instead of those that the mesh names; usually empty.
    pub coordinators: Vec<String>,
    /// Underlay endpoints to tell peers beside this host's interface addresses, like a forwarded port.
    pub endpoints: Vec<SocketAddr>,
    /// The hosts file that gets a block with the names of components.
    pub hosts_file: HostsFile,
    /// Whether names are answered by DNS, on the mesh's resolver addresses.
    pub resolver: bool,
    /// Whether systemd-resolved is told to ask there.
    pub resolved: bool,
    /// How long a WireGuard key is used before it is changed by itself, give or take a tenth; `None`: until somebody asks for another.
    pub key_lifetime: Option<Duration>,
    /// What to log, as `level` or `module=level,...`.
    pub log: String,
    /// How to log.
    pub log_format: LogFormat,
}

/// Where names of components are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostsFile {
    /// Nowhere.
    Off,
    /// Into this file.
    At(PathBuf),
}

impl FromStr for HostsFile {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self::Off),
            path if Path::new(path).is_absolute() => Ok(Self::At(path.into())),
            _ => Err(format!("`{text}` is neither an absolute path nor \"off\"")),
        }
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The file as it stands. Unknown keys are errors: a misspelt one would otherwise be a setting that silently does nothing.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FileConfig {
    /// See [`Config::state_dir`].
    pub state_dir: Option<PathBuf>,
    /// See [`Config::socket`].
    pub socket: Option<PathBuf>,
    /// See [`Config::interface`].
    pub interface: Option<String>,
    /// See [`Config::listen_port`].
    pub listen_port: Option<u16>,
    /// See [`Config::table`].
    pub table: Option<String>,
    /// See [`Config::mtu`].
    pub mtu: Option<u32>,
    /// See [`Config::workers`].
    pub workers: Option<usize>,
    /// Kinds of attachments accepted.
    pub attachments: Option<Vec<AttachmentKind>>,
    /// Directories below which namespaces may lie.
    pub netns_dirs: Option<Vec<PathBuf>>,
    /// See [`Accepted::docker_socket`].
    pub docker_socket: Option<PathBuf>,
    /// See [`Accepted::podman_socket`].
    pub podman_socket: Option<PathBuf>,
    /// See [`Config::loopback_guard`].
    pub loopback_guard: Option<bool>,
    /// See [`Config::coordinators`].
    pub coordinators: Option<Vec<String>>,
    /// See [`Config::endpoints`].
    pub endpoints: Option<Vec<SocketAddr>>,
    /// See [`Config::hosts_file`].
    pub hosts_file: Option<String>,
    /// See [`Config::resolver`].
    pub resolver: Option<bool>,
    /// See [`Config::resolved`].
    pub resolved: Option<bool>,
    /// See [`Config::key_lifetime`]: a number and `d`, `h`, `m` or `s`, or `never`.
    pub key_lifetime: Option<String>,
    /// See [`Config::log`].
    pub log: Option<String>,
    /// See [`Config::log_format`].
    pub log_format: Option<LogFormat>,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("{}{}: {message}", path.display(), Line(*line))]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: Option<usize>,
        /// What is wrong there.
        message: String,
    },
    /// A value is out of its range.
    #[error("`{key}`: {message}")]
    Value {
        /// The setting.
        key: &'static str,
        /// What is wrong with it.
        message: String,
    },
}

/// `:12`, or nothing.
struct Line(Option<usize>);

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |line| write!(f, ":{line}"))
    }
}

impl ConfigError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::Read { .. } => "name the right file with --config, or leave the flag away to use the defaults".into(),
            Self::Syntax { .. } | Self::Value { .. } => "`cloison-agent run --help` shows all settings with their defaults".into(),
        }
    }
}

impl FileConfig {
    /// Reads the file at `path`, or at the default place, where it may be missing.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn read(path: Option<&Path>) -> Result<Self, ConfigError> {
        let wanted = path.unwrap_or(Path::new(DEFAULT_PATH));
        match std::fs::read_to_string(wanted) {
            Ok(text) => Self::parse(&text, wanted),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && path.is_none() => Ok(Self::default()),
            Err(source) => Err(ConfigError::Read {
                path: wanted.into(),
                source,
            }),
        }
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|e| ConfigError::Syntax {
            path: path.into(),
            line: e
                .span()
                .and_then(|span| text.get(..span.start))
                .map(|before| before.matches('\n').count() + 1),
            message: e.message().to_owned(),
        })
    }

    /// Takes the settings of `over` where it has some.
    #[must_use]
    pub fn overridden_by(self, over: Self) -> Self {
        Self {
            state_dir: over.state_dir.or(self.state_dir),
            socket: over.socket.or(self.socket),
            interface: over.interface.or(self.interface),
            listen_port: over.listen_port.or(self.listen_port),
            table: over.table.or(self.table),
            mtu: over.mtu.or(self.mtu),
            workers: over.workers.or(self.workers),
            attachments: over.attachments.or(self.attachments),
            netns_dirs: over.netns_dirs.or(self.netns_dirs),
            docker_socket: over.docker_socket.or(self.docker_socket),
            podman_socket: over.podman_socket.or(self.podman_socket),
            loopback_guard: over.loopback_guard.or(self.loopback_guard),
            coordinators: over.coordinators.or(self.coordinators),
            endpoints: over.endpoints.or(self.endpoints),
            hosts_file: over.hosts_file.or(self.hosts_file),
            resolver: over.resolver.or(self.resolver),
            resolved: over.resolved.or(self.resolved),
            key_lifetime: over.key_lifetime.or(self.key_lifetime),
            log: over.log.or(self.log),
            log_format: over.log_format.or(self.log_format),
        }
    }

    /// Fills in the defaults and checks the values.
    ///
    /// # Errors
    /// [`ConfigError::Value`].
    pub fn complete(self) -> Result<Config, ConfigError> {
        let value = |key: &'static str| move |message: String| ConfigError::Value { key, message };
        let defaults = Accepted::default();
        let parallel = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let workers = self.workers.unwrap_or(parallel.min(MAX_DEFAULT_WORKERS));
        if !(1..=64).contains(&workers) {
            return Err(value("workers")(format!("{workers} is not between 1 and 64")));
        }
        if (self.resolver, self.resolved) == (Some(false), Some(true)) {
            return Err(value("resolved")(
                "it cannot ask where nobody answers; take out `resolver = false`".into(),
            ));
        }
        if let Some(mtu) = self.mtu.filter(|mtu| !(1280..=65_000).contains(mtu)) {
            return Err(value("mtu")(format!("{mtu} is not between 1280 (what IPv6 needs) and 65000")));
        }
        let interface = self.interface.as_deref().unwrap_or("cloison0");
        let table = self.table.as_deref().unwrap_or("cloison");
        let hosts_file = self.hosts_file.as_deref().unwrap_or("/etc/hosts");
        Ok(Config {
            state_dir: self.state_dir.unwrap_or_else(|| "/var/lib/cloison-agent".into()),
            socket: self.socket.unwrap_or_else(|| "/run/cloison/agent.sock".into()),
            interface: interface.parse().map_err(|e| value("interface")(format!("{e}")))?,
            listen_port: self.listen_port.unwrap_or(51_820),
            table: table.parse().map_err(|e| value("table")(format!("{e}")))?,
            mtu: self.mtu,
            workers,
            accepted: Accepted {
                kinds: self.attachments.map_or(defaults.kinds, |kinds| kinds.into_iter().collect()),
                netns_dirs: self.netns_dirs.unwrap_or(defaults.netns_dirs),
                docker_socket: self.docker_socket.unwrap_or(defaults.docker_socket),
                podman_socket: self.podman_socket.unwrap_or(defaults.podman_socket),
            },
            loopback_guard: self.loopback_guard.unwrap_or(false),
            coordinators: self.coordinators.unwrap_or_default(),
            endpoints: self.endpoints.unwrap_or_default(),
            hosts_file: hosts_file.parse().map_err(value("hosts_file"))?,
            resolver: self.resolver.unwrap_or(true),
            resolved: self.resolved.unwrap_or(false),
            key_lifetime: lifetime(self.key_lifetime.as_deref().unwrap_or("30d")).map_err(value("key_lifetime"))?,
            log: self.log.unwrap_or_else(|| "info".into()),
            log_format: self.log_format.unwrap_or_default(),
        })
    }
}

/// A time like `30d`, `12h`, `90m` or `3600s`; none for `never`.
fn lifetime(text: &str) -> Result<Option<Duration>, String> {
    if text == "never" {
        return Ok(None);
    }
    let unit = match text.chars().last() {
        Some('d') => Some(86_400),
        Some('h') => Some(3_600),
        Some('m') => Some(60),
        Some('s') => Some(1),
        Some(_) | None => None,
    };
    let number = text.get(..text.len().saturating_sub(1)).and_then(|n| n.parse::<u64>().ok());
    let seconds = unit.zip(number).and_then(|(unit, number)| number.checked_mul(unit));
    // Peers get a few seconds for new sessions, and each key stays in the mesh's history for ever.
    seconds
        .filter(|seconds| (10..=10 * 366 * 86_400).contains(seconds))
        .map(|seconds| Some(Duration::from_secs(seconds)))
        .ok_or_else(|| format!("`{text}` is no time like 30d, 12h, 90m or 3600s, of at least ten seconds, nor `never`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    #[test]
    fn an_empty_file_means_the_defaults_and_flags_stand_above_the_file() -> Outcome {
        let config = FileConfig::parse("", Path::new("x"))?.complete()?;
        assert_eq!((config.interface.as_str(), config.listen_port), ("cloison0", 51_820));
        assert_eq!(config.state_dir, Path::new("/var/lib/cloison-agent"));
        let file = FileConfig::parse("listen_port = 1\ninterface = \"a0\"\nattachments = [\"host\"]", Path::new("x"))?;
        let flags = FileConfig {
            listen_port: Some(2),
            ..FileConfig::default()
        };
        let config = file.overridden_by(flags).complete()?;
        assert_eq!((config.interface.as_str(), config.listen_port), ("a0", 2));
        assert_eq!(config.accepted.kinds.len(), 1);
        Ok(())
    }

    #[test]
    fn a_misspelt_key_and_a_bad_value_are_errors_that_name_it() {
        let text = |e: ConfigError| format!("{e} / {}", e.hint());
        let unknown = FileConfig::parse("\nlisten_prot = 1", Path::new("agent.toml")).map_err(text);
        assert!(
            unknown
                .as_ref()
                .is_err_and(|e| e.contains("agent.toml:2") && e.contains("listen_prot")),
            "{unknown:?}"
        );
        for (line, key) in [
            ("interface = \"a b\"", "interface"),
            ("mtu = 500", "mtu"),
            ("workers = 0", "workers"),
            ("key_lifetime = \"soon\"", "key_lifetime"),
            ("key_lifetime = \"5s\"", "key_lifetime"),
            ("table = \"A\"", "table"),
            ("hosts_file = \"hosts\"", "hosts_file"),
            ("resolver = false\nresolved = true", "resolved"),
        ] {
            let error = FileConfig::parse(line, Path::new("x")).and_then(FileConfig::complete).map_err(text);
            assert!(error.as_ref().is_err_and(|e| e.contains(key)), "{line}: {error:?}");
        }
    }

    #[test]
    fn a_named_file_must_exist() {
        let missing = FileConfig::read(Some(Path::new("/nonexistent/agent.toml")));
        assert!(matches!(missing, Err(ConfigError::Read { .. })));
    }
}
