//! Properties of views: what is signed is what is read, deltas equal snapshots, nothing unknown widens.

use std::error::Error;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::filter::{Table, Verdict};
use crate::id::RuleId;
use crate::key::WgPrivateKey;
use crate::net::{AddressPair, OverlayRange, Protocol};
use crate::policy::Attachment;
use crate::verdict::DropReason;
use crate::version::MeshTime;

type Outcome = Result<(), Box<dyn Error>>;

const MESH: MeshId = MeshId([1; 16]);
const US: HostId = HostId([2; 16]);
const THEM: HostId = HostId([3; 16]);

fn range() -> Result<OverlayRange, Box<dyn Error>> {
    Ok(OverlayRange::new([10, 77, 0, 0].into(), 16, "fd12:3456:789a::".parse()?)?)
}

fn addresses(index: u32) -> Result<AddressPair, Box<dyn Error>> {
    range()?.nth(index).ok_or_else(|| "outside the range".into())
}

fn rule(id: u8, expires: MeshTime) -> Result<RuleItem, Box<dyn Error>> {
    let grants = vec![Grant {
        ports: "tcp/5432".parse()?,
        service: Some("sql".parse()?),
    }];
    Ok(RuleItem {
        id: RuleId([id; 16]),
        from: "n8n".parse()?,
        to: "postgres".parse()?,
        grants,
        expires,
    })
}

/// The view of the host of `n8n`, which may reach `postgres:sql` on another host.
fn items() -> Result<Items, Box<dyn Error>> {
    let mut items = Items::default();
    Config {
        overlay: range()?,
        lease: Duration::from_secs(86_400),
    }
    .put_in(&mut items);
    let key = |seed| WgPrivateKey::from_bytes([seed; 32]).public();
    SelfHost {
        id: US,
        name: "app-1".parse()?,
        wg_keys: vec![key(1)],
    }
    .put_in(&mut items);
    LocalInstance {
        component: "n8n".parse()?,
        attachment: Attachment::Host,
        addresses: addresses(0)?,
    }
    .put_in(&mut items);
    Peer {
        id: THEM,
        name: "db-1".parse()?,
        wg_keys: vec![key(2)],
        psk_generation: 0,
    }
    .put_in(&mut items);
    RemoteInstance {
        component: "postgres".parse()?,
        host: THEM,
        addresses: addresses(1)?,
    }
    .put_in(&mut items);
    rule(9, MeshTime::NEVER)?.put_in(&mut items);
    Ok(items)
}

fn signer() -> SigningKey {
    SigningKey::from_seed(&[7; 32])
}

fn signed(items: &Items, revision: u64) -> Signed {
    let version = Version { generation: 1, revision };
    Header {
        mesh: MESH,
        host: US,
        version,
        state_hash: items.hash(),
    }
    .sign(&signer())
}

fn open(items: Items, floor: Option<Floor>) -> Result<VerifiedView, ViewError> {
    VerifiedView::open(signed(&items, 5), items, &signer().verifying(), (MESH, US), floor)
}

fn allowed(items: Items) -> Result<bool, Box<dyn Error>> {
    let view = open(items, None)?;
    let table = Table::new(view.content());
    let (from, to) = (addresses(0)?, addresses(1)?);
    let families = from.both().into_iter().zip(to.both());
    let verdicts: Vec<_> = families
        .map(|(f, t)| table.check(f, t, Protocol::Tcp, 5432, MeshTime(100)).is_allowed())
        .collect();
    assert!(
        verdicts.windows(2).all(|w| w.first() == w.last()),
        "both families get the same verdict"
    );
    Ok(verdicts.contains(&true))
}

#[test]
fn a_rule_opens_its_port_in_its_direction_only() -> Outcome {
    let table = Table::new(open(items()?, None)?.content());
    let (n8n, postgres) = (addresses(0)?.v4.into(), addresses(1)?.v4.into());
    let check = |f, t, protocol, port| table.check(f, t, protocol, port, MeshTime(100)).is_allowed();
    assert!(check(n8n, postgres, Protocol::Tcp, 5432));
    assert!(!check(postgres, n8n, Protocol::Tcp, 5432), "the reverse direction");
    assert!(!check(n8n, postgres, Protocol::Tcp, 5433) && !check(n8n, postgres, Protocol::Udp, 5432));
    assert!(!check(n8n, postgres, Protocol::Icmp, 0), "echo needs its own rule");
    assert!(!check(n8n, addresses(9)?.v4.into(), Protocol::Tcp, 5432));
    assert!(
        !Table::default().check(n8n, postgres, Protocol::Tcp, 5432, MeshTime(0)).is_allowed(),
        "an empty table denies"
    );
    Ok(())
}

