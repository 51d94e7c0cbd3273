//! What a link does with good, bad and strange coordinators.

use std::collections::BTreeMap;

use cloison_proto::control::coordinator::{Hints, LeaseGrant, ViewEnd, ViewItems};
use cloison_proto::control::frame::Message;
use cloison_proto::view::{Items, Op, StateHash, section};
use proptest::prelude::*;

use super::*;
use crate::control::testing::Mesh;

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn at(millis: u64) -> Timestamp {
    Timestamp(millis * 1_000_000)
}

fn link(mesh: &Mesh) -> Result<Link, Box<dyn std::error::Error>> {
    let us = mesh.membership()?;
    let cached = Cached {
        view: None,
        lease: None,
        floor: None,
        overlay: None,
        clock: MeshClock::guess(MeshTime(1_000), at(0)),
        trust: us.trust_at(MeshTime(1_000))?,
        problems: Vec::new(),
    };
    let window = Window {
        not_before: 1_000,
        not_after: 1_000 + 86_400,
    };
    Ok(Link::new(us, &cached, Some(window), 7, 1, at(0)))
}

fn linked(mesh: &Mesh) -> Result<Link, Box<dyn std::error::Error>> {
    let mut link = link(mesh)?;
    assert!(matches!(link.tick(at(0)).as_slice(), [Output::Connect { renew: false }]));
    link.connected(at(0));
    Ok(link)
}

/// How long it waits from now on.
fn wait(link: &Link, now: Timestamp) -> Duration {
    match link.state() {
        LinkState::Waiting { until, .. } => until.since(now),
        LinkState::Connecting | LinkState::Linked { .. } => Duration::ZERO,
    }
}

fn whole(header: Signed, items: &Items) -> Vec<Frame> {
    let ops = items.changes_since(&Items::default());
    vec![
        ViewStart { header, base: None }.to_frame(),
        ViewItems { ops }.to_frame(),
        ViewEnd {}.to_frame(),
    ]
}

fn feed(link: &mut Link, now: Timestamp, frames: &[Frame]) -> Vec<Output> {
    frames.iter().flat_map(|frame| link.frame(now, frame)).collect()
}

fn grant(lease: &HeldLease) -> Frame {
    LeaseGrant {
        lease: lease.signed.clone(),
    }
    .to_frame()
}

fn installed(outputs: &[Output]) -> Option<&Offer> {
    outputs
        .iter()
        .find_map(|o| if let Output::Install(offer) = o { Some(&**offer) } else { None })
}

fn nack(outputs: &[Output]) -> Option<&str> {
    outputs.iter().find_map(|o| {
        if let Output::Send(AgentMessage::Nack(nack)) = o {
            Some(nack.code.as_str())
        } else {
            None
        }
    })
}

fn acked(outputs: &[Output]) -> Option<StateHash> {
    outputs.iter().find_map(|o| {
        if let Output::Send(AgentMessage::Ack(ack)) = o {
            Some(ack.state_hash)
        } else {
            None
        }
    })
}

fn report() -> Report {
    Report {
        unenforced: Vec::new(),
        ignored_items: 0,
        instances: None,
    }
}

#[test]
fn a_view_waits_for_its_lease_and_is_acked_when_it_is_in_force() -> Outcome {
    let mesh = Mesh::new();
    let mut link = linked(&mesh)?;
    let items = mesh.items(&["tcp/5432"])?;
    let view = mesh.view(5, &["tcp/5432"])?;
    assert!(feed(&mut link, at(10), &whole(mesh.header(&items, 5), &items)).is_empty());
    let out = link.frame(at(20), &grant(&mesh.lease(&view, 1_000, 600)));
    let offer = installed(&out).ok_or("not offered")?;
    assert_eq!(offer.view.header(), view.header());
    assert!(offer.lease.is_some() && acked(&out).is_none(), "not acked before it is in force");
    assert_eq!(acked(&link.applied(at(30), report())), Some(view.header().state_hash));
    assert_eq!(link.mesh_time(at(1_020)), MeshTime(1_001));
    Ok(())
}

#[test]
fn a_view_without_a_lease_is_installed_after_a_second_without_one() -> Outcome {
    let mesh = Mesh::new();
    let mut link = linked(&mesh)?;
    let items = mesh.items(&[])?;
    feed(&mut link, at(10), &whole(mesh.header(&items, 5), &items));
    assert!(installed(&link.tick(at(1_000))).is_none());
    let out = link.tick(at(1_010));
    assert!(installed(&out).is_some_and(|offer| offer.lease.is_none()));
    Ok(())
}

