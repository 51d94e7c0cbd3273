//! Which namespaces of this host are told names by DNS, and which: one room for the host's TUN, one for each TUN elsewhere, and in each what
//! the components there may reach. The servers are [`Resolvers`](crate::names::dns::Resolvers); nothing is answered here.

use cloison_proto::label::ComponentName;
use cloison_proto::net::AddressPair;
use cloison_proto::status::Resolver;
use cloison_proto::version::{MeshTime, Timestamp};
use cloison_proto::view::View;

use super::{Dataplane, Enforcement};
use crate::attach::{self, Place};
use crate::names;
use crate::names::dns::Room;

/// What the host's own namespace is called.
const HOST: &str = "the host";

impl Dataplane {
    /// Has names answered in each namespace in which a component is attached, and in no other.
    pub(super) fn serve_names(&mut self, view: &View) {
        let Some(resolvers) = &mut self.resolvers else { return };
        let plan = attach::plan(view, &self.config.accepted);
        let report = &self.report;
        let attached = |component: &ComponentName| report.get(component).is_some_and(Enforcement::is_attached);
        let at = |is_there: &dyn Fn(&Place) -> bool| {
            let there = plan
                .sites
                .iter()
                .filter(|(component, (place, _))| is_there(place) && attached(component));
            there.map(|(component, _)| (*component).clone()).collect()
        };
        let host = Room {
            namespace: self.host.namespace(),
            shown: HOST,
            components: at(&|place| matches!(place, Place::Host | Place::Claimed(_))),
        };
        let others = self.namespaces.iter().map(|(held, (site, shown))| Room {
            namespace: site.namespace(),
            shown,
            components: at(&|place| place == held),
        });
        let rooms: Vec<_> = std::iter::once(host)
            .chain(others)
            .filter(|room| !room.components.is_empty())
            .collect();
        resolvers.keep(view.config.overlay, rooms);
    }

    /// Says what is answered from now on until `until`: what the view opens at mesh time `now`.
    pub fn tell_names(&self, view: &View, now: MeshTime, until: Timestamp) {
        if let Some(resolvers) = &self.resolvers {
            resolvers.tell(until, |components| names::entries_for(components, view, &self.report, now));
        }
    }

    /// The number of the host's TUN and the resolver's addresses, where names are answered for the host's own namespace.
    #[must_use]
    pub fn host_resolver(&self) -> Option<(u32, AddressPair)> {
        let serves = self.resolvers.as_ref()?.serves(self.host.id());
        let range = self.in_force.as_ref()?.view.config.overlay;
        self.host.tun().filter(|_| serves).map(|tun| (tun.index(), range.resolver()))
    }

    /// How names are answered.
    #[must_use]
    pub fn resolver_status(&self) -> Resolver {
        let Some(resolvers) = &self.resolvers else { return Resolver::Off };
        let range = self.in_force.as_ref().map(|held| held.view.config.overlay);
        Resolver::On {
            addresses: range.map_or_else(Vec::new, |range| range.resolver().both().into()),
            namespaces: resolvers.status(),
        }
    }
}
