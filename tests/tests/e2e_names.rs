//! Names of components in the hosts file: real programs reach each other by them, and whatever happens to the file, no line of anybody else
//! is lost and the data plane goes on.

use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cloison_tests::lab::host::HOSTS;
use cloison_tests::lab::mesh::Mesh;
use cloison_tests::lab::postgres::{self, Postgres};
use cloison_tests::lab::tool::Tool;
use cloison_tests::lab::wait_for;

const POLICY: &str = "\
version: 1
components:
  postgres: {on: [db-1, db-2], attach: host, services: {sql: tcp/5432, echo: icmp}}
  n8n:      {on: app-1, attach: host}
allow:
  - n8n -> postgres:sql
  - n8n -> postgres:echo
";
const NAME: &str = "postgres.cloison.internal";
const LIMIT: Duration = Duration::from_secs(10);

fn hosts(mesh: &Mesh, host: &str) -> Result<String> {
    Ok(std::fs::read_to_string(mesh.host(host)?.hosts_file())?)
}

/// Waits until the hosts file of a host is as it should be.
fn wait_until(mesh: &Mesh, host: &str, what: &str, is_so: impl Fn(&str) -> bool) -> Result<String> {
    let mut last = String::new();
    let waited = wait_for(what, LIMIT, || {
        last = hosts(mesh, host)?;
        Ok(is_so(&last).then_some(()))
    });
    waited.with_context(|| format!("the hosts file of {host}:\n{last}"))?;
    Ok(last)
}

/// Everything in it that is not a block of an agent.
fn foreign(text: &str) -> String {
    text.split_inclusive('\n').filter(|line| !line.contains("cloison")).collect()
}

#[test]
fn programs_reach_components_by_name_and_the_block_follows_the_policy() -> Result<()> {
    let mut mesh = Mesh::with_policy("e2e-names", &["app-1", "db-1", "db-2"], POLICY)?;
    let text = wait_until(&mesh, "app-1", "the names", |text| text.contains(NAME))?;
    ensure!(text.starts_with(HOSTS), "{text}");
    let app = mesh.host("app-1")?.net();
    let _servers = ["db-1", "db-2"]
        .map(|host| Postgres::start(mesh.host(host)?, &mesh.instance("postgres", host)?.addresses()))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let sql = "select host(inet_server_addr())";
    for host in ["db-1", "db-2"] {
        let at = mesh.instance("postgres", host)?;
        let answer = postgres::query(app, format!("postgres.{host}.cloison.internal"), sql, 5)?.ok()?;
        ensure!(at.addresses().contains(&answer.stdout.trim().parse()?), "{host}: {answer:?}");
        for (family, address) in [("-4", IpAddr::V4(at.v4)), ("-6", IpAddr::V6(at.v6))] {
            let echo = app
                .run(&["ping", family, "-c1", "-W5", &format!("postgres.{host}.cloison.internal")])?
                .ok()?;
            ensure!(echo.stdout.contains(&address.to_string()), "{}", echo.stdout);
        }
    }
    postgres::query(app, NAME, sql, 5)?.ok()?;
    // A server finds its own name, and that of nobody whom it may not reach.
    let own = wait_until(&mesh, "db-1", "its own name", |text| {
        text.contains("postgres.db-1.cloison.internal")
    })?;
    ensure!(!own.contains("db-2") && !own.contains("n8n"), "{own}");
    let status = mesh.agent("app-1")?.status()?;
    ensure!(status["names"]["state"] == "kept" && status["names"]["instances"] == 3, "{status}");

    mesh.coordinator.apply_and_wait(&POLICY.replace("[db-1, db-2]", "db-2"))?;
    wait_until(&mesh, "app-1", "one instance less", |text| {
        !text.contains("db-1") && text.contains("db-2")
    })?;
    mesh.coordinator.apply_and_wait("version: 1\ncomponents: {}\n")?;
    let text = wait_until(&mesh, "app-1", "no block", |text| !text.contains("cloison"))?;
    ensure!(text == HOSTS, "{text}");
    mesh.coordinator.apply_and_wait(POLICY)?;
    wait_until(&mesh, "app-1", "the names again", |text| text.contains(NAME))?;
    mesh.agent_mut("app-1")?.stop()?;
    ensure!(hosts(&mesh, "app-1")?.contains(NAME), "a stopped agent leaves the names");
    mesh.agent("app-1")?.command(&["leave"])?.ok()?;
    ensure!(hosts(&mesh, "app-1")? == HOSTS, "{}", hosts(&mesh, "app-1")?);
    mesh.finish()
}

