//! Components that are containers of a real Docker or Podman: attached when they start, isolated while they run, let go when they end.

#![forbid(unsafe_code)]

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cloison_tests::lab::docker::{Container, Kind, Runtime};
use cloison_tests::lab::mesh::{Instance, Mesh};
use cloison_tests::lab::tool::{Room, Tool};
use cloison_tests::lab::wait_for;
use serde_json::Value;

/// For what takes milliseconds on a quiet machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// For one attempt to connect.
const ATTEMPT: Duration = Duration::from_secs(3);
/// What the service manager of an agent wants to hear in.
const WATCHDOG: Duration = Duration::from_secs(10);
/// What the agent's unit with `attachments.conf` leaves of root.
const UNIT: &str = "net_admin,sys_admin";

/// n8n may reach postgres, and nobody may reach n8n.
const ONE_RULE: &str = "version: 1\ncomponents:\n  \
      n8n:      {on: app-1, attach: {container: docker:n8n}, services: {ui: tcp/5678}}\n  \
      postgres: {on: db-1,  attach: host, services: {sql: tcp/5432}}\n\
    allow:\n  - n8n -> postgres:sql\n";

/// A mesh of app-1, with Docker, and db-1.
fn one_docker(name: &str) -> Result<(Mesh, Runtime)> {
    let mesh = Mesh::builder(name, &["app-1", "db-1"]).start()?;
    let docker = Runtime::start(mesh.host("app-1")?, Kind::Docker)?;
    mesh.agent("app-1")?.add_settings(&docker.setting())?;
    Ok((mesh, docker))
}

/// What the agent of a host says of how a component is enforced.
fn enforcement(mesh: &Mesh, host: &str, component: &str) -> Result<String> {
    let status = mesh.agent(host)?.status()?;
    let all = status.get("instances").and_then(Value::as_array).context("no instances")?;
    let found = all.iter().find(|i| i.get("component").and_then(Value::as_str) == Some(component));
    Ok(found
        .context("no such instance")?
        .get("enforcement")
        .context("not said")?
        .to_string())
}

/// Waits until the agent says this of how a component is enforced.
fn wait_until(mesh: &Mesh, host: &str, component: &str, says: &str) -> Result<String> {
    let mut last = String::new();
    wait_for(&format!("{component} on {host}: {says}"), PATIENCE, || {
        last = enforcement(mesh, host, component)?;
        Ok(last.contains(says).then_some(()))
    })
    .with_context(|| format!("last it was {last}"))?;
    Ok(last)
}

/// Waits until this very run of a container is attached.
fn wait_until_attached(mesh: &Mesh, host: &str, component: &str, container: &Container) -> Result<()> {
    wait_until(mesh, host, component, &format!("pid {}\"", container.pid()?)).map(drop)
}

fn must_reach(from: &impl Room, to: SocketAddr) -> Result<()> {
    let event = Tool::tcp_attempt(from, to, ATTEMPT)?;
    ensure!(event.what == "received", "{to} was not reached: {event:?}");
    Ok(())
}

fn must_be_refused(from: &impl Room, to: SocketAddr) -> Result<()> {
    let event = Tool::tcp_attempt(from, to, ATTEMPT)?;
    ensure!(event.what == "failed" && event.kind() != "TimedOut", "{to}: {event:?}");
    Ok(())
}

/// What a container does that says how long it had no way to `to`: it waits for one, from its first moment on.
fn waiting(to: SocketAddr) -> String {
    format!(
        "date +%s%N; until ip route get {} 2>&1 | grep -q cloison0; do sleep 0.001; done; date +%s%N; sleep infinity",
        to.ip()
    )
}

/// How long a container waited at its last start.
fn waited(container: &Container) -> Result<Duration> {
    let log = container.cli(&["logs", "--tail", "2", container.name()])?.ok()?.stdout;
    let times = log.lines().map(str::parse).collect::<Result<Vec<u64>, _>>()?;
    let (first, last) = (times.first().context("no begin")?, times.last().context("no end")?);
    Ok(Duration::from_nanos(last - first))
}

