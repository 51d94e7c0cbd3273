//! Rotations over the loopback, with real QUIC, TLS and SQLite: what a host has to prove, what its peers are told, when the old is dead, and
//! that a coordinator that ends anywhere in between goes on where it was.

#[expect(dead_code, unreachable_pub, reason = "shared with other tests")]
#[path = "common/agent.rs"]
mod agent;
#[expect(dead_code, unreachable_pub, reason = "shared with other tests")]
mod common;

use std::path::Path;
use std::time::Duration;

use agent::{Agent, Coordinator, LOCAL, Link, News};
use cloison_coordinator::entropy::Environment;
use cloison_coordinator::store::MeshChange;
use cloison_coordinator::trust::{Part, Stage};
use cloison_proto::control::agent::RenewCertificate;
use cloison_proto::control::join::{EXPORTER_LABEL, EXPORTER_LEN};
use cloison_proto::control::rotate::{Facts, KeyChallenge, KeyOffer, KeyProof, prove};
use cloison_proto::id::HostId;
use cloison_proto::key::{SigningKey, WgPrivateKey, WgPublicKey};
use cloison_proto::signed::Keys as _;
use cloison_proto::trust::Trust;
use cloison_proto::version::MeshTime;
use common::Outcome;

const POLICY: &str = "version: 1
components:
  n8n: {on: app-1, attach: {unit: n8n.service}}
  postgres: {on: db-1, attach: {user: postgres}, services: {sql: tcp/5432}}
allow:
  - n8n -> postgres:sql
";

/// A mesh of two paired hosts with their links, both with their views.
async fn pair(dir: &Path) -> Outcome<(Coordinator, [(Agent, Link); 2])> {
    let mesh = Coordinator::create(dir).await?;
    mesh.apply(POLICY).await?;
    let (mut app, mut db) = (mesh.enroll("app-1", 1).await?, mesh.enroll("db-1", 2).await?);
    let (app_link, db_link) = (linked(&mesh, &mut app).await?, linked(&mesh, &mut db).await?);
    Ok((mesh, [(app, app_link), (db, db_link)]))
}

async fn linked(mesh: &Coordinator, agent: &mut Agent) -> Outcome<Link> {
    let mut link = agent.link(mesh).await?;
    link.take_view(agent).await?;
    Ok(link)
}

fn key(seed: u8) -> WgPrivateKey {
    WgPrivateKey::from_bytes([seed; 32])
}

fn exporter(link: &Link) -> Outcome<[u8; EXPORTER_LEN]> {
    let mut exporter = [0; EXPORTER_LEN];
    let exported = link.wire.connection.export_keying_material(&mut exporter, EXPORTER_LABEL, &[]);
    exported.map_err(|_| "no exporter")?;
    Ok(exporter)
}

async fn challenge(agent: &Agent, link: &mut Link) -> Outcome<KeyChallenge> {
    link.say(KeyOffer {}).await?;
    loop {
        if let News::Challenge(challenge) = link.next(agent).await? {
            return Ok(challenge);
        }
    }
}

fn proof(link: &Link, host: HostId, identity: &SigningKey, key: &WgPrivateKey, challenge: &KeyChallenge) -> Outcome<KeyProof> {
    let facts = Facts {
        exporter: &exporter(link)?,
        host,
        ephemeral: &challenge.ephemeral,
        alone: false,
    };
    Ok(prove(facts, identity, key))
}

/// Offers and proves a key as an agent does.
async fn offer(agent: &Agent, link: &mut Link, key: &WgPrivateKey) -> Outcome {
    let challenge = challenge(agent, link).await?;
    let proof = proof(link, agent.host(), &agent.keys.identity, key, &challenge)?;
    link.say(proof).await
}

async fn denied(agent: &Agent, link: &mut Link) -> Outcome<String> {
    loop {
        match link.next(agent).await? {
            News::Denied(denied) => return Ok(denied.code),
            News::View(..) => return Err("a view came where a refusal was expected".into()),
            News::Lease(_) | News::Hints(_) | News::Certificate(_) | News::Challenge(_) | News::RotateKey | News::Goodbye(_) => {}
        }
    }
}

/// The keys of a host, as the view in force on `agent` names them.
fn keys_of(agent: &Agent, host: HostId) -> Outcome<Vec<WgPublicKey>> {
    let view = agent.view.as_ref().ok_or("no view")?.content();
    Ok(if host == agent.host() {
        view.host.wg_keys.clone()
    } else {
        view.peers.get(&host).ok_or("no peer")?.wg_keys.clone()
    })
}

