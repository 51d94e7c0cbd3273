//! The first start of a service that is not enrolled yet: the service manager hands over an enrollment token as a credential
//! (`LoadCredential=cloison.token:...`, systemd.exec(5)), and the agent enrolls with it by the same code as `join`.
//!
//! What may pass (no coordinator in reach, a connection that broke off) is tried again, at growing intervals, for as long as it takes. What
//! only a person can change (no token, a text that is none, a token that is refused) ends the agent with an exit status of its own, by which
//! its unit is told not to start it again. The credential is of no use any more once the host is enrolled, and is not read then.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use cloison_proto::token::MAX_LEN;
use zeroize::Zeroizing;

use crate::config::Config;
use crate::control::backoff::Backoff;
use crate::enroll::{self, EnrollError};
use crate::manager::Manager;
use crate::state::StateDir;
use crate::state::clock::wall_now;

/// The credential's name.
pub const CREDENTIAL: &str = "cloison.token";

/// What the service manager is asked for beyond the wait until the next attempt: as long as one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(60);

/// Why the agent did not enroll by itself.
#[derive(Debug, thiserror::Error)]
pub enum FirstStartError {
    /// There is no credential.
    #[error("this host is not enrolled: {} has no membership, and the agent was given no credential `{CREDENTIAL}`", state.display())]
    NoToken {
        /// The state directory.
        state: PathBuf,
    },
    /// The credential cannot be read.
    #[error("cannot read the credential {}: {source}", path.display())]
    Credential {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It did not work, and will not work another time.
    #[error("cannot enroll with the credential `{CREDENTIAL}`: {0}")]
    Enroll(#[from] EnrollError),
}

impl FirstStartError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::NoToken { .. } => "make a token with `cloison token create`, then run `cloison-agent join --token-file FILE` here; \
                                     or put the token into /etc/credstore/cloison.token and start the service again"
                .into(),
            Self::Credential { .. } => {
                format!("give the unit a token by `LoadCredential={CREDENTIAL}:FILE`, or run `cloison-agent join --token-file FILE`")
            }
            Self::Enroll(e) => e.hint(),
        }
    }

    /// Whether only a person can change it: starting again would end in the same way.
    #[must_use]
    pub const fn needs_a_person(&self) -> bool {
        match self {
            Self::NoToken { .. } | Self::Credential { .. } => true,
            Self::Enroll(e) => e.is_denied() || matches!(e, EnrollError::Token(_)),
        }
    }
}

/// Reads a token; a little more than the longest one is read, so that a wrong file is noticed and not swallowed.
///
/// # Errors
/// The reader's.
pub fn read_token(from: impl Read) -> io::Result<Zeroizing<String>> {
    let mut token = Zeroizing::new(String::new());
    from.take(MAX_LEN as u64 + 64).read_to_string(&mut token)?;
    Ok(token)
}

/// Enrolls this host with the credential of its service; returns when it is enrolled, however long that takes.
///
/// # Errors
/// [`FirstStartError`].
pub async fn enroll(dir: &StateDir, config: &Config, manager: Manager, seed: u64) -> Result<(), FirstStartError> {
    let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
    let token = read_credential(credentials.as_deref(), dir.path())?;
    let mut backoff = Backoff::new(seed);
    loop {
        let error = match enroll::join(dir, &token, &config.coordinators, wall_now()).await {
            Ok(enrolled) => {
                enrolled.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
                tracing::info!(name = %enrolled.name, host = %enrolled.host, mesh = %enrolled.mesh, "enrolled");
                return Ok(());
            }
            Err(error) if may_pass(&error) => error,
            Err(error) => return Err(error.into()),
        };
        let wait = backoff.next_wait();
        tracing::warn!(%error, hint = error.hint(), again_in = ?wait, "not enrolled yet");
        manager.status(&format!("not enrolled yet, trying again: {error}"));
        manager.still_starting(wait + ATTEMPT);
        tokio::time::sleep(wait).await;
    }
}

/// Whether another attempt may end otherwise without anybody doing anything here.
const fn may_pass(error: &EnrollError) -> bool {
    matches!(error, EnrollError::Unreachable { .. } | EnrollError::Connection(_))
}

fn read_credential(credentials: Option<&Path>, state: &Path) -> Result<Zeroizing<String>, FirstStartError> {
    let missing = || FirstStartError::NoToken { state: state.into() };
    let path = credentials.ok_or_else(missing)?.join(CREDENTIAL);
    let token = match std::fs::File::open(&path).and_then(read_token) {
        Ok(token) => token,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(missing()),
        Err(source) => return Err(FirstStartError::Credential { path, source }),
    };
    if token.trim().is_empty() {
        let source = io::Error::new(io::ErrorKind::UnexpectedEof, "there is nothing in it");
        return Err(FirstStartError::Credential { path, source });
    }
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    #[test]
    fn without_a_token_a_person_is_needed_and_told_what_to_do() -> Outcome {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join(CREDENTIAL);
        for (credentials, content) in [(None, None), (Some(folder.path()), None), (Some(folder.path()), Some(" \n"))] {
            if let Some(content) = content {
                std::fs::write(&path, content)?;
            }
            let error = read_credential(credentials, Path::new("/state"))
                .err()
                .ok_or("a token without one")?;
            assert!(error.needs_a_person() && error.hint().contains("cloison-agent join"), "{error}");
        }
        Ok(())
    }

    #[test]
    fn only_what_may_pass_is_tried_again() {
        let unreachable = EnrollError::Unreachable { tried: Vec::new() };
        assert!(may_pass(&unreachable) && !FirstStartError::Enroll(unreachable).needs_a_person());
        for refused in [EnrollError::Denied, EnrollError::Expired { ago: 5 }] {
            assert!(!may_pass(&refused) && FirstStartError::Enroll(refused).needs_a_person());
        }
    }
}
