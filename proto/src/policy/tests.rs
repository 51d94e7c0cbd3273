//! The language as its users meet it: what a text means, and what each mistake is answered with.

use proptest::prelude::*;

use super::*;
use crate::label::Selector;

mod golden;
use golden::{COMPONENT, COMPONENTS, DOCUMENT, DOCUMENTS, MAP_RULE, MAP_RULES, RULE, RULES};

/// The example of the design, but for what is not supported yet.
const EXAMPLE: &str = "version: 1
components:
  n8n:        {on: app-1, attach: {unit: n8n.service}, labels: {tier: app}}
  n8n-runner: {on: app-1, attach: {container: docker:n8n-runner}, labels: {tier: untrusted}}
  postgres:   {on: db-1, attach: {user: postgres}, services: {sql: tcp/5432}, labels: {tier: data}}
  backup:     {on: {role: db}, attach: {unit: pgbackup.service}}
allow:
  - n8n -> postgres:sql
  - {from: backup, to: postgres:sql, why: nightly dump, owner: ops, expires: 2027-01-01T00:00:00Z}
";

fn codes(diagnostics: &[Diagnostic]) -> Vec<String> {
    diagnostics.iter().map(|d| format!("{}:{} {}", d.line, d.column, d.code)).collect()
}

/// Everything found in `text`, one line each: place, code, offending text, and the hint.
fn found(text: &str) -> Vec<String> {
    let line = |d: &Diagnostic| {
        format!(
            "{}:{} {} [{}] {} ({})",
            d.line,
            d.column,
            d.code,
            d.text,
            d.message,
            d.hint.as_deref().unwrap_or("no hint")
        )
    };
    parse(text).map_or_else(|found| found.iter().map(line).collect(), |_| Vec::new())
}

fn read_or_fail(text: &str) -> Result<Policy, TestCaseError> {
    parse(text).map_err(|e| {
        TestCaseError::fail(format!(
            "{text}\n{}",
            e.iter().map(Diagnostic::to_string).collect::<Vec<_>>().join("\n")
        ))
    })
}

proptest! {
    #[test]
    fn printing_and_parsing_changes_nothing(policy in testing::policies()) {
        let text = print(&policy);
        let again = read_or_fail(&text)?;
        prop_assert_eq!(&again, &policy, "{}", text);
        prop_assert_eq!(print(&again), text);
    }

    #[test]
    fn the_order_of_a_document_means_nothing(policy in testing::policies(), seed: u64) {
        let text = print(&policy);
        let (head, rules) = text.split_once("allow:\n").unwrap_or((&text, ""));
        let mut rules: Vec<&str> = rules.split_inclusive('\n').collect();
        if rules.iter().all(|r| r.starts_with("  - ") && !r.contains("from:")) {
            let by = usize::try_from(seed % 8).unwrap_or_default().checked_rem(rules.len()).unwrap_or_default();
            rules.rotate_left(by);
            let shuffled = if rules.is_empty() { head.to_owned() } else { format!("allow:\n{}{head}", rules.concat()) };
            prop_assert_eq!(read_or_fail(&shuffled)?, policy);
        }
    }

    #[test]
    fn any_text_is_answered_without_panic(text in "(version|components|allow|a|->|:|,|&|=|\\*|!|\\{|\\}|\\[|\\]|\\||>|\"|'|#|-| |\n|  ){0,60}") {
        testing::fuzz_policy(text.as_bytes());
    }

    #[test]
    fn a_damaged_policy_is_answered_without_panic(at in 0..EXAMPLE.len(), cut in 0usize..9, put in "[ -~\n]{0,3}") {
        let end = at.saturating_add(cut).min(EXAMPLE.len());
        let text = format!("{}{put}{}", EXAMPLE.get(..at).unwrap_or_default(), EXAMPLE.get(end..).unwrap_or_default());
        testing::fuzz_policy(text.as_bytes());
    }
}

#[test]
fn the_example_means_what_it_says() -> Result<(), Box<dyn std::error::Error>> {
    let policy = parse(EXAMPLE).map_err(|e| format!("{e:?}"))?;
    let n8n = policy.components().get("n8n").ok_or("n8n")?;
    assert_eq!(n8n.on, On::Hosts(["app-1".parse()?].into()));
    assert_eq!(n8n.attach, "unit:n8n.service".parse()?);
    assert_eq!(
        policy.components().get("postgres").map(|c| c.services.clone()),
        Some([("sql".parse()?, vec!["tcp/5432".parse()?])].into())
    );
    let [backup, direct] = policy.rules() else {
        return Err("two rules".into());
    };
    assert_eq!(direct.arrow(), "n8n -> postgres:sql");
    assert_eq!(direct.id, Rule::id_of("n8n -> postgres:sql"));
    assert_eq!(direct.ends(), MeshTime::NEVER);
    assert_eq!(backup.from, [Selector::Name("backup".parse()?)]);
    assert_eq!(backup.why.as_ref().map(Note::as_str), Some("nightly dump"));
    assert_eq!(backup.ends(), MeshTime(1_798_761_600));
    Ok(())
}

