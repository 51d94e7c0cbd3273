//! `cloison-agent doctor` on hosts on which something is really broken: each finding is there, with what to do, and gone when it is mended.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cloison_tests::lab::mesh::Mesh;
use cloison_tests::lab::wait_for;
use serde_json::Value;

const POLICY: &str = "\
version: 1
components:
  postgres: {on: db-1,  attach: host, services: {sql: tcp/5432}}
  n8n:      {on: app-1, attach: host}
allow:
  - n8n -> postgres:sql
";
const LIMIT: Duration = Duration::from_secs(20);

/// What `doctor` on app-1 found, and its exit status.
fn examine(mesh: &Mesh) -> Result<(Vec<Value>, Option<i32>)> {
    let answer = mesh.agent("app-1")?.command(&["doctor", "-o", "json"])?;
    let found = answer.json()?["findings"].as_array().context("no findings")?.clone();
    Ok((found, answer.status.code()))
}

/// Insists on a finding of a check, at that level, which says this, with a fix that says that.
fn must_find(mesh: &Mesh, check: &str, level: &str, what: &str, fix: &str) -> Result<()> {
    let (found, status) = examine(mesh)?;
    let has = |f: &Value, field: &str, word: &str| f[field].as_str().is_some_and(|text| text.contains(word));
    let fits = |f: &&Value| f["check"] == check && f["level"] == level && has(f, "what", what) && has(f, "fix", fix);
    ensure!(
        found.iter().any(|f| fits(&f)),
        "no {level} of {check} that says `{what}` and `{fix}`: {found:#?}"
    );
    ensure!(status == Some(2), "exit status {status:?}");
    Ok(())
}

/// Insists that there is nothing to mend.
fn must_be_well(mesh: &Mesh) -> Result<()> {
    let mut last = (Vec::new(), None);
    let waited = wait_for("nothing to mend", LIMIT, || {
        last = examine(mesh)?;
        Ok((last.1 == Some(0)).then_some(()))
    });
    let work: Vec<_> = last.0.iter().filter(|f| f["fix"] != "").collect();
    waited.with_context(|| format!("{work:#?}"))
}

#[test]
fn what_is_broken_is_found_with_its_fix_and_gone_when_mended() -> Result<()> {
    let mut mesh = Mesh::with_policy("e2e-doctor", &["app-1", "db-1"], POLICY)?;
    must_be_well(&mesh)?;
    let text = mesh.agent("app-1")?.command(&["doctor"])?.ok()?.stdout;
    for word in [
        "ok       tun",
        "db-1 answers in",
        "packets of 1480 bytes pass to db-1",
        "Nothing to mend.",
    ] {
        ensure!(text.contains(word), "no `{word}`:\n{text}");
    }
    let app = mesh.host("app-1")?.net().clone();

    // State that others can read.
    let state = mesh.agent("app-1")?.state();
    let open = |mode| std::fs::set_permissions(&state, std::fs::Permissions::from_mode(mode));
    open(0o755)?;
    must_find(&mesh, "state", "problem", "(mode 0755)", "chmod -R")?;
    open(0o700)?;

    // UDP that is blocked here.
    app.nft("add table inet block; add chain inet block in { type filter hook input priority 0; }; add rule inet block in udp dport 51820 drop;")?;
    must_find(&mesh, "udp", "problem", "none of its 1 peers answers", "let UDP port 51820 through")?;
    app.nft("delete table inet block")?;

    // A path that loses long packets.
    let db = mesh.host("db-1")?;
    mesh.lab().wire().lose_longer_than(db, 1400)?;
    must_find(&mesh, "mtu", "problem", "more than 1400 bytes get lost to db-1", "mtu = 1340")?;
    mesh.lab().wire().repair(&[db])?;

    // Addresses and routes of others in the mesh's range.
    let at = mesh.instance("postgres", "db-1")?.v4.to_string();
    app.run(&["ip", "link", "add", "other0", "type", "veth", "peer", "name", "other1"])?
        .ok()?;
    app.run(&["ip", "address", "add", &format!("{at}/32"), "dev", "other0"])?.ok()?;
    must_find(&mesh, "addresses", "problem", &at, "dev other0")?;
    app.run(&["ip", "link", "delete", "other0"])?.ok()?;

    // The coordinator is gone.
    mesh.coordinator.stop()?;
    must_find(
        &mesh,
        "coordinator",
        "problem",
        "does not answer",
        "systemctl status cloison-coordinator",
    )?;
    mesh.coordinator.serve()?;
    must_be_well(&mesh)?;

    // The coordinator answers, and wants no link with this host.
    mesh.coordinator.cli(&["host", "revoke", "app-1", "--yes"])?.ok()?;
    let mut last = Ok(());
    let waited = wait_for("the revocation to be found", LIMIT, || {
        last = must_find(&mesh, "coordinator", "problem", "revoked", "cloison token create --host app-1");
        Ok(last.is_ok().then_some(()))
    });
    waited.with_context(|| format!("{last:?}"))?;
    mesh.finish()
}