/// Both families of two instances.
fn pairs(one: Instance, two: Instance) -> impl Iterator<Item = (IpAddr, IpAddr)> {
    one.addresses().into_iter().zip(two.addresses())
}

#[test]
fn containers_without_any_network_reach_what_their_components_may_on_their_host_and_on_others() -> Result<()> {
    let mut mesh = Mesh::builder("e2e-docker", &["app-1", "db-1"]).start()?;
    let runtimes = [
        Runtime::start(mesh.host("app-1")?, Kind::Docker)?,
        Runtime::start(mesh.host("db-1")?, Kind::Docker)?,
    ];
    let [app, db] = &runtimes;
    for (host, runtime) in [("app-1", app), ("db-1", db)] {
        mesh.agent(host)?.add_settings(&runtime.setting())?;
        mesh.agent_mut(host)?.confine(UNIT);
    }
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(
        "version: 1\ncomponents:\n  \
           n8n:      {on: app-1, attach: {container: docker:n8n}}\n  \
           web:      {on: app-1, attach: {container: docker:label=org.example.role=web}, services: {http: tcp/80}}\n  \
           ops:      {on: app-1, attach: host, services: {log: tcp/514}}\n  \
           postgres: {on: db-1,  attach: {container: docker:postgres}, services: {sql: tcp/5432}}\n\
         allow:\n  - n8n -> postgres:sql\n  - n8n -> web:http\n  - ops -> web:http\n  - web -> ops:log\n",
    )?;
    wait_until(&mesh, "app-1", "n8n", "docker has no running container n8n")?;
    let begin = Instant::now();
    let n8n = app.run("n8n", &[])?;
    let started = begin.elapsed();
    wait_until_attached(&mesh, "app-1", "n8n", &n8n)?;
    eprintln!(
        "`docker run` took {started:?}, attached as seen by status after {:?}",
        begin.elapsed()
    );
    let web = app.run("web-1", &["--label", "org.example.role=web"])?;
    let postgres = db.run("postgres", &[])?;
    wait_until_attached(&mesh, "app-1", "web", &web)?;
    wait_until_attached(&mesh, "db-1", "postgres", &postgres)?;
    let off = n8n.exec(&["cat", "/proc/sys/net/ipv6/conf/all/disable_ipv6"])?.ok()?.stdout;
    ensure!(
        off.trim() == "1",
        "Docker no longer switches IPv6 off; so the agent need not switch it on"
    );
    let (web_at, ops_at, postgres_at) = (
        mesh.instance("web", "app-1")?,
        mesh.instance("ops", "app-1")?,
        mesh.instance("postgres", "db-1")?,
    );
    let ops = mesh.host("app-1")?.net();
    for (web_at, postgres_at) in pairs(web_at, postgres_at) {
        let ops_at = if web_at.is_ipv4() {
            IpAddr::V4(ops_at.v4)
        } else {
            IpAddr::V6(ops_at.v6)
        };
        let _listeners = [
            Tool::tcp_listen(&web, (web_at, 80).into())?,
            Tool::tcp_listen(&web, (web_at, 81).into())?,
            Tool::tcp_listen(&postgres, (postgres_at, 5432).into())?,
            Tool::tcp_listen(ops, (ops_at, 514).into())?,
        ];
        must_reach(&n8n, (postgres_at, 5432).into())?;
        must_reach(&n8n, (web_at, 80).into())?;
        must_reach(ops, (web_at, 80).into())?;
        must_reach(&web, (ops_at, 514).into())?;
        must_be_refused(&n8n, (web_at, 81).into())?;
        must_be_refused(&n8n, (ops_at, 514).into())?;
        must_be_refused(&web, (postgres_at, 5432).into())?;
        must_be_refused(ops, (postgres_at, 5432).into())?;
    }
    drop(runtimes);
    mesh.finish()
}

