//! Names over DNS: what real clients are told in the namespaces of a host, and what they are not.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cloison_tests::lab::dns::{Answer, ask, attempt, getent};
use cloison_tests::lab::host::Host;
use cloison_tests::lab::mesh::{COORDINATOR, Mesh};
use cloison_tests::lab::netns::{self, Netns};
use cloison_tests::lab::process;
use cloison_tests::lab::tool::Tool;
use cloison_tests::lab::wait_for;

const LIMIT: Duration = Duration::from_secs(10);

/// The resolver's addresses, by the agent's own word.
fn resolver(mesh: &Mesh) -> Result<[IpAddr; 2]> {
    let status = mesh.agent("app-1")?.status()?;
    let address =
        |index: usize| Ok::<IpAddr, anyhow::Error>(status["resolver"]["addresses"][index].as_str().context("no address")?.parse()?);
    Ok([address(0)?, address(1)?])
}

/// The policy of all tests here: `front` and `other` live in namespaces of app-1 and `local` is the rest of it; each may reach another one.
fn policy(app: &Host) -> Result<(Netns, Netns, String)> {
    let (front, other) = (app.component_namespace("front")?, app.component_namespace("other")?);
    let text = format!(
        "version: 1\ncomponents:\n  \
           front:    {{on: app-1, attach: {{netns: {}}}}}\n  \
           other:    {{on: app-1, attach: {{netns: {}}}, services: {{web: tcp/80}}}}\n  \
           local:    {{on: app-1, attach: host}}\n  \
           postgres: {{on: [db-1, db-2], attach: host, services: {{sql: tcp/5432}}}}\n  \
           redis:    {{on: db-1, attach: {{netns: /run/netns/nowhere-1}}, services: {{store: tcp/6379}}}}\n  \
           secret:   {{on: db-2, attach: {{netns: /run/netns/nowhere-2}}, services: {{api: tcp/1}}}}\n\
         allow:\n  - front -> postgres:sql\n  - front -> other:web\n  - other -> redis:store\n  - local -> secret:api\n",
        front.path().display(),
        other.path().display(),
    );
    Ok((front, other, text))
}

fn start(name: &str) -> Result<(Mesh, Netns, Netns, String)> {
    let mut mesh = Mesh::builder(name, &["app-1", "db-1", "db-2"]).start()?;
    let (front, other, policy) = policy(mesh.host("app-1")?)?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(&policy)?;
    Ok((mesh, front, other, policy))
}

fn told(answer: &Answer, kind: &str) -> Vec<IpAddr> {
    let mut told: Vec<IpAddr> = answer.data(kind).iter().filter_map(|data| data.parse().ok()).collect();
    told.sort();
    told
}

/// What clients take for no such name, with nothing that tells one such name from another.
fn is_unknown(answer: &Answer) -> bool {
    let head = ["cloison.internal.", "SOA", "nobody.invalid."];
    answer.status == "NXDOMAIN"
        && answer.answers.is_empty()
        && answer.flags == ["qr", "aa", "rd"]
        && matches!(answer.authority.as_slice(), [line] if head.iter().all(|word| line.contains(word)))
}

