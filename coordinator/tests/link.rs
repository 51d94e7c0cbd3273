//! Joins and links over the loopback, with real QUIC, TLS and SQLite: from a token to a view in force, and to its end.

#[expect(dead_code, unreachable_pub, reason = "shared with other tests")]
#[path = "common/agent.rs"]
mod agent;
#[expect(dead_code, unreachable_pub, reason = "shared with other tests")]
mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::{Coordinator, Keys, LOCAL, News, Wire};
use cloison_coordinator::policy::explain::LiveState as _;
use cloison_coordinator::store::{NewToken, StoreError, TokenSpec};
use cloison_proto::control::agent::{Ack, AgentMessage, Endpoints, Hello, Nack, RenewCertificate};
use cloison_proto::control::agent::{InstanceReport, MAX_DETAIL, MAX_INSTANCES, Report};
use cloison_proto::control::coordinator::CoordinatorMessage;
use cloison_proto::control::frame::Frame;
use cloison_proto::key::{Secret32, SigningKey};
use cloison_proto::label::ComponentName;
use cloison_proto::trust::ALPN_LINK;
use cloison_proto::view::VerifiedView;
use common::Outcome;
use tokio::task::JoinSet;

const POLICY: &str = "version: 1
components:
  n8n: {on: app-1, attach: {unit: n8n.service}}
  postgres: {on: db-1, attach: {user: postgres}, services: {sql: tcp/5432}}
allow:
  - n8n -> postgres:sql
";

const NOTHING_ALLOWED: &str = "version: 1
components:
  n8n: {on: app-1, attach: {unit: n8n.service}}
  postgres: {on: db-1, attach: {user: postgres}, services: {sql: tcp/5432}}
";

const SOON: Duration = Duration::from_secs(20);

