use std::fs;
use std::path::Path;

use crate::store::testing::{LOCAL, TestResult, attempt, environment, joined, new_mesh, on_disk, policy, reopen, spec};
use crate::store::{CredentialSpec, IfMatch, OpenError, Store, StoreError, ViewMark};

#[tokio::test]
async fn everything_is_there_after_a_restart() -> TestResult {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("db");
    let (store, _) = on_disk(&path).await?;
    let token = store.create_token(LOCAL, spec("db-1")?).await?;
    let host = store.redeem_token(&attempt(&token, 1)).await?.host.id;
    store
        .put_policy(LOCAL, policy(&[("postgres", &["db-1"])])?, IfMatch::Absent)
        .await?;
    let mark = ViewMark {
        revision: 4,
        state_hash: [9; 32],
    };
    store.record_view_marks(&[(host, mark)]).await?;
    let before = store.inventory();
    // Not closed: as if the process had been killed.
    let store = reopen(&path).await?;
    let after = store.inventory();
    assert_eq!(
        (after.version, after.content_revision, after.overlay),
        (before.version, before.content_revision, before.overlay)
    );
    assert_eq!(
        (&after.hosts, &after.instances, &after.policy),
        (&before.hosts, &before.instances, &before.policy)
    );
    assert_eq!(store.view_marks().await?.get(&host), Some(&mark));
    assert!(store.redeem_token(&attempt(&token, 1)).await?.repeated);
    store.verify_audit().await?;
    Ok(())
}

#[tokio::test]
async fn secrets_are_nowhere_on_the_disk() -> TestResult {
    let dir = tempfile::tempdir()?;
    let (store, _) = on_disk(&dir.path().join("db")).await?;
    let token = store.create_token(LOCAL, spec("db-1")?).await?;
    let scopes = [crate::credential::Scope::Owner].into();
    let lifetime = std::time::Duration::from_secs(60);
    let credential = store
        .create_credential(
            LOCAL,
            CredentialSpec {
                name: "x".into(),
                scopes,
                lifetime,
            },
        )
        .await?;
    store.redeem_token(&attempt(&token, 1)).await?;
    store.authenticate(&credential.text.reveal()).await?;
    store.close().await;
    let mut bytes = Vec::new();
    for entry in fs::read_dir(dir.path())? {
        bytes.extend(fs::read(entry?.path())?);
    }
    let holds = |needle: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
    assert!(
        holds(&token.secret.hash()) && holds(&credential.text.secret.hash()),
        "the hashes are there"
    );
    let text = credential.text.reveal();
    let base64 = text.rsplit('_').next().unwrap_or_default();
    assert!(!holds(token.secret.expose()) && !holds(credential.text.secret.expose()) && !holds(base64.as_bytes()));
    Ok(())
}

#[tokio::test]
async fn a_second_init_overwrites_nothing() -> TestResult {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("db");
    let (store, _) = on_disk(&path).await?;
    joined(&store, "a", 1).await?;
    let second = Store::create(&path, environment().0, new_mesh()?).await;
    assert!(matches!(second, Err(OpenError::Exists { .. })));
    assert_eq!(reopen(&path).await?.inventory().hosts.len(), 1);
    Ok(())
}

/// Opens what is at `path` and returns the error's text.
async fn refusal(path: &Path) -> Result<String, Box<dyn std::error::Error>> {
    let error = reopen(path).await.err().ok_or("it was opened")?;
    Ok(format!("{error}"))
}

#[tokio::test]
async fn a_missing_foreign_or_damaged_database_is_refused_with_its_reason() -> TestResult {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("db");
    assert!(refusal(&path).await?.contains("init"));
    fs::write(
        &path,
        "these are not the bytes of a database, and there are more than a hundred of them, so that it reads a header".repeat(9),
    )?;
    assert!(refusal(&path).await?.contains("no sound database"));
    fs::write(&path, "")?;
    assert!(refusal(&path).await?.contains("holds no mesh"));
    fs::remove_file(&path)?;
    let (store, _) = on_disk(&path).await?;
    for machine in 1..=20 {
        joined(&store, "*", machine).await?;
    }
    store.close().await;
    let whole = fs::read(&path)?;
    for length in [whole.len() / 2, whole.len() - 100, 4096, 5000, 50] {
        fs::write(&path, &whole[..length])?;
        let shown = refusal(&path).await.map_err(|e| format!("{length} of {}: {e}", whole.len()))?;
        assert!(
            shown.contains("sound") || shown.contains("damaged") || shown.contains("cannot be opened") || shown.contains("no mesh"),
            "{length}: {shown}"
        );
        assert_eq!(fs::read(&path)?.len(), length, "what cannot be used is left as it is");
    }
    Ok(())
}