#[test]
fn each_namespace_is_told_what_its_own_component_may_reach_and_no_more() -> Result<()> {
    let (mesh, front, other, _) = start("e2e-dns")?;
    let host = mesh.host("app-1")?.net();
    let (one, two) = (mesh.instance("postgres", "db-1")?, mesh.instance("postgres", "db-2")?);
    for (server, how) in resolver(&mesh)?
        .into_iter()
        .zip(["+notcp", "+tcp"])
        .flat_map(|(s, _)| [(s, "+notcp"), (s, "+tcp")])
    {
        for (kind, mut wanted) in [("A", [IpAddr::V4(one.v4), two.v4.into()]), ("AAAA", [one.v6.into(), two.v6.into()])] {
            wanted.sort();
            let answer = ask(&front, server, &format!("postgres.cloison.internal {kind} {how}"))?;
            ensure!(told(&answer, kind) == wanted && answer.status == "NOERROR", "{}", answer.text);
            ensure!(answer.flags == ["qr", "aa", "rd"], "no recursion is offered:\n{}", answer.text);
        }
        let own = ask(&front, server, &format!("front.app-1.cloison.internal A {how}"))?;
        ensure!(told(&own, "A") == [IpAddr::V4(mesh.instance("front", "app-1")?.v4)], "{}", own.text);
        let neighbour = ask(&front, server, &format!("other.cloison.internal A {how}"))?;
        ensure!(
            told(&neighbour, "A") == [IpAddr::V4(mesh.instance("other", "app-1")?.v4)],
            "{}",
            neighbour.text
        );
        let back = ask(&front, server, &format!("-x {} {how}", one.v6))?;
        ensure!(back.data("PTR") == ["postgres.db-1.cloison.internal."], "{}", back.text);
        let outside = ask(&front, server, &format!("example.org A {how}"))?;
        ensure!(outside.status == "REFUSED" && outside.answers.is_empty(), "{}", outside.text);
        // Denied, another's, and not there at all: one answer.
        for (net, names) in [
            (&front, ["redis", "secret", "local", "front.db-1", "never-was"]),
            (&other, ["postgres", "front", "secret", "postgres.db-1", "never-was"]),
            (host, ["redis", "postgres", "front", "other", "never-was"]),
        ] {
            let shapes = names.map(|name| ask(net, server, &format!("{name}.cloison.internal A {how}")));
            for (name, answer) in names.iter().zip(shapes) {
                let answer = answer?;
                ensure!(is_unknown(&answer), "{name}: {}", answer.text);
            }
        }
        ensure!(is_unknown(&ask(&other, server, "x.cloison.internal AAAA")?));
        let back = ask(&other, server, &format!("-x {} {how}", one.v4))?;
        ensure!(back.status == "NXDOMAIN", "{}", back.text);
    }
    let [v4, _] = resolver(&mesh)?;
    ensure!(told(&ask(&other, v4, "redis.cloison.internal A")?, "A") == [IpAddr::V4(mesh.instance("redis", "db-1")?.v4)]);
    ensure!(told(&ask(host, v4, "secret.cloison.internal A")?, "A") == [IpAddr::V4(mesh.instance("secret", "db-2")?.v4)]);
    let status = mesh.agent("app-1")?.status()?;
    let namespaces = status["resolver"]["namespaces"].as_array().context("no namespaces")?;
    ensure!(
        namespaces.len() == 3 && namespaces.iter().all(|at| at["why_not"].is_null()),
        "{status}"
    );
    mesh.finish()
}

#[test]
fn programs_find_names_with_one_line_in_a_resolver_file_and_go_on_to_the_next_server_for_others() -> Result<()> {
    let (mesh, front, _other, _) = start("e2e-dns-getent")?;
    let one = mesh.instance("postgres", "db-1")?;
    for server in resolver(&mesh)? {
        let found = getent(&front, &[server], "ahosts", "postgres.db-1.cloison.internal")?.ok()?.stdout;
        ensure!(
            one.addresses().iter().all(|address| found.contains(&address.to_string())),
            "{found}"
        );
        let back = getent(&front, &[server], "hosts", &one.v4.to_string())?.ok()?.stdout;
        ensure!(back.contains("postgres.db-1.cloison.internal"), "{back}");
        ensure!(!getent(&front, &[server], "ahosts", "redis.cloison.internal")?.status.success());
    }
    // Another server in the same namespace, which knows one name and answers everything with it.
    let [v4, _] = resolver(&mesh)?;
    let next: IpAddr = [127, 0, 0, 1].into();
    let answered = front.enter(move || Ok(UdpSocket::bind((next, 53))?))?;
    std::thread::spawn(move || {
        let mut question = [0; 512];
        while let Ok((length, from)) = answered.recv_from(&mut question) {
            let mut answer = question.get(..length).unwrap_or_default().to_vec();
            let end = answer.iter().skip(12).position(|byte| *byte == 0).map_or(length, |at| 12 + at + 5);
            let is_a = answer.get(end - 3) == Some(&1);
            answer.truncate(end);
            let head = [0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0];
            answer.iter_mut().skip(2).zip(head).for_each(|(byte, value)| *byte = value);
            if is_a {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 192, 0, 2, 99]);
            }
            let _ = answered.send_to(&answer, from);
        }
    });
    let begun = Instant::now();
    let outside = getent(&front, &[v4, next], "ahosts", "example.org")?.ok()?.stdout;
    ensure!(
        outside.contains("192.0.2.99") && begun.elapsed() < Duration::from_secs(2),
        "{outside}"
    );
    // A name of the mesh that may not be told is not asked of the next one, who would lie about it.
    let denied = getent(&front, &[v4, next], "ahosts", "redis.cloison.internal")?;
    ensure!(
        !denied.status.success() && !denied.stdout.contains("192.0.2.99"),
        "{}",
        denied.stdout
    );
    mesh.finish()
}

