//! Where the programs under test are: next to the running test, in the same target folder.
//!
//! Cargo tells a test the path of its own crate's programs only, so the others are looked for. It does not rebuild them either: `cargo build`
//! before `cargo test` (the Makefile does) keeps them current.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

/// Names a folder that holds the programs, instead of the target folder of the running test.
const FOLDER_VARIABLE: &str = "CLOISON_PROGRAMS";

/// The path of a program of this workspace.
///
/// # Errors
/// If it has not been built.
pub fn find(name: &str) -> Result<PathBuf> {
    let folder = match std::env::var_os(FOLDER_VARIABLE) {
        Some(folder) => PathBuf::from(folder),
        None => target_folder()?,
    };
    let path = folder.join(name);
    ensure!(path.is_file(), "{} is missing: run `cargo build --workspace` first", path.display());
    Ok(path)
}

/// `target/debug`, from `target/debug/deps/TEST` or `target/debug/PROGRAM`.
pub(crate) fn target_folder() -> Result<PathBuf> {
    let own = std::env::current_exe().context("looking for this program's own path")?;
    let folder = own.parent().context("this program is in no folder")?;
    let folder = if folder.ends_with("deps") {
        folder.parent().context("`deps` is in no folder")?
    } else {
        folder
    };
    Ok(folder.to_owned())
}
