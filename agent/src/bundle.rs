//! `debug bundle`: what somebody who helps needs to see, in one tar file, and nothing that has to stay here.
//!
//! What goes in is put together field by field from typed values ([`contents`]): no file of the state directory and no configuration file is
//! copied, so that what they hold besides is left behind. Then every text goes through [`redact`], which knows this host's private keys and
//! the form of tokens and credentials, in case one of them got into a log line after all. It holds what this host knows of the mesh, which
//! is its own view.

pub mod contents;
pub mod redact;

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use redact::Redactor;

/// Longest entry, in bytes; of longer ones the end is kept.
const MAX_ENTRY: usize = 4 * 1024 * 1024;

/// One file of the bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: &'static str,
    /// What it says.
    pub text: String,
}

/// Writes the entries, redacted, into a new tar file that only its owner can read. Returns how many secrets were taken out.
///
/// # Errors
/// The system's; also if the file is there already.
pub fn write(to: &Path, entries: &[Entry], redactor: &Redactor) -> io::Result<usize> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut taken_out = 0;
    for entry in entries {
        let (text, count) = redactor.clean(&entry.text);
        taken_out += count;
        let bytes = text.as_bytes();
        let bytes = bytes.get(bytes.len().saturating_sub(MAX_ENTRY)..).unwrap_or_default();
        let mut header = tar::Header::new_gnu();
        header.set_size(u64::try_from(bytes.len()).map_err(io::Error::other)?);
        header.set_mode(0o600);
        header.set_cksum();
        tar.append_data(&mut header, format!("cloison-bundle/{}", entry.name), bytes)?;
    }
    let bytes = tar.into_inner()?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    Ok(taken_out)
}