#[test]
fn root_in_a_container_cannot_speak_as_another_component() -> Result<()> {
    let (mut mesh, docker) = one_docker("e2e-docker-forge")?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(
        "version: 1\ncomponents:\n  \
           n8n:      {on: app-1, attach: {container: docker:n8n}}\n  \
           runner:   {on: app-1, attach: {container: docker:runner}}\n  \
           postgres: {on: db-1,  attach: host, services: {sql: udp/5432}}\n\
         allow:\n  - n8n -> postgres:sql\n",
    )?;
    let n8n = docker.run("n8n", &[])?;
    let runner = docker.run("runner", &[])?;
    wait_until_attached(&mesh, "app-1", "n8n", &n8n)?;
    wait_until_attached(&mesh, "app-1", "runner", &runner)?;
    let (n8n_at, postgres_at) = (mesh.instance("n8n", "app-1")?, mesh.instance("postgres", "db-1")?);
    let mut listeners = Vec::new();
    for (_, at) in pairs(n8n_at, postgres_at) {
        listeners.push(Tool::udp_listen(mesh.host("db-1")?.net(), (at, 5432).into())?);
        // The way is open, so that what is refused below is refused for its source.
        ensure!(Tool::udp_attempt(&n8n, (at, 5432).into(), 10)?.0 > 0, "n8n does not reach {at}");
    }
    let heard = |listeners: &[Tool]| -> Result<Vec<u64>> {
        let totals = listeners.iter().map(|l| Ok(l.last("received")?.map_or(0, |e| e.total())));
        totals.collect()
    };
    let before = heard(&listeners)?;
    let forge = |from: &Container| -> Result<()> {
        for (from_at, to) in pairs(n8n_at, postgres_at) {
            let dropped = mesh.drops("app-1", "source_not_local")?;
            let (from_at, to) = (SocketAddr::new(from_at, 40_000).to_string(), SocketAddr::new(to, 5432).to_string());
            let mut tool = Tool::start(from, "forge", &["forge", &from_at, &to])?;
            let done = tool.wait_for("done", PATIENCE)?;
            ensure!(done.fields.get("sent").and_then(Value::as_u64) == Some(5), "{done:?}");
            let now = mesh.drops("app-1", "source_not_local")?;
            ensure!(now >= dropped + 5, "{from_at}: {dropped} drops before, {now} behind");
        }
        Ok(())
    };
    // With the capabilities that Docker gives by default, which include CAP_NET_RAW.
    ensure!(
        !runner
            .exec(&["ip", "address", "add", "192.0.2.1/32", "dev", "cloison0"])?
            .status
            .success()
    );
    forge(&runner)?;
    // With those that let it do as it likes in its namespace: it takes everything away there that is not the agent's own.
    runner.remove()?;
    let runner = docker.run("runner", &["--cap-add", "NET_ADMIN", "--cap-add", "NET_RAW"])?;
    wait_until_attached(&mesh, "app-1", "runner", &runner)?;
    runner.exec(&["nft", "flush", "ruleset"])?.ok()?;
    forge(&runner)?;
    for (from, to) in pairs(n8n_at, postgres_at) {
        let length = if from.is_ipv4() { 32 } else { 128 };
        runner
            .exec(&["ip", "address", "add", &format!("{from}/{length}"), "dev", "cloison0", "nodad"])?
            .ok()?;
        let (from, to) = (from.to_string(), SocketAddr::new(to, 5432).to_string());
        let dropped = mesh.drops("app-1", "source_not_local")?;
        let mut tool = Tool::start(&runner, "taken", &["udp-stream", &to, "--from", &from, "--count", "5"])?;
        let done = tool.wait_for("done", PATIENCE)?;
        ensure!(done.fields.get("received").and_then(Value::as_u64) == Some(0), "{done:?}");
        ensure!(mesh.drops("app-1", "source_not_local")? >= dropped + 5);
    }
    ensure!(heard(&listeners)? == before, "postgres heard what n8n did not say");
    drop(docker);
    mesh.finish()
}

