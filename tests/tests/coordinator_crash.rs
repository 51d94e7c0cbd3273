//! The coordinator dies: at random and at each named failpoint, in the middle of a checkpoint, of a migration, and with the power. Whatever it
//! had acknowledged is there afterwards, nothing is there by half, every change has its leaf, no token made two hosts, and it serves again
//! within a second.
//!
//! `CLOISON_CRASH_ROUNDS=1000 tests/scripts/run-tests.sh coordinator_crash` runs the long loop, `CLOISON_CRASH_SEED` repeats one.

#![forbid(unsafe_code)]

#[path = "crash/callers.rs"]
mod callers;
#[path = "crash/ledger.rs"]
mod ledger;

use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use callers::Callers;
use cloison_coordinator::failpoint::{Point, VARIABLE};
use cloison_coordinator::store::database_facts;
use cloison_tests::lab::disk::{Disk, Unsynced};
use cloison_tests::lab::process;
use cloison_tests::lab::solo::Solo;
use cloison_tests::sim::random::Random;

const READY: Duration = Duration::from_secs(20);
/// How long a failpoint may not be reached by callers without end, where each has to be: the third revocation needs five hosts that joined.
const REACHED: Duration = Duration::from_secs(40);
/// And where it is left to chance whether it is.
const TRIED: Duration = Duration::from_secs(5);
const KILLED: Option<i32> = Some(9);

/// A mesh that dies again and again.
struct Loop {
    _folder: tempfile::TempDir,
    solo: Solo,
    callers: Callers,
    random: Random,
    served_after: Vec<Duration>,
}

/// How one life of the coordinator ends.
#[derive(Debug, Clone, Copy)]
enum End {
    /// At a failpoint, the Nth time that it is reached.
    At(Point, u64),
    /// So long after it began to serve.
    After(Duration),
    /// So long after its start, whether it serves or not.
    Early(Duration),
    /// In the middle of the checkpoint with which it ends when it is asked to, at the Nth write.
    Checkpoint(u64),
}

