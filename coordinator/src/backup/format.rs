//! The backup's file.
//!
//! `cloison-backup 1\n`, the manifest's length (32 bits, big endian), the manifest (JSON), the content of each of its files in its order, and
//! the SHA-256 of all that stands before. So a file that was cut, or changed in any bit, is found before anything of it is used.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek as _, Write};
use std::path::{Component, Path};

use cloison_proto::id::MeshId;
use cloison_proto::version::{MeshTime, Version};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// The first bytes of every backup.
const MAGIC: &[u8] = b"cloison-backup 1\n";

/// Longest manifest, in bytes.
const MAX_MANIFEST: u32 = 1 << 20;

/// Most files, and the longest one beside the database, in bytes.
pub(super) const MAX_FILES: usize = 256;
pub(super) const MAX_SMALL_FILE: u64 = 1 << 20;

/// The database's name in a backup, as in a data directory.
pub(super) const DATABASE: &str = "cloison.db";
/// The configuration's.
pub(super) const CONFIG: &str = "coordinator.toml";
/// The folder of the trust roots.
pub(super) const TRUST: &str = "trust";

/// What a backup says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Which mesh.
    pub mesh: MeshId,
    /// Generation and revision of its state.
    pub version: Version,
    /// The number of the database's schema.
    pub schema: i64,
    /// Which program made it.
    pub software: String,
    /// When.
    pub made_at: MeshTime,
    /// What is in it, in order.
    pub files: Vec<Entry>,
}

/// One file of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its path in the data directory.
    pub name: String,
    /// Its length in bytes.
    pub length: u64,
    /// SHA-256 of its content, in hexadecimal digits.
    pub sha256: String,
}

/// Why a file is no sound backup, for people.
pub(super) type Problem = String;

/// Digits of a hash.
pub(super) fn hex(hash: &[u8]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether a backup may hold a file of this name: the database, the configuration, or something below the folder of keys. Nothing else, so
/// that no backup writes outside of the directory that it is restored into.
pub(super) fn is_fine_name(name: &str) -> bool {
    if name == DATABASE || name == CONFIG {
        return true;
    }
    let fine = |part: &str| {
        let known = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        !part.is_empty() && part.len() <= 128 && !part.starts_with('.') && part.bytes().all(known)
    };
    let path = Path::new(name);
    let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    let mut parts = name.split('/');
    plain && parts.next() == Some(TRUST) && (2..=4).contains(&name.split('/').count()) && parts.all(fine)
}

/// Writes a backup to `to`: each of `contents` is the content of the manifest's entry at its place.
pub(super) fn write<'a>(to: &File, manifest: &Manifest, contents: impl Iterator<Item = Box<dyn Read + 'a>>) -> io::Result<u64> {
    let text = serde_json::to_vec(manifest).map_err(io::Error::other)?;
    let length = u32::try_from(text.len()).ok().filter(|length| *length <= MAX_MANIFEST);
    let length = length.ok_or_else(|| io::Error::other("too many files"))?;
    let mut out = Hashed {
        inner: BufWriter::new(to),
        hash: Sha256::new(),
        count: 0,
    };
    out.write_all(MAGIC)?;
    out.write_all(&length.to_be_bytes())?;
    out.write_all(&text)?;
    for (entry, mut content) in manifest.files.iter().zip(contents) {
        if io::copy(&mut content, &mut out)? != entry.length {
            return Err(io::Error::other(format!("{} changed its length", entry.name)));
        }
    }
    let hash = out.hash.clone().finalize();
    out.write_all(&hash)?;
    out.flush()?;
    to.sync_all()?;
    Ok(out.count)
}

/// A backup that was read once to its end, and is what its writer wrote.
#[derive(Debug)]
pub(super) struct Proven {
    file: File,
    pub(super) manifest: Manifest,
}

