//! Every mistake that the language knows, and what it is answered with: place, code, offending text, message and hint.
//!
//! `{}` in a frame is where the mistakes stand, one after the other.

pub(super) const DOCUMENT: &str = "{}";

pub(super) const COMPONENT: &str = "version: 1\ncomponents:\n  other: {on: h1, attach: host}\n  pg:\n    {}\n";

pub(super) const RULE: &str = "version: 1\ncomponents:\n  n8n: {on: h1, attach: host, labels: {tier: app}}\n  pg: {on: h2, attach: host, labels: {tier: data, env: prod}, services: {sql: tcp/5432}}\nallow:\n  - {}\n";

pub(super) const MAP_RULE: &str = "version: 1\ncomponents:\n  n8n: {on: h1, attach: host}\n  pg: {on: h2, attach: host, services: {sql: tcp/5432}}\nallow:\n  - n8n -> pg:udp/53\n  - {from: n8n, to: pg:sql, {}}\n";

pub(super) const DOCUMENTS: &[(&str, &str)] = &[
    (
        "",
        "1:1 missing_key [] the policy is empty; it needs at least `version` (a policy that allows nothing is `version: 1`)",
    ),
    (
        "[]",
        "1:1 wrong_type [[]] a policy must be a mapping, not a list (begin with `version: 1`)",
    ),
    (
        "just text",
        "1:1 wrong_type [just text] a policy must be a mapping, not a text (begin with `version: 1`)",
    ),
    (
        "version: 1\nallow: [",
        "2:8 syntax [[] this is not YAML: unclosed bracket '[' (no hint)",
    ),
    (
        "version: 1\n	allow: []\n",
        "1:10 syntax [1] this is not YAML: while scanning a plain scalar, found a tab (indent with spaces)",
    ),
    (
        "version: 1\nallow:\n- n8n: x -> pg: y\n",
        "3:15 syntax [: y] this is not YAML: mapping values are not allowed in this context (a text that contains `: ` or ends with `:` needs quotes)",
    ),
    (
        "version: 1\ncomponents: {}\n---\nversion: 1\n",
        "3:1 several_documents [---] a policy is one document; a second one begins here (remove the line `---`, or what stands behind it)",
    ),
    (
        "components: {}",
        "1:1 missing_key [components: {}] `version` is missing (begin with `version: 1`)",
    ),
    (
        "version: 2",
        "1:10 bad_version [2] `2` is no version of the policy language that this program knows (write `version: 1`)",
    ),
    (
        "version:",
        "1:1 wrong_type [version] `version` must be a text, not nothing (write a text; the name `null` needs quotes)",
    ),
    (
        "version: 1\nallow:",
        "2:1 wrong_type [allow] `allow` must be a list, not nothing (write one rule a line, `- n8n -> postgres:sql`; `[]` if nothing is allowed)",
    ),
    (
        "version: 1\ncomponents: []",
        "2:13 wrong_type [[]] `components` must be a mapping, not a list (write `name: {on: app-1, attach: {unit: n8n.service}}` for each; `{}` if there are none)",
    ),
    (
        "version: 1\nallow: {}",
        "2:8 wrong_type [{}] `allow` must be a list, not a mapping (write one rule a line, `- n8n -> postgres:sql`; `[]` if nothing is allowed)",
    ),
    (
        "version: 1\nalow: []",
        "2:1 unknown_key [alow] a policy has no key `alow` (did you mean `allow`?)",
    ),
    (
        "version: 1\nrules: []",
        "2:1 unknown_key [rules] a policy has no key `rules` (the keys are `version`, `components` and `allow`)",
    ),
    (
        "version: 1\nversion: 1",
        "2:1 duplicate_key [version] `version` stands twice in this mapping (the first one is on line 1)",
    ),
    (
        "version: 1\nnever: []",
        "2:1 not_supported_yet [never] this version cannot enforce `never` yet (leave it out; it is refused because ignoring it would make the policy weaker than it reads)",
    ),
    (
        "version: 1\nonly: []",
        "2:1 not_supported_yet [only] this version cannot enforce `only` yet (leave it out; it is refused because ignoring it would make the policy weaker than it reads)",
    ),
    (
        "version: 1\ntests: []",
        "2:1 not_supported_yet [tests] this version cannot enforce `tests` yet (leave it out; it is refused because ignoring it would make the policy weaker than it reads)",
    ),
    (
        "version: &v 1",
        "1:10 anchor [&v] anchors have no meaning in a policy (leave it out, and write values where they are used)",
    ),
    (
        "version: 1\nallow: *rules",
        "2:8 anchor [*rules] a policy has no aliases (write the value itself; if a text begins with `*`, put it in quotes)",
    ),
    (
        "version: !!int 1",
        "1:10 tag [!!int] tags have no meaning in a policy (leave it out: every value is read as the text that stands there)",
    ),
    (
        "version: 1\n<<: {}",
        "2:1 merge_key [<<] merge keys have no meaning in a policy (write the keys where they are used)",
    ),
    (
        "version: 1\n? [a]\n: b",
        "2:3 wrong_type [[a]] a key must be a text, not a list (a text that begins with `?`, `{` or `[`, or a name like `null`, needs quotes)",
    ),
    (
        "version: 1\nnull: x",
        "2:1 wrong_type [null] a key must be a text, not nothing (a text that begins with `?`, `{` or `[`, or a name like `null`, needs quotes)",
    ),
    (
        "version: 1\ncomponents:\n  N8N: {on: h, attach: host}",
        "3:3 bad_name [N8N] not a component's name: a name has only a-z, 0-9 and hyphens, not 'N' (`n8n` would be one)",
    ),
    (
        "version: 1\ncomponents:\n  my_app: {on: h, attach: host}",
        "3:3 bad_name [my_app] not a component's name: a name has only a-z, 0-9 and hyphens, not '_' (`my-app` would be one)",
    ),
    (
        "version: 1\ncomponents:\n  a: host",
        "3:6 wrong_type [host] a component must be a mapping, not a text (write `{on: app-1, attach: {unit: n8n.service}}`)",
    ),
    (
        "version: 1\ncomponents:\n  a:",
        "3:3 wrong_type [a] a component must be a mapping, not nothing (write `{on: app-1, attach: {unit: n8n.service}}`)",
    ),
    (
        "version: 1\nallow:\n  -",
        "3:4 wrong_type [-] a rule must be an arrow or a mapping, not nothing (write `- n8n -> postgres:sql`, or `- {from: n8n, to: postgres:sql, why: ...}`)",
    ),
    (
        "version: 1\nallow:\n  - [a]",
        "3:5 wrong_type [[a]] a rule must be an arrow or a mapping, not a list (write `- n8n -> postgres:sql`, or `- {from: n8n, to: postgres:sql, why: ...}`)",
    ),
    (
        "%YAML 1.2\n---\nversion: 1",
        "1:1 syntax [%YAML 1.2] this is not YAML: YAML directives are disallowed (remove the line that begins with `%`)",
    ),
];