#[test]
fn a_container_is_attached_anew_whenever_it_starts_and_let_go_when_it_ends() -> Result<()> {
    let (mut mesh, docker) = one_docker("e2e-docker-life")?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(ONE_RULE)?;
    let to: SocketAddr = (mesh.instance("postgres", "db-1")?.v6, 5432).into();
    let _listener = Tool::tcp_listen(mesh.host("db-1")?.net(), to)?;
    let n8n = docker.run_line("n8n", &["--cap-add", "NET_ADMIN"], &["sh", "-c", &waiting(to)])?;
    wait_until_attached(&mesh, "app-1", "n8n", &n8n)?;
    must_reach(&n8n, to)?;
    let mut all = vec![waited(&n8n)?];

    for _ in 0..5 {
        n8n.restart()?;
        wait_until_attached(&mesh, "app-1", "n8n", &n8n)?;
        must_reach(&n8n, to)?;
        all.push(waited(&n8n)?);
    }
    eprintln!("from the container's first moment to its way to others: {all:?}");
    ensure!(
        all.iter().all(|waited| *waited < Duration::from_secs(3)),
        "found by looking, not by events: {all:?}"
    );

    // Who joins the namespace of a container has its network from its first moment on, however often it starts.
    let joined = docker.run("joined", &["--network=container:n8n"])?;
    for _ in 0..2 {
        must_reach(&joined, to)?;
        joined.restart()?;
    }
    must_reach(&joined, to)?;
    joined.remove()?;

    // Another container of the same name; that of before was never stopped in order.
    n8n.remove()?;
    wait_until(&mesh, "app-1", "n8n", "docker has no running container n8n")?;
    let n8n = docker.run("n8n", &["--cap-add", "NET_ADMIN"])?;
    wait_until_attached(&mesh, "app-1", "n8n", &n8n)?;
    must_reach(&n8n, to)?;

    // A name goes over to another container that runs already.
    let other = docker.run("other", &[])?;
    n8n.cli(&["rename", "n8n", "former"])?.ok()?;
    wait_until(&mesh, "app-1", "n8n", "docker has no running container n8n")?;
    other.cli(&["rename", "other", "n8n"])?.ok()?;
    wait_until(&mesh, "app-1", "n8n", "docker container n8n")?;
    let (former, n8n) = (docker.named("former"), docker.named("n8n"));
    must_reach(&n8n, to)?;
    let left = former.exec(&["ip", "-o", "link", "show", "cloison0"])?;
    ensure!(
        !left.status.success(),
        "a container that is no component kept the TUN: {}",
        left.stdout
    );
    n8n.remove()?;
    former.cli(&["rename", "former", "n8n"])?.ok()?;
    let n8n = docker.named("n8n");
    wait_until_attached(&mesh, "app-1", "n8n", &n8n)?;

    // Its root takes the TUN away: the agent is told of that at once, and makes another one.
    let index = || {
        n8n.exec(&["cat", "/sys/class/net/cloison0/ifindex"])?
            .ok()
            .map(|shown| shown.stdout)
    };
    let before = index()?;
    n8n.exec(&["ip", "link", "delete", "cloison0"])?.ok()?;
    wait_for("the way to be open again", PATIENCE, || Ok(must_reach(&n8n, to).ok()))?;
    ensure!(index()? != before, "it was not taken away");
    drop(docker);
    mesh.finish()
}