#[test]
fn a_foreign_flush_of_the_ruleset_is_found_while_the_agent_is_stopped_and_mended_while_it_runs() -> Result<()> {
    let mut mesh = Mesh::with_policy("e2e-doctor-flush", &["app-1", "db-1"], POLICY)?;
    let app = mesh.host("app-1")?.net().clone();
    mesh.agent_mut("app-1")?.stop()?;
    must_find(&mesh, "agent", "problem", "does not run", "systemctl start cloison-agent")?;
    // Rules of the base table that somebody took out, and then all of it.
    let altered = ["nft", "flush", "chain", "inet", "cloison", "leaving"];
    app.run(&altered)?.ok()?;
    must_find(
        &mesh,
        "nft",
        "problem",
        "was changed by somebody else",
        "systemctl restart cloison-agent",
    )?;
    app.run(&["nft", "flush", "ruleset"])?.ok()?;
    must_find(&mesh, "nft", "problem", "`inet cloison` is gone", "flush its own tables only")?;
    mesh.agent_mut("app-1")?.start()?;
    must_be_well(&mesh)?;
    app.run(&["nft", "flush", "ruleset"])?.ok()?;
    wait_for("the table to be loaded again", LIMIT, || {
        Ok(app.run(&["nft", "list", "table", "inet", "cloison"])?.ok().ok())
    })?;
    must_be_well(&mesh)?;
    app.run(&altered)?.ok()?;
    wait_for("the rules to be back", LIMIT, || {
        let chain = app.run(&["nft", "list", "chain", "inet", "cloison", "leaving"])?.ok()?.stdout;
        Ok(chain.contains("overlay source").then_some(()))
    })?;
    must_be_well(&mesh)?;
    // Before a host is enrolled.
    let agent = mesh.agent_mut("app-1")?;
    agent.stop()?;
    agent.command(&["leave"])?.ok()?;
    must_find(&mesh, "agent", "problem", "not enrolled", "cloison-agent join")?;
    mesh.finish()
}

#[test]
fn a_damaged_file_of_state_comes_with_the_fix_of_that_file() -> Result<()> {
    let mut mesh = Mesh::with_policy("e2e-doctor-state", &["app-1", "db-1"], POLICY)?;
    must_be_well(&mesh)?;
    mesh.agent_mut("app-1")?.stop()?;
    let state = mesh.agent("app-1")?.state();
    let cases = [
        ("identity-key", "cloison host revoke", &["certificate"][..]),
        ("wireguard-key", "cloison host revoke", &["certificate"]),
        ("membership", "cloison host revoke", &["certificate", "lease", "coordinator"]),
        ("floor", "only if you trust the coordinator", &["lease", "coordinator"]),
    ];
    for (name, fix, silent) in cases {
        let path = state.join(name);
        let before = std::fs::read(&path)?;
        std::fs::write(&path, "nothing")?;
        must_find(&mesh, "state", "problem", &format!("{name} is damaged"), fix)?;
        must_find(&mesh, "agent", "problem", "does not run", "first mend the state")?;
        let (found, _) = examine(&mesh)?;
        // Nothing is made of what was not read; the base table is known by the view, if the membership is.
        let said = |f: &&Value| silent.iter().any(|check| f["check"] == *check) && f["level"] != "ok";
        ensure!(!found.iter().any(|f| said(&f)), "{name}: {found:#?}");
        let has_table = found.iter().any(|f| f["check"] == "nft" && f["level"] == "ok");
        ensure!(has_table || name == "membership", "{name}: {found:#?}");
        std::fs::write(&path, &before)?;
    }
    // What is missing is said, too.
    let key = state.join("identity-key");
    let before = std::fs::read(&key)?;
    std::fs::remove_file(&key)?;
    must_find(
        &mesh,
        "state",
        "problem",
        "the keys of this host are missing",
        "cloison host revoke",
    )?;
    std::fs::write(&key, before)?;
    // Without its membership a host cannot say who it was; people are told to look at the coordinator.
    std::fs::write(state.join("membership"), "nothing")?;
    let left = mesh.agent("app-1")?.command(&["leave", "--force"])?.ok()?;
    ensure!(left.stdout.contains("cloison host revoke NAME"), "{}", left.stdout);
    let token = mesh.coordinator.cli(&["token", "create", "--host", "app-1"])?.refused()?;
    ensure!(token.stderr.contains("exists already"), "{}", token.stderr);
    mesh.finish()
}

