//! What certificates say: who, for what, from when to when. A leaf has exactly one URI, and its usage is that of its role and no other.
//!
//! Validity is judged leniently, because a host's clock may be wrong ([`Window::judge_at`]): mesh time is a time that is certainly past, so
//! a certificate that ended before it has ended; any other may be valid now.

use cloison_proto::key::IdentityKey;
use cloison_proto::trust::{BACKDATED, Role, SpiffeId};
use cloison_proto::version::MeshTime;
use rustls_pki_types::CertificateDer;
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer as _, GeneralName, ParsedExtension, X509Certificate};

use crate::state::clock::WallTime;

/// From when to when a certificate holds, in seconds since the Unix epoch, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// The first second.
    pub not_before: u64,
    /// The last second.
    pub not_after: u64,
}

/// Why a certificate is not the one that is wanted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// Not a certificate.
    #[error("the certificate cannot be read")]
    Malformed,
    /// Not exactly one URI of ours.
    #[error("the certificate does not name exactly one member of a mesh")]
    Identity,
    /// Another mesh, role or host.
    #[error("the certificate is {found}, but {wanted} was expected")]
    Other {
        /// What it says.
        found: String,
        /// What was wanted.
        wanted: String,
    },
    /// Its usages are not exactly those of its role.
    #[error("the certificate may be used for other things than its role's")]
    Usage,
    /// For another key than ours.
    #[error("the certificate is not for this host's key")]
    Key,
    /// It ended before a time that is certainly past.
    #[error("the certificate ended at {not_after}, and it is at least {now} (seconds since 1970)")]
    Ended {
        /// Its last second.
        not_after: u64,
        /// The time that is certainly past.
        now: u64,
    },
}

impl Window {
    /// At which second to judge a certificate: the wall clock's, moved into the window if that clock is off; none if the certificate ended
    /// before `past`, a time that is certainly past.
    #[must_use]
    pub fn judge_at(self, wall: WallTime, past: MeshTime) -> Option<u64> {
        let first = self.not_before.max(past.0);
        (first <= self.not_after).then(|| wall.0.clamp(first, self.not_after))
    }

    /// Whether it ended before `past`.
    #[must_use]
    pub const fn ended_at(self, past: MeshTime) -> bool {
        self.not_after < past.0
    }

    /// Whether half of its life is over.
    #[must_use]
    pub fn half_spent_at(self, now: MeshTime) -> bool {
        now.0 >= self.issued_at().midpoint(self.not_after)
    }

    /// Seconds that it was good for when it was issued.
    #[must_use]
    pub fn life(self) -> u64 {
        self.not_after.saturating_sub(self.issued_at())
    }

    /// When it was issued: it holds from an hour before, which is no part of its life.
    #[must_use]
    pub fn issued_at(self) -> u64 {
        self.not_before.saturating_add(BACKDATED.as_secs()).min(self.not_after)
    }
}

/// Who and what a leaf is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaf {
    /// Its one URI.
    pub id: SpiffeId,
    /// When it holds.
    pub window: Window,
}

impl Leaf {
    /// Reads a leaf; its signature is not checked here.
    ///
    /// # Errors
    /// [`CertificateError`] unless it has exactly one URI of ours and the usage of its role alone.
    pub fn read(der: &CertificateDer<'_>) -> Result<Self, CertificateError> {
        let (id, window, servers, clients) = parts(der)?;
        let fits = match id.role {
            Role::Coordinator(_) => servers && !clients,
            Role::Host(_) => clients && !servers,
        };
        if fits {
            Ok(Self { id, window })
        } else {
            Err(CertificateError::Usage)
        }
    }
}

/// The URI, the window, and whether the leaf may be used for servers and for clients; any other usage is an error.
fn parts(der: &CertificateDer<'_>) -> Result<(SpiffeId, Window, bool, bool), CertificateError> {
    let (rest, cert) = X509Certificate::from_der(der).map_err(|_| CertificateError::Malformed)?;
    if !rest.is_empty() || cert.is_ca() {
        return Err(CertificateError::Malformed);
    }
    let usage = cert
        .extended_key_usage()
        .map_err(|_| CertificateError::Malformed)?
        .ok_or(CertificateError::Usage)?
        .value;
    let strange = usage.any || usage.code_signing || usage.email_protection || usage.time_stamping || usage.ocsp_signing;
    if strange || !usage.other.is_empty() {
        return Err(CertificateError::Usage);
    }
    let mut uris = Vec::new();
    for extension in cert.extensions() {
        if let ParsedExtension::SubjectAlternativeName(names) = extension.parsed_extension() {
            for name in &names.general_names {
                if let GeneralName::URI(uri) = name {
                    uris.push(*uri);
                }
            }
        }
    }
    let [uri] = uris.as_slice() else {
        return Err(CertificateError::Identity);
    };
    let id = uri.parse().map_err(|_| CertificateError::Identity)?;
    Ok((id, window_of(&cert), usage.server_auth, usage.client_auth))
}

