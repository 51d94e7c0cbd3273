//! `prepare`: makes the machine safe for the mesh's addresses while it boots, before it has a network and before the agent runs.

use super::{Done, Failure, print_text};
use crate::attach::nudge::Nudge;
use crate::config::Config;
use crate::dataplane;
use crate::run::plane_config;
use crate::state::identity::Membership;
use crate::state::{StateDir, view_cache};

/// Loads the base table and lays the `unreachable` routes.
///
/// # Errors
/// [`Failure`].
pub fn run(config: &Config) -> Result<Done, Failure> {
    let dir = StateDir::open(&config.state_dir)?;
    let Some(us) = Membership::load(&dir)? else {
        print_text("This host is not enrolled: there is nothing to prepare.")?;
        return Ok(Done::Well);
    };
    let Some(range) = view_cache::overlay(&dir, &us)? else {
        print_text("No view was in force on this host yet: there is nothing to prepare.")?;
        return Ok(Done::Well);
    };
    dataplane::prepare(&plane_config(config, Nudge::default()), range).map_err(|error| Failure::Other {
        what: format!(
            "cannot make this host safe for the mesh's addresses: {}",
            crate::sys::with_causes(&error)
        ),
        hint: "run the command as root or with CAP_NET_ADMIN, with nftables in the kernel and installed".into(),
    })?;
    print_text(&format!(
        "Until the agent runs, the addresses of {} lead nowhere: table `{}` and the unreachable routes are in place.",
        us.mesh, config.table
    ))?;
    Ok(Done::Well)
}
