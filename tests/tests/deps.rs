//! Who may depend on whom, and who may name what. `ARCHITECTURE.md` draws the arrows; this asks `cargo metadata`, `cargo tree` and the
//! sources whether they hold.
//!
//! Code of tests is not held to the source fences: it may reach for anything that helps to prove something.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// Our crates, and those of them that each may have among its dependencies, however far down.
const ARROWS: [(&str, &[&str]); 6] = [
    ("cloison-proto", &[]),
    ("cloison-agent-core", &["cloison-proto"]),
    ("cloison-agent", &["cloison-proto", "cloison-agent-core"]),
    ("cloison-coordinator", &["cloison-proto"]),
    ("cloison-cli", &["cloison-proto"]),
    (
        "cloison-tests",
        &["cloison-proto", "cloison-agent-core", "cloison-agent", "cloison-coordinator"],
    ),
];

/// What must not be linked, however far down.
const NEVER_LINKED: [(&str, &[&str]); 5] = [
    ("cloison-proto", &["tokio", "rustls", "getrandom", "sqlx-core", "proptest"]),
    (
        "cloison-agent-core",
        &["tokio", "rustls", "quinn", "etherparse", "proptest", "tracing-subscriber"],
    ),
    ("cloison-agent", &["sqlx-core", "libsqlite3-sys", "axum", "etherparse", "proptest"]),
    (
        "cloison-coordinator",
        &["boringtun", "netlink-packet-route", "proptest", "etherparse"],
    ),
    (
        "cloison-cli",
        &["sqlx", "sqlx-core", "libsqlite3-sys", "axum", "quinn", "boringtun", "proptest"],
    ),
];

/// What is an implementation detail of one crate, or of a few: nobody else names it in a manifest, not even for tests.
const OWNED: [(&str, &[&str]); 6] = [
    ("boringtun", &["cloison-agent-core"]),
    ("quinn", &["cloison-agent", "cloison-coordinator"]),
    ("sqlx", &["cloison-coordinator"]),
    ("axum", &["cloison-coordinator"]),
    ("netlink-packet-route", &["cloison-agent"]),
    ("granit-parser", &["cloison-proto"]),
];

/// A name that stands in few files.
struct Fence {
    /// A crate's name, or a keyword.
    word: Word,
    /// Where it may stand: files, and folders with a slash at the end.
    homes: &'static [&'static str],
}