#[test]
fn a_delta_gives_the_view_that_was_signed_or_is_refused() -> Outcome {
    let mesh = Mesh::new();
    let mut link = linked(&mesh)?;
    let first = mesh.items(&["tcp/5432"])?;
    feed(&mut link, at(10), &whole(mesh.header(&first, 5), &first));
    link.tick(at(2_000));
    link.applied(at(2_000), report());
    let second = mesh.items(&["tcp/5432", "tcp/80"])?;
    let delta = |base, ops: Vec<Op>| {
        [
            ViewStart {
                header: mesh.header(&second, 6),
                base: Some(base),
            }
            .to_frame(),
            ViewItems { ops }.to_frame(),
            ViewEnd {}.to_frame(),
        ]
    };
    let out = feed(&mut link, at(2_100), &delta(StateHash([0; 32]), second.changes_since(&first)));
    assert_eq!(nack(&out), Some("base_unknown"));
    let nacked = |o: &Output| matches!(o, Output::Send(AgentMessage::Nack(nack)) if nack.version.revision == 6);
    assert!(out.iter().any(nacked), "names the version");
    link.disconnected(at(2_150), "snapshot");
    let out = link.connected(at(2_160));
    let asks = |o: &Output| matches!(o, Output::Send(AgentMessage::Hello(hello)) if hello.state_hash.is_none());
    assert!(out.iter().any(asks), "asks for a snapshot");
    let out = feed(&mut link, at(2_200), &delta(first.hash(), Vec::new()));
    assert_eq!(nack(&out), Some("hash"), "changes that do not give what was signed");
    feed(&mut link, at(2_300), &delta(first.hash(), second.changes_since(&first)));
    let out = link.frame(at(2_310), &grant(&mesh.lease(&mesh.view(6, &["tcp/5432", "tcp/80"])?, 1_100, 600)));
    assert_eq!(installed(&out).map(|o| o.view.header().state_hash), Some(second.hash()));
    Ok(())
}

#[test]
fn an_older_view_a_second_one_of_a_version_and_a_stranger_s_are_refused() -> Outcome {
    let mesh = Mesh::new();
    let mut link = linked(&mesh)?;
    let items = mesh.items(&["tcp/5432"])?;
    feed(&mut link, at(10), &whole(mesh.header(&items, 5), &items));
    let other = mesh.items(&["tcp/1"])?;
    for (header, code) in [
        (mesh.header(&other, 4), "older"),
        (mesh.header(&other, 5), "forked"),
        (
            Mesh {
                signer: cloison_proto::key::SigningKey::from_seed(&[77; 32]),
                root: cloison_proto::key::SigningKey::from_seed(&[78; 32]),
            }
            .header(&other, 9),
            "signature",
        ),
    ] {
        let out = feed(&mut link, at(20), &whole(header, &other));
        assert_eq!((nack(&out), installed(&out).is_some()), (Some(code), false));
    }
    Ok(())
}

#[test]
fn a_lease_counts_only_for_a_view_that_we_hold_and_never_an_older_one() -> Outcome {
    let mesh = Mesh::new();
    let mut link = linked(&mesh)?;
    let items = mesh.items(&[])?;
    let view = mesh.view(5, &[])?;
    feed(&mut link, at(10), &whole(mesh.header(&items, 5), &items));
    link.frame(at(11), &grant(&mesh.lease(&view, 1_000, 600)));
    link.applied(at(12), report());
    let leased = |out: Vec<Output>| out.iter().any(|o| matches!(o, Output::Lease(_)));
    assert!(leased(link.frame(at(20), &grant(&mesh.lease(&view, 1_010, 600)))));
    assert!(
        !leased(link.frame(at(21), &grant(&mesh.lease(&view, 1_009, 600)))),
        "older than the last"
    );
    assert!(
        !leased(link.frame(at(22), &grant(&mesh.lease(&mesh.view(6, &[])?, 1_011, 600)))),
        "another view's"
    );
    let mut forged = mesh.lease(&view, 1_012, 600);
    forged.signed = forged.lease.sign(&cloison_proto::key::SigningKey::from_seed(&[77; 32]));
    assert!(!leased(link.frame(at(23), &grant(&forged))));
    Ok(())
}

