//! Seeds of the fuzz targets: what was thought of by hand, and where others went wrong.
//!
//! They are committed as files below `fuzz-corpus/`, one folder for each target, together with what discovery finds; the test `fuzz_replay`
//! runs every file, and everything near it, through the body of its target. After a change of a format, `cargo run -p cloison-tests
//! --example fuzz-seeds` writes them anew.

mod frame;
mod packet;
mod policy;
mod token;
mod view;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// Files by name.
pub type Seeds = BTreeMap<String, Vec<u8>>;

/// What can be fuzzed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The parser of inner packets, beside a second one.
    Packet,
    /// The frames of a link, and the messages in them.
    Frame,
    /// The text of an enrollment token.
    Token,
    /// The policy language.
    Policy,
    /// A view as an agent has it on disk.
    View,
}

impl Target {
    /// Every target.
    pub const ALL: [Self; 5] = [Self::Packet, Self::Frame, Self::Token, Self::Policy, Self::View];

    /// The target's name, of its folder and of its executable.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Packet => "packet",
            Self::Frame => "frame",
            Self::Token => "token",
            Self::Policy => "policy",
            Self::View => "view",
        }
    }

    /// The folder of the committed inputs.
    #[must_use]
    pub fn folder(self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz-corpus").join(self.name())
    }

    /// The seeds as they are made here.
    ///
    /// # Errors
    /// If the project's own types refuse what a seed is made of.
    pub fn seeds(self) -> Result<Seeds> {
        match self {
            Self::Packet => packet::seeds(),
            Self::Frame => frame::seeds(),
            Self::Token => token::seeds(),
            Self::Policy => Ok(policy::seeds()),
            Self::View => view::seeds(),
        }
        .with_context(|| format!("seeds of {}", self.name()))
    }

    /// The committed inputs.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn committed(self) -> Result<Seeds> {
        let mut found = Seeds::new();
        for entry in std::fs::read_dir(self.folder()).with_context(|| self.folder().display().to_string())? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).context("a file name")?;
            found.insert(name.to_owned(), std::fs::read(&path)?);
        }
        Ok(found)
    }

    /// Writes the seeds to their folder; what else is there stays.
    ///
    /// # Errors
    /// If a seed cannot be made or written.
    pub fn write(self) -> Result<usize> {
        let folder = self.folder();
        std::fs::create_dir_all(&folder)?;
        let seeds = self.seeds()?;
        for (name, bytes) in &seeds {
            std::fs::write(folder.join(name), bytes)?;
        }
        Ok(seeds.len())
    }
}

/// Adds a seed under a name that no other has.
fn add(seeds: &mut Seeds, name: impl Into<String>, bytes: impl Into<Vec<u8>>) {
    let name = name.into();
    let old = seeds.insert(name.clone(), bytes.into());
    assert!(old.is_none(), "two seeds named {name}");
}
