//! Policy texts: good ones, each trick of YAML that could make a text mean two things, and what is large or deep.

use super::{Seeds, add};

/// What most seeds are a change of.
const GOOD: &str = "\
version: 1
components:
  n8n:        {on: app-1, attach: {unit: n8n.service}, labels: {tier: app}}
  n8n-runner: {on: app-1, attach: {container: docker:n8n-runner}, labels: {tier: untrusted}}
  postgres:   {on: db-1, attach: {user: postgres}, services: {sql: tcp/5432}, labels: {tier: data}}
  backup:     {on: {role: db}, attach: {unit: pgbackup.service}}
allow:
  - n8n -> postgres:sql
  - {from: backup, to: postgres:sql, why: nightly dump, owner: ops, expires: 2027-01-01T00:00:00Z}
";

/// Two components, for rules.
const HEAD: &str = "version: 1\ncomponents:\n  a: {on: h1, attach: host, labels: {tier: app, env: prod}}\n  b: {on: h2, attach: host, labels: {tier: data}, services: {sql: tcp/5432, web: [tcp/80, tcp/443, udp/443], ping: icmp}}\nallow:\n";

pub(super) fn seeds() -> Seeds {
    let mut seeds = Seeds::new();
    documents(&mut seeds);
    tricks(&mut seeds);
    components(&mut seeds);
    rules(&mut seeds);
    sizes(&mut seeds);
    seeds
}

fn documents(seeds: &mut Seeds) {
    add(seeds, "good", GOOD);
    add(seeds, "good-line-ends", GOOD.replace('\n', "\r\n"));
    add(seeds, "good-old-line-ends", GOOD.replace('\n', "\r"));
    add(seeds, "good-byte-order-mark", format!("\u{feff}{GOOD}"));
    add(seeds, "good-twice", format!("{GOOD}---\n{GOOD}"));
    add(seeds, "good-ended", format!("---\n{GOOD}...\n"));
    add(seeds, "not-utf8", [GOOD.as_bytes(), &[0xff, 0xfe]].concat());
    add(seeds, "utf16", GOOD.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<_>>());
    add(seeds, "zero-byte", GOOD.replacen("app-1", "app\0-1", 1));
    add(
        seeds,
        "json",
        r#"{"version": 1, "components": {"a": {"on": ["h1"], "attach": "host", "services": {"s": ["tcp/1-65535", "icmp"]}}}, "allow": ["a -> a:s"]}"#,
    );
    for (name, text) in [
        ("empty", ""),
        ("smallest", "version: 1"),
        ("comment-only", "# nothing\n"),
        ("list", "[]"),
        ("text", "just text"),
        ("version-2", "version: 2"),
        ("version-float", "version: 1.0"),
        ("version-octal", "version: 01"),
        ("version-quoted", "version: \"1\""),
        ("unknown-key", "version: 1\nalow: []"),
        ("not-yet", "version: 1\nnever:\n  - a -> b\nonly: []\ntests: []"),
        ("all-null", "version: ~\ncomponents: null\nallow:"),
        ("unclosed", "version: 1\nallow: ["),
        ("tab", "version: 1\n\tallow: []\n"),
    ] {
        add(seeds, name, text);
    }
}

