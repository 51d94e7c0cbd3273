//! Two hosts and their components for the evasion matrix, and the matrix itself.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};
use cloison_tests::lab::agent::INTERFACE;
use cloison_tests::lab::mesh::{Instance, Mesh};
use cloison_tests::lab::netns::Netns;
use cloison_tests::lab::person::{Group, Person, Who};
use cloison_tests::lab::process::Finished;
use cloison_tests::lab::sockets::{Answer, By, Order, Shape};
use cloison_tests::lab::wait_for;

pub(crate) const HOSTS: [&str; 2] = ["app-1", "db-1"];
pub(crate) const N8N: u32 = 2001;
pub(crate) const WORKER: u32 = 2002;
pub(crate) const STRANGER: u32 = 2003;
/// Ports on db-1 that answer questions.
pub(crate) const ECHO: u16 = 7000;
/// Ports of n8n and worker that answer questions.
pub(crate) const HOOK: u16 = 5678;
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const BOTH: [By; 2] = [By::Tcp, By::Udp];

/// What is to come of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expected {
    /// It reaches its target.
    Arrives,
    /// The kernel says no to who tries. For a stream this is told behind its second SYN, a second later, so that nobody waits for it here.
    Refused,
    /// Nothing reaches its target, whatever who tries is told.
    Nothing,
}

#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) who: String,
    pub(crate) attempt: String,
    pub(crate) expected: Expected,
    pub(crate) observed: String,
    /// Of the question, for what arrives later than anybody waits.
    pub(crate) token: u64,
    pub(crate) holds: bool,
}

/// Rows, and the question that is asked next.
#[derive(Debug, Default)]
pub(crate) struct Matrix {
    pub(crate) rows: Vec<Row>,
    pub(crate) token: u64,
}

/// Two hosts, their components, and those who belong there.
pub(crate) struct Stage {
    pub(crate) mesh: Mesh,
    pub(crate) n8n: Person,
    pub(crate) worker: Person,
    pub(crate) server: Person,
    pub(crate) other: Group,
    pub(crate) group: Group,
    pub(crate) boxed: Netns,
    pub(crate) at: Addresses,
    /// Questions that may arrive.
    pub(crate) welcome: BTreeSet<u64>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Addresses {
    pub(crate) n8n: Instance,
    pub(crate) worker: Instance,
    pub(crate) rest: Instance,
    pub(crate) postgres: Instance,
}

impl Matrix {
    pub(crate) fn next(&mut self) -> u64 {
        self.token += 1;
        self.token
    }

    pub(crate) fn note(&mut self, who: &str, attempt: String, expected: Expected, token: u64, answer: &Answer) {
        let observed = match (&answer.error, &answer.by) {
            (Some(error), _) => error.clone(),
            (None, Some(by)) => format!("answered by {by}"),
            (None, None) => "sent".to_owned(),
        };
        let holds = match expected {
            Expected::Arrives => answer.error.is_none(),
            Expected::Refused => answer.error.is_some(),
            Expected::Nothing => answer.by.is_none(),
        };
        self.rows.push(Row {
            who: who.to_owned(),
            attempt,
            expected,
            observed,
            token,
            holds,
        });
    }

    /// A row without a question.
    pub(crate) fn state(&mut self, who: &str, attempt: &str, expected: Expected, observed: String, holds: bool) {
        let (who, attempt) = (who.to_owned(), attempt.to_owned());
        self.rows.push(Row {
            who,
            attempt,
            expected,
            observed,
            token: 0,
            holds,
        });
    }

    /// One attempt, by an order that asks.
    pub(crate) fn ask(
        &mut self,
        who: &str,
        person: &mut Person,
        attempt: &str,
        (by, to): (By, SocketAddr),
        shape: &Shape,
        expected: Expected,
    ) -> Result<u64> {
        let token = self.next();
        let answer = person.order(&Order::Ask(by, to, shape.clone(), token))?;
        self.note(who, format!("{attempt}, {}", way(by, to.ip())), expected, token, &answer);
        Ok(token)
    }

