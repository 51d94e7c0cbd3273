//! `make demo`: the mesh on one machine, on real traffic, narrated.
//!
//! A coordinator and four hosts in network namespaces; a real PostgreSQL as component `postgres` on db-1, its client `n8n` on app-1, and
//! an unpaired `rogue` on app-2; and on all-1 a workflow, an untrusted runner and a PostgreSQL side by side. Each step states what it expects, and the demo fails if that is not what happens. It leaves nothing behind;
//! with `KEEP=1` the mesh goes on running, and the last lines say how to play with it.

#![forbid(unsafe_code)]

use std::io::{IsTerminal, stdout};
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Parser;
use cloison_tests::lab::cgroup::Cgroup;
use cloison_tests::lab::host::Host;
use cloison_tests::lab::mesh::{Instance, Mesh};
use cloison_tests::lab::postgres::{self, Postgres};
use cloison_tests::lab::process::{self, Finished, Process};
use cloison_tests::lab::tool::Tool;
use cloison_tests::lab::{cleanup, programs, wait_for};

const NAME: &str = "demo";
const HOSTS: [&str; 4] = ["db-1", "app-1", "app-2", "all-1"];
/// Something else that listens on db-1, and that no rule names.
const OTHER_PORT: u16 = 6000;
/// Who runs what nobody trusts on all-1.
const RUNNER: &str = "www-data";
/// What postgres is called on every host that may reach it.
const BY_NAME: &str = "postgres.cloison.internal";
const CUT_LIMIT: Duration = Duration::from_secs(10);

const COMPONENTS: &str = "\
version: 1
components:
  postgres: {on: db-1,  attach: host, services: {sql: tcp/5432}}
  n8n:      {on: app-1, attach: host}
  rogue:    {on: app-2, attach: host}
";
const RULE: &str = "\
allow:
  - n8n -> postgres:sql
";

/// Shows the mesh on this machine, on real traffic: a coordinator and four hosts in network namespaces, with a real PostgreSQL.
///
/// It takes no arguments, has to run as root, and leaves nothing behind. With KEEP=1 in the environment it leaves the mesh running to play on;
/// `make clean-lab` ends that, and every other lab on this machine.
#[derive(Debug, Parser)]
struct Arguments {}

