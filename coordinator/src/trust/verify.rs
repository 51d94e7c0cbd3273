//! Who a host's certificate chain speaks for.
//!
//! Only the leaf counts: the certificate whose key signed the handshake. It must come straight from the host authority of this mesh, be
//! for client authentication, be within its time, and name exactly one thing: one URI, a host's, of this mesh. What else is in the chain
//! is never looked at, so that no certificate of it can lend the leaf anything.

use std::sync::Arc;

use cloison_proto::id::HostId;
use cloison_proto::key::IdentityKey;
use cloison_proto::trust::{Role, SpiffeId};
use cloison_proto::version::MeshTime;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, SignatureScheme};
use rustls_pki_types::{CertificateDer, UnixTime};
use sha2::{Digest as _, Sha256};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};

use super::from_spki;
use super::roots::Roots;
use crate::store::Serial;

/// DER of the object identifier 1.3.6.1.5.5.7.3.2, client authentication (RFC 5280 section 4.2.1.12), without tag and length.
const EKU_CLIENT_AUTH: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x02];

/// Why a chain speaks for nobody.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// No certificate was shown.
    #[error("no certificate was shown")]
    None,
    /// Not a certificate, not from this mesh's host authority, not for client authentication, or not within its time.
    #[error("the certificate does not hold ({0})")]
    Certificate(webpki::Error),
    /// It has no name, several, or one of another kind.
    #[error("the certificate must name exactly one host of this mesh, and nothing else")]
    Names,
    /// Its key is not Ed25519, or its serial number not one of ours.
    #[error("the certificate's key or serial number is of another kind than this coordinator issues")]
    Content,
}

/// The host at the other end, as its certificate says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkedHost {
    /// The host.
    pub host: HostId,
    /// Its identity key: the one that signed the handshake.
    pub identity: IdentityKey,
    /// The certificate's serial number: [`crate::store::Store::admit_certificate`] judges it.
    pub serial: Serial,
    /// SHA-256 of the certificate of the authority that signed it.
    pub issuer: [u8; 32],
}

/// Judges hosts' certificates, in the TLS handshake and after it. A peer without any certificate passes the handshake: it may only join.
#[derive(Debug)]
pub struct HostVerifier {
    roots: Arc<Roots>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl HostVerifier {
    /// A verifier for the hosts of `roots`' mesh.
    #[must_use]
    pub fn new(roots: Arc<Roots>) -> Self {
        Self {
            roots,
            algorithms: rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms,
        }
    }

    /// Who `chain` speaks for at `now`: its leaf alone.
    ///
    /// # Errors
    /// [`VerifyError`].
    pub fn host_of(&self, chain: &[CertificateDer<'_>], now: MeshTime) -> Result<LinkedHost, VerifyError> {
        let leaf = EndEntityCert::try_from(chain.first().ok_or(VerifyError::None)?).map_err(VerifyError::Certificate)?;
        let issuers = self.roots.host_issuers();
        let mut last = Err(VerifyError::None);
        for issuer in &issuers {
            match self.host_by(&leaf, issuer, now) {
                Ok(linked) => return Ok(linked),
                Err(error) => last = Err(error),
            }
        }
        last
    }

    /// Whether the authority that signed a host's certificate is still trusted.
    #[must_use]
    pub fn trusts(&self, linked: &LinkedHost) -> bool {
        self.roots.host_issuers().iter().any(|issuer| digest(issuer) == linked.issuer)
    }

    /// Whether the authority that signed a host's certificate is the one that signs new ones.
    #[must_use]
    pub fn is_current(&self, linked: &LinkedHost) -> bool {
        digest(&self.roots.host_issuer().certificate) == linked.issuer
    }

    /// Who a leaf speaks for by this authority.
    fn host_by(&self, leaf: &EndEntityCert<'_>, authority: &CertificateDer<'_>, now: MeshTime) -> Result<LinkedHost, VerifyError> {
        let issuer = anchor_from_trusted_cert(authority).map_err(VerifyError::Certificate)?;
        let time = UnixTime::since_unix_epoch(std::time::Duration::from_secs(now.0));
        leaf.verify_for_usage(
            &[webpki::aws_lc_rs::ED25519],
            &[issuer],
            &[],
            time,
            KeyUsage::required(EKU_CLIENT_AUTH),
            None,
            None,
        )
        .map_err(VerifyError::Certificate)?;
        let mut uris = leaf.valid_uri_names();
        let (Some(uri), None, None) = (uris.next(), uris.next(), leaf.valid_dns_names().next()) else {
            return Err(VerifyError::Names);
        };
        let host = match uri.parse() {
            Ok(SpiffeId {
                mesh,
                role: Role::Host(host),
            }) if mesh == self.roots.mesh() => host,
            _ => return Err(VerifyError::Names),
        };
        let identity = from_spki(&leaf.subject_public_key_info()).map_err(|_| VerifyError::Content)?;
        let serial = leaf.serial().try_into().map(Serial).map_err(|_| VerifyError::Content)?;
        Ok(LinkedHost {
            host,
            identity,
            serial,
            issuer: digest(authority),
        })
    }
}

impl ClientCertVerifier for HostVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        match self.host_of(std::slice::from_ref(end_entity), MeshTime(now.as_secs())) {
            Ok(_) => Ok(ClientCertVerified::assertion()),
            Err(VerifyError::Certificate(webpki::Error::CertExpired { .. })) => Err(CertificateError::Expired.into()),
            Err(_) => Err(CertificateError::ApplicationVerificationFailure.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::Tls13RequiredForQuic.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

fn digest(certificate: &CertificateDer<'_>) -> [u8; 32] {
    Sha256::digest(certificate).into()
}

/// The Ed25519 key of a certificate.
pub(super) fn key_of(certificate: &CertificateDer<'_>) -> Option<IdentityKey> {
    let parsed = EndEntityCert::try_from(certificate).ok()?;
    from_spki(&parsed.subject_public_key_info()).ok()
}

/// Whether `certificate` says that `issuer` signed it, and `issuer` that it is that one. Names tell a mix-up of files; what signatures say
/// is judged by whoever is shown the chain.
pub(super) fn names_as_issuer(certificate: &CertificateDer<'_>, issuer: &CertificateDer<'_>) -> bool {
    let (Ok(certificate), Ok(issuer)) = (EndEntityCert::try_from(certificate), EndEntityCert::try_from(issuer)) else {
        return false;
    };
    certificate.issuer() == issuer.subject()
}