#[test]
fn neither_the_end_of_the_agent_nor_that_of_the_runtime_is_the_end_of_a_container_s_streams() -> Result<()> {
    let (mut mesh, mut docker) = one_docker("e2e-docker-restart")?;
    mesh.agent_mut("app-1")?.manage(WATCHDOG)?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(ONE_RULE)?;
    let to: SocketAddr = (mesh.instance("postgres", "db-1")?.v4, 5432).into();
    let _listener = Tool::tcp_listen(mesh.host("db-1")?.net(), to)?;
    let n8n = docker.run("n8n", &[])?;
    wait_until_attached(&mesh, "app-1", "n8n", &n8n)?;
    let stream = Tool::tcp_stream(&n8n.inside()?, to)?;
    let tun = || Ok::<_, anyhow::Error>(n8n.exec(&["cat", "/sys/class/net/cloison0/ifindex"])?.ok()?.stdout);
    let before = tun()?;

    // What the service manager kept of the agent's TUN is taken up again.
    mesh.agent_mut("app-1")?.kill()?;
    mesh.agent_mut("app-1")?.start()?;
    ensure!(
        enforcement(&mesh, "app-1", "n8n")?.contains("docker container n8n"),
        "not attached as soon as it runs"
    );
    stream.wait_for_more(640, PATIENCE)?;
    ensure!(tun()? == before, "the TUN was made anew");

    // The runtime is killed; the container goes on, and so does its component. Nothing is heard of it meanwhile but its end.
    docker.kill()?;
    stream.wait_for_more(640, PATIENCE)?;
    std::thread::sleep(Duration::from_secs(4));
    stream.wait_for_more(640, PATIENCE)?;
    ensure!(enforcement(&mesh, "app-1", "n8n")?.contains("docker container n8n"));
    docker.serve()?;
    stream.wait_for_more(640, PATIENCE)?;
    // The events come again: a restart is seen at once.
    n8n.restart()?;
    wait_until_attached(&mesh, "app-1", "n8n", &n8n)?;
    must_reach(&n8n, to)?;

    // A container that ends while there is neither agent nor runtime is not there when they come back, and its TUN is not kept.
    let pid = n8n.pid()?;
    mesh.agent_mut("app-1")?.kill()?;
    docker.kill()?;
    docker.end_containers()?;
    wait_for("the container to end", PATIENCE, || {
        Ok((!std::path::Path::new(&format!("/proc/{pid}")).exists()).then_some(()))
    })?;
    mesh.agent_mut("app-1")?.start()?;
    wait_until(&mesh, "app-1", "n8n", "docker does not answer")?;
    ensure!(
        mesh.agent("app-1")?.manager()?.kept().iter().all(|kept| kept != "tun-n8n"),
        "the TUN of a dead container is kept"
    );
    docker.serve()?;
    wait_until(&mesh, "app-1", "n8n", "docker has no running container n8n")?;
    n8n.cli(&["start", "n8n"])?.ok()?;
    wait_until_attached(&mesh, "app-1", "n8n", &n8n)?;
    must_reach(&n8n, to)?;
    drop(docker);
    mesh.finish()
}

