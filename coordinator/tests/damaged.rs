//! Every file of the data folder, found by listing it, cut at every length and with flipped bits: a coordinator starts with what it had or
//! not at all; never with less policy, other keys, or a panic.

#[expect(dead_code, unreachable_pub, reason = "shared with other tests")]
#[path = "common/agent.rs"]
mod agent;
#[expect(dead_code, unreachable_pub, reason = "shared with other tests")]
mod common;

use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use agent::Coordinator;
use cloison_coordinator::entropy::Environment;
use cloison_coordinator::store::Store;
use cloison_coordinator::trust::Roots;
use common::Outcome;

const POLICY: &str = "version: 1
components:
  n8n: {on: app-1, attach: host}
  postgres: {on: db-1, attach: host, services: {sql: tcp/5432}}
allow:
  - n8n -> postgres:sql
";

/// Bytes between two lengths at which a large file is cut: a sector, and SQLite's pages are a multiple of it.
const SECTOR: usize = 512;

/// A file up to this size is cut and flipped at every byte.
const SMALL: usize = 4096;

fn files_below(dir: &Path) -> Outcome<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            found.append(&mut files_below(&path)?);
        } else {
            found.push(path);
        }
    }
    Ok(found)
}

/// What a start finds: the keys' fingerprint, the policy, the number of hosts.
type Found = ([u8; 32], Option<String>, usize);

async fn start(dir: &Path) -> Outcome<Found> {
    let roots = Roots::load(&dir.join("trust"))?;
    let store = Store::open(&dir.join("mesh.db"), Environment::system()).await?;
    let inventory = store.inventory();
    let found = (
        roots.root_pin(),
        inventory.policy.as_ref().map(|p| p.text.to_string()),
        inventory.hosts.len(),
    );
    store.close().await;
    Ok(found)
}

/// The folder as it was, with `name` holding `bytes`; what an earlier start left beside is gone.
fn lay_out(dir: &Path, files: &[(PathBuf, Vec<u8>)], name: &Path, bytes: &[u8]) -> Outcome {
    for path in files_below(dir)? {
        // SQLite takes its log and its index away when the last connection closes, a moment after the store.
        match std::fs::remove_file(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            removed => removed?,
        }
    }
    for (path, content) in files {
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(if path == name { bytes } else { content })?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_file_at_every_length_and_with_flipped_bits_is_what_it_was_or_refused() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mesh = Coordinator::create(dir.path()).await?;
    mesh.apply(POLICY).await?;
    mesh.enroll("db-1", 1).await?;
    mesh.stop().await?;
    let whole = start(dir.path()).await?;
    assert!(whole.1.is_some() && whole.2 == 1);
    let mut files = Vec::new();
    for path in files_below(dir.path())? {
        match std::fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            content => files.push((path, content?)),
        }
    }
    assert!(files.len() >= 4, "{:?}", files.iter().map(|(path, _)| path).collect::<Vec<_>>());
    lay_out(dir.path(), &files, Path::new("none"), &[])?;
    assert_eq!(start(dir.path()).await?, whole, "undamaged, it starts");
    let (mut tried, mut refused) = (0, 0);
    for (path, content) in &files {
        let step = if content.len() <= SMALL { 1 } else { SECTOR };
        let cut = (0..content.len()).step_by(step).map(|len| content[..len].to_vec());
        let flipped = (0..content.len()).step_by(step).map(|at| {
            let mut bytes = content.clone();
            bytes[at] ^= 0x10;
            bytes
        });
        for (case, bytes) in cut.chain(flipped).enumerate() {
            lay_out(dir.path(), &files, path, &bytes)?;
            tried += 1;
            match start(dir.path()).await {
                Ok(found) => assert_eq!(found, whole, "{} in case {case}", path.display()),
                Err(error) => {
                    assert!(!error.to_string().is_empty());
                    refused += 1;
                }
            }
        }
    }
    println!("{tried} damaged folders, {refused} refused");
    assert!(refused > files.len(), "{refused} of {tried}");
    Ok(())
}