/// What YAML has and a policy has not.
fn tricks(seeds: &mut Seeds) {
    for (name, text) in [
        ("anchor", "version: 1\ncomponents:\n  a: &a {on: h1, attach: host}\n  b: *a\n"),
        ("alias-to-itself", "version: 1\ncomponents: &c\n  a: *c\n"),
        (
            "merge",
            "version: 1\ncomponents:\n  a: {on: h1, attach: host}\n  b: {<<: {on: h2, attach: host}}\n",
        ),
        ("tag", "version: !!int 1\ncomponents: !!map {}\n"),
        ("tag-own", "version: 1\nallow: !include /etc/passwd\n"),
        ("tag-binary", "version: 1\ncomponents: {a: {on: !!binary aDE=, attach: host}}\n"),
        ("directive", "%YAML 1.1\n---\nversion: 1\n"),
        ("key-twice", "version: 1\nallow: []\nallow: []\n"),
        ("key-twice-in-two-ways", "version: 1\n\"version\": 1\n'version': 1\n"),
        (
            "component-twice",
            "version: 1\ncomponents:\n  a: {on: h1, attach: host}\n  a: {on: h2, attach: host}\n",
        ),
        ("key-is-a-list", "version: 1\n? [a, b]\n: c\n"),
        ("key-is-a-mapping", "version: 1\n{a: b}: c\n"),
        (
            "no-is-a-name",
            "version: 1\ncomponents: {no: {on: off, attach: {user: yes}}, \"null\": {on: \"true\", attach: host}}\n",
        ),
        (
            "numbers-are-names",
            "version: 1\ncomponents: {8080: {on: 1e3, attach: {user: 0x10}}, 1_000: {on: 1, attach: host}}\n",
        ),
        (
            "sexagesimal",
            "version: 1\ncomponents: {a: {on: h1, attach: host, services: {s: 22:22}}}\n",
        ),
        (
            "block-scalars",
            "version: 1\nallow:\n  - |\n    a -> b\n  - >-\n    a ->\n    b:sql\n",
        ),
        (
            "quoted-escapes",
            "version: 1\ncomponents: {\"\\x61\": {on: \"h\\u0031\", attach: \"ho\\\n  st\"}}\n",
        ),
        ("colon-in-a-rule", "version: 1\nallow:\n- a -> b: sql\n"),
        (
            "comment-in-a-rule",
            "version: 1\nallow:\n- a -> b:sql#not a comment\n- a -> b:sql # a comment\n",
        ),
        (
            "deep-flow",
            "version: 1\nallow: [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[a]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]\n",
        ),
        (
            "billion-laughs",
            "a: &a [x,x,x]\nb: &b [*a,*a,*a]\nc: &c [*b,*b,*b]\nd: [*c,*c,*c]\n",
        ),
    ] {
        add(seeds, format!("yaml-{name}"), text);
    }
}

fn components(seeds: &mut Seeds) {
    for (name, component) in [
        ("user-root", "{on: h1, attach: {user: root}}"),
        ("user-zero", "{on: h1, attach: {user: 0}}"),
        ("user-huge", "{on: h1, attach: {user: 99999999999999999999}}"),
        ("unit-without-suffix", "{on: h1, attach: {unit: n8n}}"),
        ("unit-escaped", "{on: h1, attach: {unit: 'a\\x2db@1.service'}}"),
        ("cgroup-dots", "{on: h1, attach: {cgroup: /a/../b}}"),
        ("cgroup-relative", "{on: h1, attach: {cgroup: a}}"),
        ("netns", "{on: h1, attach: {netns: /run/netns/x}}"),
        ("netns-proc", "{on: h1, attach: {netns: /proc/1/ns/net}}"),
        ("container-label", "{on: h1, attach: {container: 'podman:label=a.b/c=d'}}"),
        ("container-unknown", "{on: h1, attach: {container: 'lxc:x'}}"),
        ("attach-twice", "{on: h1, attach: {user: a, unit: b.service}}"),
        ("attach-nothing", "{on: h1, attach: {}}"),
        ("on-nothing", "{on: [], attach: host}"),
        ("on-labels", "{on: {role: db, zone: a}, attach: host}"),
        ("on-twice", "{on: [h1, h1], attach: host}"),
        (
            "name-too-long",
            "{on: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa, attach: host}",
        ),
        ("name-hyphen", "{on: -a, attach: host}"),
        ("name-unicode", "{on: hôte, attach: host}"),
        ("port-zero", "{on: h1, attach: host, services: {s: tcp/0}}"),
        ("port-too-large", "{on: h1, attach: host, services: {s: tcp/65536}}"),
        ("ports-backwards", "{on: h1, attach: host, services: {s: tcp/9-1}}"),
        (
            "ports-all",
            "{on: h1, attach: host, services: {s: [tcp/1-65535, udp/1-65535, icmp]}}",
        ),
        (
            "ports-signed",
            "{on: h1, attach: host, services: {s: tcp/+80, t: tcp/0x50, u: tcp/080}}",
        ),
        ("icmp-port", "{on: h1, attach: host, services: {s: icmp/8}}"),
        ("service-named-tcp", "{on: h1, attach: host, services: {tcp: tcp/1}}"),
        ("lease", "{on: h1, attach: host, lease: 1h}"),
    ] {
        add(
            seeds,
            format!("component-{name}"),
            format!("version: 1\ncomponents:\n  a: {component}\n"),
        );
    }
    add(
        seeds,
        "component-two-on-a-host",
        "version: 1\ncomponents:\n  a: {on: [h1, h2], attach: host}\n  b: {on: h2, attach: host}\n",
    );
}

