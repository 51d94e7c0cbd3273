//! QUIC and TLS: makes the connections of joins and links, and moves frames. This folder alone names quinn.
//!
//! Each attempt has a socket of its own, connected to the coordinator's address, so that the kernel drops what anybody else sends to it: the
//! agent answers strangers nowhere. TLS 1.3 with X25519MLKEM768 first; no session is resumed, so that both sides verify each other each time.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use cloison_proto::control::frame::{Frame, FrameBuffer, FrameError, MAX_FRAME};
use cloison_proto::control::join::{EXPORTER_LABEL, EXPORTER_LEN};
use cloison_proto::id::MeshId;
use cloison_proto::key::SigningKey;
use cloison_proto::trust::{ALPN_JOIN, ALPN_LINK, COORDINATOR_DNS_NAME};
use cloison_proto::version::MeshTime;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, EndpointConfig, TokioRuntime, TransportConfig, VarInt};
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use tokio::time::timeout;

use super::verifier::{Anchors, CoordinatorVerifier};
use crate::state::clock::WallTime;

/// How long one attempt at one address may take, and one write of a frame.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// A link that is silent for so long has ended.
const IDLE: Duration = Duration::from_secs(30);

/// Often enough that one lost keep-alive ends nothing.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Why there is no connection to a coordinator, or no longer one.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The name has no address.
    #[error("{address} has no address: {why}")]
    Resolve {
        /// `host:port` as configured.
        address: String,
        /// Why not.
        why: String,
    },
    /// No answer.
    #[error("{address} does not answer: {why}")]
    Unreachable {
        /// Where.
        address: String,
        /// What the system says.
        why: String,
    },
    /// The server did not show that it is a coordinator of this mesh.
    #[error("{address} is not a coordinator of this mesh: {why}")]
    Untrusted {
        /// Where.
        address: String,
        /// What is wrong with its certificate.
        why: String,
    },
    /// The coordinator does not take this host's certificate.
    #[error("{address} does not accept this host's certificate: {why}")]
    CertificateRefused {
        /// Where.
        address: String,
        /// The alert.
        why: String,
    },
    /// It speaks no version of the protocol that we speak.
    #[error("{address} speaks no common version of Cloison's protocol")]
    Version {
        /// Where.
        address: String,
    },
    /// It ended.
    #[error("the connection with {address} ended: {why}")]
    Ended {
        /// Where.
        address: String,
        /// Why.
        why: String,
    },
    /// What came are no frames.
    #[error("{address} sent what cannot be read: {source}")]
    Frames {
        /// Where.
        address: String,
        /// What is wrong with it.
        source: FrameError,
    },
    /// This process cannot do TLS.
    #[error("cannot prepare TLS: {0}")]
    Tls(String),
}

/// What an attempt at a connection needs to know.
#[derive(Debug, Clone)]
pub struct Attempt {
    /// The mesh.
    pub mesh: MeshId,
    /// Whom to trust.
    pub anchors: Anchors,
    /// The wall clock.
    pub wall: WallTime,
    /// A time that is certainly past.
    pub past: MeshTime,
}

/// An open connection with its one stream of frames.
#[derive(Debug)]
pub struct Frames {
    address: String,
    connection: quinn::Connection,
    endpoint: quinn::Endpoint,
    send: quinn::SendStream,
    receive: quinn::RecvStream,
    buffer: FrameBuffer,
    verifier: Arc<CoordinatorVerifier>,
    local: Option<IpAddr>,
}

/// The one provider of cryptography: aws-lc, X25519MLKEM768 before X25519.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// Opens a link as the host of `certificate`, and its stream.
///
/// # Errors
/// [`ConnectionError`].
pub async fn link(address: &str, attempt: Attempt, identity: &SigningKey, certificate: &[u8]) -> Result<Frames, ConnectionError> {
    let key = PrivatePkcs8KeyDer::from(identity.to_pkcs8().to_vec());
    let chain = vec![CertificateDer::from(certificate.to_vec())];
    let open = Open::new(address, attempt, ALPN_LINK, Some((chain, key)))?;
    open.run(async |connection| connection.open_bi().await).await
}

/// Opens a join stream, on which the coordinator speaks first.
///
/// # Errors
/// [`ConnectionError`].
pub async fn join(address: &str, attempt: Attempt) -> Result<Frames, ConnectionError> {
    let open = Open::new(address, attempt, ALPN_JOIN, None)?;
    open.run(async |connection| connection.accept_bi().await).await
}

struct Open<'a> {
    address: &'a str,
    verifier: Arc<CoordinatorVerifier>,
    config: ClientConfig,
}