#[test]
fn a_container_that_cannot_be_told_apart_is_refused_with_the_reason() -> Result<()> {
    let (mut mesh, docker) = one_docker("e2e-docker-refused")?;
    mesh.agent_mut("app-1")?.confine(UNIT);
    mesh.join_all()?;
    let component = |name: &str, which: &str| format!("  {name}: {{on: app-1, attach: {{container: {which:?}}}}}\n");
    let all = [
        component("by-id", &format!("docker:{}", "0".repeat(12))),
        component("hosted", "docker:hosted"),
        component("labelled", "docker:label=role=db"),
        component("owner", "docker:owner"),
        component("podman", "podman:n8n"),
        component("sharer", "docker:sharer"),
    ];
    mesh.coordinator
        .apply_and_wait(&format!("version: 1\ncomponents:\n{}", all.concat()))?;
    wait_until(
        &mesh,
        "app-1",
        "podman",
        "/run/podman/podman.sock does not exist: podman does not run",
    )?;
    wait_until(&mesh, "app-1", "labelled", "docker has no running container label=role=db")?;

    docker.run("hosted", &["--network=host"])?;
    wait_until(
        &mesh,
        "app-1",
        "hosted",
        "docker container hosted uses the host's network namespace",
    )?;
    // For a name, a runtime takes the beginning of an id as well. This component's is none of those, so another view is needed.
    let id = docker.cli(&["inspect", "--format", "{{.Id}}", "hosted"])?.ok()?.stdout;
    let owner = docker.run("owner", &[])?;
    let owner_id = docker.cli(&["inspect", "--format", "{{.Id}}", "owner"])?.ok()?.stdout;
    wait_until_attached(&mesh, "app-1", "owner", &owner)?;
    // Who joins another's namespace has none of its own by which it could be found without looking at its processes.
    docker.run("sharer", &["--network=container:owner"])?;
    wait_until(&mesh, "app-1", "sharer", "give the agent CAP_SYS_PTRACE")?;

    docker.run("db-1", &["--label", "role=db"])?;
    wait_until(&mesh, "app-1", "labelled", "docker container db-1")?;
    let second = docker.run("db-2", &["--label", "role=db"])?;
    wait_until(&mesh, "app-1", "labelled", "several containers with label=role=db: db-1, db-2;")?;
    let left = docker.named("db-1").exec(&["cat", "/sys/class/net/cloison0/ifindex"])?;
    ensure!(!left.status.success(), "one of several kept the address: {left:?}");
    second.remove()?;
    wait_until(&mesh, "app-1", "labelled", "docker container db-1")?;

    let prefix = owner_id.get(..12).context("an id")?;
    ensure!(docker.cli(&["inspect", prefix])?.status.success() && prefix != id.trim());
    let last =
        component("by-id", &format!("docker:{prefix}")) + &component("sharer", "docker:sharer") + &component("owner", "docker:owner");
    mesh.coordinator.apply_and_wait(&format!("version: 1\ncomponents:\n{last}"))?;
    wait_until(&mesh, "app-1", "by-id", &format!("docker has no running container {prefix}"))?;

    // With the right to look at processes, it is seen whose namespace that is.
    mesh.agent_mut("app-1")?.stop()?;
    mesh.agent_mut("app-1")?.confine(&format!("{UNIT},sys_ptrace"));
    mesh.agent_mut("app-1")?.start()?;
    wait_until(
        &mesh,
        "app-1",
        "sharer",
        "docker container sharer is the same network namespace as docker container owner",
    )?;
    drop(docker);
    mesh.finish()
}

#[test]
fn neither_descriptors_nor_namespaces_are_left_behind_by_fifty_restarts() -> Result<()> {
    const CONTAINERS: usize = 5;
    const RESTARTS: usize = 10;
    let (mut mesh, docker) = one_docker("e2e-docker-leaks")?;
    mesh.join_all()?;
    let names: Vec<String> = (0..CONTAINERS).map(|n| format!("c{n}")).collect();
    let lines = names
        .iter()
        .map(|n| format!("  {n}: {{on: app-1, attach: {{container: docker:{n}}}}}\n"));
    mesh.coordinator
        .apply_and_wait(&format!("version: 1\ncomponents:\n{}", lines.collect::<String>()))?;
    let containers = names.iter().map(|n| docker.run(n, &[])).collect::<Result<Vec<_>>>()?;
    for container in &containers {
        wait_until_attached(&mesh, "app-1", container.name(), container)?;
    }
    let agent = mesh.agent_mut("app-1")?.process()?.id();
    let open = || Ok::<_, anyhow::Error>(std::fs::read_dir(format!("/proc/{agent}/fd"))?.count());
    let before = open()?;
    // One end of a wire is in each namespace: it goes when the namespace does, and takes the other end with it.
    let net = mesh.host("app-1")?.net();
    for round in 0..RESTARTS {
        for (number, container) in containers.iter().enumerate().filter(|_| round == 0 || round == RESTARTS - 1) {
            let (outer, pid) = (format!("w{round}-{number}"), container.pid()?.to_string());
            net.run(&["ip", "link", "add", &outer, "type", "veth", "peer", "name", "inner", "netns", &pid])?
                .ok()?;
        }
        let restarts: Vec<_> = containers
            .iter()
            .cloned()
            .map(|c| std::thread::spawn(move || c.restart()))
            .collect();
        for restart in restarts {
            restart.join().map_err(|_| anyhow::anyhow!("panicked"))??;
        }
    }
    for container in &containers {
        wait_until_attached(&mesh, "app-1", container.name(), container)?;
    }
    wait_for("all former namespaces to end", PATIENCE, || {
        let links = net.run(&["ip", "-o", "link"])?.ok()?.stdout;
        Ok((!links.contains("w0-") && !links.contains("w9-")).then_some(()))
    })?;
    let mut last = 0;
    wait_for("all former descriptors to be closed", PATIENCE, || {
        last = open()?;
        Ok((last <= before).then_some(()))
    })
    .with_context(|| format!("{before} descriptors before, {last} behind"))?;
    for container in &containers {
        container.remove()?;
    }
    wait_until(&mesh, "app-1", "c0", "docker has no running container c0")?;
    wait_for("the containers' descriptors to be closed", PATIENCE, || {
        Ok((open()? + CONTAINERS <= before).then_some(()))
    })?;
    drop(docker);
    mesh.finish()
}