#[test]
fn the_wait_for_a_link_grows_resets_and_obeys_the_coordinator() -> Outcome {
    let mesh = Mesh::new();
    let mut link = link(&mesh)?;
    for _ in 0..20 {
        link.disconnected(at(0), "no answer");
    }
    link.disconnected(at(0), "no answer");
    assert!(wait(&link, at(0)) <= super::super::backoff::LONGEST);
    link.connected(at(0));
    link.frame(at(1), &Hints { peers: Vec::new() }.to_frame());
    link.disconnected(at(1), "gone");
    assert!(wait(&link, at(1)) <= super::super::backoff::FIRST, "it had held");
    link.connected(at(0));
    let goodbye = Goodbye {
        code: "shutdown".into(),
        retry_after_secs: 30,
    };
    let out = link.frame(at(1), &goodbye.to_frame());
    assert!(out.iter().any(|o| matches!(o, Output::Close(_))));
    assert!(!out.iter().any(|o| matches!(o, Output::Revoked)));
    link.disconnected(at(1), "goodbye");
    assert!(wait(&link, at(1)) >= Duration::from_secs(30));
    Ok(())
}

#[test]
fn a_certificate_is_asked_for_at_half_life_once_and_by_the_identity_key_when_it_ran_out() -> Outcome {
    let mesh = Mesh::new();
    let mut link = linked(&mesh)?;
    let asked = |out: Vec<Output>| out.iter().any(|o| matches!(o, Output::Send(AgentMessage::RenewCertificate(_))));
    assert!(!asked(link.tick(at(44_999_000))));
    assert!(asked(link.tick(at(45_000_000))));
    assert!(!asked(link.tick(at(45_001_000))), "once");
    link.disconnected(at(90_000_000), "gone");
    let out = link.tick(at(90_060_000));
    assert!(matches!(out.as_slice(), [Output::Connect { renew: true }]));
    Ok(())
}

#[test]
fn a_link_goes_over_to_its_new_certificate_between_two_views() -> Outcome {
    let mesh = Mesh::new();
    let mut link = linked(&mesh)?;
    let closes = |out: &[Output]| out.iter().any(|o| matches!(o, Output::Close(_)));
    link.tick(at(45_000_000));
    // It comes between a view and its lease.
    let items = mesh.items(&["tcp/5432"])?;
    let view = mesh.view(5, &["tcp/5432"])?;
    feed(&mut link, at(45_000_010), &whole(mesh.header(&items, 5), &items));
    let window = Window {
        not_before: 0,
        not_after: 200_000,
    };
    link.certificate(window, at(45_000_010));
    assert!(!closes(&link.tick(at(45_000_020))), "the view waits for its lease");
    link.frame(at(45_000_030), &grant(&mesh.lease(&view, 45_000, 600)));
    link.applied(at(45_000_030), report());
    assert!(closes(&link.tick(at(45_000_040))));
    link.disconnected(at(45_000_040), "going over");
    assert!(wait(&link, at(45_000_040)) <= super::super::backoff::FIRST);
    link.connected(at(45_001_000));
    assert!(!closes(&link.tick(at(45_002_000))), "once");
    Ok(())
}

#[test]
fn a_certificate_that_is_half_spent_when_it_comes_is_no_reason_to_ask_without_a_pause() -> Outcome {
    let mesh = Mesh::new();
    let mut link = linked(&mesh)?;
    let asks = |out: Vec<Output>| out.iter().any(|o| matches!(o, Output::Send(AgentMessage::RenewCertificate(_))));
    let spent = Window {
        not_before: 0,
        not_after: 46_000,
    };
    assert!(asks(link.tick(at(45_000_000))));
    for attempt in 0..5u64 {
        let now = 45_000_000 + attempt * 1_000;
        link.certificate(spent, at(now));
        link.tick(at(now + 100));
        link.disconnected(at(now + 100), "going over");
        link.connected(at(now + 600));
        assert!(!asks(link.tick(at(now + 700))), "attempt {attempt}");
    }
    assert!(asks(link.tick(at(45_004_000 + 600_000))), "and later it does");
    Ok(())
}

