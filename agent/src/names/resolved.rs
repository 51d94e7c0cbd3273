//! Has systemd-resolved ask the mesh's resolver for the mesh's names, and for nothing else: a DNS server and a routing domain on the link of
//! the host's TUN, told over D-Bus (org.freedesktop.resolve1(5)). An offer, off unless configured; no file is written.
//!
//! What is wanted goes to a task of its own ([`Teller::want`]), which tells it when it changes, when systemd-resolved was started anew, and
//! when the TUN was made anew. The settings hang on the link and go with it, so that `leave` needs to take nothing back. A failure is shown in
//! `status` and stops nothing.

use std::sync::Arc;
use std::time::Duration;

use cloison_proto::net::AddressPair;
use cloison_proto::status::Resolved;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use zbus::Connection;
use zbus::fdo::DBusProxy;
use zbus::names::BusName;

use super::ZONE;

const NAME: &str = "org.freedesktop.resolve1";
const PATH: &str = "/org/freedesktop/resolve1";
const INTERFACE: &str = "org.freedesktop.resolve1.Manager";

/// How often it is looked whether systemd-resolved still is the one that was told.
const LOOK_EVERY: Duration = Duration::from_secs(3);

/// How long a look may take: as long as the bus gives a service to start, halved.
const WITHIN: Duration = Duration::from_secs(10);

/// The families of addresses, as in <sys/socket.h>.
const FAMILIES: (i32, i32) = (libc::AF_INET, libc::AF_INET6);

/// What systemd-resolved is to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// The number of the host's TUN.
    pub link: u32,
    /// Where names are answered.
    pub resolver: AddressPair,
    /// Whether this kernel has IPv6.
    pub has_ipv6: bool,
}

/// Why it could not be told.
#[derive(Debug, thiserror::Error)]
pub enum ResolvedError {
    /// It is not there.
    #[error(
        "systemd-resolved does not run; `systemctl start systemd-resolved`, or take `resolved = true` out of the agent's configuration"
    )]
    NotRunning,
    /// The bus or it refused.
    #[error("systemd-resolved was not told of the mesh's names: {0}; see `resolvectl status`")]
    Bus(#[from] zbus::Error),
    /// It took too long.
    #[error("systemd-resolved does not answer; `systemctl status systemd-resolved`")]
    Slow,
}

/// The handle of the task.
#[derive(Debug)]
pub struct Teller {
    wanted: watch::Sender<Option<Wanted>>,
    state: Arc<Mutex<Resolved>>,
    task: JoinHandle<()>,
}

impl Teller {
    /// Starts the task on the runtime of the caller.
    #[must_use]
    pub fn start() -> Self {
        let (wanted, receiver) = watch::channel(None);
        let state = Arc::new(Mutex::new(Resolved::Waiting));
        let task = tokio::spawn(work(receiver, state.clone()));
        Self { wanted, state, task }
    }

    /// Says what systemd-resolved is to know from now on.
    pub fn want(&self, wanted: Option<Wanted>) {
        self.wanted.send_if_modified(|held| std::mem::replace(held, wanted) != wanted);
    }

    /// How it does.
    #[must_use]
    pub fn state(&self) -> Resolved {
        self.state.lock().clone()
    }
}

impl Drop for Teller {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn work(mut wanted: watch::Receiver<Option<Wanted>>, state: Arc<Mutex<Resolved>>) {
    let mut told = None;
    loop {
        let now = *wanted.borrow_and_update();
        let new = match now {
            None => {
                told = None;
                Resolved::Waiting
            }
            Some(now) => match timeout(WITHIN, look(now, &mut told)).await.unwrap_or(Err(ResolvedError::Slow)) {
                Ok(()) => Resolved::Told,
                Err(error) => {
                    told = None;
                    Resolved::Failed { why: error.to_string() }
                }
            },
        };
        if *state.lock() != new {
            match &new {
                Resolved::Failed { why } => tracing::warn!(why, "names are not resolved by systemd-resolved"),
                Resolved::Told => tracing::info!("systemd-resolved asks the mesh's resolver for names below {ZONE}"),
                Resolved::Waiting | Resolved::Off => {}
            }
            *state.lock() = new;
        }
        // The agent has gone if nobody can want anything any more.
        if timeout(LOOK_EVERY, wanted.changed()).await.is_ok_and(|changed| changed.is_err()) {
            return;
        }
    }
}

/// Tells what is wanted, unless the very process that runs now was told it before.
async fn look(wanted: Wanted, told: &mut Option<(String, Wanted)>) -> Result<(), ResolvedError> {
    // A connection for each look: the bus may be started anew as well, and nothing is kept open in between.
    let bus = Connection::system().await?;
    let name = BusName::try_from(NAME)?;
    let owner = match DBusProxy::new(&bus).await?.get_name_owner(name).await {
        Ok(owner) => owner.to_string(),
        // Not started for our sake: who does without it has another resolver.
        Err(zbus::fdo::Error::NameHasNoOwner(_)) => return Err(ResolvedError::NotRunning),
        Err(error) => return Err(zbus::Error::from(error).into()),
    };
    let now = (owner, wanted);
    if told.as_ref() != Some(&now) {
        tell(&bus, wanted).await?;
        *told = Some(now);
    }
    Ok(())
}

async fn tell(bus: &Connection, wanted: Wanted) -> Result<(), ResolvedError> {
    let link = i32::try_from(wanted.link).unwrap_or(0);
    let AddressPair { v4, v6 } = wanted.resolver;
    let mut servers = vec![(FAMILIES.0, v4.octets().to_vec())];
    if wanted.has_ipv6 {
        servers.push((FAMILIES.1, v6.octets().to_vec()));
    }
    // Routing only: names below it go to this link, and it is not searched for names of one word.
    let domains = [(ZONE, true)];
    bus.call_method(Some(NAME), PATH, Some(INTERFACE), "SetLinkDNS", &(link, servers))
        .await?;
    bus.call_method(Some(NAME), PATH, Some(INTERFACE), "SetLinkDomains", &(link, domains.as_slice()))
        .await?;
    bus.call_method(Some(NAME), PATH, Some(INTERFACE), "SetLinkDefaultRoute", &(link, false))
        .await?;
    Ok(())
}