fn window_of(cert: &X509Certificate<'_>) -> Window {
    let second = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
    Window {
        not_before: second(cert.validity().not_before),
        not_after: second(cert.validity().not_after),
    }
}

/// Checks that `der` is this host's certificate, for its identity key, and gives its window.
///
/// # Errors
/// [`CertificateError`].
pub fn check_host(der: &[u8], wanted: SpiffeId, key: &IdentityKey) -> Result<Window, CertificateError> {
    let der = CertificateDer::from(der);
    let leaf = Leaf::read(&der)?;
    if leaf.id != wanted {
        return Err(CertificateError::Other {
            found: leaf.id.to_string(),
            wanted: wanted.to_string(),
        });
    }
    let (_, cert) = X509Certificate::from_der(&der).map_err(|_| CertificateError::Malformed)?;
    if cert.public_key().subject_public_key.data.as_ref() == key.as_bytes() {
        Ok(leaf.window)
    } else {
        Err(CertificateError::Key)
    }
}

/// Whether the certificate is for the key that a token pins: SHA-256 of its SubjectPublicKeyInfo.
#[must_use]
pub fn has_pin(der: &CertificateDer<'_>, pin: &[u8; 32]) -> bool {
    X509Certificate::from_der(der).is_ok_and(|(_, cert)| Sha256::digest(cert.public_key().raw).as_slice() == pin)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::testing::{HOST, MESH, Pki};

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    fn host() -> SpiffeId {
        SpiffeId {
            mesh: MESH,
            role: Role::Host(HOST),
        }
    }

    #[test]
    fn a_wrong_wall_clock_is_moved_into_the_window_unless_it_is_surely_over() {
        let window = Window {
            not_before: 100,
            not_after: 200,
        };
        assert_eq!(window.judge_at(WallTime(150), MeshTime(0)), Some(150));
        assert_eq!(window.judge_at(WallTime(0), MeshTime(0)), Some(100));
        assert_eq!(window.judge_at(WallTime(9_999), MeshTime(120)), Some(200));
        assert_eq!(window.judge_at(WallTime(0), MeshTime(120)), Some(120));
        assert_eq!(window.judge_at(WallTime(150), MeshTime(201)), None);
    }

    #[test]
    fn half_of_a_life_is_counted_from_when_it_was_issued_however_short_it_is() {
        let window = Window {
            not_before: 10_000 - 3_600,
            not_after: 10_010,
        };
        assert_eq!(window.life(), 10);
        assert!(!window.half_spent_at(MeshTime(10_004)) && window.half_spent_at(MeshTime(10_005)));
        // What no coordinator of ours issued is half spent at its end at the latest.
        let window = Window {
            not_before: 100,
            not_after: 200,
        };
        assert!(!window.half_spent_at(MeshTime(199)) && window.half_spent_at(MeshTime(200)));
    }

    #[test]
    fn a_host_certificate_is_for_our_name_and_our_key() -> Outcome {
        let pki = Pki::new()?;
        let der = pki.host_leaf(&host().to_string(), &[rcgen::ExtendedKeyUsagePurpose::ClientAuth])?;
        assert!(check_host(&der, host(), &pki.host_key().identity()).is_ok());
        let other = cloison_proto::key::SigningKey::from_seed(&[99; 32]).identity();
        assert_eq!(check_host(&der, host(), &other), Err(CertificateError::Key));
        let wanted = SpiffeId {
            mesh: MESH,
            role: Role::Host(cloison_proto::id::HostId([8; 16])),
        };
        assert!(matches!(
            check_host(&der, wanted, &pki.host_key().identity()),
            Err(CertificateError::Other { .. })
        ));
        Ok(())
    }

    #[test]
    fn a_leaf_with_more_usages_than_its_role_s_is_refused() -> Outcome {
        use rcgen::ExtendedKeyUsagePurpose::{Any, ClientAuth, CodeSigning, ServerAuth};
        let pki = Pki::new()?;
        for usages in [
            &[][..],
            &[ServerAuth],
            &[ClientAuth, ServerAuth],
            &[ClientAuth, CodeSigning],
            &[ClientAuth, Any],
        ] {
            let der = pki.host_leaf(&host().to_string(), usages)?;
            assert_eq!(
                Leaf::read(&CertificateDer::from(der.as_slice())),
                Err(CertificateError::Usage),
                "{usages:?}"
            );
        }
        Ok(())
    }

    #[test]
    fn cut_certificates_are_errors_and_never_panics() -> Outcome {
        let pki = Pki::new()?;
        let der = pki.host_leaf(&host().to_string(), &[rcgen::ExtendedKeyUsagePurpose::ClientAuth])?;
        for length in 0..der.len() {
            let cut = CertificateDer::from(der.get(..length).unwrap_or_default());
            assert_eq!(Leaf::read(&cut), Err(CertificateError::Malformed), "{length}");
            assert!(!has_pin(&cut, &[0; 32]));
        }
        Ok(())
    }
}
