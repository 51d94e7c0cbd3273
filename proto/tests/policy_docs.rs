//! `docs/policy.md` is true: every policy in it is accepted, or refused with the code that its block names; every code is listed.

use cloison_proto::policy::{self, Code, Severity, parse, print};

const REFERENCE: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/policy.md"));

/// The fenced blocks: their info strings, their texts, and the lines on which they begin.
fn blocks() -> Vec<(&'static str, String, usize)> {
    let mut blocks = Vec::new();
    let mut lines = REFERENCE.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let Some(info) = line.strip_prefix("```") else { continue };
        let text: Vec<_> = lines.by_ref().map(|(_, l)| l).take_while(|l| *l != "```").collect();
        blocks.push((info, text.join("\n") + "\n", number + 1));
    }
    blocks
}

#[test]
fn every_policy_in_the_reference_is_what_it_claims_to_be() -> Result<(), String> {
    let mut run = 0;
    for (info, text, line) in blocks() {
        let at = format!("docs/policy.md:{line}");
        match (info, parse(&text)) {
            ("yaml", Ok(policy)) => assert_eq!(parse(&print(&policy)), Ok(policy), "{at}"),
            ("yaml", Err(found)) => return Err(format!("{at} is refused: {found:?}")),
            (info, result) if info.starts_with("yaml,error ") => {
                let codes: Vec<_> = result.err().unwrap_or_default().iter().map(|d| d.code.to_string()).collect();
                assert_eq!(codes, [info.trim_start_matches("yaml,error ")], "{at}");
            }
            ("text", _) => continue,
            (info, _) => return Err(format!("{at}: what is a block of `{info}`?")),
        }
        run += 1;
    }
    assert!(run >= 14, "only {run} blocks were found");
    Ok(())
}

#[test]
fn the_reference_lists_every_code_with_its_meaning() {
    for code in Code::ALL {
        let row = format!("| `{code}` | {} |", code.explanation());
        assert!(REFERENCE.contains(&row), "docs/policy.md lacks this line:\n{row}");
    }
}

#[test]
fn the_reference_names_the_limits_that_hold() {
    let mib = policy::MAX_BYTES >> 20;
    let rows = [
        format!(
            "| the document | {mib} MiB, {} values, nested {} deep |",
            thousands(policy::MAX_NODES),
            policy::MAX_DEPTH
        ),
        format!("| components | {} |", thousands(policy::MAX_COMPONENTS)),
        format!("| rules | {} |", thousands(policy::MAX_RULES)),
        format!("| entries on one side of a rule | {} |", thousands(policy::MAX_SIDE)),
        format!(
            "| labels of one component, of `on`, of one selector | {} |",
            cloison_proto::label::MAX_LABELS
        ),
        format!("| hosts in one `on` | {} |", thousands(policy::MAX_HOSTS)),
        format!("| services of one component | {} |", policy::MAX_SERVICES),
        format!("| port specifications of one service | {} |", policy::MAX_PORTS),
        format!("| diagnostics reported at once | {} |", policy::MAX_DIAGNOSTICS),
        format!("up to {} characters", policy::MAX_NOTE),
    ];
    for row in rows {
        assert!(REFERENCE.contains(&row), "docs/policy.md lacks: {row}");
    }
}

#[test]
fn a_diagnostic_reads_as_one_line_and_a_hint() {
    let found = parse("version: 1\nalow: []\n").err().unwrap_or_default();
    let shown: Vec<_> = found.iter().map(ToString::to_string).collect();
    assert_eq!(
        shown,
        ["2:1: error[unknown_key]: a policy has no key `alow`\n  hint: did you mean `allow`?"]
    );
    assert!(found.iter().all(|d| d.severity == Severity::Error));
}

/// A number as the reference writes it: `50,000`.
fn thousands(n: usize) -> String {
    let digits = n.to_string();
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
    groups.join(",")
}
