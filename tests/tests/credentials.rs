//! Credentials of two kinds, with the real programs on loopback: what `cloison verify credentials` ends with while something old still works,
//! and a coordinator whose private keys systemd hands over.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cloison_agent::control::connection::{self, Attempt, Frames};
use cloison_agent::control::verifier::Anchors;
use cloison_agent::enroll;
use cloison_agent::state::StateDir;
use cloison_agent::state::clock::wall_now;
use cloison_agent::state::identity::{Membership, load_certificate};
use cloison_agent::state::keys::HostKeys;
use cloison_proto::api::{CredentialReport, CredentialSummary, RotationList};
use cloison_proto::control::agent::{AgentMessage, Hello};
use cloison_proto::version::MeshTime;
use cloison_tests::lab::process::{self, Finished};
use cloison_tests::lab::solo::{Running, Solo};
use cloison_tests::lab::{programs, wait_for};

const READY: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(20);

/// All that is checked is dead.
const DEAD: Option<i32> = Some(0);
/// Something is alive, or nobody can prove that it is not.
const DIFFERS: Option<i32> = Some(2);

fn served(solo: &Solo, credentials: Option<&Path>) -> Result<Running> {
    let mut running = solo.start(|command| {
        command.envs(credentials.map(|folder| ("CREDENTIALS_DIRECTORY", folder)));
    })?;
    ensure!(running.ready(READY)?.is_some(), "{}", running.log());
    Ok(running)
}

/// The operator's command line, with the configuration that `init` wrote into `folder`.
fn cli(folder: &Path, arguments: &[&str]) -> Result<Finished> {
    let mut command = Command::new(programs::find("cloison")?);
    command
        .arg("--config")
        .arg(folder.join("cli.toml"))
        .args(["-o", "json"])
        .args(arguments);
    process::run(command, SOON)
}

/// The answer of `cloison verify credentials` about a credential in a file, which has to end with `code`.
fn verify(folder: &Path, former: &Path, code: Option<i32>) -> Result<CredentialReport> {
    let answer = cli(folder, &["verify", "credentials", "--former", &former.display().to_string()])?;
    ensure!(answer.status.code() == code, "{answer:?}");
    Ok(serde_json::from_str(&answer.stdout)?)
}

/// What the report says about a credential in a file.
fn state_of(report: &CredentialReport, former: &Path) -> Option<String> {
    let name = former.display().to_string();
    report.checks.iter().find(|check| check.id == name).map(|check| check.state.clone())
}

#[test]
fn verify_credentials_ends_with_two_as_long_as_a_former_credential_works() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let solo = Solo::init(folder, &[])?;
    let _running = served(&solo, None)?;
    let nothing = cli(folder, &["verify", "credentials"])?;
    ensure!(nothing.status.code() == DEAD, "{nothing:?}");

    let former = folder.join("former");
    let made = cli(folder, &["credential", "create", "--name", "old", "--scope", "read"])?
        .ok()?
        .json()?;
    std::fs::write(&former, made["credential"].as_str().context("no credential")?)?;
    let id = made["id"].as_str().context("no id")?;
    let report = verify(folder, &former, DIFFERS)?;
    ensure!(
        report.alive == 1 && state_of(&report, &former).as_deref() == Some("alive"),
        "{report:?}"
    );
    // Replaced, and good for a while longer.
    cli(folder, &["credential", "rotate", id, "--overlap", "1h"])?.ok()?;
    let report = verify(folder, &former, DIFFERS)?;
    ensure!(report.alive == 1, "{report:?}");
    cli(folder, &["credential", "revoke", id])?.ok()?;
    let report = verify(folder, &former, DEAD)?;
    ensure!(
        report.alive == 0 && state_of(&report, &former).as_deref() == Some("dead"),
        "{report:?}"
    );
    // The coordinator says the same of it by its id.
    let all = cli(folder, &["credential", "list"])?.ok()?.json()?;
    let all: Vec<CredentialSummary> = serde_json::from_value(all["credentials"].clone())?;
    ensure!(all.iter().any(|c| c.id.to_string() == id && c.revoked_at.is_some()), "{all:?}");
    ensure!(
        report.checks.iter().any(|check| check.id == id && check.state == "dead"),
        "{report:?}"
    );
    Ok(())
}

/// Enrolls a host with its state in `state`.
async fn enrolled(solo: &Solo, folder: &Path, state: &Path) -> Result<()> {
    let made = cli(folder, &["token", "create"])?.ok()?.json()?;
    let token = made["token"].as_str().context("no token")?;
    let joined = enroll::join(&StateDir::open(state)?, token, &[solo.address().to_string()], wall_now()).await;
    joined.map(drop).context("joining")
}

