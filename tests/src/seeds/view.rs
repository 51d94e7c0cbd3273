//! Views as an agent has them on disk: good ones, each item with a field of a later protocol, contradictions, and damage.

use std::time::Duration;

use anyhow::{Context as _, Result};
use cloison_proto::id::{HostId, MeshId, RuleId};
use cloison_proto::key::{SigningKey, WgPrivateKey};
use cloison_proto::net::{AddressPair, OverlayRange};
use cloison_proto::policy::Attachment;
use cloison_proto::signed::Signed;
use cloison_proto::version::{MeshTime, Version};
use cloison_proto::view::{
    Config, FUZZ_HOST, Grant, Header, ItemKey, Items, LocalInstance, Op, Peer, RemoteInstance, RuleItem, SelfHost, section,
};

use super::{Seeds, add};

const THEM: HostId = HostId([3; 16]);

pub(super) fn seeds() -> Result<Seeds> {
    let mut seeds = Seeds::new();
    let good = stored(&good()?)?;
    add(&mut seeds, "good", good.clone());
    add(&mut seeds, "nothing", stored(&Items::default())?);
    for part in 1..16 {
        add(
            &mut seeds,
            format!("cut-{part}"),
            good.get(..good.len() * part / 16).unwrap_or_default(),
        );
    }
    for part in 0..16 {
        let mut damaged = good.clone();
        if let Some(byte) = damaged.get_mut(good.len() * part / 16 + 3) {
            *byte ^= 0x41;
        }
        add(&mut seeds, format!("damaged-{part}"), damaged);
    }
    add(&mut seeds, "trailing", [&good[..], &[0]].concat());
    later_fields(&mut seeds)?;
    contradictions(&mut seeds)?;
    operations(&mut seeds)?;
    Ok(seeds)
}

fn range() -> Result<OverlayRange> {
    Ok(OverlayRange::new([10, 77, 0, 0].into(), 16, "fd12:3456:789a::".parse()?)?)
}

fn addresses(index: u32) -> Result<AddressPair> {
    range()?.nth(index).context("outside of the range")
}

fn peer(id: HostId, keys: &[u8]) -> Result<Peer> {
    let wg_keys = keys.iter().map(|seed| WgPrivateKey::from_bytes([*seed; 32]).public()).collect();
    Ok(Peer {
        id,
        name: "db-1".parse()?,
        wg_keys,
        psk_generation: 0,
    })
}

fn remote(component: &str, host: HostId, addresses: AddressPair) -> Result<RemoteInstance> {
    Ok(RemoteInstance {
        component: component.parse()?,
        host,
        addresses,
    })
}

fn rule(from: &str, to: &str, ports: &[&str], expires: MeshTime) -> Result<RuleItem> {
    let grants = ports.iter().map(|ports| {
        Ok(Grant {
            ports: ports.parse()?,
            service: Some("sql".parse()?),
        })
    });
    Ok(RuleItem {
        id: RuleId([9; 16]),
        from: from.parse()?,
        to: to.parse()?,
        grants: grants.collect::<Result<_>>()?,
        expires,
    })
}

/// The view of the host of `n8n`, which may reach `postgres` on another host.
fn good() -> Result<Items> {
    let mut items = Items::default();
    Config {
        overlay: range()?,
        lease: Duration::from_secs(86_400),
    }
    .put_in(&mut items);
    let wg_keys = vec![WgPrivateKey::from_bytes([1; 32]).public()];
    SelfHost {
        id: FUZZ_HOST,
        name: "app-1".parse()?,
        wg_keys,
    }
    .put_in(&mut items);
    LocalInstance {
        component: "n8n".parse()?,
        attachment: Attachment::Host,
        addresses: addresses(0)?,
    }
    .put_in(&mut items);
    peer(THEM, &[2])?.put_in(&mut items);
    remote("postgres", THEM, addresses(1)?)?.put_in(&mut items);
    rule("n8n", "postgres", &["tcp/5432", "udp/1-65535", "icmp"], MeshTime::NEVER)?.put_in(&mut items);
    Ok(items)
}

fn signed(items: &Items) -> Signed {
    let version = Version {
        generation: 1,
        revision: 5,
    };
    Header {
        mesh: MeshId([1; 16]),
        host: FUZZ_HOST,
        version,
        state_hash: items.hash(),
    }
    .sign(&SigningKey::from_seed(&[7; 32]))
}

/// The stored form: field 0 the signed header, field 1 the items.
fn stored(items: &Items) -> Result<Vec<u8>> {
    stored_ops(&signed(items), &items.changes_since(&Items::default()))
}

fn stored_ops(header: &Signed, ops: &[Op]) -> Result<Vec<u8>> {
    let mut out = minicbor::Encoder::new(Vec::new());
    out.map(2)?.u8(0)?.encode(header)?.u8(1)?.encode(ops)?;
    Ok(out.into_writer())
}

