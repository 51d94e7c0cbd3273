//! Components that are units and users of one machine, under a real systemd, with the packages: n8n, its neighbours, and a real PostgreSQL, Redis and
//! nginx side by side, each with its own address, each with its own rules, through all that happens to units, to the agent and to the machine.
//!
//! A second machine, the hub, has the coordinator and the one component that speaks to n8n. What a shell of root or of a user does is done by a
//! transient unit, as a login would have a cgroup of its own.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use cloison_tests::lab::process::Process;
use cloison_tests::lab::{Lab, Underlay, programs, wait_for};
use cloison_tests::machines::Machine;
use cloison_tests::machines::packages::{self, healthy, install};
use serde_json::Value;

/// How long the mesh may take to work again after something happened to it.
const SOON: Duration = Duration::from_secs(30);

const VERSION: &str = "0.9.1-1";

const POLICY: &str = "
version: 1
components:
  ops:      {on: hub-1, attach: host}
  n8n:      {on: app-1, attach: {unit: n8n.service}, services: {http: tcp/5678}}
  worker:   {on: app-1, attach: {unit: worker.service}}
  job:      {on: app-1, attach: {unit: job@1.service}}
  first:    {on: app-1, attach: {unit: first.service}}
  waited:   {on: app-1, attach: {unit: waited.service}}
  ondemand: {on: app-1, attach: {unit: ondemand.service}, services: {greet: tcp/7100}}
  backup:   {on: app-1, attach: {user: backup}}
  postgres: {on: app-1, attach: {unit: postgresql@15-main.service}, services: {sql: tcp/5432}}
  redis:    {on: app-1, attach: {unit: redis-server.service}, services: {resp: tcp/6379}}
  web:      {on: app-1, attach: {unit: nginx.service}, services: {http: tcp/80}}
  rest:     {on: app-1, attach: host}
allow:
  - ops -> n8n:http
  - ops -> ondemand:greet
  - n8n -> postgres:sql
  - n8n -> ondemand:greet
  - n8n -> redis:resp
  - ops -> web:http
  - web -> n8n:http
  - job -> postgres:sql
  - first -> postgres:sql
  - waited -> postgres:sql
  - backup -> postgres:sql
";

/// Connects at its first instruction.
const FIRST: &str = "[Service]\nType=oneshot\nEnvironmentFile=-/etc/%N.env\nExecStart=/bin/bash -c 'exec 3<>/dev/tcp/${TARGET}/5432'\n";

/// The units of the application's machine.
const UNITS: [(&str, &str); 7] = [
    (
        "n8n.service",
        "[Service]\nDynamicUser=yes\nIPAccounting=yes\nExecStart=/usr/local/bin/n8n\n[Install]\nWantedBy=multi-user.target\n",
    ),
    (
        "job@.service",
        "[Service]\nType=oneshot\nUser=daemon\nExecStart=/bin/sh -c '/usr/local/bin/try postgres.cloison.internal 5432 >/run/job-%i'\n\
         ExecStartPre=+/bin/sh -c '>/run/job-%i; chown daemon /run/job-%i'\n",
    ),
    (
        "ondemand.socket",
        "[Socket]\nListenStream=7100\n[Install]\nWantedBy=sockets.target\n",
    ),
    (
        "ondemand.service",
        "[Service]\nDynamicUser=yes\nExecStart=/usr/local/bin/on-demand\n",
    ),
    ("first.service", FIRST),
    ("plain.service", FIRST),
    ("waited.service", FIRST),
];

/// What nginx hands on to n8n, by its name.
const SITE: &str = "server {\n  listen 80 default_server;\n  listen [::]:80 default_server;\n  location / { proxy_pass http://n8n.cloison.internal:5678; }\n}\n";

/// Prints what an address answers over HTTP.
const GET: &str = "my $a = HTTP::Tiny->new(timeout => 15)->get($ARGV[0]); die $a->{content} if !$a->{success}; print $a->{content}";

/// A part of the story; what comes later builds on what came before.
type Step = fn(&mut Story) -> Result<()>;

struct Story {
    hub: Machine,
    app: Machine,
    lab: Lab,
}

