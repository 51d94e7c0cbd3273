//! What makes a coordinator doubt its own database: this coordinator's signature under a view that it does not know, and nothing less.

#[expect(dead_code, unreachable_pub, reason = "shared with other tests")]
#[path = "common/agent.rs"]
mod agent;
#[expect(dead_code, unreachable_pub, reason = "shared with other tests")]
mod common;

use std::time::{Duration, Instant};

use agent::{Coordinator, Keys, News};
use cloison_coordinator::store::Recovery;
use cloison_proto::control::agent::{Ack, Held, RenewCertificate};
use cloison_proto::key::SigningKey;
use cloison_proto::version::Version;
use cloison_proto::view::{Header, VerifiedView};
use common::Outcome;

const SOON: Duration = Duration::from_secs(20);
const POLICY: &str = "version: 1
components:
  n8n: {on: app-1, attach: host}
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_changes_nothing_and_a_proof_ends_all_changes_until_recovery() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mesh = Coordinator::create(dir.path()).await?;
    mesh.apply(POLICY).await?;
    let (mut app, other) = (mesh.enroll("app-1", 1).await?, mesh.enroll("other-1", 2).await?);
    let mut link = app.link(&mesh).await?;
    link.take_view(&mut app).await?;
    let header = *app.view.as_ref().map(VerifiedView::header).ok_or("no view")?;
    let later = |host| Header {
        host,
        version: Version {
            revision: header.version.revision + 100,
            ..header.version
        },
        ..header
    };
    // Signed by another key; signed, but for another host; signed, and known.
    let foreign = later(app.host()).sign(&SigningKey::from_seed(&[9; 32]));
    for view in [
        foreign,
        later(other.host()).sign(&mesh.roots.view_key()),
        header.sign(&mesh.roots.view_key()),
    ] {
        link.say(Held { view }).await?;
    }
    let claimed = Ack {
        version: later(app.host()).version,
        state_hash: header.state_hash,
    };
    link.say(claimed).await?;
    // The link answers in order: what came before this was judged.
    link.say(RenewCertificate {}).await?;
    while !matches!(link.next(&app).await?, News::Certificate(_)) {}
    assert!(mesh.store.inventory().read_only.is_none());

    let late = mesh.token("late-1").await?;
    let view = later(app.host()).sign(&mesh.roots.view_key());
    link.say(Held { view }).await?;
    let begun = Instant::now();
    while mesh.store.inventory().read_only.is_none() {
        assert!(begun.elapsed() < SOON, "the proof was not heard");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(mesh.try_apply(POLICY).await?.is_err());
    assert!(mesh.join(&late, &Keys::of(3)).await?.is_none(), "nobody joins");
    while mesh.publisher.hub().offer(app.host(), mesh.store.now()).is_some() {
        assert!(begun.elapsed() < SOON, "its view was not taken back");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let recovered = mesh.store.recover(&Recovery::default()).await?;
    assert!(recovered.version.generation > header.version.generation);
    link.take_view(&mut app).await?;
    let after = *app.view.as_ref().map(VerifiedView::header).ok_or("no view")?;
    assert!(after.version > later(app.host()).version, "{}", after.version);
    assert!(mesh.join(&late, &Keys::of(3)).await?.is_none(), "a token of the lost time is dead");
    drop(link);
    mesh.stop().await
}
