//! An old backup in a mesh that went on: nobody is let in who was put out, nobody is cut off who belongs, and no agent steps back.

#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cloison_proto::version::Version;
use cloison_tests::lab::coordinator::Coordinator;
use cloison_tests::lab::mesh::Mesh;
use cloison_tests::lab::tool::Tool;
use cloison_tests::lab::wait_for;

const COMPONENTS: &str = "\
version: 1
components:
  postgres: {on: db-1,  attach: host, services: {sql: tcp/5432, admin: tcp/5433}}
  n8n:      {on: app-1, attach: host}
  old:      {on: old-1, attach: host}
";
const BEFORE: &str = "allow:\n  - n8n -> postgres:sql\n  - old -> postgres:sql\n";
const AFTER: &str = "allow:\n  - n8n -> postgres:sql\n  - n8n -> postgres:admin\n";
const SQL: u16 = 5432;
const CONVERGE: Duration = Duration::from_secs(40);

/// The version of the view that an agent has in force.
fn version(mesh: &Mesh, host: &str) -> Result<Version> {
    let status = mesh.agent(host)?.status()?;
    let found = status.get("version").context("no version")?;
    serde_json::from_value(found.clone()).with_context(|| format!("no version in {status}"))
}

/// Waits until `recover` knows of all that these words stand for, and gives what it says.
fn report(coordinator: &Coordinator, words: &[&str]) -> Result<String> {
    wait_for("recover to know of every host", CONVERGE, || {
        let shown = coordinator.command(&["recover"])?.ok()?.stdout;
        Ok(words.iter().all(|word| shown.contains(word)).then_some(shown))
    })
}

/// Puts the backup into the place of the mesh that went on.
fn restore(mesh: &mut Mesh, file: &str) -> Result<()> {
    mesh.coordinator.stop()?;
    let data = mesh.coordinator.data();
    std::fs::rename(&data, data.with_extension("lost"))?;
    let restored = mesh.coordinator.command(&["restore", file])?.ok()?;
    ensure!(restored.stdout.contains("read-only"), "{}", restored.stdout);
    mesh.coordinator.serve()
}