/// A link of a host that says hello, and acknowledges nothing.
async fn mute_link(solo: &Solo, state: &Path) -> Result<Frames> {
    let dir = StateDir::open(state)?;
    let us = Membership::load(&dir)?.context("no member")?;
    let keys = HostKeys::load(&dir)?.context("no keys")?;
    let certificate = load_certificate(&dir)?.context("no certificate")?;
    let attempt = Attempt {
        mesh: us.mesh,
        anchors: Anchors::of(&us.trust_at(MeshTime(wall_now().0))?),
        wall: wall_now(),
        past: us.known_time,
    };
    let mut frames = connection::link(&solo.address().to_string(), attempt, &keys.identity, &certificate).await?;
    let hello = Hello {
        software: "test".into(),
        version: None,
        state_hash: None,
        incarnation: 1,
        endpoints: Vec::new(),
    };
    frames.send(&AgentMessage::from(hello).to_frame()).await?;
    Ok(frames)
}

fn rotations(folder: &Path) -> Result<RotationList> {
    Ok(serde_json::from_str(&cli(folder, &["rotate", "status"])?.ok()?.stdout)?)
}

fn wait_until_settled(folder: &Path) -> Result<()> {
    wait_for("the rotation to be over", READY, || {
        let all = rotations(folder)?;
        Ok(all.rotations.iter().all(|rotation| rotation.stage == "settled").then_some(()))
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verify_credentials_ends_with_two_as_long_as_a_linked_host_may_trust_a_former_key() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let solo = Solo::init(folder, &["--lease", "10s"])?;
    let _running = served(&solo, None)?;
    let state = folder.join("host");
    enrolled(&solo, folder, &state).await?;
    let link = mute_link(&solo, &state).await?;
    cli(folder, &["rotate", "signing-key"])?.ok()?;
    wait_until_settled(folder)?;
    let answer = cli(folder, &["verify", "credentials"])?;
    let report: CredentialReport = serde_json::from_str(&answer.stdout)?;
    ensure!(
        answer.status.code() == DIFFERS && report.alive == 0 && report.unproven == 1,
        "{report:?}"
    );
    link.close("gone").await;
    // Its lease ends, and with it whatever it trusts.
    wait_for("proof that the former key is dead", SOON, || {
        Ok((cli(folder, &["verify", "credentials"])?.status.code() == DEAD).then_some(()))
    })
}

/// Makes a credential of a key's file, as an operator does, and gives where it is.
fn hand_over(trust: &Path, credentials: &Path, key: &str) -> Result<PathBuf> {
    let to = credentials.join(format!("cloison.{key}"));
    std::fs::rename(trust.join(key), &to).with_context(|| format!("moving {key}"))?;
    Ok(to)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_keys_of_a_coordinator_come_from_systemd_credentials_and_rotate() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let solo = Solo::init(folder, &["--lease", "10s"])?;
    let (trust, credentials) = (solo.data().join("trust"), folder.join("credentials"));
    std::fs::create_dir(&credentials)?;
    for key in ["root.key", "view.key", "host-issuer.key", "coordinator-issuer.key"] {
        hand_over(&trust, &credentials, key)?;
    }
    let refused = solo.command(&["serve", "--listen", &solo.address().to_string()])?.refused()?;
    ensure!(
        refused.status.code() == Some(78) && refused.stderr.contains("it is missing"),
        "{refused:?}"
    );

    let running = served(&solo, Some(&credentials))?;
    ensure!(rotations(folder)?.rotations.iter().all(|rotation| rotation.from_credential));
    enrolled(&solo, folder, &folder.join("host")).await?;
    // The next key is the trust folder's, until the operator hands it over as well.
    cli(folder, &["rotate", "signing-key"])?.ok()?;
    wait_until_settled(folder)?;
    let signing = |all: &RotationList| all.rotations.iter().any(|r| r.what == "signing-key" && r.from_credential);
    ensure!(trust.join("view-2.key").is_file() && !signing(&rotations(folder)?));
    drop(running);
    hand_over(&trust, &credentials, "view-2.key")?;
    std::fs::remove_file(credentials.join("cloison.view.key"))?;
    let running = served(&solo, Some(&credentials))?;
    ensure!(signing(&rotations(folder)?));
    enrolled(&solo, folder, &folder.join("other")).await?;
    drop(running);
    // Half a key is no key.
    let view = credentials.join("cloison.view-2.key");
    std::fs::write(&view, std::fs::read(&view)?.get(..40).unwrap_or_default())?;
    let mut refused = solo.start(|command| {
        command.env("CREDENTIALS_DIRECTORY", &credentials);
    })?;
    ensure!(refused.end(SOON)?.code() == Some(78), "{}", refused.log());
    Ok(())
}
