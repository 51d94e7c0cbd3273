//! What is compiled equals what the policy says, by the naive evaluator, for every host, pair, port and time; and no host learns more.

#[expect(unreachable_pub, reason = "a crate of tests has no other users")]
mod common;
#[expect(unreachable_pub, reason = "the file is also part of the crate of tests of the whole")]
#[path = "../../tests/src/model/mod.rs"]
mod model;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cloison_coordinator::inventory::{Host, Inventory};
use cloison_coordinator::policy::{Plan, ViewLimit};
use cloison_proto::filter::Table;
use cloison_proto::id::HostId;
use cloison_proto::label::ComponentName;
use cloison_proto::net::{AddressPair, Protocol};
use cloison_proto::policy::{Policy, testing};
use cloison_proto::version::MeshTime;
use cloison_proto::view::{Items, StateHash, View};
use common::{Outcome, host, inventory, policy};
use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;

/// Ports at the edges of ranges that the tests' rules name.
const PORTS: [u16; 11] = [0, 1, 2, 80, 81, 84, 85, 443, 5432, 65_534, 65_535];

const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Icmp];

fn plan(policy: &Arc<Policy>, inventory: &Arc<Inventory>) -> Outcome<Plan> {
    Ok(Plan::new(Arc::clone(policy), Arc::clone(inventory))?)
}

fn items(plan: &Plan, host: HostId) -> Outcome<Items> {
    Ok(plan.items(host, &[])?.ok_or("no such host")?)
}

fn instances(inventory: &Inventory) -> Vec<(&ComponentName, HostId, AddressPair)> {
    let all = inventory
        .instances
        .iter()
        .flat_map(|(name, on)| on.iter().map(move |(host, pair)| (name, *host, *pair)));
    all.collect()
}

/// Every host's table gives the model's answer to every question.
fn agree(policy: &Arc<Policy>, inventory: &Arc<Inventory>, times: &[MeshTime]) -> Outcome {
    let plan = plan(policy, inventory)?;
    let mut tables = Vec::new();
    for us in inventory.hosts.keys() {
        let view = View::parse(&items(&plan, *us)?, *us)?;
        assert_eq!(view.ignored, 0, "the compiler wrote an item that grants nothing");
        check_need_to_know(policy, inventory, *us, &view);
        tables.push((*us, Table::new(&view)));
    }
    let all = instances(inventory);
    for ((from, from_host, source), (to, to_host, destination)) in all.iter().flat_map(|from| all.iter().map(move |to| (*from, *to))) {
        for (packet, now) in questions().flat_map(|packet| times.iter().map(move |now| (packet, *now))) {
            let may = model::may(policy, (from, from_host), (to, to_host), packet, now);
            for (us, table) in &tables {
                let allowed = may && (from_host == *us || to_host == *us);
                for (s, d) in source.both().into_iter().zip(destination.both()) {
                    let verdict = table.check(s, d, packet.0, packet.1, now);
                    if verdict.is_allowed() != allowed {
                        return Err(
                            format!("{from} on {from_host} to {to} on {to_host}, {packet:?} at {now:?}, says {us}: {verdict:?}").into(),
                        );
                    }
                }
            }
        }
    }
    Ok(())
}

fn questions() -> impl Iterator<Item = model::Packet> {
    PROTOCOLS.into_iter().flat_map(|protocol| {
        let ports = if protocol == Protocol::Icmp { &PORTS[..1] } else { &PORTS[..] };
        ports.iter().map(move |port| (protocol, *port))
    })
}

/// The view names exactly the instances, hosts and rules of pairs that one of the host's own instances takes part in.
fn check_need_to_know(policy: &Policy, inventory: &Inventory, us: HostId, view: &View) {
    let (mut peers, mut remotes, mut rules) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for (from, from_host, _) in instances(inventory) {
        for (to, to_host, _) in instances(inventory) {
            for rule in model::pairing(policy, (from, from_host), (to, to_host)) {
                if from_host != us && to_host != us {
                    continue;
                }
                rules.insert((rule, from, to));
                for (component, host) in [(from, from_host), (to, to_host)] {
                    if host != us {
                        peers.insert(host);
                        remotes.insert((component, host));
                    }
                }
            }
        }
    }
    assert_eq!(view.peers.keys().copied().collect::<BTreeSet<_>>(), peers);
    assert_eq!(
        view.remotes.iter().map(|r| (&r.component, r.host)).collect::<BTreeSet<_>>(),
        remotes
    );
    assert_eq!(view.rules.iter().map(|r| (r.id, &r.from, &r.to)).collect::<BTreeSet<_>>(), rules);
}