#[test]
fn a_lease_that_is_repeated_holds_the_clock_back_by_nothing() -> Outcome {
    let mesh = Mesh::new();
    let mut link = linked(&mesh)?;
    let items = mesh.items(&["tcp/5432"])?;
    let view = mesh.view(5, &["tcp/5432"])?;
    feed(&mut link, at(10), &whole(mesh.header(&items, 5), &items));
    let lease = grant(&mesh.lease(&view, 1_000, 600));
    link.frame(at(0), &lease);
    link.applied(at(0), report());
    for second in 1..=300 {
        link.frame(at(second * 1_000), &lease);
    }
    assert_eq!(link.mesh_time(at(300_000)), MeshTime(1_300));
    Ok(())
}

#[test]
fn what_is_unknown_is_skipped_and_what_cannot_be_read_ends_the_link() -> Outcome {
    let mesh = Mesh::new();
    let mut link = linked(&mesh)?;
    let unknown = Frame {
        kind: 999,
        body: vec![1, 2, 3],
    };
    assert!(link.frame(at(1), &unknown).is_empty());
    let broken = Frame {
        kind: ViewEnd::KIND,
        body: vec![0xff],
    };
    assert!(matches!(link.frame(at(1), &broken).as_slice(), [Output::Close("malformed")]));
    Ok(())
}

/// A message as a later version might send it: with a field that this one does not know.
fn with_a_later_field(mut body: Vec<u8>) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let head = body.first_mut().ok_or("an empty body")?;
    assert!((0xa0..0xb7).contains(head), "a short map");
    *head += 1;
    body.extend_from_slice(&[0x18, 0xc8, 0xf5]);
    Ok(body)
}

#[test]
fn a_newer_coordinator_is_understood_and_gives_no_more_than_is_understood() -> Outcome {
    let mesh = Mesh::new();
    for rules_are_newer in [false, true] {
        let mut link = linked(&mesh)?;
        let mut items = mesh.items(&["tcp/5432"])?;
        items.put(999, [1], vec![0xff, 0x00]);
        if rules_are_newer {
            for (at, bytes) in mesh.items(&["tcp/5432"])?.iter().filter(|(at, _)| at.section == section::RULE) {
                items.put(at.section, at.key.clone(), with_a_later_field(bytes.to_vec())?);
            }
        }
        let later = Frame {
            kind: 999,
            body: vec![0xff],
        };
        for frame in whole(mesh.header(&items, 5), &items) {
            let newer = Frame {
                body: with_a_later_field(frame.body.clone())?,
                ..frame
            };
            assert!(feed(&mut link, at(10), &[later.clone(), newer]).is_empty());
        }
        let out = link.tick(at(1_010));
        let offer = installed(&out).ok_or("not understood")?;
        let content = offer.view.content();
        assert_eq!(content.rules.is_empty(), rules_are_newer, "{content:?}");
        assert_eq!(content.ignored > 0, rules_are_newer);
        let hash = offer.view.header().state_hash;
        assert_eq!(
            acked(&link.applied(at(1_020), report())),
            Some(hash),
            "it counts as applied: the same items are in force"
        );
    }
    Ok(())
}

/// One thing that a coordinator, good or bad, may do.
#[derive(Debug, Clone)]
enum Act {
    Start {
        revision: u64,
        ports: usize,
        good: bool,
        delta: bool,
    },
    Items {
        ports: usize,
        partial: bool,
    },
    End,
    Lease {
        revision: u64,
        ports: usize,
        issued: u64,
    },
    /// A whole view by the right coordinator, with or without its lease.
    Whole {
        revision: u64,
        ports: usize,
        leased: bool,
    },
    Garbage(u16, Vec<u8>),
    Reconnect,
    Tick(u64),
    NotApplied,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        6 => (1u64..6, 0usize..3, prop::bool::weighted(0.8))
            .prop_map(|(revision, ports, leased)| Act::Whole { revision, ports, leased }),
        4 => (1u64..6, 0usize..3, prop::bool::weighted(0.8), any::<bool>())
            .prop_map(|(revision, ports, good, delta)| Act::Start { revision, ports, good, delta }),
        4 => (0usize..3, prop::bool::weighted(0.2)).prop_map(|(ports, partial)| Act::Items { ports, partial }),
        4 => Just(Act::End),
        3 => (1u64..6, 0usize..3, 1_000u64..1_010).prop_map(|(revision, ports, issued)| Act::Lease { revision, ports, issued }),
        1 => (100u16..110, prop::collection::vec(any::<u8>(), 0..40)).prop_map(|(kind, body)| Act::Garbage(kind, body)),
        1 => Just(Act::Reconnect),
        2 => (1u64..1_500).prop_map(Act::Tick),
        1 => Just(Act::NotApplied),
    ]
}

