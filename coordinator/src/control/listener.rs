//! Accepts QUIC connections and finds out who is at the other end.
//!
//! Before a handshake costs anything, strangers are counted: when many wait, an address has to show that it can be reached (a Retry, RFC 9000
//! section 8.1.2), and beyond that they are refused. After it, the protocol that both agreed on decides: a link needs a certificate whose leaf
//! names a host of this mesh, and nothing else about the connection is asked; a join needs none.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use cloison_proto::id::HostId;
use cloison_proto::key::IdentityKey;
use cloison_proto::trust::{ALPN_JOIN, ALPN_LINK};
use quinn::crypto::rustls::{HandshakeData, NoInitialCipherSuite, QuicServerConfig};
use quinn::{Connection, Endpoint, IdleTimeout, Incoming, ServerConfig, TransportConfig, VarInt};
use rustls_pki_types::CertificateDer;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use super::limit::{Budgets, network};
use super::{join, serve};
use crate::enrollment::Enrollment;
use crate::publish::{Farewell, Hub};
use crate::store::{HostRefusal, Store, StoreError};
use crate::trust::{HostLifetime, HostVerifier, LinkedHost, Roots, ServerError, ServerIdentity, VerifyError, server_config};

/// Handshakes at once; behind half of them, addresses are validated first.
const MAX_HANDSHAKES: usize = 512;

/// Connections at once: every host twice, while it replaces one, and joins.
const MAX_CONNECTIONS: usize = 24_576;

/// Joins at once.
const MAX_JOINS: usize = 256;

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// A link that is silent for so long is gone.
const IDLE: Duration = Duration::from_secs(30);

/// How often a silent link shows that it is not gone.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Bytes that an agent may send ahead: a frame, and some.
const RECEIVE_WINDOW: u32 = 384 * 1024;

/// Bytes that wait for an agent, at most: a few frames of a view.
const SEND_WINDOW: u64 = 1024 * 1024;

/// Certificates for one host: this many in each [`RENEWAL_SPAN`], or in each of their lives if that is shorter.
const RENEWALS: u32 = 6;

const RENEWAL_SPAN: Duration = Duration::from_secs(3600);

/// Links that one host may open in a minute: no host takes the others' connections away.
const LINKS_PER_MINUTE: u32 = 60;

/// New WireGuard keys of one host: this many in each [`ROTATION_SPAN`]. Each stays in the store for ever.
const ROTATIONS: u32 = 20;

const ROTATION_SPAN: Duration = Duration::from_secs(3600);

/// What an operator can set.
#[derive(Debug, Clone)]
pub struct ListenerConfig {
    /// Where to listen.
    pub address: SocketAddr,
    /// Attempts to join from one source in a minute.
    pub joins_per_minute: u32,
    /// How long the certificates live that hosts are given.
    pub host_lifetime: HostLifetime,
    /// No answer to a join comes sooner than this.
    pub answer_floor: Duration,
}

impl ListenerConfig {
    /// The defaults, at `address`, with certificates of this lifetime.
    #[must_use]
    pub const fn at(address: SocketAddr, host_lifetime: HostLifetime) -> Self {
        Self {
            address,
            joins_per_minute: 60,
            host_lifetime,
            answer_floor: Duration::from_millis(250),
        }
    }
}

/// Why the listener does not listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address is taken, or not this machine's.
    #[error("cannot listen on {address} (UDP)")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// No TLS settings.
    #[error(transparent)]
    Tls(#[from] ServerError),
    /// The TLS library lacks QUIC's first cipher suite.
    #[error(transparent)]
    Quic(#[from] NoInitialCipherSuite),
}

/// What all connections share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: ListenerConfig,
    pub(super) store: Store,
    pub(super) enrollment: Enrollment,
    pub(super) hub: Arc<Hub>,
    pub(super) renewals: Budgets<IdentityKey>,
    pub(super) rotations: Budgets<HostId>,
    pub(super) started: Instant,
    pub(super) verifier: Arc<HostVerifier>,
    handshakes: Arc<Semaphore>,
    joins: Semaphore,
    sources: Budgets<IpAddr>,
    links: Budgets<HostId>,
}

