//! Who becomes a host: whoever has a good token, once. Everybody else learns nothing.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cloison_proto::api::HostList;
use cloison_tests::lab::agent::Agent;
use cloison_tests::lab::coordinator::Coordinator;
use cloison_tests::lab::mesh::Mesh;
use cloison_tests::lab::process::Process;
use cloison_tests::lab::{programs, wait_for};

/// Agents that race for one token, and how many times.
const RACERS: usize = 50;
const ROUNDS: usize = 20;
const RACE_LIMIT: Duration = Duration::from_secs(120);

fn hosts(coordinator: &Coordinator) -> Result<Vec<String>> {
    let list: HostList = coordinator.ask(&["host", "list"])?;
    Ok(list.hosts.iter().map(|h| h.name.to_string()).collect())
}

#[test]
fn a_token_is_good_once_and_used_expired_revoked_and_wrong_ones_look_alike() -> Result<()> {
    let mesh = Mesh::builder("e2e-tokens", &["first", "second", "third"]).start()?;
    let coordinator = &mesh.coordinator;
    let token = coordinator.token("first")?;
    mesh.agent("first")?.join(&token)?.ok()?;
    ensure!(hosts(coordinator)? == ["first"]);

    let used = mesh.agent("second")?.join(&token)?.refused()?;
    let answer = coordinator
        .cli(&["token", "create", "--host", "second", "--valid-for", "1s"])?
        .ok()?;
    let expired_token = answer.stdout.trim().to_owned();
    let revoked_token = coordinator.token("second")?;
    let list = coordinator.cli(&["-o", "json", "token", "list"])?.ok()?.json()?;
    let ids: Vec<&str> = list
        .pointer("/tokens")
        .and_then(|t| t.as_array())
        .context("tokens")?
        .iter()
        .filter_map(|t| t.get("id")?.as_str())
        .collect();
    // The newest stands for the token made last, whichever way the list is sorted: revoke all, the joined host stays.
    for id in ids {
        coordinator.cli(&["token", "revoke", id])?.ok()?;
    }
    let revoked = mesh.agent("second")?.join(&revoked_token)?.refused()?;
    std::thread::sleep(Duration::from_secs(2));
    let expired = mesh.agent("third")?.join(&expired_token)?.refused()?;
    let malformed = mesh.agent("third")?.join("cloison1_not-a-token")?.refused()?;
    for (what, refusal) in [("used", &used), ("revoked", &revoked)] {
        ensure!(refusal.stderr.contains("enroll_denied"), "{what}: {}", refusal.stderr);
    }
    for (what, refusal) in [
        ("used", &used),
        ("revoked", &revoked),
        ("expired", &expired),
        ("malformed", &malformed),
    ] {
        ensure!(
            !refusal.stderr.contains("panicked") && !refusal.stderr.trim().is_empty(),
            "{what}: {}",
            refusal.stderr
        );
        ensure!(!refusal.stderr.contains(&token), "{what}: the refusal shows the token");
    }
    ensure!(hosts(coordinator)? == ["first"], "{:?}", hosts(coordinator)?);
    mesh.finish()
}

#[test]
fn a_token_of_another_mesh_is_refused_and_neither_mesh_changes() -> Result<()> {
    let (ours, theirs) = (
        Mesh::builder("e2e-foreign-a", &["one"]).start()?,
        Mesh::builder("e2e-foreign-b", &["one"]).start()?,
    );
    // Both coordinators have the same address, each on its own wire: the pin in the token is what tells them apart.
    let foreign = theirs.coordinator.token("one")?;
    let refused = ours.agent("one")?.join(&foreign)?.refused()?;
    ensure!(
        !refused.stderr.trim().is_empty() && !refused.stderr.contains("panicked"),
        "{refused:?}"
    );
    ensure!(hosts(&ours.coordinator)?.is_empty() && hosts(&theirs.coordinator)?.is_empty());
    theirs.finish()?;
    ours.finish()
}

#[test]
fn fifty_agents_that_race_for_one_token_make_exactly_one_host_in_every_round() -> Result<()> {
    let mesh = Mesh::builder("e2e-race", &["crowd"]).start()?;
    let crowd = mesh.host("crowd")?;
    for round in 0..ROUNDS {
        let name = format!("winner-{round}");
        let token = mesh.coordinator.token(&name)?;
        let folder = crowd.folder().join(&name);
        std::fs::create_dir(&folder)?;
        std::fs::write(folder.join("token"), &token)?;
        let mut racers = Vec::with_capacity(RACERS);
        for racer in 0..RACERS {
            let config = folder.join(format!("{racer}.toml"));
            let own = folder.join(racer.to_string()).display().to_string();
            std::fs::write(&config, format!("state_dir = {own:?}\nsocket = {:?}\n", format!("{own}.sock")))?;
            let mut command = crowd.net().command(&programs::find("cloison-agent")?.display().to_string());
            command
                .arg("join")
                .arg("--config")
                .arg(&config)
                .arg("--token-file")
                .arg(folder.join("token"));
            racers.push(crowd.net().start("racer", command)?);
        }
        let joined = count_successes(&mut racers)?;
        ensure!(joined == 1, "{joined} agents joined in round {round}");
        let of_this_round = hosts(&mesh.coordinator)?.into_iter().filter(|h| *h == name).count();
        ensure!(of_this_round == 1, "{of_this_round} hosts were made in round {round}");
    }
    ensure!(hosts(&mesh.coordinator)?.len() == ROUNDS);
    mesh.finish()
}