/// The hosts of [`testing::policies`], each with any labels that those policies ask for.
fn hosts() -> impl Strategy<Value = Vec<Host>> {
    let label =
        |key: &'static str| proptest::option::of(proptest::sample::select(vec!["app", "data", "null", "1"])).prop_map(move |v| (key, v));
    let labels = (label("role"), label("zone")).prop_map(|(role, zone)| {
        let pairs = [role, zone]
            .into_iter()
            .filter_map(|(key, value)| Some((key.parse().ok()?, value?.parse().ok()?)));
        pairs.collect::<BTreeMap<_, _>>()
    });
    proptest::collection::vec(labels, 1..6).prop_map(|all| {
        let hosts = (0..)
            .zip(all)
            .filter_map(|(number, labels)| host(number, &format!("h{number}"), labels).ok());
        hosts.collect()
    })
}

fn fail(error: impl std::fmt::Display) -> TestCaseError {
    TestCaseError::fail(error.to_string())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn compiled_tables_equal_the_naive_evaluator(policy in testing::policies(), hosts in hosts(), now in any::<u32>()) {
        let policy = Arc::new(policy);
        let inventory = inventory(&policy, hosts).map_err(fail)?;
        agree(&policy, &inventory, &[MeshTime(0), MeshTime(now.into()), MeshTime(u64::MAX - 1)]).map_err(fail)?;
    }

    #[test]
    fn the_same_fingerprint_means_the_same_view(
        before in testing::policies(), after in testing::policies(), other in any::<bool>(),
        hosts in hosts(), moved in hosts(), changed in any::<prop::sample::Index>(), what in 0..4,
    ) {
        let after = if other { after } else { before.clone() };
        let mut later = hosts.clone();
        let place = changed.index(later.len());
        match what {
            0 => drop(later.remove(place)),
            1 => later[place].wg_key = host(99, "x", BTreeMap::new()).map_err(fail)?.wg_key,
            2 => later[place].name = "renamed".parse().map_err(fail)?,
            _ => later = moved,
        }
        fingerprints_hold((&Arc::new(before), hosts), (&Arc::new(after), later))?;
    }
}

fn fingerprints_hold(before: (&Arc<Policy>, Vec<Host>), after: (&Arc<Policy>, Vec<Host>)) -> TestCaseResult {
    let plan = |(policy, hosts): (&Arc<Policy>, Vec<Host>)| {
        let inventory = inventory(policy, hosts).map_err(fail)?;
        plan(policy, &inventory).map_err(fail)
    };
    let (before, after) = (plan(before)?, plan(after)?);
    let (old, new) = (before.fingerprints(&[]), after.fingerprints(&[]));
    for (host, fingerprint) in &new {
        if old.get(host) == Some(fingerprint) {
            prop_assert_eq!(items(&before, *host).map_err(fail)?, items(&after, *host).map_err(fail)?);
        }
    }
    Ok(())
}

const SMALL: &str = "version: 1
components:
  a: {on: h1, attach: {user: '1'}, labels: {x: '1'}, services: {web: [tcp/80, udp/443]}}
  b: {on: [h2, h3], attach: {user: '2'}, labels: {x: '1', y: '1'}, services: {web: tcp/80-84, ping: icmp}}
  c: {on: {role: db}, attach: {user: '3'}, labels: {y: '1'}}
allow:
";

/// 40 rules: 4 sources, 10 targets.
fn universe() -> Vec<String> {
    let targets = [
        "a:web",
        "a:tcp/1-65535",
        "b:*",
        "b:udp/80",
        "b:icmp",
        "c:tcp/5432",
        "x=1:web",
        "x=1 & y=1:ping",
        "y=1:udp/65535",
        "y=1:icmp",
    ];
    let sources = ["a", "b", "c", "x=1"];
    sources
        .iter()
        .flat_map(|from| targets.iter().map(move |to| format!("{from} -> {to}")))
        .collect()
}

fn small_hosts() -> Outcome<Vec<Host>> {
    let db: BTreeMap<_, _> = [("role".parse()?, "db".parse()?)].into();
    Ok(vec![
        host(1, "h1", db.clone())?,
        host(2, "h2", BTreeMap::new())?,
        host(3, "h3", db)?,
    ])
}

