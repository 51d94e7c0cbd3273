use crate::audit::{Actor, Context, RequestId};
use crate::store::StoreError;
use crate::store::testing::{LOCAL, TestResult, in_memory, joined, policy, spec};
use crate::store::{IfMatch, LabelChange};

#[tokio::test]
async fn every_change_has_exactly_one_leaf_and_one_revision() -> TestResult {
    let (store, _) = in_memory().await?;
    let request = Context {
        actor: Actor::Local,
        request: Some(RequestId([5; 8])),
    };
    let host = joined(&store, "a", 1).await?;
    store.put_policy(request, policy(&[])?, IfMatch::Any).await?;
    store.label_host(LOCAL, host, LabelChange::default()).await?;
    store.rename_host(LOCAL, host, "b".parse()?).await?;
    store.revoke_host(LOCAL, host).await?;
    let page = store.audit_page(0, 500).await?;
    let actions: Vec<&str> = page.leaves.iter().map(|leaf| leaf.action.as_str()).collect();
    let expected = [
        "mesh.init",
        "token.create",
        "host.join",
        "policy.apply",
        "host.label",
        "host.rename",
        "host.revoke",
    ];
    assert_eq!(actions, expected);
    assert_eq!(store.inventory().version.revision, page.leaves.len() as u64);
    assert!(page.leaves.iter().all(|leaf| leaf.outcome == "done" && leaf.cause.is_none()));
    assert_eq!(
        page.leaves.get(3).and_then(|leaf| leaf.request.clone()).as_deref(),
        Some("req_0505050505050505")
    );
    assert_eq!(store.verify_audit().await?, 7);
    Ok(())
}

#[tokio::test]
async fn without_its_leaf_no_change_is_made() -> TestResult {
    let (store, _) = in_memory().await?;
    let host = joined(&store, "a", 1).await?;
    sqlx::query("CREATE TRIGGER full BEFORE INSERT ON audit BEGIN SELECT raise(ABORT, 'no leaf'); END")
        .execute(&store.0.writer)
        .await?;
    let before = store.inventory();
    assert!(matches!(store.revoke_host(LOCAL, host).await, Err(StoreError::Database(_))));
    assert!(store.put_policy(LOCAL, policy(&[])?, IfMatch::Any).await.is_err());
    assert!(store.create_token(LOCAL, spec("*")?).await.is_err());
    assert!(store.host(host).await?.revoked_at.is_none());
    assert_eq!((store.inventory().version, store.list_tokens().await?.len()), (before.version, 1));
    sqlx::query("DROP TRIGGER full").execute(&store.0.writer).await?;
    store.revoke_host(LOCAL, host).await?;
    assert_eq!(store.inventory().version.revision, before.version.revision + 1);
    Ok(())
}

#[tokio::test]
async fn pages_follow_each_other_without_gap() -> TestResult {
    let (store, _) = in_memory().await?;
    for _ in 0..9 {
        store.create_token(LOCAL, spec("*")?).await?;
    }
    let (mut seen, mut after) = (Vec::new(), Some(0));
    while let Some(position) = after {
        let page = store.audit_page(position, 4).await?;
        seen.extend(page.leaves.into_iter().map(|leaf| leaf.seq));
        after = page.next;
    }
    assert_eq!(seen, (1..=10).collect::<Vec<_>>());
    Ok(())
}

#[tokio::test]
async fn a_changed_or_missing_leaf_is_found() -> TestResult {
    for damage in [
        "UPDATE audit SET leaf = (SELECT leaf FROM audit WHERE seq = 2) WHERE seq = 3",
        "DELETE FROM audit WHERE seq = 2",
    ] {
        let (store, _) = in_memory().await?;
        for _ in 0..3 {
            store.create_token(LOCAL, spec("*")?).await?;
        }
        assert_eq!(store.verify_audit().await?, 4);
        sqlx::query(sqlx::AssertSqlSafe(damage)).execute(&store.0.writer).await?;
        assert!(
            matches!(store.verify_audit().await, Err(StoreError::Corrupt { table: "audit", .. })),
            "{damage}"
        );
    }
    Ok(())
}

#[test]
fn the_bytes_of_a_leaf_are_fixed() -> TestResult {
    use crate::audit::{Action, Entry, Object};
    use cloison_proto::version::MeshTime;
    let entry = Entry::done(LOCAL, Action::MeshInit, &[Object::Mesh]);
    let bytes = minicbor::to_vec(entry.leaf(1, MeshTime(1_800_000_000), [0; 32]))?;
    let shown: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    let expected = format!(
        "8a01011a6b49d200656c6f63616c696d6573682e696e697481646d65736864646f6e65f6f65820{}",
        "00".repeat(32)
    );
    assert_eq!(shown, expected);
    Ok(())
}
