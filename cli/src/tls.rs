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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use cloison_proto::id::{CoordinatorId, HostId, MeshId};
    use cloison_proto::trust::COORDINATOR_DNS_NAME;
    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
        PKCS_ED25519, SanType,
    };
    use time::OffsetDateTime;

    use super::*;

    type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

    const MESH: MeshId = MeshId([7; 16]);
    const HOUR: Duration = Duration::from_secs(3600);

    /// A root and one issuer below it, as a coordinator keeps them.
    struct Mesh {
        root: CertifiedIssuer<'static, KeyPair>,
        issuer: CertifiedIssuer<'static, KeyPair>,
    }

    impl Mesh {
        fn new(usage: ExtendedKeyUsagePurpose) -> Outcome<Self> {
            let root = CertifiedIssuer::self_signed(authority(1), KeyPair::generate_for(&PKCS_ED25519)?)?;
            let mut params = authority(0);
            params.extended_key_usages = vec![usage];
            let issuer = CertifiedIssuer::signed_by(params, KeyPair::generate_for(&PKCS_ED25519)?, &root)?;
            Ok(Self { root, issuer })
        }

        fn verifier(&self) -> Outcome<CoordinatorVerifier> {
            Ok(CoordinatorVerifier {
                anchor: webpki::anchor_from_trusted_cert(self.root.der())?.to_owned(),
                algorithms: rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms,
            })
        }

        /// Whether `trust` takes a leaf of this mesh with these names and this usage for the coordinator's.
        fn is_taken(&self, trust: &CoordinatorVerifier, uris: &[String], usage: ExtendedKeyUsagePurpose) -> Outcome<bool> {
            let mut params = CertificateParams::default();
            params.not_before = OffsetDateTime::now_utc() - HOUR;
            params.not_after = OffsetDateTime::now_utc() + HOUR;
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            params.extended_key_usages = vec![usage];
            params.subject_alt_names.push(SanType::DnsName(COORDINATOR_DNS_NAME.try_into()?));
            for uri in uris {
                params.subject_alt_names.push(SanType::URI(uri.as_str().try_into()?));
            }
            let leaf = params.signed_by(&KeyPair::generate_for(&PKCS_ED25519)?, &self.issuer)?;
            let name = ServerName::try_from(COORDINATOR_DNS_NAME)?;
            let chain = [self.issuer.der().clone(), self.root.der().clone()];
            Ok(trust.verify_server_cert(leaf.der(), &chain, &name, &[], UnixTime::now()).is_ok())
        }
    }

    fn authority(below: u8) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, format!("authority {below}"));
        params.not_before = OffsetDateTime::now_utc() - HOUR;
        params.not_after = OffsetDateTime::now_utc() + HOUR;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(below));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params
    }

    fn uri(role: Role) -> String {
        SpiffeId { mesh: MESH, role }.to_string()
    }

    #[test]
    fn only_a_coordinators_certificate_speaks_for_the_coordinator() -> Outcome {
        use ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
        let (servers, clients) = (Mesh::new(ServerAuth)?, Mesh::new(ClientAuth)?);
        let trust = servers.verifier()?;
        let coordinator = uri(Role::Coordinator(CoordinatorId([5; 16])));
        let host = uri(Role::Host(HostId([6; 16])));
        assert!(servers.is_taken(&trust, std::slice::from_ref(&coordinator), ServerAuth)?);
        // What a host has: its own role, the other usage, the other issuer; and each of these alone.
        assert!(!clients.is_taken(&clients.verifier()?, std::slice::from_ref(&host), ClientAuth)?);
        assert!(!servers.is_taken(&trust, std::slice::from_ref(&host), ServerAuth)?);
        assert!(!servers.is_taken(&trust, std::slice::from_ref(&coordinator), ClientAuth)?);
        assert!(!clients.is_taken(&clients.verifier()?, std::slice::from_ref(&coordinator), ServerAuth)?);
        // No name, two names, and another mesh's root.
        assert!(!servers.is_taken(&trust, &[], ServerAuth)?);
        assert!(!servers.is_taken(&trust, &[coordinator.clone(), host], ServerAuth)?);
        assert!(!servers.is_taken(&Mesh::new(ServerAuth)?.verifier()?, &[coordinator], ServerAuth)?);
        Ok(())
    }
}