/// The model's and the compiler's answer to every question that there is in a small world. Every set of at most two rules is asked.
#[test]
fn every_small_mesh_is_compiled_as_the_naive_evaluator_says() -> Outcome {
    let universe = universe();
    assert_eq!(universe.len(), 40);
    let hosts = small_hosts()?;
    let mut sets: Vec<Vec<&str>> = vec![vec![]];
    for (place, first) in universe.iter().enumerate() {
        sets.push(vec![first]);
        sets.extend(universe[place + 1..].iter().map(|second| vec![first.as_str(), second]));
    }
    assert_eq!(sets.len(), 1 + 40 + 780);
    for rules in sets {
        let lines: String = rules.iter().map(|rule| format!("- '{rule}'\n")).collect();
        let policy = policy(&format!("{SMALL}{}", if rules.is_empty() { "  []" } else { &lines }))?;
        let inventory = inventory(&policy, hosts.clone())?;
        agree(&policy, &inventory, &[MeshTime(1)])?;
    }
    Ok(())
}

/// Everything that some table allows, with the table's host.
fn allowed(plan: &Plan) -> Outcome<BTreeSet<String>> {
    let inventory = plan.inventory();
    let mut all = BTreeSet::new();
    for us in inventory.hosts.keys() {
        let table = Table::new(&View::parse(&items(plan, *us)?, *us)?);
        for (_, _, source) in instances(inventory) {
            for (_, _, destination) in instances(inventory) {
                for (protocol, port) in questions() {
                    if table
                        .check(source.v4.into(), destination.v4.into(), protocol, port, MeshTime(1))
                        .is_allowed()
                    {
                        all.insert(format!("{us} {} {} {protocol} {port}", source.v4, destination.v4));
                    }
                }
            }
        }
    }
    Ok(all)
}

#[test]
fn removing_a_rule_never_allows_anything() -> Outcome {
    let rules = [
        "a -> b:*",
        "x=1 -> y=1:icmp",
        "c -> a:tcp/1-65535",
        "b -> b:udp/81",
        "y=1 -> x=1:web",
    ];
    let compiled = |rules: &[&str]| {
        let lines: String = rules.iter().map(|rule| format!("- '{rule}'\n")).collect();
        let policy = policy(&format!("{SMALL}{}", if rules.is_empty() { "  []" } else { &lines }))?;
        allowed(&plan(&policy, &inventory(&policy, small_hosts()?)?)?)
    };
    let whole = compiled(&rules)?;
    for left_out in 0..rules.len() {
        let fewer: Vec<_> = rules
            .iter()
            .enumerate()
            .filter(|(place, _)| *place != left_out)
            .map(|(_, rule)| *rule)
            .collect();
        let less = compiled(&fewer)?;
        assert!(less.is_subset(&whole) && less != whole, "without {}", rules[left_out]);
    }
    assert!(compiled(&[])?.is_empty(), "an empty policy allows nothing");
    Ok(())
}

#[test]
fn the_order_of_a_document_does_not_matter() -> Outcome {
    let hosts = small_hosts()?;
    let one = policy(&format!("{SMALL}- a -> b:*\n- c -> a:web\n- 'x=1, c -> y=1:icmp, b:web'\n"))?;
    let other = policy(&format!("{SMALL}- 'c, x=1 -> b:web, y=1:icmp'\n- c -> a:web\n- a -> b:*\n"))?;
    let (one, other) = (
        plan(&one, &inventory(&one, hosts.clone())?)?,
        plan(&other, &inventory(&other, hosts.clone())?)?,
    );
    for host in &hosts {
        assert_eq!(items(&one, host.id)?, items(&other, host.id)?);
    }
    Ok(())
}

#[test]
fn a_host_without_rules_changes_nobody_elses_view() -> Outcome {
    let policy = policy(&format!("{SMALL}- a -> b:*\n- c -> a:web\n"))?;
    let hosts = small_hosts()?;
    let mut more = hosts.clone();
    more.push(host(4, "h4", BTreeMap::new())?);
    let (before, after) = (
        plan(&policy, &inventory(&policy, hosts.clone())?)?,
        plan(&policy, &inventory(&policy, more)?)?,
    );
    for host in &hosts {
        assert_eq!(items(&before, host.id)?, items(&after, host.id)?);
        assert_eq!(before.fingerprints(&[])[&host.id], after.fingerprints(&[])[&host.id]);
    }
    Ok(())
}