impl Proven {
    /// Reads all of `file`.
    pub(super) fn read(file: File) -> Result<Self, Problem> {
        let mut input = Hashed {
            inner: BufReader::new(&file),
            hash: Sha256::new(),
            count: 0,
        };
        let manifest = manifest(&mut input)?;
        for entry in &manifest.files {
            let copied = io::copy(&mut (&mut input).take(entry.length), &mut io::sink()).map_err(said)?;
            if copied != entry.length {
                return Err("it ends in the middle".into());
            }
        }
        let expected = input.hash.clone().finalize();
        let mut found = Vec::new();
        (&mut input).take(33).read_to_end(&mut found).map_err(said)?;
        if found.as_slice() != expected.as_slice() {
            return Err("its checksum is wrong: it was cut or changed".into());
        }
        Ok(Self { file, manifest })
    }

    /// Gives each file and its content to `take`, in order, and insists that each is what the manifest says.
    pub(super) fn unpack<E>(self, mut take: impl FnMut(&Entry, &mut dyn Read) -> Result<(), E>) -> Result<Result<(), E>, Problem> {
        (&self.file).rewind().map_err(said)?;
        let mut input = BufReader::new(&self.file);
        manifest(&mut input)?;
        for entry in &self.manifest.files {
            let mut content = Hashed {
                inner: (&mut input).take(entry.length),
                hash: Sha256::new(),
                count: 0,
            };
            if let Err(error) = take(entry, &mut content) {
                return Ok(Err(error));
            }
            if content.count != entry.length || hex(&content.hash.finalize()) != entry.sha256 {
                return Err(format!("{} is not what the manifest says", entry.name));
            }
        }
        Ok(Ok(()))
    }
}

fn manifest(input: &mut impl Read) -> Result<Manifest, Problem> {
    let mut magic = [0; MAGIC.len()];
    let begun = input.read_exact(&mut magic);
    if begun.is_err() || magic != *MAGIC {
        return Err("it does not begin like one".into());
    }
    let mut length = [0; 4];
    input.read_exact(&mut length).map_err(said)?;
    let length = u32::from_be_bytes(length);
    if length > MAX_MANIFEST {
        return Err("its manifest is too long".into());
    }
    let mut text = Vec::new();
    input.take(u64::from(length)).read_to_end(&mut text).map_err(said)?;
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|error| format!("its manifest cannot be read: {error}"))?;
    let names: std::collections::BTreeSet<_> = manifest.files.iter().map(|entry| entry.name.as_str()).collect();
    let small = |entry: &Entry| entry.name == DATABASE || entry.length <= MAX_SMALL_FILE;
    let fine = manifest.files.len() <= MAX_FILES && manifest.files.iter().all(|entry| is_fine_name(&entry.name) && small(entry));
    if !fine || names.len() != manifest.files.len() || !names.contains(DATABASE) {
        return Err("it lists files that no backup has, or not those that each has".into());
    }
    Ok(manifest)
}

fn said(error: io::Error) -> Problem {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        "it ends in the middle".into()
    } else {
        error.to_string()
    }
}

/// Hashes and counts what passes.
struct Hashed<T> {
    inner: T,
    hash: Sha256,
    count: u64,
}

impl<T: Read> Read for Hashed<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.inner.read(buffer)?;
        self.hash.update(&buffer[..len]);
        self.count = self.count.saturating_add(len as u64);
        Ok(len)
    }
}

impl<T: Write> Write for Hashed<T> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let len = self.inner.write(buffer)?;
        self.hash.update(&buffer[..len]);
        self.count = self.count.saturating_add(len as u64);
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backup_names_nothing_outside_of_a_data_directory() {
        for fine in ["cloison.db", "coordinator.toml", "trust/root.key", "trust/old/1/view.pem"] {
            assert!(is_fine_name(fine), "{fine}");
        }
        let bad = [
            "",
            "lock",
            "reserve",
            "trust",
            "trust/",
            "trust//a",
            "trust/../x",
            "../trust/a",
            "/trust/a",
            "trust/.a",
            "trust/a b",
            "trust/./a",
            "trust/a/b/c/d",
            "restoring/a",
            "cloison.db-wal",
            "trust\\a",
        ];
        for bad in bad {
            assert!(!is_fine_name(bad), "{bad}");
        }
    }
}