fn later_fields(seeds: &mut Seeds) -> Result<()> {
    for (at, bytes) in good()?.iter() {
        let head = bytes.first().copied().unwrap_or_default();
        // One more field than before, numbered 15, whose value is true.
        let wider = [&[head.wrapping_add(1)], bytes.get(1..).unwrap_or_default(), &[0x0f, 0xf5]].concat();
        let endless = [&[0xbf], bytes.get(1..).unwrap_or_default(), &[0xff]].concat();
        for (name, changed) in [
            ("later-field", wider),
            ("endless-map", endless),
            ("empty", Vec::new()),
            ("empty-map", vec![0xa0]),
        ] {
            let mut items = good()?;
            items.put(at.section, at.key.clone(), changed);
            add(seeds, format!("section-{}-{name}", at.section), stored(&items)?);
        }
    }
    for later in [0, 8, 999, u16::MAX] {
        let mut items = good()?;
        items.put(later, b"x".to_vec(), vec![0xff, 0]);
        add(seeds, format!("section-{later}-unknown"), stored(&items)?);
    }
    Ok(())
}

fn contradictions(seeds: &mut Seeds) -> Result<()> {
    let mut with = |name: &str, change: &dyn Fn(&mut Items) -> Result<()>| {
        let mut items = good()?;
        change(&mut items)?;
        add(seeds, name, stored(&items)?);
        Ok::<_, anyhow::Error>(())
    };
    let outside = AddressPair {
        v4: [192, 0, 2, 1].into(),
        v6: "fe80::1".parse()?,
    };
    let reserved = AddressPair {
        v4: [10, 77, 0, 0].into(),
        v6: "fd12:3456:789a::".parse()?,
    };
    with("address-twice", &|items| {
        remote("redis", THEM, addresses(1)?)?.put_in(items);
        Ok(())
    })?;
    with("address-ours", &|items| {
        remote("redis", THEM, addresses(0)?)?.put_in(items);
        Ok(())
    })?;
    with("address-outside", &|items| {
        remote("redis", THEM, outside)?.put_in(items);
        Ok(())
    })?;
    with("address-reserved", &|items| {
        remote("redis", THEM, reserved)?.put_in(items);
        Ok(())
    })?;
    with("key-twice", &|items| {
        peer(HostId([4; 16]), &[2])?.put_in(items);
        Ok(())
    })?;
    with("key-ours", &|items| {
        peer(HostId([4; 16]), &[1])?.put_in(items);
        Ok(())
    })?;
    with("keys-none", &|items| {
        peer(THEM, &[])?.put_in(items);
        Ok(())
    })?;
    with("keys-three", &|items| {
        peer(THEM, &[2, 3, 4])?.put_in(items);
        Ok(())
    })?;
    with("peer-is-us", &|items| {
        peer(FUZZ_HOST, &[5])?.put_in(items);
        Ok(())
    })?;
    with("remote-of-no-peer", &|items| {
        remote("redis", HostId([8; 16]), addresses(2)?)?.put_in(items);
        Ok(())
    })?;
    with("remote-of-us", &|items| {
        remote("n8n", FUZZ_HOST, addresses(3)?)?.put_in(items);
        Ok(())
    })?;
    with("rule-between-others", &|items| {
        rule("postgres", "redis", &["tcp/1"], MeshTime::NEVER)?.put_in(items);
        Ok(())
    })?;
    with("rule-to-itself", &|items| {
        rule("n8n", "n8n", &["tcp/1"], MeshTime::NEVER)?.put_in(items);
        Ok(())
    })?;
    with("rule-of-nothing", &|items| {
        rule("n8n", "postgres", &[], MeshTime::NEVER)?.put_in(items);
        Ok(())
    })?;
    with("rule-ended", &|items| {
        rule("n8n", "postgres", &["tcp/5432"], MeshTime(0))?.put_in(items);
        Ok(())
    })?;
    with("key-of-another-item", &|items| {
        let bytes: Vec<u8> = items
            .iter()
            .find(|(at, _)| at.section == section::PEER)
            .map(|(_, bytes)| bytes.to_vec())
            .unwrap_or_default();
        items.put(section::PEER, vec![0; 16], bytes);
        Ok(())
    })?;
    with("trust-of-garbage", &|items| {
        items.put(section::TRUST, vec![0; 32], signed(&Items::default()).to_bytes());
        items.put(section::TRUST, vec![1; 32], vec![0xff; 8]);
        Ok(())
    })
}

/// Lists that no coordinator writes.
fn operations(seeds: &mut Seeds) -> Result<()> {
    let good = good()?;
    let (header, ops) = (signed(&good), good.changes_since(&Items::default()));
    let removals: Vec<_> = ops
        .iter()
        .map(|op| Op {
            at: op.at.clone(),
            bytes: None,
        })
        .collect();
    add(seeds, "removals-of-nothing", stored_ops(&header, &removals)?);
    add(seeds, "added-and-removed", stored_ops(&header, &[&ops[..], &removals].concat())?);
    add(seeds, "each-twice", stored_ops(&header, &[&ops[..], &ops].concat())?);
    let reversed: Vec<_> = ops.iter().rev().cloned().collect();
    add(seeds, "reversed", stored_ops(&header, &reversed)?);
    let long = Op {
        at: ItemKey {
            section: 5,
            key: vec![0xff; 3_000],
        },
        bytes: Some(Vec::new().into()),
    };
    add(seeds, "long-key", stored_ops(&header, &[long])?);
    let mut out = minicbor::Encoder::new(Vec::new());
    out.map(2)?.u8(0)?.encode(&header)?.u8(1)?.array(u64::MAX)?;
    add(seeds, "list-of-2-to-the-64", out.into_writer());
    Ok(())
}