/// Promise 5: no byte of what a host need not know is in its view.
#[test]
fn a_view_holds_no_byte_about_unpaired_hosts() -> Outcome {
    let text = "version: 1
components:
  app-canary: {on: app-1-canary, attach: {user: '1'}}
  db-canary: {on: db-1-canary, attach: {user: '1'}, services: {sql-canary: tcp/5432}}
  other-canary: {on: other-1-canary, attach: {unit: canary.service}, services: {secret-canary: tcp/1}}
  idle-canary: {on: nowhere-canary, attach: {user: '2'}}
allow:
  - {from: app-canary, to: 'db-canary:sql-canary', why: canary-why, owner: canary-owner}
  - other-canary -> db-canary:sql-canary
  - app-canary -> idle-canary:tcp/9
  - idle-canary -> app-canary:tcp/9
";
    let policy = policy(text)?;
    let names = ["app-1-canary", "db-1-canary", "other-1-canary", "lonely-1-canary"];
    let hosts: Vec<_> = (1..)
        .zip(names)
        .map(|(number, name)| host(number, name, BTreeMap::new()))
        .collect::<Outcome<_>>()?;
    let inventory = inventory(&policy, hosts.clone())?;
    let plan = plan(&policy, &inventory)?;
    let app = bytes(&items(&plan, hosts[0].id)?);
    let knows = |secret: &[u8]| app.windows(secret.len()).any(|window| window == secret);
    for wanted in ["app-1-canary", "db-1-canary", "sql-canary"] {
        assert!(knows(wanted.as_bytes()), "{wanted} is needed");
    }
    for secret in ["other", "lonely", "idle", "nowhere", "secret", "why", "owner"] {
        assert!(!knows(secret.as_bytes()), "{secret} was shown");
    }
    for unpaired in &hosts[2..] {
        assert!(!knows(&unpaired.id.0) && !knows(unpaired.wg_key.as_bytes()) && !knows(unpaired.identity.as_bytes()));
    }
    let other = inventory.instances["other-canary"][&hosts[2].id];
    assert!(!knows(&other.v4.octets()) && !knows(&other.v6.octets()));
    assert!(plan.items(HostId([0; 16]), &[])?.is_none(), "a host that is not there has no view");
    Ok(())
}

fn bytes(items: &Items) -> Vec<u8> {
    items
        .iter()
        .flat_map(|(at, bytes)| at.key.iter().chain(bytes).copied().collect::<Vec<_>>())
        .collect()
}

#[test]
fn a_view_beyond_its_limits_is_refused_before_and_when_it_is_made() -> Outcome {
    let many = |count: u32| {
        (0..count)
            .map(|n| host(n, &format!("w-{n}"), [("role".parse()?, "web".parse()?)].into()))
            .collect::<Outcome<Vec<_>>>()
    };
    let policy = policy(
        "version: 1\ncomponents:\n  web: {on: {role: web}, attach: host}\n  db: {on: db, attach: host}\nallow: ['web -> db:tcp/1']",
    )?;
    for (count, good) in [(16_384, true), (16_385, false)] {
        let mut hosts = many(count)?;
        hosts.push(host(99_999, "db", BTreeMap::new())?);
        let db = hosts[hosts.len() - 1].id;
        let plan = plan(&policy, &inventory(&policy, hosts)?)?;
        assert_eq!(plan.check_limits(&[]).is_ok(), good);
        let refused = matches!(plan.items(db, &[]), Err(ViewLimit::Peers { peers, .. }) if peers == count as usize);
        assert_eq!(refused, !good);
    }
    Ok(())
}

#[test]
fn a_view_of_too_many_rules_is_refused() -> Outcome {
    let component = |side: char, n: u32| format!("  {side}{n}: {{on: {side}, attach: {{user: '{n}'}}, labels: {{side: {side}}}}}\n");
    let components: String = (1..=520).map(|n| component('x', n) + &component('y', n)).collect();
    let policy = policy(&format!("version: 1\ncomponents:\n{components}allow: ['side=x -> side=y:tcp/1']"))?;
    let hosts = [host(1, "x", BTreeMap::new())?, host(2, "y", BTreeMap::new())?];
    let plan = plan(&policy, &inventory(&policy, hosts)?)?;
    assert!(matches!(plan.check_limits(&[]), Err(ViewLimit::Size { items, .. }) if items > 520 * 520));
    Ok(())
}

