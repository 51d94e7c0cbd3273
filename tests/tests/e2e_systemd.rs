//! The packages under a real systemd: three machines boot, get their packages offline, and live through what machines live through.
//!
//! The story is that of `docs/install.md`, command by command: a coordinator, an application and a database with a real PostgreSQL in it.
//! The programs are those of the debug build, in packages made by the project's own recipe.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use cloison_tests::lab::process::{self, Process};
use cloison_tests::lab::{Lab, Underlay, programs, wait_for};
use cloison_tests::machines::Machine;
use cloison_tests::machines::packages::{self, healthy, install};

/// How long the mesh may take to work again after something happened to it: boots and links included.
const SOON: Duration = Duration::from_secs(30);

/// How long a host may take to find a coordinator that came back, at the longest step between two tries.
const LINKED: Duration = Duration::from_secs(90);

const AGENT: &str = "cloison-agent.service";
const PREPARE: &str = "cloison-agent-prepare.service";
const COORDINATOR: &str = "cloison-coordinator.service";

const POLICY: &str = "
version: 1
components:
  app:      {on: app-1, attach: host}
  postgres: {on: db-1, attach: host, services: {sql: tcp/5432, stream: tcp/7000, closed: tcp/7001}}
allow:
  - app -> postgres:sql
  - app -> postgres:stream
";

/// A part of the story; what comes later builds on what came before.
type Step = fn(&mut Story) -> Result<()>;

/// The three machines and what is laid on them.
struct Story {
    coordinator: Machine,
    app: Machine,
    db: Machine,
    lab: Lab,
    packages: PathBuf,
}

#[test]
fn packages_are_installed_used_rebooted_cut_off_upgraded_and_purged_under_a_real_systemd() -> Result<()> {
    let mut story = Story::new("e2e-systemd")?;
    let outcome = story.play();
    if outcome.is_err() {
        for machine in [&story.coordinator, &story.app, &story.db] {
            eprintln!("--- {}:\n{}", machine.name(), machine.told());
        }
        return outcome;
    }
    let Story {
        coordinator, app, db, lab, ..
    } = story;
    drop((coordinator, app, db));
    lab.finish()
}

impl Story {
    fn new(name: &str) -> Result<Self> {
        let lab = Lab::builder(name).underlay(Underlay::V4).build()?;
        let packages = lab.folder().join("packages");
        Ok(Self {
            coordinator: Machine::new(&lab, "coordinator", 1)?,
            app: Machine::new(&lab, "app-1", 2)?,
            db: Machine::new(&lab, "db-1", 3)?,
            packages,
            lab,
        })
    }

    fn play(&mut self) -> Result<()> {
        let steps: [(&str, Step); 13] = [
            ("boot and install", Self::boot_and_install),
            ("an agent that is not enrolled waits, and does not fail", Self::not_enrolled),
            ("make a mesh", Self::make_a_mesh),
            ("join by a token's file, and by a credential", Self::join),
            ("what is allowed works, and nothing else", Self::query_and_deny),
            ("systemd-resolved asks the mesh's resolver", Self::resolved),
            ("reboot the database", Self::reboot),
            ("cut the power of application and coordinator", Self::cut_power),
            ("a program that hangs is ended and started anew", Self::watchdog),
            ("an upgrade is a pause for open streams", Self::upgrade),
            ("a removal keeps the state", Self::remove),
            ("a purge of the agent leaves nothing", Self::purge_agent),
            ("a purge of the coordinator leaves nothing", Self::purge_coordinator),
        ];
        for (what, step) in steps {
            let start = Instant::now();
            step(self).context(what)?;
            eprintln!("{what}: {:.1} s", start.elapsed().as_secs_f64());
        }
        Ok(())
    }

    fn boot_and_install(&mut self) -> Result<()> {
        let lab = &self.lab;
        let packages = &self.packages;
        std::thread::scope(|scope| {
            let made = scope.spawn(|| make_packages(packages));
            let machines = [&mut self.coordinator, &mut self.app, &mut self.db];
            let boots: Vec<_> = machines.map(|machine| scope.spawn(move || machine.boot(lab))).into_iter().collect();
            let joined = boots
                .into_iter()
                .chain([made])
                .map(|thread| thread.join().ok().context("a thread panicked")?);
            joined.collect::<Result<()>>()
        })?;
        for machine in [&self.app, &self.db] {
            install(machine, &[self.package("cloison-agent", VERSION)])?;
        }
        install(
            &self.coordinator,
            &[self.package("cloison-coordinator", VERSION), self.package("cloison", VERSION)],
        )
    }