fn count_successes(racers: &mut [Process]) -> Result<usize> {
    let mut joined = 0;
    for racer in racers {
        if racer.wait(RACE_LIMIT)?.success() {
            joined += 1;
        }
    }
    Ok(joined)
}

#[test]
fn a_host_cannot_choose_its_name_and_a_name_cannot_be_taken_twice() -> Result<()> {
    let mesh = Mesh::builder("e2e-names", &["db-1", "imposter"]).start()?;
    let joined = mesh.agent("db-1")?.join(&mesh.coordinator.token("db-1")?)?.ok()?;
    ensure!(joined.stdout.contains("db-1"), "{joined:?}");
    // A second token for the same name may be refused when made, or when used; either way there is one db-1.
    let second = mesh.coordinator.cli(&["token", "create", "--host", "db-1"])?;
    if second.status.success() {
        mesh.agent("imposter")?.join(second.stdout.trim())?.refused()?;
    }
    ensure!(hosts(&mesh.coordinator)? == ["db-1"]);
    let again: Agent = Agent::configure(mesh.host("imposter")?, "host = \"db-1\"\n")?;
    again.command(&["status"])?.refused()?;
    mesh.finish()
}

/// A folder as systemd makes it for a service, with this as its enrollment token.
fn credentials(agent: &Agent, token: &str) -> Result<(String, String)> {
    let folder = agent.state().with_extension("credentials");
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join("cloison.token"), token)?;
    Ok(("CREDENTIALS_DIRECTORY".to_owned(), folder.display().to_string()))
}

#[test]
fn a_service_enrolls_by_itself_with_the_token_that_it_is_given_as_a_credential() -> Result<()> {
    let mut mesh = Mesh::builder("e2e-credential", &["first", "second"]).start()?;
    let token = mesh.coordinator.token("first")?;
    let credential = credentials(mesh.agent("first")?, &token)?;
    mesh.coordinator.kill()?;
    let agent = mesh.agent_mut("first")?;
    agent.set_environment([credential]);
    agent.manage(Duration::from_secs(10))?;
    agent.launch()?;
    // No coordinator in reach: it waits, says so, and asks for more time.
    agent.process()?.wait_for_line("not enrolled yet", RACE_LIMIT)?;
    let said = |mesh: &Mesh, what: &str| -> Result<bool> {
        let manager = mesh.agent("first")?.manager()?;
        Ok(manager.said().iter().any(|(_, line)| line.starts_with(what)))
    };
    ensure!(!said(&mesh, "READY=1")?);
    mesh.coordinator.serve()?;
    wait_for("the host to be enrolled and ready", RACE_LIMIT, || {
        Ok(said(&mesh, "READY=1")?.then_some(()))
    })?;
    ensure!(said(&mesh, "EXTEND_TIMEOUT_USEC=")? && said(&mesh, "STATUS=not enrolled yet")?);
    ensure!(hosts(&mesh.coordinator)? == ["first"]);

    // The same host may use its token again for a while: a start that was cut off before anything was kept is repeated.
    mesh.agent_mut("first")?.kill()?;
    std::fs::remove_file(mesh.agent("first")?.state().join("membership"))?;
    mesh.agent_mut("first")?.start()?;
    ensure!(hosts(&mesh.coordinator)? == ["first"]);

    // Another host may not, and neither helps a text that is no token: only a person can change that, and the exit status says so.
    let refused = credentials(mesh.agent("second")?, &token)?;
    let folder = mesh.agent("second")?.state().with_extension("credentials");
    mesh.agent_mut("second")?.set_environment([refused]);
    for (content, says) in [
        (token.as_str(), "enroll_denied"),
        ("cloison1_nothing", "no enrollment token"),
        ("", "nothing in it"),
    ] {
        std::fs::write(folder.join("cloison.token"), content)?;
        let ended = mesh.agent("second")?.command(&["run"])?;
        ensure!(ended.status.code() == Some(78) && ended.stderr.contains(says), "{ended:?}");
        ensure!(!ended.stderr.contains(&token), "the token was printed");
    }
    mesh.finish()
}