#[test]
fn a_container_finds_names_by_one_line_of_dns_and_has_nothing_left_when_its_host_leaves() -> Result<()> {
    let (mut mesh, docker) = one_docker("e2e-docker-names")?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(ONE_RULE)?;
    let status = mesh.agent("app-1")?.status()?;
    let resolver = status["resolver"]["addresses"][0].as_str().context("no resolver")?.to_owned();
    // What `dns:` in a compose file says.
    let n8n = docker.run("n8n", &["--dns", &resolver])?;
    let untold = docker.run("untold", &["--dns", &resolver])?;
    wait_until_attached(&mesh, "app-1", "n8n", &n8n)?;
    let settings = n8n.exec(&["cat", "/etc/resolv.conf"])?.ok()?.stdout;
    ensure!(settings.contains(&format!("nameserver {resolver}")), "{settings}");
    let instance = mesh.instance("postgres", "db-1")?;
    let found = n8n.exec(&["getent", "ahosts", "postgres.cloison.internal"])?.ok()?.stdout;
    for address in instance.addresses() {
        ensure!(found.contains(&address.to_string()), "{address} is not in {found}");
    }
    let _listeners: Vec<Tool> = instance
        .sockets(5432)
        .into_iter()
        .map(|at| Tool::tcp_listen(mesh.host("db-1")?.net(), at))
        .collect::<Result<_>>()?;
    n8n.exec(&["bash", "-c", "exec 3<>/dev/tcp/postgres.cloison.internal/5432"])?.ok()?;
    for (container, name) in [(&n8n, "secret"), (&untold, "postgres")] {
        let unknown = container.exec(&["getent", "ahosts", &format!("{name}.cloison.internal")])?;
        ensure!(!unknown.status.success(), "{unknown:?}");
    }
    ensure!(
        n8n.exec(&["cat", "/etc/resolv.conf"])?.ok()?.stdout == settings,
        "the file was changed"
    );

    let net = mesh.host("app-1")?.net().clone();
    let tables = |inside: &Container| -> Result<String> {
        let pid = inside.pid()?.to_string();
        let shown = net.run(&["nsenter", &format!("--net=/proc/{pid}/ns/net"), "nft", "list", "ruleset"])?;
        Ok(shown.ok()?.stdout)
    };
    ensure!(tables(&n8n)?.contains("table inet"), "no base table in the container");
    mesh.agent_mut("app-1")?.stop()?;
    mesh.agent("app-1")?.command(&["leave"])?.ok()?;
    let link = n8n.exec(&["ip", "-o", "link", "show", "cloison0"])?;
    ensure!(!link.status.success(), "the TUN is left: {}", link.stdout);
    ensure!(tables(&n8n)?.is_empty(), "a table is left: {}", tables(&n8n)?);
    let routes = n8n
        .exec(&["sh", "-c", "ip route show table all; ip -6 route show table all"])?
        .ok()?
        .stdout;
    ensure!(!routes.contains("unreachable"), "{routes}");
    drop(docker);
    mesh.finish()
}

