//! Frames: every kind of message, and streams that are cut, lie about lengths or nest without end.

use anyhow::Result;
use cloison_proto::control::agent::{
    Ack, AgentMessage, Endpoint, Endpoints, Hello, InstanceReport, LastDenial, Nack, RenewCertificate, Report, Unenforced,
};
use cloison_proto::control::coordinator::{
    Certificate, CoordinatorMessage, Goodbye, Hints, LeaseGrant, PeerHint, ViewEnd, ViewItems, ViewStart,
};
use cloison_proto::control::frame::{Frame, MAX_FRAME};
use cloison_proto::id::{HostId, MeshId};
use cloison_proto::key::SigningKey;
use cloison_proto::lease::Lease;
use cloison_proto::version::{MeshTime, Version};
use cloison_proto::view::{Header, ItemKey, Op, StateHash};

use super::{Seeds, add};

pub(super) fn seeds() -> Result<Seeds> {
    let mut seeds = Seeds::new();
    let mut whole = Vec::new();
    for (name, frame) in agent_frames()?.into_iter().chain(coordinator_frames()) {
        let bytes = frame.to_bytes()?;
        whole.extend_from_slice(&bytes);
        add(&mut seeds, name, bytes);
    }
    add(&mut seeds, "all-kinds", whole.clone());
    add(&mut seeds, "all-kinds-and-a-cut", whole.get(..whole.len() - 3).unwrap_or_default());
    add(
        &mut seeds,
        "garbage-behind-a-frame",
        [Frame { kind: 1, body: vec![0xa0] }.to_bytes()?, vec![0xff; 9]].concat(),
    );
    add(
        &mut seeds,
        "kind-of-a-later-protocol",
        Frame {
            kind: 999,
            body: vec![0xa0],
        }
        .to_bytes()?,
    );
    lengths(&mut seeds);
    contents(&mut seeds)?;
    Ok(seeds)
}

fn agent_frames() -> Result<Vec<(&'static str, Frame)>> {
    let version = Version {
        generation: 1_800_000_000,
        revision: 7,
    };
    let state_hash = StateHash([9; 32]);
    let endpoints = vec![Endpoint("192.0.2.1:51820".parse()?), Endpoint("[2001:db8::1]:51820".parse()?)];
    let hello = Hello {
        software: "0.1.0".into(),
        version: Some(version),
        state_hash: Some(state_hash),
        incarnation: 3,
        endpoints: endpoints.clone(),
    };
    let first = Hello {
        version: None,
        state_hash: None,
        endpoints: Vec::new(),
        ..hello.clone()
    };
    let unenforced = vec![Unenforced {
        component: "n8n".parse()?,
        reason: "no such user".into(),
    }];
    let instances = vec![InstanceReport {
        component: "n8n".parse()?,
        state: "bound".into(),
        by: "unit n8n.service".into(),
        last_denial: Some(LastDenial {
            at: MeshTime(1_800_000_000),
            outbound: true,
            reason: "no_rule".into(),
        }),
    }];
    let messages: [(&str, AgentMessage); 8] = [
        ("hello", hello.into()),
        ("hello-without-a-view", first.into()),
        ("ack", Ack { version, state_hash }.into()),
        (
            "nack",
            Nack {
                version,
                code: "hash".into(),
                detail: "é".repeat(40),
            }
            .into(),
        ),
        ("endpoints", Endpoints { endpoints }.into()),
        (
            "report",
            Report {
                unenforced,
                ignored_items: u64::MAX,
                instances: None,
            }
            .into(),
        ),
        (
            "report-with-instances",
            Report {
                unenforced: Vec::new(),
                ignored_items: 0,
                instances: Some(instances),
            }
            .into(),
        ),
        ("renew", RenewCertificate {}.into()),
    ];
    Ok(messages.into_iter().map(|(name, message)| (name, message.to_frame())).collect())
}

