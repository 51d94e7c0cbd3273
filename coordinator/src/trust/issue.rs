//! Making certificates: the only file that signs one.
//!
//! The root signs itself and two authorities; an authority signs leaves of its own role. A leaf says one URI, one usage and one key, and
//! how long. Validity begins an hour early, so that a clock a little behind does not refuse a fresh certificate. What operators' programs
//! judge by a wall clock (authorities, and the coordinator's own) begins as early as a wall clock may be behind the mesh's time.

use std::time::Duration;

use cloison_proto::id::{HostId, MeshId};
use cloison_proto::key::{IdentityKey, SigningKey};
use cloison_proto::trust::{BACKDATED, COORDINATOR_DNS_NAME, Role, SpiffeId};
use cloison_proto::version::MeshTime;
use jiff::SignedDuration;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ED25519, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use serde::Deserialize;
use time::OffsetDateTime;

use super::roots::{Authority, Roots};
use super::to_spki;
use crate::clock::MeshClock;
use crate::entropy::{EntropyError, Environment};
use crate::store::Serial;

/// How long a host's certificate lives; it is renewed at half of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "SignedDuration")]
pub struct HostLifetime(Duration);

impl HostLifetime {
    /// As short as a lease may be: a host has half of it for the way to the next one.
    const SHORTEST: SignedDuration = SignedDuration::from_secs(10);
    /// Whoever copied a host's keys has to ask for another one within this time, and that is audited.
    const LONGEST: SignedDuration = SignedDuration::from_hours(7 * 24);

    /// As a duration.
    #[must_use]
    pub const fn get(self) -> Duration {
        self.0
    }
}

impl Default for HostLifetime {
    /// A day.
    fn default() -> Self {
        Self(Duration::from_secs(86_400))
    }
}

impl TryFrom<SignedDuration> for HostLifetime {
    type Error = BadHostLifetime;
    fn try_from(asked: SignedDuration) -> Result<Self, BadHostLifetime> {
        let bad = BadHostLifetime(asked);
        if (Self::SHORTEST..=Self::LONGEST).contains(&asked) {
            asked.try_into().map(Self).map_err(|_| bad)
        } else {
            Err(bad)
        }
    }
}

/// Not a time that hosts' certificates may live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0:#} is no lifetime of hosts' certificates: take 10s to 168h; they are renewed at half of it")]
pub struct BadHostLifetime(SignedDuration);

/// How long the coordinator's own certificate lives; it is made anew at each start and at half of it.
pub(super) const COORDINATOR_LIFETIME: Duration = Duration::from_secs(86_400);

/// How long root and authorities live. Twenty years: their rotation is by trust items, not by running out.
const AUTHORITY_LIFETIME: Duration = Duration::from_secs(20 * 365 * 86_400);

/// A certificate could not be made.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The library refused.
    #[error("a certificate could not be made")]
    Library(#[from] rcgen::Error),
    /// A time that no certificate can hold: the clock is wrong.
    #[error("{0} is no time that a certificate can hold: is the clock right?")]
    Time(u64),
    /// There is no randomness for a serial number.
    #[error(transparent)]
    Entropy(#[from] EntropyError),
}

/// What an authority's leaves are for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Usage {
    /// Coordinators.
    Server,
    /// Hosts.
    Client,
}

impl Usage {
    const fn purpose(self) -> ExtendedKeyUsagePurpose {
        match self {
            Self::Server => ExtendedKeyUsagePurpose::ServerAuth,
            Self::Client => ExtendedKeyUsagePurpose::ClientAuth,
        }
    }

    const fn word(self) -> &'static str {
        match self {
            Self::Server => "coordinators",
            Self::Client => "hosts",
        }
    }
}

/// A host's certificate as issued: to be recorded in the store before it is given out.
#[derive(Debug, Clone)]
pub struct HostCertificate {
    /// The leaf.
    pub certificate: CertificateDer<'static>,
    /// Its serial number.
    pub serial: Serial,
    /// Its end.
    pub not_after: MeshTime,
}

impl Roots {
    /// Issues a certificate for `host` and the identity key that it proved, good for `lifetime`.
    ///
    /// # Errors
    /// [`IssueError`].
    pub fn issue_host(
        &self,
        host: HostId,
        key: &IdentityKey,
        lifetime: HostLifetime,
        env: &Environment,
    ) -> Result<HostCertificate, IssueError> {
        let now = env.clock.now();
        let serial = serial(env)?;
        let uri = SpiffeId {
            mesh: self.mesh(),
            role: Role::Host(host),
        };
        let params = leaf(Usage::Client, uri, serial, now, lifetime.get())?;
        let public = SubjectPublicKeyInfo::from_der(&to_spki(key))?;
        let certificate = params.signed_by(&public, &self.host_issuer().issuer()?)?;
        Ok(HostCertificate {
            certificate: certificate.der().clone(),
            serial,
            not_after: now.plus(lifetime.get()),
        })
    }

