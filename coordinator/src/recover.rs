//! `recover`: how a coordinator goes on whose database is older than what agents have.
//!
//! It works on the database, beside the running coordinator, which has noted there whom it met since it changes nothing, and which takes up
//! the mesh within a second when `recover` is through. Whoever may write the data directory may recover the mesh; no credential of the backup
//! can. What was revoked after the backup is not in it, and no agent tells: so everything that may have been is named, and what can be
//! withdrawn without a loss that matters (tokens, credentials) is withdrawn.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use cloison_proto::id::HostId;
use cloison_proto::label::HostName;
use cloison_proto::version::Version;

use crate::args::RecoverArgs;
use crate::data_dir::{DataDir, DataDirError};
use crate::entropy::Environment;
use crate::init::shown_time;
use crate::inventory::{Inventory, ReadOnly};
use crate::store::{HostRecord, OpenError, Recovered, Recovery, Sighting, Store, StoreError};

/// Why the mesh was not recovered.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The data directory.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The database.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A change in it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A host to be revoked that is not there.
    #[error("--revoke {0}: there is no such host in this database, or it is revoked already; nothing was changed")]
    NoHost(String),
    /// Nothing is in doubt.
    #[error("there is nothing to recover: this coordinator was not restored from a backup, and no agent knows better")]
    NoDoubt,
}

/// What `recover` has to say.
#[derive(Debug)]
pub enum Outcome {
    /// What would happen.
    Shown(Box<Report>),
    /// What happened.
    Done(Box<Report>, Box<Recovered>),
}

/// What is known about the time that the database has lost.
#[derive(Debug)]
pub struct Report {
    read_only: ReadOnly,
    version: Version,
    names: BTreeMap<HostId, HostName>,
    sightings: Vec<Sighting>,
    revoke: BTreeSet<HostId>,
    keep_credentials: bool,
}

/// Shows what agents know better, and with `--yes` goes on.
///
/// # Errors
/// [`RecoverError`]; nothing was changed then.
pub async fn recover(args: &RecoverArgs, env: &Environment) -> Result<Outcome, RecoverError> {
    let data = DataDir::share(&args.data)?;
    let store = Store::open(&data.database(), env.clone()).await?;
    let outcome = decide(args, &store).await;
    store.close().await;
    outcome
}

async fn decide(args: &RecoverArgs, store: &Store) -> Result<Outcome, RecoverError> {
    let report = Box::new(Report::of(args, store).await?);
    if !args.yes {
        return Ok(Outcome::Shown(report));
    }
    let recovery = Recovery {
        revoke: report.revoke.clone(),
        keep_credentials: args.keep_credentials,
    };
    let recovered = store.recover(&recovery).await?;
    Ok(Outcome::Done(report, Box::new(recovered)))
}

impl Report {
    async fn of(args: &RecoverArgs, store: &Store) -> Result<Self, RecoverError> {
        let inventory = store.inventory();
        let revoke = args.revoke.iter().map(|wanted| find(&inventory, wanted));
        let known = store.list_hosts(true).await?;
        let name = |record: &HostRecord| (record.host.id, record.host.name.clone());
        Ok(Self {
            read_only: inventory.read_only.ok_or(RecoverError::NoDoubt)?,
            version: inventory.version,
            revoke: revoke.collect::<Result<_, _>>()?,
            names: known.iter().filter(|record| record.revoked_at.is_none()).map(name).collect(),
            sightings: {
                let revoked = |host| known.iter().any(|record| record.host.id == host && record.revoked_at.is_some());
                let seen = store.sightings().await?.into_iter();
                seen.filter(|sighting| !revoked(sighting.host)).collect()
            },
            keep_credentials: args.keep_credentials,
        })
    }

    /// Known hosts with a version that this database does not know.
    fn ahead(&self) -> impl Iterator<Item = (&HostName, Version)> {
        let named = self
            .sightings
            .iter()
            .filter_map(|seen| Some((self.names.get(&seen.host)?, seen.version?)));
        named.filter(|(_, version)| *version > self.version)
    }

    /// Hosts with certificates of this mesh that this database does not know.
    fn unknown(&self) -> impl Iterator<Item = &Sighting> {
        self.sightings.iter().filter(|seen| !self.names.contains_key(&seen.host))
    }