#[test]
fn the_canonical_text_is_pinned() -> Result<(), String> {
    let policy = parse(EXAMPLE).map_err(|e| format!("{e:?}"))?;
    let want = r#"version: 1
components:
  backup:
    on: {role: db}
    attach: {unit: pgbackup.service}
  n8n:
    on: app-1
    attach: {unit: n8n.service}
    labels: {tier: app}
  n8n-runner:
    on: app-1
    attach: {container: docker:n8n-runner}
    labels: {tier: untrusted}
  postgres:
    on: db-1
    attach: {user: postgres}
    labels: {tier: data}
    services:
      sql: tcp/5432
allow:
  - from: backup
    to: postgres:sql
    why: "nightly dump"
    owner: "ops"
    expires: 2027-01-01T00:00:00Z
  - n8n -> postgres:sql
"#;
    assert_eq!(print(&policy), want);
    Ok(())
}

#[test]
fn a_policy_may_be_json() -> Result<(), String> {
    let json = r#"{"version": 1, "components": {"a": {"on": ["h1"], "attach": "host", "services": {"web": "tcp/80"}},
        "b": {"on": {"role": "db"}, "attach": {"netns": "/run/netns/b"}, "labels": {"tier": "app"}}},
        "allow": ["tier=app -> a:web", {"from": ["a"], "to": ["b:icmp", "a:tcp/1-65535"]}]}"#;
    let policy = parse(json).map_err(|e| format!("{e:?}"))?;
    let arrows: Vec<_> = policy.rules().iter().map(Rule::arrow).collect();
    assert_eq!(arrows, ["a -> a:tcp/1-65535, b:icmp", "tier=app -> a:web"]);
    Ok(())
}

#[test]
fn a_rule_keeps_its_id_when_it_is_written_differently() -> Result<(), String> {
    let components = "version: 1\ncomponents:\n  a: {on: h, attach: host, labels: {x: '1', y: '2'}}\n  b: {on: i, attach: host}\n";
    let id = |rule: &str| {
        let policy = parse(&format!("{components}allow:\n- {rule}\n")).map_err(|e| format!("{e:?}"))?;
        policy.rules().first().map(|r| r.id).ok_or_else(|| "no rule".to_owned())
    };
    let want = id("b, x=1 & y=2 -> a:icmp, b:tcp/80")?;
    assert_eq!(id("y=2&x=1,b->b:tcp/80,a:icmp")?, want);
    assert_eq!(
        id("{from: [y=2 & x=1, b, b], to: ['b:tcp/80', 'a:icmp'], why: it, expires: 2030-01-01T00:00:00Z}")?,
        want
    );
    assert_ne!(id("b, x=1 -> a:icmp, b:tcp/80")?, want);
    assert_eq!(id(&format!("{{from: b, to: a:icmp, id: {want}}}"))?, want);
    Ok(())
}

#[test]
fn a_policy_without_rules_is_a_policy_and_an_empty_text_is_none() {
    assert_eq!(parse("version: 1"), Ok(Policy::default()));
    assert_eq!(parse("version: 1\ncomponents: {}\nallow: []\n"), Ok(Policy::default()));
    for nothing in ["", "\n", "# only a comment\n", "~", "---\n", "{}"] {
        assert!(parse(nothing).is_err(), "{nothing:?}");
    }
}

#[test]
fn all_errors_come_at_once_in_the_order_of_the_text() {
    let text = "version: 2
components:
  N8N: {on: app-1, attach: host}
  pg: {on: [], attach: {user: root}, services: {sql: 5432}, port: 1}
allow:
  - pgg -> pg:sql
  - tier=app -> pg
never:
  - a -> b
";
    let want = [
        "1:10 bad_version",
        "3:3 bad_name",
        "4:12 empty",
        "4:31 bad_attachment",
        "4:54 bad_port",
        "4:61 unknown_key",
        "6:5 unknown_component",
        "7:17 missing_service",
        "8:1 not_supported_yet",
    ];
    assert_eq!(parse(text).map_err(|e| codes(&e)), Err(want.map(String::from).to_vec()));
}

#[test]
fn expired_rules_are_warnings_and_the_policy_stands() -> Result<(), String> {
    let end = MeshTime(1_798_761_600);
    let before = check(EXAMPLE, MeshTime(end.0 - 1)).map_err(|e| format!("{e:?}"))?;
    assert_eq!(before.warnings, []);
    let after = check(EXAMPLE, end).map_err(|e| format!("{e:?}"))?;
    assert_eq!(codes(&after.warnings), ["9:78 expired"]);
    assert_eq!(after.warnings.first().map(|w| w.severity), Some(Severity::Warning));
    assert_eq!(after.policy, before.policy);
    assert_eq!(
        after.positions.components.get("postgres").map(ToString::to_string),
        Some("5:3".into())
    );
    assert_eq!(after.positions.rules.values().map(|p| p.line).max(), Some(9));
    Ok(())
}

