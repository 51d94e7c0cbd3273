//! Every committed input of the fuzz targets, and what is near it, through the bodies that discovery runs too.

#![forbid(unsafe_code)]

use std::panic::catch_unwind;

use anyhow::{Result, ensure};
use cloison_proto::control::frame::fuzz_frames;
use cloison_proto::policy::testing::fuzz_policy;
use cloison_proto::token::fuzz_token;
use cloison_proto::view::fuzz_view;
use cloison_tests::seeds::Target;

/// Cuts and flips of one input.
const NEIGHBOURS: usize = 24;

#[test]
fn packets_are_seen_alike_by_two_parsers() -> Result<()> {
    replay(Target::Packet, |bytes| {
        cloison_agent_core::fuzz::packet(bytes);
        true
    })
}

#[test]
fn frames_are_read_alike_in_any_pieces() -> Result<()> {
    replay(Target::Frame, fuzz_frames)
}

#[test]
fn a_token_has_one_text() -> Result<()> {
    replay(Target::Token, fuzz_token)
}

#[test]
fn a_policy_has_one_meaning() -> Result<()> {
    replay(Target::Policy, |bytes| {
        fuzz_policy(bytes);
        true
    })
}

#[test]
fn a_view_opens_nothing_between_others() -> Result<()> {
    replay(Target::View, fuzz_view)
}

#[test]
fn the_committed_inputs_are_the_seeds_and_what_was_found() -> Result<()> {
    for target in Target::ALL {
        let (committed, seeds) = (target.committed()?, target.seeds()?);
        ensure!(seeds.len() >= 20, "{}: {} seeds", target.name(), seeds.len());
        for (name, bytes) in seeds {
            let same = committed.get(&name) == Some(&bytes);
            ensure!(
                same,
                "{}/{name} is not what is committed: run `cargo run -p cloison-tests --example fuzz-seeds`",
                target.name()
            );
        }
        for (name, bytes) in committed {
            ensure!(
                bytes.len() <= 8_192,
                "{}/{name} has {} bytes: seeds are small",
                target.name(),
                bytes.len()
            );
        }
    }
    Ok(())
}

#[test]
fn good_seeds_are_good() -> Result<()> {
    let good = |target: Target, names: &str, is_good: &dyn Fn(&[u8]) -> bool| -> Result<()> {
        let seeds = target.seeds()?;
        let named: Vec<_> = seeds.iter().filter(|(name, _)| name.contains(names)).collect();
        ensure!(!named.is_empty(), "no {names}");
        for (name, bytes) in named {
            ensure!(is_good(bytes), "{}/{name} is refused", target.name());
        }
        Ok(())
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    good(Target::Packet, "-tcp-syn", &|bytes| {
        bytes.len() < 40 || cloison_agent_core::packet::parse(bytes).is_ok() || bytes.get(33) != Some(&2)
    })?;
    good(Target::Packet, "-echo-re", &|bytes| {
        cloison_agent_core::packet::parse(bytes).is_ok()
    })?;
    good(Target::Packet, "error-udp", &|bytes| {
        cloison_agent_core::packet::parse(bytes).is_ok()
    })?;
    good(Target::Token, "good", &|bytes| {
        text(bytes).parse::<cloison_proto::token::EnrollmentToken>().is_ok()
    })?;
    good(Target::Policy, "rule-every", &|bytes| {
        cloison_proto::policy::parse(&text(bytes)).is_ok()
    })?;
    good(Target::Policy, "json", &|bytes| cloison_proto::policy::parse(&text(bytes)).is_ok())?;
    good(Target::View, "good", &|bytes| {
        let parts = cloison_proto::view::VerifiedView::parts_from_bytes(bytes).ok();
        parts.is_some_and(|(_, items)| {
            cloison_proto::view::View::parse(&items, cloison_proto::view::FUZZ_HOST).is_ok_and(|view| view.ignored == 0)
        })
    })
}

/// Runs the body on every committed input, on its beginnings and on copies with one bit changed.
fn replay(target: Target, body: impl Fn(&[u8]) -> bool + std::panic::RefUnwindSafe) -> Result<()> {
    let holds = |bytes: &[u8]| catch_unwind(|| body(bytes)).unwrap_or(false);
    let inputs = target.committed()?;
    ensure!(inputs.len() >= 20, "{}: {} inputs", target.name(), inputs.len());
    for (name, bytes) in inputs {
        ensure!(holds(&bytes), "{}/{name}", target.name());
        for part in 0..NEIGHBOURS {
            let cut = bytes.len() * part / NEIGHBOURS;
            ensure!(holds(bytes.get(..cut).unwrap_or_default()), "{}/{name} cut to {cut}", target.name());
            // Spread over the input, at odd distances, and over the bits of a byte.
            let (at, bit) = ((cut + part) % bytes.len().max(1), part % 8);
            let mut flipped = bytes.clone();
            flipped.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << bit);
            ensure!(holds(&flipped), "{}/{name} with bit {bit} of byte {at} changed", target.name());
        }
    }
    Ok(())
}
