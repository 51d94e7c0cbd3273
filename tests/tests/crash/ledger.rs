//! What the coordinator has acknowledged, written down by those who called it; and whether its database keeps all of it, and nothing half.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use cloison_coordinator::audit::Leaf;
use cloison_coordinator::entropy::Environment;
use cloison_coordinator::inventory::PolicyVersion;
use cloison_coordinator::store::Store;

/// The actions that raise the mesh's revision; all others are leaves alone.
const RAISING: [&str; 12] = [
    "mesh.set",
    "policy.apply",
    "token.create",
    "token.revoke",
    "host.join",
    "host.contest",
    "host.settle",
    "host.label",
    "host.rename",
    "host.revoke",
    "credential.create",
    "credential.revoke",
];

/// A join that has no answer yet. The same machine may ask again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pending {
    /// The machine's folder of state.
    pub(crate) state: PathBuf,
    /// The token's text.
    pub(crate) token: String,
}

/// Everything that was acknowledged.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    pub(crate) tokens: BTreeSet<String>,
    pub(crate) tokens_revoked: BTreeSet<String>,
    pub(crate) hosts: BTreeSet<String>,
    pub(crate) revoked: BTreeSet<String>,
    /// The highest number that was written to a host's label.
    pub(crate) labels: BTreeMap<String, u64>,
    /// Texts by number.
    pub(crate) policies: BTreeMap<u64, String>,
    pub(crate) pending: Vec<Pending>,
    drawn: u64,
}

impl Ledger {
    /// A number that was not drawn before.
    pub(crate) fn number(&mut self) -> u64 {
        self.drawn += 1;
        self.drawn
    }

    /// Holds the database of this data directory, which nobody is using, against what was acknowledged. It works on a copy, so that the
    /// coordinator meets the files as its predecessor left them.
    pub(crate) async fn check(&self, data: &Path) -> Result<()> {
        let copy = tempfile::tempdir()?;
        for name in ["cloison.db", "cloison.db-wal"] {
            let from = data.join(name);
            if from.exists() {
                std::fs::copy(&from, copy.path().join(name))?;
            }
        }
        let store = Store::open(&copy.path().join("cloison.db"), Environment::system()).await?;
        let checked = self.check_store(&store).await;
        store.close().await;
        checked
    }

    async fn check_store(&self, store: &Store) -> Result<()> {
        let head = store.verify_audit().await.context("the audit's chain")?;
        let leaves = leaves(store).await?;
        ensure!(
            u64::try_from(leaves.len())? == head,
            "{head} leaves, of which {} can be read",
            leaves.len()
        );
        let audit = Audit(&leaves);
        check_tokens(self, store, &audit).await?;
        check_hosts(self, store, &audit).await?;
        let inventory = store.inventory();
        let raised = audit.done().filter(|leaf| RAISING.contains(&leaf.action.as_str())).count();
        ensure!(
            inventory.version.revision == 1 + u64::try_from(raised)?,
            "revision {}, but {raised} changes in the audit",
            inventory.version.revision
        );
        let applied = u64::try_from(audit.done().filter(|leaf| leaf.action == "policy.apply").count())?;
        let in_force = inventory.policy.as_ref().map_or(0, |policy| policy.version.0);
        ensure!(applied == in_force, "policy {in_force}, and {applied} leaves");
        let newest = self.policies.keys().last().copied().unwrap_or(0);
        ensure!(newest <= in_force, "policy {newest} was acknowledged, and {in_force} is in force");
        // The last 32 are kept, those among them that got no answer.
        for (version, text) in self.policies.range(in_force.saturating_sub(31)..) {
            let kept = store
                .policy(PolicyVersion(*version))
                .await
                .with_context(|| format!("policy {version}"))?;
            ensure!(*kept.text == **text, "policy {version} is another one");
        }
        // No half state: whoever a component is meant for has its addresses.
        for placement in inventory.policy.iter().flat_map(|policy| policy.placements.iter()) {
            let on = inventory.instances.get(&placement.component);
            for host in inventory.hosts.values().filter(|host| placement.covers(host)) {
                ensure!(
                    on.is_some_and(|on| on.contains_key(&host.id)),
                    "{} has no address on {}",
                    placement.component,
                    host.name
                );
            }
        }
        Ok(())
    }
}

