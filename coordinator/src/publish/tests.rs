use cloison_proto::control::agent::{Ack, Hello};
use cloison_proto::label::LabelSet;
use cloison_proto::version::MeshTime;

use super::*;
use crate::policy::explain::LiveState as _;
use crate::store::testing::{LOCAL, START, TestResult, in_memory, joined};
use crate::store::{IfMatch, LabelChange, PolicyWrite};

const POLICY: &str = "version: 1\ncomponents:\n  a: {on: h1, attach: host}\n  b: {on: h2, attach: host}\nallow: ['a -> b:tcp/1']\n";

/// The test policies' placements are on hosts by name.
async fn apply(store: &Store, text: &str) -> TestResult {
    let policy = cloison_proto::policy::parse(text).map_err(|findings| format!("{findings:?}"))?;
    let placements = policy.components().iter().map(|(component, c)| crate::inventory::Placement {
        component: component.clone(),
        on: match &c.on {
            cloison_proto::policy::On::Hosts(names) => names.iter().cloned().map(crate::inventory::On::Name).collect(),
            cloison_proto::policy::On::Labels(labels) => vec![crate::inventory::On::Labels(labels.clone())],
        },
    });
    let write = PolicyWrite {
        text: text.into(),
        placements: placements.collect(),
    };
    store.put_policy(LOCAL, write, IfMatch::Any).await?;
    Ok(())
}

fn publisher(store: &Store) -> Result<Arc<Publisher>, Box<dyn std::error::Error>> {
    let roots = Roots::generate(store.inventory().mesh, store.environment())?;
    Ok(Publisher::new(store.clone(), Arc::new(roots)))
}

fn offered(publisher: &Publisher, host: HostId) -> Result<Arc<Offer>, &'static str> {
    publisher.hub().offer(host, START).ok_or("nothing is offered")
}

#[tokio::test]
async fn a_view_keeps_its_version_until_it_changes() -> TestResult {
    let (store, _) = in_memory().await?;
    let (h1, h2, h3) = (
        joined(&store, "h1", 1).await?,
        joined(&store, "h2", 2).await?,
        joined(&store, "h3", 3).await?,
    );
    let publisher = publisher(&store)?;
    publisher.reconcile().await?;
    let before = offered(&publisher, h3)?.header;
    apply(&store, POLICY).await?;
    publisher.reconcile().await?;
    let revision = store.inventory().version.revision;
    for host in [h1, h2] {
        assert_eq!(offered(&publisher, host)?.header.version.revision, revision);
    }
    assert_eq!(offered(&publisher, h3)?.header, before, "nothing changed for it");
    let again = offered(&publisher, h1)?;
    publisher.reconcile().await?;
    assert!(Arc::ptr_eq(&again, &offered(&publisher, h1)?), "doing it twice changes nothing");
    assert_eq!(publisher.hub().progress().version, store.inventory().version);
    Ok(())
}

#[tokio::test]
async fn another_process_offers_the_same_versions() -> TestResult {
    let (store, _) = in_memory().await?;
    let h1 = joined(&store, "h1", 1).await?;
    let roots = Arc::new(Roots::generate(store.inventory().mesh, store.environment())?);
    let first = Publisher::new(store.clone(), Arc::clone(&roots));
    first.reconcile().await?;
    apply(&store, "version: 1").await?;
    let second = Publisher::new(store.clone(), roots);
    second.reconcile().await?;
    assert_eq!(offered(&first, h1)?.header, offered(&second, h1)?.header);
    Ok(())
}

/// One version never has two contents (I12), whoever compiles it.
#[tokio::test]
async fn a_view_that_changes_by_itself_gets_a_revision_of_its_own() -> TestResult {
    let (store, _) = in_memory().await?;
    let h1 = joined(&store, "h1", 1).await?;
    let first = publisher(&store)?;
    first.reconcile().await?;
    let other_authorities = publisher(&store)?;
    other_authorities.reconcile().await?;
    let (old, new) = (offered(&first, h1)?.header, offered(&other_authorities, h1)?.header);
    assert!(old.state_hash != new.state_hash && old.version < new.version, "{old:?} {new:?}");
    Ok(())
}

#[tokio::test]
async fn a_revoked_host_has_no_view_and_stands_in_none() -> TestResult {
    let (store, _) = in_memory().await?;
    let (h1, h2) = (joined(&store, "h1", 1).await?, joined(&store, "h2", 2).await?);
    apply(&store, POLICY).await?;
    let publisher = publisher(&store)?;
    publisher.reconcile().await?;
    let hello = Hello {
        software: String::new(),
        version: None,
        state_hash: None,
        incarnation: 1,
        endpoints: Vec::new(),
    };
    let hub = publisher.hub();
    let welcome = hub.attach(h2, [192, 0, 2, 1].into(), None, &hello).ok_or("not taken")?;
    assert!(hub.live(h2).linked);
    store.revoke_host(LOCAL, h2).await?;
    publisher.reconcile().await?;
    assert_eq!(welcome.slot.farewell(), Some(Farewell::Revoked));
    assert!(hub.offer(h2, START).is_none() && hub.attach(h2, [192, 0, 2, 1].into(), None, &hello).is_none());
    let view = cloison_proto::view::View::parse(&offered(&publisher, h1)?.items, h1)?;
    assert!(view.peers.is_empty());
    Ok(())
}

