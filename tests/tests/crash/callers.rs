//! Whoever calls the coordinator while it dies: policies, tokens, joins, labels and revocations, at once and without end.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use cloison_agent::enroll::{self, EnrollError};
use cloison_agent::state::StateDir;
use cloison_agent::state::clock::wall_now;
use cloison_agent::state::identity::Membership;
use cloison_tests::lab::solo::{Api, Solo};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::ledger::{Ledger, Pending};

/// Hosts that are not revoked, about.
const LIVING: usize = 2;

/// What all callers share.
#[derive(Clone)]
pub(crate) struct Callers {
    api: Api,
    coordinator: String,
    machines: PathBuf,
    ledger: Arc<Mutex<Ledger>>,
    /// The coordinator was asked to end: from now on an error is what no answer is, but for an error before.
    stopping: Arc<AtomicBool>,
}

impl Callers {
    pub(crate) fn new(solo: &Solo, machines: &Path) -> Result<Self> {
        std::fs::create_dir_all(machines)?;
        Ok(Self {
            api: solo.api()?,
            coordinator: solo.address().to_string(),
            machines: machines.to_owned(),
            ledger: Arc::default(),
            stopping: Arc::default(),
        })
    }

    pub(crate) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The coordinator is asked to end.
    pub(crate) fn stopping(&self) {
        self.stopping.store(true, Ordering::SeqCst);
    }

    /// An answer, unless there was none.
    fn answered(&self, answer: Result<(u16, Value)>) -> Option<(u16, Value)> {
        answer
            .ok()
            .filter(|(status, _)| *status < 500 || !self.stopping.load(Ordering::SeqCst))
    }

    /// Connections of a coordinator that is gone.
    pub(crate) fn anew(&mut self, solo: &Solo) -> Result<()> {
        self.stopping.store(false, Ordering::SeqCst);
        self.api = solo.api()?;
        Ok(())
    }

    /// Calls until nobody answers any more. An answer that should not be is an error of the task.
    pub(crate) fn call(&self) -> JoinSet<Result<()>> {
        let mut tasks = JoinSet::new();
        let (policies, tokens, hosts) = (self.clone(), self.clone(), self.clone());
        tasks.spawn(async move { policies.apply_policies().await });
        tasks.spawn(async move { tokens.make_hosts().await });
        tasks.spawn(async move { hosts.change_hosts().await });
        tasks
    }

    async fn apply_policies(&self) -> Result<()> {
        loop {
            let number = self.ledger().number();
            let text = policy(number);
            let Some((status, answer)) = self.answered(self.api.put_policy(&text).await) else {
                return Ok(());
            };
            ensure!(status == 200, "a policy was refused: {status} {answer}");
            let version = answer["version"].as_u64().context("no version")?;
            self.ledger().policies.insert(version, text);
        }
    }

    async fn make_hosts(&self) -> Result<()> {
        let pending = self.ledger().pending.clone();
        for join in pending {
            if !self.join(&join).await? {
                return Ok(());
            }
        }
        loop {
            let number = self.ledger().number();
            let request =
                json!({ "host": format!("h-{number}"), "labels": { "role": if number.is_multiple_of(2) { "app" } else { "db" } } });
            let Some((status, answer)) = self.answered(self.api.post("tokens", &request).await) else {
                return Ok(());
            };
            ensure!(status == 200 || status == 201, "a token was refused: {status} {answer}");
            let text = |field: &str| answer[field].as_str().map(str::to_owned).context("no token");
            let (id, token) = (text("id")?, text("token")?);
            self.ledger().tokens.insert(id.clone());
            if number.is_multiple_of(3) {
                let Some((status, answer)) = self.answered(self.api.delete(&format!("tokens/{id}")).await) else {
                    return Ok(());
                };
                ensure!(status < 300, "a token was not revoked: {status} {answer}");
                self.ledger().tokens_revoked.insert(id);
                continue;
            }
            let join = Pending {
                state: self.machines.join(number.to_string()),
                token,
            };
            self.ledger().pending.push(join.clone());
            if !self.join(&join).await? {
                return Ok(());
            }
            if number.is_multiple_of(4) {
                self.steal(&join.token, number).await?;
            }
        }
    }

    /// Joins, or asks again for what was not answered. Says whether there was an answer.
    async fn join(&self, join: &Pending) -> Result<bool> {
        let state = StateDir::open(&join.state)?;
        match enroll::join(&state, &join.token, std::slice::from_ref(&self.coordinator), wall_now()).await {
            Ok(_) | Err(EnrollError::AlreadyEnrolled { .. }) => {}
            Err(error) if error.is_denied() => return Err(error).context("a token that nobody else has was refused"),
            Err(_) => return Ok(false),
        }
        let host = Membership::load(&state)?.context("joined, and no member")?.host;
        let mut ledger = self.ledger();
        ledger.hosts.insert(host.to_string());
        ledger.pending.retain(|other| other != join);
        Ok(true)
    }

    /// Somebody else uses a token that was used.
    async fn steal(&self, token: &str, number: u64) -> Result<()> {
        let state = StateDir::open(self.machines.join(format!("thief-{number}")))?;
        let stolen = enroll::join(&state, token, std::slice::from_ref(&self.coordinator), wall_now()).await;
        ensure!(stolen.is_err(), "one token made two hosts");
        Ok(())
    }

    async fn change_hosts(&self) -> Result<()> {
        loop {
            let (number, living) = {
                let mut ledger = self.ledger();
                let living: Vec<_> = ledger.hosts.difference(&ledger.revoked).cloned().collect();
                (ledger.number(), living)
            };
            let Some(host) = living.get(usize::try_from(number)? % living.len().max(1)) else {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                continue;
            };
            if living.len() > LIVING {
                let Some((status, answer)) = self.answered(self.api.post(&format!("hosts/{host}/revoke"), &Value::Null).await) else {
                    return Ok(());
                };
                // An earlier try may have come through without an answer.
                ensure!(status == 200 || status == 409, "a host was not revoked: {status} {answer}");
                self.ledger().revoked.insert(host.clone());
                continue;
            }
            let change = json!({ "set": { "n": number.to_string() }, "remove": [] });
            let Some((status, answer)) = self.answered(self.api.post(&format!("hosts/{host}/labels"), &change).await) else {
                return Ok(());
            };
            match status {
                200 => drop(self.ledger().labels.insert(host.clone(), number)),
                409 => drop(self.ledger().revoked.insert(host.clone())),
                _ => anyhow::bail!("a label was refused: {status} {answer}"),
            }
        }
    }
}

/// A policy that nobody else wrote, of a length that fills the log and brings checkpoints.
fn policy(number: u64) -> String {
    let filling = "# the policy of the crash loop\n".repeat(usize::try_from(number % 7).unwrap_or(0) * 300);
    format!(
        "version: 1\n# {number}\n{filling}components:\n  app: {{on: {{role: app}}, attach: host}}\n  db: {{on: {{role: db}}, attach: host, services: \
         {{sql: tcp/{}}}}}\nallow:\n  - app -> db:sql\n",
        1024 + number % 60_000
    )
}