#[test]
fn a_port_that_docker_publishes_is_a_way_past_the_mesh_and_is_found() -> Result<()> {
    let (mut mesh, docker) = one_docker("e2e-docker-port")?;
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(&format!("{ONE_RULE}  - postgres -> n8n:ui\n"))?;
    let doctor = |mesh: &Mesh| -> Result<String> { Ok(mesh.agent("app-1")?.command(&["doctor"])?.stdout) };
    docker.cli(&["network", "create", "front"])?.ok()?;
    let n8n = docker.run("n8n", &["--network=front", "--publish", "127.0.0.1:15678:5678"])?;
    wait_until_attached(&mesh, "app-1", "n8n", &n8n)?;
    let found = doctor(&mesh)?;
    ensure!(
        found.contains("Docker publishes 5678/tcp of n8n (container n8n) on 127.0.0.1:15678") && found.contains("network_mode: none"),
        "{found}"
    );
    // Beside its other network, the mesh goes on as everywhere.
    let instance = mesh.instance("n8n", "app-1")?;
    let _listener = Tool::tcp_listen(&n8n, (instance.v4, 5678).into())?;
    must_reach(mesh.host("db-1")?.net(), (instance.v4, 5678).into())?;
    n8n.remove()?;
    let n8n = docker.run("n8n", &[])?;
    wait_until_attached(&mesh, "app-1", "n8n", &n8n)?;
    let found = doctor(&mesh)?;
    ensure!(!found.contains("publishes"), "{found}");
    drop(docker);
    mesh.finish()
}

#[test]
fn podman_s_containers_are_attached_by_their_first_process() -> Result<()> {
    let mut mesh = Mesh::builder("e2e-podman", &["app-1", "db-1"]).start()?;
    let podman = Runtime::start(mesh.host("app-1")?, Kind::Podman)?;
    mesh.agent("app-1")?.add_settings(&podman.setting())?;
    mesh.agent_mut("app-1")?.confine(UNIT);
    mesh.join_all()?;
    mesh.coordinator.apply_and_wait(
        "version: 1\ncomponents:\n  \
           n8n:      {on: app-1, attach: {container: podman:n8n}}\n  \
           web:      {on: app-1, attach: {container: podman:label=role=web}}\n  \
           postgres: {on: db-1,  attach: host, services: {sql: tcp/5432}}\n\
         allow:\n  - n8n -> postgres:sql\n  - web -> postgres:sql\n",
    )?;
    let n8n = podman.run("n8n", &[])?;
    // Podman keeps no file for the namespace of a container without a network.
    wait_until(&mesh, "app-1", "n8n", "give the agent CAP_SYS_PTRACE")?;
    mesh.agent_mut("app-1")?.stop()?;
    mesh.agent_mut("app-1")?.confine(&format!("{UNIT},sys_ptrace"));
    mesh.agent_mut("app-1")?.start()?;
    let web = podman.run("web-1", &["--label", "role=web"])?;
    wait_until_attached(&mesh, "app-1", "n8n", &n8n)?;
    wait_until_attached(&mesh, "app-1", "web", &web)?;
    let postgres = mesh.instance("postgres", "db-1")?;
    let _listeners = postgres
        .sockets(5432)
        .map(|at| Tool::tcp_listen(mesh.host("db-1").map(|host| host.net())?, at));
    for round in 0..2 {
        for at in postgres.sockets(5432) {
            must_reach(&n8n, at)?;
            must_reach(&web, at)?;
            must_be_refused(&n8n, (at.ip(), 5433).into())?;
        }
        if round == 0 {
            n8n.restart()?;
            wait_until_attached(&mesh, "app-1", "n8n", &n8n)?;
        }
    }
    podman.run("web-2", &["--label", "role=web"])?;
    wait_until(
        &mesh,
        "app-1",
        "web",
        "podman runs several containers with label=role=web: web-1, web-2;",
    )?;
    n8n.remove()?;
    wait_until(&mesh, "app-1", "n8n", "podman has no running container n8n")?;
    drop(podman);
    mesh.finish()
}