#[test]
fn components_that_share_the_host_ask_one_resolver_and_meet_nothing_else_there() -> Result<()> {
    let mut mesh = Mesh::builder("e2e-dns-shared", &["app-1", "db-1"]).start()?;
    let policy = "version: 1\ncomponents:\n  \
           batch:    {on: app-1, attach: {user: daemon}}\n  \
           local:    {on: app-1, attach: host}\n  \
           postgres: {on: db-1, attach: host, services: {sql: tcp/5432}}\n\
         allow:\n  - batch -> postgres:sql\n";
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(policy)?;
    let host = mesh.host("app-1")?.net();
    for server in resolver(&mesh)? {
        for how in ["+notcp", "+tcp"] {
            for user in ["daemon", "root"] {
                let mut command = host.command_as(user, "kdig");
                command.args([
                    &format!("@{server}"),
                    "+timeout=2",
                    "+retry=0",
                    how,
                    "postgres.cloison.internal",
                    "A",
                ]);
                let said = process::run(command, LIMIT)?.stdout;
                ensure!(said.contains("NOERROR"), "{user} at {server} {how}: {said}");
            }
        }
        let any = if server.is_ipv4() { "0.0.0.0" } else { "::" };
        let mut on_all = Tool::tcp_listen(host, SocketAddr::new(any.parse()?, 8080))?;
        let event = Tool::tcp_attempt(host, SocketAddr::new(server, 8080), Duration::from_secs(1))?;
        ensure!(event.what == "failed", "{event:?}");
        on_all.process().stop()?;
    }
    mesh.finish()
}

#[test]
fn a_name_goes_with_its_rule_and_with_the_lease_and_comes_back_with_the_agent() -> Result<()> {
    let (mut mesh, front, _other, policy) = start("e2e-dns-life")?;
    let [v4, v6] = resolver(&mesh)?;
    let name = "postgres.cloison.internal A";
    // A view is acknowledged when it is in force; its names come with the lease, which is a moment later on a busy machine.
    let both = || {
        wait_for("the name of both", LIMIT, || {
            Ok((told(&ask(&front, v4, name)?, "A").len() == 2).then_some(()))
        })
    };
    both()?;
    mesh.coordinator.apply_and_wait(&policy.replace("[db-1, db-2]", "db-2"))?;
    wait_for("the name of one", LIMIT, || {
        let told = told(&ask(&front, v4, name)?, "A").len();
        ensure!(told < 2, "the view is acknowledged, and so is the name gone");
        Ok((told == 1).then_some(()))
    })?;
    mesh.coordinator
        .apply_and_wait(&policy.replace("  - front -> postgres:sql\n", ""))?;
    for server in [v4, v6] {
        let answer = ask(&front, server, name)?;
        ensure!(is_unknown(&answer), "cut with its rule: {}", answer.text);
    }
    mesh.coordinator.apply_and_wait(&policy)?;
    both()?;

    mesh.agent_mut("app-1")?.kill()?;
    let silent = attempt(&front, v4, name)?;
    ensure!(!silent.stdout.contains("status:"), "nobody answers: {}", silent.stdout);
    mesh.agent_mut("app-1")?.start()?;
    wait_for("the name after a restart", LIMIT, || {
        let answer = attempt(&front, v4, name)?;
        Ok(answer.stdout.contains("NOERROR").then_some(()))
    })?;
    // Nothing holds a namespace whose component is gone.
    mesh.coordinator.apply_and_wait("version: 1\ncomponents: {}\n")?;
    let (gone, inode) = (front.name().to_owned(), netns::inode(front.name())?);
    netns::delete(&gone)?;
    wait_for(
        "the sockets in the namespace to go",
        LIMIT,
        || Ok((!is_alive(inode)?).then_some(())),
    )?;
    mesh.finish()
}

/// Whether some process or some file descriptor of the agents is in this namespace, by what the kernel lists.
fn is_alive(inode: u64) -> Result<bool> {
    let listed = std::process::Command::new("lsns").args(["-t", "net", "-n", "-o", "NS"]).output()?;
    Ok(String::from_utf8_lossy(&listed.stdout)
        .lines()
        .any(|line| line.trim() == inode.to_string()))
}

