//! The keys on which everything rests: the trust root, the two authorities, and the key that signs views. They are made by `init`, in a
//! directory of their own, and read at each start; all but the root can be rotated ([`super::ring`]).
//!
//! The directory is 0700 and its files are 0600; looser ones are refused, because a key that others could read is not a secret any more.

use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::Arc;

use arc_swap::ArcSwap;
use cloison_proto::id::{CoordinatorId, MeshId};
use cloison_proto::key::{SigningKey, VerifyingKey};
use cloison_proto::signed::Signed;
use cloison_proto::trust::{Statement, root_pin};
use cloison_proto::version::MeshTime;
use parking_lot::Mutex;
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use zeroize::Zeroizing;

use super::folder::{Entry, Folder, Index, certificate_pem, check_mode, damaged, io_error, shown, sync_directory};
use super::issue::{self, IssueError, Usage};
use super::ring::{Held, Part, Retired, Ring, Stage};
use crate::entropy::{EntropyError, Environment};
use crate::inventory::CoordinatorAddress;

/// File names in the directory. A key's certificate has the same stem.
const IDENTITY: &str = "identity.toml";
const ROOT: &str = "root";

/// Most retired keys that are remembered: the oldest are forgotten, and are dead all the same.
const MAX_RETIRED: usize = 64;

/// Where systemd puts a service's credentials (systemd.exec(5)).
const CREDENTIALS_VARIABLE: &str = "CREDENTIALS_DIRECTORY";

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
        source: std::io::Error,
    },
    /// A rotation of the same part is under way.
    #[error("the {0} is being rotated already: wait until `cloison rotate status` says settled; both keys are good meanwhile")]
    UnderWay(Part),
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

/// The keys that can change.
#[derive(Debug, Clone)]
struct Rings {
    view: Ring<SigningKey>,
    host_issuer: Ring<Authority>,
    coordinator_issuer: Ring<Authority>,
    retired: Vec<Retired>,
}