#[test]
fn units_and_users_of_one_machine_are_components_under_a_real_systemd() -> Result<()> {
    let lab = Lab::builder("e2e-units").underlay(Underlay::V4).build()?;
    let mut story = Story {
        hub: Machine::new(&lab, "hub-1", 1)?,
        app: Machine::new(&lab, "app-1", 2)?,
        lab,
    };
    let outcome = story.play();
    if outcome.is_err() {
        for machine in [&story.hub, &story.app] {
            eprintln!("--- {}:\n{}", machine.name(), machine.told());
        }
        eprintln!(
            "{}",
            story
                .app
                .sh("cloison-agent status; cloison-agent denials; nft list table inet cloison; ip rule; true")
                .unwrap_or_default()
        );
        return outcome;
    }
    let Story { hub, app, lab } = story;
    drop((hub, app));
    lab.finish()
}

impl Story {
    fn play(&mut self) -> Result<()> {
        let steps: [(&str, Step); 12] = [
            ("boot, install and join", Self::begin),
            ("each unit and user has its own address", Self::own_addresses),
            ("nobody else gets in", Self::nobody_else),
            ("loopback is guarded", Self::guard),
            ("a user gets another number", Self::renumber),
            ("a unit is restarted", Self::restart),
            ("a unit is stopped and started late", Self::stop),
            ("a unit moves to a slice further down", Self::deeper),
            ("the agent is restarted, killed and stopped", Self::restart_agent),
            ("first connects", Self::first_connects),
            ("without CAP_BPF", Self::without_bpf),
            ("the machine is booted anew", Self::reboot),
        ];
        for (what, step) in steps {
            let start = Instant::now();
            step(self).context(what)?;
            eprintln!("{what}: {:.1} s", start.elapsed().as_secs_f64());
        }
        Ok(())
    }

    fn begin(&mut self) -> Result<()> {
        let folder = self.lab.folder().join("packages");
        let lab = &self.lab;
        std::thread::scope(|scope| {
            let made = scope.spawn(|| packages::make(&folder, VERSION));
            let boots = [&mut self.hub, &mut self.app].map(|machine| scope.spawn(move || machine.boot(lab)));
            let mut all = boots.into_iter().chain([made]);
            all.try_for_each(|thread| thread.join().ok().context("a thread panicked")?)
        })?;
        let package = |name| packages::path(&folder, name, VERSION);
        install(&self.app, &[package("cloison-agent")])?;
        install(&self.hub, &["cloison-agent", "cloison-coordinator", "cloison"].map(package))?;
        let (hub, app) = (&self.hub, &self.app);
        programs_and_units(app)?;
        let address = format!("{}:7443", hub.v4());
        hub.ok(&["cloison-coordinator", "init", "--data", "/var/lib/cloison", "--address", &address])?;
        hub.ok(&["systemctl", "enable", "--now", "cloison-coordinator.service"])?;
        hub.write("/root/policy.yaml", POLICY)?;
        hub.sh("cloison policy apply /root/policy.yaml")?;
        for machine in [hub, app] {
            let token = hub.sh(&format!("cloison token create --host {}", machine.name()))?;
            machine.write("/root/token", &token)?;
            machine.write("/usr/local/bin/try", include_str!("units/try.pl"))?;
            machine.sh("chmod 755 /usr/local/bin/try")?;
            machine.sh("cloison-agent join --token-file /root/token && systemctl enable --now cloison-agent")?;
        }
        let n8n = wait_for("addresses", SOON, || Ok(self.addresses("n8n").ok()))?;
        app.write("/etc/postgresql/15/main/conf.d/mesh.conf", "listen_addresses = '*'\n")?;
        let length = |address: &str| if address.contains(':') { 128 } else { 32 };
        let admitted: String = n8n.iter().map(|a| format!("host app n8n {a}/{} trust\n", length(a))).collect();
        app.write(
            "/etc/postgresql/15/main/pg_hba.conf",
            &format!("local all postgres peer\n{admitted}"),
        )?;
        app.sh("systemctl enable --now postgresql; runuser -u postgres -- createuser n8n; runuser -u postgres -- createdb app")?;
        app.write("/etc/nginx/sites-available/default", SITE)?;
        app.sh("printf 'bind * -::*\\nprotected-mode no\\n' >>/etc/redis/redis.conf")?;
        app.sh("systemctl enable --now n8n.service ondemand.socket redis-server nginx")?;
        self.works()?;
        healthy(hub)?;
        healthy(app)
    }

