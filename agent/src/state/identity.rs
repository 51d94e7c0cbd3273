//! Who this host is: its mesh, its id and name, whom it trusts, and its certificate. Written by a join, and by every view or certificate
//! that changes some of it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cloison_proto::id::{HostId, MeshId};
use cloison_proto::key::VerifyingKey;
use cloison_proto::label::HostName;
use cloison_proto::signed::Signed;
use cloison_proto::trust::{Trust, TrustError};
use cloison_proto::version::MeshTime;
use serde::{Deserialize, Serialize};

use super::{File, StateDir, StateError};

/// The host's place in its mesh. Its file is written last by a join: where it is, the host is enrolled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    /// The mesh.
    pub mesh: MeshId,
    /// The host.
    pub host: HostId,
    /// Its name, which the coordinator or an operator gave it.
    pub name: HostName,
    /// The trust root's key, which the token pinned.
    pub root: VerifyingKey,
    /// Statements of trust, each signed by the root or by a key that another one introduces.
    pub trust: Vec<Signed>,
    /// Mesh time when these statements were taken up, as well as it was known: what a clock begins with that has nothing better.
    pub known_time: MeshTime,
    /// Where coordinators listened when this host joined (`host:port`), for as long as the statements name none.
    pub addresses: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    mesh: MeshId,
    host: HostId,
    name: HostName,
    root: VerifyingKey,
    trust: Vec<String>,
    known_time: MeshTime,
    addresses: Vec<String>,
}

impl Membership {
    /// The membership on disk; `None` if this host is not enrolled.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn load(dir: &StateDir) -> Result<Option<Self>, StateError> {
        let Some(body) = dir.read(File::Membership)? else { return Ok(None) };
        let damaged = |why: String| dir.damaged(File::Membership, why);
        let stored: Stored = serde_json::from_slice(&body).map_err(|e| damaged(e.to_string()))?;
        let item = |text: &String| {
            let bytes = STANDARD.decode(text).map_err(|e| damaged(e.to_string()))?;
            Signed::from_bytes(&bytes).map_err(|e| damaged(e.to_string()))
        };
        let trust = stored.trust.iter().map(item).collect::<Result<_, _>>()?;
        Ok(Some(Self {
            mesh: stored.mesh,
            host: stored.host,
            name: stored.name,
            root: stored.root,
            trust,
            known_time: stored.known_time,
            addresses: stored.addresses,
        }))
    }

    /// Writes it.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn store(&self, dir: &StateDir) -> Result<(), StateError> {
        let stored = Stored {
            mesh: self.mesh,
            host: self.host,
            name: self.name.clone(),
            root: self.root,
            trust: self.trust.iter().map(|item| STANDARD.encode(item.to_bytes())).collect(),
            known_time: self.known_time,
            addresses: self.addresses.clone(),
        };
        let body = serde_json::to_vec_pretty(&stored).map_err(|e| dir.damaged(File::Membership, e))?;
        dir.write(File::Membership, &body)
    }

    /// Whom this host trusts at mesh time `now`.
    ///
    /// # Errors
    /// [`TrustError`] if a statement does not hold.
    pub fn trust_at(&self, now: MeshTime) -> Result<Trust, TrustError> {
        Trust::with_items(self.mesh, self.root, &self.trust, now)
    }
}

/// DER of the host's certificate; `None` if there is none, or the file is damaged: a certificate is asked for anew by the identity key.
///
/// # Errors
/// [`StateError::Io`].
pub fn load_certificate(dir: &StateDir) -> Result<Option<Vec<u8>>, StateError> {
    match dir.read(File::Certificate) {
        Ok(body) => Ok(body.map(|b| b.to_vec())),
        Err(StateError::Damaged { path, why, .. }) => {
            tracing::warn!(path = %path.display(), why, "the certificate cannot be read; asking for a new one");
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// Writes the host's certificate.
///
/// # Errors
/// [`StateError`].
pub fn store_certificate(dir: &StateDir, der: &[u8]) -> Result<(), StateError> {
    dir.write(File::Certificate, der)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cloison_proto::key::SigningKey;
    use cloison_proto::trust::{Statement, TrustKind};

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    #[test]
    fn a_membership_reads_back_and_a_cut_one_is_an_error() -> Outcome {
        let folder = tempfile::tempdir()?;
        let dir = StateDir::open(folder.path())?;
        assert!(Membership::load(&dir)?.is_none());
        let root = SigningKey::from_seed(&[1; 32]);
        let address = Statement {
            mesh: MeshId([2; 16]),
            kind: TrustKind::CoordinatorAddress,
            value: b"192.0.2.1:7443".to_vec(),
            not_before: MeshTime(5),
        };
        let membership = Membership {
            mesh: MeshId([2; 16]),
            host: HostId([3; 16]),
            name: "db-1".parse()?,
            root: root.verifying(),
            trust: vec![address.sign(&root)],
            known_time: MeshTime(10),
            addresses: vec!["192.0.2.2:7443".into()],
        };
        membership.store(&dir)?;
        assert_eq!(Membership::load(&dir)?.as_ref(), Some(&membership));
        assert_eq!(membership.trust_at(MeshTime(10))?.addresses(), ["192.0.2.1:7443"]);
        let all = std::fs::read(dir.path_of(File::Membership))?;
        for length in 0..all.len() {
            std::fs::write(dir.path_of(File::Membership), all.get(..length).unwrap_or_default())?;
            assert!(Membership::load(&dir).is_err(), "cut at {length}");
        }
        Ok(())
    }

    #[test]
    fn a_damaged_certificate_counts_as_none() -> Outcome {
        let folder = tempfile::tempdir()?;
        let dir = StateDir::open(folder.path())?;
        store_certificate(&dir, b"der")?;
        assert_eq!(load_certificate(&dir)?.as_deref(), Some(&b"der"[..]));
        std::fs::write(dir.path_of(File::Certificate), "x")?;
        assert_eq!(load_certificate(&dir)?, None);
        Ok(())
    }
}
