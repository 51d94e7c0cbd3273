use std::time::Duration;

use cloison_proto::version::MeshTime;

use crate::clock::{ManualClock, MeshClock};
use crate::entropy::Environment;
use crate::store::testing::{LOCAL, START, TestResult, environment, joined, on_disk, spec};
use crate::store::{OpenError, Store};

const LEAD: Duration = Duration::from_secs(3 * 3600);

/// Another process on the same machine.
async fn reopen(path: &std::path::Path, clock: &ManualClock) -> Result<Store, OpenError> {
    let env = Environment {
        clock: MeshClock::over(clock.clone()),
        ..environment().0
    };
    Store::open(path, env).await
}

#[tokio::test]
async fn after_a_restart_with_a_clock_that_was_set_back_time_goes_on_from_where_it_was() -> TestResult {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("db");
    let (store, clock) = on_disk(&path).await?;
    joined(&store, "db-1", 1).await?;
    store.keep_time().await?;
    // A step that is noted at once; what follows is within the grain of the note.
    clock.set_wall(START.plus(LEAD));
    store.keep_time().await?;
    let leaves = store.audit_head().await?;
    let revision = store.inventory().version.revision;
    clock.advance(Duration::from_secs(59));
    store.keep_time().await?;
    let last = store.now();
    assert_eq!(last, START.plus(LEAD + Duration::from_secs(59)));
    assert_eq!((store.audit_head().await?, store.inventory().version.revision), (leaves, revision));
    store.close().await;

    clock.set_wall(START.plus(Duration::from_secs(59)));
    let store = reopen(&path, &clock).await?;
    assert_eq!(store.now(), last, "exactly, in the same boot");
    assert!(store.environment().clock.lead().is_some());
    store.close().await;

    clock.reboot();
    let store = reopen(&path, &clock).await?;
    assert!(store.now() >= last, "{:?}", store.now());
    store.leave_time().await?;
    let last = store.now();
    store.close().await;

    clock.reboot();
    let store = reopen(&path, &clock).await?;
    assert_eq!(store.now(), last, "nothing later was told by a coordinator that ended in order");
    store.close().await;

    clock.set_wall(last.plus(LEAD));
    let store = reopen(&path, &clock).await?;
    assert_eq!(store.now(), last.plus(LEAD), "a wall clock that is ahead counts");
    store.close().await;
    Ok(())
}

#[tokio::test]
async fn the_last_audit_leaf_is_never_in_the_future() -> TestResult {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("db");
    let (store, clock) = on_disk(&path).await?;
    clock.set_wall(START.plus(LEAD));
    store.create_token(LOCAL, spec("db-1")?).await?;
    store.close().await;
    clock.set_wall(START);
    clock.reboot();
    let store = reopen(&path, &clock).await?;
    assert_eq!(store.now(), START.plus(LEAD));
    store.close().await;
    Ok(())
}

#[tokio::test]
async fn a_mesh_that_changes_nothing_opens_and_notes_nothing() -> TestResult {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("db");
    let (store, clock) = on_disk(&path).await?;
    joined(&store, "db-1", 1).await?;
    store.mark_restored().await?;
    clock.set_wall(START.plus(LEAD));
    store.keep_time().await?;
    store.leave_time().await?;
    store.close().await;
    clock.set_wall(START);
    let store = reopen(&path, &clock).await?;
    assert_eq!(store.now(), START);
    store.recover(&crate::store::Recovery::default()).await?;
    clock.set_wall(MeshTime(START.0 + 10));
    store.keep_time().await?;
    assert_eq!(store.now(), MeshTime(START.0 + 10));
    store.close().await;
    Ok(())
}