    /// Issues this coordinator's certificate for `key`: the chain that it shows, root included, because a joining host knows the root by
    /// its pin only.
    pub(super) fn issue_coordinator(&self, key: &SigningKey, env: &Environment) -> Result<Vec<CertificateDer<'static>>, IssueError> {
        let uri = SpiffeId {
            mesh: self.mesh(),
            role: Role::Coordinator(self.coordinator()),
        };
        let mut params = leaf(Usage::Server, uri, serial(env)?, env.clock.now(), COORDINATOR_LIFETIME)?;
        params.subject_alt_names.push(SanType::DnsName(COORDINATOR_DNS_NAME.try_into()?));
        let issuer = self.coordinator_issuer();
        let certificate = params.signed_by(&key_pair(key)?, &issuer.issuer()?)?;
        Ok(vec![
            certificate.der().clone(),
            issuer.certificate.clone(),
            self.root.certificate.clone(),
        ])
    }
}

impl Authority {
    fn issuer(&self) -> Result<Issuer<'static, KeyPair>, IssueError> {
        Ok(Issuer::from_ca_cert_der(&self.certificate, key_pair(&self.key)?)?)
    }
}

/// The root's certificate, signed by itself.
pub(super) fn root(key: &SigningKey, mesh: MeshId, serial: Serial, now: MeshTime) -> Result<CertificateDer<'static>, IssueError> {
    let params = authority_params(format!("cloison root of {mesh}"), 1, serial, now)?;
    Ok(params.self_signed(&key_pair(key)?)?.der().clone())
}

/// An authority's certificate, signed by the root and good for leaves of one role only.
pub(super) fn authority(
    root: &Authority,
    key: &SigningKey,
    mesh: MeshId,
    usage: Usage,
    serial: Serial,
    now: MeshTime,
) -> Result<CertificateDer<'static>, IssueError> {
    let mut params = authority_params(format!("cloison {} of {mesh}", usage.word()), 0, serial, now)?;
    params.extended_key_usages = vec![usage.purpose()];
    params.use_authority_key_identifier_extension = true;
    Ok(params.signed_by(&key_pair(key)?, &root.issuer()?)?.der().clone())
}

fn authority_params(name: String, path_len: u8, serial: Serial, now: MeshTime) -> Result<CertificateParams, IssueError> {
    let mut params = dated(serial, now, MeshClock::LONGEST_LEAD, AUTHORITY_LIFETIME)?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_len));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn leaf(usage: Usage, uri: SpiffeId, serial: Serial, now: MeshTime, lifetime: Duration) -> Result<CertificateParams, IssueError> {
    let early = match usage {
        Usage::Server => MeshClock::LONGEST_LEAD,
        Usage::Client => BACKDATED,
    };
    let mut params = dated(serial, now, early, lifetime)?;
    params.is_ca = IsCa::ExplicitNoCa;
    params.subject_alt_names = vec![SanType::URI(uri.to_string().try_into()?)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage.purpose()];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// Nothing but a serial number and a validity; the library's own defaults would last two thousand years.
fn dated(serial: Serial, now: MeshTime, early: Duration, lifetime: Duration) -> Result<CertificateParams, IssueError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.serial_number = Some(SerialNumber::from_slice(&serial.0));
    params.not_before = date(MeshTime(now.0.saturating_sub(early.as_secs())))?;
    params.not_after = date(now.plus(lifetime))?;
    Ok(params)
}

fn date(time: MeshTime) -> Result<OffsetDateTime, IssueError> {
    let seconds = i64::try_from(time.0).map_err(|_| IssueError::Time(time.0))?;
    OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| IssueError::Time(time.0))
}

fn key_pair(key: &SigningKey) -> Result<KeyPair, IssueError> {
    let der = key.to_pkcs8();
    Ok(KeyPair::from_pkcs8_der_and_sign_algo(
        &PrivatePkcs8KeyDer::from(der.as_slice()),
        &PKCS_ED25519,
    )?)
}

/// A random serial number that is positive and 16 bytes long in its encoding (RFC 5280 section 4.1.2.2).
pub(super) fn serial(env: &Environment) -> Result<Serial, EntropyError> {
    let mut bytes = env.random::<16>()?;
    bytes[0] = (bytes[0] & 0x3f) | 0x40;
    Ok(Serial(bytes))
}
