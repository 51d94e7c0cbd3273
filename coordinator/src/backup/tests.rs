//! A backup made, damaged, put back, and what the mesh made of it may and may not do.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use clap::Parser as _;

use super::*;
use crate::args::{BackupArgs, Cli, Command, RecoverArgs, RestoreArgs};
use crate::data_dir::DataDir;
use crate::entropy::Environment;
use crate::recover;
use crate::run::Core;
use crate::store::testing::{LOCAL, TestResult, attempt, joined, spec};
use crate::store::{RedeemError, Store, StoreError};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// A mesh in a directory of its own, as `init` makes it.
struct Machine {
    dir: tempfile::TempDir,
}

impl Machine {
    async fn new() -> Outcome<Self> {
        let dir = tempfile::tempdir()?;
        let (data, config) = (
            dir.path().join("data").display().to_string(),
            dir.path().join("cli.toml").display().to_string(),
        );
        let Command::Init(args) = Cli::try_parse_from(["x", "init", "--data", &data, "--cli-config", &config])?.command else {
            return Err("another command".into());
        };
        crate::init::init(args, &Environment::system()).await?;
        Ok(Self { dir })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn store(&self, data: &str) -> Outcome<Store> {
        Ok(Store::open(&self.path(data).join("cloison.db"), Environment::system()).await?)
    }

    async fn backup(&self, to: &str) -> Result<Written, BackupError> {
        let args = BackupArgs {
            data: self.path("data"),
            to: self.path(to),
        };
        backup(&args, &Environment::system()).await
    }

    async fn restore(&self, file: &Path, data: &str) -> Result<Restored, BackupError> {
        let args = RestoreArgs {
            data: self.path(data),
            file: file.to_owned(),
        };
        restore(&args, &Environment::system()).await
    }

    async fn recover(&self, data: &str, more: &[&str]) -> Outcome<recover::Outcome> {
        let data = self.path(data).display().to_string();
        let Command::Recover(args) = Cli::try_parse_from(["x", "recover", "--data", &data].iter().chain(more))?.command else {
            return Err("another command".into());
        };
        let args: RecoverArgs = args;
        Ok(recover::recover(&args, &Environment::system()).await?)
    }
}

fn files(folder: &Path) -> Outcome<Vec<String>> {
    let names = fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names = names.collect::<Outcome<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

#[tokio::test]
async fn a_restored_mesh_is_what_was_backed_up_while_it_was_written_to() -> TestResult {
    let machine = Machine::new().await?;
    let store = machine.store("data").await?;
    let writer = store.clone();
    let busy = tokio::spawn(async move {
        for _ in 0..20 {
            writer
                .create_token(LOCAL, spec("*").map_err(|e| e.to_string())?)
                .await
                .map_err(|e| e.to_string())?;
        }
        Ok::<_, String>(())
    });
    let made = machine.backup("one.backup").await?;
    busy.await??;
    assert_eq!(fs::metadata(&made.path)?.permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(&made.path)?.len(), made.length);
    store.close().await;
    machine.restore(&made.path, "again").await?;
    assert_eq!(files(&machine.path("again"))?, ["cloison.db", "lock", "trust"]);
    for key in files(&machine.path("data/trust"))? {
        let (before, after) = (machine.path("data/trust").join(&key), machine.path("again/trust").join(&key));
        assert_eq!(fs::read(before)?, fs::read(&after)?, "{key}");
        assert_eq!(fs::metadata(after)?.permissions().mode() & 0o777, 0o600, "{key}");
    }
    let core = Core::open(DataDir::open(&machine.path("again"))?, Environment::system()).await?;
    let inventory = core.store.inventory();
    assert_eq!((inventory.mesh, inventory.version), (made.manifest.mesh, made.manifest.version));
    core.store.verify_audit().await?;
    let leaves = core.store.audit_page(0, 500).await?.leaves;
    assert_eq!(leaves.last().map(|leaf| leaf.action.as_str()), Some("mesh.restore"));
    Ok(())
}

#[tokio::test]
async fn a_backup_overwrites_nothing_and_leaves_nothing_half() -> TestResult {
    let machine = Machine::new().await?;
    fs::write(machine.path("taken"), "mine")?;
    assert!(matches!(machine.backup("taken").await, Err(BackupError::Exists { .. })));
    assert_eq!(fs::read(machine.path("taken"))?, b"mine");
    // What a backup left that was killed.
    fs::write(machine.path(".one.0123.part"), "keys")?;
    fs::write(machine.path(".one.0123.db.part"), "keys")?;
    machine.backup("one").await?;
    assert_eq!(files(machine.dir.path())?, ["cli.toml", "data", "one", "taken"]);
    fs::write(machine.path("data/trust/strange name"), "")?;
    assert!(matches!(machine.backup("two").await, Err(BackupError::Foreign { .. })));
    assert_eq!(files(machine.dir.path())?, ["cli.toml", "data", "one", "taken"]);
    Ok(())
}

#[tokio::test]
async fn a_damaged_backup_is_refused_whatever_is_wrong_with_it() -> TestResult {
    let machine = Machine::new().await?;
    let whole = fs::read(machine.backup("whole").await?.path)?;
    let (bad, length) = (machine.path("bad"), whole.len());
    let mut cuts: Vec<usize> = (0..64).chain((0..length).step_by(997)).chain(length - 40..length).collect();
    cuts.dedup();
    for cut in cuts {
        fs::write(&bad, whole.get(..cut).ok_or("too long")?)?;
        let refused = machine.restore(&bad, "again").await;
        assert!(matches!(refused, Err(BackupError::Damaged { .. })), "cut at {cut}: {refused:?}");
    }
    for place in (0..64).chain((0..length).step_by(499)) {
        let mut changed = whole.clone();
        *changed.get_mut(place).ok_or("too long")? ^= 1;
        fs::write(&bad, changed)?;
        let refused = machine.restore(&bad, "again").await;
        assert!(matches!(refused, Err(BackupError::Damaged { .. })), "bit at {place}: {refused:?}");
    }
    fs::write(&bad, [&whole[..], b"x"].concat())?;
    assert!(matches!(machine.restore(&bad, "again").await, Err(BackupError::Damaged { .. })));
    assert!(!machine.path("again").exists(), "nothing was made");
    Ok(())
}

#[tokio::test]
async fn a_mesh_in_place_is_never_overwritten() -> TestResult {
    let (one, two) = (Machine::new().await?, Machine::new().await?);
    let (ours, theirs) = (one.backup("b").await?.path, two.backup("b").await?.path);
    let before = fs::read(one.path("data/cloison.db"))?;
    let live = DataDir::open(&one.path("data"))?;
    assert!(matches!(
        one.restore(&ours, "data").await,
        Err(BackupError::DataDir(DataDirError::Locked { .. }))
    ));
    drop(live);
    assert!(matches!(one.restore(&theirs, "data").await, Err(BackupError::OtherMesh { .. })));
    assert!(matches!(one.restore(&ours, "data").await, Err(BackupError::Occupied { .. })));
    fs::create_dir(one.path("other"))?;
    fs::write(one.path("other/file"), "mine")?;
    assert!(matches!(
        one.restore(&ours, "other").await,
        Err(BackupError::DataDir(DataDirError::NotEmpty { .. }))
    ));
    assert_eq!(files(&one.path("other"))?, ["file"]);
    assert_eq!(fs::read(one.path("data/cloison.db"))?, before);
    Ok(())
}

#[tokio::test]
async fn an_interrupted_restore_is_no_mesh_and_can_be_done_again() -> TestResult {
    let machine = Machine::new().await?;
    let file = machine.backup("b").await?.path;
    machine.restore(&file, "again").await?;
    // As it is when the power went before the last step.
    fs::create_dir(machine.path("again/restoring"))?;
    let opened = DataDir::open(&machine.path("again"));
    assert!(matches!(opened, Err(DataDirError::Unfinished { .. })));
    machine.restore(&file, "again").await?;
    assert_eq!(files(&machine.path("again"))?, ["cloison.db", "lock", "trust"]);
    DataDir::open(&machine.path("again"))?;
    Ok(())
}

#[tokio::test]
async fn a_restored_mesh_changes_nothing_until_it_is_recovered_above_what_was_proved() -> TestResult {
    let machine = Machine::new().await?;
    let store = machine.store("data").await?;
    let (app, db) = (joined(&store, "app-1", 1).await?, joined(&store, "db-1", 2).await?);
    let token = store.create_token(LOCAL, spec("late")?).await?;
    let file = machine.backup("b").await?.path;
    // What the backup does not know: somebody joined by the token, and a host was revoked.
    store.redeem_token(&attempt(&token, 3)).await?;
    store.revoke_host(LOCAL, db).await?;
    let newest = store.inventory().version;
    store.close().await;
    machine.restore(&file, "again").await?;

    let store = machine.store("again").await?;
    assert!(matches!(store.create_token(LOCAL, spec("*")?).await, Err(StoreError::ReadOnly(_))));
    assert!(matches!(store.revoke_host(LOCAL, db).await, Err(StoreError::ReadOnly(_))));
    assert!(matches!(store.redeem_token(&attempt(&token, 4)).await, Err(RedeemError::Denied(_))));
    store.record_seen(app, 7).await?;
    let source = std::net::IpAddr::from([192, 0, 2, 1]);
    store.record_sighting(app, Some(newest), source).await?;
    store.record_sighting(cloison_proto::id::HostId([9; 16]), None, source).await?;
    let shown = machine.recover("again", &["--revoke", "db-1"]).await?.to_string();
    for told in ["app-1  has", "192.0.2.1", "db-1", "Nothing was changed"] {
        assert!(shown.contains(told), "{told} in:\n{shown}");
    }
    assert!(store.inventory().read_only.is_some());
    store.look_for_recovery().await?;
    assert!(store.inventory().read_only.is_some());
    assert!(machine.recover("again", &["--yes", "--revoke", "nobody"]).await.is_err());
    let done = machine.recover("again", &["--yes", "--revoke", "db-1"]).await?.to_string();
    store.look_for_recovery().await?;
    let after = store.inventory();
    assert!(after.read_only.is_none() && after.version.generation > newest.generation, "{done}");
    assert_eq!(after.hosts.keys().copied().collect::<Vec<_>>(), [app]);
    // The token was used in the lost time: it makes no second host.
    assert!(matches!(store.redeem_token(&attempt(&token, 4)).await, Err(RedeemError::Denied(_))));
    let owners = store.list_credentials().await?;
    assert_eq!(owners.iter().filter(|credential| credential.revoked_at.is_none()).count(), 1);
    store.create_token(LOCAL, spec("*")?).await?;
    store.verify_audit().await?;
    assert!(machine.recover("again", &["--yes"]).await.is_err(), "once");
    Ok(())
}

#[tokio::test]
async fn a_database_that_an_agent_proves_to_be_old_changes_nothing_any_more() -> TestResult {
    let machine = Machine::new().await?;
    let store = machine.store("data").await?;
    let app = joined(&store, "app-1", 1).await?;
    let (source, ours) = (std::net::IpAddr::from([192, 0, 2, 1]), store.inventory().version);
    store.record_sighting(app, Some(ours), source).await?;
    store.record_sighting(app, None, source).await?;
    assert!(store.inventory().read_only.is_none() && store.sightings().await?.is_empty());
    let newer = cloison_proto::version::Version {
        revision: ours.revision + 1,
        ..ours
    };
    store.record_sighting(app, Some(newer), source).await?;
    assert!(store.inventory().read_only.is_some());
    assert!(matches!(store.create_token(LOCAL, spec("*")?).await, Err(StoreError::ReadOnly(_))));
    store.close().await;
    let store = machine.store("data").await?;
    assert!(store.inventory().read_only.is_some(), "after a restart, too");
    assert_eq!(store.verify_audit().await?, store.audit_head().await?);
    Ok(())
}
