use std::time::Duration;

use crate::store::testing::{LOCAL, START, TestResult, attempt, in_memory, joined, spec};
use crate::store::{HostRefusal, Serial, ViewMark};

#[tokio::test]
async fn a_new_certificate_retires_the_old_one_at_its_first_use_and_not_before() -> TestResult {
    let (store, _) = in_memory().await?;
    let host = joined(&store, "a", 1).await?;
    let serial = |n: u8| Serial([n; 16]);
    assert_eq!(
        store.admit_certificate(host, serial(1)).await?,
        Err(HostRefusal::Superseded),
        "not one that was never issued"
    );
    store
        .record_certificate(host, serial(1), START.plus(Duration::from_secs(86_400)))
        .await?;
    assert_eq!(store.admit_certificate(host, serial(1)).await?, Ok(()));
    store
        .record_certificate(host, serial(2), START.plus(Duration::from_secs(90_000)))
        .await?;
    assert_eq!(
        store.admit_certificate(host, serial(1)).await?,
        Ok(()),
        "the answer with the new one may have been lost"
    );
    assert_eq!(store.admit_certificate(host, serial(2)).await?, Ok(()));
    assert_eq!(store.admit_certificate(host, serial(1)).await?, Err(HostRefusal::Superseded));
    assert_eq!(store.host(host).await?.certificates.current.map(|(s, _)| s), Some(serial(2)));
    store.revoke_host(LOCAL, host).await?;
    assert_eq!(store.admit_certificate(host, serial(2)).await?, Err(HostRefusal::Revoked));
    assert!(store.record_certificate(host, serial(3), START).await.is_err());
    assert_eq!(
        store.admit_certificate(cloison_proto::id::HostId([0; 16]), serial(2)).await?,
        Err(HostRefusal::Unknown)
    );
    Ok(())
}

#[tokio::test]
async fn a_host_renews_by_its_key_for_thirty_days_after_contact_unless_revoked() -> TestResult {
    let (store, clock) = in_memory().await?;
    let token = store.create_token(LOCAL, spec("a")?).await?;
    let attempt = attempt(&token, 1);
    let host = store.redeem_token(&attempt).await?.host.id;
    clock.advance(Duration::from_secs(20 * 86_400));
    store.record_seen(host, 7).await?;
    assert_eq!(store.host(host).await?.incarnation, Some(7));
    clock.advance(Duration::from_secs(30 * 86_400));
    assert_eq!(store.renewable(&attempt.identity).await?, Ok(host));
    clock.advance(Duration::from_secs(1));
    assert_eq!(store.renewable(&attempt.identity).await?, Err(HostRefusal::TooLate));
    store.record_seen(host, 8).await?;
    assert_eq!(store.renewable(&attempt.identity).await?, Ok(host));
    store.revoke_host(LOCAL, host).await?;
    assert_eq!(store.renewable(&attempt.identity).await?, Err(HostRefusal::Revoked));
    let stranger = cloison_proto::key::SigningKey::from_seed(&[77; 32]).identity();
    assert_eq!(store.renewable(&stranger).await?, Err(HostRefusal::Unknown));
    Ok(())
}

#[tokio::test]
async fn notes_about_contact_raise_no_revision_and_write_no_leaf() -> TestResult {
    let (store, _) = in_memory().await?;
    let host = joined(&store, "a", 1).await?;
    let before = (store.inventory().version, store.audit_head().await?);
    store.record_seen(host, u64::MAX).await?;
    let mark = ViewMark {
        revision: 3,
        state_hash: [4; 32],
    };
    store.record_view_marks(&[(host, mark)]).await?;
    assert_eq!(store.view_marks().await?.get(&host), Some(&mark));
    assert_eq!(store.host(host).await?.incarnation, Some(u64::MAX));
    assert_eq!((store.inventory().version, store.audit_head().await?), before);
    Ok(())
}