/// The control listener.
#[derive(Debug)]
pub struct Listener {
    endpoint: Endpoint,
    shared: Arc<Shared>,
}

impl Listener {
    /// Begins to listen. Nothing is accepted before [`Listener::run`].
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn bind(
        config: ListenerConfig,
        identity: Arc<ServerIdentity>,
        store: Store,
        roots: Arc<Roots>,
        hub: Arc<Hub>,
    ) -> Result<Self, ListenError> {
        let verifier = Arc::new(HostVerifier::new(Arc::clone(&roots)));
        let tls = server_config(identity, Some(verifier.clone()), &[ALPN_LINK, ALPN_JOIN])?;
        let mut server = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
        server.transport_config(Arc::new(transport())).max_incoming(MAX_HANDSHAKES);
        let bound = Endpoint::server(server, config.address);
        let address = config.address;
        Ok(Self {
            endpoint: bound.map_err(|source| ListenError::Bind { address, source })?,
            shared: Arc::new(Shared {
                sources: Budgets::new(config.joins_per_minute, Duration::from_secs(60)),
                links: Budgets::new(LINKS_PER_MINUTE, Duration::from_secs(60)),
                renewals: Budgets::new(RENEWALS, RENEWAL_SPAN.min(config.host_lifetime.get())),
                rotations: Budgets::new(ROTATIONS, ROTATION_SPAN),
                handshakes: Arc::new(Semaphore::new(MAX_HANDSHAKES)),
                joins: Semaphore::new(MAX_JOINS),
                started: Instant::now(),
                enrollment: Enrollment::new(store.clone(), roots, config.host_lifetime),
                config,
                store,
                hub,
                verifier,
            }),
        })
    }

    /// Where it listens: the port that was drawn, if none was given.
    ///
    /// # Errors
    /// What the system says.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// Accepts until `stop` comes true; then says goodbye to all links and waits for them, but not long.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        tokio::select! {
            () = self.accept() => {}
            () = stop => {}
        }
        self.shared.hub.shut_down();
        self.endpoint.set_server_config(None);
        if timeout(Duration::from_secs(3), self.endpoint.wait_idle()).await.is_err() {
            close(&self.endpoint, Farewell::Shutdown.code());
            let _ = timeout(Duration::from_secs(1), self.endpoint.wait_idle()).await;
        }
    }

    async fn accept(&self) {
        while let Some(incoming) = self.endpoint.accept().await {
            let free = self.shared.handshakes.available_permits();
            if self.endpoint.open_connections() >= MAX_CONNECTIONS {
                incoming.refuse();
            } else if free < MAX_HANDSHAKES / 2 && incoming.may_retry() {
                // It may retry, so that this cannot fail.
                let _ = incoming.retry();
            } else if let Ok(permit) = Arc::clone(&self.shared.handshakes).try_acquire_owned() {
                let shared = Arc::clone(&self.shared);
                tokio::spawn(async move {
                    // Where the handshake proved the peer to be. Where the connection says it is by now, a later packet may only claim.
                    let from = incoming.remote_address();
                    let connection = handshake(incoming).await;
                    drop(permit);
                    if let Some(connection) = connection {
                        serve_connection(&shared, &connection, from).await;
                    }
                });
            } else {
                incoming.refuse();
            }
        }
    }
}

fn close(endpoint: &Endpoint, reason: &str) {
    endpoint.close(VarInt::from_u32(0), reason.as_bytes());
}

fn transport() -> TransportConfig {
    let mut transport = TransportConfig::default();
    let idle = IdleTimeout::from(VarInt::from_u32(u32::try_from(IDLE.as_millis()).unwrap_or(u32::MAX)));
    transport
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(RECEIVE_WINDOW))
        .receive_window(VarInt::from_u32(RECEIVE_WINDOW))
        .send_window(SEND_WINDOW)
        .datagram_receive_buffer_size(None);
    transport
}

