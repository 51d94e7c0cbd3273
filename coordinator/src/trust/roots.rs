//! The keys on which everything rests: the trust root, the two authorities, and the key that signs views. They are made once, by `init`,
//! in a directory of their own, and read at each start.
//!
//! The directory is 0700 and its files are 0600; looser ones are refused, because a key that others could read is not a secret any more.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cloison_proto::id::{CoordinatorId, MeshId};
use cloison_proto::key::{SigningKey, VerifyingKey};
use cloison_proto::signed::Signed;
use cloison_proto::trust::{Statement, TrustKind, root_pin};
use cloison_proto::version::MeshTime;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::issue::{self, IssueError, Usage};
use crate::entropy::{EntropyError, Environment};
use crate::inventory::CoordinatorAddress;

/// File names in the directory. A key's certificate has the same stem.
const IDENTITY: &str = "identity.toml";
const ROOT: &str = "root";
const COORDINATOR_ISSUER: &str = "coordinator-issuer";
const HOST_ISSUER: &str = "host-issuer";
const VIEW: &str = "view";

/// Why the trust roots could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum RootsError {
    /// There are none.
    #[error("{path} does not exist: run `cloison-coordinator init` first, or name the directory that it made")]
    Missing {
        /// The directory.
        path: String,
    },
    /// There are some already.
    #[error("{path} exists already: its keys are never overwritten")]
    Exists {
        /// The directory.
        path: String,
    },
    /// Others than the owner may read or write it.
    #[error("{path} has mode {mode:o}: others could read its keys; make sure that nobody did, then `chmod {wanted:o} {path}`")]
    TooOpen {
        /// The file or directory.
        path: String,
        /// Its permission bits.
        mode: u32,
        /// What they should be.
        wanted: u32,
    },
    /// Not what `init` wrote.
    #[error("{path} is not what init wrote ({problem}): restore it from a backup of the data directory")]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
    /// It cannot be read or written.
    #[error("{path}: {action} failed")]
    Io {
        /// The file or directory.
        path: String,
        /// What was tried.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no randomness to make keys of.
    #[error(transparent)]
    Entropy(#[from] EntropyError),
    /// A certificate could not be made.
    #[error(transparent)]
    Issue(#[from] IssueError),
}

/// Who this coordinator is.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Identity {
    mesh: MeshId,
    coordinator: CoordinatorId,
    /// When the roots were made: from when on they count.
    created: MeshTime,
}

/// An authority: its key and its certificate.
#[derive(Debug)]
pub(super) struct Authority {
    pub(super) key: SigningKey,
    pub(super) certificate: CertificateDer<'static>,
}

/// All keys of one coordinator. Their `Debug` shows public parts only.
#[derive(Debug)]
pub struct Roots {
    identity: Identity,
    pub(super) root: Authority,
    pub(super) coordinator_issuer: Authority,
    pub(super) host_issuer: Authority,
    view: SigningKey,
}

impl Roots {
    /// Draws new keys for `mesh`, without writing them anywhere: for tests, the simulation, and [`Roots::create`].
    ///
    /// # Errors
    /// [`RootsError::Entropy`], [`RootsError::Issue`].
    pub fn generate(mesh: MeshId, env: &Environment) -> Result<Self, RootsError> {
        let identity = Identity {
            mesh,
            coordinator: CoordinatorId(env.random()?),
            created: env.clock.now(),
        };
        let root = Authority::root(signing_key(env)?, &identity, env)?;
        Ok(Self {
            coordinator_issuer: root.subordinate(signing_key(env)?, &identity, Usage::Server, env)?,
            host_issuer: root.subordinate(signing_key(env)?, &identity, Usage::Client, env)?,
            view: signing_key(env)?,
            root,
            identity,
        })
    }

    /// Draws new keys for `mesh` and writes them into the new directory `dir`: all of them, or none.
    ///
    /// # Errors
    /// [`RootsError::Exists`], and why nothing could be written.
    pub fn create(dir: &Path, mesh: MeshId, env: &Environment) -> Result<Self, RootsError> {
        if dir.exists() {
            return Err(RootsError::Exists { path: shown(dir) });
        }
        let roots = Self::generate(mesh, env)?;
        let unfinished = dir.with_extension("new");
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished).map_err(io_error(&unfinished, "removing what an interrupted init left"))?;
        }
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&unfinished)
            .map_err(io_error(&unfinished, "making the directory"))?;
        roots.write(&unfinished)?;
        fs::rename(&unfinished, dir).map_err(io_error(dir, "putting the new keys into place"))?;
        sync_directory(dir.parent().unwrap_or(dir))?;
        Ok(roots)
    }

    fn write(&self, dir: &Path) -> Result<(), RootsError> {
        let identity = toml::to_string(&self.identity);
        let identity = identity.map_err(|error| RootsError::Damaged {
            path: shown(&dir.join(IDENTITY)),
            problem: error.to_string(),
        })?;
        write_new(&dir.join(IDENTITY), identity.as_bytes())?;
        for (stem, authority) in [
            (ROOT, &self.root),
            (COORDINATOR_ISSUER, &self.coordinator_issuer),
            (HOST_ISSUER, &self.host_issuer),
        ] {
            write_new(&key_path(dir, stem), key_pem(&authority.key).as_bytes())?;
            write_new(&certificate_path(dir, stem), certificate_pem(&authority.certificate).as_bytes())?;
        }
        write_new(&key_path(dir, VIEW), key_pem(&self.view).as_bytes())?;
        sync_directory(dir)
    }

    /// Reads the keys that [`Roots::create`] wrote into `dir`.
    ///
    /// # Errors
    /// [`RootsError::Missing`], [`RootsError::TooOpen`], [`RootsError::Damaged`].
    pub fn load(dir: &Path) -> Result<Self, RootsError> {
        if !dir.is_dir() {
            return Err(RootsError::Missing { path: shown(dir) });
        }
        check_mode(dir, 0o700)?;
        let path = dir.join(IDENTITY);
        let text = read(&path)?;
        let text = std::str::from_utf8(&text).map_err(|_| damaged(&path, "not text"))?;
        let identity: Identity = toml::from_str(text).map_err(|error| damaged(&path, error.message()))?;
        let roots = Self {
            root: Authority::load(dir, ROOT)?,
            coordinator_issuer: Authority::load(dir, COORDINATOR_ISSUER)?,
            host_issuer: Authority::load(dir, HOST_ISSUER)?,
            view: load_key(&key_path(dir, VIEW))?,
            identity,
        };
        for (stem, authority) in [(COORDINATOR_ISSUER, &roots.coordinator_issuer), (HOST_ISSUER, &roots.host_issuer)] {
            if !super::verify::names_as_issuer(&authority.certificate, &roots.root.certificate) {
                return Err(damaged(&certificate_path(dir, stem), "not from the root beside it"));
            }
        }
        Ok(roots)
    }

    /// The mesh that the keys speak for.
    #[must_use]
    pub const fn mesh(&self) -> MeshId {
        self.identity.mesh
    }

    /// This coordinator.
    #[must_use]
    pub const fn coordinator(&self) -> CoordinatorId {
        self.identity.coordinator
    }

    /// The root's public key.
    #[must_use]
    pub fn root_key(&self) -> VerifyingKey {
        self.root.key.verifying()
    }

    /// What enrollment tokens pin.
    #[must_use]
    pub fn root_pin(&self) -> [u8; 32] {
        root_pin(&self.root_key())
    }

    /// The root's certificate, for the CLI's configuration.
    #[must_use]
    pub fn root_pem(&self) -> String {
        certificate_pem(&self.root.certificate)
    }

    /// The root's certificate.
    #[must_use]
    pub const fn root_certificate(&self) -> &CertificateDer<'static> {
        &self.root.certificate
    }

    /// The key that signs views and leases.
    #[must_use]
    pub const fn view_key(&self) -> &SigningKey {
        &self.view
    }

    /// What every host is told to trust, signed by the root. The same input gives the same bytes, so that views do not change at a restart.
    #[must_use]
    pub fn statements(&self, addresses: &[CoordinatorAddress]) -> Vec<Signed> {
        let one = |kind, value: &[u8], not_before| {
            Statement {
                mesh: self.identity.mesh,
                kind,
                value: value.to_vec(),
                not_before,
            }
            .sign(&self.root.key)
        };
        let since = self.identity.created;
        let fixed = [
            one(TrustKind::HostIssuer, &self.host_issuer.certificate, since),
            one(TrustKind::CoordinatorIssuer, &self.coordinator_issuer.certificate, since),
            one(TrustKind::ViewSigner, self.view.verifying().as_bytes(), since),
        ];
        let addresses = addresses
            .iter()
            .map(|a| one(TrustKind::CoordinatorAddress, a.address.as_bytes(), a.not_before));
        fixed.into_iter().chain(addresses).collect()
    }
}