pub(super) const COMPONENTS: &[(&str, &str)] = &[
    (
        "{}",
        "4:3 missing_key [pg] `on` is missing (say where it runs: `on: app-1`, `on: [app-1, app-2]` or `on: {role: db}`)\n4:3 missing_key [pg] `attach` is missing (say which processes it is: `attach: {unit: n8n.service}`, or `attach: host` for every process of the host)",
    ),
    (
        "{on: h2}",
        "4:3 missing_key [pg] `attach` is missing (say which processes it is: `attach: {unit: n8n.service}`, or `attach: host` for every process of the host)",
    ),
    (
        "{attach: host}",
        "4:3 missing_key [pg] `on` is missing (say where it runs: `on: app-1`, `on: [app-1, app-2]` or `on: {role: db}`)",
    ),
    (
        "{on: h2, attach: host, label: {}}",
        "5:28 unknown_key [label] a component has no key `label` (did you mean `labels`?)",
    ),
    (
        "{on: h2, attach: host, lease: 1h}",
        "5:28 not_supported_yet [lease] this version cannot enforce `lease` yet (leave it out; it is refused because ignoring it would make the policy weaker than it reads)",
    ),
    (
        "{on: H2, attach: host}",
        "5:10 bad_name [H2] not a host's name: a name has only a-z, 0-9 and hyphens, not 'H' (`h2` would be one)",
    ),
    (
        "{on: [], attach: host}",
        "5:10 empty [[]] `on` must have at least one entry (no hint)",
    ),
    (
        "{on: {}, attach: host}",
        "5:10 empty [{}] `on` must name at least one host or label (no hint)",
    ),
    (
        "{on: , attach: host}",
        "5:6 wrong_type [on] `on` must be a host's name, a list of them or labels, not nothing (say where it runs: `on: app-1`, `on: [app-1, app-2]` or `on: {role: db}`)",
    ),
    (
        "{on: [[h2]], attach: host}",
        "5:11 wrong_type [[h2]] `on` must be a text, not a list (if a text begins with `{` or `[`, or contains `: `, put it in quotes)",
    ),
    (
        "{on: {role: Db}, attach: host}",
        "5:17 bad_name [Db] not a label's value: a name has only a-z, 0-9 and hyphens, not 'D' (`db` would be one)",
    ),
    (
        "{on: h2, attach: hots}",
        "5:22 bad_attachment [hots] `hots` is no attachment (did you mean `host`?)",
    ),
    (
        "{on: h2, attach: unit:n8n.service}",
        "5:22 bad_attachment [unit:n8n.service] `unit:n8n.service` is no attachment (write `attach: {unit: n8n.service}`)",
    ),
    (
        "{on: h2, attach: }",
        "5:14 wrong_type [attach] `attach` must be a mapping, not nothing (an attachment is `host`, or a mapping with one key such as `{unit: n8n.service}`)",
    ),
    (
        "{on: h2, attach: {}}",
        "5:22 bad_attachment [{}] a component has one attachment (an attachment is `host`, or a mapping with one key such as `{unit: n8n.service}`)",
    ),
    (
        "{on: h2, attach: {user: a, unit: b.service}}",
        "5:22 bad_attachment [{user: a, unit: b.service}] a component has one attachment (an attachment is `host`, or a mapping with one key such as `{unit: n8n.service}`)",
    ),
    (
        "{on: h2, attach: {usr: a}}",
        "5:23 bad_attachment [usr] `usr` is no kind of attachment (did you mean `user`?)",
    ),
    (
        "{on: h2, attach: {process: a}}",
        "5:23 bad_attachment [process] `process` is no kind of attachment (the kinds are `host`, `user`, `unit`, `cgroup`, `container` and `netns`)",
    ),
    (
        "{on: h2, attach: {host: all}}",
        "5:23 bad_attachment [host] `host` has no value (write `attach: host`)",
    ),
    (
        "{on: h2, attach: {user: 0}}",
        "5:29 bad_attachment [0] `0` is no user: root can be every component of its host, so a component cannot be root (for every process of a host, write `attach: host`)",
    ),
    (
        "{on: h2, attach: {user: root}}",
        "5:29 bad_attachment [root] `root` is no user: root can be every component of its host, so a component cannot be root (for every process of a host, write `attach: host`)",
    ),
    (
        "{on: h2, attach: {user: }}",
        "5:23 wrong_type [user] `user` must be a text, not nothing (write a text; the name `null` needs quotes)",
    ),
    (
        "{on: h2, attach: {unit: n8n}}",
        "5:29 bad_attachment [n8n] `n8n` is no unit: a unit is the full name of a service, such as `n8n.service` or `postgresql@15-main.service` (did you mean `n8n.service`?)",
    ),
    (
        "{on: h2, attach: {cgroup: a/b}}",
        "5:31 bad_attachment [a/b] `a/b` is no cgroup: a path is absolute, has no `.`, `..` or empty parts, and at most 512 visible ASCII characters (did you mean `/a/b`?)",
    ),
    (
        "{on: h2, attach: {cgroup: /}}",
        "5:31 bad_attachment [/] `/` is no cgroup: a path is absolute, has no `.`, `..` or empty parts, and at most 512 visible ASCII characters (for every process of a host, write `attach: host`)",
    ),
    (
        "{on: h2, attach: {container: n8n}}",
        "5:34 bad_attachment [n8n] `n8n` is no container: a container is `docker:NAME`, `podman:NAME`, `docker:label=KEY=VALUE` or `podman:label=KEY=VALUE` (did you mean `docker:n8n`?)",
    ),
    (
        "{on: h2, attach: {netns: x}}",
        "5:30 bad_attachment [x] `x` is no netns: a path is absolute, has no `.`, `..` or empty parts, and at most 512 visible ASCII characters (did you mean `/run/netns/x`?)",
    ),
    (
        "{on: h2, attach: {netns: /run/netns/../x}}",
        "5:30 bad_attachment [/run/netns/../x] `/run/netns/../x` is no netns: a path is absolute, has no `.`, `..` or empty parts, and at most 512 visible ASCII characters (no hint)",
    ),
    (
        "{on: h1, attach: host}",
        "5:22 attachment_conflict [host] `other` has the attachment `host` on host `h1` already, so its processes could not be told from those of `pg` (the other component is on line 3)",
    ),
    (
        "{on: [h0, h1], attach: host}",
        "5:28 attachment_conflict [host] `other` has the attachment `host` on host `h1` already, so its processes could not be told from those of `pg` (the other component is on line 3)",
    ),
    (
        "{on: h2, attach: host, labels: {Tier: app}}",
        "5:37 bad_name [Tier] not a label's key: a name has only a-z, 0-9 and hyphens, not 'T' (`tier` would be one)",
    ),
    (
        "{on: h2, attach: host, labels: {tier: [a]}}",
        "5:43 wrong_type [[a]] a label's value must be a text, not a list (if a text begins with `{` or `[`, or contains `: `, put it in quotes)",
    ),
    (
        "{on: h2, attach: host, labels: tier=app}",
        "5:36 wrong_type [tier=app] `labels` must be a mapping, not a text (write `{tier: app}`)",
    ),
    (
        "{on: h2, attach: host, services: {sql: 5432}}",
        "5:44 bad_port [5432] `5432` is no protocol: write tcp, udp or icmp (write `tcp/5432` or `udp/5432`)",
    ),
    (
        "{on: h2, attach: host, services: {sql: tcp/0}}",
        "5:44 bad_port [tcp/0] `0` is no port or port range: write 5432 or 8000-8100 (write `tcp/5432`, `udp/8000-8100` or `icmp`)",
    ),
    (
        "{on: h2, attach: host, services: {sql: [tcp/1, sctp/2]}}",
        "5:52 bad_port [sctp/2] `sctp` is no protocol: write tcp, udp or icmp (write `tcp/5432`, `udp/8000-8100` or `icmp`)",
    ),
    (
        "{on: h2, attach: host, services: {sql: []}}",
        "5:44 empty [[]] a service must have at least one entry (no hint)",
    ),
    (
        "{on: h2, attach: host, services: {icmp: icmp}}",
        "5:39 reserved_name [icmp] a service cannot be called `icmp`: in a rule, that is a protocol (give it another name, such as `ping`)",
    ),
    (
        "{on: h2, attach: host, services: {SQL: tcp/1}}",
        "5:39 bad_name [SQL] not a service's name: a name has only a-z, 0-9 and hyphens, not 'S' (`sql` would be one)",
    ),
    (
        "{on: h2, attach: host, services: [tcp/1]}",
        "5:38 wrong_type [[tcp/1]] `services` must be a mapping, not a list (write `{sql: tcp/5432}`)",
    ),
];