/// All keys of one coordinator. Their `Debug` shows public parts only.
#[derive(Debug)]
pub struct Roots {
    identity: Identity,
    pub(super) root: Authority,
    rings: ArcSwap<Rings>,
    /// Where the keys are kept; nowhere in tests and the simulation.
    folder: Option<Folder>,
    /// Held while the keys change.
    turn: Mutex<()>,
    changed: watch::Sender<()>,
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
        let since = identity.created;
        let authority = |part: Part, usage| Ok::<_, RootsError>(Ring::of(part.stem(), since, root.subordinate(&identity, usage, env)?));
        let rings = Rings {
            coordinator_issuer: authority(Part::CoordinatorIssuer, Usage::Server)?,
            host_issuer: authority(Part::HostIssuer, Usage::Client)?,
            view: Ring::of(Part::SigningKey.stem(), since, signing_key(env)?),
            retired: Vec::new(),
        };
        Ok(Self::of(identity, root, rings, None))
    }

    fn of(identity: Identity, root: Authority, rings: Rings, folder: Option<Folder>) -> Self {
        Self {
            identity,
            root,
            rings: ArcSwap::from_pointee(rings),
            folder,
            turn: Mutex::default(),
            changed: watch::Sender::new(()),
        }
    }

    /// Draws new keys for `mesh` and writes them into the new directory `dir`: all of them, or none.
    ///
    /// # Errors
    /// [`RootsError::Exists`], and why nothing could be written.
    pub fn create(dir: &Path, mesh: MeshId, env: &Environment) -> Result<Self, RootsError> {
        if dir.exists() {
            return Err(RootsError::Exists { path: shown(dir) });
        }
        let mut roots = Self::generate(mesh, env)?;
        let unfinished = dir.with_extension("new");
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished).map_err(io_error(&unfinished, "removing what an interrupted init left"))?;
        }
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&unfinished)
            .map_err(io_error(&unfinished, "making the directory"))?;
        roots.write(&Folder::new(&unfinished, None))?;
        fs::rename(&unfinished, dir).map_err(io_error(dir, "putting the new keys into place"))?;
        sync_directory(dir.parent().unwrap_or(dir))?;
        roots.folder = Some(Folder::new(dir, None));
        Ok(roots)
    }

    fn write(&self, folder: &Folder) -> Result<(), RootsError> {
        let identity = toml::to_string(&self.identity);
        let identity = identity.map_err(|error| damaged(&folder.path().join(IDENTITY), error))?;
        folder.write_text(IDENTITY, &identity)?;
        folder.write_authority(ROOT, &self.root)?;
        let rings = self.rings.load();
        folder.write_authority(&rings.coordinator_issuer.current.stem, &rings.coordinator_issuer.current.key)?;
        folder.write_authority(&rings.host_issuer.current.stem, &rings.host_issuer.current.key)?;
        folder.write_key(&rings.view.current.stem, &rings.view.current.key)?;
        sync_directory(folder.path())
    }

    /// Reads the keys in `dir`. A file of it is read from systemd's credentials directory instead, if `cloison.<file name>` is there.
    ///
    /// # Errors
    /// [`RootsError::Missing`], [`RootsError::TooOpen`], [`RootsError::Damaged`].
    pub fn load(dir: &Path) -> Result<Self, RootsError> {
        Self::load_with(dir, std::env::var_os(CREDENTIALS_VARIABLE).map(Into::into))
    }

    /// As [`Roots::load`], with this directory of credentials.
    ///
    /// # Errors
    /// As [`Roots::load`].
    pub fn load_with(dir: &Path, credentials: Option<std::path::PathBuf>) -> Result<Self, RootsError> {
        if !dir.is_dir() {
            return Err(RootsError::Missing { path: shown(dir) });
        }
        check_mode(dir, 0o700)?;
        let folder = Folder::new(dir, credentials);
        let path = dir.join(IDENTITY);
        let text = folder.read(IDENTITY)?;
        let text = std::str::from_utf8(&text).map_err(|_| damaged(&path, "not text"))?;
        let identity: Identity = toml::from_str(text).map_err(|error| damaged(&path, error.message()))?;
        let index = folder.index()?.unwrap_or_default();
        let created = identity.created;
        let authority = |part, entry: &Option<Entry>| folder.ring(part, entry.as_ref(), created, Folder::load_authority);
        let rings = Rings {
            coordinator_issuer: authority(Part::CoordinatorIssuer, &index.coordinator_issuer)?,
            host_issuer: authority(Part::HostIssuer, &index.host_issuer)?,
            view: folder.ring(Part::SigningKey, index.signing_key.as_ref(), created, Folder::load_key)?,
            retired: index.retired.clone(),
        };
        let root = folder.load_authority(ROOT)?;
        for ring in [&rings.coordinator_issuer, &rings.host_issuer] {
            for held in [Some(&ring.current), ring.next.as_ref()].into_iter().flatten() {
                if !super::verify::names_as_issuer(&held.key.certificate, &root.certificate) {
                    return Err(damaged(&dir.join(format!("{}.pem", held.stem)), "not from the root beside it"));
                }
            }
        }
        Ok(Self::of(identity, root, rings, Some(folder)))
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
    pub fn view_key(&self) -> Arc<SigningKey> {
        Arc::clone(&self.rings.load().view.current.key)
    }

    /// The authority that signs hosts' certificates.
    pub(super) fn host_issuer(&self) -> Arc<Authority> {
        Arc::clone(&self.rings.load().host_issuer.current.key)
    }

    /// The authority that signs coordinators' certificates.
    pub(super) fn coordinator_issuer(&self) -> Arc<Authority> {
        Arc::clone(&self.rings.load().coordinator_issuer.current.key)
    }

    /// The certificates of all authorities whose hosts' certificates hold, the one in use first.
    pub(super) fn host_issuers(&self) -> Vec<CertificateDer<'static>> {
        let rings = self.rings.load();
        rings.host_issuer.trusted().map(|(der, _)| der.into()).collect()
    }

    /// What every host is told to trust, signed by the root. The same keys give the same bytes, so that views do not change at a restart.
    #[must_use]
    pub fn statements(&self, addresses: &[CoordinatorAddress]) -> Vec<Signed> {
        let one = |kind, value: Vec<u8>, not_before| {
            Statement {
                mesh: self.identity.mesh,
                kind,
                value,
                not_before,
            }
            .sign(&self.root.key)
        };
        let rings = self.rings.load();
        let of = |part: Part, trusted: Vec<(Vec<u8>, MeshTime)>| {
            let signed = trusted.into_iter().map(|(value, since)| one(part.kind(), value, since));
            signed.collect::<Vec<_>>()
        };
        let mut all = of(Part::HostIssuer, rings.host_issuer.trusted().collect());
        all.extend(of(Part::CoordinatorIssuer, rings.coordinator_issuer.trusted().collect()));
        all.extend(of(Part::SigningKey, rings.view.trusted().collect()));
        let kind = cloison_proto::trust::TrustKind::CoordinatorAddress;
        all.extend(addresses.iter().map(|a| one(kind, a.address.as_bytes().to_vec(), a.not_before)));
        all
    }

    // How the keys change.

    /// Wakes whenever the keys changed.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// How far a part's rotation is.
    #[must_use]
    pub fn stage(&self, part: Part) -> Stage {
        let rings = self.rings.load();
        match part {
            Part::SigningKey => rings.view.stage(),
            Part::HostIssuer => rings.host_issuer.stage(),
            Part::CoordinatorIssuer => rings.coordinator_issuer.stage(),
        }
    }

    /// The keys that nobody may trust any more, the newest last.
    #[must_use]
    pub fn retired(&self) -> Vec<Retired> {
        self.rings.load().retired.clone()
    }

    /// Whether the key in use comes from a systemd credential: the operator has to put the new one there, and to take the old one away.
    #[must_use]
    pub fn is_from_credential(&self, part: Part) -> bool {
        let rings = self.rings.load();
        let stem = match part {
            Part::SigningKey => &rings.view.current.stem,
            Part::HostIssuer => &rings.host_issuer.current.stem,
            Part::CoordinatorIssuer => &rings.coordinator_issuer.current.stem,
        };
        let folder = self.folder.as_ref();
        folder.is_some_and(|folder| folder.credential(&format!("{stem}.key")).is_some())
    }

    /// Makes a part's next key and announces it; the present one stays in use. Waits for the disk.
    ///
    /// # Errors
    /// [`RootsError::UnderWay`], and why nothing could be made or written.
    pub fn announce(&self, part: Part, env: &Environment) -> Result<(), RootsError> {
        let _turn = self.turn.lock();
        if self.stage(part) != Stage::Settled {
            return Err(RootsError::UnderWay(part));
        }
        let (since, mut rings) = (env.clock.now(), Rings::clone(&self.rings.load()));
        let stem = self
            .folder
            .as_ref()
            .map_or_else(|| part.stem().to_owned(), |folder| folder.free_stem(part));
        match part {
            Part::SigningKey => {
                let key = signing_key(env)?;
                if let Some(folder) = &self.folder {
                    folder.write_key(&stem, &key)?;
                }
                rings.view.next = Some(Held::new(stem, since, key));
            }
            Part::HostIssuer => rings.host_issuer.next = Some(self.next_authority(stem, Usage::Client, since, env)?),
            Part::CoordinatorIssuer => rings.coordinator_issuer.next = Some(self.next_authority(stem, Usage::Server, since, env)?),
        }
        self.put(rings)
    }

    fn next_authority(&self, stem: String, usage: Usage, since: MeshTime, env: &Environment) -> Result<Held<Authority>, RootsError> {
        let identity = Identity {
            created: since,
            ..self.identity
        };
        let authority = self.root.subordinate(&identity, usage, env)?;
        if let Some(folder) = &self.folder {
            folder.write_authority(&stem, &authority)?;
        }
        Ok(Held::new(stem, since, authority))
    }

    /// Begins to use a part's announced key; whether there was one.
    ///
    /// # Errors
    /// Why it could not be written down; then nothing changed.
    pub fn switch(&self, part: Part, now: MeshTime) -> Result<bool, RootsError> {
        let _turn = self.turn.lock();
        let mut rings = Rings::clone(&self.rings.load());
        let switched = match part {
            Part::SigningKey => rings.view.switched(now).map(|ring| rings.view = ring),
            Part::HostIssuer => rings.host_issuer.switched(now).map(|ring| rings.host_issuer = ring),
            Part::CoordinatorIssuer => rings.coordinator_issuer.switched(now).map(|ring| rings.coordinator_issuer = ring),
        };
        match switched {
            Some(()) => self.put(rings).map(|()| true),
            None => Ok(false),
        }
    }

    /// Ends all trust in a part's former key; whether there was one.
    ///
    /// # Errors
    /// Why it could not be written down; then nothing changed.
    pub fn retire(&self, part: Part, now: MeshTime) -> Result<bool, RootsError> {
        let _turn = self.turn.lock();
        let mut rings = Rings::clone(&self.rings.load());
        let retired = match part {
            Part::SigningKey => rings.view.retired(now, part).map(|(ring, gone)| (rings.view = ring, gone).1),
            Part::HostIssuer => rings
                .host_issuer
                .retired(now, part)
                .map(|(ring, gone)| (rings.host_issuer = ring, gone).1),
            Part::CoordinatorIssuer => {
                let retired = rings.coordinator_issuer.retired(now, part);
                retired.map(|(ring, gone)| (rings.coordinator_issuer = ring, gone).1)
            }
        };
        let Some(retired) = retired else { return Ok(false) };
        rings.retired.push(retired);
        let surplus = rings.retired.len().saturating_sub(MAX_RETIRED);
        rings.retired.drain(..surplus);
        self.put(rings).map(|()| true)
    }

    /// Keeps what changed, then works with it.
    fn put(&self, rings: Rings) -> Result<(), RootsError> {
        if let Some(folder) = &self.folder {
            let index = Index {
                signing_key: Some(Entry::of(&rings.view)),
                host_issuer: Some(Entry::of(&rings.host_issuer)),
                coordinator_issuer: Some(Entry::of(&rings.coordinator_issuer)),
                retired: rings.retired.clone(),
            };
            folder.write_index(&index)?;
            if let Err(error) = folder.remove_unnamed(&index) {
                tracing::error!(%error, "a key that is no longer one of the mesh's could not be removed: remove it by hand");
            }
        }
        self.rings.store(Arc::new(rings));
        self.changed.send_replace(());
        Ok(())
    }
}

impl Authority {
    fn root(key: SigningKey, identity: &Identity, env: &Environment) -> Result<Self, RootsError> {
        let certificate = issue::root(&key, identity.mesh, issue::serial(env)?, identity.created)?;
        Ok(Self { key, certificate })
    }

    fn subordinate(&self, identity: &Identity, usage: Usage, env: &Environment) -> Result<Self, RootsError> {
        let key = signing_key(env)?;
        let certificate = issue::authority(self, &key, identity.mesh, usage, issue::serial(env)?, identity.created)?;
        Ok(Self { key, certificate })
    }
}

fn signing_key(env: &Environment) -> Result<SigningKey, EntropyError> {
    Ok(SigningKey::from_seed(&Zeroizing::new(env.random::<32>()?)))
}