/// The leaves, asked.
struct Audit<'a>(&'a [Leaf]);

impl<'a> Audit<'a> {
    fn done(&self) -> impl Iterator<Item = &'a Leaf> {
        self.0.iter().filter(|leaf| leaf.outcome == "done")
    }

    /// The objects of this kind of all leaves of one action: each once.
    fn objects(&self, action: &str, kind: &str) -> Result<BTreeSet<&'a str>> {
        let mut found = BTreeSet::new();
        for leaf in self.done().filter(|leaf| leaf.action == action) {
            for object in leaf.objects.iter().filter(|object| object.starts_with(kind)) {
                ensure!(found.insert(object.as_str()), "{action} of {object} stands in the audit twice");
            }
        }
        Ok(found)
    }
}

async fn leaves(store: &Store) -> Result<Vec<Leaf>> {
    let (mut leaves, mut after) = (Vec::new(), Some(0));
    while let Some(seq) = after {
        let page = store.audit_page(seq, 500).await?;
        leaves.extend(page.leaves);
        after = page.next;
    }
    Ok(leaves)
}

fn all_in<'a>(what: &str, acknowledged: impl IntoIterator<Item = &'a String>, there: &BTreeSet<String>) -> Result<()> {
    for one in acknowledged {
        ensure!(there.contains(one), "{what} {one} was acknowledged, and is lost");
    }
    Ok(())
}

fn same(what: &str, rows: &BTreeSet<String>, leaves: &BTreeSet<&str>) -> Result<()> {
    let rows: BTreeSet<&str> = rows.iter().map(String::as_str).collect();
    let odd: Vec<_> = rows.symmetric_difference(leaves).collect();
    ensure!(odd.is_empty(), "{what}: rows and leaves differ in {odd:?}");
    Ok(())
}

async fn check_tokens(ledger: &Ledger, store: &Store, audit: &Audit<'_>) -> Result<()> {
    let tokens = store.list_tokens().await?;
    let rows = tokens.iter().map(|token| token.id.to_string()).collect();
    all_in("token", &ledger.tokens, &rows)?;
    same("tokens", &rows, &audit.objects("token.create", "token_")?)?;
    let revoked = tokens.iter().filter(|token| token.revoked_at.is_some());
    let revoked = revoked.map(|token| token.id.to_string()).collect();
    all_in("the revocation of", &ledger.tokens_revoked, &revoked)?;
    same("revoked tokens", &revoked, &audit.objects("token.revoke", "token_")?)?;
    for token in &tokens {
        let used = 1 - usize::try_from(token.uses_left)?;
        ensure!(
            token.redeemed.len() == used,
            "{} has {} uses left, and made {:?}",
            token.id,
            token.uses_left,
            token.redeemed
        );
    }
    Ok(())
}

async fn check_hosts(ledger: &Ledger, store: &Store, audit: &Audit<'_>) -> Result<()> {
    let hosts = store.list_hosts(true).await?;
    let rows = hosts.iter().map(|record| record.host.id.to_string()).collect();
    all_in("host", &ledger.hosts, &rows)?;
    same("hosts", &rows, &audit.objects("host.join", "host_")?)?;
    let revoked = hosts.iter().filter(|record| record.revoked_at.is_some());
    let revoked = revoked.map(|record| record.host.id.to_string()).collect();
    all_in("the revocation of", &ledger.revoked, &revoked)?;
    same("revoked hosts", &revoked, &audit.objects("host.revoke", "host_")?)?;
    for record in &hosts {
        let id = record.host.id.to_string();
        let label = record.host.labels.iter().find(|(key, _)| key.as_str() == "n");
        let kept: u64 = label.map_or(Ok(0), |(_, value)| value.as_str().parse())?;
        let acknowledged = ledger.labels.get(&id).copied().unwrap_or(0);
        ensure!(
            kept >= acknowledged,
            "the label of {id} is {kept}, and {acknowledged} was acknowledged"
        );
    }
    Ok(())
}