fn coordinator_frames() -> Vec<(&'static str, Frame)> {
    let key = SigningKey::from_seed(&[7; 32]);
    let (mesh, host, version, state_hash) = (
        MeshId([1; 16]),
        HostId([2; 16]),
        Version {
            generation: 1,
            revision: 2,
        },
        StateHash([9; 32]),
    );
    let header = Header {
        mesh,
        host,
        version,
        state_hash,
    }
    .sign(&key);
    let lease = Lease {
        mesh,
        host,
        version,
        state_hash,
        issued_at: MeshTime(1_800_000_000),
        valid_for_secs: 86_400,
    }
    .sign(&key);
    let at = |key: &[u8]| ItemKey {
        section: 6,
        key: key.to_vec(),
    };
    let ops = vec![
        Op {
            at: at(b"a"),
            bytes: Some(vec![0xa0].into()),
        },
        Op { at: at(b""), bytes: None },
    ];
    let peers = vec![PeerHint {
        host,
        endpoints: Vec::new(),
        incarnation: 0,
    }];
    let messages: [(&str, CoordinatorMessage); 8] = [
        (
            "view-start-snapshot",
            ViewStart {
                header: header.clone(),
                base: None,
            }
            .into(),
        ),
        (
            "view-start-delta",
            ViewStart {
                header,
                base: Some(state_hash),
            }
            .into(),
        ),
        ("view-items", ViewItems { ops }.into()),
        ("view-end", ViewEnd {}.into()),
        ("lease", LeaseGrant { lease }.into()),
        ("hints", Hints { peers }.into()),
        ("certificate", Certificate { der: vec![0x30, 0x82] }.into()),
        (
            "goodbye",
            Goodbye {
                code: "rate".into(),
                retry_after_secs: u64::MAX,
            }
            .into(),
        ),
    ];
    messages.into_iter().map(|(name, message)| (name, message.to_frame())).collect()
}

/// What the four bytes in front may say.
fn lengths(seeds: &mut Seeds) {
    let limit = u32::try_from(MAX_FRAME).unwrap_or(u32::MAX);
    for len in [0, 1, 3, limit, limit + 1, u32::MAX] {
        add(seeds, format!("says-{len}"), [&len.to_be_bytes()[..], &[0xa2, 0, 1]].concat());
    }
    for len in [0usize, 1, 3, 4] {
        add(seeds, format!("head-of-{len}-bytes"), vec![0; len]);
    }
}

/// What can stand where a map is due.
fn contents(seeds: &mut Seeds) -> Result<()> {
    let outer: [(&str, &[u8]); 14] = [
        ("empty-map", &[0xa0]),
        ("no-map", &[0x01]),
        ("array", &[0x82, 1, 0x41, 0]),
        ("endless-map", &[0xbf, 0, 1, 1, 0x40, 0xff]),
        ("endless-bytes", &[0xa2, 0, 1, 1, 0x5f, 0x41, 0, 0xff]),
        ("field-twice", &[0xa3, 0, 1, 0, 2, 1, 0x40]),
        ("later-field", &[0xa3, 0, 1, 1, 0x40, 0x18, 99, 0xf6]),
        ("kind-too-large", &[0xa2, 0, 0x1a, 0, 1, 0, 0, 1, 0x40]),
        ("kind-negative", &[0xa2, 0, 0x20, 1, 0x40]),
        (
            "bytes-longer-than-all",
            &[0xa2, 0, 1, 1, 0x5b, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        ),
        ("map-of-2-to-the-64", &[0xbb, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
        ("text-not-utf8", &[0xa2, 0, 1, 1, 0x62, 0xff, 0xfe]),
        ("tagged", &[0xa2, 0, 0xc1, 1, 1, 0x40]),
        ("trailing", &[0xa2, 0, 1, 1, 0x40, 0]),
    ];
    for (name, content) in outer {
        let len = u32::try_from(content.len())?.to_be_bytes();
        add(seeds, format!("content-{name}"), [&len[..], content].concat());
    }
    // Inside a field that nobody knows, which is to be skipped without recursion.
    for (name, nested) in [("arrays", 0x81u8), ("maps", 0xa1), ("tags", 0xc1), ("endless-arrays", 0x9f)] {
        let body = [vec![0xa1, 0x18, 50], vec![nested; 2_000]].concat();
        for kind in [1, 101, 102] {
            add(
                seeds,
                format!("nested-{name}-in-{kind}"),
                Frame { kind, body: body.clone() }.to_bytes()?,
            );
        }
    }
    for kind in [1, 2, 3, 4, 5, 101, 102, 104, 105] {
        add(
            seeds,
            format!("kind-{kind}-with-an-empty-map"),
            Frame { kind, body: vec![0xa0] }.to_bytes()?,
        );
        add(
            seeds,
            format!("kind-{kind}-with-no-body"),
            Frame { kind, body: Vec::new() }.to_bytes()?,
        );
    }
    // A list that says it has 2^32 elements: nothing may be allocated for it.
    add(
        seeds,
        "list-of-2-to-the-32",
        Frame {
            kind: 102,
            body: vec![0xa1, 0, 0x9b, 0, 0, 0, 1, 0, 0, 0, 0],
        }
        .to_bytes()?,
    );
    Ok(())
}