impl Authority {
    fn root(key: SigningKey, identity: &Identity, env: &Environment) -> Result<Self, RootsError> {
        let certificate = issue::root(&key, identity.mesh, issue::serial(env)?, identity.created)?;
        Ok(Self { key, certificate })
    }

    fn subordinate(&self, key: SigningKey, identity: &Identity, usage: Usage, env: &Environment) -> Result<Self, RootsError> {
        let certificate = issue::authority(self, &key, identity.mesh, usage, issue::serial(env)?, identity.created)?;
        Ok(Self { key, certificate })
    }

    fn load(dir: &Path, stem: &str) -> Result<Self, RootsError> {
        let key = load_key(&key_path(dir, stem))?;
        let path = certificate_path(dir, stem);
        let certificate = CertificateDer::from_pem_slice(&read(&path)?).map_err(|error| damaged(&path, error))?;
        if super::verify::key_of(&certificate) != Some(key.identity()) {
            return Err(damaged(&path, "not the certificate of the key beside it"));
        }
        Ok(Self { key, certificate })
    }
}

fn signing_key(env: &Environment) -> Result<SigningKey, EntropyError> {
    Ok(SigningKey::from_seed(&Zeroizing::new(env.random::<32>()?)))
}

fn key_path(dir: &Path, stem: &str) -> PathBuf {
    dir.join(format!("{stem}.key"))
}