impl<'a> Open<'a> {
    fn new(
        address: &'a str,
        attempt: Attempt,
        alpn: &[u8],
        client: Option<(Vec<CertificateDer<'static>>, PrivatePkcs8KeyDer<'static>)>,
    ) -> Result<Self, ConnectionError> {
        let tls_error = |e: &dyn std::fmt::Display| ConnectionError::Tls(e.to_string());
        let provider = provider();
        let verifier = CoordinatorVerifier::new(attempt.mesh, attempt.anchors, attempt.wall, attempt.past, provider.clone());
        let verifier = Arc::new(verifier);
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| tls_error(&e))?
            .dangerous()
            .with_custom_certificate_verifier(verifier.clone());
        let mut tls = match client {
            Some((chain, key)) => builder.with_client_auth_cert(chain, key.into()).map_err(|e| tls_error(&e))?,
            None => builder.with_no_client_auth(),
        };
        tls.alpn_protocols = vec![alpn.to_vec()];
        tls.resumption = Resumption::disabled();
        let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).map_err(|e| tls_error(&e))?));
        config.transport_config(Arc::new(transport()));
        Ok(Self { address, verifier, config })
    }

    /// Resolves, connects, and lets `stream` open or accept the one stream; each address gets its share of patience.
    async fn run(
        self,
        stream: impl AsyncFn(&quinn::Connection) -> Result<(quinn::SendStream, quinn::RecvStream), quinn::ConnectionError>,
    ) -> Result<Frames, ConnectionError> {
        let resolve_error = |why: String| ConnectionError::Resolve {
            address: self.address.into(),
            why,
        };
        let found = timeout(PATIENCE, tokio::net::lookup_host(self.address)).await;
        let found = found
            .map_err(|_| resolve_error("no answer".into()))?
            .map_err(|e| resolve_error(e.to_string()))?;
        let mut last = resolve_error("the name has none".into());
        for remote in found {
            match self.connect(remote, &stream).await {
                Ok(frames) => return Ok(frames),
                Err(e) => last = e,
            }
        }
        Err(last)
    }

    async fn connect(
        &self,
        remote: SocketAddr,
        stream: &impl AsyncFn(&quinn::Connection) -> Result<(quinn::SendStream, quinn::RecvStream), quinn::ConnectionError>,
    ) -> Result<Frames, ConnectionError> {
        let unreachable = |why: String| ConnectionError::Unreachable {
            address: self.address.into(),
            why,
        };
        let socket = socket_to(remote).map_err(|e| unreachable(e.to_string()))?;
        let local = socket.local_addr().ok().map(|a| a.ip());
        let runtime = Arc::new(TokioRuntime);
        let endpoint = quinn::Endpoint::new(EndpointConfig::default(), None, socket, runtime).map_err(|e| unreachable(e.to_string()))?;
        let attempt = async {
            let connecting = endpoint.connect_with(self.config.clone(), remote, COORDINATOR_DNS_NAME);
            let connection = connecting
                .map_err(|e| unreachable(e.to_string()))?
                .await
                .map_err(|e| classify(self.address, e))?;
            let (send, receive) = stream(&connection).await.map_err(|e| classify(self.address, e))?;
            Ok((connection, send, receive))
        };
        let (connection, send, receive) = timeout(PATIENCE, attempt).await.map_err(|_| unreachable("no answer".into()))??;
        Ok(Frames {
            address: self.address.into(),
            connection,
            endpoint,
            send,
            receive,
            buffer: FrameBuffer::default(),
            verifier: self.verifier.clone(),
            local,
        })
    }
}