    fn not_enrolled(&mut self) -> Result<()> {
        for (machine, unit) in [(&self.app, AGENT), (&self.db, AGENT), (&self.coordinator, COORDINATOR)] {
            ensure!(
                machine.ok(&["systemctl", "is-enabled", unit])?.trim() == "enabled",
                "{unit} is not enabled"
            );
            machine.ok(&["systemctl", "start", unit])?;
            let state = [
                machine.property(unit, "ActiveState")?,
                machine.property(unit, "NRestarts")?,
                machine.property(unit, "ConditionResult")?,
            ];
            ensure!(state == ["inactive", "0", "no"], "{}: {unit} is {state:?}", machine.name());
            healthy(machine)?;
        }
        ensure!(
            self.app.ok(&["systemctl", "is-enabled", PREPARE])?.trim() == "enabled",
            "the boot-time unit is not enabled"
        );
        Ok(())
    }

    fn make_a_mesh(&mut self) -> Result<()> {
        let machine = &self.coordinator;
        let address = format!("{}:7443", machine.v4());
        machine.ok(&["cloison-coordinator", "init", "--data", "/var/lib/cloison", "--address", &address])?;
        machine.ok(&["systemctl", "enable", "--now", COORDINATOR])?;
        ensure!(
            !machine.property(COORDINATOR, "StatusText")?.is_empty(),
            "the coordinator does not tell systemd how it does"
        );
        ensure!(
            machine.sh("stat -c %U:%a /var/lib/cloison")?.trim() == "cloison:700",
            "its data is not its own"
        );
        machine.write("/root/policy.yaml", POLICY)?;
        machine.sh("cloison policy apply /root/policy.yaml")?;
        healthy(machine)
    }

    fn join(&mut self) -> Result<()> {
        let token = self.coordinator.sh("cloison token create --host app-1")?;
        self.app.write("/root/token", &token)?;
        self.app
            .sh("cloison-agent join --token-file /root/token && rm /root/token && systemctl enable --now cloison-agent")?;

        let token = self.coordinator.sh("cloison token create --host db-1")?;
        self.db.write("/root/token", &token)?;
        self.db
            .sh("install -D -m 600 /root/token /etc/credstore/cloison.token && rm /root/token && systemctl enable --now cloison-agent")?;
        self.db.sh("rm /etc/credstore/cloison.token")?;

        let db = &self.db;
        db.write(
            "/etc/postgresql/15/main/conf.d/mesh.conf",
            "listen_addresses = '*'\nlog_connections = on\n",
        )?;
        db.sh("echo 'host all all 10.0.0.0/8 trust' >>/etc/postgresql/15/main/pg_hba.conf; systemctl enable --now postgresql")?;
        db.sh("runuser -u postgres -- createuser --superuser app; runuser -u postgres -- createdb app")?;
        self.applied()
    }

    /// Waits until both hosts have the policy in force, and a query passes.
    fn applied(&self) -> Result<()> {
        wait_for("both hosts to be linked and the query to pass", LINKED, || {
            let status = self.coordinator.run(&["cloison", "status"])?;
            let query = self.query("select 41 + 1")?;
            Ok((status.stdout.contains("2 of 2") && query.as_deref() == Some("42")).then_some(()))
        })
        .with_context(|| self.coordinator.sh("cloison status || true").unwrap_or_default())?;
        [&self.coordinator, &self.app, &self.db].into_iter().try_for_each(healthy)
    }

    fn query(&self, sql: &str) -> Result<Option<String>> {
        let Some(address) = overlay(&self.db)? else { return Ok(None) };
        let url = format!("postgresql://app@{address}/app?connect_timeout=3");
        let done = self.app.run(&["psql", "-XAtqc", sql, &url])?;
        Ok(done.status.success().then(|| done.stdout.trim().to_owned()))
    }

