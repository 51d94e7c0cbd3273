//! The coordinator as a service: what it tells systemd, who may share its data directory, what it does on a full disk, and how soon it serves.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cloison_agent::control::connection::{self, Attempt};
use cloison_agent::control::verifier::Anchors;
use cloison_agent::enroll;
use cloison_agent::state::StateDir;
use cloison_agent::state::clock::wall_now;
use cloison_agent::state::identity::{Membership, load_certificate};
use cloison_agent::state::keys::HostKeys;
use cloison_coordinator::audit::{Actor, Context as AuditContext};
use cloison_coordinator::entropy::Environment;
use cloison_coordinator::store::{Redemption, Store, TokenSpec};
use cloison_proto::control::agent::{AgentMessage, Hello};
use cloison_proto::control::coordinator::CoordinatorMessage;
use cloison_proto::key::{SigningKey, WgPrivateKey};
use cloison_proto::version::MeshTime;
use cloison_tests::lab::process;
use cloison_tests::lab::solo::{Api, Running, Solo};
use cloison_tests::lab::{programs, wait_for};
use serde_json::{Value, json};

const READY: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(20);
const ACTOR: AuditContext = AuditContext::of(Actor::Local);

fn served(solo: &Solo) -> Result<Running> {
    let mut running = solo.start(|_| {})?;
    ensure!(running.ready(READY)?.is_some(), "{}", running.log());
    Ok(running)
}

/// Waits for a word to systemd.
fn hear(running: &Running, word: &str) -> Result<String> {
    wait_for(&format!("{word} for systemd"), SOON, || {
        Ok(running.heard(Duration::from_millis(50))?.filter(|text| text.contains(word)))
    })
}

#[test]
fn systemd_hears_when_it_serves_that_it_is_alive_and_that_it_stops() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let solo = Solo::init(folder.path(), &[])?;
    let mut running = solo.start(|command| {
        command.env("WATCHDOG_USEC", "2000000");
    })?;
    ensure!(hear(&running, "READY=1")?.contains("STATUS=mesh_"));
    hear(&running, "WATCHDOG=1")?;
    hear(&running, "WATCHDOG=1")?;
    // Somebody keeps the database from being written to: it hangs, and says nothing.
    let mut sqlite = Command::new("sqlite3");
    sqlite
        .arg(solo.data().join("cloison.db"))
        .stdin(Stdio::piped())
        .stdout(Stdio::null());
    let mut sqlite = sqlite.spawn().context("starting sqlite3 (tests/scripts/setup.sh installs it)")?;
    let mut input = sqlite.stdin.take().context("no input")?;
    std::io::Write::write_all(&mut input, b".timeout 5000\nBEGIN IMMEDIATE;\n")?;
    wait_for("silence for as long as the watchdog waits", SOON, || {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(2) {
            if running
                .heard(Duration::from_millis(50))?
                .is_some_and(|text| text.contains("WATCHDOG=1"))
            {
                return Ok(None);
            }
        }
        Ok(Some(()))
    })?;
    drop(input);
    sqlite.wait()?;
    hear(&running, "WATCHDOG=1")?;
    running.terminate()?;
    hear(&running, "STOPPING=1")?;
    ensure!(running.end(SOON)?.success(), "{}", running.log());
    Ok(())
}

#[test]
fn one_data_directory_has_one_coordinator() -> Result<()> {
    let (folder, other) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let (solo, foreign) = (Solo::init(folder.path(), &[])?, Solo::init(other.path(), &[])?);
    let (ours, theirs) = (
        folder.path().join("b").display().to_string(),
        other.path().join("b").display().to_string(),
    );
    foreign.command(&["backup", "--to", &theirs])?.ok()?;
    let running = served(&solo)?;
    solo.command(&["backup", "--to", &ours])?.ok()?;
    for (arguments, why) in [
        (vec!["serve", "--listen", "127.0.0.1:1"], "in use by another"),
        (vec!["restore", &ours], "in use by another"),
        (vec!["restore", &theirs], "in use by another"),
        (vec!["init", "--cli-config", "/nonexistent/cli.toml"], "not empty"),
    ] {
        let refused = solo.command(&arguments)?.refused()?;
        ensure!(
            refused.stderr.contains(why) && refused.status.code() == Some(78),
            "{arguments:?}: {}",
            refused.stderr
        );
    }
    drop(running);
    let refused = solo.command(&["restore", &theirs])?.refused()?;
    ensure!(refused.stderr.contains("least of all by another one"), "{}", refused.stderr);
    let refused = solo.command(&["restore", &ours])?.refused()?;
    ensure!(refused.stderr.contains("move"), "{}", refused.stderr);
    served(&solo)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_coordinator_says_so_to_whoever_asks() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut solo = Solo::init(folder.path(), &[])?;
    let file = folder.path().join("b").display().to_string();
    solo.command(&["backup", "--to", &file])?.ok()?;
    std::fs::rename(solo.data(), folder.path().join("lost"))?;
    let begun = Instant::now();
    solo.command(&["restore", &file])?.ok()?;
    println!("restored in {:?}", begun.elapsed());
    let running = served(&solo)?;
    let api = solo.api()?;
    let (status, answer) = api.get("readyz").await?;
    ensure!(status == 503 && answer["code"] == "read_only", "{status} {answer}");
    ensure!(api.get("healthz").await?.0 == 204);
    for (status, answer) in [
        api.post("tokens", &json!({})).await?,
        api.put_policy("version: 1\ncomponents: {}\n").await?,
    ] {
        ensure!(status == 503 && answer["code"] == "read_only", "{status} {answer}");
    }
    ensure!(
        api.get("status").await?.1["read_only"]
            .as_str()
            .is_some_and(|why| why.contains("recover"))
    );
    let refused = solo.command(&["credential", "--scope", "owner"])?.refused()?;
    ensure!(refused.stderr.contains("recover"), "{}", refused.stderr);
    let done = solo.command(&["recover", "--yes"])?.ok()?;
    solo.take_credential(&done)?;
    let api = solo.api()?;
    wait_for_status(&api, "tokens", 201).await?;
    ensure!(api.get("readyz").await?.0 == 204);
    drop(running);
    Ok(())
}