    fn own_addresses(&mut self) -> Result<()> {
        let app = &self.app;
        let n8n = self.addresses("n8n")?;
        let seen = self.ask("/db")?;
        ensure!(n8n.contains(&seen), "PostgreSQL was asked by {seen:?}, and n8n is {n8n:?}");
        let backend = self.ask("/held")?;
        let activity = app.sh("runuser -u postgres -- psql -XAtqc \"select client_addr from pg_stat_activity where usename = 'n8n'\"")?;
        ensure!(
            n8n.contains(&activity.trim().to_owned()),
            "{activity} in pg_stat_activity, {backend}"
        );
        // A template's instance, which ends again; another one is nobody.
        app.ok(&["systemctl", "start", "job@1.service"])?;
        let from = app.sh("cat /run/job-1")?;
        ensure!(self.is_of(&from, "job")?, "job@1 came {from}");
        ensure!(!app.run(&["systemctl", "start", "job@2.service"])?.status.success(), "job@2 got in");
        app.sh("systemctl reset-failed")?;
        // A user, from whatever cgroup.
        let from = self.shell(&["--uid=backup"], "/usr/local/bin/try postgres.cloison.internal 5432 2>&1")?;
        ensure!(self.is_of(&from, "backup")?, "backup came {from}");
        // n8n's queue, and the server before n8n, whose master and workers have two users.
        let queue = self.ask("/redis")?;
        ensure!(n8n.contains(&queue), "Redis was asked by {queue:?}, and n8n is {n8n:?}");
        let url = format!("http://{}/db", self.address("web")?);
        let handed_on = self.hub.ok(&["perl", "-MHTTP::Tiny", "-e", GET, &url])?;
        ensure!(n8n.contains(&handed_on.trim().to_owned()), "nginx answered {handed_on}");
        // The socket of the unit that is started on demand belongs to it.
        let (from, at) = self.on_demand()?;
        ensure!(
            self.hub_addresses()?.contains(&from) && self.addresses("ondemand")?.contains(&at),
            "{from} {at}"
        );
        Ok(())
    }

    fn nobody_else(&mut self) -> Result<()> {
        self.only_n8n()
    }

    fn only_n8n(&self) -> Result<()> {
        let (postgres, redis) = (self.address("postgres")?, self.address("redis")?);
        let n8n = self.address("n8n")?;
        let plain = format!("/usr/local/bin/try {postgres} 5432 '' 1");
        let bound = format!("/usr/local/bin/try {postgres} 5432 {n8n} 1");
        let queue = format!("/usr/local/bin/try {redis} 6379 {n8n} 1");
        for (who, properties) in [
            ("worker", &["--unit=worker.service", "--uid=daemon"][..]),
            ("root's worker", &["--unit=worker.service"]),
            ("root", &[]),
            ("a user", &["--uid=daemon"]),
            ("a scope's name", &["--unit=x-n8n.service"]),
        ] {
            for line in [&plain, &bound, &queue] {
                let said = self.shell(properties, line)?;
                ensure!(said.starts_with("no: "), "{who}: {line}: {said}");
            }
        }
        let said = self.shell(&["--uid=backup"], &bound)?;
        ensure!(said.starts_with("no: "), "backup as n8n: {said}");
        // Around the mesh there is the server's own list, which names n8n's address alone.
        let said = self.shell(
            &["--uid=daemon"],
            "psql -XAtqc 'select 1' 'postgresql://n8n@127.0.0.1/app' 2>&1 || true",
        )?;
        ensure!(said.contains("no pg_hba.conf entry"), "{said}");
        Ok(())
    }

