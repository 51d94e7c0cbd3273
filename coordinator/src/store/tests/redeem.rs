use std::collections::BTreeSet;
use std::time::Duration;

use cloison_proto::key::Secret32;

use crate::audit::Cause;
use crate::store::testing::{LOCAL, TestResult, attempt, in_memory, joined, on_disk, policy, spec};
use crate::store::{IfMatch, RedeemError, Redeemed, Redemption, Store, TokenSpec};

async fn cause(store: &Store, attempt: &Redemption) -> Option<Cause> {
    match store.redeem_token(attempt).await {
        Err(RedeemError::Denied(cause)) => Some(cause),
        Ok(_) | Err(RedeemError::Store(_)) => None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn fifty_machines_with_one_token_make_exactly_one_host() -> TestResult {
    let dir = tempfile::tempdir()?;
    let (store, _) = on_disk(&dir.path().join("db")).await?;
    for round in 0..20_u8 {
        let token = store.create_token(LOCAL, spec(&format!("db-{round}"))?).await?;
        let attempts = (1..=50_u8).map(|machine| {
            let mut attempt = attempt(&token, machine);
            // Machines of an earlier round have other keys: none of them is known yet.
            let seed = std::array::from_fn(|i| if i == 1 { round } else { machine });
            attempt.identity = cloison_proto::key::SigningKey::from_seed(&seed).identity();
            attempt.wg_key = cloison_proto::key::WgPrivateKey::from_bytes(seed).public();
            let store = store.clone();
            tokio::spawn(async move { store.redeem_token(&attempt).await })
        });
        let mut hosts = Vec::new();
        for task in attempts.collect::<Vec<_>>() {
            match task.await? {
                Ok(redeemed) => hosts.push(redeemed.host.id),
                Err(RedeemError::Denied(cause)) => assert_eq!(cause, Cause::Used),
                Err(RedeemError::Store(error)) => return Err(error.into()),
            }
        }
        assert_eq!(hosts.len(), 1, "round {round}");
        assert_eq!(store.inventory().hosts.len(), usize::from(round) + 1);
    }
    assert_eq!(store.list_hosts(true).await?.len(), 20);
    store.verify_audit().await?;
    Ok(())
}

#[tokio::test]
async fn the_same_attempt_gives_the_same_host_for_ten_minutes() -> TestResult {
    let (store, clock) = in_memory().await?;
    let token = store.create_token(LOCAL, spec("db-1")?).await?;
    let first = store.redeem_token(&attempt(&token, 1)).await?;
    clock.advance(Duration::from_secs(600));
    let again = store.redeem_token(&attempt(&token, 1)).await?;
    assert_eq!((again.host.id, again.repeated, first.repeated), (first.host.id, true, false));
    assert!(!store.host(first.host.id).await?.host.contested);
    clock.advance(Duration::from_secs(1));
    assert_eq!(cause(&store, &attempt(&token, 1)).await, Some(Cause::KeyKnown));
    Ok(())
}

#[tokio::test]
async fn every_refusal_looks_alike_and_has_its_cause_in_the_audit() -> TestResult {
    let (store, clock) = in_memory().await?;
    let used = store.create_token(LOCAL, spec("used")?).await?;
    store.redeem_token(&attempt(&used, 1)).await?;
    let revoked = store.create_token(LOCAL, spec("revoked")?).await?;
    store.revoke_token(LOCAL, revoked.id).await?;
    let near = TokenSpec {
        source: Some("192.0.2.0/30".parse()?),
        ..spec("near")?
    };
    let near = store.create_token(LOCAL, near).await?;
    let taken = store.create_token(LOCAL, spec("taken")?).await?;
    let open = store.create_token(LOCAL, spec("*")?).await?;
    joined(&store, "taken-by-another", 3).await?;
    let other = store
        .list_hosts(false)
        .await?
        .into_iter()
        .find(|h| h.host.name.as_str() == "taken-by-another");
    store.rename_host(LOCAL, other.ok_or("no host")?.host.id, "taken".parse()?).await?;
    let short = TokenSpec {
        lifetime: Duration::from_secs(10),
        ..spec("*")?
    };
    let expired = store.create_token(LOCAL, short).await?;
    clock.advance(Duration::from_secs(10));

    let unknown = Redemption {
        token: cloison_proto::id::TokenId([9; 8]),
        ..attempt(&open, 9)
    };
    let wrong = Redemption {
        secret: Secret32::from_bytes([0; 32]),
        ..attempt(&open, 9)
    };
    let known_key = Redemption {
        wg_key: attempt(&open, 1).wg_key,
        ..attempt(&open, 9)
    };
    let known_identity = Redemption {
        identity: attempt(&open, 1).identity,
        ..attempt(&open, 9)
    };
    let cases = [
        (unknown, Cause::Unknown),
        (wrong, Cause::WrongSecret),
        (attempt(&used, 9), Cause::Used),
        (attempt(&revoked, 9), Cause::Revoked),
        (attempt(&expired, 9), Cause::Expired),
        (attempt(&near, 9), Cause::Source),
        (attempt(&taken, 9), Cause::NameTaken),
        (known_key, Cause::KeyKnown),
        (known_identity, Cause::KeyKnown),
    ];
    for (attempt, expected) in cases {
        let before = store.list_hosts(true).await?.len();
        let error = store.redeem_token(&attempt).await.map_err(|e| (e.to_string(), e)).err();
        let Some((shown, RedeemError::Denied(found))) = error else {
            return Err(format!("{expected}: not refused").into());
        };
        assert_eq!((shown.as_str(), found), ("enroll_denied", expected));
        assert_eq!(store.list_hosts(true).await?.len(), before, "{expected}: nothing may be left");
        let leaf = store
            .audit_page(store.audit_head().await? - 1, 1)
            .await?
            .leaves
            .pop()
            .ok_or("no leaf")?;
        assert_eq!(
            (leaf.action.as_str(), leaf.outcome.as_str(), leaf.cause.as_deref()),
            ("host.join", "refused", Some(expected.as_str()))
        );
    }
    assert!(
        store.redeem_token(&attempt(&taken, 3)).await.is_err(),
        "a key of a living host joins no second time"
    );
    Ok(())
}

#[tokio::test]
async fn a_second_machine_with_a_used_up_token_makes_the_first_contested_until_settled() -> TestResult {
    let (store, _) = in_memory().await?;
    let token = store.create_token(LOCAL, spec("db-1")?).await?;
    let Redeemed { host, .. } = store.redeem_token(&attempt(&token, 1)).await?;
    assert_eq!(cause(&store, &attempt(&token, 2)).await, Some(Cause::Used));
    assert!(store.host(host.id).await?.host.contested);
    assert!(store.inventory().hosts.get(&host.id).is_some_and(|h| h.contested));
    store.settle_host(LOCAL, host.id).await?;
    assert!(!store.host(host.id).await?.host.contested);
    let wrong = Redemption {
        secret: Secret32::from_bytes([0; 32]),
        ..attempt(&token, 2)
    };
    assert_eq!(cause(&store, &wrong).await, Some(Cause::WrongSecret));
    assert!(
        !store.host(host.id).await?.host.contested,
        "who does not know the secret contests nothing"
    );
    Ok(())
}

#[tokio::test]
async fn names_come_from_the_token_and_made_up_ones_are_not_given() -> TestResult {
    let (store, _) = in_memory().await?;
    let pattern = TokenSpec {
        uses: 3,
        labels: [("role".parse()?, "db".parse()?)].into(),
        ..spec("db-*")?
    };
    let token = store.create_token(LOCAL, pattern).await?;
    let mut names = BTreeSet::new();
    for machine in 1..=3 {
        let host = store.redeem_token(&attempt(&token, machine)).await?.host;
        assert!(
            host.name.as_str().starts_with("db-") && host.name.as_str().len() == 9 && !host.name_given,
            "{}",
            host.name
        );
        assert_eq!(host.labels.len(), 1);
        names.insert(host.name.clone());
    }
    assert_eq!(names.len(), 3);
    assert_eq!(cause(&store, &attempt(&token, 4)).await, Some(Cause::Used));
    assert!(
        store.inventory().hosts.values().all(|h| !h.contested),
        "a token for several hosts that ran out accuses nobody"
    );
    let made = names.first().ok_or("no name")?.as_str().to_owned();
    store.put_policy(LOCAL, policy(&[("postgres", &[&made])])?, IfMatch::Absent).await?;
    assert!(
        store.inventory().instances.is_empty(),
        "`on: NAME` must not match a name that nobody gave"
    );
    Ok(())
}

#[tokio::test]
async fn tokens_outside_their_bounds_are_not_made() -> TestResult {
    let (store, _) = in_memory().await?;
    joined(&store, "db-1", 1).await?;
    let bad = [
        TokenSpec { uses: 0, ..spec("*")? },
        TokenSpec { uses: 101, ..spec("*")? },
        TokenSpec { uses: 2, ..spec("db-2")? },
        TokenSpec {
            lifetime: Duration::ZERO,
            ..spec("*")?
        },
        TokenSpec {
            lifetime: Duration::from_secs(31 * 86_400),
            ..spec("*")?
        },
        spec("db-1")?,
    ];
    for spec in bad {
        assert!(store.create_token(LOCAL, spec.clone()).await.is_err(), "{spec:?}");
    }
    assert_eq!(store.list_tokens().await?.len(), 1);
    Ok(())
}

#[tokio::test]
async fn strangers_cannot_fill_the_audit() -> TestResult {
    let (store, clock) = in_memory().await?;
    let token = store.create_token(LOCAL, spec("*")?).await?;
    let wrong = || Redemption {
        secret: Secret32::from_bytes([0; 32]),
        ..attempt(&token, 9)
    };
    let before = store.audit_head().await?;
    for _ in 0..100 {
        assert_eq!(cause(&store, &wrong()).await, Some(Cause::WrongSecret));
    }
    assert_eq!(store.audit_head().await? - before, 60);
    clock.advance(Duration::from_secs(60));
    assert_eq!(cause(&store, &wrong()).await, Some(Cause::WrongSecret));
    let last = store
        .audit_page(store.audit_head().await? - 1, 1)
        .await?
        .leaves
        .pop()
        .ok_or("no leaf")?;
    assert!(last.objects.contains(&"suppressed_40".to_owned()), "{:?}", last.objects);
    Ok(())
}