impl Loop {
    fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let solo = Solo::init(folder.path(), &[])?;
        let seed = match std::env::var("CLOISON_CRASH_SEED") {
            Ok(text) => text.parse()?,
            Err(_) => u64::from(std::process::id()) ^ u64::try_from(jiff::Timestamp::now().as_nanosecond() & 0xffff_ffff)?,
        };
        println!("CLOISON_CRASH_SEED={seed}");
        Ok(Self {
            callers: Callers::new(&solo, &folder.path().join("machines"))?,
            _folder: folder,
            solo,
            random: Random::new(seed),
            served_after: Vec::new(),
        })
    }

    /// One life: starts, is called, dies. Says whether it died where it should.
    async fn live(&mut self, end: End, disk: Option<&Disk>, more: &[(&str, String)]) -> Result<bool> {
        self.live_for(end, TRIED, disk, more).await
    }

    /// The same, with that long for it to reach its failpoint.
    async fn live_for(&mut self, end: End, limit: Duration, disk: Option<&Disk>, more: &[(&str, String)]) -> Result<bool> {
        let mut running = self.solo.start(|command| {
            if let Some(disk) = disk {
                disk.below(command);
            }
            match end {
                End::At(point, count) => drop(command.env(VARIABLE, format!("{point}:{count}"))),
                End::Checkpoint(count) => drop(command.env("CLOISON_DISK_KILL", count.to_string())),
                End::After(_) | End::Early(_) => {}
            }
            command.envs(more.iter().map(|(name, value)| (name, value)));
        })?;
        if let End::Early(after) = end {
            tokio::time::sleep(after).await;
            running.kill()?;
            return Ok(true);
        }
        let Some(took) = running.ready(READY)? else {
            let status = running.end(READY)?;
            ensure!(status.signal() == KILLED, "it ended by itself, with {status}:\n{}", running.log());
            return Ok(true);
        };
        self.served_after.push(took);
        self.callers.anew(&self.solo)?;
        let mut tasks = self.callers.call();
        let died = match end {
            End::After(after) => {
                tokio::time::sleep(after).await;
                running.kill()?;
                true
            }
            End::Checkpoint(_) => {
                tokio::time::sleep(Duration::from_millis(300)).await;
                self.callers.stopping();
                running.terminate()?;
                running.end(READY)?.signal() == KILLED
            }
            End::At(..) | End::Early(_) => self.reaches(&mut running, limit).await?,
        };
        tasks.abort_all();
        while let Some(ended) = tasks.join_next().await {
            match ended {
                Ok(answered) => answered?,
                Err(error) if error.is_cancelled() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(died)
    }

    /// Waits until it dies by itself, and ends it if it does not.
    async fn reaches(&self, running: &mut cloison_tests::lab::solo::Running, limit: Duration) -> Result<bool> {
        let begun = tokio::time::Instant::now();
        while begun.elapsed() < limit {
            if let Some(status) = running.ended()? {
                ensure!(status.signal() == KILLED, "it ended by itself, with {status}:\n{}", running.log());
                return Ok(true);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        running.kill()?;
        Ok(false)
    }

    async fn check(&self) -> Result<()> {
        // The ledger is nobody else's between two lives.
        let ledger = std::mem::take(&mut *self.callers.ledger());
        let checked = ledger.check(&self.solo.data()).await;
        *self.callers.ledger() = ledger;
        checked
    }

    fn random_end(&mut self) -> End {
        let chosen = self.random.below(10);
        match chosen {
            0 => End::Early(Duration::from_millis(self.random.below(300))),
            1 | 2 => {
                let at = usize::try_from(self.random.below(u64::MAX)).unwrap_or(0) % Point::ALL.len();
                let point = Point::ALL.get(at).copied().filter(|point| *point != Point::Migrating);
                End::At(point.unwrap_or(Point::BeforeCommit), 1 + self.random.below(9))
            }
            _ => End::After(Duration::from_millis(self.random.below(500))),
        }
    }

    fn report(&mut self, what: &str) -> Result<()> {
        self.served_after.sort();
        let at = |percent: usize| {
            self.served_after
                .get((self.served_after.len() * percent / 100).min(self.served_after.len().saturating_sub(1)))
        };
        let ledger = self.callers.ledger();
        println!(
            "{what}: serving after p50 {:?}, p99 {:?}; acknowledged {} tokens, {} joins, {} revocations, {} policies",
            at(50),
            at(99),
            ledger.tokens.len(),
            ledger.hosts.len(),
            ledger.revoked.len() + ledger.tokens_revoked.len(),
            ledger.policies.len()
        );
        ensure!(
            at(50).is_some_and(|took| *took < Duration::from_secs(1)),
            "it takes longer than a second to serve again"
        );
        ensure!(
            !ledger.hosts.is_empty() && !ledger.policies.is_empty(),
            "nothing was ever acknowledged"
        );
        Ok(())
    }
}

fn rounds(default: usize) -> Result<usize> {
    Ok(std::env::var("CLOISON_CRASH_ROUNDS").map_or(Ok(default), |text| text.parse())?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_every_failpoint_and_at_random_it_loses_nothing_that_it_acknowledged() -> Result<()> {
    let mut mesh = Loop::new()?;
    let mut never = Vec::new();
    let mut lives = 0;
    for point in Point::ALL.iter().copied().filter(|point| *point != Point::Migrating) {
        lives += 1;
        let end = End::At(point, 1 + mesh.random.below(3));
        if !mesh.live_for(end, REACHED, None, &[]).await? {
            never.push(point);
        }
        mesh.check().await.with_context(|| format!("after {end:?}"))?;
    }
    ensure!(never.is_empty(), "no caller reaches {never:?}");
    for life in lives..rounds(120)? {
        let end = mesh.random_end();
        mesh.live(end, None, &[]).await?;
        mesh.check().await.with_context(|| format!("after {end:?}, life {life}"))?;
    }
    mesh.live(End::After(Duration::from_secs(1)), None, &[]).await?;
    mesh.check().await?;
    mesh.report("killed")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_power_goes_everything_acknowledged_was_on_the_disk() -> Result<()> {
    let mut mesh = Loop::new()?;
    let shadow = tempfile::tempdir()?;
    let disk = Disk::watch(&mesh.solo.data(), &shadow.path().join("shadow"))?;
    let mut in_checkpoints = 0;
    for life in 0..rounds(40)?.min(200) {
        let end = match life % 4 {
            0 => End::Checkpoint(1 + mesh.random.below(12)),
            _ => mesh.random_end(),
        };
        let died = mesh.live(end, Some(&disk), &[]).await?;
        in_checkpoints += usize::from(died && matches!(end, End::Checkpoint(_)));
        let unsynced = if life % 2 == 0 { Unsynced::Lost } else { Unsynced::Torn };
        disk.cut(unsynced, &mut mesh.random)?;
        mesh.check()
            .await
            .with_context(|| format!("after {end:?} and a power cut ({unsynced:?}), life {life}"))?;
    }
    ensure!(in_checkpoints > 0, "it never died in the middle of a checkpoint");
    mesh.report("power cut")
}

/// The shim and the ledger see what they are there to see.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_does_not_sync_is_found_out() -> Result<()> {
    let mut mesh = Loop::new()?;
    let shadow = tempfile::tempdir()?;
    let disk = Disk::watch(&mesh.solo.data(), &shadow.path().join("shadow"))?;
    let deaf = [("CLOISON_DISK_DEAF", "1".to_owned())];
    mesh.live(End::After(Duration::from_secs(1)), Some(&disk), &deaf).await?;
    mesh.check().await.context("before the power went")?;
    disk.cut(Unsynced::Lost, &mut mesh.random)?;
    let lost = mesh.check().await.err().context("nobody missed anything")?;
    ensure!(
        format!("{lost:#}").contains("acknowledged") || format!("{lost:#}").contains("policy"),
        "{lost:#}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_in_a_migration_it_is_migrated_at_the_next_start() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let solo = Solo::init(folder.path(), &[])?;
    let database = solo.data().join("cloison.db");
    let ours = database_facts(&database).await?;
    let dump = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../coordinator/src/store/tests/schema_1.sql"))?;
    let theirs = dump.split('\'').find(|word| word.starts_with("mesh_")).context("no mesh")?;
    let script = folder.path().join("old.sql");
    std::fs::write(&script, dump.replace(theirs, &ours.mesh.to_string()))?;
    std::fs::remove_file(&database)?;
    let mut sqlite = Command::new("sqlite3");
    sqlite.arg(&database).arg(format!(".read {}", script.display()));
    process::run(sqlite, READY)?.ok()?;
    ensure!(database_facts(&database).await?.schema == 1);
    // Each migration in turn, and then none.
    let mut deaths = 0;
    loop {
        let mut running = solo.start(|command| {
            command.env(VARIABLE, format!("{}:1", Point::Migrating));
        })?;
        if running.ready(READY)?.is_some() {
            running.kill()?;
            break;
        }
        let status = running.end(READY)?;
        ensure!(status.signal() == KILLED, "{status}: {}", running.log());
        deaths += 1;
        if deaths == 2 {
            break;
        }
    }
    ensure!(deaths > 0, "the failpoint was not reached");
    let mut running = solo.start(|_| {})?;
    ensure!(running.ready(READY)?.is_some(), "{}", running.log());
    running.kill()?;
    let store = cloison_coordinator::store::Store::open(&database, cloison_coordinator::entropy::Environment::system()).await?;
    store.verify_audit().await?;
    ensure!(store.inventory().hosts.len() == 2 && store.inventory().policy.is_some());
    Ok(())
}