    /// Known hosts that were not in contact since, and are not about to be revoked.
    fn silent(&self) -> impl Iterator<Item = (HostId, &HostName)> {
        let seen: BTreeSet<_> = self.sightings.iter().map(|seen| seen.host).collect();
        let silent = self
            .names
            .iter()
            .filter(move |(id, _)| !seen.contains(id) && !self.revoke.contains(id));
        silent.map(|(id, name)| (*id, name))
    }

    /// Known hosts that were in contact since, at no newer version.
    fn level(&self) -> impl Iterator<Item = &HostName> {
        let named = self
            .sightings
            .iter()
            .filter_map(|seen| Some((self.names.get(&seen.host)?, seen.version)));
        named
            .filter(|(_, version)| version.is_none_or(|v| v <= self.version))
            .map(|(name, _)| name)
    }

    fn sections(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Since {}: {}.", shown_time(self.read_only.since), self.read_only)?;
        writeln!(f, "This database ends at version {}.", self.version)?;
        let newest = self.ahead().map(|(_, version)| version).max();
        section(
            f,
            "Hosts that have newer views, by this coordinator's own signature",
            self.ahead(),
            |(name, version)| format!("{name}  has {version}"),
        )?;
        if let Some(newest) = newest {
            let lost = newest.revision.saturating_sub(self.version.revision);
            let changes = if newest.generation == self.version.generation {
                lost.to_string()
            } else {
                "an unknown number of".into()
            };
            writeln!(
                f,
                "\nAt least {changes} changes are lost: policies, hosts that joined, and hosts that were revoked. What was lost has to be done again."
            )?;
        }
        section(
            f,
            "Hosts that this database does not know, with certificates of this mesh (they have to join again)",
            self.unknown(),
            |seen| format!("{}  from {}, last at {}", seen.host, seen.source, shown_time(seen.seen_at)),
        )?;
        section(
            f,
            "Hosts in contact that showed no newer view (they may have none, or did not show it)",
            self.level(),
            ToString::to_string,
        )?;
        section(
            f,
            "Hosts that were not in contact since (switched off, or revoked after the backup was made)",
            self.silent(),
            |(id, name)| format!("{name}  {id}"),
        )?;
        let revoked = self.revoke.iter().filter_map(|id| self.names.get(id));
        section(f, "Hosts to be revoked", revoked, ToString::to_string)
    }
}

fn section<T>(f: &mut fmt::Formatter<'_>, title: &str, rows: impl Iterator<Item = T>, row: impl Fn(T) -> String) -> fmt::Result {
    let mut rows = rows.peekable();
    if rows.peek().is_some() {
        writeln!(f, "\n{title}:")?;
    }
    rows.try_for_each(|each| writeln!(f, "  {}", row(each)))
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shown(report) => {
                report.sections(f)?;
                let credentials = if report.keep_credentials { "" } else { " and API credential" };
                writeln!(
                    f,
                    "\nEvery host above that this database knows gets a view again, unless it is revoked now: a host that was revoked after the backup \
                     was made is among them, if there is one.\nWireGuard keys that were changed after the backup was made are trusted \
                     again until their hosts link: if one of them leaked, revoke its host.\nEvery enrollment token{credentials} of the backup will be revoked.\n\nNothing was \
                     changed. To go on: `cloison-coordinator recover --yes`, with `--revoke HOST` for each host that must not come back."
                )
            }
            Self::Done(report, done) => {
                report.sections(f)?;
                writeln!(
                    f,
                    "\nRecovered: the mesh goes on at version {}. Revoked: {} hosts, {} enrollment tokens, {} API credentials.",
                    done.version,
                    report.revoke.len(),
                    done.tokens,
                    done.credentials
                )?;
                match &done.credential {
                    None => Ok(()),
                    Some(made) => writeln!(
                        f,
                        "\n  owner credential    {}\n                      shown this once; good until {}; write it into the CLI's configuration",
                        *made.text.reveal(),
                        shown_time(made.expires)
                    ),
                }
            }
        }
    }
}

/// The living host of this id or name.
fn find(inventory: &Inventory, wanted: &str) -> Result<HostId, RecoverError> {
    let by_id = wanted.parse().ok().filter(|id| inventory.hosts.contains_key(id));
    let by_name = || Some(inventory.host_named(&wanted.parse().ok()?)?.id);
    by_id.or_else(by_name).ok_or_else(|| RecoverError::NoHost(wanted.to_owned()))
}