#[test]
fn a_bundle_shows_how_the_host_does_and_holds_no_secret_in_any_form() -> Result<()> {
    let mesh = Mesh::with_policy("e2e-bundle", &["app-1", "db-1"], POLICY)?;
    let agent = mesh.agent("app-1")?;
    // Canaries: the private keys themselves, and words beside what is meant to be read.
    let mut canaries: Vec<Vec<u8>> = Vec::new();
    for name in ["identity-key", "wireguard-key"] {
        let file = std::fs::read(agent.state().join(name))?;
        let body = file
            .iter()
            .position(|b| *b == b'\n')
            .and_then(|end| file.get(end + 1..))
            .context("a body")?;
        ensure!(body.len() == 32, "{name} has {} bytes", body.len());
        canaries.push(body.to_vec());
    }
    let token = mesh.coordinator.token("somebody")?;
    let planted = format!("canary-{}", "0123456789abcdef".repeat(2));
    canaries.extend([token.clone().into_bytes(), planted.clone().into_bytes()]);
    let config = std::fs::read_to_string(agent.config())?;
    std::fs::write(agent.config(), format!("# {planted} {token}\n{config}"))?;
    std::fs::write(agent.state().join("psk"), &planted)?;
    std::fs::write(agent.state().join("token"), &token)?;
    // One that gets in by a setting that is shown.
    let credential = format!("cloison_{}_{}", "07".repeat(8), "QUJD".repeat(8));
    let with = std::fs::read_to_string(agent.config())?;
    std::fs::write(agent.config(), format!("log = \"info,x={credential}\"\n{with}"))?;
    canaries.push(credential.into_bytes());

    let to = mesh.host("app-1")?.folder().join("bundle.tar");
    let said = agent.command(&["debug", "bundle", "--to", &to.display().to_string()])?;
    // `debug` takes its flags behind its own command.
    let said = said.ok()?;
    ensure!(said.stdout.contains("1 secrets"), "{}", said.stdout);
    let again = agent.command(&["debug", "bundle", "--to", &to.display().to_string()])?.refused()?;
    ensure!(again.stderr.contains("cannot write"), "{}", again.stderr);
    ensure!(std::fs::metadata(&to)?.permissions().mode() & 0o777 == 0o600);

    let bytes = std::fs::read(&to)?;
    for (number, canary) in canaries.iter().enumerate() {
        let hex: String = canary.iter().map(|b| format!("{b:02x}")).collect();
        let base64 = base64::Engine::encode(&base64::engine::general_purpose::STANDARD_NO_PAD, canary);
        for (form, needle) in [("raw", canary.clone()), ("hex", hex.into_bytes()), ("base64", base64.into_bytes())] {
            ensure!(
                !bytes.windows(needle.len()).any(|w| w == needle),
                "canary {number} is in the bundle, {form}"
            );
        }
    }
    let unpacked = mesh.host("app-1")?.folder().join("unpacked");
    std::fs::create_dir(&unpacked)?;
    let mut tar = std::process::Command::new("tar");
    tar.arg("-xf").arg(&to).arg("-C").arg(&unpacked);
    cloison_tests::lab::process::run(tar, LIMIT)?.ok()?;
    let read = |name: &str| std::fs::read_to_string(unpacked.join("cloison-bundle").join(name));
    for (name, word) in [
        ("README.txt", "for whoever helps"),
        ("doctor.txt", "db-1 answers"),
        ("status.json", "\"incarnation\""),
        ("flows.json", "\"total\""),
        ("denials.json", "\"denials\""),
        ("view.json", "postgres"),
        ("config.txt", "listen_port = 51820"),
        ("state.txt", "0600"),
        ("nft.txt", "overlay source from elsewhere"),
        ("network.txt", "cloison0"),
        ("versions.txt", "kernel"),
    ] {
        let text = read(name).with_context(|| format!("{name} is missing"))?;
        ensure!(text.contains(word), "no `{word}` in {name}:\n{text}");
    }
    mesh.finish()
}