fn certificate_path(dir: &Path, stem: &str) -> PathBuf {
    dir.join(format!("{stem}.pem"))
}

/// PEM (RFC 7468); 48 bytes of PKCS #8 fit on one line.
fn key_pem(key: &SigningKey) -> Zeroizing<String> {
    let body = Zeroizing::new(STANDARD.encode(key.to_pkcs8().as_slice()));
    Zeroizing::new(format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", *body))
}

fn certificate_pem(certificate: &CertificateDer<'_>) -> String {
    let body = STANDARD.encode(certificate);
    let lines: String = body
        .as_bytes()
        .chunks(64)
        .map(|line| format!("{}\n", String::from_utf8_lossy(line)))
        .collect();
    format!("-----BEGIN CERTIFICATE-----\n{lines}-----END CERTIFICATE-----\n")
}

fn load_key(path: &Path) -> Result<SigningKey, RootsError> {
    let pem = Zeroizing::new(read(path)?);
    let der = PrivatePkcs8KeyDer::from_pem_slice(&pem).map_err(|error| damaged(path, error))?;
    let der = der.secret_pkcs8_der();
    // The seed is the end of the one form that we write; what does not come out the same is another form.
    let seed = der.last_chunk::<32>().ok_or_else(|| damaged(path, "too short for a key"))?;
    let key = SigningKey::from_seed(seed);
    if key.to_pkcs8().as_slice() == der {
        Ok(key)
    } else {
        Err(damaged(path, "not an Ed25519 key in PKCS #8"))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, RootsError> {
    if path.exists() {
        check_mode(path, 0o600)?;
    }
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(damaged(path, "it is missing")),
        other => other.map_err(io_error(path, "reading")),
    }
}

/// Refuses what group or others may touch.
pub(crate) fn check_mode(path: &Path, wanted: u32) -> Result<(), RootsError> {
    let mode = fs::metadata(path).map_err(io_error(path, "looking at its mode"))?.mode() & 0o777;
    if mode & 0o077 == 0 {
        Ok(())
    } else {
        Err(RootsError::TooOpen {
            path: shown(path),
            mode,
            wanted,
        })
    }
}

fn write_new(path: &Path, content: &[u8]) -> Result<(), RootsError> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(io_error(path, "creating"))?;
    file.write_all(content)
        .and_then(|()| file.sync_all())
        .map_err(io_error(path, "writing"))
}

fn sync_directory(dir: &Path) -> Result<(), RootsError> {
    fs::File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(io_error(dir, "making its content durable"))
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn damaged(path: &Path, problem: impl std::fmt::Display) -> RootsError {
    RootsError::Damaged {
        path: shown(path),
        problem: problem.to_string(),
    }
}

fn io_error(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> RootsError {
    let path = shown(path);
    move |source| RootsError::Io { path, action, source }
}