    /// Holds the rows against what servers have seen, prints them, and insists on each.
    pub(crate) fn conclude(mut self, title: &str, seen: &BTreeSet<u64>) -> Result<()> {
        for row in self.rows.iter_mut().filter(|row| row.token != 0) {
            let arrived = seen.contains(&row.token);
            if arrived {
                row.observed += ", ARRIVED";
            }
            row.holds &= arrived == (row.expected == Expected::Arrives);
        }
        println!("\n{title}\n{:<34} {:<58} {:<9} observed", "who", "attempt", "expected");
        for row in &self.rows {
            let sign = if row.holds { "" } else { "   <-- DOES NOT HOLD" };
            println!(
                "{:<34} {:<58} {:<9} {}{sign}",
                row.who,
                row.attempt,
                format!("{:?}", row.expected).to_lowercase(),
                row.observed
            );
        }
        let broken: Vec<&Row> = self.rows.iter().filter(|row| !row.holds).collect();
        ensure!(
            broken.is_empty(),
            "{} of {} rows do not hold: {broken:#?}",
            broken.len(),
            self.rows.len()
        );
        println!("{} rows hold", self.rows.len());
        Ok(())
    }
}

pub(crate) fn way(by: By, address: IpAddr) -> String {
    let (by, family) = (if by == By::Tcp { "TCP" } else { "UDP" }, if address.is_ipv4() { 4 } else { 6 });
    format!("{by}/IPv{family}")
}

pub(crate) fn user(user: u32) -> Who {
    Who { user, ..Who::default() }
}

pub(crate) fn through(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

pub(crate) fn bound(from: IpAddr) -> Shape {
    Shape {
        from: Some((from, 0).into()),
        ..Shape::default()
    }
}

/// The mark of the sockets of the component with this address.
pub(crate) fn mark(component: Instance) -> u32 {
    0xc100_0000 | u32::from(component.v4) & 0x00ff_ffff
}

impl Stage {
    pub(crate) fn new(name: &str) -> Result<Self> {
        let mut mesh = Mesh::builder(name, &HOSTS).start()?;
        mesh.join_all()?;
        Self::over(mesh)
    }

    pub(crate) fn over(mesh: Mesh) -> Result<Self> {
        let (group, other) = (Group::new(mesh.lab(), "n8n")?, Group::new(mesh.lab(), "other")?);
        let app = mesh.host("app-1")?.net().clone();
        let boxed = mesh.host("app-1")?.component_namespace("boxed")?;
        let policy = format!(
            "version: 1\ncomponents:\n  \
               n8n:      {{on: app-1, attach: {{cgroup: {}}}, services: {{hook: tcp/{HOOK}, calls: udp/{HOOK}}}}}\n  \
               worker:   {{on: app-1, attach: {{user: {WORKER}}}, services: {{hook: tcp/{HOOK}, calls: udp/{HOOK}}}}}\n  \
               rest:     {{on: app-1, attach: host}}\n  \
               boxed:    {{on: app-1, attach: {{netns: {}}}}}\n  \
               postgres: {{on: db-1, attach: host, services: {{sql: tcp/5432, stream: tcp/{ECHO}, datagrams: udp/{ECHO}}}}}\n\
             allow:\n  - n8n -> postgres:sql\n  - n8n -> postgres:stream\n  - n8n -> postgres:datagrams\n  \
               - worker -> postgres:stream\n  - worker -> postgres:datagrams\n  \
               - postgres -> n8n:hook\n  - postgres -> n8n:calls\n  - postgres -> worker:hook\n  - postgres -> worker:calls\n",
            group.path(),
            boxed.path().display()
        );
        mesh.coordinator.apply_and_wait(&policy)?;
        let at = Addresses {
            n8n: mesh.instance("n8n", "app-1")?,
            worker: mesh.instance("worker", "app-1")?,
            rest: mesh.instance("rest", "app-1")?,
            postgres: mesh.instance("postgres", "db-1")?,
        };
        let n8n = Who {
            user: N8N,
            group: Some(group.place()),
            ..Who::default()
        };
        let mut server = Person::start(mesh.host("db-1")?.net(), &Who::default())?;
        for to in at.postgres.sockets(ECHO) {
            for by in BOTH {
                server.serve(by, to, Shape::default(), "postgres")?;
            }
        }
        let mut stage = Self {
            n8n: Person::start(&app, &n8n)?,
            worker: Person::start(&app, &user(WORKER))?,
            server,
            other,
            group,
            boxed,
            at,
            welcome: BTreeSet::new(),
            mesh,
        };
        stage.must_talk(1_000_000)?;
        Ok(stage)
    }

    /// Both components reach the server from their own addresses.
    pub(crate) fn must_talk(&mut self, first: u64) -> Result<()> {
        for (person, own) in [(&mut self.n8n, self.at.n8n), (&mut self.worker, self.at.worker)] {
            for (number, to) in (0..).zip(self.at.postgres.sockets(ECHO)) {
                for by in BOTH {
                    let token = first + number * 100;
                    self.welcome.extend(token..token + 100);
                    wait_for("a component to reach the server", PATIENCE, || {
                        let answer = person.order(&Order::Ask(by, to, Shape::default(), token))?;
                        Ok(answer.local.filter(|local| own.addresses().contains(&local.ip())).map(drop))
                    })?;
                }
            }
        }
        Ok(())
    }

    pub(crate) fn app(&self) -> Result<Netns> {
        Ok(self.mesh.host("app-1")?.net().clone())
    }

    pub(crate) fn person(&self, who: &Who) -> Result<Person> {
        Person::start(&self.app()?, who)
    }

    /// Those who are not n8n and would like to be, on its host.
    pub(crate) fn attackers(&self) -> [(&'static str, Who); 3] {
        let group = Some(self.other.place());
        [
            ("(a) another user", user(STRANGER)),
            (
                "(b) n8n's user, another cgroup",
                Who {
                    user: N8N,
                    group: group.clone(),
                    ..Who::default()
                },
            ),
            ("(c) root, another cgroup", Who { group, ..Who::default() }),
        ]
    }

    /// Tokens of questions that reached the server.
    pub(crate) fn seen(&mut self) -> Result<BTreeSet<u64>> {
        Ok(self.server.seen()?.iter().map(|seen| seen.token).collect())
    }
}

/// A stranger opens the host's TUN, as whoever owns it may.
pub(crate) fn takes_the_tun(app: &Netns) -> Result<Finished> {
    let stranger = STRANGER.to_string();
    let who = ["setpriv", "--reuid", &stranger, "--regid", &stranger, "--clear-groups"];
    app.run(&[&who[..], &["ip", "tuntap", "add", INTERFACE, "mode", "tun"]].concat())
}
