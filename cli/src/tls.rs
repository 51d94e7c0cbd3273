//! Trust in the coordinator: its certificate must lead to the mesh's root, be made for server authentication, and say `coordinator` in its
//! one URI. System roots play no part, and a host's certificate offered as the coordinator's is refused.

use std::sync::Arc;

use cloison_proto::trust::{Role, SpiffeId};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, PeerIncompatible, SignatureScheme};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};

/// Why there is no trust to begin with.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    /// The root certificate cannot be read.
    #[error("the root certificate is no PEM certificate")]
    Root,
    /// The TLS library refuses what it is given.
    #[error(transparent)]
    Tls(#[from] Error),
}

/// TLS 1.3 towards a coordinator of the mesh with this root certificate (PEM).
pub(crate) fn client_config(root_pem: &str) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let root = CertificateDer::from_pem_slice(root_pem.as_bytes()).map_err(|_| TlsError::Root)?;
    let anchor = webpki::anchor_from_trusted_cert(&root).map_err(|_| TlsError::Root)?.to_owned();
    let verifier = Arc::new(CoordinatorVerifier {
        anchor,
        algorithms: provider.signature_verification_algorithms,
    });
    let config =
        ClientConfig::builder_with_provider(Arc::<CryptoProvider>::clone(&provider)).with_protocol_versions(&[&rustls::version::TLS13])?;
    Ok(config.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
}

#[derive(Debug)]
struct CoordinatorVerifier {
    anchor: TrustAnchor<'static>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for CoordinatorVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let invalid = |e: webpki::Error| CertificateError::Other(rustls::OtherError(Arc::new(e)));
        let leaf = webpki::EndEntityCert::try_from(end_entity).map_err(invalid)?;
        let usage = webpki::KeyUsage::server_auth();
        leaf.verify_for_usage(
            self.algorithms.all,
            std::slice::from_ref(&self.anchor),
            intermediates,
            now,
            usage,
            None,
            None,
        )
        .map_err(invalid)?;
        let mut uris = leaf.valid_uri_names();
        let (Some(uri), None) = (uris.next(), uris.next()) else {
            return Err(CertificateError::ApplicationVerificationFailure.into());
        };
        match uri.parse::<SpiffeId>() {
            Ok(SpiffeId {
                role: Role::Coordinator(_),
                ..
            }) => Ok(ServerCertVerified::assertion()),
            Ok(SpiffeId { role: Role::Host(_), .. }) | Err(_) => Err(CertificateError::ApplicationVerificationFailure.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
