//! One look for a container that a view names: the runtime is asked, and its answer is checked against what was asked for.
//!
//! The runtime is trusted with what it says about containers, since it runs them. It is not trusted to have understood the question: for a
//! name it also takes the beginning of an id, and some releases take patterns for labels.

use std::io;
use std::sync::Arc;

use cloison_proto::policy::{ContainerMatch, Engine};

use super::ContainerError;
use super::api::{Api, ApiError, Inspected};
use super::found::Found;

/// How often a look begins anew because the container was started meanwhile.
const ATTEMPTS: usize = 3;

/// Looks for the one container that `which` means. `known` is what a look before found: if it still is that one, it is given back.
///
/// # Errors
/// [`ContainerError`] says why there is none; [`ApiError`] that it is not known.
pub async fn look(
    api: &Api,
    engine: Engine,
    which: &ContainerMatch,
    known: Option<&Arc<Found>>,
) -> Result<Result<Arc<Found>, ContainerError>, ApiError> {
    let none = || ContainerError::NoneRuns {
        engine,
        which: which.clone(),
    };
    for _ in 0..ATTEMPTS {
        let told = match ask(api, engine, which).await? {
            Ok(told) => told,
            Err(why) => return Ok(Err(why)),
        };
        if let Some(known) = known.filter(|known| known.is(&told) && !known.process().has_ended()) {
            return Ok(Ok(known.clone()));
        }
        let found = match Found::new(engine, &told) {
            Ok(found) => found,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(Err(none())),
            Err(error) => return Ok(Err(ContainerError::Process(Arc::new(error)))),
        };
        // The number of a process may have become another's before it was opened: then the runtime knows of the end by now, or the
        // process that was opened is not the one that it still speaks of.
        let again = api.inspect_id(&told.id).await?;
        if again.is_some_and(|again| found.is(&again)) {
            return Ok(if found.process().has_ended() {
                Err(none())
            } else {
                Ok(Arc::new(found))
            });
        }
    }
    Ok(Err(ContainerError::Process(Arc::new(io::ErrorKind::Interrupted.into()))))
}

/// What the runtime tells of the one container that runs and that `which` means.
async fn ask(api: &Api, engine: Engine, which: &ContainerMatch) -> Result<Result<Inspected, ContainerError>, ApiError> {
    let told = match which {
        ContainerMatch::Name(name) => api.inspect(name).await?.filter(|told| told.plain_name() == name.as_str()),
        ContainerMatch::Label(key, value) => {
            let mut listed = api.list(key, value).await?;
            let has = |labels: &Option<std::collections::BTreeMap<String, String>>| {
                let found = labels.as_ref().and_then(|labels| labels.get(key.as_str()));
                found.is_some_and(|found| found == value.as_str())
            };
            listed.retain(|container| has(&container.labels));
            match listed.as_slice() {
                [] => None,
                [one] => api.inspect_id(&one.id).await?.filter(|told| has(&told.config.labels)),
                several => {
                    let name = |names: &[String]| names.first().map(|name| name.trim_start_matches('/').to_owned());
                    let mut names: Vec<String> = several
                        .iter()
                        .map(|one| name(&one.names).unwrap_or_else(|| one.id.short().to_owned()))
                        .collect();
                    names.sort();
                    return Ok(Err(ContainerError::SeveralRun {
                        engine,
                        which: which.clone(),
                        names,
                    }));
                }
            }
        }
    };
    let running = told.filter(|told| told.state.running && told.state.pid > 0);
    Ok(running.ok_or_else(|| ContainerError::NoneRuns {
        engine,
        which: which.clone(),
    }))
}