    /// What listens on all addresses is reached on loopback by everybody, until it is guarded: then by itself alone.
    fn guard(&mut self) -> Result<()> {
        let app = &self.app;
        let locally = |port: u16| {
            self.shell(
                &["--uid=daemon"],
                &format!("/usr/local/bin/try 127.0.0.1 {port} '' 1; /usr/local/bin/try ::1 {port} '' 1"),
            )
        };
        let own = |port: u16| self.ask(&format!("/try?127.0.0.1,{port}"));
        let exposed = || -> Result<String> { Ok(app.run(&["cloison-agent", "doctor"])?.stdout) };
        ensure!(locally(6379)? == "from 127.0.0.1\nfrom ::1", "{}", locally(6379)?);
        ensure!(own(6379)? == "from 127.0.0.1");
        let doctor = exposed()?;
        ensure!(
            doctor.contains("redis also listens on tcp/0.0.0.0:6379") && doctor.contains("whoever reaches any address of this host"),
            "{doctor}"
        );
        // Where its programs have no place, nobody is enforced as if they had.
        app.sh("umount /sys/fs/bpf 2>/dev/null || true; mkdir -p /etc/cloison; echo 'loopback_guard = true' >>/etc/cloison/agent.toml")?;
        app.ok(&["systemctl", "restart", "cloison-agent"])?;
        self.says("redis", "/sys/fs/bpf is no file system of type bpf")?;
        let doctor = exposed()?;
        ensure!(doctor.contains("redis (unit:redis-server.service) is unenforced"), "{doctor}");
        app.sh("mount -t bpf -o mode=0700 bpf /sys/fs/bpf; systemctl restart cloison-agent")?;
        self.works()?;
        let is_guarded = || -> Result<()> {
            for port in [5432, 5678, 6379, 80] {
                let said = locally(port)?;
                ensure!(said.matches("no: ").count() == 2 && !said.contains("from"), "{port}: {said}");
            }
            ensure!(own(5678)? == "from 127.0.0.1", "n8n does not reach itself");
            ensure!(own(6379)?.starts_with("no: "), "n8n reaches Redis around the mesh");
            ensure!(self.addresses("n8n")?.contains(&self.ask("/redis")?), "and by its name it does not");
            Ok(())
        };
        is_guarded()?;
        // A unit that starts again is guarded again, beside systemd's own programs at its cgroup (n8n has `IPAccounting=`).
        app.ok(&["systemctl", "restart", "n8n", "redis-server"])?;
        self.works()?;
        is_guarded()?;
        // Without an agent, and with another one.
        app.ok(&["systemctl", "stop", "cloison-agent"])?;
        let said = locally(5678)?;
        ensure!(said.matches("no: ").count() == 2, "without an agent: {said}");
        app.ok(&["systemctl", "start", "cloison-agent"])?;
        self.works()?;
        is_guarded()?;
        let said = app.sh("journalctl --unit=cloison-agent --output=cat | grep --count 'does not bind addresses' || true")?;
        ensure!(said.trim() == "0", "the guard stood in the way of the agent's own trials");
        let doctor = exposed()?;
        ensure!(
            doctor.contains("whoever reaches this host from elsewhere") && !doctor.contains("any address of this host"),
            "{doctor}"
        );
        app.sh("sed -i /loopback_guard/d /etc/cloison/agent.toml; systemctl restart cloison-agent")?;
        self.works_locally()?;
        ensure!(locally(6379)? == "from 127.0.0.1\nfrom ::1", "it stays guarded: {}", locally(6379)?);
        Ok(())
    }

    fn renumber(&mut self) -> Result<()> {
        let try_it = || self.shell(&["--uid=backup"], "/usr/local/bin/try postgres.cloison.internal 5432 '' 1");
        let from = try_it()?;
        ensure!(self.is_of(&from, "backup")?, "{from}");
        let former = self.app.sh("id --user backup")?;
        self.app.ok(&["usermod", "--uid", "34567", "backup"])?;
        self.says("backup", "number 34567")?;
        let from = try_it()?;
        ensure!(self.is_of(&from, "backup")?, "with another number it came {from}");
        let with_former = format!(
            "setpriv --reuid {} --clear-groups /usr/local/bin/try postgres.cloison.internal 5432 '' 1",
            former.trim()
        );
        let said = self.shell(&[], &with_former)?;
        ensure!(said.starts_with("no: "), "who has the former number is let in: {said}");
        Ok(())
    }

    fn restart(&mut self) -> Result<()> {
        let intruders = self.intruders()?;
        for _ in 0..3 {
            let before = self.cgroup("n8n.service")?;
            let start = Instant::now();
            self.app.ok(&["systemctl", "restart", "n8n.service"])?;
            self.works_locally()?;
            eprintln!(
                "n8n was restarted and reached its database after {} ms",
                start.elapsed().as_millis()
            );
            ensure!(self.cgroup("n8n.service")? != before, "the cgroup is the same");
        }
        self.app.ok(&["systemctl", "daemon-reload"])?;
        self.works()?;
        self.end(intruders)
    }