/// Posts until the answer is this one.
async fn wait_for_status(api: &Api, path: &str, wanted: u16) -> Result<()> {
    let begun = Instant::now();
    loop {
        let (status, answer) = api.post(path, &json!({})).await?;
        if status == wanted || (wanted == 201 && status == 200) {
            return Ok(());
        }
        ensure!(begun.elapsed() < SOON, "still {status}: {answer}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Makes so many hosts in the database of a coordinator that is not running.
async fn populate(data: &Path, count: u32) -> Result<()> {
    let store = Store::open(&data.join("cloison.db"), Environment::system()).await?;
    for first in (0..count).step_by(100) {
        let spec = TokenSpec {
            uses: 100,
            lifetime: Duration::from_secs(86_400),
            name: "h-*".parse().map_err(|e| anyhow::anyhow!("{e}"))?,
            labels: "role=bulk"
                .split_once('=')
                .map(|(k, v)| Ok::<_, anyhow::Error>((k.parse()?, v.parse()?)))
                .into_iter()
                .collect::<Result<_>>()?,
            source: None,
        };
        let token = store.create_token(ACTOR, spec).await?;
        for number in first..count.min(first + 100) {
            let mut seed = [7; 32];
            for (to, from) in seed.iter_mut().zip(number.to_be_bytes()) {
                *to = from;
            }
            let attempt = Redemption {
                token: token.id,
                secret: cloison_proto::key::Secret32::from_bytes(*token.secret.expose()),
                wg_key: WgPrivateKey::from_bytes(seed).public(),
                identity: SigningKey::from_seed(&seed).identity(),
                source: std::net::IpAddr::from([192, 0, 2, 1]),
            };
            store.redeem_token(&attempt).await?;
        }
    }
    store.close().await;
    Ok(())
}

/// A coordinator whose data directory is a disk of its own, in a mount namespace of its own.
fn start_on_small_disk(solo: &Solo, stage: &Path) -> Result<Running> {
    std::fs::rename(solo.data(), stage)?;
    std::fs::create_dir(solo.data())?;
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-ec"]);
    command.arg(
        "mount -t tmpfs -o size=64m,mode=700 none \"$1\"; cp -a \"$2\"/. \"$1\"; \
         exec setpriv --pdeathsig KILL \"$3\" serve --data \"$1\" --listen \"$4\"",
    );
    command
        .arg("sh")
        .arg(solo.data())
        .arg(stage)
        .arg(programs::find("cloison-coordinator")?)
        .arg(solo.address().to_string());
    let mut running = solo.start_as(command, |_| {})?;
    ensure!(running.ready(READY)?.is_some(), "{}", running.log());
    Ok(running)
}

/// A command in the mount namespace of that coordinator.
fn inside(running: &Running, script: &str, arguments: &[&Path]) -> Result<()> {
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--mount=/proc/{}/ns/mnt", running.id()))
        .args(["sh", "-c", script, "sh"])
        .args(arguments);
    process::run(command, SOON)?.ok()?;
    Ok(())
}

/// A link of a real host, without a data plane: counts the leases that it is given until `done`.
async fn count_leases(solo: &Solo, state: PathBuf, mut done: tokio::sync::oneshot::Receiver<()>) -> Result<usize> {
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
    let mut leases = 0;
    loop {
        tokio::select! {
            frame = frames.next() => {
                leases += usize::from(matches!(CoordinatorMessage::from_frame(&frame?)?, Some(CoordinatorMessage::LeaseGrant(_))));
            }
            _ = &mut done => return Ok(leases),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_full_disk_reads_leases_and_a_thousand_revocations_go_on() -> Result<()> {
    const HOSTS: u32 = 1000;
    let folder = tempfile::tempdir()?;
    let solo = Solo::init(folder.path(), &["--lease", "10s"])?;
    populate(&solo.data(), HOSTS).await?;
    let running = start_on_small_disk(&solo, &folder.path().join("stage"))?;
    let api = solo.api()?;
    let (_, token) = api.post("tokens", &json!({ "host": "real" })).await?;
    let state = folder.path().join("real");
    let (dir, addresses) = (StateDir::open(state.clone())?, [solo.address().to_string()]);
    let token = token["token"].as_str().context("no token")?;
    let real = enroll::join(&dir, token, &addresses, wall_now()).await?.host.to_string();
    let (stop, done) = tokio::sync::oneshot::channel();
    let fill = solo.data().join("fill");
    inside(
        &running,
        "dd if=/dev/zero of=\"$1\" bs=64k 2>/dev/null; dd if=/dev/zero of=\"$1.2\" bs=4k 2>/dev/null; true",
        &[&fill],
    )?;
    let full = Instant::now();
    loop {
        // What the log has allocated already takes a few more.
        let (status, answer) = api.post("tokens", &json!({})).await?;
        if status == 507 {
            ensure!(answer["code"] == "storage_full", "{answer}");
            break;
        }
        ensure!(full.elapsed() < SOON, "the disk never gets full: {status}");
    }
    let leases = count_leases(&solo, state, done);
    let revoking = async {
        let (_, list) = api.get("hosts").await?;
        let hosts: Vec<_> = list["hosts"]
            .as_array()
            .context("no hosts")?
            .iter()
            .filter_map(|h| h["id"].as_str())
            .collect();
        let begun = Instant::now();
        for host in hosts.iter().filter(|host| **host != real) {
            let (status, answer) = api.post(&format!("hosts/{host}/revoke"), &Value::Null).await?;
            ensure!(status == 200, "{host} was not revoked: {status} {answer}");
        }
        println!("{} revocations on a full disk in {:?}", hosts.len() - 1, begun.elapsed());
        let (status, answer) = api.post("tokens", &json!({})).await?;
        ensure!(status == 507, "what can wait used up the room for what cannot: {status} {answer}");
        ensure!(api.get("status").await?.1["hosts"] == 1);
        let _ = stop.send(());
        anyhow::Ok(begun.elapsed())
    };
    let (leases, took) = tokio::try_join!(leases, revoking)?;
    println!("{leases} leases meanwhile");
    ensure!(u64::try_from(leases)? * 2 >= took.as_secs(), "{leases} leases in {took:?}");
    // Somebody frees space: everything can be written again, without a restart.
    inside(&running, "rm \"$1\" \"$1.2\"", &[&fill])?;
    wait_for_status(&api, "tokens", 201).await?;
    let out = folder.path().join("out");
    std::fs::create_dir(&out)?;
    drop(api);
    inside(&running, "cp \"$1\"/cloison.db* \"$2\"", &[&solo.data(), &out])?;
    let store = Store::open(&out.join("cloison.db"), Environment::system()).await?;
    store.verify_audit().await?;
    let (mut after, mut revoked) = (Some(0), 0);
    while let Some(seq) = after {
        let page = store.audit_page(seq, 500).await?;
        revoked += page.leaves.iter().filter(|leaf| leaf.action == "host.revoke").count();
        after = page.next;
    }
    ensure!(revoked == usize::try_from(HOSTS)?, "{revoked} leaves");
    Ok(())
}

/// How long a coordinator with many hosts takes to serve after `kill -9`, and to be restored; `CLOISON_HOSTS=10000` gives the figures of the
/// notes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_many_hosts_it_serves_soon_after_a_kill_and_after_a_restore() -> Result<()> {
    let hosts = std::env::var("CLOISON_HOSTS").map_or(Ok(200), |text| text.parse())?;
    let folder = tempfile::tempdir()?;
    let solo = Solo::init(folder.path(), &[])?;
    populate(&solo.data(), hosts).await?;
    let mut times = Vec::new();
    for _ in 0..5 {
        let mut running = solo.start(|_| {})?;
        let took = running.ready(READY)?.with_context(|| running.log())?;
        let begun = Instant::now();
        let api = solo.api()?;
        ensure!(api.get("status").await?.0 == 200);
        times.push(took + begun.elapsed());
        // It dies while it writes.
        let (status, _) = api.post("tokens", &json!({})).await?;
        ensure!(status == 200 || status == 201);
        running.kill()?;
    }
    times.sort();
    println!("{hosts} hosts: served after {times:?}");
    ensure!(
        times
            .first()
            .is_some_and(|best| *best < Duration::from_secs(if hosts > 1000 { 10 } else { 2 })),
        "{times:?}"
    );
    let file = folder.path().join("b").display().to_string();
    let begun = Instant::now();
    solo.command(&["backup", "--to", &file])?.ok()?;
    let backed_up = begun.elapsed();
    std::fs::rename(solo.data(), folder.path().join("lost"))?;
    let begun = Instant::now();
    solo.command(&["restore", &file])?.ok()?;
    let restored = begun.elapsed();
    let served = solo.start(|_| {})?.ready(READY)?.context("it does not serve")?;
    println!("{hosts} hosts: a backup in {backed_up:?}, restored in {restored:?}, served after {served:?} more");
    ensure!(restored < Duration::from_secs(if hosts > 1000 { 60 } else { 10 }), "{restored:?}");
    Ok(())
}