/// Takes views until this one names exactly these keys of `host`.
async fn until_named(agent: &mut Agent, link: &mut Link, host: HostId, keys: &[WgPublicKey]) -> Outcome {
    while keys_of(agent, host).ok().as_deref() != Some(keys) {
        link.take_view(agent).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proven_key_stands_first_in_all_views_and_the_old_one_dies_when_all_have_them() -> Outcome {
    let dir = tempfile::tempdir()?;
    let (mesh, [(mut app, mut app_link), (mut db, mut db_link)]) = pair(dir.path()).await?;
    let (host, old, new) = (db.host(), key(2), key(12));
    offer(&db, &mut db_link, &new).await?;
    let both = [new.public(), old.public()];
    until_named(&mut db, &mut db_link, host, &both).await?;
    // The peer has not taken it up: nothing is retired, however long the host itself has it.
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(mesh.store.host(host).await?.host.wg_keys(), both);
    until_named(&mut app, &mut app_link, host, &both).await?;
    until_named(&mut app, &mut app_link, host, &[new.public()]).await?;
    until_named(&mut db, &mut db_link, host, &[new.public()]).await?;
    assert_eq!(mesh.store.dead_wg_keys().await?.get(&old.public()), Some(&host));
    // Dead is for ever.
    offer(&db, &mut db_link, &old).await?;
    assert_eq!(denied(&db, &mut db_link).await?, "key_known");
    mesh.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_is_not_proven_for_this_link_by_this_host_is_not_taken() -> Outcome {
    let dir = tempfile::tempdir()?;
    let (mesh, [(app, mut app_link), (db, mut db_link)]) = pair(dir.path()).await?;
    let (host, identity, new) = (db.host(), &db.keys.identity, key(12));
    let before = mesh.store.inventory();

    // Without the identity key: whoever else may have come by the certificate.
    let asked = challenge(&db, &mut db_link).await?;
    let forged = proof(&db_link, host, &SigningKey::from_seed(&[99; 32]), &new, &asked)?;
    db_link.say(forged).await?;
    assert_eq!(denied(&db, &mut db_link).await?, "proof");
    // Without the private half of the key.
    let asked = challenge(&db, &mut db_link).await?;
    let unheld = KeyProof {
        wg_key: key(13).public(),
        ..proof(&db_link, host, identity, &new, &asked)?
    };
    db_link.say(unheld).await?;
    assert_eq!(denied(&db, &mut db_link).await?, "proof");
    // A challenge is good for one proof, and none is good without one.
    db_link.say(proof(&db_link, host, identity, &new, &asked)?).await?;
    assert_eq!(denied(&db, &mut db_link).await?, "proof");
    // A proof made on one link is worth nothing on another, nor for another host.
    let asked = challenge(&app, &mut app_link).await?;
    app_link.say(proof(&db_link, app.host(), &app.keys.identity, &new, &asked)?).await?;
    assert_eq!(denied(&app, &mut app_link).await?, "proof");
    let asked = challenge(&app, &mut app_link).await?;
    app_link.say(proof(&app_link, host, identity, &new, &asked)?).await?;
    assert_eq!(denied(&app, &mut app_link).await?, "proof");
    // Another host's key.
    offer(&db, &mut db_link, &key(1)).await?;
    assert_eq!(denied(&db, &mut db_link).await?, "key_known");
    assert_eq!(mesh.store.inventory().version, before.version);
    mesh.stop().await
}

/// The coordinator ends at each step: before the proof, behind the key's storing, before its acknowledgement, before the old one's end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_ends_at_any_step_goes_on_where_it_was() -> Outcome {
    let dir = tempfile::tempdir()?;
    let (mesh, [(mut app, mut app_link), (mut db, mut db_link)]) = pair(dir.path()).await?;
    let (host, new) = (db.host(), key(12));
    let both = [new.public(), key(2).public()];
    challenge(&db, &mut db_link).await?;
    drop((app_link, db_link));
    mesh.stop().await?;

    let mesh = Coordinator::reopen(dir.path()).await?;
    db_link = db.link(&mesh).await?;
    offer(&db, &mut db_link, &new).await?;
    while mesh.store.host(host).await?.host.next.is_none() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(db_link);
    mesh.stop().await?;

    let mesh = Coordinator::reopen(dir.path()).await?;
    db_link = db.link(&mesh).await?;
    until_named(&mut db, &mut db_link, host, &both).await?;
    offer(&db, &mut db_link, &new).await?;
    drop(db_link);
    mesh.stop().await?;

    let mesh = Coordinator::reopen(dir.path()).await?;
    db_link = db.link(&mesh).await?;
    app_link = app.link(&mesh).await?;
    until_named(&mut app, &mut app_link, host, &both).await?;
    drop((app_link, db_link));
    mesh.stop().await?;

    let mesh = Coordinator::reopen(dir.path()).await?;
    (app_link, db_link) = (app.link(&mesh).await?, db.link(&mesh).await?);
    until_named(&mut app, &mut app_link, host, &[new.public()]).await?;
    until_named(&mut db, &mut db_link, host, &[new.public()]).await?;
    assert!(mesh.store.verify_audit().await? > 0);
    mesh.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_lost_its_next_key_or_comes_back_with_an_old_one_proves_another() -> Outcome {
    let dir = tempfile::tempdir()?;
    let (mesh, [(mut app, mut app_link), (mut db, mut db_link)]) = pair(dir.path()).await?;
    let (host, old, lost, new) = (db.host(), key(2), key(12), key(13));
    offer(&db, &mut db_link, &lost).await?;
    until_named(&mut db, &mut db_link, host, &[lost.public(), old.public()]).await?;
    offer(&db, &mut db_link, &new).await?;
    until_named(&mut db, &mut db_link, host, &[new.public(), old.public()]).await?;
    until_named(&mut app, &mut app_link, host, &[new.public(), old.public()]).await?;
    assert_eq!(
        mesh.store.dead_wg_keys().await?.get(&lost.public()),
        Some(&host),
        "and never comes back"
    );
    until_named(&mut app, &mut app_link, host, &[new.public()]).await?;
    mesh.stop().await
}

/// After a restore, a view may name a key that its host gave up long ago, and that somebody else may have: it gets no overlap.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_has_none_of_its_named_keys_replaces_them_at_once() -> Outcome {
    let dir = tempfile::tempdir()?;
    let (mesh, [(mut app, mut app_link), (mut db, mut db_link)]) = pair(dir.path()).await?;
    let (host, leaked, new) = (db.host(), key(2), key(14));
    let asked = challenge(&db, &mut db_link).await?;
    let exporter = exporter(&db_link)?;
    let facts = Facts {
        exporter: &exporter,
        host,
        ephemeral: &asked.ephemeral,
        alone: true,
    };
    db_link.say(prove(facts, &db.keys.identity, &new)).await?;
    until_named(&mut app, &mut app_link, host, &[new.public()]).await?;
    until_named(&mut db, &mut db_link, host, &[new.public()]).await?;
    assert_eq!(mesh.store.dead_wg_keys().await?.get(&leaked.public()), Some(&host));
    // The key that is in force, offered again by an agent whose view is late, changes nothing and is not refused.
    let before = mesh.store.inventory().version;
    offer(&db, &mut db_link, &new).await?;
    offer(&db, &mut db_link, &leaked).await?;
    assert_eq!(
        denied(&db, &mut db_link).await?,
        "key_known",
        "the first denial is of the leaked key"
    );
    assert_eq!(mesh.store.inventory().version, before);
    mesh.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_s_wish_reaches_the_agent_once_and_only_while_it_is_linked() -> Outcome {
    let dir = tempfile::tempdir()?;
    let (mesh, [(app, app_link), (db, mut db_link)]) = pair(dir.path()).await?;
    assert!(mesh.publisher.hub().wish_for_key(db.host()));
    while !matches!(db_link.next(&db).await?, News::RotateKey) {}
    drop(app_link);
    while mesh.publisher.hub().wish_for_key(app.host()) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let revoked = mesh.store.revoke_host(LOCAL, app.host()).await?;
    assert!(
        revoked > 0
            && mesh
                .store
                .offer_wg_key(app.host(), &app.keys.identity.identity(), &key(20).public(), false)
                .await
                .is_err()
    );
    mesh.stop().await
}

/// All parts at once; the coordinator ends at each step of the rotation.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn signing_key_and_issuers_change_with_overlap_and_the_former_ones_are_dead() -> Outcome {
    let dir = tempfile::tempdir()?;
    let (mesh, [(mut app, mut app_link), (mut db, mut db_link)]) = pair(dir.path()).await?;
    let lease = Some(Duration::from_secs(10));
    mesh.store
        .set_mesh(
            LOCAL,
            MeshChange {
                lease,
                ..MeshChange::default()
            },
        )
        .await?;
    let former = mesh.roots.view_key().verifying();
    for part in Part::ALL {
        mesh.roots.announce(part, &Environment::system())?;
        assert!(
            mesh.roots.announce(part, &Environment::system()).is_err(),
            "one rotation of a part at a time"
        );
    }
    drop((app_link, db_link));
    mesh.stop().await?;

    let mesh = Coordinator::reopen(dir.path()).await?;
    assert!(Part::ALL.iter().all(|part| matches!(mesh.roots.stage(*part), Stage::Announced(_))));
    assert_eq!(
        mesh.roots.view_key().verifying(),
        former,
        "the present one is used until all trust the next"
    );
    (app_link, db_link) = (app.link(&mesh).await?, db.link(&mesh).await?);
    let has_both = |agent: &Agent| agent.view.as_ref().is_some_and(|view| view.content().trust.len() == 7);
    while !has_both(&app) {
        app_link.take_view(&mut app).await?;
    }
    while !has_both(&db) {
        db_link.take_view(&mut db).await?;
    }
    let switched = async {
        while !Part::ALL.iter().all(|part| matches!(mesh.roots.stage(*part), Stage::Switched(_))) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), switched).await?;
    // A host whose certificate is of the former authority is given another one without asking.
    let certificate = loop {
        if let News::Certificate(der) = app_link.next(&app).await? {
            break der;
        }
    };
    let (old_certificate, next) = (
        std::mem::replace(&mut app.certificate, certificate),
        mesh.roots.view_key().verifying(),
    );
    assert_ne!(next, former);
    drop((app_link, db_link));
    mesh.stop().await?;

    let mesh = Coordinator::reopen(dir.path()).await?;
    assert_eq!(mesh.roots.view_key().verifying(), next);
    (app_link, db_link) = (app.link(&mesh).await?, db.link(&mesh).await?);
    db_link.say(RenewCertificate {}).await?;
    let trusts = |agent: &Agent, key: &cloison_proto::key::VerifyingKey| {
        let trust = Trust::with_items(
            agent.joined.mesh,
            mesh.roots.root_key(),
            &agent.joined.trust,
            MeshTime(u64::MAX - 1),
        );
        trust.is_ok_and(|trust| trust.key(key.id()).is_some())
    };
    assert!(trusts(&app, &former) && trusts(&app, &next));
    while trusts(&app, &former) {
        app_link.take_view(&mut app).await?;
    }
    assert!(trusts(&app, &next));
    // The parts go one after the other.
    let settled = async {
        while !Part::ALL.iter().all(|part| mesh.roots.stage(*part) == Stage::Settled) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), settled).await?;
    assert_eq!(mesh.roots.retired().len(), 3);
    // What was signed by the former authority opens nothing, and the keys are gone from the disk.
    app.certificate = old_certificate;
    assert!(app.is_refused(&mesh).await, "a certificate of the former authority");
    for gone in ["view.key", "host-issuer.key", "host-issuer.pem", "coordinator-issuer.key"] {
        assert!(!dir.path().join("trust").join(gone).exists(), "{gone}");
    }
    assert!(
        mesh.renew(db.host(), &db.keys.identity).await?.is_some(),
        "the identity key heals whoever was away"
    );
    mesh.stop().await
}

