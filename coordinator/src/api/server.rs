//! The listener of the API: TLS 1.3 only, bounded in connections and in the time that headers may take.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum_server::Handle;
use axum_server::tls_rustls::RustlsConfig;
use hyper_util::rt::TokioTimer;

use super::bounds::Bounds;
use super::{ApiState, router};

/// How long a connection may take for a request's headers.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// Most streams of one HTTP/2 connection at a time.
const MAX_STREAMS: u32 = 64;

/// Largest headers of a request, in bytes.
const MAX_HEADERS: u16 = 16 * 1024;

/// How long requests that are under way may take to end when the coordinator stops.
const DRAIN: Duration = Duration::from_secs(5);

/// Why the API does not listen.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be bound.
    #[error("cannot listen on {address} for the API: {source}; is another coordinator running, or is the address not this machine's?")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The listener ended.
    #[error("the API's listener ended")]
    Serve(#[source] io::Error),
}

/// A bound API.
pub struct ApiServer {
    listener: std::net::TcpListener,
    tls: RustlsConfig,
    handle: Handle<SocketAddr>,
}

impl ApiServer {
    /// Binds the address. `tls` speaks for the coordinator, and finds its current certificate by itself.
    ///
    /// # Errors
    /// [`ServeError::Bind`].
    pub fn bind(address: SocketAddr, tls: Arc<rustls::ServerConfig>) -> Result<Self, ServeError> {
        let bound = std::net::TcpListener::bind(address).and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
        let listener = bound.map_err(|source| ServeError::Bind { address, source })?;
        Ok(Self {
            listener,
            tls: RustlsConfig::from_config(tls),
            handle: Handle::new(),
        })
    }

    /// What stops the server: call [`stop`] with it.
    #[must_use]
    pub fn handle(&self) -> Handle<SocketAddr> {
        self.handle.clone()
    }

    /// Serves until it is stopped.
    ///
    /// # Errors
    /// [`ServeError::Serve`].
    pub async fn serve(self, state: ApiState) -> Result<(), ServeError> {
        let mut server = axum_server::from_tcp_rustls(self.listener, self.tls)
            .map_err(ServeError::Serve)?
            .map(|tls| tls.acceptor(Bounds::default()))
            .handle(self.handle);
        let builder = server.http_builder();
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .max_buf_size(MAX_HEADERS.into());
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .max_header_list_size(MAX_HEADERS.into());
        server.serve(router(state).into_make_service()).await.map_err(ServeError::Serve)
    }
}

/// Stops a server: no new connections, and a little time for the requests that are under way.
pub fn stop(handle: &Handle<SocketAddr>) {
    handle.graceful_shutdown(Some(DRAIN));
}
