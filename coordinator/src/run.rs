//! `serve`: everything in its start order, and down again in reverse.
//!
//! [`Core::open`] brings up what needs no network: data directory, trust roots, store, certificate. [`serve`] puts the listeners on it,
//! tells systemd that it is ready, renews the coordinator's own certificate, and stops when it is asked to, or when a part ends by itself.

use std::future::Future;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::api::{self, ApiServer, ApiState, ServeError, TokenFacts};
use crate::args::ServeArgs;
use crate::config::{Config, ConfigError, DEFAULT_PORT};
use crate::control::listener::{ListenError, Listener, ListenerConfig};
use crate::data_dir::{DataDir, DataDirError};
use crate::entropy::Environment;
use crate::publish::{Gate, Publisher};
use crate::rotation::Keeper;
use crate::store::{OpenError, Store};
use crate::systemd;
use crate::trust::{HostVerifier, Roots, RootsError, ServerError, ServerIdentity, server_config};

/// Why the coordinator does not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The data directory.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The trust roots.
    #[error(transparent)]
    Roots(#[from] RootsError),
    /// The database.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The certificate.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// Keys and database are of two meshes.
    #[error("the trust roots speak for {roots}, the database for {database}: parts of two backups were mixed; restore both from one")]
    Mixed {
        /// The keys' mesh.
        roots: String,
        /// The database's mesh.
        database: String,
    },
    /// The control listener.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The API's listener.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// A part of the program ended by itself.
    #[error("{part} ended: {problem}")]
    Part {
        /// Which.
        part: &'static str,
        /// Why.
        problem: String,
    },
}

/// All that needs no network: what listeners, publisher and API are built on.
#[derive(Debug, Clone)]
pub struct Core {
    /// The mesh's state.
    pub store: Store,
    /// The mesh's keys.
    pub roots: Arc<Roots>,
    /// The certificate that listeners show.
    pub identity: Arc<ServerIdentity>,
    /// Who hosts' certificates speak for.
    pub verifier: Arc<HostVerifier>,
    /// Clock and randomness.
    pub env: Environment,
    /// Keeps other coordinators out as long as this one lives.
    _data: Arc<DataDir>,
}

impl Core {
    /// Brings up the mesh in `data`.
    ///
    /// # Errors
    /// [`RunError`].
    pub async fn open(data: DataDir, env: Environment) -> Result<Self, RunError> {
        let roots = Arc::new(Roots::load(&data.trust())?);
        let store = Store::open(&data.database(), env.clone()).await?;
        store.hold_room(data.reserve());
        let database = store.inventory().mesh;
        if database != roots.mesh() {
            return Err(RunError::Mixed {
                roots: roots.mesh().to_string(),
                database: database.to_string(),
            });
        }
        Ok(Self {
            identity: ServerIdentity::new(roots.clone(), env.clone())?,
            verifier: Arc::new(HostVerifier::new(roots.clone())),
            _data: Arc::new(data),
            store,
            roots,
            env,
        })
    }
}