fn in_force(agent: &agent::Agent) -> Outcome<&VerifiedView> {
    Ok(agent.view.as_ref().ok_or("no view")?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_becomes_a_host_with_a_view_and_a_revocation_ends_both() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mesh = Coordinator::create(dir.path()).await?;
    mesh.apply(POLICY).await?;
    let mut app = mesh.enroll("app-1", 1).await?;
    assert_eq!(
        (app.joined.name.as_str(), app.joined.components.as_slice()),
        ("app-1", &["n8n".parse()?][..])
    );
    let mut link = app.link(&mesh).await?;
    assert!(!link.take_view(&mut app).await?, "the first view is a snapshot");
    let lease = link.take_lease(&app).await?;
    let header = *in_force(&app)?.header();
    assert!(lease.covers(header.mesh, header.host, header.version, header.state_hash));
    assert!(in_force(&app)?.content().peers.is_empty(), "its peer has not joined");

    let mut db = mesh.enroll("db-1", 2).await?;
    let mut db_link = db.link(&mesh).await?;
    db_link.take_view(&mut db).await?;
    assert!(link.take_view(&mut app).await?, "a join reaches the others as a delta");
    assert_eq!(in_force(&app)?.content().peers.keys().copied().collect::<Vec<_>>(), [db.host()]);
    assert_eq!(in_force(&db)?.content().peers.keys().copied().collect::<Vec<_>>(), [app.host()]);
    let progress = mesh
        .publisher
        .hub()
        .wait_applied(mesh.store.inventory().version.revision, SOON)
        .await;
    assert_eq!((progress.applied, progress.hosts, progress.linked), (2, 2, 2));

    let revision = mesh.store.revoke_host(LOCAL, db.host()).await?;
    assert_eq!(db_link.take_goodbye(&db).await?, "revoked");
    assert!(link.take_view(&mut app).await?);
    assert!(in_force(&app)?.content().peers.is_empty() && in_force(&app)?.content().rules.is_empty());
    let progress = mesh.publisher.hub().wait_applied(revision, SOON).await;
    assert_eq!((progress.applied, progress.hosts, progress.linked), (1, 1, 1));
    assert!(db.is_refused(&mesh).await, "a revoked host links no more");
    assert!(mesh.renew(db.host(), &db.keys.identity).await?.is_none(), "and gets no certificate");
    mesh.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_agent_says_of_its_instances_is_known_and_bounded() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mesh = Coordinator::create(dir.path()).await?;
    mesh.apply(POLICY).await?;
    let mut app = mesh.enroll("app-1", 1).await?;
    let mut link = app.link(&mesh).await?;
    link.take_view(&mut app).await?;
    let one = |n: usize| -> Outcome<InstanceReport> {
        Ok(InstanceReport {
            component: format!("c{n}").parse()?,
            state: "bound".into(),
            by: "x\n".repeat(MAX_DETAIL),
            last_denial: None,
        })
    };
    let hub = mesh.publisher.hub();
    let known = async |count: usize| -> Outcome {
        let deadline = tokio::time::Instant::now() + SOON;
        while hub.live(app.host()).instances.len() != count && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(hub.live(app.host()).instances.len(), count);
        Ok(())
    };
    let report = |instances| Report {
        unenforced: Vec::new(),
        ignored_items: 0,
        instances,
    };
    // More than are taken; together they still fit a frame.
    let many: Vec<_> = (0..MAX_INSTANCES + 7).map(one).collect::<Outcome<_>>()?;
    let short = many.into_iter().enumerate().map(|(n, report)| InstanceReport {
        by: if n == 0 { report.by } else { "x".into() },
        ..report
    });
    link.say(report(Some(short.collect()))).await?;
    known(MAX_INSTANCES).await?;
    let live = hub.live(app.host());
    let first = live.instances.get(&"c0".parse::<ComponentName>()?).ok_or("no c0")?;
    assert_eq!(
        first.by,
        "x".repeat(MAX_DETAIL / 2),
        "cut, and without anything that moves a terminal's cursor"
    );
    link.say(report(None)).await?;
    known(0).await?;
    mesh.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_change_is_pushed_and_counted_when_it_is_applied() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mesh = Coordinator::create(dir.path()).await?;
    mesh.apply(NOTHING_ALLOWED).await?;
    let (mut app, mut db) = (mesh.enroll("app-1", 1).await?, mesh.enroll("db-1", 2).await?);
    let mut link = app.link(&mesh).await?;
    link.take_view(&mut app).await?;
    let written = mesh.apply(POLICY).await?;
    assert!(link.take_view(&mut app).await?);
    assert_eq!(in_force(&app)?.content().rules.len(), 1);
    let hub = mesh.publisher.hub();
    let progress = hub.wait_applied(written.revision, Duration::from_millis(300)).await;
    assert_eq!((progress.applied, progress.hosts), (1, 2), "a host that is away has not applied it");
    let mut db_link = db.link(&mesh).await?;
    db_link.take_view(&mut db).await?;
    assert_eq!(hub.wait_applied(written.revision, SOON).await.applied, 2);

    // What does not concern a host is applied there without a byte.
    let before = in_force(&app)?.header().version;
    let written = mesh
        .apply(&POLICY.replace("allow:", "  lonely: {on: other-1, attach: host}\nallow:"))
        .await?;
    assert_eq!(hub.wait_applied(written.revision, SOON).await.applied, 2);
    assert!(before.revision < written.revision && hub.live(app.host()).applied);
    mesh.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_comes_back_gets_what_changed_or_only_a_lease() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mesh = Coordinator::create(dir.path()).await?;
    mesh.apply(POLICY).await?;
    let (mut app, _db) = (mesh.enroll("app-1", 1).await?, mesh.enroll("db-1", 2).await?);
    let mut link = app.link(&mesh).await?;
    link.take_view(&mut app).await?;
    link.take_lease(&app).await?;
    drop(link);
    let mut link = app.link(&mesh).await?;
    assert!(matches!(link.next(&app).await?, News::Lease(_)), "nothing changed: only a lease");
    drop(link);
    mesh.apply(NOTHING_ALLOWED).await?;
    mesh.publisher.reconcile().await?;
    let mut link = app.link(&mesh).await?;
    assert!(link.take_view(&mut app).await?, "the base is still at hand");
    let version = in_force(&app)?.header().version;
    mesh.stop().await?;

    // Another process of the coordinator: same view, same version, no base at hand.
    let mesh = Coordinator::reopen(dir.path()).await?;
    let mut link = app.link(&mesh).await?;
    assert!(matches!(link.next(&app).await?, News::Lease(lease) if lease.version == version));
    drop(link);
    mesh.apply(POLICY).await?;
    let mut link = app.link(&mesh).await?;
    link.take_view(&mut app).await?;
    assert!(in_force(&app)?.header().version > version);
    mesh.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_delta_is_followed_by_a_snapshot_and_that_by_nothing() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mesh = Coordinator::create(dir.path()).await?;
    mesh.apply(POLICY).await?;
    let (mut app, _db) = (mesh.enroll("app-1", 1).await?, mesh.enroll("db-1", 2).await?);
    let mut link = app.link(&mesh).await?;
    link.take_view(&mut app).await?;
    mesh.apply(NOTHING_ALLOWED).await?;
    let refuse = |view: &VerifiedView, code: &str| Nack {
        version: view.header().version,
        code: code.into(),
        detail: "in a test".into(),
    };
    let offered = loop {
        if let News::View(view, by_delta) = link.next(&app).await? {
            assert!(by_delta);
            break view;
        }
    };
    link.say(refuse(&offered, "base_unknown")).await?;
    let offered = loop {
        if let News::View(view, by_delta) = link.next(&app).await? {
            assert!(!by_delta, "a snapshot");
            break view;
        }
    };
    link.say(refuse(&offered, "address_conflict")).await?;
    let hub = mesh.publisher.hub();
    let refusal = async {
        while hub.refusal(app.host()).is_none_or(|refusal| refusal.code != "address_conflict") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(SOON, refusal).await?;
    assert!(!hub.live(app.host()).applied);
    // Only another view is offered again.
    mesh.apply(POLICY).await?;
    link.take_view(&mut app).await?;
    assert_eq!(in_force(&app)?.content().rules.len(), 1);
    assert!(hub.wait_applied(0, Duration::from_secs(1)).await.applied == 1 && hub.refusal(app.host()).is_none());
    mesh.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_to_join_look_alike_and_come_no_sooner_than_the_floor() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mesh = Coordinator::create(dir.path()).await?;
    let (good, other) = (mesh.token("app-1").await?, mesh.token("app-2").await?);
    let wrong_secret = NewToken {
        id: good.id,
        secret: Secret32::from_bytes([9; 32]),
        expires: good.expires,
    };
    let unknown = NewToken {
        id: cloison_proto::id::TokenId([1; 8]),
        secret: Secret32::from_bytes(*other.secret.expose()),
        expires: good.expires,
    };
    assert!(mesh.join(&good, &Keys::of(1)).await?.is_some());
    for refused in [wrong_secret, unknown, good] {
        let began = Instant::now();
        assert!(mesh.join(&refused, &Keys::of(2)).await?.is_none());
        assert!(began.elapsed() >= Duration::from_millis(250));
    }
    let known_key = mesh.join(&other, &Keys::of(1)).await?;
    assert!(known_key.is_none(), "no key belongs to two hosts");
    assert_eq!(mesh.store.inventory().hosts.len(), 1);
    mesh.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_counts_where_the_handshake_proved_it_and_not_where_later_packets_claim_it() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mesh = Coordinator::create(dir.path()).await?;
    let spec = TokenSpec {
        uses: 1,
        lifetime: SOON,
        name: "app-1".parse()?,
        labels: Default::default(),
        source: Some("127.0.0.2/32".parse()?),
    };
    let token = mesh.store.create_token(LOCAL, spec).await?;
    let (inside, outside) = ([127, 0, 0, 2].into(), [127, 0, 0, 1].into());
    assert!(mesh.join_from(&token, &Keys::of(1), [outside, inside]).await?.is_none());
    assert!(mesh.join_from(&token, &Keys::of(1), [inside, inside]).await?.is_some());
    mesh.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_have_no_budget_of_certificates_and_hosts_have_one() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mesh = Coordinator::create(dir.path()).await?;
    let host = mesh.enroll("app-1", 1).await?;
    let stranger = SigningKey::from_seed(&[9; 32]);
    for _ in 0..8 {
        assert!(mesh.renew(host.host(), &stranger).await?.is_none());
    }
    let mut renewed = 0;
    while mesh.renew(host.host(), &host.keys.identity).await?.is_some() {
        renewed += 1;
    }
    assert_eq!(renewed, 6, "what strangers asked for is not counted, what the host asks for is");
    mesh.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_that_race_for_one_token_make_one_host() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mesh = Coordinator::create(dir.path()).await?;
    let token = mesh.token("app-1").await?;
    let (mesh, token) = (Arc::new(mesh), Arc::new(token));
    let mut attempts = JoinSet::new();
    for machine in 1..=16 {
        let (mesh, token) = (Arc::clone(&mesh), Arc::clone(&token));
        attempts.spawn(async move { mesh.join(&token, &Keys::of(machine)).await });
    }
    let mut answers = Vec::new();
    while let Some(answer) = attempts.join_next().await {
        answers.push(answer??.is_some());
    }
    assert_eq!((answers.len(), answers.iter().filter(|joined| **joined).count()), (16, 1));
    assert_eq!(mesh.store.inventory().hosts.len(), 1);
    Arc::into_inner(mesh).ok_or("still in use")?.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_hosts_own_certificate_opens_a_link() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mesh = Coordinator::create(dir.path()).await?;
    let app = mesh.enroll("app-1", 1).await?;
    let elsewhere = tempfile::tempdir()?;
    let foreign_mesh = Coordinator::create(elsewhere.path()).await?;
    let foreign = foreign_mesh.enroll("app-1", 1).await?;
    let silent = async |client: Option<(&SigningKey, &[u8])>| -> Outcome<bool> {
        let Ok(connection) = mesh.connect(ALPN_LINK, client).await else {
            return Ok(true);
        };
        let Ok(stream) = connection.open_bi().await else { return Ok(true) };
        let mut wire = Wire::new(connection, stream);
        let hello = Hello {
            software: String::new(),
            version: None,
            state_hash: None,
            incarnation: 1,
            endpoints: Vec::new(),
        };
        let _ = wire.write(&AgentMessage::Hello(hello).to_frame()).await;
        Ok(wire.read().await.is_err())
    };
    assert!(silent(None).await?, "no certificate");
    assert!(
        silent(Some((&foreign.keys.identity, &foreign.certificate))).await?,
        "another mesh's certificate"
    );
    assert!(!silent(Some((&app.keys.identity, &app.certificate))).await?, "its own");
    assert!(mesh.connect(b"h3", None).await.is_err(), "another protocol");
    foreign_mesh.stop().await?;
    mesh.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_newer_of_two_links_wins_and_a_lower_incarnation_is_audited() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mesh = Coordinator::create(dir.path()).await?;
    let mut app = mesh.enroll("app-1", 1).await?;
    app.incarnation = 5;
    let mut first = app.link(&mesh).await?;
    first.take_lease(&app).await?;
    let mut second = app.link(&mesh).await?;
    second.take_lease(&app).await?;
    assert_eq!(first.take_goodbye(&app).await?, "replaced");
    let hub = mesh.publisher.hub();
    assert!(!hub.is_cloned(app.host()), "the same machine may link anew");
    assert_eq!(hub.progress().linked, 1);
    app.incarnation = 4;
    let mut copy = app.link(&mesh).await?;
    assert_eq!(copy.take_goodbye(&app).await?, "replaced", "the one that began later stays");
    assert!(hub.is_cloned(app.host()));
    assert_eq!(hub.progress().linked, 1);
    second.say(RenewCertificate {}).await?;
    while !matches!(second.next(&app).await?, News::Certificate(_)) {}
    let leaves = mesh.store.audit_page(0, 500).await?.leaves;
    assert_eq!(leaves.iter().filter(|leaf| leaf.action == "host.cloned").count(), 1);
    mesh.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_says_too_much_is_cut_off() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mesh = Coordinator::create(dir.path()).await?;
    let mut app = mesh.enroll("app-1", 1).await?;
    let mut link = app.link(&mesh).await?;
    link.take_view(&mut app).await?;
    let ack = Ack {
        version: in_force(&app)?.header().version,
        state_hash: in_force(&app)?.header().state_hash,
    };
    for _ in 0..400 {
        if link.say(ack).await.is_err() {
            break;
        }
    }
    assert_eq!(link.take_goodbye(&app).await?, "rate");
    mesh.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_learn_where_a_host_is_and_nobody_else_does() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mesh = Coordinator::create(dir.path()).await?;
    mesh.apply(POLICY).await?;
    let (mut app, mut db, mut other) = (
        mesh.enroll("app-1", 1).await?,
        mesh.enroll("db-1", 2).await?,
        mesh.enroll("other-1", 3).await?,
    );
    let mut link = app.link(&mesh).await?;
    link.take_view(&mut app).await?;
    let mut other_link = other.link(&mesh).await?;
    other_link.take_view(&mut other).await?;
    db.endpoints = vec!["192.0.2.9:51820".parse()?, "127.0.0.1:51820".parse()?, "10.77.1.1:51820".parse()?];
    db.incarnation = 3;
    let mut db_link = db.link(&mesh).await?;
    db_link.take_view(&mut db).await?;
    let mut learn = async |wanted: &str| -> Outcome<u64> {
        loop {
            if let News::Hints(peers) = link.next(&app).await? {
                let about = peers
                    .iter()
                    .find(|hint| hint.host == db.host())
                    .ok_or("a hint about another host")?;
                if about.endpoints == [wanted.parse()?] {
                    return Ok(about.incarnation);
                }
            }
        }
    };
    assert_eq!(learn("192.0.2.9:51820").await?, 3, "loopback and overlay are left out");
    db_link
        .say(Endpoints {
            endpoints: vec!["198.51.100.4:51820".parse()?],
        })
        .await?;
    learn("198.51.100.4:51820").await?;
    let nothing = tokio::time::timeout(Duration::from_millis(500), async {
        loop {
            if let News::Hints(peers) = other_link.next(&other).await? {
                return Outcome::Ok(peers);
            }
        }
    });
    assert!(nothing.await.is_err(), "a host without rules learns about nobody");
    mesh.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_renewed_on_the_link_and_by_identity_key() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mesh = Coordinator::create(dir.path()).await?;
    let mut app = mesh.enroll("app-1", 1).await?;
    let mut link = app.link(&mesh).await?;
    link.take_lease(&app).await?;
    link.say(RenewCertificate {}).await?;
    let renewed = loop {
        if let News::Certificate(der) = link.next(&app).await? {
            break der;
        }
    };
    assert_ne!(renewed, app.certificate);
    let old = std::mem::replace(&mut app.certificate, renewed);
    app.link(&mesh).await?.take_lease(&app).await?;
    app.certificate = old;
    assert!(app.is_refused(&mesh).await, "the old one ends when the new one is used");
    let joined = mesh.renew(app.host(), &app.keys.identity).await?.ok_or("the renewal was refused")?;
    assert_eq!((joined.host, &joined.name), (app.host(), &app.joined.name));
    app.certificate = joined.certificate;
    app.link(&mesh).await?.take_lease(&app).await?;
    assert!(
        mesh.renew(app.host(), &Keys::of(9).identity).await?.is_none(),
        "a stranger's key renews nothing"
    );
    mesh.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_with_two_components_that_are_a_whole_host_is_refused_at_the_write() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mesh = Coordinator::create(dir.path()).await?;
    let token = mesh.token("db-1").await?;
    let joined = mesh.join(&token, &Keys::of(1)).await?.ok_or("refused")?;
    let labels = cloison_coordinator::store::LabelChange {
        set: [("role".parse()?, "db".parse()?)].into(),
        ..Default::default()
    };
    mesh.store.label_host(LOCAL, joined.host, labels).await?;
    let two = "version: 1\ncomponents:\n  a: {on: db-1, attach: host}\n  b: {on: {role: db}, attach: host}\n";
    let refused = mesh.try_apply(two).await?;
    assert!(
        matches!(&refused, Err(StoreError::Refused(why)) if why.code == "attachment_conflict"),
        "{refused:?}"
    );
    assert!(mesh.store.inventory().policy.is_none());
    mesh.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_says_goodbye_to_all() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mesh = Coordinator::create(dir.path()).await?;
    let app = mesh.enroll("app-1", 1).await?;
    let mut link = app.link(&mesh).await?;
    link.take_lease(&app).await?;
    let goodbye = tokio::spawn(async move { link.take_goodbye(&app).await });
    let began = Instant::now();
    mesh.stop().await?;
    assert_eq!(goodbye.await??, "shutdown");
    assert!(began.elapsed() < Duration::from_secs(6));
    Ok(())
}

/// A kind that is not known is skipped; a body that its kind does not allow ends the link.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_frame_ends_the_link() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mesh = Coordinator::create(dir.path()).await?;
    let app = mesh.enroll("app-1", 1).await?;
    let mut link = app.link(&mesh).await?;
    link.take_lease(&app).await?;
    let unknown = Frame {
        kind: 999,
        body: vec![0xa0],
    };
    link.wire.write(&unknown).await?;
    link.say(RenewCertificate {}).await?;
    loop {
        if let Some(CoordinatorMessage::Certificate(_)) = CoordinatorMessage::from_frame(&link.wire.read().await?)? {
            break;
        }
    }
    let malformed = Frame { kind: 2, body: vec![0xff] };
    link.wire.write(&malformed).await?;
    loop {
        if link.wire.read().await.is_err() {
            return mesh.stop().await;
        }
    }
}

/// A later agent's messages carry fields and come in kinds that this coordinator does not know: it serves what it understands of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_agent_is_served() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mesh = Coordinator::create(dir.path()).await?;
    mesh.apply(POLICY).await?;
    let mut app = mesh.enroll("app-1", 1).await?;
    let connection = mesh.connect(ALPN_LINK, Some((&app.keys.identity, &app.certificate))).await?;
    let stream = connection.open_bi().await?;
    let mut wire = Wire::new(connection, stream);
    let hello = Hello {
        software: "later".into(),
        version: None,
        state_hash: None,
        incarnation: 1,
        endpoints: Vec::new(),
    };
    wire.write(&with_a_later_field(AgentMessage::Hello(hello).to_frame())?).await?;
    let mut link = app.over(wire, &mesh)?;
    let later = Frame {
        kind: 999,
        body: vec![0xff],
    };
    link.wire.write(&later).await?;
    link.wire
        .write(&with_a_later_field(AgentMessage::from(RenewCertificate {}).to_frame())?)
        .await?;
    let (mut viewed, mut renewed) = (false, false);
    while !(viewed && renewed) {
        match link.next(&app).await? {
            News::View(view, _) => {
                let header = *view.header();
                (viewed, app.view) = (true, Some(*view));
                let ack = Ack {
                    version: header.version,
                    state_hash: header.state_hash,
                };
                link.wire.write(&with_a_later_field(AgentMessage::from(ack).to_frame())?).await?;
            }
            News::Certificate(_) => renewed = true,
            News::Lease(_) | News::Hints(_) | News::Challenge(_) | News::Denied(_) | News::RotateKey => {}
            News::Goodbye(goodbye) => return Err(goodbye.code.into()),
        }
    }
    link.say(Endpoints { endpoints: Vec::new() }).await?;
    mesh.apply(&POLICY.replace("  n8n:", "  other: {on: app-1, attach: {unit: other.service}}\n  n8n:"))
        .await?;
    assert!(link.take_view(&mut app).await?, "it said that it has the first");
    mesh.stop().await
}

fn with_a_later_field(mut frame: Frame) -> Outcome<Frame> {
    let head = frame.body.first_mut().ok_or("an empty body")?;
    assert!((0xa0..0xb7).contains(head), "a short map");
    *head += 1;
    frame.body.extend_from_slice(&[0x18, 0xc8, 0xf5]);
    Ok(frame)
}