#[tokio::test]
async fn a_newer_schema_is_refused_and_left_alone() -> TestResult {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("db");
    let (store, _) = on_disk(&path).await?;
    sqlx::query("INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) VALUES (9999, 'x', 1, x'00', 0)")
        .execute(&store.0.writer)
        .await?;
    store.close().await;
    assert!(matches!(reopen(&path).await, Err(OpenError::Newer { found: 9999, .. })));
    Ok(())
}

/// Lets the database grow no more, as a full disk would, as long as the store keeps its present connection.
async fn fill(store: &Store) -> TestResult {
    let pages: i64 = sqlx::query_scalar("PRAGMA page_count").fetch_one(&store.0.writer).await?;
    let limit = sqlx::AssertSqlSafe(format!("PRAGMA max_page_count = {pages}"));
    sqlx::query(limit).execute(&store.0.writer).await?;
    Ok(())
}

#[tokio::test]
async fn the_store_writes_again_when_a_full_disk_has_room() -> TestResult {
    let dir = tempfile::tempdir()?;
    let (store, _) = on_disk(&dir.path().join("db")).await?;
    fill(&store).await?;
    let refused = loop {
        if let Err(refused) = store.create_token(LOCAL, spec("*")?).await {
            break refused;
        }
    };
    assert!(matches!(refused, StoreError::StorageFull), "{refused:?}");
    sqlx::query("PRAGMA max_page_count = 1000000").execute(&store.0.writer).await?;
    store.create_token(LOCAL, spec("*")?).await?;
    store.verify_audit().await?;
    Ok(())
}

#[tokio::test]
async fn on_a_full_disk_the_reserve_makes_way_for_revocations_and_for_nothing_else() -> TestResult {
    let dir = tempfile::tempdir()?;
    let (store, _) = on_disk(&dir.path().join("db")).await?;
    let reserve = dir.path().join("reserve");
    store.hold_room(reserve.clone());
    assert_eq!(fs::metadata(&reserve)?.len(), 16 << 20);
    let mut hosts = Vec::new();
    for machine in 1..=40 {
        hosts.push(joined(&store, "*", machine).await?);
    }
    fill(&store).await?;
    while store.create_token(LOCAL, spec("*")?).await.is_ok() {}
    assert!(reserve.exists(), "a token can wait");
    // The connection of the failed write is gone, and with it the limit.
    store.create_token(LOCAL, spec("*")?).await?;
    fill(&store).await?;
    for host in hosts {
        store.revoke_host(LOCAL, host).await?;
    }
    assert!(!reserve.exists());
    assert!(store.inventory().hosts.is_empty());
    Ok(())
}

#[tokio::test]
async fn a_commit_that_fails_is_fatal_and_nobody_hears_of_the_change() -> TestResult {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    let dir = tempfile::tempdir()?;
    let (store, _) = on_disk(&dir.path().join("db")).await?;
    let stopped = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&stopped);
    store.set_fatal_hook(Arc::new(move |_| {
        counter.fetch_add(1, Ordering::SeqCst);
    }));
    // The engine asks this hook when everything is written, and gives up if it says no.
    let mut writer = store.0.writer.acquire().await?;
    writer.lock_handle().await?.set_commit_hook(|| false);
    drop(writer);
    let before = store.inventory();
    assert!(store.put_policy(LOCAL, policy(&[])?, IfMatch::Any).await.is_err());
    assert_eq!(stopped.load(Ordering::SeqCst), 1);
    assert_eq!(store.inventory().version, before.version);
    assert!(store.inventory().policy.is_none());
    Ok(())
}