async fn handshake(incoming: Incoming) -> Option<Connection> {
    let from = incoming.remote_address();
    match timeout(HANDSHAKE, incoming).await {
        Ok(Ok(connection)) => Some(connection),
        Ok(Err(error)) => {
            tracing::debug!(%from, error = shown(&error), "a handshake failed");
            None
        }
        Err(_) => None,
    }
}

/// An error on one line of the log: what a peer gives as the reason of its close may hold any character.
fn shown(error: &dyn std::error::Error) -> String {
    error.to_string().escape_debug().to_string()
}

/// Why a connection is no link.
#[derive(Debug, thiserror::Error)]
enum Stranger {
    #[error(transparent)]
    Certificate(#[from] VerifyError),
    #[error(transparent)]
    Refused(#[from] HostRefusal),
    #[error(transparent)]
    Store(#[from] StoreError),
}

async fn serve_connection(shared: &Shared, connection: &Connection, from: SocketAddr) {
    let data = connection.handshake_data().and_then(|data| data.downcast::<HandshakeData>().ok());
    let reason = match data.and_then(|data| data.protocol).as_deref() {
        Some(ALPN_LINK) => match identify(shared, connection).await {
            Err(error) => {
                tracing::info!(%from, error = shown(&error), "a link was refused");
                // A revoked host may know: it shows a certificate that only it has.
                if matches!(error, Stranger::Refused(HostRefusal::Revoked)) {
                    Farewell::Revoked.code()
                } else {
                    "denied"
                }
            }
            Ok(linked) if !shared.links.take(linked.host, shared.now().monotonic) => {
                tracing::warn!(host = %linked.host, %from, "a host links too often");
                Farewell::Rate.code()
            }
            Ok(linked) => match serve::link(shared, connection, linked).await {
                Ok(()) => "",
                Err(error) => {
                    tracing::info!(host = %linked.host, %from, error = shown(&error), "a link ended");
                    error.farewell().map_or("", Farewell::code)
                }
            },
        },
        Some(ALPN_JOIN) => serve_join(shared, connection, from).await,
        Some(_) | None => "protocol",
    };
    connection.close(VarInt::from_u32(0), reason.as_bytes());
}

async fn serve_join(shared: &Shared, connection: &Connection, from: SocketAddr) -> &'static str {
    let Ok(_permit) = shared.joins.try_acquire() else { return "busy" };
    if !shared.sources.take(network(from.ip()), shared.now().monotonic) {
        tracing::info!(%from, "too many attempts to join from one source");
        return Farewell::Rate.code();
    }
    if let Err(error) = join::join(shared, connection, from.ip()).await {
        tracing::info!(%from, error = shown(&error), "an attempt to join came to nothing");
    }
    ""
}

/// The host at the other end: by the leaf of its certificate, which TLS has verified, and by the store.
async fn identify(shared: &Shared, connection: &Connection) -> Result<LinkedHost, Stranger> {
    let identity = connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok());
    let chain = identity.map_or_else(Vec::new, |chain| *chain);
    let linked = shared.verifier.host_of(&chain, shared.store.now())?;
    let admitted = shared.store.admit_certificate(linked.host, linked.serial).await?;
    if admitted == Err(HostRefusal::Unknown) {
        // It joined in a time that this database has lost, if it was restored from a backup.
        let source = connection.remote_address().ip().to_canonical();
        shared.store.record_sighting(linked.host, None, source).await?;
    }
    admitted?;
    Ok(linked)
}

#[cfg(test)]
mod tests {
    use quinn::{ApplicationClose, ConnectionError};

    use super::*;

    #[test]
    fn a_peer_writes_no_line_of_its_own_into_the_log() {
        let close = ApplicationClose {
            error_code: VarInt::from_u32(0),
            reason: b"\n2027-01-01 INFO a host joined\x1b[2J"[..].into(),
        };
        let line = shown(&ConnectionError::ApplicationClosed(close));
        assert!(line.contains("a host joined") && !line.contains(char::is_control), "{line}");
    }
}