#[test]
fn who_asks_from_outside_gets_nothing_and_the_address_is_good_for_nothing_else() -> Result<()> {
    let (mesh, front, other, _) = start("e2e-dns-outside")?;
    let app = mesh.host("app-1")?;
    let stranger = mesh.host(COORDINATOR)?.net();
    for (server, gateway) in resolver(&mesh)?.into_iter().zip(app.addresses()) {
        // A neighbour who leads the resolver's address to this host.
        stranger
            .run(&[
                "ip",
                "route",
                "replace",
                &server.to_string(),
                "via",
                &gateway.to_string(),
                "dev",
                "eth0",
            ])?
            .ok()?;
        for how in ["+notcp", "+tcp"] {
            let answer = attempt(stranger, server, &format!("secret.cloison.internal A {how}"))?;
            ensure!(!answer.stdout.contains("status:"), "{server} {how}: {}", answer.stdout);
        }
        // Even where the base table was taken away for a moment.
        app.net().nft("delete table inet cloison")?;
        let answer = attempt(stranger, server, "secret.cloison.internal A +notcp")?;
        ensure!(
            !answer.stdout.contains("status:"),
            "without the base table, {server}: {}",
            answer.stdout
        );
        wait_for("the base table", LIMIT, || {
            Ok(app
                .net()
                .run(&["nft", "list", "tables"])?
                .stdout
                .contains("inet cloison")
                .then_some(()))
        })?;
        // A server on all addresses is not met at the resolver's.
        let any = if server.is_ipv4() { "0.0.0.0" } else { "::" };
        for net in [&front, app.net()] {
            let mut server_on_all = Tool::tcp_listen(net, SocketAddr::new(any.parse()?, 8080))?;
            let event = Tool::tcp_attempt(net, SocketAddr::new(server, 8080), Duration::from_secs(1))?;
            ensure!(event.what == "failed", "{event:?}");
            server_on_all.process().stop()?;
        }
        ensure!(ask(&other, server, "redis.cloison.internal A")?.status == "NOERROR");
    }
    mesh.finish()
}

#[test]
fn who_floods_the_resolver_of_one_namespace_starves_no_other() -> Result<()> {
    let (mesh, front, other, _) = start("e2e-dns-flood")?;
    let [v4, _] = resolver(&mesh)?;
    let flood = front.enter(move || {
        let socket = UdpSocket::bind(("0.0.0.0", 0))?;
        socket.connect((v4, 53))?;
        let question = b"\0\x07\x01\0\0\x01\0\0\0\0\0\0\x08postgres\x07cloison\x08internal\0\0\x01\0\x01";
        let begun = Instant::now();
        let mut sent = 0_u64;
        while begun.elapsed() < Duration::from_secs(2) {
            sent += u64::from(socket.send(question).is_ok());
        }
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let mut answered = 0_u64;
        while socket.recv(&mut [0; 512]).is_ok() {
            answered += 1;
        }
        Ok((sent, answered))
    });
    let (sent, answered) = flood?;
    ensure!(sent > 20_000 && answered < 12_000, "{sent} questions, {answered} answers");
    let begun = Instant::now();
    ensure!(ask(&other, v4, "redis.cloison.internal A")?.status == "NOERROR" && begun.elapsed() < Duration::from_secs(1));
    mesh.finish()
}

#[test]
fn a_port_that_another_program_has_is_shown_and_taken_as_soon_as_it_is_free_and_the_setting_switches_it_off() -> Result<()> {
    let mut mesh = Mesh::builder("e2e-dns-taken", &["app-1", "db-1", "db-2"]).start()?;
    let (front, _other, policy) = policy(mesh.host("app-1")?)?;
    let taken = front.enter(|| Ok(UdpSocket::bind("0.0.0.0:53")?))?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(&policy)?;
    let [v4, _] = resolver(&mesh)?;
    let status = mesh.agent("app-1")?.command(&["status"])?.ok()?.stdout;
    ensure!(
        status.contains("another program uses port 53") && status.contains("warning: names are not answered"),
        "{status}"
    );
    let host = mesh.host("app-1")?.net();
    ensure!(
        ask(host, v4, "secret.cloison.internal A")?.status == "NOERROR",
        "the others are served"
    );
    drop(taken);
    wait_for("the names", LIMIT, || {
        Ok(attempt(&front, v4, "postgres.cloison.internal A")?
            .stdout
            .contains("NOERROR")
            .then_some(()))
    })?;
    let config = mesh.agent("app-1")?.config();
    std::fs::write(&config, std::fs::read_to_string(&config)? + "resolver = false\n")?;
    mesh.agent_mut("app-1")?.stop()?;
    mesh.agent_mut("app-1")?.start()?;
    mesh.wait_until_applied()?;
    ensure!(mesh.agent("app-1")?.status()?["resolver"]["state"] == "off");
    for net in [&front, mesh.host("app-1")?.net()] {
        ensure!(!attempt(net, v4, "secret.cloison.internal A")?.stdout.contains("status:"));
        let addresses = net.run(&["ip", "address", "show"])?.ok()?.stdout;
        ensure!(!addresses.contains(&v4.to_string()), "{addresses}");
    }
    mesh.finish()
}
