use crate::inventory::{Inventory, PolicyVersion};
use crate::store::testing::{LOCAL, TestResult, in_memory, joined, policy};
use crate::store::{Gate, GateRefusal, IfMatch, LabelChange, RedeemError, StoreError};

#[tokio::test]
async fn a_policy_is_replaced_only_by_who_knows_it() -> TestResult {
    let (store, _) = in_memory().await?;
    let write = || policy(&[("postgres", &["db-1"])]);
    let first = store.put_policy(LOCAL, write()?, IfMatch::Absent).await?;
    assert_eq!(first.version, PolicyVersion(1));
    for stale in [
        IfMatch::Absent,
        IfMatch::Version(PolicyVersion(2)),
        IfMatch::Version(PolicyVersion(0)),
    ] {
        let refused = store.put_policy(LOCAL, write()?, stale).await;
        assert!(
            matches!(
                refused,
                Err(StoreError::PolicyChanged {
                    current: Some(PolicyVersion(1))
                })
            ),
            "{stale:?}: {refused:?}"
        );
    }
    joined(&store, "db-1", 1).await?;
    let second = store.put_policy(LOCAL, write()?, IfMatch::Version(first.version)).await?;
    assert_eq!(second.version, PolicyVersion(2), "a join does not make an edit stale");
    assert_eq!(store.policy(first.version).await?.version, first.version);
    assert!(matches!(store.policy(PolicyVersion(9)).await, Err(StoreError::NotFound(_))));
    Ok(())
}

#[tokio::test]
async fn of_many_writers_that_know_the_same_policy_one_wins() -> TestResult {
    let (store, _) = in_memory().await?;
    let write = policy(&[])?;
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let (store, write) = (store.clone(), write.clone());
            tokio::spawn(async move { store.put_policy(LOCAL, write, IfMatch::Absent).await.is_ok() })
        })
        .collect();
    let mut won = 0;
    for task in tasks {
        won += usize::from(task.await?);
    }
    assert_eq!(won, 1);
    Ok(())
}

struct NoMoreThan(usize);

impl Gate for NoMoreThan {
    fn check(&self, after: &Inventory) -> Result<(), GateRefusal> {
        let full = after.hosts.len() > self.0;
        if full {
            Err(GateRefusal {
                code: "view_limit",
                detail: "too many".into(),
            })
        } else {
            Ok(())
        }
    }
}

#[tokio::test]
async fn what_the_gate_refuses_does_not_happen() -> TestResult {
    let (store, _) = in_memory().await?;
    joined(&store, "a", 1).await?;
    store.set_gate(Box::new(NoMoreThan(1)));
    let before = store.inventory();
    let token = store.create_token(LOCAL, crate::store::testing::spec("b")?).await?;
    let refused = store.redeem_token(&crate::store::testing::attempt(&token, 2)).await;
    assert!(matches!(refused, Err(RedeemError::Denied(crate::audit::Cause::ViewLimit))));
    assert_eq!(store.inventory().content_revision, before.content_revision);
    store.set_gate(Box::new(NoMoreThan(0)));
    let refused = store.put_policy(LOCAL, policy(&[])?, IfMatch::Absent).await;
    assert!(matches!(refused, Err(StoreError::Refused(GateRefusal { code: "view_limit", .. }))));
    assert!(store.inventory().policy.is_none());
    store.set_gate(Box::new(NoMoreThan(2)));
    assert!(
        store.redeem_token(&crate::store::testing::attempt(&token, 2)).await.is_ok(),
        "a refused join consumed nothing"
    );
    Ok(())
}

#[tokio::test]
async fn nothing_stands_before_a_revocation() -> TestResult {
    let (store, _) = in_memory().await?;
    let (first, second) = (joined(&store, "a", 1).await?, joined(&store, "b", 2).await?);
    store.set_gate(Box::new(NoMoreThan(0)));
    assert!(store.label_host(LOCAL, second, LabelChange::default()).await.is_err());
    store.revoke_host(LOCAL, first).await?;
    assert!(store.inventory().hosts.keys().eq([&second]));
    Ok(())
}

#[tokio::test]
async fn waiters_wake_with_the_inventory_of_the_commit() -> TestResult {
    let (store, _) = in_memory().await?;
    let mut changes = store.subscribe();
    let before = changes.borrow_and_update().clone();
    let written = store.put_policy(LOCAL, policy(&[])?, IfMatch::Absent).await?;
    changes.changed().await?;
    let after = changes.borrow_and_update().clone();
    assert_eq!(
        (after.version.revision, after.content_revision),
        (written.revision, written.revision)
    );
    assert_eq!(after.version.revision, before.version.revision + 1);
    store.create_token(LOCAL, crate::store::testing::spec("*")?).await?;
    assert_eq!(store.inventory().content_revision, written.revision, "a token changes no view");
    Ok(())
}
