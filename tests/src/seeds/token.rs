//! Enrollment tokens: good ones, and what copying, wrapping, other encodings and forgery make of them.

use anyhow::Result;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE, URL_SAFE_NO_PAD};
use cloison_proto::id::{MeshId, TokenId};
use cloison_proto::key::Secret32;
use cloison_proto::token::{EnrollmentToken, MAX_ADDRESS_LEN, PREFIX};
use cloison_proto::version::MeshTime;
use sha2::{Digest as _, Sha256};

use super::{Seeds, add};

pub(super) fn seeds() -> Result<Seeds> {
    let mut seeds = Seeds::new();
    let good = text(&["10.0.0.1:7443"])?;
    let longest = format!("{}:7443", "a".repeat(MAX_ADDRESS_LEN - 5));
    add(&mut seeds, "good", good.as_bytes());
    add(&mut seeds, "good-with-a-line-end", format!(" {good}\r\n"));
    add(&mut seeds, "good-longest", text(&[&longest, &longest, &longest])?);
    add(&mut seeds, "good-v6", text(&["[2001:db8::1]:7443"])?);
    add(&mut seeds, "empty", "");
    add(&mut seeds, "prefix-alone", PREFIX);
    add(&mut seeds, "prefix-twice", format!("{PREFIX}{good}"));
    add(&mut seeds, "prefix-of-a-later-version", good.replacen("cloison1_", "cloison2_", 1));
    add(&mut seeds, "prefix-in-capitals", good.replacen("cloison1_", "CLOISON1_", 1));
    add(
        &mut seeds,
        "wrapped",
        format!("{}\n{}", good.get(..64).unwrap_or_default(), good.get(64..).unwrap_or_default()),
    );
    add(&mut seeds, "twice", format!("{good}\n{good}"));
    add(&mut seeds, "not-utf8", [good.as_bytes(), &[0xff]].concat());
    add(&mut seeds, "lookalike", good.replacen('c', "с", 1));
    add(&mut seeds, "zero-width-space", format!("{good}\u{200b}"));
    add(&mut seeds, "quoted", format!("\"{good}\""));
    add(&mut seeds, "too-long", format!("{good}{}", "A".repeat(512)));
    for cut in [1, 2, 3, 4, 5, 8, 20, 60] {
        add(
            &mut seeds,
            format!("cut-by-{cut}"),
            good.get(..good.len() - cut).unwrap_or_default(),
        );
    }
    encodings(&mut seeds, &good)?;
    layouts(&mut seeds);
    Ok(seeds)
}

fn text(addresses: &[&str]) -> Result<String> {
    let token = EnrollmentToken {
        id: TokenId([1; 8]),
        secret: Secret32::from_bytes([0xab; 32]),
        mesh: MeshId([2; 16]),
        root_pin: [3; 32],
        expires: MeshTime(1_800_000_000),
        addresses: addresses.iter().map(ToString::to_string).collect(),
    };
    Ok(token.to_text()?.to_string())
}

/// The same bytes in other alphabets, and in texts that decode to the same bytes.
fn encodings(seeds: &mut Seeds, good: &str) -> Result<()> {
    let bytes = URL_SAFE_NO_PAD.decode(good.trim_start_matches(PREFIX))?;
    add(seeds, "other-alphabet", format!("{PREFIX}{}", STANDARD.encode(&bytes)));
    add(seeds, "with-padding", format!("{PREFIX}{}", URL_SAFE.encode(&bytes)));
    add(seeds, "padding-doubled", format!("{good}=="));
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    add(seeds, "in-hex", format!("{PREFIX}{hex}"));
    // Bits that no byte needs, set: a second text of the same token.
    let odd = text(&["10.0.0.11:7443"])?;
    for last in ['B', 'R', 'h', 'x'] {
        add(
            seeds,
            format!("spare-bits-{last}"),
            format!("{}{last}", odd.get(..odd.len() - 1).unwrap_or_default()),
        );
    }
    Ok(())
}

/// Bytes under a right checksum that are no token.
fn layouts(seeds: &mut Seeds) {
    let fixed = [&[1; 8][..], &[0xab; 32], &[2; 16], &[3; 32], &[0; 8]].concat();
    let address = |text: &[u8]| [&[u8::try_from(text.len()).unwrap_or(u8::MAX)], text].concat();
    let good = address(b"10.0.0.1:7443");
    let layouts: [(&str, Vec<u8>); 12] = [
        ("nothing", Vec::new()),
        ("one-byte", vec![0]),
        ("no-address", fixed.clone()),
        ("fixed-part-cut", fixed.get(..95).unwrap_or_default().to_vec()),
        ("four-addresses", [&fixed[..], &good.repeat(4)].concat()),
        ("empty-address", [&fixed[..], &[0]].concat()),
        ("address-cut", [&fixed[..], &[40], b"10.0.0.1"].concat()),
        ("address-too-long", [&fixed[..], &address(&[b'a'; 73])].concat()),
        ("address-with-a-space", [&fixed[..], &address(b"a b:1")].concat()),
        ("address-with-a-line-end", [&fixed[..], &address(b"a:1\n")].concat()),
        ("address-not-utf8", [&fixed[..], &address(&[0xff, 0xfe])].concat()),
        ("never-expires", [fixed.get(..88).unwrap_or_default(), &[0xff; 8], &good].concat()),
    ];
    for (name, content) in layouts {
        let digest: [u8; 32] = Sha256::digest(&content).into();
        let sealed = [&content[..], digest.get(..4).unwrap_or_default()].concat();
        add(
            seeds,
            format!("layout-{name}"),
            format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(sealed)),
        );
        let wrong = [&content[..], &[0; 4]].concat();
        add(
            seeds,
            format!("checksum-{name}"),
            format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(wrong)),
        );
    }
}