/// A folder in the place of the file that the index is written to first: nothing of the trust can be moved on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trust_folder_that_cannot_be_written_is_tried_ever_less_often_and_goes_on_when_it_can() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mesh = Coordinator::create(dir.path()).await?;
    mesh.roots.announce(Part::SigningKey, &Environment::system())?;
    let blocked = dir.path().join("trust/.rotation.toml.new");
    std::fs::create_dir(&blocked)?;
    let attempts = async || {
        let leaves = mesh.store.audit_page(0, 500).await?.leaves;
        Outcome::Ok(leaves.iter().filter(|leaf| leaf.action == "trust.switch").count())
    };
    // It is due after five seconds; a try each second would be eight more by the end.
    tokio::time::sleep(Duration::from_secs(13)).await;
    let tried = attempts().await?;
    assert!((2..=4).contains(&tried), "{tried} attempts");
    assert!(matches!(mesh.roots.stage(Part::SigningKey), Stage::Announced(_)));
    std::fs::remove_dir(&blocked)?;
    let switched = async {
        while !matches!(mesh.roots.stage(Part::SigningKey), Stage::Switched(_)) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), switched).await?;
    // The one that went well was written down before it was made, and may have been counted already.
    let in_all = attempts().await?;
    assert!((tried..=tried + 1).contains(&in_all), "{tried}, then {in_all}");
    mesh.stop().await
}
