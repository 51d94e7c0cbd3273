//! Names over DNS: in each namespace with a TUN the agent answers on the mesh's resolver addresses for what the components there may reach, so
//! that a container needs no more than that address in its resolver's settings. Nothing else is answered, and nobody's settings are changed.
//!
//! A view goes: [`entries_for`](super::entries_for) (what the components of one namespace may be told) -> [`zone::Zone`] ->
//! [`serve::Server`], which answers by [`answer::answer`]. [`Resolvers`] has one server for each namespace in which components are attached, and
//! none elsewhere: its sockets go before the namespace is let go.

pub mod answer;
pub mod serve;
pub mod zone;

use std::collections::{BTreeMap, BTreeSet};

use cloison_proto::label::ComponentName;
use cloison_proto::net::OverlayRange;
use cloison_proto::status::ResolverAt;
use cloison_proto::version::Timestamp;
use tokio::runtime::Handle;

use crate::attach::site::has_ipv6;
use crate::sys::netns::{NetNs, NetNsId};
use serve::{ServeError, Server};
use zone::Zone;

/// A namespace with a TUN.
#[derive(Debug)]
pub struct Room<'s> {
    /// The namespace.
    pub namespace: &'s NetNs,
    /// Where it is, for people.
    pub shown: &'s str,
    /// The components that are attached there.
    pub components: BTreeSet<ComponentName>,
}

/// The servers of a host.
#[derive(Debug)]
pub struct Resolvers {
    runtime: Handle,
    rooms: BTreeMap<NetNsId, Served>,
}

#[derive(Debug)]
struct Served {
    range: OverlayRange,
    shown: String,
    components: BTreeSet<ComponentName>,
    server: Result<Server, ServeError>,
}

impl Resolvers {
    /// None yet; their tasks will run on `runtime`.
    #[must_use]
    pub const fn new(runtime: Handle) -> Self {
        Self {
            runtime,
            rooms: BTreeMap::new(),
        }
    }

    /// Serves these namespaces and no others. A new one is told nothing before [`Resolvers::tell`]; one that could not be served is tried again.
    pub fn keep<'s>(&mut self, range: OverlayRange, rooms: impl IntoIterator<Item = Room<'s>>) {
        let mut before = std::mem::take(&mut self.rooms);
        for Room {
            namespace,
            shown,
            components,
        } in rooms
        {
            let held = before.remove(&namespace.id()).filter(|held| held.range == range);
            let (server, told) = match held {
                // Who is no longer there is told of nothing that only he may reach.
                Some(Served {
                    server: Ok(server),
                    components: held,
                    ..
                }) if held == components => (Ok(server), None),
                Some(Served { server: Ok(server), .. }) => {
                    server.tell(nothing(range));
                    (Ok(server), None)
                }
                Some(Served { server: Err(error), .. }) => {
                    (Server::start(namespace, nothing(range), &self.runtime), Some(error.to_string()))
                }
                None => (Server::start(namespace, nothing(range), &self.runtime), None),
            };
            match &server {
                Err(error) if told.as_ref() != Some(&error.to_string()) => {
                    tracing::warn!(%error, hint = error.hint(), at = shown, "names are not answered by DNS");
                }
                Ok(_) if told.is_some() => tracing::info!(at = shown, "names are answered by DNS now"),
                Ok(_) | Err(_) => {}
            }
            let shown = shown.to_owned();
            self.rooms.insert(
                namespace.id(),
                Served {
                    range,
                    shown,
                    components,
                    server,
                },
            );
        }
    }

    /// Tells each namespace the names that `entries` gives for the components that are attached there, until `until`.
    pub fn tell(&self, until: Timestamp, mut entries: impl FnMut(&BTreeSet<ComponentName>) -> Vec<super::Entry>) {
        for Served {
            range, components, server, ..
        } in self.rooms.values()
        {
            if let Ok(server) = server {
                let zone = Zone::new(*range, &entries(components), until, has_ipv6());
                if *server.zone() != zone {
                    server.tell(zone);
                }
            }
        }
    }

    /// Whether names are answered in this namespace.
    #[must_use]
    pub fn serves(&self, namespace: NetNsId) -> bool {
        self.rooms.get(&namespace).is_some_and(|served| served.server.is_ok())
    }

    /// How it does in each namespace.
    #[must_use]
    pub fn status(&self) -> Vec<ResolverAt> {
        let shown = |served: &Served| ResolverAt {
            at: served.shown.clone(),
            components: served.components.iter().cloned().collect(),
            instances: served.server.as_ref().map_or(0, |server| server.zone().instances()),
            why_not: served.server.as_ref().err().map(|error| format!("{error}; {}", error.hint())),
        };
        self.rooms.values().map(shown).collect()
    }
}

/// A zone in which there is nothing.
fn nothing(range: OverlayRange) -> Zone {
    Zone::new(range, &[], Timestamp(0), has_ipv6())
}