/// Two machines with one disk: the one that began later has the higher incarnation.
#[tokio::test]
async fn a_link_of_a_lower_incarnation_does_not_take_the_place_of_a_higher_one() -> TestResult {
    let (store, _) = in_memory().await?;
    let h1 = joined(&store, "h1", 1).await?;
    let publisher = publisher(&store)?;
    publisher.reconcile().await?;
    let hub = publisher.hub();
    let hello = |incarnation| Hello {
        software: String::new(),
        version: None,
        state_hash: None,
        incarnation,
        endpoints: Vec::new(),
    };
    let attach = |incarnation| hub.attach(h1, [192, 0, 2, 1].into(), None, &hello(incarnation)).ok_or("not taken");
    let newer = attach(9)?;
    let older = attach(5)?;
    assert_eq!((older.slot.farewell(), newer.slot.farewell()), (Some(Farewell::Replaced), None));
    assert!(older.cloned && hub.is_cloned(h1) && hub.live(h1).linked);
    assert!(!attach(5)?.cloned, "noted once");
    hub.detach(h1, &older.slot);
    assert!(hub.live(h1).linked, "it never had the place");
    // Alone, it is taken: a machine that was set back to an older state has nobody beside it.
    hub.detach(h1, &newer.slot);
    assert_eq!(attach(5)?.slot.farewell(), None);
    Ok(())
}

#[tokio::test]
async fn only_the_newest_link_speaks_for_a_host() -> TestResult {
    let (store, _) = in_memory().await?;
    let h1 = joined(&store, "h1", 1).await?;
    let publisher = publisher(&store)?;
    publisher.reconcile().await?;
    let hub = publisher.hub();
    let hello = Hello {
        software: String::new(),
        version: None,
        state_hash: None,
        incarnation: 1,
        endpoints: Vec::new(),
    };
    let attach = || hub.attach(h1, [192, 0, 2, 1].into(), None, &hello).ok_or("not taken");
    let (old, new) = (attach()?, attach()?);
    let header = offered(&publisher, h1)?.header;
    let ack = Ack {
        version: header.version,
        state_hash: header.state_hash,
    };
    hub.acked(h1, &old.slot, &ack);
    assert!(!hub.live(h1).applied, "the older link has nothing to say any more");
    hub.detach(h1, &old.slot);
    assert!(hub.live(h1).linked);
    hub.acked(h1, &new.slot, &ack);
    assert!(hub.live(h1).applied);
    assert_eq!(hub.wait_applied(0, Duration::ZERO).await.applied, 1);
    Ok(())
}

#[tokio::test]
async fn a_lease_is_renewed_when_a_24th_of_it_has_passed() -> TestResult {
    let (store, _) = in_memory().await?;
    let h1 = joined(&store, "h1", 1).await?;
    let publisher = publisher(&store)?;
    publisher.reconcile().await?;
    let at = |seconds: u64| publisher.hub().offer(h1, MeshTime(START.0 + seconds)).ok_or("nothing is offered");
    let first = at(0)?;
    assert_eq!(at(3599)?.lease, first.lease);
    assert_eq!(at(3600)?.leased_at, MeshTime(START.0 + 3600));
    assert_eq!(at(3600)?.header, first.header, "a lease changes no view");
    Ok(())
}

#[tokio::test]
async fn a_policy_that_cannot_be_read_publishes_nothing_and_leaves_what_is() -> TestResult {
    let (store, _) = in_memory().await?;
    let h1 = joined(&store, "h1", 1).await?;
    let publisher = publisher(&store)?;
    publisher.reconcile().await?;
    let before = offered(&publisher, h1)?.header;
    let write = PolicyWrite {
        text: "version: 99".into(),
        placements: Vec::new(),
    };
    store.put_policy(LOCAL, write, IfMatch::Any).await?;
    assert!(matches!(publisher.reconcile().await, Err(PublishError::Policy(_))));
    assert_eq!(offered(&publisher, h1)?.header, before);
    apply(&store, POLICY).await?;
    publisher.reconcile().await?;
    assert!(offered(&publisher, h1)?.header.version > before.version);
    Ok(())
}

#[tokio::test]
async fn labels_move_components_and_so_change_views() -> TestResult {
    let (store, _) = in_memory().await?;
    let h1 = joined(&store, "h1", 1).await?;
    apply(&store, "version: 1\ncomponents:\n  a: {on: {role: db}, attach: host}\n").await?;
    let publisher = publisher(&store)?;
    publisher.reconcile().await?;
    let before = offered(&publisher, h1)?.items.len();
    let change = LabelChange {
        set: LabelSet::from([("role".parse()?, "db".parse()?)]),
        ..LabelChange::default()
    };
    store.label_host(LOCAL, h1, change).await?;
    publisher.reconcile().await?;
    assert_eq!(offered(&publisher, h1)?.items.len(), before + 1);
    Ok(())
}