#[test]
fn a_unit_by_its_cgroup_s_path_is_that_unit() {
    let on = |host: &str, path: &str| {
        let text = format!(
            "version: 1\ncomponents:\n  a: {{on: h, attach: {{unit: n8n.service}}}}\n  b: {{on: {host}, attach: {{cgroup: {path}}}}}\n"
        );
        parse(&text).map_err(|e| codes(&e))
    };
    for path in [
        "/system.slice/n8n.service",
        "/apps.slice/apps-web.slice/n8n.service",
        "/n8n.service",
    ] {
        assert!(
            on("h", path).is_err_and(|codes| codes.len() == 1 && codes.iter().all(|c| c.ends_with("attachment_conflict"))),
            "{path}"
        );
        assert!(on("other", path).is_ok(), "{path}");
    }
    // Below a unit, and in a place where systemd makes no units, it is something else.
    for path in [
        "/system.slice/n8n.service/inner",
        "/lab/n8n.service",
        "/system.slice/n8n",
        "/system.slice",
    ] {
        assert!(on("h", path).is_ok(), "{path}");
    }
}

#[test]
fn a_service_with_the_name_of_a_claimed_user_is_a_warning() -> Result<(), String> {
    let warnings = |first: &str, second: &str| -> Result<Vec<String>, String> {
        let text = format!("version: 1\ncomponents:\n  a: {{on: [g, h], attach: {first}}}\n  b: {{on: h, attach: {second}}}\n");
        Ok(codes(&check(&text, MeshTime(0)).map_err(|e| format!("{e:?}"))?.warnings))
    };
    let (user, unit) = ("{user: redis}", "{unit: redis.service}");
    assert_eq!(warnings(user, unit)?, ["4:22 attachment_overlap"]);
    assert_eq!(warnings(unit, user)?, ["3:27 attachment_overlap"], "in either order");
    assert_eq!(warnings(user, "{unit: redis@6379.service}")?.len(), 1);
    assert_eq!(warnings(user, "{cgroup: /system.slice/redis.service}")?.len(), 1);
    assert!(warnings(user, "{unit: redis-exporter.service}")?.is_empty());
    assert!(warnings("{user: 70}", unit)?.is_empty(), "a number names nobody");
    Ok(())
}

#[test]
fn many_warnings_lose_no_rule() -> Result<(), String> {
    let rules: Vec<_> = (1..=500)
        .map(|p| format!("- {{from: a, to: a:tcp/{p}, expires: 2020-01-01T00:00:00Z}}\n"))
        .collect();
    let text = format!("version: 1\ncomponents: {{a: {{on: h, attach: host}}}}\nallow:\n{}", rules.concat());
    let checked = check(&text, MeshTime(2_000_000_000)).map_err(|e| format!("{e:?}"))?;
    assert_eq!((checked.policy.rules().len(), checked.warnings.len()), (500, MAX_DIAGNOSTICS));
    Ok(())
}

#[test]
fn sizes_have_limits_that_are_named() {
    let one = |list: &str| found(list).into_iter().next().unwrap_or_default();
    let components = |n: usize| (0..n).map(|i| format!("  c{i}: {{on: h{i}, attach: host}}\n")).collect::<String>();
    assert!(parse(&format!("version: 1\ncomponents:\n{}", components(MAX_COMPONENTS))).is_ok());
    assert!(one(&format!("version: 1\ncomponents:\n{}", components(MAX_COMPONENTS + 1))).contains("too_large"));
    let rules = |n: usize| (1..=n).map(|p| format!("- c0 -> c0:tcp/{p}\n")).collect::<String>();
    assert!(parse(&format!("version: 1\ncomponents:\n{}allow:\n{}", components(1), rules(MAX_RULES))).is_ok());
    assert!(
        one(&format!(
            "version: 1\ncomponents:\n{}allow:\n{}",
            components(1),
            rules(MAX_RULES + 1)
        ))
        .contains("too_large")
    );
    let side = |n: usize| vec!["c0"; n].join(", ");
    assert!(
        parse(&format!(
            "version: 1\ncomponents:\n{}allow:\n- {} -> c0:icmp\n",
            components(1),
            side(MAX_SIDE)
        ))
        .is_ok()
    );
    assert!(
        one(&format!(
            "version: 1\ncomponents:\n{}allow:\n- {} -> c0:icmp\n",
            components(1),
            side(MAX_SIDE + 1)
        ))
        .contains("too_large")
    );
    assert!(one(&"x".repeat(MAX_BYTES + 1)).contains("too_large"));
}

#[test]
fn every_mistake_has_its_code_its_place_and_its_hint() {
    let mut seen: std::collections::BTreeSet<&str> = ["too_large", "too_deep", "too_many_errors", "expired", "attachment_overlap"].into();
    for (frame, cases) in [(DOCUMENT, DOCUMENTS), (COMPONENT, COMPONENTS), (RULE, RULES), (MAP_RULE, MAP_RULES)] {
        for (mistake, want) in cases {
            let text = frame.replace("{}", mistake);
            let got = found(&text).join("\n");
            assert_eq!(got, *want, "for:\n{text}");
            seen.extend(want.lines().filter_map(|l| l.split(' ').nth(1)));
        }
    }
    let missing: Vec<_> = Code::ALL.iter().filter(|c| !seen.contains(c.as_str())).collect();
    assert!(missing.is_empty(), "no case for {missing:?}");
}