    fn stop(&mut self) -> Result<()> {
        let (app, n8n) = (&self.app, self.address("n8n")?);
        app.ok(&["systemctl", "stop", "n8n.service"])?;
        self.says("n8n", "which is not running")?;
        self.answers_nothing(&n8n)?;
        // Nor does who takes its place meanwhile.
        let line = ["systemd-run", "--quiet", "--wait", "--pipe", "--collect", "--unit=rogue.service"];
        let mut rogue = app.start("rogue", &[&line[..], &["lab-tool", "tcp-listen", &format!("{n8n}:5678")]].concat())?;
        rogue.wait_for_line("listening", SOON)?;
        self.answers_nothing(&n8n)?;
        app.ok(&["systemctl", "stop", "rogue.service"])?;
        app.ok(&["systemctl", "start", "n8n.service"])?;
        self.works()
    }

    fn answers_nothing(&self, n8n: &str) -> Result<()> {
        let refused = self.hub.run(&["/usr/local/bin/try", n8n, "5678"])?.refused()?;
        ensure!(refused.stdout.starts_with("no: "), "{}", refused.stdout);
        Ok(())
    }

    fn deeper(&mut self) -> Result<()> {
        let app = &self.app;
        let dropin = "/etc/systemd/system/n8n.service.d/slice.conf";
        app.write(dropin, "[Service]\nSlice=apps-web-front.slice\n")?;
        app.sh("systemctl daemon-reload && systemctl restart n8n.service")?;
        self.says(
            "n8n",
            "unit:n8n.service in /apps.slice/apps-web.slice/apps-web-front.slice/n8n.service",
        )?;
        self.works()?;
        app.sh(&format!("rm {dropin}; systemctl daemon-reload && systemctl restart n8n.service"))?;
        self.says("n8n", "unit:n8n.service in /system.slice/n8n.service")?;
        self.works()
    }

    fn restart_agent(&mut self) -> Result<()> {
        let (app, n8n) = (&self.app, self.addresses("n8n")?);
        let intruders = self.intruders()?;
        let held = self.ask_locally("/held")?;
        ensure!(held.contains(' '), "no connection is held: {held:?}");
        for how in [
            "systemctl restart cloison-agent",
            "systemctl kill --kill-whom=main --signal=KILL cloison-agent",
            "systemctl stop cloison-agent; sleep 2; systemctl start cloison-agent",
        ] {
            let start = Instant::now();
            app.sh(how)?;
            let done = start.elapsed();
            let after = self.ask_locally("/held").with_context(|| how.to_owned())?;
            eprintln!(
                "`{how}` took {} ms, and the open connection answered after {} ms",
                done.as_millis(),
                start.elapsed().as_millis()
            );
            ensure!(after == held, "after `{how}` it is {after:?}, not {held:?}");
            self.works()?;
        }
        self.end(intruders)?;
        // A unit that is started while there is no agent is nobody until there is one.
        app.sh("systemctl stop cloison-agent; systemctl restart n8n")?;
        let said = self.shell(&[], &format!("perl -MHTTP::Tiny -e '{GET}' http://127.0.0.1:5678/db"))?;
        ensure!(!n8n.contains(&said), "without an agent, n8n was let in as {said}");
        app.sh("systemctl start cloison-agent")?;
        self.works()
    }

    fn first_connects(&mut self) -> Result<()> {
        let app = &self.app;
        app.write("/etc/first.env", &format!("TARGET={}\n", self.address("postgres")?))?;
        app.write("/etc/plain.env", "TARGET=127.0.0.1\n")?;
        app.sh("cp /etc/first.env /etc/waited.env")?;
        app.write(
            "/etc/systemd/system/waited.service.d/wait.conf",
            "[Service]\nExecStartPre=/bin/sleep 0.1\n",
        )?;
        app.ok(&["systemctl", "daemon-reload"])?;
        let count: u32 = std::env::var("CLOISON_FIRST_CONNECTS").map_or(Ok(20), |count| count.parse())?;
        for (name, at_least) in [("plain", count), ("first", count / 2), ("waited", count - count / 10)] {
            let start = Instant::now();
            let script = format!(
                "ok=0; for i in $(seq {count}); do systemctl start {name}.service && ok=$((ok + 1)); done 2>/dev/null; echo $ok; systemctl reset-failed"
            );
            let connected: u32 = app.sh(&script)?.trim().parse()?;
            eprintln!(
                "{name}: {connected} of {count} first connects in {} ms",
                start.elapsed().as_millis()
            );
            ensure!(connected >= at_least, "{name}: {connected} of {count}");
        }
        Ok(())
    }

