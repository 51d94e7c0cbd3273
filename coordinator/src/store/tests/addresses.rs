use std::time::Duration;

use cloison_proto::net::{AddressPair, OverlayRange};

use crate::store::testing::{LOCAL, TestResult, environment, in_memory, joined, new_mesh, policy};
use crate::store::{IfMatch, LabelChange, MeshChange, NewMesh, Store, StoreError};

/// The addresses of a component on a host of that name.
fn pair(store: &Store, component: &str, host: &str) -> Option<AddressPair> {
    let inventory = store.inventory();
    let id = inventory.hosts.values().find(|h| h.name.as_str() == host)?.id;
    inventory.instances.get(component)?.get(&id).copied()
}

#[tokio::test]
async fn an_instance_keeps_its_addresses_for_thirty_days_after_it_is_gone() -> TestResult {
    let (store, clock) = in_memory().await?;
    joined(&store, "db-1", 1).await?;
    let with = policy(&[("postgres", &["db-1"])])?;
    store.put_policy(LOCAL, with.clone(), IfMatch::Any).await?;
    let first = pair(&store, "postgres", "db-1").ok_or("no addresses")?;
    store.put_policy(LOCAL, policy(&[("n8n", &["db-1"])])?, IfMatch::Any).await?;
    assert_eq!(pair(&store, "postgres", "db-1"), None);
    let other = pair(&store, "n8n", "db-1").ok_or("no addresses")?;
    assert_ne!(other, first, "an address never moves while it is kept");
    clock.advance(Duration::from_secs(30 * 86_400 - 1));
    store.put_policy(LOCAL, with.clone(), IfMatch::Any).await?;
    assert_eq!(pair(&store, "postgres", "db-1"), Some(first));
    store.put_policy(LOCAL, policy(&[])?, IfMatch::Any).await?;
    clock.advance(Duration::from_secs(30 * 86_400));
    store.put_policy(LOCAL, policy(&[])?, IfMatch::Any).await?;
    let kept: i64 = sqlx::query_scalar("SELECT count(*) FROM instance")
        .fetch_one(&store.0.readers)
        .await?;
    assert_eq!(kept, 0, "free after 30 days");
    Ok(())
}

#[tokio::test]
async fn no_address_is_given_again_while_a_lease_may_still_name_its_old_owner() -> TestResult {
    let (store, clock) = in_memory().await?;
    let lease = Some(Duration::from_secs(60 * 86_400));
    store
        .set_mesh(
            LOCAL,
            MeshChange {
                lease,
                ..MeshChange::default()
            },
        )
        .await?;
    joined(&store, "db-1", 1).await?;
    store.put_policy(LOCAL, policy(&[("postgres", &["db-1"])])?, IfMatch::Any).await?;
    store.put_policy(LOCAL, policy(&[])?, IfMatch::Any).await?;
    for (days, kept) in [(59, 1), (1, 0)] {
        clock.advance(Duration::from_secs(days * 86_400));
        store.put_policy(LOCAL, policy(&[])?, IfMatch::Any).await?;
        let found: i64 = sqlx::query_scalar("SELECT count(*) FROM instance")
            .fetch_one(&store.0.readers)
            .await?;
        assert_eq!(found, kept);
    }
    Ok(())
}

#[tokio::test]
async fn addresses_come_with_the_write_that_makes_the_instance_whichever_it_is() -> TestResult {
    let (store, _) = in_memory().await?;
    let mut write = policy(&[("postgres", &["db-1"])])?;
    let labels = vec![("role".parse()?, "db".parse()?)];
    write.placements.push(crate::inventory::Placement {
        component: "backup".parse()?,
        on: vec![crate::inventory::On::Labels(labels)],
    });
    store.put_policy(LOCAL, write, IfMatch::Absent).await?;
    assert!(store.inventory().instances.is_empty());
    let host = joined(&store, "db-1", 1).await?;
    assert!(pair(&store, "postgres", "db-1").is_some() && pair(&store, "backup", "db-1").is_none());
    let set = [("role".parse()?, "db".parse()?)].into();
    store
        .label_host(
            LOCAL,
            host,
            LabelChange {
                set,
                ..LabelChange::default()
            },
        )
        .await?;
    let backup = pair(&store, "backup", "db-1");
    assert!(backup.is_some());
    let remove = ["role".parse()?].into();
    store
        .label_host(
            LOCAL,
            host,
            LabelChange {
                remove,
                ..LabelChange::default()
            },
        )
        .await?;
    assert!(pair(&store, "backup", "db-1").is_none());
    store.revoke_host(LOCAL, host).await?;
    assert!(store.inventory().instances.is_empty());
    let again = joined(&store, "db-1", 2).await?;
    let inventory = store.inventory();
    let (new, old) = (inventory.instances_on(again).next().ok_or("no instance")?.1, backup);
    assert_ne!(
        Some(new),
        old,
        "another host never gets a revoked one's addresses while they are kept"
    );
    Ok(())
}

#[tokio::test]
async fn a_pool_that_runs_out_refuses_the_write_and_changes_nothing() -> TestResult {
    let (env, _) = environment();
    // A /24 lies wholly inside the reserved addresses: it has room for none.
    let overlay = OverlayRange::new([10, 77, 0, 0].into(), 24, "fd12:3456:789a::".parse()?)?;
    let store = Store::in_memory(env, NewMesh { overlay, ..new_mesh()? }).await?;
    joined(&store, "db-1", 1).await?;
    let before = store.inventory();
    let refused = store.put_policy(LOCAL, policy(&[("postgres", &["db-1"])])?, IfMatch::Absent).await;
    assert!(matches!(refused, Err(StoreError::PoolExhausted { .. })), "{refused:?}");
    assert_eq!(store.inventory().version, before.version);
    assert!(store.inventory().policy.is_none());
    let wider = OverlayRange::new([10, 78, 0, 0].into(), 16, "fd12:3456:789a::".parse()?)?;
    store
        .set_mesh(
            LOCAL,
            MeshChange {
                overlay: Some(wider),
                ..MeshChange::default()
            },
        )
        .await?;
    store
        .put_policy(LOCAL, policy(&[("postgres", &["db-1"])])?, IfMatch::Absent)
        .await?;
    assert!(pair(&store, "postgres", "db-1").is_some_and(|p| wider.contains(p.v4.into()) && wider.contains(p.v6.into())));
    let narrow = store
        .set_mesh(
            LOCAL,
            MeshChange {
                overlay: Some(overlay),
                ..MeshChange::default()
            },
        )
        .await;
    assert!(
        matches!(narrow, Err(StoreError::Invalid { what: "overlay", .. })),
        "not while instances have addresses"
    );
    Ok(())
}