const PORTS: [&[&str]; 3] = [&[], &["tcp/5432"], &["tcp/5432", "tcp/80"]];

/// Runs the acts and checks after each what must always hold; gives the number of views installed.
fn run(acts: Vec<Act>) -> Result<usize, Box<dyn std::error::Error>> {
    let mesh = Mesh::new();
    let stranger = Mesh {
        root: cloison_proto::key::SigningKey::from_seed(&[70; 32]),
        signer: cloison_proto::key::SigningKey::from_seed(&[71; 32]),
    };
    let mut link = linked(&mesh)?;
    let mut now = 0;
    let mut content: BTreeMap<u64, StateHash> = BTreeMap::new();
    let mut newest = None;
    let mut installs = 0;
    for act in acts {
        let out = match act {
            Act::Start {
                revision,
                ports,
                good,
                delta,
            } => {
                let items = mesh.items(PORTS.get(ports).copied().unwrap_or_default())?;
                let signer = if good { &mesh } else { &stranger };
                let base = link.view().map(|v| v.header().state_hash).filter(|_| delta);
                let start = ViewStart {
                    header: signer.header(&items, revision),
                    base,
                };
                link.frame(at(now), &start.to_frame())
            }
            Act::Items { ports, partial } => {
                let mut ops = mesh
                    .items(PORTS.get(ports).copied().unwrap_or_default())?
                    .changes_since(&Items::default());
                ops.truncate(if partial { 3 } else { ops.len() });
                link.frame(at(now), &ViewItems { ops }.to_frame())
            }
            Act::End => link.frame(at(now), &ViewEnd {}.to_frame()),
            Act::Lease { revision, ports, issued } => {
                let view = mesh.view(revision, PORTS.get(ports).copied().unwrap_or_default())?;
                link.frame(at(now), &grant(&mesh.lease(&view, issued, 600)))
            }
            Act::Whole { revision, ports, leased } => {
                let ports = PORTS.get(ports).copied().unwrap_or_default();
                let items = mesh.items(ports)?;
                let mut frames = whole(mesh.header(&items, revision), &items);
                if leased {
                    frames.push(grant(&mesh.lease(&mesh.view(revision, ports)?, 1_010, 600)));
                }
                feed(&mut link, at(now), &frames)
            }
            Act::Garbage(kind, body) => link.frame(at(now), &Frame { kind, body }),
            Act::Reconnect => {
                link.disconnected(at(now), "test");
                link.connected(at(now))
            }
            Act::Tick(millis) => {
                now += millis;
                link.tick(at(now))
            }
            Act::NotApplied => link.not_applied("test"),
        };
        if let Some(offer) = installed(&out) {
            installs += 1;
            let header = offer.view.header();
            assert_eq!(offer.view.items().hash(), header.state_hash, "what is installed is what was signed");
            assert!(newest <= Some(header.version), "a view never goes back");
            newest = Some(header.version);
            let first = *content.entry(header.version.revision).or_insert(header.state_hash);
            assert_eq!(first, header.state_hash, "one version, one content");
            assert!(offer.lease.as_ref().is_none_or(|l| l.covers(&offer.view)));
            if now % 2 == 0 {
                assert_eq!(acked(&link.applied(at(now), report())), Some(header.state_hash));
            }
        } else {
            for output in &out {
                if let Output::Lease(held) = output {
                    let version = held.lease.version;
                    assert!(
                        newest >= Some(version) && content.get(&version.revision) == Some(&held.lease.state_hash),
                        "a lease is for a view of ours"
                    );
                }
            }
        }
    }
    Ok(installs)
}

proptest! {
    #[test]
    fn no_sequence_of_frames_installs_an_unverified_view_or_goes_back(acts in prop::collection::vec(act(), 0..80)) {
        run(acts).map_err(|e| TestCaseError::fail(e.to_string()))?;
    }
}

#[test]
fn a_good_sequence_among_them_installs() -> Outcome {
    let good = |revision, ports| {
        [
            Act::Start {
                revision,
                ports,
                good: true,
                delta: false,
            },
            Act::Items { ports, partial: false },
            Act::End,
            Act::Lease {
                revision,
                ports,
                issued: 1_000 + revision,
            },
        ]
    };
    assert_eq!(run([good(1, 0), good(2, 1), good(1, 0), good(3, 2)].concat())?, 3);
    Ok(())
}