fn main() -> ExitCode {
    Arguments::parse();
    let keep = std::env::var_os("KEEP").is_some_and(|v| !v.is_empty() && v != "0");
    cleanup::on_interrupt(NAME);
    match run(keep) {
        Ok(()) => ExitCode::SUCCESS,
        // The thread that cleans up ends the program.
        Err(_) if cleanup::interrupted() => loop {
            std::thread::park();
        },
        Err(error) => {
            eprintln!("\nthe demo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The demo, from the first line to the last.
fn run(keep: bool) -> Result<()> {
    let story = Story::new();
    let start = Instant::now();
    let mut mesh = lay_out(&story, keep)?;
    let addresses = Addresses::of(&mesh)?;
    let server = start_postgres(&story, &mesh, &addresses)?;
    query_goes_through(&story, &mesh, &addresses)?;
    rogue_is_refused(&story, &mesh, &addresses, &server)?;
    explain_both(&story, &mesh)?;
    other_port_is_refused(&story, &mesh, &addresses)?;
    rule_removed_cuts(&story, &mesh, &addresses, &server)?;
    let ledger = one_host_three_components(&story, &mesh)?;
    mesh_outlives_its_coordinator(&story, &mut mesh)?;
    story.say(&format!("\nAll of this took {:.0} s.", start.elapsed().as_secs_f64()));
    if !keep {
        drop((server, ledger));
        mesh.finish()?;
        story.say("Everything that the demo made is gone again. `KEEP=1 make demo` leaves it running to play on.");
        return Ok(());
    }
    mesh.coordinator.serve()?;
    mesh.wait_until_applied()?;
    instructions(&story, &mesh, &addresses)?;
    mesh.leave_running()
}

/// The overlay addresses of the three instances.
struct Addresses {
    postgres: Instance,
    n8n: Instance,
    rogue: Instance,
}

impl Addresses {
    fn of(mesh: &Mesh) -> Result<Self> {
        Ok(Self {
            postgres: mesh.instance("postgres", "db-1")?,
            n8n: mesh.instance("n8n", "app-1")?,
            rogue: mesh.instance("rogue", "app-2")?,
        })
    }
}

fn lay_out(story: &Story, keep: bool) -> Result<Mesh> {
    story.title("A coordinator and four hosts, each a network namespace on one wire");
    let mut mesh = Mesh::builder(NAME, &HOSTS).lab(|lab| lab.keep(keep)).start()?;
    story.command("cloison-coordinator init && cloison-coordinator serve");
    for host in HOSTS {
        let token = mesh.coordinator.token(host)?;
        story.command(&format!(
            "cloison token create --host {host} > token;  cloison-agent join --token-file token  # on {host}"
        ));
        let joined = mesh.agent(host)?.join(&token)?.ok()?;
        story.output(joined.stdout.lines().next().unwrap_or_default());
        mesh.agent_mut(host)?.start()?;
    }
    story.say("\nThe policy: three components, and one rule. What no rule names is denied.\n");
    let policy = format!("{COMPONENTS}{RULE}");
    story.output(&policy);
    story.command("cloison policy apply policy.yaml --wait");
    mesh.coordinator.apply_and_wait(&policy)?;
    story.command("cloison host list");
    story.output(&mesh.coordinator.cli(&["host", "list"])?.ok()?.stdout);
    Ok(mesh)
}

fn start_postgres(story: &Story, mesh: &Mesh, addresses: &Addresses) -> Result<Postgres> {
    story.title("A real PostgreSQL on db-1, listening on nothing but its overlay addresses");
    let server = Postgres::start(mesh.host("db-1")?, &addresses.postgres.addresses())?;
    story.say(&format!(
        "postgres listens on {} and {}.",
        addresses.postgres.v4, addresses.postgres.v6
    ));
    Ok(server)
}

fn query_goes_through(story: &Story, mesh: &Mesh, addresses: &Addresses) -> Result<()> {
    story.title("n8n on app-1 asks for postgres by name: the rule allows it, so its agent has put the name into /etc/hosts");
    let app = mesh.host("app-1")?;
    wait_for("the name in the hosts file", CUT_LIMIT, || {
        Ok(block(app)?.contains(BY_NAME).then_some(()))
    })?;
    story.command("cat /etc/hosts  # on app-1");
    story.output(&block(app)?);
    let sql = "select 'n8n is ' || inet_client_addr() || ', postgres is ' || inet_server_addr()";
    story.command(&format!("psql -h {BY_NAME} -c \"{sql}\"  # on app-1"));
    let answer = postgres::query(app.net(), BY_NAME, sql, 5)?.ok()?;
    story.output(&answer.stdout);
    let own = addresses.n8n.addresses().map(|a| a.to_string());
    ensure!(
        own.iter().any(|source| answer.stdout.contains(source)),
        "the server saw another client than {own:?}: {}",
        answer.stdout
    );
    story.done(&format!(
        "{} ms, through the mesh; the server sees n8n's own address",
        answer.took.as_millis()
    ));
    Ok(())
}

/// The agent's block in a host's hosts file.
fn block(host: &Host) -> Result<String> {
    let text = std::fs::read_to_string(host.hosts_file())?;
    Ok(text
        .lines()
        .skip_while(|l| !l.starts_with("# BEGIN"))
        .collect::<Vec<_>>()
        .join("\n"))
}

fn rogue_is_refused(story: &Story, mesh: &Mesh, addresses: &Addresses, server: &Postgres) -> Result<()> {
    story.title("rogue on app-2 asks: no rule pairs it with postgres");
    let (db, app) = (mesh.host("db-1")?, mesh.host("app-2")?);
    let clients_before = server.clients_seen();
    let wire = db.capture_wire()?;
    story.command(&format!("psql -h {BY_NAME} -c 'select 1'  # on app-2"));
    let unknown = postgres::query(app.net(), BY_NAME, "select 1", 5)?.refused()?;
    story.output(&unknown.stderr);
    ensure!(
        block(app)?.contains("rogue") && !block(app)?.contains("postgres"),
        "{}",
        block(app)?
    );
    story.done("app-2 does not even know the name; so rogue tries the addresses, which somebody has told it");
    for address in addresses.postgres.addresses() {
        story.command(&format!("psql -h {address} -c 'select 1'  # on app-2"));
        let refused = postgres::query(app.net(), address, "select 1", 5)?.refused()?;
        story.output(&refused.stderr);
        ensure!(refused.took < Duration::from_secs(2), "the refusal took {:?}", refused.took);
        story.done(&format!("refused at once: {} ms", refused.took.as_millis()));
    }
    story.command("cloison-agent explain postgres:sql --from rogue  # on app-2: what its own agent says");
    let own = mesh
        .agent("app-2")?
        .command(&["explain", "postgres:sql", "--from", "rogue"])?
        .refused()?;
    story.output(&(own.stdout + &own.stderr));
    let recording = wire.stop()?;
    let from_app_2 = app.addresses().into_iter().map(|a| recording.with_address(a)).sum::<usize>();
    let of_rogue = addresses.rogue.addresses().into_iter().filter(|a| recording.mentions(*a)).count();
    ensure!(from_app_2 == 0 && of_rogue == 0, "{from_app_2} datagrams of app-2 reached db-1");
    ensure!(server.clients_seen() == clients_before, "the server saw a client");
    story.done("a capture on db-1's wire, all the while: 0 datagrams from app-2");
    Ok(())
}

fn explain_both(story: &Story, mesh: &Mesh) -> Result<()> {
    story.title("Why? Ask the coordinator");
    for (from, expected) in [("n8n", true), ("rogue", false)] {
        story.command(&format!("cloison explain {from} postgres:sql"));
        let answer = mesh.coordinator.cli(&["explain", from, "postgres:sql"])?;
        story.output(&answer.stdout);
        ensure!(answer.status.success() == expected, "{answer:?}");
    }
    Ok(())
}

fn other_port_is_refused(story: &Story, mesh: &Mesh, addresses: &Addresses) -> Result<()> {
    story.title("app-1 tries another port of db-1: something listens there, but no rule names it");
    let at = SocketAddr::new(IpAddr::V4(addresses.postgres.v4), OTHER_PORT);
    let mut other = Tool::tcp_listen(mesh.host("db-1")?.net(), at)?;
    let local = Tool::tcp_attempt(mesh.host("db-1")?.net(), at, CUT_LIMIT)?;
    ensure!(local.what == "received", "nobody listens on {at}: {local:?}");
    story.command(&format!("nc -v {} {OTHER_PORT}  # on app-1", at.ip()));
    let start = Instant::now();
    let refused = Tool::tcp_attempt(mesh.host("app-1")?.net(), at, CUT_LIMIT)?;
    ensure!(refused.what == "failed", "{refused:?}");
    story.done(&format!(
        "{} after {} ms; from db-1 itself the same port answers",
        refused.kind(),
        start.elapsed().as_millis()
    ));
    other.process().stop()?;
    Ok(())
}

fn rule_removed_cuts(story: &Story, mesh: &Mesh, addresses: &Addresses, server: &Postgres) -> Result<()> {
    story.title("A session is open, and its rule goes away");
    let address = IpAddr::V4(addresses.postgres.v4);
    story.command(&format!(
        "psql -h {BY_NAME} -c 'select now() \\watch 0.1'  # on app-1, goes on and on"
    ));
    let mut client = watching_client(mesh)?;
    let disconnects_before = cut_clients(server);
    story.command("cloison policy apply policy-without-the-rule.yaml");
    let answered = mesh.coordinator.apply(COMPONENTS)?;
    let (mut at_client, mut at_server) = (None, None);
    let (at_client, at_server) = wait_for("both ends to be cut", CUT_LIMIT, || {
        if at_client.is_none() && client.ended()?.is_some_and(|status| !status.success()) {
            at_client = Some(answered.elapsed()?.as_millis());
        }
        if at_server.is_none() && cut_clients(server) > disconnects_before {
            at_server = Some(answered.elapsed()?.as_millis());
        }
        Ok(at_client.zip(at_server))
    })?;
    story.output(client.log().lines().next().unwrap_or_default());
    story.output(server.log().lines().rfind(|l| l.contains("reset by peer")).unwrap_or_default());
    story.done(&format!(
        "cut at both ends: {at_client} ms after the API's answer psql had ended, {at_server} ms after it the server had noticed"
    ));
    let refused = postgres::query(mesh.host("app-1")?.net(), address, "select 1", 5)?.refused()?;
    story.done(&format!("a new attempt is refused in {} ms", refused.took.as_millis()));
    story.say("\nThe rule comes back:");
    story.command("cloison policy apply policy.yaml --wait");
    mesh.coordinator.apply_and_wait(&format!("{COMPONENTS}{RULE}"))?;
    let app = mesh.host("app-1")?;
    wait_for("the name in the hosts file", CUT_LIMIT, || {
        Ok(block(app)?.contains(BY_NAME).then_some(()))
    })?;
    postgres::query(app.net(), BY_NAME, "select 1", 5)?.ok()?;
    story.done("n8n reaches postgres again");
    Ok(())
}

/// A psql on app-1 that asks ten times a second, once it has its first answer.
fn watching_client(mesh: &Mesh) -> Result<Process> {
    let app = mesh.host("app-1")?;
    let script = app.folder().join("watch.sql");
    std::fs::write(&script, "select now() \\watch 0.1\n")?;
    let mut command = app.net().command("psql");
    command.args([
        "-X",
        "-q",
        "-A",
        "-t",
        "-h",
        BY_NAME,
        "-U",
        "postgres",
        "-v",
        "ON_ERROR_STOP=1",
        "-f",
    ]);
    command.arg(&script).arg("postgres");
    let mut client = app.net().start("psql", command)?;
    client.wait_for_line(":", Duration::from_secs(10))?;
    Ok(client)
}

/// How many of the server's sessions ended by a reset.
fn cut_clients(server: &Postgres) -> usize {
    server.log().lines().filter(|l| l.contains("Connection reset by peer")).count()
}

/// Three components on one machine: a service's cgroup, an untrusted user, and a database.
fn one_host_three_components(story: &Story, mesh: &Mesh) -> Result<Postgres> {
    story.title("All on one machine: on all-1, a workflow, its untrusted runner and a PostgreSQL share one network namespace");
    let host = mesh.host("all-1")?;
    let service = Cgroup::create(host, "workflow.service")?;
    let components = format!(
        "  workflow: {{on: all-1, attach: {{cgroup: {:?}}}}}\n  runner:   {{on: all-1, attach: {{user: {RUNNER}}}}}\n  ledger:   {{on: all-1, attach: {{user: postgres}}, services: {{sql: tcp/5432}}}}\n",
        service.path()
    );
    let policy = format!("{COMPONENTS}{components}{RULE}  - workflow -> ledger:sql\n");
    story.output(&components);
    story.output("allow:\n  - workflow -> ledger:sql");
    mesh.coordinator.apply_and_wait(&policy)?;
    let (workflow, ledger) = (mesh.instance("workflow", "all-1")?, mesh.instance("ledger", "all-1")?);
    let server = Postgres::start(host, &ledger.addresses())?;
    server.admit_only(&workflow.addresses())?;
    story.say(&format!(
        "Its pg_hba.conf admits {} and {}, and nobody else.",
        workflow.v4, workflow.v6
    ));
    story.command("cloison-agent status  # on all-1");
    let status = mesh.agent("all-1")?.command(&["status"])?.ok()?.stdout;
    status.lines().filter(|l| l.contains("bound: ")).for_each(|line| story.output(line));
    for address in ledger.addresses() {
        story.command(&format!("psql -h {address} -c 'select inet_client_addr()'  # in workflow's cgroup"));
        let answer = postgres::query_by(service.command("psql"), address, "select inet_client_addr()", 5)?.ok()?;
        story.output(&answer.stdout);
        ensure!(
            workflow.addresses().iter().any(|own| answer.stdout.trim() == own.to_string()),
            "{}",
            answer.stdout
        );
    }
    story.done("the same machine, and the server sees the workflow's own address");
    let clients = server.clients_seen();
    for (who, mut command) in [
        ("runner", host.net().command_as(RUNNER, "psql")),
        ("root of that machine, in no service", host.net().command("psql")),
    ] {
        command.env("PGAPPNAME", "intruder");
        story.command(&format!("psql -h {} -c 'select 1'  # {who}", ledger.v4));
        let refused = postgres::query_by(command, ledger.v4, "select 1", 5)?.refused()?;
        story.output(&refused.stderr);
        story.done(&format!("refused in {} ms", refused.took.as_millis()));
    }
    story.command(&format!(
        "nc -s {} {} 5432  # runner takes the workflow's address",
        workflow.v4, ledger.v4
    ));
    let mut forger = host.net().command_as(RUNNER, "nc");
    forger.args(["-v", "-w", "3", "-s", &workflow.v4.to_string(), &ledger.v4.to_string(), "5432"]);
    let forged = process::run(forger, CUT_LIMIT)?.refused()?;
    story.output(&forged.stderr);
    ensure!(server.clients_seen() == clients, "an intruder reached the server: {}", server.log());
    story.done("the kernel knows whose socket it is: nothing left it, and the server saw nobody");
    Ok(server)
}

fn mesh_outlives_its_coordinator(story: &Story, mesh: &mut Mesh) -> Result<()> {
    story.title("The coordinator stops, and the pair goes on talking");
    mesh.coordinator.stop()?;
    ensure!(mesh.coordinator.cli(&["status"])?.refused().is_ok());
    story.done("the coordinator is down");
    let report: Finished = {
        let filled = postgres::fill(mesh.host("app-1")?.net(), BY_NAME, 1)?;
        story.command(&format!("pgbench -i && pgbench -T 3 -c 2 -h {BY_NAME}  # on app-1"));
        filled.ok()?;
        postgres::bench(mesh.host("app-1")?.net(), BY_NAME, 3, &["-c", "2"])?.ok()?
    };
    for line in report
        .stdout
        .lines()
        .filter(|l| l.starts_with("number of transactions") || l.starts_with("number of failed") || l.starts_with("tps"))
    {
        story.output(line);
    }
    ensure!(report.stdout.contains("number of failed transactions: 0"), "{}", report.stdout);
    story.done("0 failed transactions without a coordinator; it goes on like this until the lease ends (24 h)");
    Ok(())
}

fn instructions(story: &Story, mesh: &Mesh, addresses: &Addresses) -> Result<()> {
    story.title("KEEP=1: it is all still running");
    let enter = |host: &str| -> Result<String> { Ok(format!("nsenter --net={}", mesh.host(host)?.net().path().display())) };
    let cli = format!(
        "{} {} --config {}",
        enter("coordinator")?,
        programs::find("cloison")?.display(),
        mesh.coordinator.cli_config().display()
    );
    let agent = |host: &str, command: &str| -> Result<String> {
        let config = mesh.agent(host)?.config();
        Ok(format!(
            "{} {} {command} --config {}",
            enter(host)?,
            programs::find("cloison-agent")?.display(),
            config.display()
        ))
    };
    let policy = mesh.host("coordinator")?.folder().join("policy.yaml");
    // Its own hosts file is part of a host, so that names work.
    let on = |host: &str| -> Result<String> {
        let hosts = mesh.host(host)?.hosts_file().display().to_string();
        Ok(format!(
            "{} unshare --mount sh -c 'mount --bind {hosts} /etc/hosts && exec \"$@\"' sh",
            enter(host)?
        ))
    };
    let lines = [
        ("a query of n8n", format!("{} psql -h {BY_NAME} -U postgres", on("app-1")?)),
        (
            "a refused one of rogue",
            format!("{} psql -h {} -U postgres", on("app-2")?, addresses.postgres.v4),
        ),
        ("the operator's view", format!("{cli} status")),
        ("why", format!("{cli} explain rogue postgres:sql")),
        (
            "another policy",
            format!("$EDITOR {0}; {cli} policy apply {0} --wait", policy.display()),
        ),
        ("an agent's view", agent("app-1", "status")?),
        ("all logs", mesh.lab().folder().join("logs").display().to_string()),
        (
            "the end, of this and of every other lab on this machine",
            "make clean-lab".to_owned(),
        ),
    ];
    for (what, line) in lines {
        story.say(&format!("{what}:"));
        story.output(&line);
    }
    Ok(())
}

/// The narration: plain lines, in colour only on a terminal.
struct Story {
    colour: bool,
    step: std::cell::Cell<u32>,
}

impl Story {
    fn new() -> Self {
        Self {
            colour: stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
            step: std::cell::Cell::new(0),
        }
    }

    fn title(&self, text: &str) {
        self.step.set(self.step.get() + 1);
        println!("\n{}", self.in_colour("1;36", &format!("{}. {text}", self.step.get())));
    }

    fn say(&self, text: &str) {
        println!("{text}");
    }

    fn command(&self, line: &str) {
        println!("{}", self.in_colour("1", &format!("   $ {line}")));
    }

    fn output(&self, text: &str) {
        text.lines().filter(|l| !l.trim().is_empty()).for_each(|l| println!("     {l}"));
    }

    fn done(&self, text: &str) {
        println!("   {} {text}", self.in_colour("32", "ok"));
    }

    fn in_colour(&self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}
