//! The trust folder on disk: the keys' files, and the index that says which of them is what.
//!
//! A file is written under a name of its own and never changed; the index is replaced as a whole. So each step of a rotation is one rename,
//! and what a power cut leaves is either the step before or the step after. Without an index, the files are as `init` made them. A key that
//! the index does not name is not a key of the mesh: it is removed when it is found.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cloison_proto::key::SigningKey;
use cloison_proto::version::MeshTime;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::ring::{Former, Held, Part, Public, Retired, Ring};
use super::roots::{Authority, RootsError};

/// The index.
pub(super) const INDEX: &str = "rotation.toml";

/// How systemd hands a file over, in its credentials directory: this, and the file's name (systemd.exec(5), "Credentials").
const CREDENTIAL_PREFIX: &str = "cloison.";

/// The trust folder, and where systemd puts credentials that stand for files of it.
#[derive(Debug, Clone)]
pub(super) struct Folder {
    path: PathBuf,
    credentials: Option<PathBuf>,
}

/// What the index says.
#[derive(Debug, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Index {
    pub(super) signing_key: Option<Entry>,
    pub(super) host_issuer: Option<Entry>,
    pub(super) coordinator_issuer: Option<Entry>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) retired: Vec<Retired>,
}

/// What the index says of one part.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Entry {
    current: Named,
    next: Option<Named>,
    former: Option<Replaced>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    stem: String,
    since: MeshTime,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Replaced {
    public: String,
    since: MeshTime,
    replaced: MeshTime,
}

impl Entry {
    /// What the index says of a ring.
    pub(super) fn of<K: Public>(ring: &Ring<K>) -> Self {
        let named = |held: &Held<K>| Named {
            stem: held.stem.clone(),
            since: held.since,
        };
        Self {
            current: named(&ring.current),
            next: ring.next.as_ref().map(named),
            former: ring.former.as_ref().map(|former| Replaced {
                public: STANDARD.encode(&former.public),
                since: former.since,
                replaced: former.replaced,
            }),
        }
    }

    fn stems(&self) -> impl Iterator<Item = &str> {
        [Some(&self.current), self.next.as_ref()]
            .into_iter()
            .flatten()
            .map(|named| named.stem.as_str())
    }
}