/// An unused local port of the right family, connected: what others send to it never arrives.
fn socket_to(remote: SocketAddr) -> std::io::Result<UdpSocket> {
    let any: IpAddr = match remote {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(remote)?;
    Ok(socket)
}

/// One stream, no datagrams, and room for a few frames: all that this protocol needs.
fn transport() -> TransportConfig {
    let mut transport = TransportConfig::default();
    let window = u32::try_from(4 * MAX_FRAME).unwrap_or(u32::MAX);
    transport
        .max_idle_timeout(IDLE.try_into().ok())
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .stream_receive_window(VarInt::from_u32(window))
        .receive_window(VarInt::from_u32(window));
    transport
}

impl Frames {
    /// Sends a frame; waits for room, but not for long.
    ///
    /// # Errors
    /// [`ConnectionError`]; the connection cannot be used any further.
    pub async fn send(&mut self, frame: &Frame) -> Result<(), ConnectionError> {
        let bytes = frame.to_bytes().map_err(|source| self.frames_error(source))?;
        match timeout(PATIENCE, self.send.write_all(&bytes)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(quinn::WriteError::ConnectionLost(e))) => Err(classify(&self.address, e)),
            Ok(Err(e)) => Err(self.ended(&e)),
            Err(_) => Err(self.ended(&"the coordinator takes no more")),
        }
    }

    /// The next frame. May be dropped and called again without losing anything.
    ///
    /// # Errors
    /// [`ConnectionError`]; the connection cannot be used any further.
    pub async fn next(&mut self) -> Result<Frame, ConnectionError> {
        loop {
            if let Some(frame) = self.buffer.next_frame().map_err(|source| self.frames_error(source))? {
                return Ok(frame);
            }
            match self.receive.read_chunk(MAX_FRAME, true).await {
                Ok(Some(chunk)) => self.buffer.push(&chunk.bytes),
                Ok(None) => return Err(self.ended(&"the coordinator closed it")),
                Err(quinn::ReadError::ConnectionLost(e)) => return Err(classify(&self.address, e)),
                Err(e) => return Err(self.ended(&e)),
            }
        }
    }

    /// The value of the TLS exporter (RFC 8446 section 7.5) to which the proofs of a join are bound.
    ///
    /// # Errors
    /// [`ConnectionError::Tls`].
    pub fn exporter(&self) -> Result<[u8; EXPORTER_LEN], ConnectionError> {
        let mut value = [0; EXPORTER_LEN];
        let made = self.connection.export_keying_material(&mut value, EXPORTER_LABEL, &[]);
        made.map(|()| value).map_err(|_| ConnectionError::Tls("no exporter".into()))
    }

    /// Whether the wall clock lies outside the validity of the coordinator's certificate.
    #[must_use]
    pub fn clock_off(&self) -> bool {
        self.verifier.clock_off()
    }

    /// The address of this host that the route to the coordinator uses.
    #[must_use]
    pub const fn local(&self) -> Option<IpAddr> {
        self.local
    }

    /// The coordinator's address as configured.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Says goodbye and waits for it to leave, but not for long.
    pub async fn close(mut self, why: &str) {
        // The stream's end may be refused because the other side ended first: either way it is over.
        let _ = self.send.finish();
        self.connection.close(VarInt::from_u32(0), why.as_bytes());
        let _ = timeout(Duration::from_millis(200), self.endpoint.wait_idle()).await;
    }

    fn ended(&self, why: &dyn std::fmt::Display) -> ConnectionError {
        ConnectionError::Ended {
            address: self.address.clone(),
            why: why.to_string(),
        }
    }

    fn frames_error(&self, source: FrameError) -> ConnectionError {
        ConnectionError::Frames {
            address: self.address.clone(),
            source,
        }
    }
}

/// What a failure of the transport means. A TLS alert is a crypto error of QUIC: 0x100 and its number (RFC 9001 section 4.8).
fn classify(address: &str, error: quinn::ConnectionError) -> ConnectionError {
    const NO_APPLICATION_PROTOCOL: u64 = 120;
    let address = address.to_owned();
    let alert = |code: u64| code.checked_sub(0x100).filter(|alert| *alert < 0x100);
    match error {
        quinn::ConnectionError::TransportError(e) => match alert(u64::from(e.code)) {
            Some(_) => ConnectionError::Untrusted { address, why: e.reason },
            None => ConnectionError::Ended {
                address,
                why: e.to_string(),
            },
        },
        quinn::ConnectionError::ConnectionClosed(e) => match alert(u64::from(e.error_code)) {
            Some(NO_APPLICATION_PROTOCOL) => ConnectionError::Version { address },
            Some(_) => ConnectionError::CertificateRefused {
                address,
                why: e.to_string(),
            },
            None => ConnectionError::Ended {
                address,
                why: e.to_string(),
            },
        },
        quinn::ConnectionError::VersionMismatch => ConnectionError::Version { address },
        quinn::ConnectionError::TimedOut => ConnectionError::Unreachable {
            address,
            why: "no answer".into(),
        },
        // Another certificate may be taken: a coordinator that was restored from a backup does not know those that it issued since.
        quinn::ConnectionError::ApplicationClosed(e) if e.reason.as_ref() == b"denied" => ConnectionError::CertificateRefused {
            address,
            why: "denied".into(),
        },
        quinn::ConnectionError::ApplicationClosed(e) => ConnectionError::Ended {
            address,
            why: String::from_utf8_lossy(&e.reason).into_owned(),
        },
        e @ (quinn::ConnectionError::Reset | quinn::ConnectionError::LocallyClosed | quinn::ConnectionError::CidsExhausted) => {
            ConnectionError::Ended {
                address,
                why: e.to_string(),
            }
        }
    }
}