#[test]
fn a_rule_ends_at_its_time() -> Outcome {
    let mut items = items()?;
    rule(9, MeshTime(100))?.put_in(&mut items);
    let table = Table::new(open(items, None)?.content());
    let (n8n, postgres) = (addresses(0)?.v4.into(), addresses(1)?.v4.into());
    let check = |now| table.check(n8n, postgres, Protocol::Tcp, 5432, MeshTime(now));
    assert!(check(99).is_allowed());
    assert_eq!(check(100), Verdict::Denied(DropReason::RuleExpired));
    Ok(())
}

#[test]
fn a_view_is_refused_for_another_host_an_older_version_or_a_fork() -> Outcome {
    let good = open(items()?, None)?;
    let at = |revision, hash| {
        Some(Floor {
            version: Version { generation: 1, revision },
            state_hash: hash,
        })
    };
    assert!(open(items()?, at(5, good.header().state_hash)).is_ok());
    assert!(matches!(open(items()?, at(6, StateHash::default())), Err(ViewError::Older { .. })));
    assert!(matches!(open(items()?, at(5, StateHash::default())), Err(ViewError::Forked(_))));
    let for_them = VerifiedView::open(signed(&items()?, 5), items()?, &signer().verifying(), (MESH, THEM), None);
    assert!(matches!(for_them, Err(ViewError::NotForUs { .. })));
    let by_a_stranger = VerifiedView::open(
        signed(&items()?, 5),
        items()?,
        &SigningKey::from_seed(&[8; 32]).verifying(),
        (MESH, US),
        None,
    );
    assert!(matches!(by_a_stranger, Err(ViewError::Signature(_))));
    Ok(())
}

#[test]
fn an_address_of_two_instances_refuses_the_whole_view() -> Outcome {
    let mut items = items()?;
    RemoteInstance {
        component: "redis".parse()?,
        host: THEM,
        addresses: addresses(1)?,
    }
    .put_in(&mut items);
    assert!(matches!(open(items, None), Err(ViewError::Content(ContentError::AddressTwice(_)))));
    Ok(())
}

#[test]
fn nothing_unknown_widens() -> Outcome {
    assert!(allowed(items()?)?);
    // An item of a later protocol's section changes nothing.
    let mut later = items()?;
    later.put(999, [1], vec![0xff, 0x00]);
    assert!(allowed(later)?);
    // A rule with a field of a later protocol grants nothing: the field might have narrowed it.
    for (at, bytes) in items()?
        .iter()
        .filter(|(at, _)| matches!(at.section, section::RULE | section::REMOTE | section::PEER | section::LOCAL))
    {
        let mut wider = bytes.to_vec();
        let head = wider.first_mut().ok_or("empty item")?;
        *head = head.checked_add(1).ok_or("overflow")?;
        wider.extend_from_slice(&[0x0f, 0xf5]);
        let mut changed = items()?;
        changed.put(at.section, at.key.clone(), wider);
        let view = open(changed.clone(), None)?;
        assert!(view.content().ignored > 0, "section {}", at.section);
        assert!(!allowed(changed)?, "section {}", at.section);
    }
    Ok(())
}

#[test]
fn the_stored_form_is_good_whole_or_not_at_all() -> Outcome {
    let stored = open(items()?, None)?.to_bytes();
    let load = |bytes: &[u8]| {
        let (signed, items) = VerifiedView::parts_from_bytes(bytes).ok()?;
        VerifiedView::open(signed, items, &signer().verifying(), (MESH, US), None).ok()
    };
    assert!(load(&stored).is_some());
    for position in 0..stored.len() {
        assert!(load(stored.get(..position).unwrap_or_default()).is_none(), "cut at {position}");
        let mut flipped = stored.clone();
        if let Some(byte) = flipped.get_mut(position) {
            *byte ^= 0x10;
        }
        assert!(load(&flipped).is_none(), "flipped at {position}");
    }
    Ok(())
}

fn any_items() -> impl Strategy<Value = Items> {
    let item = (
        0u16..4,
        proptest::collection::vec(any::<u8>(), 0..3),
        proptest::collection::vec(any::<u8>(), 0..6),
    );
    proptest::collection::vec(item, 0..12).prop_map(|all| {
        let mut items = Items::default();
        for (section, key, bytes) in all {
            items.put(section, key, bytes);
        }
        items
    })
}

proptest! {
    #[test]
    fn a_delta_makes_exactly_the_new_set(old in any_items(), new in any_items()) {
        let mut patched = old.clone();
        patched.apply(new.changes_since(&old));
        prop_assert_eq!(patched.hash(), new.hash());
        prop_assert_eq!(&patched, &new);
        prop_assert_eq!(old == new, old.hash() == new.hash());
    }

    #[test]
    fn any_bytes_as_a_stored_view_are_refused_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(VerifiedView::parts_from_bytes(&bytes).is_err() || bytes.len() > 60);
    }

    #[test]
    fn any_items_that_were_signed_are_read_or_refused(mut extra in any_items(), section in 1u16..8, bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
        extra.put(section, [0], bytes);
        let mut all = items().map_err(|e| TestCaseError::fail(e.to_string()))?;
        all.apply(extra.changes_since(&Items::default()));
        let _ = open(all, None);
    }
}