#[test]
fn a_mesh_restored_from_an_old_backup_goes_on_without_letting_anybody_in_or_back() -> Result<()> {
    let hosts = ["app-1", "db-1", "old-1", "late-1", "thief-1"];
    let mut mesh = Mesh::builder("e2e-recover", &hosts).start()?;
    for host in ["app-1", "db-1", "old-1"] {
        let token = mesh.coordinator.token(host)?;
        mesh.agent(host)?.join(&token)?.ok()?;
        mesh.agent_mut(host)?.start()?;
    }
    mesh.coordinator.apply_and_wait(&format!("{COMPONENTS}{BEFORE}"))?;
    let at = mesh.instance("postgres", "db-1")?.sockets(SQL)[0];
    let _listener = Tool::tcp_listen(mesh.host("db-1")?.net(), at)?;
    mesh.must_reach("app-1", at)?;
    mesh.must_reach("old-1", at)?;
    let token = mesh.coordinator.token("late-1")?;
    let file = mesh.coordinator.data().with_file_name("mesh.backup").display().to_string();
    let made = mesh.coordinator.command(&["backup", "--to", &file])?.ok()?;
    ensure!(made.stdout.contains("private keys"), "{}", made.stdout);

    // The mesh goes on: a host is put out, another one joins, the policy changes.
    mesh.coordinator.cli(&["host", "revoke", "old-1", "--yes"])?.ok()?;
    mesh.agent("late-1")?.join(&token)?.ok()?;
    mesh.agent_mut("late-1")?.start()?;
    mesh.coordinator.apply_and_wait(&format!("{COMPONENTS}{AFTER}"))?;
    let late = mesh.coordinator.host("late-1")?.id.to_string();
    let before = [version(&mesh, "app-1")?, version(&mesh, "db-1")?];

    restore(&mut mesh, &file)?;
    // The one that was put out tries its luck; so does somebody with the token that was used.
    mesh.agent_mut("old-1")?.kill()?;
    let mut old = mesh.agent("old-1")?.spawn()?;
    let status = mesh.coordinator.status()?;
    ensure!(status.read_only.is_some(), "{status:?}");
    let refused = mesh
        .coordinator
        .cli(&["-o", "json", "token", "create", "--host", "new-1"])?
        .refused()?;
    ensure!(
        refused.stderr.contains("recover") || refused.stdout.contains("recover"),
        "{}{}",
        refused.stdout,
        refused.stderr
    );
    mesh.agent("thief-1")?.join(&token)?.refused()?;
    let shown = report(&mesh.coordinator, &["app-1  has", "db-1  has", &late])?;
    ensure!(shown.contains("old-1") && shown.contains("Nothing was changed"), "{shown}");
    // Everything that was allowed goes on meanwhile, and who was put out stays out.
    mesh.must_reach("app-1", at)?;
    ensure!(
        mesh.attempt("old-1", at)?.what == "failed",
        "a revoked host came back with the backup"
    );
    ensure!(
        [version(&mesh, "app-1")?, version(&mesh, "db-1")?] == before,
        "an agent changed its view"
    );

    let done = mesh.coordinator.command(&["recover", "--yes", "--revoke", "old-1"])?.ok()?;
    let refused = mesh.coordinator.cli(&["status"])?;
    ensure!(
        refused.status.code() == Some(3),
        "a credential of the backup is still good: {}{}",
        refused.stdout,
        refused.stderr
    );
    mesh.coordinator.take_credential(&done)?;
    wait_for("the mesh to go on", CONVERGE, || {
        let status = mesh.coordinator.status()?;
        Ok((status.read_only.is_none() && status.applied == 2 && status.hosts == 2).then_some(()))
    })?;
    for (host, before) in ["app-1", "db-1"].into_iter().zip(before) {
        ensure!(
            version(&mesh, host)?.generation > before.generation,
            "{host} stayed in the lost time"
        );
    }
    mesh.must_reach("app-1", at)?;
    ensure!(mesh.attempt("old-1", at)?.what == "failed");
    let refusal = mesh.agent("thief-1")?.join(&token)?.refused()?;
    ensure!(refusal.stderr.contains("enroll_denied"), "{}", refusal.stderr);
    let _ = old.kill();

    // Who joined in the lost time joins again, and is at home.
    mesh.agent_mut("late-1")?.stop()?;
    mesh.agent("late-1")?.command(&["leave"])?.ok()?;
    let token = mesh.coordinator.token("late-1")?;
    mesh.agent("late-1")?.join(&token)?.ok()?;
    mesh.agent_mut("late-1")?.start()?;
    mesh.coordinator.apply_and_wait(&format!("{COMPONENTS}{AFTER}"))?;
    mesh.finish()
}

#[test]
fn an_old_database_copied_into_place_is_found_out_by_the_first_agent() -> Result<()> {
    let mut mesh = Mesh::with_policy(
        "e2e-old-copy",
        &["app-1", "db-1"],
        &format!("{COMPONENTS}{BEFORE}")
            .replace("  old:      {on: old-1, attach: host}\n", "")
            .replace("  - old -> postgres:sql\n", ""),
    )?;
    mesh.coordinator.stop()?;
    let data = mesh.coordinator.data();
    std::fs::copy(data.join("cloison.db"), data.with_extension("copy"))?;
    mesh.coordinator.serve()?;
    for _ in 0..3 {
        mesh.coordinator
            .apply_and_wait(&format!("{COMPONENTS}{AFTER}").replace("  old:      {on: old-1, attach: host}\n", ""))?;
        mesh.coordinator
            .apply_and_wait(&format!("{COMPONENTS}allow: []\n").replace("  old:      {on: old-1, attach: host}\n", ""))?;
    }
    let before = version(&mesh, "app-1")?;
    mesh.coordinator.stop()?;
    std::fs::copy(data.with_extension("copy"), data.join("cloison.db"))?;
    mesh.coordinator.serve()?;
    wait_for("the coordinator to see that it is behind", CONVERGE, || {
        Ok(mesh.coordinator.status()?.read_only.is_some().then_some(()))
    })?;
    ensure!(version(&mesh, "app-1")? == before, "an agent stepped back");
    mesh.coordinator.command(&["recover", "--yes", "--keep-credentials"])?.ok()?;
    wait_for("the mesh to go on", CONVERGE, || {
        let status = mesh.coordinator.status()?;
        Ok((status.read_only.is_none() && status.applied == status.hosts).then_some(()))
    })?;
    ensure!(version(&mesh, "app-1")?.generation > before.generation);
    mesh.finish()
}