    fn without_bpf(&mut self) -> Result<()> {
        let app = &self.app;
        let dropin = "/etc/systemd/system/cloison-agent.service.d/no-bpf.conf";
        app.write(
            dropin,
            "[Service]\nCapabilityBoundingSet=\nCapabilityBoundingSet=CAP_NET_ADMIN\nSystemCallFilter=~bpf\n",
        )?;
        app.sh("systemctl daemon-reload && systemctl restart cloison-agent && systemctl restart n8n")?;
        self.says("n8n", "its programs have to bind to its address themselves")?;
        let (postgres, n8n) = (self.address("postgres")?, self.address("n8n")?);
        let unbound = self.ask(&format!("/try?{postgres},5432"))?;
        ensure!(unbound.starts_with("no: "), "{unbound}");
        let bound = self.ask(&format!("/try?{postgres},5432,{n8n}"))?;
        ensure!(bound == format!("from {n8n}"), "{bound}");
        self.only_n8n()?;
        app.sh("echo 'loopback_guard = true' >>/etc/cloison/agent.toml; systemctl restart cloison-agent")?;
        self.says("n8n", "loopback cannot be guarded")?;
        app.sh(&format!(
            "sed -i /loopback_guard/d /etc/cloison/agent.toml; rm {dropin}; systemctl daemon-reload && systemctl restart cloison-agent"
        ))?;
        self.says("n8n", "unit:n8n.service in /system.slice/n8n.service")?;
        self.works()
    }

    fn reboot(&mut self) -> Result<()> {
        self.app.reboot(&self.lab)?;
        self.works()?;
        self.only_n8n()?;
        self.own_addresses()?;
        healthy(&self.app)
    }

    /// Who tries to get at the database without a pause: another unit, root, and a user who takes n8n's address.
    fn intruders(&self) -> Result<Vec<(&'static str, Process)>> {
        let (postgres, n8n) = (self.address("postgres")?, self.address("n8n")?);
        let all = [
            ("worker.service", "", "--uid=daemon"),
            ("intruder-root.service", "", "--uid=root"),
            ("intruder-user.service", n8n.as_str(), "--uid=daemon"),
        ];
        let start = |(unit, from, user): (&'static str, &str, &str)| -> Result<_> {
            let unit_is = format!("--unit={unit}");
            let line = [
                "systemd-run",
                "--quiet",
                "--wait",
                "--pipe",
                "--collect",
                "--setenv=AGAIN=1",
                &unit_is,
                user,
            ];
            let what = ["/usr/local/bin/try", &postgres, "5432", from, "1"];
            let mut process = self.app.start(unit, &[&line[..], &what].concat())?;
            process.wait_for_line("no: ", SOON)?;
            Ok((unit, process))
        };
        all.into_iter().map(start).collect()
    }

