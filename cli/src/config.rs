//! The configuration file: where the coordinator is, whom to trust, and the credential. Mode 0600, because it holds a secret.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::error::CliError;

/// The file's content.
#[derive(Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// The coordinator's API, like `https://10.0.0.5:7443`.
    pub(crate) url: String,
    /// The mesh's root certificate (PEM).
    pub(crate) root_certificate: String,
    /// What authorises the calls: a secret.
    pub(crate) credential: String,
}

/// Where the file is, unless `--config` or `CLOISON_CONFIG` says otherwise.
pub(crate) fn default_path() -> PathBuf {
    let base = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).filter(|p| p.is_absolute());
    let base = base.or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".config")));
    base.unwrap_or_else(|| PathBuf::from("/etc")).join("cloison/config.toml")
}

impl Config {
    /// Reads the file.
    pub(crate) fn load(path: &Path) -> Result<Self, CliError> {
        let hint = "run `cloison login`, or give the file with --config; `cloison-coordinator init` wrote one on its machine";
        let failed = |source| CliError::File {
            what: "read",
            path: path.display().to_string(),
            source,
            hint,
        };
        let mode = fs::metadata(path).map_err(failed)?.permissions().mode();
        if mode & 0o077 != 0 {
            let why = format!("others may read it (mode {:o}), and it holds a secret: chmod 600", mode & 0o777);
            return Err(CliError::Config {
                path: path.display().to_string(),
                why,
            });
        }
        let text = Zeroizing::new(fs::read_to_string(path).map_err(failed)?);
        // Only the message: the context that the parser shows could be the line with the credential.
        toml::from_str(&text).map_err(|e| CliError::Config {
            path: path.display().to_string(),
            why: e.message().to_owned(),
        })
    }

    /// Writes the file anew, for its owner only.
    pub(crate) fn save(&self, path: &Path) -> Result<(), CliError> {
        let failed = |source| CliError::File {
            what: "write",
            path: path.display().to_string(),
            source,
            hint: "choose another place with --config",
        };
        let text = toml::to_string(self).map_err(|e| CliError::Config {
            path: path.display().to_string(),
            why: e.to_string(),
        })?;
        let text = Zeroizing::new(text);
        replace(path, text.as_bytes()).map_err(failed)
    }
}

/// Writes beside the file and renames: a reader sees the old content or the new.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(".new");
    let beside = folder.join(name);
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&beside)?;
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&beside, path)
}
