//! Databases that older programs wrote. `schema_1.sql` is one of the first schema, as `sqlite3 cloison.db .dump` wrote it down after the
//! program of that time had run a small mesh: a policy, three hosts of which one was revoked, an open token.

use crate::store::testing::{LOCAL, START, TestResult, environment, reopen, spec};
use crate::store::{Store, copy_database, database_facts, known_schema};

const SCHEMA_1: &str = include_str!("schema_1.sql");

/// The database of that mesh.
async fn schema_1(path: &std::path::Path) -> TestResult {
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(path).create_if_missing(true);
    let pool = sqlx::SqlitePool::connect_with(options).await?;
    sqlx::raw_sql(SCHEMA_1).execute(&pool).await?;
    pool.close().await;
    Ok(())
}

#[tokio::test]
async fn a_database_of_the_first_schema_is_brought_up_to_date_with_all_that_is_in_it() -> TestResult {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("db");
    schema_1(&path).await?;
    let before = database_facts(&path).await?;
    assert_eq!(before.schema, 1);
    let store = reopen(&path).await?;
    let inventory = store.inventory();
    assert_eq!((inventory.mesh, inventory.version), (before.mesh, before.version));
    let names: Vec<_> = inventory.hosts.values().map(|host| host.name.to_string()).collect();
    assert!(
        names.contains(&"app-1".to_owned()) && names.contains(&"db-1".to_owned()) && names.len() == 2,
        "{names:?}"
    );
    assert_eq!(inventory.instances.len(), 2);
    assert!(
        inventory.read_only.is_none()
            && inventory
                .policy
                .as_ref()
                .is_some_and(|policy| policy.text.contains("n8n -> postgres:sql"))
    );
    assert!(store.list_hosts(true).await?.iter().any(|record| record.revoked_at.is_some()));
    assert_eq!(store.verify_audit().await?, store.audit_head().await?);
    store.create_token(LOCAL, spec("next")?).await?;
    assert_eq!(store.now(), START, "an older program noted no time");
    store.keep_time().await?;
    store.close().await;
    assert_eq!(database_facts(&path).await?.schema, known_schema());
    Ok(())
}

#[tokio::test]
async fn a_backup_of_an_older_schema_is_copied_as_it_is_and_restored_as_the_present_one() -> TestResult {
    let dir = tempfile::tempdir()?;
    let (path, copy) = (dir.path().join("db"), dir.path().join("copy"));
    schema_1(&path).await?;
    assert_eq!(copy_database(&path, &copy).await?.schema, 1);
    assert_eq!(database_facts(&path).await?.schema, 1, "a copy changes nothing");
    let store = Store::open(&copy, environment().0).await?;
    store.mark_restored().await?;
    assert!(store.inventory().read_only.is_some());
    Ok(())
}