#[test]
fn an_editor_at_the_same_time_loses_nothing_and_a_lost_block_comes_back() -> Result<()> {
    let mesh = Mesh::with_policy("e2e-names-editor", &["app-1", "db-1"], &POLICY.replace("[db-1, db-2]", "db-1"))?;
    let before = wait_until(&mesh, "app-1", "the names", |text| text.contains(NAME))?;
    let file = mesh.host("app-1")?.hosts_file();
    let inode = std::fs::metadata(&file)?.ino();
    // An editor replaces the file by one without the block.
    let new = file.with_extension("new");
    std::fs::write(&new, format!("{HOSTS}192.0.2.7 printer\n"))?;
    std::fs::rename(&new, &file)?;
    let text = wait_until(&mesh, "app-1", "the names in the new file", |text| text.contains(NAME))?;
    ensure!(foreign(&text) == format!("{HOSTS}192.0.2.7 printer\n"), "{text}");
    ensure!(std::fs::metadata(&file)?.ino() != inode);
    // Lines that are added all the while, and names that change all the while.
    let flip = POLICY.replace("[db-1, db-2]", "db-1");
    for round in 0..10 {
        let policy = if round % 2 == 0 { "version: 1\ncomponents: {}\n" } else { &flip };
        mesh.coordinator.apply(policy)?;
        for line in 0..20 {
            let add = format!("echo 192.0.2.8 line-{round}-{line} >> {}", file.display());
            mesh.host("app-1")?.net().run(&["sh", "-c", &add])?.ok()?;
        }
    }
    let text = wait_until(&mesh, "app-1", "the names at last", |text| text.contains(NAME))?;
    for (round, line) in (0..10).flat_map(|round| (0..20).map(move |line| (round, line))) {
        ensure!(
            text.contains(&format!("192.0.2.8 line-{round}-{line}\n")),
            "line {round}-{line} is lost:\n{text}"
        );
    }
    ensure!(
        text.len() < before.len() + 220 * 30 && text.matches("# BEGIN").count() == 1,
        "{text}"
    );
    mesh.finish()
}

#[test]
fn an_agent_that_is_killed_at_any_moment_leaves_a_file_that_the_next_one_makes_right() -> Result<()> {
    let mut mesh = Mesh::with_policy("e2e-names-killed", &["app-1", "db-1"], &POLICY.replace("[db-1, db-2]", "db-1"))?;
    let file = mesh.host("app-1")?.hosts_file();
    wait_until(&mesh, "app-1", "the names", |text| text.contains(NAME))?;
    let tail = "192.0.2.9 behind-the-block\n";
    std::fs::OpenOptions::new()
        .append(true)
        .open(&file)
        .and_then(|mut file| std::io::Write::write_all(&mut file, tail.as_bytes()))?;
    for round in 0..6_u64 {
        let policy = if round % 2 == 0 { "version: 1\ncomponents: {}\n" } else { POLICY };
        mesh.coordinator.apply(&policy.replace("[db-1, db-2]", "db-1"))?;
        std::thread::sleep(Duration::from_millis(round * 23 % 90));
        mesh.agent_mut("app-1")?.kill()?;
        mesh.agent_mut("app-1")?.start()?;
    }
    let text = wait_until(&mesh, "app-1", "the names", |text| {
        text.contains(NAME) && text.matches("# END").count() == 1
    })?;
    ensure!(foreign(&text) == format!("{HOSTS}{tail}"), "{text}");
    mesh.finish()
}

#[test]
fn two_agents_on_one_machine_have_a_block_each() -> Result<()> {
    let mut mesh = Mesh::builder("e2e-names-two", &["app-1", "db-1"]).start()?;
    // Both hosts write the same file, as two agents on one machine do.
    let shared = mesh.lab().folder().join("shared-hosts");
    std::fs::write(&shared, HOSTS)?;
    for host in ["app-1", "db-1"] {
        let config = mesh.agent(host)?.config();
        let own = mesh.host(host)?.hosts_file().display().to_string();
        let text = std::fs::read_to_string(&config)?.replace(&own, &shared.display().to_string());
        std::fs::write(&config, text)?;
    }
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(&POLICY.replace("[db-1, db-2]", "db-1"))?;
    let read = || Ok::<_, anyhow::Error>(std::fs::read_to_string(&shared)?);
    wait_for("both blocks", LIMIT, || {
        Ok((read()?.matches("# END cloison").count() == 2).then_some(()))
    })?;
    mesh.agent_mut("app-1")?.stop()?;
    mesh.agent("app-1")?.command(&["leave"])?.ok()?;
    let left: String = std::fs::read_to_string(&shared)?;
    ensure!(
        left.matches("# END cloison").count() == 1 && left.contains("postgres.db-1"),
        "{left}"
    );
    mesh.agent_mut("db-1")?.stop()?;
    mesh.agent("db-1")?.command(&["leave"])?.ok()?;
    ensure!(std::fs::read_to_string(&shared)? == HOSTS);
    mesh.finish()
}

