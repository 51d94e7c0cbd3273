//! The coordinator as a TLS server: its own short certificate, made anew before it runs out, and the settings that the control listener
//! and the API share.
//!
//! TLS 1.3 only, X25519MLKEM768 first. No session tickets and no early data: each connection shows its certificate, so that a revoked or
//! renewed one cannot be carried on by an old ticket.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use cloison_proto::key::SigningKey;
use rustls::crypto::aws_lc_rs;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;
use rustls::{ServerConfig, version};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use zeroize::Zeroizing;

use super::issue::{COORDINATOR_LIFETIME, IssueError};
use super::roots::Roots;
use crate::clock::MeshClock;
use crate::entropy::{EntropyError, Environment};

/// Why the coordinator has no certificate to show.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// It could not be made.
    #[error(transparent)]
    Issue(#[from] IssueError),
    /// No key could be drawn for it.
    #[error(transparent)]
    Entropy(#[from] EntropyError),
    /// The TLS library does not take it.
    #[error("the TLS library does not take the coordinator's own certificate or settings")]
    Tls(#[from] rustls::Error),
}

/// The certificate that the coordinator shows at this moment. Its key is in memory only.
#[derive(Debug)]
pub struct ServerIdentity {
    roots: Arc<Roots>,
    env: Environment,
    current: ArcSwap<CertifiedKey>,
}

impl ServerIdentity {
    /// How often [`ServerIdentity::renew`] is due.
    pub const RENEWED_EVERY: Duration = Duration::from_secs(COORDINATOR_LIFETIME.as_secs() / 2);

    /// A first certificate from `roots`.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn new(roots: Arc<Roots>, env: Environment) -> Result<Arc<Self>, ServerError> {
        let current = ArcSwap::from_pointee(fresh(&roots, &env)?);
        Ok(Arc::new(Self { roots, env, current }))
    }

    /// Makes another key and certificate; connections from now on see it.
    ///
    /// # Errors
    /// [`ServerError`]; the one at hand stays.
    pub fn renew(&self) -> Result<(), ServerError> {
        self.current.store(Arc::new(fresh(&self.roots, &self.env)?));
        Ok(())
    }
}

impl ResolvesServerCert for ServerIdentity {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load_full())
    }
}

impl TimeProvider for MeshClock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(self.now().0)))
    }
}

fn fresh(roots: &Roots, env: &Environment) -> Result<CertifiedKey, ServerError> {
    let key = SigningKey::from_seed(&Zeroizing::new(env.random::<32>()?));
    let chain = roots.issue_coordinator(&key, env)?;
    let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.to_pkcs8().to_vec()));
    Ok(CertifiedKey::from_der(chain, der, &aws_lc_rs::default_provider())?)
}

/// The TLS settings of a listener that speaks `alpn`, and asks for hosts' certificates if there is a `verifier` for them.
///
/// # Errors
/// [`ServerError::Tls`].
pub fn server_config(
    identity: Arc<ServerIdentity>,
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    alpn: &[&[u8]],
) -> Result<ServerConfig, ServerError> {
    // Hosts' certificates are issued and judged by one clock.
    let clock = Arc::new(identity.env.clock.clone());
    let builder =
        ServerConfig::builder_with_details(Arc::new(aws_lc_rs::default_provider()), clock).with_protocol_versions(&[&version::TLS13])?;
    let builder = match verifier {
        Some(verifier) => builder.with_client_cert_verifier(verifier),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_cert_resolver(identity);
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.max_early_data_size = 0;
    Ok(config)
}