pub(super) const RULES: &[(&str, &str)] = &[
    (
        "n8n",
        "6:5 bad_arrow [n8n] a rule is an arrow: `from -> to:service` (write `n8n -> postgres:sql`; in a list with brackets, put a rule that has commas in quotes)",
    ),
    (
        "n8n → pg:sql",
        "6:5 bad_arrow [n8n → pg:sql] a rule is an arrow: `from -> to:service` (the arrow is written `->`)",
    ),
    (
        "n8n -> pg:sql -> n8n:icmp",
        "6:5 bad_arrow [n8n -> pg:sql -> n8n:icmp] a rule has one `->` (write one rule for each arrow; `,` joins the names of one side)",
    ),
    (
        "n8n -> pg",
        "6:12 missing_service [pg] `pg` does not say which service (write `name:service`, `name:tcp/5432`, `name:icmp`, or `name:*` for all its services)",
    ),
    (
        "n8n -> pg:",
        "6:5 missing_service [n8n -> pg] this does not say which service (write it right behind the colon, without a blank: `postgres:sql`, or `postgres:*` for all its services)",
    ),
    (
        r#""n8n -> pg:""#,
        "6:13 missing_service [pg:] `pg:` does not say which service (write `name:service`, `name:tcp/5432`, `name:icmp`, or `name:*` for all its services)",
    ),
    (
        "n8n -> pg:sql:x",
        "6:12 bad_selector [pg:sql:x] a target has one `:` (write `name:service`, `name:tcp/5432`, `name:icmp`, or `name:*` for all its services)",
    ),
    (
        "n8n:web -> pg:sql",
        "6:5 bad_selector [n8n:web] the left side of a rule names components, not services (leave out what begins with `:`: a rule says which service may be reached, not where flows come from)",
    ),
    (
        "n8n, -> pg:sql",
        "6:9 bad_selector [-> pg:sql] a selector is missing here (a comma too many, or a side that is empty?)",
    ),
    (
        "-> pg:sql",
        "6:5 bad_selector [-> pg:sql] a selector is missing here (a comma too many, or a side that is empty?)",
    ),
    (
        "n8n ->",
        "6:11 bad_selector [- n8n ->] a target is missing here (write `name:service`, `name:tcp/5432`, `name:icmp`, or `name:*` for all its services)",
    ),
    (
        r#""* -> pg:sql""#,
        "6:6 bad_selector [*] there is no selector for every component (give the components that you mean a label, and select by it)",
    ),
    (
        r#"n8n -> "*":sql"#,
        r#"6:12 bad_name ["*"] not a component's name: a name has only a-z, 0-9 and hyphens, not '"' (names look like `n8n` or `tier=app`)"#,
    ),
    (
        "n8n -> pg:5432",
        "6:12 unknown_service [pg:5432] `pg` has no service `5432` (for a port, write `pg:tcp/5432`)",
    ),
    (
        "n8n -> pg:sqll",
        "6:12 unknown_service [pg:sqll] `pg` has no service `sqll` (did you mean `sql`?)",
    ),
    (
        "n8n -> pg:web",
        "6:12 unknown_service [pg:web] `pg` has no service `web` (the services there are `sql`)",
    ),
    (
        "n8n -> n8n:web",
        "6:12 unknown_service [n8n:web] `n8n` has no service `web` (it declares no services: add `services: {sql: tcp/5432}` there, or name a port: `tcp/5432`)",
    ),
    (
        "n8n -> n8n:*",
        "6:12 unknown_service [n8n:*] `n8n` has no service, so `*` means nothing (declare `services` there, or name ports: `tcp/5432`)",
    ),
    (
        "n8n -> tier=app:sql",
        "6:12 unknown_service [tier=app:sql] no component with `tier=app` has a service `sql` (it declares no services: add `services: {sql: tcp/5432}` there, or name a port: `tcp/5432`)",
    ),
    (
        "n8n -> pg:tcp",
        "6:15 bad_port [tcp] `tcp` needs its ports (write `tcp/5432`, or `tcp/1-65535` for all)",
    ),
    (
        "n8n -> pg:tcp/99999",
        "6:15 bad_port [tcp/99999] `99999` is no port or port range: write 5432 or 8000-8100 (write `tcp/5432`, `udp/8000-8100` or `icmp`)",
    ),
    (
        "n8n -> pg:tcp/2-1",
        "6:15 bad_port [tcp/2-1] `2-1` is no port or port range: write 5432 or 8000-8100 (write `tcp/5432`, `udp/8000-8100` or `icmp`)",
    ),
    (
        "n8n -> pg:sctp/1",
        "6:15 bad_port [sctp/1] `sctp` is no protocol: write tcp, udp or icmp (write `tcp/5432`, `udp/8000-8100` or `icmp`)",
    ),
    (
        "n8n -> pg:icmp/8",
        "6:15 bad_port [icmp/8] `8` is no port or port range: write 5432 or 8000-8100 (write `tcp/5432`, `udp/8000-8100` or `icmp`)",
    ),
    (
        "n8n -> pg:Sql",
        "6:15 bad_name [Sql] not a service's name: a name has only a-z, 0-9 and hyphens, not 'S' (`sql` would be one)",
    ),
    (
        "n8 -> pg:sql",
        "6:5 unknown_component [n8] there is no component `n8` (did you mean `n8n`?)",
    ),
    (
        "redis -> pg:sql",
        "6:5 unknown_component [redis] there is no component `redis` (add it to `components`, or select by `label=value`)",
    ),
    (
        "N8N -> pg:sql",
        "6:5 bad_name [N8N] not a component's name: a name has only a-z, 0-9 and hyphens, not 'N' (`n8n` would be one)",
    ),
    (
        "n8n pg -> pg:sql",
        "6:5 bad_name [n8n pg] not a component's name: a name has only a-z, 0-9 and hyphens, not ' ' (join selectors by `,` (or) and labels by `&` (and); `key=value` has no blanks)",
    ),
    (
        "n8* -> pg:sql",
        "6:5 bad_name [n8*] not a component's name: a name has only a-z, 0-9 and hyphens, not '*' (there are no patterns: give the components a label, and select by it)",
    ),
    (
        "tier!=app -> pg:sql",
        "6:5 bad_name [tier!] not a label's key: a name has only a-z, 0-9 and hyphens, not '!' (there are no negations: say what is allowed)",
    ),
    (
        "tier=ap -> pg:sql",
        "6:5 no_match [tier=ap] no component has `tier=ap` (did you mean `tier=app`?)",
    ),
    (
        "tier=web -> pg:sql",
        "6:5 no_match [tier=web] no component has `tier=web` (components have `tier=app`, `tier=data`)",
    ),
    (
        "teir=app -> pg:sql",
        "6:5 no_match [teir=app] no component has `teir=app` (did you mean `tier`?)",
    ),
    (
        "zone=a -> pg:sql",
        "6:5 no_match [zone=a] no component has `zone=a` (no component has a label `zone`)",
    ),
    (
        "tier=app & env=prod -> pg:sql",
        "6:5 no_match [tier=app & env=prod] no component has `env=prod & tier=app` (each of these labels exists, but no component has all of them)",
    ),
    (
        "tier=app & tier=data -> pg:sql",
        "6:5 bad_selector [tier=app & tier=data] no component has `tier=app` and `tier=data` (`&` means and; for or, write `,`)",
    ),
    (
        "n8n & tier=app -> pg:sql",
        "6:5 bad_selector [n8n] `n8n` is no label (`&` joins labels, each written `key=value`; a name stands alone)",
    ),
    (
        "tier = app -> pg:sql",
        "6:5 bad_name [tier] not a label's key: a name has only a-z, 0-9 and hyphens, not ' ' (join selectors by `,` (or) and labels by `&` (and); `key=value` has no blanks)\n6:11 bad_name [app] not a label's value: a name has only a-z, 0-9 and hyphens, not ' ' (join selectors by `,` (or) and labels by `&` (and); `key=value` has no blanks)",
    ),
    (
        "tier==app -> pg:sql",
        "6:5 bad_selector [tier==app] `tier==app` is no label (`&` joins labels, each written `key=value`; a name stands alone)",
    ),
    (
        "=app -> pg:sql",
        "6:5 bad_name [=app -> pg:sql] not a label's key: a name has 1 to 63 characters (names look like `n8n` or `tier=app`)",
    ),
    (
        "n8n -> pg:sql\n  - n8n  ->  pg:sql",
        "7:5 duplicate_rule [n8n  ->  pg:sql] this rule stands on line 6 already (remove one of the two)",
    ),
    (
        "n8n -> pg:sql, pg: sql",
        "6:5 missing_service [n8n -> pg:sql, pg] this does not say which service (write it right behind the colon, without a blank: `postgres:sql`, or `postgres:*` for all its services)",
    ),
    (
        "[n8n, n8n -> pg:sql]",
        "6:5 wrong_type [[n8n, n8n -> pg:sql]] a rule must be an arrow or a mapping, not a list (write `- n8n -> postgres:sql`, or `- {from: n8n, to: postgres:sql, why: ...}`)",
    ),
];

