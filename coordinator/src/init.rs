//! `init`: makes a mesh. `credential`: makes one more API credential.
//!
//! Order: everything that can be refused is refused before anything is made; then the trust roots, the database, the owner's credential,
//! and last the CLI's configuration, which holds it. A credential is shown once and kept nowhere else.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write as _};
use std::net::{Ipv6Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use cloison_proto::id::MeshId;
use cloison_proto::net::{NetError, OverlayRange};
use cloison_proto::token::MAX_ADDRESSES;
use cloison_proto::version::MeshTime;
use serde::Serialize;
use zeroize::Zeroizing;

use crate::args::{CredentialArgs, InitArgs};
use crate::audit::{Actor, Context};
use crate::config::{DEFAULT_PORT, HostPort, PrefixV4, PrefixV6};
use crate::credential::Scope;
use crate::data_dir::{DataDir, DataDirError};
use crate::entropy::{EntropyError, Environment};
use crate::inventory::CoordinatorAddress;
use crate::store::{CredentialSpec, NewCredential, NewMesh, OpenError, Store, StoreError};
use crate::trust::{Roots, RootsError};

/// How long the first owner's credential is good.
const OWNER_LIFETIME: Duration = Duration::from_secs(365 * 86_400);

/// Why there is no new mesh, or no new credential.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The data directory.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The trust roots.
    #[error(transparent)]
    Roots(#[from] RootsError),
    /// The database.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A change in it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The overlay ranges.
    #[error("--overlay-v4 or --overlay-v6: {0}")]
    Overlay(#[from] NetError),
    /// No randomness.
    #[error(transparent)]
    Entropy(#[from] EntropyError),
    /// More addresses than a token has room for.
    #[error("--address was given {0} times; a token has room for {MAX_ADDRESSES}")]
    TooManyAddresses(usize),
    /// A time that is negative.
    #[error("{0}: a time must not be negative")]
    Negative(&'static str),
    /// The CLI's configuration exists.
    #[error("{path} exists already, and belongs to another mesh: name another file with --cli-config, or move it away")]
    CliConfigExists {
        /// The file.
        path: String,
    },
    /// The CLI's configuration cannot be written.
    #[error("{path}: {action} failed; the mesh is made: `cloison-coordinator credential --scope owner` makes another credential")]
    CliConfig {
        /// The file.
        path: String,
        /// What was tried.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A mesh just made, to be told to whoever made it.
#[derive(Debug)]
pub struct Initialised {
    /// Which mesh.
    pub mesh: MeshId,
    /// Where hosts reach the coordinator.
    pub addresses: Vec<HostPort>,
    /// Where its addresses are drawn from.
    pub overlay: OverlayRange,
    /// The owner's credential: the one time that it is shown.
    pub credential: NewCredential,
    /// Where the CLI's configuration was written.
    pub cli_config: PathBuf,
}

/// The CLI's configuration (its `Config`).
#[derive(Serialize)]
struct CliConfig<'a> {
    url: String,
    root_certificate: &'a str,
    credential: &'a str,
}

/// Makes a mesh in a new data directory.
///
/// # Errors
/// [`InitError`]. Refusals come before anything is made.
pub async fn init(args: InitArgs, env: &Environment) -> Result<Initialised, InitError> {
    let cli_config = args.cli_config.unwrap_or_else(default_cli_config);
    if cli_config.exists() {
        return Err(InitError::CliConfigExists {
            path: cli_config.display().to_string(),
        });
    }
    let addresses = if args.address.is_empty() {
        vec![own_address()]
    } else {
        args.address
    };
    if addresses.len() > MAX_ADDRESSES {
        return Err(InitError::TooManyAddresses(addresses.len()));
    }
    let overlay = overlay(args.overlay_v4, args.overlay_v6, env)?;
    let lease = args.lease.try_into().map_err(|_| InitError::Negative("--lease"))?;
    let mesh = MeshId(env.random()?);
    let now = env.clock.now();
    let told = addresses.iter().map(|address| CoordinatorAddress {
        address: address.to_string(),
        not_before: now,
    });
    let new = NewMesh {
        mesh,
        overlay,
        lease,
        addresses: told.collect(),
    };
    new.check()?;
    let data = DataDir::create(&args.data)?;
    let roots = Roots::create(&data.trust(), mesh, env)?;
    let store = Store::create(&data.database(), env.clone(), new).await?;
    let spec = CredentialSpec {
        name: "owner, made by init".into(),
        scopes: BTreeSet::from([Scope::Owner]),
        lifetime: OWNER_LIFETIME,
    };
    let credential = store.create_credential(Context::of(Actor::Local), spec).await?;
    store.close().await;
    if let Some(first) = addresses.first() {
        write_cli_config(&cli_config, first, &roots, &credential)?;
    }
    Ok(Initialised {
        mesh,
        addresses,
        overlay,
        credential,
        cli_config,
    })
}

/// Makes one more credential in the database of an existing mesh, beside a coordinator that may be running.
///
/// # Errors
/// [`InitError`].
pub async fn credential(args: CredentialArgs, env: &Environment) -> Result<NewCredential, InitError> {
    let lifetime = args.expires.try_into().map_err(|_| InitError::Negative("--expires"))?;
    let data = DataDir::share(&args.data)?;
    let store = Store::open(&data.database(), env.clone()).await?;
    let spec = CredentialSpec {
        name: args.name,
        scopes: args.scope.into_iter().collect(),
        lifetime,
    };
    let made = store.create_credential(Context::of(Actor::Local), spec).await;
    store.close().await;
    Ok(made?)
}

/// When a credential ends, as people read it.
#[must_use]
pub fn shown_time(time: MeshTime) -> String {
    let seconds = i64::try_from(time.0).unwrap_or(i64::MAX);
    jiff::Timestamp::from_second(seconds).map_or_else(|_| format!("second {}", time.0), |t| t.to_string())
}

/// What was asked for, and what was not is drawn: a /16 inside 10.0.0.0/8 and a /48 by RFC 4193 section 3.2.
fn overlay(v4: Option<PrefixV4>, v6: Option<PrefixV6>, env: &Environment) -> Result<OverlayRange, InitError> {
    let random: [u8; 6] = env.random()?;
    let v4 = v4.unwrap_or(PrefixV4 {
        address: [10, random[0], 0, 0].into(),
        len: 16,
    });
    let drawn = [
        u16::from_be_bytes([0xfd, random[1]]),
        u16::from_be_bytes([random[2], random[3]]),
        u16::from_be_bytes([random[4], random[5]]),
    ];
    let drawn = Ipv6Addr::new(drawn[0], drawn[1], drawn[2], 0, 0, 0, 0, 0);
    let v6 = v6.unwrap_or(PrefixV6 {
        address: drawn,
        len: OverlayRange::V6_LEN,
    });
    if v6.len != OverlayRange::V6_LEN {
        return Err(NetError::NotPrefix(format!("{}/{}", v6.address, v6.len)).into());
    }
    Ok(OverlayRange::new(v4.address, v4.len, v6.address)?)
}

/// The address from which this machine reaches others: the kernel is asked for its route, nothing is sent. Without a route: loopback.
fn own_address() -> HostPort {
    let towards: SocketAddr = ([192, 0, 2, 1], 9).into();
    let socket = UdpSocket::bind(("0.0.0.0", 0)).and_then(|socket| socket.connect(towards).and_then(|()| socket.local_addr()));
    let address = socket.map_or(std::net::IpAddr::from([127, 0, 0, 1]), |local| local.ip());
    HostPort::of(address, DEFAULT_PORT)
}

/// Where the CLI looks for its configuration.
fn default_cli_config() -> PathBuf {
    let base = std::env::var_os("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute());
    let base = base.or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".config")));
    base.unwrap_or_else(|| PathBuf::from("/etc")).join("cloison/config.toml")
}

fn write_cli_config(path: &Path, address: &HostPort, roots: &Roots, credential: &NewCredential) -> Result<(), InitError> {
    let failed = |action| {
        move |source| InitError::CliConfig {
            path: path.display().to_string(),
            action,
            source,
        }
    };
    let secret = credential.text.reveal();
    let config = CliConfig {
        url: format!("https://{address}"),
        root_certificate: &roots.root_pem(),
        credential: &secret,
    };
    let text = toml::to_string(&config)
        .map_err(io::Error::other)
        .map_err(failed("writing it down"))?;
    let text = Zeroizing::new(text);
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(failed("making its directory"))?;
    }
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let mut file = file.map_err(failed("creating"))?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(failed("writing"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};
    use crate::run::Core;
    use crate::store::testing::TestResult;

    fn arguments(dir: &Path, more: &[&str]) -> Result<InitArgs, Box<dyn std::error::Error>> {
        let (data, config) = (
            dir.join("data").display().to_string(),
            dir.join("cli/config.toml").display().to_string(),
        );
        let base = ["x", "init", "--data", &data, "--cli-config", &config];
        match Cli::try_parse_from(base.iter().chain(more))?.command {
            Command::Init(args) => Ok(args),
            Command::Serve(_)
            | Command::Credential(_)
            | Command::Backup(_)
            | Command::Restore(_)
            | Command::Recover(_)
            | Command::Completions { .. } => Err("another command".into()),
        }
    }

    #[tokio::test]
    async fn a_new_mesh_can_be_opened_and_its_owner_is_let_in() -> TestResult {
        let dir = tempfile::tempdir()?;
        let made = init(arguments(dir.path(), &["--address", "c.example:7443"])?, &Environment::system()).await?;
        let core = Core::open(DataDir::open(&dir.path().join("data"))?, Environment::system()).await?;
        let inventory = core.store.inventory();
        assert_eq!((inventory.mesh, inventory.overlay), (made.mesh, made.overlay));
        assert_eq!(inventory.addresses.first().map(|a| a.address.as_str()), Some("c.example:7443"));
        let text = fs::read_to_string(&made.cli_config)?;
        assert_eq!(fs::metadata(&made.cli_config)?.permissions().mode() & 0o777, 0o600);
        let config: toml::Table = toml::from_str(&text)?;
        assert_eq!(config.get("url").and_then(|v| v.as_str()), Some("https://c.example:7443"));
        assert_eq!(
            config.get("root_certificate").and_then(|v| v.as_str()),
            Some(core.roots.root_pem().as_str())
        );
        let bearer = config.get("credential").and_then(|v| v.as_str()).ok_or("no credential")?;
        let owner = core.store.authenticate(bearer).await?.ok_or("not let in")?;
        assert!(owner.may(Scope::Owner));
        Ok(())
    }

    #[tokio::test]
    async fn init_overwrites_neither_a_mesh_nor_a_configuration() -> TestResult {
        let dir = tempfile::tempdir()?;
        init(arguments(dir.path(), &[])?, &Environment::system()).await?;
        let again = init(arguments(dir.path(), &[])?, &Environment::system()).await;
        assert!(matches!(again, Err(InitError::CliConfigExists { .. })));
        fs::remove_file(dir.path().join("cli/config.toml"))?;
        let again = init(arguments(dir.path(), &[])?, &Environment::system()).await;
        assert!(matches!(again, Err(InitError::DataDir(DataDirError::NotEmpty { .. }))));
        Ok(())
    }

    #[tokio::test]
    async fn what_is_wrong_is_refused_before_anything_is_made() -> TestResult {
        let dir = tempfile::tempdir()?;
        let cases: [&[&str]; 4] = [
            &["--overlay-v4", "8.8.0.0/16"],
            &["--overlay-v6", "fd00::/64"],
            &["--address", "a:1", "--address", "b:1", "--address", "c:1", "--address", "d:1"],
            &["--lease", "9s"],
        ];
        for more in cases {
            assert!(
                init(arguments(dir.path(), more)?, &Environment::system()).await.is_err(),
                "{more:?}"
            );
            assert!(!dir.path().join("data").exists(), "{more:?}");
        }
        Ok(())
    }

    #[tokio::test]
    async fn ranges_that_nobody_asked_for_are_drawn() -> TestResult {
        let env = Environment::system();
        let drawn = [overlay(None, None, &env)?, overlay(None, None, &env)?];
        assert_ne!(drawn[0].v6(), drawn[1].v6());
        assert!(drawn.iter().all(|range| range.v4().1 == 16 && range.v4().0.octets()[0] == 10));
        Ok(())
    }

    #[tokio::test]
    async fn parts_of_two_meshes_do_not_run_together() -> TestResult {
        let (one, two) = (tempfile::tempdir()?, tempfile::tempdir()?);
        for dir in [&one, &two] {
            init(arguments(dir.path(), &[])?, &Environment::system()).await?;
        }
        fs::copy(two.path().join("data/cloison.db"), one.path().join("data/cloison.db"))?;
        let opened = Core::open(DataDir::open(&one.path().join("data"))?, Environment::system()).await;
        assert!(matches!(opened, Err(crate::run::RunError::Mixed { .. })));
        Ok(())
    }
}