fn rules(seeds: &mut Seeds) {
    for (name, rule) in [
        ("plain", "a -> b:sql"),
        ("every-service", "a -> b:*"),
        (
            "every-kind",
            "\"tier=app & env=prod, a -> b:sql, b:tcp/8000-8100, tier=data:udp/53, b:icmp\"",
        ),
        ("itself", "a -> a:tcp/1"),
        ("no-target", "a -> b"),
        ("no-arrow", "a b:sql"),
        ("two-arrows", "a -> b:sql -> a:tcp/1"),
        ("backwards", "b:sql <- a"),
        ("unicode-arrow", "a → b:sql"),
        ("no-spaces", "a->b:sql"),
        ("empty-sides", "\" -> \""),
        ("commas", "\"a,, -> b:sql,\""),
        ("ampersands", "\"tier=app && env=prod -> b:sql\""),
        ("label-twice", "\"tier=app & tier=data -> b:sql\""),
        ("unknown-component", "c -> b:sql"),
        ("unknown-label", "tier=ghost -> b:sql"),
        ("unknown-service", "a -> b:ghost"),
        ("service-that-some-have", "\"a -> a:sql, b:sql\""),
        ("map", "{from: [a, b], to: [b:sql, a:tcp/1], why: because, owner: ops}"),
        ("map-expires", "{from: a, to: b:sql, expires: 2027-01-01T00:00:00Z}"),
        ("map-expires-offset", "{from: a, to: b:sql, expires: 2027-01-01T00:00:00+02:00}"),
        ("map-expires-leap", "{from: a, to: b:sql, expires: 2016-12-31T23:59:60Z}"),
        ("map-expires-never", "{from: a, to: b:sql, expires: 9999-12-31T23:59:59Z}"),
        ("map-expires-past", "{from: a, to: b:sql, expires: 0000-01-01T00:00:00Z}"),
        ("map-expires-date", "{from: a, to: b:sql, expires: 2027-01-01}"),
        ("map-id", "{from: a, to: b:sql, id: 00112233445566778899aabbccddeeff}"),
        ("map-without-to", "{from: a}"),
        ("map-deny", "{from: a, to: b:sql, action: deny}"),
        ("why-multiline", "{from: a, to: b:sql, why: \"one\\ntwo\"}"),
        ("why-bidi", "{from: a, to: b:sql, why: \"\u{202e}evil\"}"),
    ] {
        add(seeds, format!("rule-{name}"), format!("{HEAD}  - {rule}\n"));
    }
    add(seeds, "rule-twice", format!("{HEAD}  - a -> b:sql\n  - a -> b:sql\n"));
    add(
        seeds,
        "rule-id-twice",
        format!(
            "{HEAD}{}",
            "  - {from: a, to: b:sql, id: 00112233445566778899aabbccddeeff}\n".repeat(2)
        ),
    );
}

/// What is large in one way.
fn sizes(seeds: &mut Seeds) {
    add(
        seeds,
        "size-deep",
        format!("version: 1\nallow: {}{}\n", "[".repeat(2_000), "]".repeat(2_000)),
    );
    add(seeds, "size-deep-unclosed", "[".repeat(4_000));
    add(seeds, "size-deep-mappings", "{a: ".repeat(1_500));
    add(
        seeds,
        "size-deep-blocks",
        (0..100).map(|depth| format!("{}a:\n", " ".repeat(depth))).collect::<String>(),
    );
    add(
        seeds,
        "size-long-name",
        format!("version: 1\ncomponents: {{{}: {{on: h1, attach: host}}}}\n", "a".repeat(4_000)),
    );
    add(
        seeds,
        "size-long-rule",
        format!("{HEAD}  - {} -> b:sql\n", vec!["a"; 500].join(", ")),
    );
    let labels: String = (0..40).map(|n| format!("l{n}: x, ")).collect();
    add(
        seeds,
        "size-many-labels",
        format!("version: 1\ncomponents: {{a: {{on: h1, attach: host, labels: {{{labels}}}}}}}\n"),
    );
    add(seeds, "size-many-errors", format!("version: 1\nallow:\n{}", "  - x\n".repeat(200)));
}
