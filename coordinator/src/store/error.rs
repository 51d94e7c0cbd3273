//! Why the store did not do it. Each says what, why and what to do; the API gives it a code and a status.

use cloison_proto::id::HostId;
use cloison_proto::label::HostName;

use super::model::GateRefusal;
use crate::entropy::EntropyError;
use crate::inventory::{PolicyVersion, ReadOnly};

/// Why something could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such host, token, credential or policy.
    #[error("there is no such {0}")]
    NotFound(&'static str),
    /// The policy in force is not the one that the writer started from.
    #[error("the policy changed since you read it: {}; read it again and apply your change to that", .current.map_or("none is in force".to_owned(), |v| format!("version {} is in force", v.0)))]
    PolicyChanged {
        /// The policy in force, if any.
        current: Option<PolicyVersion>,
    },
    /// Another host has that name.
    #[error("host {name} exists already ({holder}): revoke it first, or choose another name")]
    NameTaken {
        /// The name.
        name: HostName,
        /// Who has it.
        holder: HostId,
    },
    /// No address is left for a new instance.
    #[error("the mesh's address range {range} has no address left for {component}: addresses of vanished instances are free after 30 days")]
    PoolExhausted {
        /// The range.
        range: String,
        /// Which component needed one.
        component: String,
    },
    /// The gate refused what the mesh would look like.
    #[error("{}", .0.detail)]
    Refused(GateRefusal),
    /// A number, length or time outside its bounds.
    #[error("{what} {why}")]
    Invalid {
        /// Which field.
        what: &'static str,
        /// What it must be.
        why: String,
    },
    /// The actor's credential is not, or no longer, good for this.
    #[error("this credential does not allow that, or is no longer valid")]
    NotAuthorised,
    /// The host is revoked: nothing about it changes any more.
    #[error("host {0} was revoked: that is final; let the machine join again with a new token")]
    Revoked(HostId),
    /// The database may be behind its own mesh.
    #[error("{0}")]
    ReadOnly(ReadOnly),
    /// The disk is full.
    #[error("the disk under the data directory is full: free some space; nothing was changed")]
    StorageFull,
    /// A row that this program did not write, or that was damaged.
    #[error("the database is damaged: {table} holds {problem}; stop the coordinator and restore a backup")]
    Corrupt {
        /// In which table.
        table: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// There is no randomness.
    #[error(transparent)]
    Entropy(#[from] EntropyError),
    /// Anything else that the database says.
    #[error("the database did not answer as it should")]
    Database(#[source] sqlx::Error),
}

/// Why the store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no database.
    #[error("{path} does not exist: run `cloison-coordinator init --data ..` first")]
    Missing {
        /// The database file.
        path: String,
    },
    /// There is one already.
    #[error("{path} exists already: this mesh was initialised before; choose another data directory")]
    Exists {
        /// The database file.
        path: String,
    },
    /// The database was written by a newer program.
    #[error("the database has schema {found}, this program knows {known}: run the newer cloison-coordinator that wrote it")]
    Newer {
        /// The database's.
        found: i64,
        /// The newest one known here.
        known: i64,
    },
    /// Not a database, or a damaged one.
    #[error("{path} is no sound database ({problem}): restore a backup; what is there was left untouched")]
    Damaged {
        /// The database file.
        path: String,
        /// What the check found.
        problem: String,
    },
    /// `init` did not finish.
    #[error("{path} holds no mesh: its init was interrupted; remove the data directory and run init again")]
    Unfinished {
        /// The database file.
        path: String,
    },
    /// The schema could not be brought up to date.
    #[error("the schema of {path} could not be brought up to date")]
    Migrate {
        /// The database file.
        path: String,
        /// Why.
        #[source]
        source: sqlx::migrate::MigrateError,
    },
    /// The database cannot be opened for another reason.
    #[error("{path} cannot be opened")]
    Open {
        /// The database file.
        path: String,
        /// Why.
        #[source]
        source: sqlx::Error,
    },
    /// What is in it cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a host did not join.
#[derive(Debug, thiserror::Error)]
pub enum RedeemError {
    /// Refused; the cause is in the audit and goes to nobody else.
    #[error("enroll_denied")]
    Denied(crate::audit::Cause),
    /// It could not be judged.
    #[error(transparent)]
    Store(#[from] StoreError),
}