    /// Ends them; none has got in.
    fn end(&self, intruders: Vec<(&'static str, Process)>) -> Result<()> {
        for (unit, mut process) in intruders {
            // On a quiet machine all is over before an attempt that waits for an answer is.
            wait_for("one more attempt", SOON, || {
                Ok((process.output().matches("no: ").count() > 1).then_some(()))
            })?;
            self.app.ok(&["systemctl", "stop", unit])?;
            process.wait(SOON)?;
            let said = process.output();
            let (refused, passed) = (said.matches("no: ").count(), said.matches("from ").count());
            ensure!(refused > 1 && passed == 0, "{unit} got in {passed} times: {said}");
            eprintln!("{unit} was refused {refused} times");
        }
        Ok(())
    }

    /// Waits until the agent says this of how a component is enforced.
    fn says(&self, component: &str, text: &str) -> Result<()> {
        let mut last = String::new();
        wait_for(&format!("`{text}`"), SOON, || {
            last = instance(&self.app, component).map_or_else(|error| format!("{error:#}"), |i| i["enforcement"].to_string());
            Ok(last.contains(text).then_some(()))
        })
        .with_context(|| last)
    }

    fn cgroup(&self, unit: &str) -> Result<String> {
        self.app.sh(&format!("stat -c %i /sys/fs/cgroup/system.slice/{unit}"))
    }

    /// Runs a script in a transient unit of the application's machine, and gives what it said.
    fn shell(&self, properties: &[&str], script: &str) -> Result<String> {
        let mut line = vec!["systemd-run", "--quiet", "--wait", "--pipe", "--collect"];
        line.extend(properties);
        line.extend(["sh", "-c", script]);
        let done = self.app.run(&line)?;
        Ok(format!("{}{}", done.stdout.trim(), done.stderr.trim()))
    }

    /// What n8n answers the hub, through the mesh.
    fn ask(&self, path: &str) -> Result<String> {
        let url = format!("http://{}:5678{path}", self.address("n8n")?);
        let answer = self.hub.ok(&["perl", "-MHTTP::Tiny", "-e", GET, &url])?;
        Ok(answer.trim().to_owned())
    }

    /// What n8n answers its own machine, beside the mesh.
    fn ask_locally(&self, path: &str) -> Result<String> {
        let answer = self
            .app
            .ok(&["perl", "-MHTTP::Tiny", "-e", GET, &format!("http://127.0.0.1:5678{path}")])?;
        Ok(answer.trim().to_owned())
    }

    /// Whom the unit that is started on demand sees, and where.
    fn on_demand(&self) -> Result<(String, String)> {
        let script = format!("exec 3<>/dev/tcp/{}/7100; cat <&3", self.address("ondemand")?);
        let said = self.hub.ok(&["timeout", "5", "bash", "-c", &script])?;
        let (from, at) = said.trim().split_once(' ').with_context(|| said.clone())?;
        Ok((from.to_owned(), at.to_owned()))
    }

    /// Waits until n8n, asked through the mesh, answers with what its database said.
    fn works(&self) -> Result<()> {
        self.answers(|| self.ask("/db"))
    }

    fn works_locally(&self) -> Result<()> {
        self.answers(|| self.ask_locally("/db"))
    }

    fn answers(&self, ask: impl Fn() -> Result<String>) -> Result<()> {
        let mut last = String::new();
        let reached = wait_for("n8n to reach its database", SOON, || {
            last = ask().unwrap_or_else(|error| format!("{error:#}"));
            Ok(self.addresses("n8n").is_ok_and(|n8n| n8n.contains(&last)).then_some(()))
        });
        reached.with_context(|| last)
    }

    fn is_of(&self, said: &str, component: &str) -> Result<bool> {
        let from = said.trim().strip_prefix("from ").unwrap_or_default().to_owned();
        Ok(self.addresses(component)?.contains(&from))
    }

    fn hub_addresses(&self) -> Result<Vec<String>> {
        addresses(&self.hub, "ops")
    }

    fn addresses(&self, component: &str) -> Result<Vec<String>> {
        addresses(&self.app, component)
    }

    /// The IPv4 address of a component of the application's machine.
    fn address(&self, component: &str) -> Result<String> {
        let all = self.addresses(component)?;
        all.into_iter().find(|address| !address.contains(':')).context("no IPv4 address")
    }
}

/// What the agent of a machine says of one of its components.
fn instance(machine: &Machine, component: &str) -> Result<Value> {
    let status: Value = serde_json::from_str(&machine.ok(&["cloison-agent", "status", "--output", "json"])?)?;
    let all = status.get("instances").and_then(Value::as_array).context("no instances")?;
    let found = all.iter().find(|i| i.get("component").and_then(Value::as_str) == Some(component));
    Ok(found.with_context(|| format!("{component} is not there"))?.clone())
}

fn addresses(machine: &Machine, component: &str) -> Result<Vec<String>> {
    let instance = instance(machine, component)?;
    let all = instance.get("addresses").and_then(Value::as_array).context("no addresses")?;
    Ok(all.iter().filter_map(Value::as_str).map(str::to_owned).collect())
}

fn programs_and_units(machine: &Machine) -> Result<()> {
    for (name, text) in [
        ("n8n", include_str!("units/n8n.pl")),
        ("on-demand", include_str!("units/on-demand.pl")),
    ] {
        machine.write(&format!("/usr/local/bin/{name}"), text)?;
    }
    machine.sh("chmod 755 /usr/local/bin/*")?;
    for (name, text) in UNITS {
        machine.write(&format!("/etc/systemd/system/{name}"), text)?;
    }
    machine.copy(&programs::find("lab-tool")?, "/usr/local/bin/lab-tool")?;
    machine.sh("systemctl daemon-reload")?;
    Ok(())
}