impl Folder {
    /// The folder at `path`, with systemd's credentials in `credentials`.
    pub(super) fn new(path: &Path, credentials: Option<PathBuf>) -> Self {
        Self {
            path: path.into(),
            credentials,
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The index; none if there was never a rotation.
    pub(super) fn index(&self) -> Result<Option<Index>, RootsError> {
        let path = self.path.join(INDEX);
        if !path.exists() {
            return Ok(None);
        }
        let text = self.read(INDEX)?;
        let text = std::str::from_utf8(&text).map_err(|_| damaged(&path, "not text"))?;
        toml::from_str(text).map(Some).map_err(|error| damaged(&path, error.message()))
    }

    /// Replaces the index, durably.
    pub(super) fn write_index(&self, index: &Index) -> Result<(), RootsError> {
        let (path, new) = (self.path.join(INDEX), self.path.join(format!(".{INDEX}.new")));
        let text = toml::to_string(index).map_err(|error| damaged(&path, error))?;
        if new.exists() {
            fs::remove_file(&new).map_err(io_error(&new, "removing what an interrupted rotation left"))?;
        }
        write_new(&new, text.as_bytes())?;
        fs::rename(&new, &path).map_err(io_error(&path, "replacing"))?;
        sync_directory(&self.path)
    }

    /// The ring of one part: as the index says, or as `init` made it at `created`.
    pub(super) fn ring<K: Public>(
        &self,
        part: Part,
        entry: Option<&Entry>,
        created: MeshTime,
        load: impl Fn(&Self, &str) -> Result<K, RootsError>,
    ) -> Result<Ring<K>, RootsError> {
        let Some(entry) = entry else {
            return Ok(Ring::of(part.stem(), created, load(self, part.stem())?));
        };
        let held = |named: &Named| {
            Ok::<_, RootsError>(Held {
                key: load(self, checked(&self.path, part, &named.stem)?)?.into(),
                stem: named.stem.clone(),
                since: named.since,
            })
        };
        let former = entry.former.as_ref().map(|former| {
            let public = STANDARD.decode(&former.public);
            Ok::<_, RootsError>(Former {
                public: public.map_err(|error| damaged(&self.path.join(INDEX), error))?,
                since: former.since,
                replaced: former.replaced,
            })
        });
        Ok(Ring {
            current: held(&entry.current)?,
            next: entry.next.as_ref().map(held).transpose()?,
            former: former.transpose()?,
        })
    }

    /// A stem for the next key of a part, under which nothing lies.
    pub(super) fn free_stem(&self, part: Part) -> String {
        let stems = (2_u32..).map(|number| format!("{}-{number}", part.stem()));
        let taken = |stem: &String| {
            let name = |extension| format!("{stem}.{extension}");
            ["key", "pem"]
                .iter()
                .any(|extension| self.path.join(name(extension)).exists() || self.credential(&name(extension)).is_some())
        };
        stems.into_iter().find(|stem| !taken(stem)).unwrap_or_default()
    }

    /// Removes keys that the index does not name: what an interrupted rotation left, or a former key.
    pub(super) fn remove_unnamed(&self, index: &Index) -> Result<(), RootsError> {
        let entries = [
            (Part::SigningKey, &index.signing_key),
            (Part::HostIssuer, &index.host_issuer),
            (Part::CoordinatorIssuer, &index.coordinator_issuer),
        ];
        let files = fs::read_dir(&self.path).map_err(io_error(&self.path, "listing"))?;
        for file in files.flatten() {
            let name = file.file_name();
            let Some((stem, "key" | "pem")) = name.to_str().and_then(|name| name.rsplit_once('.')) else {
                continue;
            };
            let of_part = |(part, entry): &(Part, &Option<Entry>)| {
                let named = entry.as_ref().is_none_or(|entry| entry.stems().any(|known| known == stem));
                is_stem_of(*part, stem) && !named
            };
            if entries.iter().any(of_part) {
                fs::remove_file(file.path()).map_err(io_error(&file.path(), "removing a key that is no longer one"))?;
            }
        }
        sync_directory(&self.path)
    }

    /// The file that systemd hands over for this one, if it does.
    pub(super) fn credential(&self, name: &str) -> Option<PathBuf> {
        let path = self.credentials.as_ref()?.join(format!("{CREDENTIAL_PREFIX}{name}"));
        path.is_file().then_some(path)
    }

    /// The content of a file, or of the credential that stands for it.
    pub(super) fn read(&self, name: &str) -> Result<Zeroizing<Vec<u8>>, RootsError> {
        // Who may read a credential is systemd's to say, by lists of access that the mode does not show.
        if let Some(path) = self.credential(name) {
            return fs::read(&path).map(Zeroizing::new).map_err(io_error(&path, "reading"));
        }
        let path = self.path.join(name);
        if path.exists() {
            check_mode(&path, 0o600)?;
        }
        match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(damaged(&path, "it is missing")),
            other => other.map(Zeroizing::new).map_err(io_error(&path, "reading")),
        }
    }

    /// A private key.
    pub(super) fn load_key(&self, stem: &str) -> Result<SigningKey, RootsError> {
        let name = format!("{stem}.key");
        let path = self.path.join(&name);
        let pem = self.read(&name)?;
        let der = PrivatePkcs8KeyDer::from_pem_slice(&pem).map_err(|error| damaged(&path, error))?;
        let der = der.secret_pkcs8_der();
        // The seed is the end of the one form that we write; what does not come out the same is another form.
        let seed = der.last_chunk::<32>().ok_or_else(|| damaged(&path, "too short for a key"))?;
        let key = SigningKey::from_seed(seed);
        if key.to_pkcs8().as_slice() == der {
            Ok(key)
        } else {
            Err(damaged(&path, "not an Ed25519 key in PKCS #8"))
        }
    }

    /// An authority: its key and its certificate.
    pub(super) fn load_authority(&self, stem: &str) -> Result<Authority, RootsError> {
        let key = self.load_key(stem)?;
        let name = format!("{stem}.pem");
        let path = self.path.join(&name);
        let certificate = CertificateDer::from_pem_slice(&self.read(&name)?).map_err(|error| damaged(&path, error))?;
        if super::verify::key_of(&certificate) != Some(key.identity()) {
            return Err(damaged(&path, "not the certificate of the key beside it"));
        }
        Ok(Authority { key, certificate })
    }

    /// Writes a private key.
    pub(super) fn write_key(&self, stem: &str, key: &SigningKey) -> Result<(), RootsError> {
        write_new(&self.path.join(format!("{stem}.key")), key_pem(key).as_bytes())
    }

    /// Writes an authority: its key and its certificate.
    pub(super) fn write_authority(&self, stem: &str, authority: &Authority) -> Result<(), RootsError> {
        self.write_key(stem, &authority.key)?;
        write_new(
            &self.path.join(format!("{stem}.pem")),
            certificate_pem(&authority.certificate).as_bytes(),
        )
    }

    /// Writes another file, which must not be there.
    pub(super) fn write_text(&self, name: &str, text: &str) -> Result<(), RootsError> {
        write_new(&self.path.join(name), text.as_bytes())
    }
}

/// Whether a stem is one of the part's: its own, or with a number.
fn is_stem_of(part: Part, stem: &str) -> bool {
    let rest = stem.strip_prefix(part.stem());
    rest.is_some_and(|rest| rest.is_empty() || rest.strip_prefix('-').is_some_and(|n| n.parse::<u32>().is_ok()))
}

/// A stem as the index gives it: it names a file, and may name no other.
fn checked<'a>(folder: &Path, part: Part, stem: &'a str) -> Result<&'a str, RootsError> {
    if is_stem_of(part, stem) {
        Ok(stem)
    } else {
        Err(damaged(&folder.join(INDEX), "a file name that is no key's"))
    }
}

/// PEM (RFC 7468); 48 bytes of PKCS #8 fit on one line.
fn key_pem(key: &SigningKey) -> Zeroizing<String> {
    let body = Zeroizing::new(STANDARD.encode(key.to_pkcs8().as_slice()));
    Zeroizing::new(format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", *body))
}

/// A certificate in PEM.
pub(super) fn certificate_pem(certificate: &CertificateDer<'_>) -> String {
    let body = STANDARD.encode(certificate);
    let lines: String = body
        .as_bytes()
        .chunks(64)
        .map(|line| format!("{}\n", String::from_utf8_lossy(line)))
        .collect();
    format!("-----BEGIN CERTIFICATE-----\n{lines}-----END CERTIFICATE-----\n")
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

/// Makes a directory's content durable.
pub(super) fn sync_directory(dir: &Path) -> Result<(), RootsError> {
    fs::File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(io_error(dir, "making its content durable"))
}

/// A path for people.
pub(super) fn shown(path: &Path) -> String {
    path.display().to_string()
}

pub(super) fn damaged(path: &Path, problem: impl std::fmt::Display) -> RootsError {
    RootsError::Damaged {
        path: shown(path),
        problem: problem.to_string(),
    }
}

pub(super) fn io_error(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> RootsError {
    let path = shown(path);
    move |source| RootsError::Io { path, action, source }
}