/// What a part of the program is while it runs: its name, and why it ended.
pub type Part = (&'static str, Result<(), String>);

/// Where to listen: the command line, or the file, or every address at the default port.
#[must_use]
pub fn listen_addresses(args: &ServeArgs, config: &Config) -> Vec<SocketAddr> {
    let asked = [&args.listen, &config.listen].into_iter().find(|list| !list.is_empty());
    asked.cloned().unwrap_or_else(|| vec![(Ipv6Addr::UNSPECIFIED, DEFAULT_PORT).into()])
}

/// The configuration that `args` name, or the one in the data directory, or the defaults.
///
/// # Errors
/// [`ConfigError`].
pub fn load_config(args: &ServeArgs) -> Result<Config, ConfigError> {
    let inside = args.data.join("coordinator.toml");
    match &args.config {
        Some(path) => Config::load(path),
        None if inside.exists() => Config::load(&inside),
        None => Ok(Config::default()),
    }
}

/// Runs the coordinator until `stop`, or until a part of it ends by itself.
///
/// # Errors
/// [`RunError`].
pub async fn serve(args: &ServeArgs, config: &Config, env: Environment, stop: impl Future<Output = ()>) -> Result<(), RunError> {
    let core = Core::open(DataDir::open(&args.data)?, env).await?;
    keep_time(&core.store).await;
    core.store.set_gate(Box::new(Gate::new(core.roots.clone())));
    let publisher = Publisher::new(core.store.clone(), core.roots.clone());
    let (stopping, _) = watch::channel(false);
    let mut parts = JoinSet::new();
    for address in listen_addresses(args, config) {
        listen(
            &core,
            &publisher,
            ListenerConfig::at(address, config.host_certificate_lifetime),
            &stopping,
            &mut parts,
        )?;
    }
    parts.spawn(renewal(core.identity.clone()));
    supervised(&core, &publisher, &mut parts);
    let inventory = core.store.inventory();
    tracing::info!(mesh = %inventory.mesh, version = %inventory.version, hosts = inventory.hosts.len(), "the coordinator is up");
    let ended = tokio::select! {
        () = stop => None,
        ended = parts.join_next() => ended,
    };
    systemd::tell(&[NotifyState::Stopping]);
    stopping.send_replace(true);
    drain(&mut parts).await;
    if let Err(error) = core.store.leave_time().await {
        tracing::warn!(%error, "what time it is could not be noted");
    }
    core.store.close().await;
    match ended {
        None => Ok(()),
        Some(Ok((part, Err(problem)))) => Err(RunError::Part { part, problem }),
        Some(Ok((part, Ok(())))) => Err(RunError::Part {
            part,
            problem: "nobody asked it to".into(),
        }),
        Some(Err(panic)) => Err(RunError::Part {
            part: "a part",
            problem: panic.to_string(),
        }),
    }
}

/// Starts what works without a listener, and says that everything is up: the listeners are bound by now, and nobody who comes is turned away.
fn supervised(core: &Core, publisher: &Arc<Publisher>, parts: &mut JoinSet<Part>) {
    let (store, hub) = (core.store.clone(), publisher.hub().clone());
    systemd::tell(&[NotifyState::Ready, NotifyState::Status(&systemd::line(&store, &hub))]);
    parts.spawn(async move {
        systemd::keep_status(store, hub).await;
        ("the line for systemd", Ok(()))
    });
    let store = core.store.clone();
    parts.spawn(async move {
        systemd::feed_watchdog(store).await;
        ("the watchdog", Ok(()))
    });
    parts.spawn(upkeep(core.store.clone()));
    let keeper = Keeper::new(
        core.store.clone(),
        publisher.hub().clone(),
        core.roots.clone(),
        core.identity.clone(),
    );
    parts.spawn(async move {
        keeper.run().await;
        ("the keeper of rotations", Ok(()))
    });
    let publisher = publisher.clone();
    parts.spawn(async move {
        publisher.run().await;
        ("the publisher", Ok(()))
    });
}

/// Puts the control listener (UDP) and the API (TCP) on one address.
fn listen(
    core: &Core,
    publisher: &Arc<Publisher>,
    config: ListenerConfig,
    stopping: &watch::Sender<bool>,
    parts: &mut JoinSet<Part>,
) -> Result<(), RunError> {
    let (address, hub) = (config.address, publisher.hub());
    let (store, roots, identity) = (core.store.clone(), core.roots.clone(), core.identity.clone());
    let control = Listener::bind(config, identity.clone(), store.clone(), roots.clone(), hub.clone())?;
    let tls = server_config(identity, None, &[b"h2", b"http/1.1"])?;
    let server = ApiServer::bind(address, Arc::new(tls))?;
    let token_facts = TokenFacts {
        root_pin: roots.root_pin(),
    };
    let state = ApiState {
        store,
        live: hub.clone(),
        token_facts,
        roots,
        policies: Arc::default(),
    };
    let handle = server.handle();
    let until = asked(stopping);
    parts.spawn(async move {
        control.run(until).await;
        ("the control listener", Ok(()))
    });
    parts.spawn(async move { ("the API", server.serve(state).await.map_err(|e| format!("{e:?}"))) });
    let until = asked(stopping);
    tokio::spawn(async move {
        until.await;
        api::stop(&handle);
    });
    Ok(())
}

/// Comes when the parts are asked to stop.
fn asked(stopping: &watch::Sender<bool>) -> impl Future<Output = ()> + Send + 'static {
    let mut stopping = stopping.subscribe();
    async move {
        // A sender that is gone means the same.
        let _ = stopping.wait_for(|asked| *asked).await;
    }
}

/// Gives the listeners time to say goodbye, then ends what is left.
async fn drain(parts: &mut JoinSet<Part>) {
    const GOODBYE: Duration = Duration::from_secs(4);
    let listeners = async {
        while let Some(ended) = parts.join_next().await {
            if matches!(ended, Ok(("the control listener", _))) {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(GOODBYE, listeners).await;
    parts.shutdown().await;
}

/// Looks now and then for what happens outside of this process: somebody freed space on a full disk, recovered a restored mesh, or set the
/// clock.
async fn upkeep(store: Store) -> Part {
    const PERIOD: Duration = Duration::from_secs(1);
    loop {
        tokio::time::sleep(PERIOD).await;
        store.hold_room_again();
        keep_time(&store).await;
        if let Err(error) = store.look_for_recovery().await {
            tracing::warn!(%error, "whether the mesh was recovered could not be seen");
        }
    }
}

/// Notes what time it is, so that no lease after the next start is older than one before it.
async fn keep_time(store: &Store) {
    if let Err(error) = store.keep_time().await {
        tracing::warn!(%error, "what time it is could not be noted");
    }
}

/// Makes the coordinator's own certificate anew, long before it runs out; a failure is tried again a minute later.
async fn renewal(identity: Arc<ServerIdentity>) -> Part {
    const AGAIN: Duration = Duration::from_secs(60);
    let mut wait = ServerIdentity::RENEWED_EVERY;
    loop {
        tokio::time::sleep(wait).await;
        wait = match identity.renew() {
            Ok(()) => ServerIdentity::RENEWED_EVERY,
            Err(error) => {
                tracing::error!(
                    error = &error as &(dyn std::error::Error + 'static),
                    "the coordinator's certificate could not be renewed"
                );
                AGAIN
            }
        };
    }
}
