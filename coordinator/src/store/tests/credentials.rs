use std::collections::BTreeSet;
use std::time::Duration;

use crate::audit::{Actor, Context};
use crate::credential::Scope;
use crate::store::testing::{LOCAL, TestResult, in_memory, policy, spec};
use crate::store::{CredentialSpec, IfMatch, NewCredential, Store, StoreError};

fn wanted(scopes: &[Scope]) -> CredentialSpec {
    CredentialSpec {
        name: "test".into(),
        scopes: scopes.iter().copied().collect(),
        lifetime: Duration::from_secs(3600),
    }
}

async fn made(store: &Store, scopes: &[Scope]) -> Result<NewCredential, StoreError> {
    store.create_credential(LOCAL, wanted(scopes)).await
}

#[tokio::test]
async fn a_credential_is_good_until_it_expires_or_is_revoked() -> TestResult {
    let (store, clock) = in_memory().await?;
    let credential = made(&store, &[Scope::Read]).await?;
    let text = credential.text.reveal();
    let principal = store.authenticate(&text).await?.ok_or("not let in")?;
    assert!(principal.id == credential.text.id && principal.may(Scope::Read) && !principal.may(Scope::Operate));
    clock.advance(Duration::from_secs(3599));
    assert!(store.authenticate(&text).await?.is_some());
    clock.advance(Duration::from_secs(1));
    assert!(store.authenticate(&text).await?.is_none());
    let revoked = made(&store, &[Scope::Owner]).await?;
    store.revoke_credential(LOCAL, revoked.text.id).await?;
    assert!(store.authenticate(&revoked.text.reveal()).await?.is_none());
    assert!(matches!(
        store.revoke_credential(LOCAL, revoked.text.id).await,
        Err(StoreError::NotFound(_))
    ));
    assert!(
        store
            .list_credentials()
            .await?
            .iter()
            .any(|c| c.id == revoked.text.id && c.revoked_at.is_some())
    );
    Ok(())
}

#[tokio::test]
async fn no_credential_with_one_character_changed_lets_anybody_in() -> TestResult {
    let (store, _) = in_memory().await?;
    let text = made(&store, &[Scope::Owner]).await?.text.reveal();
    for position in 0..text.len() {
        let changed: String = text
            .char_indices()
            .map(|(i, c)| {
                if i != position {
                    c
                } else if c == 'a' {
                    'b'
                } else {
                    'a'
                }
            })
            .collect();
        assert!(store.authenticate(&changed).await?.is_none(), "{position}");
    }
    assert!(store.authenticate("").await?.is_none());
    Ok(())
}

#[tokio::test]
async fn each_change_needs_its_scope_inside_the_transaction() -> TestResult {
    let (store, _) = in_memory().await?;
    for scope in Scope::ALL {
        let id = made(&store, &[scope]).await?.text.id;
        let cx = Context::of(Actor::Credential(id));
        let allowed = [
            store.put_policy(cx, policy(&[])?, IfMatch::Any).await.is_ok(),
            store.create_token(cx, spec("*")?).await.is_ok(),
            store.create_credential(cx, wanted(&[Scope::Read])).await.is_ok(),
            !matches!(
                store.revoke_host(cx, cloison_proto::id::HostId([0; 16])).await,
                Err(StoreError::NotAuthorised)
            ),
            !matches!(store.set_mesh(cx, Default::default()).await, Err(StoreError::NotAuthorised)),
        ];
        let expected = match scope {
            Scope::Owner => [true; 5],
            Scope::Policy => [true, false, false, false, false],
            Scope::Enroll => [false, true, false, false, false],
            Scope::Operate => [false, false, false, true, false],
            Scope::Read => [false; 5],
        };
        assert_eq!(allowed, expected, "{scope}");
        store.revoke_credential(cx, id).await?;
        let late = store.put_policy(cx, policy(&[])?, IfMatch::Any).await;
        assert!(matches!(late, Err(StoreError::NotAuthorised)), "{scope}: revoked a moment ago");
    }
    Ok(())
}

#[tokio::test]
async fn credentials_that_allow_nothing_or_last_too_long_are_not_made() -> TestResult {
    let (store, _) = in_memory().await?;
    let bad = [
        CredentialSpec {
            scopes: BTreeSet::new(),
            ..wanted(&[])
        },
        CredentialSpec {
            lifetime: Duration::from_secs(401 * 86_400),
            ..wanted(&[Scope::Read])
        },
        CredentialSpec {
            lifetime: Duration::ZERO,
            ..wanted(&[Scope::Read])
        },
        CredentialSpec {
            name: String::new(),
            ..wanted(&[Scope::Read])
        },
        CredentialSpec {
            name: "a\nb".into(),
            ..wanted(&[Scope::Read])
        },
    ];
    for spec in bad {
        assert!(
            matches!(store.create_credential(LOCAL, spec.clone()).await, Err(StoreError::Invalid { .. })),
            "{spec:?}"
        );
    }
    Ok(())
}
