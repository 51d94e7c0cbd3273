//! Which server may call itself a coordinator of our mesh: the rustls verifier of both the join and the link.
//!
//! At a join the token pins the trust root: the root's certificate is among those that the server shows, and is found by its pin. On a
//! link the anchors are the issuers in the trust store. In both cases the leaf has one URI with the role of a coordinator of this mesh, is
//! for servers alone, and is signed by the chain at a time that [`Window::judge_at`](super::certificate::Window::judge_at) gives. The DNS
//! name that TLS asks for means nothing here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cloison_proto::id::MeshId;
use cloison_proto::trust::{Role, Trust};
use cloison_proto::version::MeshTime;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError as TlsCertificateError, DigitallySignedStruct, Error as TlsError, SignatureScheme};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};

use super::certificate::{CertificateError, Leaf, has_pin};
use crate::state::clock::WallTime;

/// What makes a certificate chain good.
#[derive(Debug, Clone)]
pub enum Anchors {
    /// SHA-256 of the trust root's key, from a token.
    Pin([u8; 32]),
    /// DER certificates of the issuers of coordinators.
    Issuers(Vec<CertificateDer<'static>>),
}

impl Anchors {
    /// The issuers that a trust store holds.
    #[must_use]
    pub fn of(trust: &Trust) -> Self {
        Self::Issuers(
            trust
                .coordinator_issuers()
                .iter()
                .map(|der| CertificateDer::from(der.clone()))
                .collect(),
        )
    }
}

/// Verifies that a server is a coordinator of `mesh`.
#[derive(Debug)]
pub struct CoordinatorVerifier {
    mesh: MeshId,
    anchors: Anchors,
    wall: WallTime,
    past: MeshTime,
    provider: Arc<CryptoProvider>,
    clock_off: AtomicBool,
}

impl CoordinatorVerifier {
    /// A verifier for one attempt: the wall clock says `wall`, and `past` is certainly past.
    #[must_use]
    pub fn new(mesh: MeshId, anchors: Anchors, wall: WallTime, past: MeshTime, provider: Arc<CryptoProvider>) -> Self {
        Self {
            mesh,
            anchors,
            wall,
            past,
            provider,
            clock_off: AtomicBool::new(false),
        }
    }

    /// Whether the wall clock lies outside the validity of the certificate that was accepted: it is off, or the coordinator's is.
    #[must_use]
    pub fn clock_off(&self) -> bool {
        self.clock_off.load(Ordering::Relaxed)
    }

    fn check(&self, leaf_der: &CertificateDer<'_>, others: &[CertificateDer<'_>]) -> Result<(), TlsError> {
        let leaf = Leaf::read(leaf_der).map_err(refused)?;
        if leaf.id.mesh != self.mesh || !matches!(leaf.id.role, Role::Coordinator(_)) {
            return Err(refused(CertificateError::Other {
                found: leaf.id.to_string(),
                wanted: format!("a coordinator of {}", self.mesh),
            }));
        }
        let time = leaf.window.judge_at(self.wall, self.past).ok_or_else(|| {
            refused(CertificateError::Ended {
                not_after: leaf.window.not_after,
                now: self.past.0,
            })
        })?;
        let roots: Vec<&CertificateDer<'_>> = match &self.anchors {
            Anchors::Pin(pin) => others.iter().filter(|der| has_pin(der, pin)).collect(),
            Anchors::Issuers(issuers) => issuers.iter().collect(),
        };
        let roots: Vec<_> = roots.into_iter().filter_map(|der| anchor_from_trusted_cert(der).ok()).collect();
        let end_entity = EndEntityCert::try_from(leaf_der).map_err(|_| TlsCertificateError::BadEncoding)?;
        end_entity
            .verify_for_usage(
                self.provider.signature_verification_algorithms.all,
                &roots,
                others,
                UnixTime::since_unix_epoch(Duration::from_secs(time)),
                KeyUsage::server_auth(),
                None,
                None,
            )
            .map_err(|e| TlsError::InvalidCertificate(TlsCertificateError::Other(rustls::OtherError(Arc::new(e)))))?;
        self.clock_off.store(time != self.wall.0, Ordering::Relaxed);
        Ok(())
    }
}

