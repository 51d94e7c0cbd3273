//! `leave`: takes this host out of its mesh: names, base table, routes, namespaces' settings, then keys and membership.

use super::{Done, Failure, print_text};
use crate::args::Leave;
use crate::attach::nudge::Nudge;
use crate::config::Config;
use crate::dataplane;
use crate::names::block::Owner;
use crate::names::keeper;
use crate::run::plane_config;
use crate::state::clock::Moment;
use crate::state::identity::Membership;
use crate::state::view_cache;
use crate::state::{File, StateDir, StateError};

/// Leaves the mesh.
///
/// # Errors
/// [`Failure`]; what could not be removed is still there, and the command can be repeated.
pub fn run(config: &Config, args: &Leave) -> Result<Done, Failure> {
    let dir = StateDir::open(&config.state_dir)?;
    let _lock = match dir.lock() {
        Err(StateError::Locked { path }) if !args.force => {
            return Err(Failure::Other {
                what: format!("the agent is running: it uses {}", path.display()),
                hint: "stop it first (`systemctl disable --now cloison-agent`), or use --force".into(),
            });
        }
        Err(StateError::Locked { .. }) => None,
        other => Some(other?),
    };
    let us = match Membership::load(&dir) {
        Ok(us) => us,
        Err(error) if args.force => {
            eprintln!("warning: {error}");
            None
        }
        Err(error) => return Err(error.into()),
    };
    let Some(us) = us else {
        if args.force {
            clear_names(config, &dir, None, true)?;
            remove_all(&dir)?;
            print_text(
                "There was no usable membership; whatever else was kept is removed.\n\nNext: if this host was in a mesh, an operator takes it \
                 out of that with `cloison host revoke NAME`; `cloison host list` shows its name.",
            )?;
            return Ok(Done::Well);
        }
        return Err(Failure::Other {
            what: format!("this host is not enrolled: {} has no membership", dir.path().display()),
            hint: "nothing needs to be done; --force removes keys that a join left behind".into(),
        });
    };
    clear_host(config, &dir, &us, args.force)?;
    remove_all(&dir)?;
    print_text(&format!(
        "{} has left {}: its keys, its membership and everything that the agent made on this host are gone.\n\nNext: an operator takes it out of the mesh with `cloison host revoke {}`.",
        us.name, us.mesh, us.name
    ))?;
    Ok(Done::Well)
}

/// Removes what the data plane leaves behind, as far as the state says what that is.
fn clear_host(config: &Config, dir: &StateDir, us: &Membership, force: bool) -> Result<(), Failure> {
    let known = view_cache::load(dir, us, &Moment::now()).map(|cached| (cached.overlay, cached.view));
    let (overlay, view) = match known {
        Ok(known) => known,
        Err(error) if force => {
            eprintln!("warning: {error}");
            (view_cache::overlay(dir, us).ok().flatten(), None)
        }
        Err(error) => return Err(error.into()),
    };
    let owner = overlay.map(|overlay| Owner {
        mesh: us.mesh,
        host: us.host,
        overlay,
    });
    clear_names(config, dir, owner, force)?;
    let Some(range) = overlay else {
        eprintln!(
            "warning: no view is on disk; if the agent ever ran here, look for the nftables table `{}`",
            config.table
        );
        return Ok(());
    };
    match dataplane::leave(
        &plane_config(config, Nudge::default()),
        range,
        view.as_ref().map(|view| &**view.content()),
    ) {
        Err(error) if !force => Err(Failure::Other {
            what: format!(
                "cannot remove what the agent made on this host: {}",
                crate::sys::with_causes(&error)
            ),
            hint: "run the command as root; --force removes the state nevertheless".into(),
        }),
        Err(error) => {
            eprintln!("warning: {}", crate::sys::with_causes(&error));
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

/// Takes this host's block out of the hosts file.
fn clear_names(config: &Config, dir: &StateDir, owner: Option<Owner>, force: bool) -> Result<(), Failure> {
    match keeper::leave(dir, &config.hosts_file, owner) {
        Ok(_) => Ok(()),
        Err(error) if force => {
            eprintln!("warning: {error}; take the block of this host out of it by hand");
            Ok(())
        }
        Err(error) => Err(Failure::Other {
            what: format!("cannot take the names of components out of the hosts file: {error}"),
            hint: format!("{}; --force removes the state nevertheless", error.hint()),
        }),
    }
}

/// Membership first: a host that is half gone is not enrolled any more.
fn remove_all(dir: &StateDir) -> Result<(), StateError> {
    dir.remove(File::Membership)?;
    File::ALL.into_iter().try_for_each(|file| dir.remove(file))
}