#[derive(Clone, Copy)]
enum Word {
    Crate(&'static str),
    Keyword(&'static str),
}

const FENCES: [Fence; 4] = [
    Fence {
        word: Word::Crate("boringtun"),
        homes: &["agent/core/src/wg/boringtun.rs"],
    },
    Fence {
        word: Word::Crate("quinn"),
        homes: &["agent/src/control/", "coordinator/src/control/"],
    },
    Fence {
        word: Word::Crate("sqlx"),
        homes: &["coordinator/src/store/"],
    },
    Fence {
        word: Word::Keyword("unsafe"),
        homes: &["agent/src/sys/"],
    },
];

#[test]
fn dependencies_run_one_way() -> Result<()> {
    for (name, allowed) in ARROWS {
        let linked = Graph::linked(name)?;
        let ours: BTreeSet<_> = ARROWS.iter().map(|(ours, _)| *ours).filter(|ours| linked.contains(*ours)).collect();
        let allowed: BTreeSet<_> = allowed.iter().copied().collect();
        ensure!(
            ours.is_subset(&allowed),
            "{name} depends on {ours:?}, but only {allowed:?} is allowed"
        );
    }
    let known: BTreeSet<_> = ARROWS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let members = Graph::read()?.members();
    ensure!(
        members == known,
        "{members:?}: a crate joined or left, say here whom it may depend on"
    );
    Ok(())
}

#[test]
fn each_crate_links_only_what_is_its_business() -> Result<()> {
    let graph = Graph::read()?;
    for (name, forbidden) in NEVER_LINKED {
        let linked = Graph::linked(name)?;
        let found: Vec<_> = forbidden.iter().filter(|other| linked.contains(**other)).collect();
        ensure!(found.is_empty(), "{name} links {found:?}");
    }
    for (other, owners) in OWNED {
        let naming: BTreeSet<_> = graph.naming(other);
        let owners: BTreeSet<_> = owners.iter().map(|owner| (*owner).to_owned()).collect();
        ensure!(
            naming.is_subset(&owners),
            "{other} is named in the manifests of {naming:?}, but is the business of {owners:?}"
        );
        ensure!(!naming.is_empty(), "nobody names {other} any more: take it off this list");
    }
    // The graph is a real one: what is surely linked is found.
    ensure!(Graph::linked("cloison-agent")?.contains("boringtun") && Graph::linked("cloison-coordinator")?.contains("libsqlite3-sys"));
    Ok(())
}

#[test]
fn no_shipped_program_has_the_features_that_tests_need() -> Result<()> {
    // As `make build` of a release names them, and nothing else.
    let shipped = ["-p", "cloison-agent", "-p", "cloison-coordinator", "-p", "cloison-cli"];
    let features = |of: &[&str], edges| cargo(&[&["tree", "--prefix", "none", "-f", "{p} [{f}]", "-e", edges], of].concat());
    let (ours, tests) = (
        features(&shipped, "normal,build")?,
        features(&["-p", "cloison-tests"], "normal,build,dev")?,
    );
    for feature in ["failpoints", "fuzz", "testing"] {
        let has = |tree: &str| tree.lines().any(|line| line.starts_with("cloison-") && line.contains(feature));
        ensure!(!has(&ours), "a shipped program has the feature {feature}");
        ensure!(has(&tests), "no test has the feature {feature}: take it off this list");
    }
    Ok(())
}

#[test]
fn what_is_an_implementation_detail_is_named_in_one_place() -> Result<()> {
    let root = root()?;
    let sources = sources(&root)?;
    ensure!(sources.len() > 100, "only {} source files were found", sources.len());
    let mut wrong = Vec::new();
    for (path, text) in &sources {
        for fence in FENCES.iter().filter(|fence| !fence.allows(path)) {
            let lines = text.lines().enumerate().filter(|(_, line)| fence.word.stands_in(line));
            wrong.extend(lines.map(|(n, line)| format!("{path}:{}: {}", n + 1, line.trim())));
        }
    }
    ensure!(wrong.is_empty(), "named outside of its place:\n{}", wrong.join("\n"));
    for fence in FENCES {
        let used = sources
            .iter()
            .any(|(path, text)| fence.allows(path) && text.lines().any(|line| fence.word.stands_in(line)));
        ensure!(used, "no source names what {:?} are for", fence.homes);
    }
    Ok(())
}

#[test]
fn a_fence_sees_what_it_is_for() {
    let quinn = Word::Crate("quinn");
    for line in [
        "use quinn::Endpoint;",
        "    let c: quinn::Connection = x;",
        "use quinn;",
        "use quinn as q;",
        "f(&quinn::A)",
    ] {
        assert!(quinn.stands_in(line), "{line}");
    }
    for line in [
        "// use quinn::Endpoint;",
        "use quinn_udp::A;",
        "use crate::quinn::A;",
        "mod quinn {",
        "//! a quinn::Server",
        "self.quinn()",
    ] {
        assert!(!quinn.stands_in(line), "{line}");
    }
    let keyword = Word::Keyword("unsafe");
    assert!(keyword.stands_in("let x = unsafe { f() };") && keyword.stands_in("unsafe fn f() {}"));
    assert!(!keyword.stands_in("#![forbid(unsafe_code)]") && !keyword.stands_in("// unsafe { }"));
}

impl Fence {
    fn allows(&self, path: &str) -> bool {
        self.homes
            .iter()
            .any(|home| path == *home || home.ends_with('/') && path.starts_with(home))
    }
}

impl Word {
    /// Whether a line names it, not counting comments: a crate at the start of a path, a keyword anywhere.
    fn stands_in(self, line: &str) -> bool {
        let (Self::Crate(word) | Self::Keyword(word)) = self;
        let code = line.split("//").next().unwrap_or_default();
        let part = |c: char| c.is_alphanumeric() || c == '_';
        code.match_indices(word).any(|(at, _)| {
            let (before, behind) = (code.get(..at).unwrap_or_default(), code.get(at + word.len()..).unwrap_or_default());
            let whole = !before.ends_with(part) && !behind.starts_with(part);
            let path = behind.starts_with("::") && !before.ends_with(':') || before.trim_end().ends_with("use");
            whole && (path || matches!(self, Self::Keyword(_)))
        })
    }
}

/// What the manifests say, and what cargo makes of it for this machine.
struct Graph {
    /// For each of our crates, what its manifest names, of every kind.
    named: BTreeMap<String, BTreeSet<String>>,
}

impl Graph {
    fn read() -> Result<Self> {
        let metadata: Value = serde_json::from_str(&cargo(&["metadata", "--format-version", "1", "--no-deps"])?)?;
        let named = list(&metadata, "packages").map(|package| {
            let dependencies = list(package, "dependencies").map(|one| text(one, "name"));
            (text(package, "name"), dependencies.collect())
        });
        Ok(Self { named: named.collect() })
    }

    fn members(&self) -> BTreeSet<String> {
        self.named.keys().cloned().collect()
    }

    /// The names of all packages that end up in what is built of `name` alone: with the features that ship, without those of tests.
    fn linked(name: &str) -> Result<BTreeSet<String>> {
        let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
        let tree = cargo(&["tree", "-p", name, "-e", "normal,build", "--prefix", "none", "--target", &platform])?;
        let names = tree.lines().filter_map(|line| line.split_whitespace().next());
        Ok(names.filter(|other| *other != name).map(str::to_owned).collect())
    }

    /// Those of our crates whose manifests name `other`.
    fn naming(&self, other: &str) -> BTreeSet<String> {
        let naming = self.named.iter().filter(|(_, named)| named.contains(other));
        naming.map(|(name, _)| name.clone()).collect()
    }
}

/// What cargo answers, without touching the lock file.
fn cargo(arguments: &[&str]) -> Result<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo).current_dir(root()?).arg("--locked").args(arguments).output();
    let output = output.context("cargo does not start")?;
    ensure!(
        output.status.success(),
        "cargo {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}

fn list<'a>(value: &'a Value, field: &str) -> impl Iterator<Item = &'a Value> {
    value.get(field).and_then(Value::as_array).into_iter().flatten()
}

fn text(value: &Value, field: &str) -> String {
    value.get(field).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn root() -> Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    Ok(here.parent().context("no folder above the crate")?.to_owned())
}

/// All sources but those of tests, by their paths below the root.
fn sources(root: &Path) -> Result<Vec<(String, String)>> {
    let mut folders: Vec<_> = ["proto", "agent", "coordinator", "cli", "tests"]
        .iter()
        .map(|name| root.join(name).join("src"))
        .collect();
    folders.push(root.join("agent/core/src"));
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            let name = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
            let is_test = name == "tests" || name == "testing" || name.ends_with("_tests");
            if path.is_dir() && !is_test {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") && !is_test {
                let text = std::fs::read_to_string(&path)?;
                found.push((path.strip_prefix(root)?.display().to_string(), text));
            }
        }
    }
    Ok(found)
}
