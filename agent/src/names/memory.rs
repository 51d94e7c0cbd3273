//! What the agent remembers of the hosts file that it wrote: where it is, whose block is in it, and, while a write is under way, the file
//! before and after it.
//!
//! The hosts file cannot be replaced by a rename (it may be a bind mount, and keeps its inode), so that a write that is cut off leaves a
//! mixture of both. [`judge`] tells such a mixture from what somebody else wrote meanwhile; the former is completed, so that no line of it
//! is ever lost.

use std::path::PathBuf;

use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use super::block::Owner;
use crate::state::{File, StateDir, StateError};

/// What is remembered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// The hosts file with our block.
    pub path: PathBuf,
    /// Whose block it is.
    pub owner: Owner,
    /// The write under way.
    pub pending: Option<Pending>,
}

/// A write under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pending {
    #[serde(with = "text")]
    old: Vec<u8>,
    #[serde(with = "text")]
    new: Vec<u8>,
}

/// What a write that was perhaps cut off left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// The file as it was before, or as it was to be.
    Whole,
    /// A mixture of both.
    Mixed,
    /// Something else: somebody wrote since.
    Changed,
}

/// One step of a write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step<'b> {
    /// Writes these bytes at this offset.
    Write(usize, &'b [u8]),
    /// Makes the file this long.
    Length(usize),
}

impl Pending {
    /// A write that turns `old` into `new`.
    #[must_use]
    pub const fn new(old: Vec<u8>, new: Vec<u8>) -> Self {
        Self { old, new }
    }

    /// The steps, in order: one write from the first byte that differs, then the length.
    #[must_use]
    pub fn steps(&self) -> [Step<'_>; 2] {
        let same = self.old.iter().zip(&self.new).take_while(|(a, b)| a == b).count();
        [
            Step::Write(same, self.new.get(same..).unwrap_or_default()),
            Step::Length(self.new.len()),
        ]
    }

    /// The file before.
    #[must_use]
    pub fn old(&self) -> &[u8] {
        &self.old
    }

    /// The file after.
    #[must_use]
    pub fn new_content(&self) -> &[u8] {
        &self.new
    }

    /// The lines of the file before that are not in `content`.
    #[must_use]
    pub fn missing_in(&self, content: &[u8]) -> Vec<String> {
        let lines = |bytes: &[u8]| {
            bytes
                .split(|b| *b == b'\n')
                .map(<[u8]>::to_vec)
                .collect::<std::collections::BTreeSet<_>>()
        };
        let there = lines(content);
        let lost = lines(&self.old).into_iter().filter(|line| !there.contains(line));
        lost.map(|line| String::from_utf8_lossy(&line).into_owned()).collect()
    }
}

/// Tells what `content` is, after a write that may have been cut off at any byte. After a power cut the disk may have any of the pages
/// written and others not, or zeros where the file grew: each byte is the old one, the new one, or such a zero.
#[must_use]
pub fn judge(pending: &Pending, content: &[u8]) -> Left {
    if content == pending.old || content == pending.new {
        return Left::Whole;
    }
    let (old, new) = (&pending.old, &pending.new);
    let length = old.len().min(new.len())..=old.len().max(new.len());
    let at = |bytes: &[u8], i: usize, byte: u8| bytes.get(i) == Some(&byte);
    let grown = |i: usize, byte: u8| i >= old.len() && byte == 0;
    let mixed = content
        .iter()
        .enumerate()
        .all(|(i, b)| at(old, i, *b) || at(new, i, *b) || grown(i, *b));
    if length.contains(&content.len()) && mixed {
        Left::Mixed
    } else {
        Left::Changed
    }
}

impl Memory {
    /// What is remembered; nothing, if there is nothing or it is damaged: the block can be found by its markers as well.
    ///
    /// # Errors
    /// [`StateError`], if the disk fails.
    pub fn load(dir: &StateDir) -> Result<Option<Self>, StateError> {
        match dir.read(File::Hosts) {
            Ok(body) => Ok(body.and_then(|body| serde_json::from_slice(&body).ok())),
            Err(error @ StateError::Damaged { .. }) => {
                tracing::warn!(%error, "what was remembered of the hosts file is lost");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Remembers it, durably.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn store(&self, dir: &StateDir) -> Result<(), StateError> {
        let body = serde_json::to_vec(self).map_err(|e| dir.damaged(File::Hosts, e))?;
        dir.write(File::Hosts, &body)
    }
}

/// Bytes as base64.
mod text {
    use super::{Deserialize, STANDARD};
    use base64::Engine as _;
    use serde::{Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        STANDARD.decode(String::deserialize(d)?).map_err(D::Error::custom)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The file after so many bytes of the write; past the last of them, its length is set.
    pub(in crate::names) fn cut_off(pending: &Pending, bytes: usize) -> Vec<u8> {
        let mut file = pending.old.clone();
        let mut left = bytes;
        for step in pending.steps() {
            match step {
                Step::Write(at, data) => {
                    let part = data.get(..left.min(data.len())).unwrap_or_default();
                    file.resize(file.len().max(at + part.len()), 0);
                    file.splice(at..at + part.len(), part.iter().copied());
                    let Some(rest) = left.checked_sub(data.len() + 1) else {
                        return file;
                    };
                    left = rest;
                }
                Step::Length(length) => file.resize(length, 0),
            }
        }
        file
    }

    proptest! {
        #[test]
        fn a_write_that_is_cut_off_at_any_byte_is_recognised(old in "[ab\n]{0,40}", new in "[ab\n]{0,40}") {
            let pending = Pending::new(old.into_bytes(), new.into_bytes());
            for bytes in 0..60 {
                let left = judge(&pending, &cut_off(&pending, bytes));
                prop_assert!(left != Left::Changed, "after {} bytes", bytes);
            }
            prop_assert_eq!(cut_off(&pending, 60), pending.new);
        }
    }

    #[test]
    fn what_somebody_else_wrote_is_no_mixture() {
        let pending = Pending::new(b"one\ntwo\n".to_vec(), b"one\nmine\ntwo\n".to_vec());
        for other in ["one\ntwo\nthree\nfour\n", "six\nten\n", "", "one\ntwx\n"] {
            assert_eq!(judge(&pending, other.as_bytes()), Left::Changed, "{other:?}");
        }
        assert_eq!(judge(&pending, b"one\ntwo\n"), Left::Whole);
        assert_eq!(judge(&pending, b"one\nmine\n\0\0\0\0"), Left::Mixed);
        assert_eq!(pending.missing_in(b"two\n"), ["one"]);
    }
}