    fn query_and_deny(&mut self) -> Result<()> {
        let db = overlay(&self.db)?.context("the database has no address in the mesh")?;
        let app = overlay(&self.app)?.context("the application has no address in the mesh")?;
        // PostgreSQL sees the component's own address.
        let seen = self.query("select host(inet_client_addr())")?;
        ensure!(
            seen.as_deref() == Some(app.as_str()),
            "PostgreSQL was asked by {seen:?}, not by {app}"
        );
        // A service that no rule names, and the way back; both are answered at once.
        for (machine, to) in [(&self.app, format!("{db} 7001")), (&self.db, format!("{app} 5432"))] {
            let refused = machine
                .run(&["bash", "-c", &format!("exec 3<>/dev/tcp/{}", to.replace(' ', "/"))])?
                .refused()?;
            ensure!(
                refused.took < Duration::from_secs(3),
                "{to} was not refused but lost: {:?}",
                refused.took
            );
        }
        let denied = self.coordinator.run(&["cloison", "explain", "app", "postgres:closed"])?;
        ensure!(denied.status.code() == Some(2), "{}", denied.stdout);
        Ok(())
    }

    /// The unit may use port 53, and systemd-resolved finds the mesh's names there and nobody else's, also when either is started anew.
    fn resolved(&mut self) -> Result<()> {
        const NAME: &str = "postgres.cloison.internal";
        let app = &self.app;
        let db = overlay(&self.db)?.context("the database has no address in the mesh")?;
        let untouched = "cat /etc/nsswitch.conf; ls -l /etc/resolv.conf 2>&1 || true; cat /etc/resolv.conf 2>&1 || true";
        // What systemd-resolved makes of them by itself is no matter of ours.
        app.sh("systemctl start systemd-resolved; systemctl stop systemd-resolved")?;
        let before = app.sh(untouched)?;
        // The hosts file would answer first.
        app.sh("mkdir -p /etc/cloison; printf 'hosts_file = \"off\"\\nresolved = true\\n' >>/etc/cloison/agent.toml; systemctl restart cloison-agent")?;
        let state = || app.sh("cloison-agent status -o json | tr -d ' \\n'");
        let is_told = || Ok(state()?.contains(r#""resolved":{"state":"told"}"#).then_some(()));
        wait_for("a warning without systemd-resolved", SOON, || {
            Ok(app
                .sh("cloison-agent status")?
                .contains("warning: systemd-resolved does not run")
                .then_some(()))
        })?;
        app.ok(&["systemctl", "start", "systemd-resolved"])?;
        wait_for("systemd-resolved to be told", SOON, is_told)?;
        let finds = || -> Result<bool> {
            let query = app.run(&["resolvectl", "query", "--cache=no", NAME])?;
            let program = app.run(&["getent", "ahostsv4", NAME])?;
            Ok(query.stdout.contains(&db) && program.stdout.contains(&db))
        };
        ensure!(
            finds()?,
            "{}",
            app.sh("resolvectl status; resolvectl query postgres.cloison.internal 2>&1 || true")?
        );
        let unknown = app
            .run(&["resolvectl", "query", "--cache=no", "redis.cloison.internal"])?
            .refused()?;
        ensure!(unknown.stderr.contains("not found"), "{}", unknown.stderr);
        let link = app.ok(&["resolvectl", "status", "cloison0"])?;
        ensure!(link.contains("~cloison.internal") && link.contains("-DefaultRoute"), "{link}");
        // Started anew, without what it keeps for that.
        app.sh("systemctl stop systemd-resolved; rm -rf /run/systemd/resolve/netif; systemctl start systemd-resolved")?;
        wait_for("the name behind a new systemd-resolved", SOON, || Ok(finds()?.then_some(())))?;
        // The TUN made anew.
        app.ok(&["ip", "link", "delete", "cloison0"])?;
        wait_for("the name behind a new TUN", SOON, || Ok(finds()?.then_some(())))?;
        app.sh("systemctl stop systemd-resolved; rm -r /etc/cloison; systemctl restart cloison-agent")?;
        let after = app.sh(untouched)?;
        ensure!(after == before, "a resolver file was changed:\n{before}\n{after}");
        self.applied()
    }

    fn reboot(&mut self) -> Result<()> {
        self.db.reboot(&self.lab)?;
        // A machine in a container sometimes cannot make the mounts of a unit's sandbox while it boots (status 226): the unit is started again a
        // moment later, and then this boot says nothing of the order.
        for _ in 0..2 {
            if self.db.property(PREPARE, "NRestarts")? == "0" {
                break;
            }
            eprintln!("{PREPARE} was started again; one more boot");
            self.db.reboot(&self.lab)?;
        }
        let at = |unit: &str, property: &str| -> Result<u64> { Ok(self.db.property(unit, property)?.parse()?) };
        let (prepared, network) = (
            at(PREPARE, "ActiveEnterTimestampMonotonic")?,
            at("systemd-networkd.service", "InactiveExitTimestampMonotonic")?,
        );
        ensure!(
            prepared != 0 && prepared < network,
            "prepared at {prepared} us, but the network began at {network} us"
        );
        let firewall = at("nftables.service", "ActiveEnterTimestampMonotonic")?;
        ensure!(firewall != 0 && firewall < prepared, "the firewall's flush came behind our table");
        self.applied()
    }

    fn cut_power(&mut self) -> Result<()> {
        self.app.cut_power()?;
        self.coordinator.cut_power()?;
        self.app.boot(&self.lab)?;
        // The coordinator is still away: the mesh is back from the state on disk alone.
        self.answered().context("without a coordinator")?;
        self.coordinator.boot(&self.lab)?;
        // The database's agent takes a minute to notice that its link leads nowhere, which changes nothing for what passes.
        wait_for("the application to be linked", LINKED, || {
            let status = self.coordinator.run(&["cloison", "status"])?.stdout;
            Ok((!status.contains("app-1 is not linked") && status.contains(" linked")).then_some(()))
        })?;
        self.answered()
    }

    /// Waits until the database answers the application through the mesh.
    fn answered(&self) -> Result<()> {
        wait_for("the query to pass", SOON, || {
            Ok(self.query("select 7")?.filter(|answer| answer == "7").map(drop))
        })
    }

    fn watchdog(&mut self) -> Result<()> {
        let hung = [(&self.db, AGENT), (&self.coordinator, COORDINATOR)];
        let before = hung.map(|(machine, unit)| machine.property(unit, "MainPID"));
        for (machine, unit) in hung {
            machine.ok(&["systemctl", "kill", "--kill-whom=main", "--signal=STOP", unit])?;
        }
        for ((machine, unit), before) in hung.into_iter().zip(before) {
            let before = before?;
            wait_for(&format!("systemd to start {unit} anew"), Duration::from_secs(60), || {
                let restarts: u32 = machine.property(unit, "NRestarts")?.parse()?;
                Ok((restarts > 0 && machine.property(unit, "ActiveState")? == "active").then_some(()))
            })?;
            ensure!(machine.property(unit, "MainPID")? != before, "{unit} is the same process");
            ensure!(
                machine.journal(unit)?.contains("Watchdog timeout"),
                "it was not the watchdog that ended {unit}"
            );
        }
        self.answered()
    }

    fn upgrade(&mut self) -> Result<()> {
        let db = overlay(&self.db)?.context("the database has no address in the mesh")?;
        for machine in [&self.app, &self.db] {
            machine.copy(&programs::find("lab-tool")?, "/usr/local/bin/lab-tool")?;
        }
        let mut listener = self.db.start("listen", &["lab-tool", "tcp-listen", "0.0.0.0:7000"])?;
        listener.wait_for_line("listening", SOON)?;
        let mut stream = self.app.start(
            "stream",
            &[
                "lab-tool",
                "tcp-stream",
                &format!("{db}:7000"),
                "--every-ms",
                "20",
                "--count",
                "1000000",
            ],
        )?;
        stream.wait_for_line("received", SOON)?;
        for machine in [&self.app, &self.db] {
            let before = machine.property(AGENT, "MainPID")?;
            install(machine, &[self.package("cloison-agent", NEXT)])?;
            ensure!(machine.property(AGENT, "MainPID")? != before, "the new agent does not run");
            let version = machine.ok(&["dpkg-query", "--show", "--showformat=${Version}", "cloison-agent"])?;
            ensure!(version == NEXT, "{version} is installed");
            goes_on(&mut stream).with_context(|| format!("after the upgrade of {}", machine.name()))?;
        }
        install(&self.coordinator, &[self.package("cloison-coordinator", NEXT)])?;
        goes_on(&mut stream)?;
        self.applied()
    }

    fn remove(&mut self) -> Result<()> {
        let app = &self.app;
        app.ok(&["dpkg", "--remove", "cloison-agent"])?;
        app.sh("test -e /var/lib/cloison-agent/membership && ! test -e /usr/bin/cloison-agent && ! pgrep cloison-agent")?;
        // A stopped mesh is a silent one: what keeps its addresses from leaving in clear is still there.
        app.sh("nft list table inet cloison >/dev/null && ip route show proto 193 | grep -q unreachable")?;
        healthy(app)?;
        install(app, &[self.package("cloison-agent", NEXT)])?;
        app.ok(&["systemctl", "start", AGENT])?;
        self.applied()
    }

    fn purge_agent(&mut self) -> Result<()> {
        self.app.ok(&["dpkg", "--purge", "cloison-agent"])?;
        nothing_left(&self.app)?;
        self.db.ok(&["dpkg", "--purge", "cloison-agent"])?;
        nothing_left(&self.db)
    }

    fn purge_coordinator(&mut self) -> Result<()> {
        // What the operator has is the operator's: its configuration stays.
        self.coordinator.sh("rm -r /root/.config/cloison /root/policy.yaml")?;
        self.coordinator.ok(&["dpkg", "--purge", "cloison-coordinator", "cloison"])?;
        nothing_left(&self.coordinator)?;
        self.coordinator.power_off()
    }

    fn package(&self, name: &str, version: &str) -> PathBuf {
        packages::path(&self.packages, name, version)
    }
}

/// The version that is installed first, and the one that it is upgraded to.
const VERSION: &str = "0.9.1-1";
const NEXT: &str = "0.9.2-1";

/// Makes the packages of both versions. The later ones hold the same programs: what is tried is the change of packages.
fn make_packages(folder: &Path) -> Result<()> {
    packages::make(folder, VERSION)?;
    for name in ["cloison-agent", "cloison-coordinator"] {
        let (old, new) = [VERSION, NEXT].map(|version| packages::path(folder, name, version)).into();
        let script = "dpkg-deb -R $1 $1.unpacked && sed -i s/^Version:.*/Version:\\ $3/ $1.unpacked/DEBIAN/control && dpkg-deb -Znone -b $1.unpacked $2";
        let mut command = Command::new("sh");
        command.args(["-c", script, "repack"]).arg(old).arg(new).arg(NEXT);
        process::run(command, Duration::from_secs(60))?.ok()?;
    }
    Ok(())
}

/// The IPv4 address of the machine in the mesh.
fn overlay(machine: &Machine) -> Result<Option<String>> {
    let shown = machine.run(&["ip", "-4", "-o", "address", "show", "dev", "cloison0"])?;
    let address = shown.stdout.split_whitespace().skip_while(|word| *word != "inet").nth(1);
    Ok(address.and_then(|address| address.split('/').next()).map(str::to_owned))
}

/// The stream has received something since now, and nothing went wrong on it.
fn goes_on(stream: &mut Process) -> Result<()> {
    let count = |text: &str| text.lines().filter(|line| line.contains("\"received\"")).count();
    let before = count(&stream.output());
    wait_for("the stream to go on", SOON, || {
        if let Some(status) = stream.ended()? {
            bail!("it ended with {status}: {}", stream.output().lines().last().unwrap_or_default());
        }
        Ok((count(&stream.output()) > before + 5).then_some(()))
    })?;
    let wrong = stream
        .output()
        .lines()
        .find(|line| line.contains("\"failed\"") || line.contains("\"closed\""))
        .map(str::to_owned);
    ensure!(wrong.is_none(), "{wrong:?}");
    Ok(())
}

/// Files, users, units, tables, routes, interfaces: no trace of us.
fn nothing_left(machine: &Machine) -> Result<()> {
    let files = machine.sh(
        "find / -xdev -iname '*cloison*' ! -path '/proc/*' ! -path '/sys/*' ! -path '/run/systemd/*' ! -path '/tmp/systemd-private-*'",
    )?;
    let users = machine.sh("getent passwd cloison || true; getent group cloison || true")?;
    let units = machine
        .sh("systemctl list-units --all --plain --no-legend 'cloison*'; systemctl list-unit-files --no-legend 'cloison*' || true")?;
    let network = machine.sh("nft list tables | grep cloison || true; ip route show table all proto 193; ip -6 route show table all proto 193; ip -o link | grep cloison || true")?;
    let names = machine.sh("grep cloison /etc/hosts || true")?;
    for (what, left) in [
        ("files", files),
        ("users", users),
        ("units", units),
        ("in the network", network),
        ("names", names),
    ] {
        ensure!(left.trim().is_empty(), "{what} left on {}:\n{left}", machine.name());
    }
    healthy(machine)
}
