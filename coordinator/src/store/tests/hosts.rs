use cloison_proto::id::HostId;

use crate::audit::Cause;
use crate::store::testing::{LOCAL, TestResult, attempt, in_memory, joined, spec};
use crate::store::{LabelChange, RedeemError, StoreError};

#[tokio::test]
async fn revocation_is_final_frees_the_name_and_never_the_keys() -> TestResult {
    let (store, _) = in_memory().await?;
    let host = joined(&store, "db-1", 1).await?;
    let revision = store.inventory().version.revision;
    assert_eq!(store.revoke_host(LOCAL, host).await?, revision + 1);
    assert!(store.inventory().hosts.is_empty());
    assert!(store.host(host).await?.revoked_at.is_some());
    assert!(matches!(store.revoke_host(LOCAL, host).await, Err(StoreError::Revoked(_))));
    assert!(matches!(
        store.label_host(LOCAL, host, LabelChange::default()).await,
        Err(StoreError::Revoked(_))
    ));
    let token = store.create_token(LOCAL, spec("db-1")?).await?;
    let old_key = store.redeem_token(&attempt(&token, 1)).await;
    assert!(
        matches!(old_key, Err(RedeemError::Denied(Cause::KeyKnown))),
        "keys are unique over all history"
    );
    store.redeem_token(&attempt(&token, 2)).await?;
    assert_eq!((store.list_hosts(false).await?.len(), store.list_hosts(true).await?.len()), (1, 2));
    Ok(())
}

#[tokio::test]
async fn names_stay_unique_among_living_hosts() -> TestResult {
    let (store, _) = in_memory().await?;
    let (first, second) = (joined(&store, "a", 1).await?, joined(&store, "b", 2).await?);
    let taken = store.rename_host(LOCAL, second, "a".parse()?).await;
    assert!(matches!(taken, Err(StoreError::NameTaken { holder, .. }) if holder == first));
    store.rename_host(LOCAL, second, "b".parse()?).await?;
    store.rename_host(LOCAL, second, "c".parse()?).await?;
    assert!(
        store
            .inventory()
            .host_named(&"c".parse()?)
            .is_some_and(|h| h.id == second && h.name_given)
    );
    assert!(matches!(
        store.rename_host(LOCAL, HostId([0; 16]), "d".parse()?).await,
        Err(StoreError::NotFound("host"))
    ));
    Ok(())
}

#[tokio::test]
async fn a_host_has_at_most_thirty_two_labels() -> TestResult {
    let (store, _) = in_memory().await?;
    let host = joined(&store, "a", 1).await?;
    let labels = |n: usize| {
        (0..n)
            .map(|i| Ok((format!("k{i}").parse()?, "v".parse()?)))
            .collect::<Result<_, cloison_proto::label::NameError>>()
    };
    store
        .label_host(
            LOCAL,
            host,
            LabelChange {
                set: labels(32)?,
                ..LabelChange::default()
            },
        )
        .await?;
    let more = store
        .label_host(
            LOCAL,
            host,
            LabelChange {
                set: labels(33)?,
                ..LabelChange::default()
            },
        )
        .await;
    assert!(matches!(more, Err(StoreError::Invalid { what: "labels", .. })));
    assert_eq!(store.host(host).await?.host.labels.len(), 32);
    assert_eq!(store.list_hosts(false).await?.first().map(|h| h.host.labels.len()), Some(32));
    Ok(())
}