/// A way to make the hosts file unusable: what it is called in the agent's warning, and how it is made.
type Spoiled = (&'static str, fn(&Path) -> Result<()>);

const SPOILED: [Spoiled; 5] = [
    ("there is no", |_| Ok(())),
    ("is a symbolic link", |file| Ok(symlink("/etc/hosts", file)?)),
    ("is not a plain file", |file| Ok(std::fs::create_dir(file)?)),
    ("the limit is", |file| Ok(std::fs::File::create(file)?.set_len(9 * 1024 * 1024)?)),
    ("belongs to user", |file| {
        std::fs::write(file, HOSTS)?;
        Ok(std::os::unix::fs::chown(file, Some(65_534), None)?)
    }),
];

#[test]
fn a_hosts_file_that_cannot_be_used_is_shown_and_the_data_plane_goes_on() -> Result<()> {
    let mut mesh = Mesh::builder("e2e-names-spoiled", &["app-1", "db-1"])
        .agents("hosts_file = \"/etc/hosts\"\n")
        .start()?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(&POLICY.replace("[db-1, db-2]", "db-1"))?;
    // A bind mount is written in place.
    wait_until(&mesh, "app-1", "the names through a bind mount", |text| text.contains(NAME))?;
    let postgres = mesh.instance("postgres", "db-1")?;
    let _listener = Tool::tcp_listen(mesh.host("db-1")?.net(), (postgres.v4, 5432).into())?;
    let config = mesh.agent("app-1")?.config();
    let text = std::fs::read_to_string(&config)?;
    let file = mesh.host("app-1")?.folder().join("spoiled");
    std::fs::write(&config, text.replace("/etc/hosts", &file.display().to_string()))?;
    mesh.agent_mut("app-1")?.stop()?;
    mesh.agent_mut("app-1")?.start()?;
    for (word, spoil) in SPOILED {
        spoil(&file)?;
        wait_for(&format!("a warning of `{word}`"), LIMIT, || {
            let status = mesh.agent("app-1")?.command(&["status"])?.ok()?.stdout;
            Ok((status.contains(word) && status.contains("warning: components cannot be reached by name")).then_some(()))
        })?;
        mesh.must_reach("app-1", (postgres.v4, 5432).into())?;
        match std::fs::symlink_metadata(&file) {
            Ok(found) if found.is_dir() => std::fs::remove_dir(&file)?,
            Ok(_) => std::fs::remove_file(&file)?,
            Err(_) => {}
        }
    }
    std::fs::write(&file, HOSTS)?;
    wait_for("the names in the mended file", LIMIT, || {
        Ok(std::fs::read_to_string(&file)?.contains(NAME).then_some(()))
    })?;
    // The bind mount lies read-only in the agent's mount namespace; what it had written before another file was configured is gone.
    ensure!(hosts(&mesh, "app-1")? == HOSTS, "{}", hosts(&mesh, "app-1")?);
    let agent = mesh.agent("app-1")?;
    let script = "mount --bind \"$0\" \"$0\" && mount -o remount,bind,ro \"$0\" && exec \"$@\"";
    std::fs::write(&file, HOSTS)?;
    let (program, config) = (cloison_tests::lab::programs::find("cloison-agent")?, agent.config());
    mesh.agent_mut("app-1")?.stop()?;
    let agent = mesh.agent("app-1")?;
    let mut command = agent.net().command("sh");
    command
        .args(["-c", script])
        .arg(&file)
        .arg(program)
        .args(["run", "--config"])
        .arg(config);
    std::fs::write(&file, HOSTS)?;
    let mut process = agent.net().start("agent", command)?;
    wait_for("a warning of a read-only file", LIMIT, || {
        let status = agent.command(&["status"])?;
        Ok(status.stdout.contains("Read-only file system").then_some(()))
    })?;
    mesh.must_reach("app-1", (postgres.v4, 5432).into())?;
    process.stop()?;
    mesh.finish()
}

#[test]
fn an_agent_told_to_write_no_names_writes_none_and_takes_back_what_it_wrote() -> Result<()> {
    let mut mesh = Mesh::with_policy("e2e-names-off", &["app-1", "db-1"], &POLICY.replace("[db-1, db-2]", "db-1"))?;
    wait_until(&mesh, "app-1", "the names", |text| text.contains(NAME))?;
    let config = mesh.agent("app-1")?.config();
    let own = mesh.host("app-1")?.hosts_file().display().to_string();
    std::fs::write(&config, std::fs::read_to_string(&config)?.replace(&own, "off"))?;
    mesh.agent_mut("app-1")?.stop()?;
    mesh.agent_mut("app-1")?.start()?;
    let text = wait_until(&mesh, "app-1", "no block", |text| !text.contains("cloison"))?;
    ensure!(text == HOSTS && mesh.agent("app-1")?.status()?["names"]["state"] == "off");
    mesh.finish()
}