pub(super) const MAP_RULES: &[(&str, &str)] = &[
    ("form: x", "7:29 unknown_key [form] a rule has no key `form` (did you mean `from`?)"),
    ("wy: x", "7:29 unknown_key [wy] a rule has no key `wy` (did you mean `why`?)"),
    (
        "b",
        "7:29 unknown_key [b] a rule has no key `b` (if it belongs to the value before it, put that in quotes; the keys are `from`, `to`, `why`, `owner`, `expires` and `id`)",
    ),
    ("why: ''", "7:34 bad_text [''] `why`: it must have 1 to 500 characters (no hint)"),
    (
        r#"why: "a\u001b[31mb""#,
        r#"7:34 bad_text ["a\u001b[31mb"] `why`: it must be one line without control characters (no hint)"#,
    ),
    (
        "why: [x]",
        "7:34 wrong_type [[x]] `why` must be a text, not a list (if a text begins with `{` or `[`, or contains `: `, put it in quotes)",
    ),
    (
        "owner: {a: b}",
        "7:36 wrong_type [{a: b}] `owner` must be a text, not a mapping (if a text begins with `{` or `[`, or contains `: `, put it in quotes)",
    ),
    (
        "expires: 2027-01-01",
        "7:38 bad_time [2027-01-01] this is no time (write it as RFC 3339 does, in whole seconds and with its zone: `2027-01-01T00:00:00Z`)",
    ),
    (
        "expires: 2027-01-01T00:00:00.5Z",
        "7:38 bad_time [2027-01-01T00:00:00.5Z] this is no time (write it as RFC 3339 does, in whole seconds and with its zone: `2027-01-01T00:00:00Z`)",
    ),
    (
        "expires: never",
        "7:38 bad_time [never] this is no time (write it as RFC 3339 does, in whole seconds and with its zone: `2027-01-01T00:00:00Z`)",
    ),
    (
        "id: 7",
        "7:33 bad_id [7] not a rule's id: expected an id that starts with `rule_` (leave `id` out: a rule without one gets one from its arrow)",
    ),
    (
        "id: host_00000000000000000000000000000000",
        "7:33 bad_id [host_00000000000000000000000000000000] not a rule's id: expected an id that starts with `rule_` (leave `id` out: a rule without one gets one from its arrow)",
    ),
    (
        "id: rule_c78110b18a1226159bc508a3a2ca424f",
        "7:33 duplicate_id [rule_c78110b18a1226159bc508a3a2ca424f] the rule on line 6 has the id `rule_c78110b18a1226159bc508a3a2ca424f` already (leave `id` out: a rule without one gets one from its arrow)",
    ),
    (
        "from: pg",
        "7:29 duplicate_key [from] `from` stands twice in this mapping (the first one is on line 7)",
    ),
];