#[test]
fn a_rule_that_no_frame_can_carry_is_refused() -> Outcome {
    for (ports, good) in [(500, true), (64 * 256, false)] {
        let service = |s: u32| {
            let first = 1 + s * 64;
            format!(
                "s{s}: [{}]",
                (first..first + 64).map(|port| format!("tcp/{port}")).collect::<Vec<_>>().join(",")
            )
        };
        let services: Vec<_> = (0..ports / 64).map(service).collect();
        let text = format!(
            "version: 1\ncomponents:\n  a: {{on: h1, attach: host}}\n  b: {{on: h2, attach: host, services: {{{}}}}}\nallow: ['a -> b:*']",
            services.join(", ")
        );
        let policy = policy(&text)?;
        let plan = plan(&policy, &inventory(&policy, small_hosts()?)?)?;
        assert_eq!(plan.check_limits(&[]).is_ok(), good, "{:?}", plan.check_limits(&[]));
        for (at, bytes) in items(&plan, small_hosts()?[0].id)?.iter().filter(|_| good) {
            assert!(at.key.len() + bytes.len() <= cloison_proto::control::frame::MAX_VIEW_CHUNK);
        }
    }
    Ok(())
}

#[test]
fn two_components_that_are_the_whole_host_are_found() -> Outcome {
    let text = "version: 1\ncomponents:\n  a: {on: {role: db}, attach: host}\n  b: {on: h1, attach: host}\n  c: {on: {role: db}, attach: {user: x}}\n  d: {on: h3, attach: {user: x}}\nallow: []";
    let policy = policy(text)?;
    let conflicts = plan(&policy, &inventory(&policy, small_hosts()?)?)?.conflicts();
    let found: Vec<_> = conflicts
        .iter()
        .map(|c| format!("{} {} {} {} {}", c.host, c.first, c.second, c.attachment, c.whole_host))
        .collect();
    assert_eq!(found, ["h1 a b host true", "h3 c d user:x false"]);
    Ok(())
}

/// 10,000 hosts, 10,000 components and 50,000 rules (DESIGN's limits): prints how long each step takes.
#[test]
#[ignore = "half a minute in a debug build: run it by name, in a release build, with --nocapture"]
fn the_largest_mesh_is_compiled_in_seconds() -> Outcome {
    let component = |n: u32| {
        format!(
            "  c{n}: {{on: h{n}, attach: {{user: c}}, labels: {{team: t{}}}, services: {{web: tcp/80}}}}\n",
            n / 10
        )
    };
    let components: String = (0..10_000).map(component).collect();
    let rule = |n: u32| match n % 50 {
        0 => format!("- team=t{} -> c{}:tcp/{}\n", n / 50, (n * 7919) % 10_000, 1 + n / 10_000),
        _ => format!("- c{} -> c{}:tcp/{}\n", n % 10_000, (n * 7919) % 10_000, 1 + n / 10_000),
    };
    let rules: String = (0..50_000).map(rule).collect();
    let step = |name: &str, began: std::time::Instant| eprintln!("{name}: {:?}", began.elapsed());
    let began = std::time::Instant::now();
    let policy = policy(&format!("version: 1\ncomponents:\n{components}allow:\n{rules}"))?;
    step("parse", began);
    let hosts = (0..10_000)
        .map(|n| host(n, &format!("h{n}"), BTreeMap::new()))
        .collect::<Outcome<Vec<_>>>()?;
    let inventory = inventory(&policy, hosts)?;
    let began = std::time::Instant::now();
    let plan = plan(&policy, &inventory)?;
    step("plan", began);
    let began = std::time::Instant::now();
    plan.check_limits(&[])?;
    step("limits", began);
    let began = std::time::Instant::now();
    assert_eq!(plan.fingerprints(&[]).len(), 10_000);
    step("fingerprints", began);
    let began = std::time::Instant::now();
    let mut bytes = 0;
    for host in inventory.hosts.keys() {
        let items = items(&plan, *host)?;
        assert_ne!(items.hash(), StateHash::default());
        bytes += items.iter().map(|(at, bytes)| at.key.len() + bytes.len()).sum::<usize>();
    }
    step("all views", began);
    eprintln!("{bytes} bytes in all views");
    Ok(())
}