fn refused(error: CertificateError) -> TlsError {
    TlsError::InvalidCertificate(TlsCertificateError::Other(rustls::OtherError(Arc::new(error))))
}

impl ServerCertVerifier for CoordinatorVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        self.check(end_entity, intermediates).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        // QUIC has no TLS 1.2 (RFC 9001 section 4.2).
        Err(TlsError::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::testing::{MESH, Pki};

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    fn verifier(anchors: Anchors, wall: u64, past: u64) -> CoordinatorVerifier {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        CoordinatorVerifier::new(MESH, anchors, WallTime(wall), MeshTime(past), provider)
    }

    #[test]
    fn a_chain_to_the_pinned_root_is_accepted_and_to_another_root_is_not() -> Outcome {
        let (pki, other) = (Pki::new()?, Pki::with_seed(50)?);
        let chain = pki.coordinator_chain()?;
        let (leaf, rest) = chain.split_first().ok_or("empty chain")?;
        verifier(Anchors::Pin(pki.pin()), pki.now(), 0).check(leaf, rest)?;
        assert!(verifier(Anchors::Pin(other.pin()), pki.now(), 0).check(leaf, rest).is_err());
        // The pinned root shown beside a chain that it did not sign.
        let foreign = other.coordinator_chain()?;
        let (leaf, rest) = foreign.split_first().ok_or("empty chain")?;
        let mut rest = rest.to_vec();
        rest.push(pki.root_der());
        assert!(verifier(Anchors::Pin(pki.pin()), pki.now(), 0).check(leaf, &rest).is_err());
        Ok(())
    }

    #[test]
    fn on_a_link_the_issuers_of_coordinators_count_and_those_of_hosts_do_not() -> Outcome {
        let pki = Pki::new()?;
        let chain = pki.coordinator_chain()?;
        let (leaf, _) = chain.split_first().ok_or("empty chain")?;
        verifier(Anchors::Issuers(vec![pki.coordinator_issuer_der()]), pki.now(), 0).check(leaf, &[])?;
        assert!(
            verifier(Anchors::Issuers(vec![pki.host_issuer_der()]), pki.now(), 0)
                .check(leaf, &[])
                .is_err()
        );
        assert!(verifier(Anchors::Issuers(Vec::new()), pki.now(), 0).check(leaf, &[]).is_err());
        Ok(())
    }

    #[test]
    fn a_host_s_certificate_is_no_coordinator_s() -> Outcome {
        let pki = Pki::new()?;
        let uri = format!("spiffe://{MESH}/host/{}", crate::control::testing::HOST);
        let leaf = CertificateDer::from(pki.host_leaf(&uri, &[rcgen::ExtendedKeyUsagePurpose::ClientAuth])?);
        let issuers = vec![pki.host_issuer_der(), pki.coordinator_issuer_der()];
        assert!(verifier(Anchors::Issuers(issuers), pki.now(), 0).check(&leaf, &[]).is_err());
        Ok(())
    }

    #[test]
    fn a_wrong_wall_clock_stops_nothing_and_is_noticed() -> Outcome {
        let pki = Pki::new()?;
        let chain = pki.coordinator_chain()?;
        let (leaf, rest) = chain.split_first().ok_or("empty chain")?;
        for (wall, off) in [(pki.now(), false), (0, true), (pki.now() * 2, true)] {
            let verifier = verifier(Anchors::Pin(pki.pin()), wall, 0);
            verifier.check(leaf, rest)?;
            assert_eq!(verifier.clock_off(), off, "{wall}");
        }
        assert!(
            verifier(Anchors::Pin(pki.pin()), pki.now(), pki.now() * 2)
                .check(leaf, rest)
                .is_err(),
            "surely over"
        );
        Ok(())
    }
}
