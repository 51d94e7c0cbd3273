//! Small libraries in C (`tests/shim`) that are loaded before a program under test, and stand between it and the C library: a clock that is
//! wrong, a disk that fails. Each is compiled once, by the machine's `cc`, beside the programs of the workspace.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};

use super::process;

/// How long the compiler has.
const COMPILE_LIMIT: Duration = Duration::from_secs(60);

/// Compiles `tests/shim/NAME.c` unless that was done since it was changed, and gives the library, for `LD_PRELOAD`.
///
/// # Errors
/// If there is no such file, no `cc`, or the compiler refuses.
pub fn build(name: &str) -> Result<PathBuf> {
    /// A lock of files does not hold between threads that share the file.
    static BUILDING: Mutex<()> = Mutex::new(());
    let _here = BUILDING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("shim").join(format!("{name}.c"));
    let program = std::env::current_exe().context("looking for this program's own path")?;
    let folder = program.parent().context("this program is in no folder")?;
    let library = folder.join(format!("libcloison_test_{name}.so"));
    // Suites run side by side.
    let guard = std::fs::File::create(folder.join(format!(".{name}.shim-lock")))?;
    flock(&guard, FlockOperation::LockExclusive)?;
    let changed = |path: &Path| std::fs::metadata(path).and_then(|found| found.modified()).ok();
    let wanted = changed(&source).with_context(|| format!("there is no {}", source.display()))?;
    if changed(&library).is_some_and(|made| made > wanted) {
        return Ok(library);
    }
    let half = library.with_extension("so.new");
    let mut compile = Command::new("cc");
    compile.args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o"]);
    compile.arg(&half).arg(&source).arg("-ldl");
    process::run(compile, COMPILE_LIMIT)?.ok()?;
    std::fs::rename(&half, &library).with_context(|| format!("putting {} in its place", library.display()))?;
    Ok(library)
}
