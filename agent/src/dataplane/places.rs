//! Where the instances of a view are: their namespaces, sites and claims, made and looked after.

use std::sync::Arc;

use cloison_proto::label::ComponentName;
use cloison_proto::net::AddressPair;
use cloison_proto::view::{LocalInstance, View};

use super::{Config, Dataplane, Enforcement, Settled};
use crate::attach::claims::{Member, Wanted};
use crate::attach::container::Sandbox;
use crate::attach::site::{Common, Members, Site};
use crate::attach::{self, Place, Unenforced, netns};
use crate::manager::Kept;
use crate::sys::netns::NetNsId;
use crate::sys::tun::Tun;
use crate::sys::with_causes;

impl Dataplane {
    /// Makes the place of each instance, as far as it can be made.
    pub(super) fn settle(&mut self, view: &View) -> Settled {
        let plan = attach::plan(view, &self.config.accepted);
        self.containers.watch_only(&plan.containers());
        let mut claimed = self.claims.set(wanted(&plan, &self.config));
        let members = Members {
            rest: rest(&plan).map(|(_, addresses)| addresses),
            routes: claimed.routes,
            claims: claimed.table,
        };
        let mut settled: Settled = plan.unenforced.into_iter().map(|(c, why)| (c.clone(), Err(why))).collect();
        let safe = self
            .common(view.config.overlay)
            .and_then(|common| self.host.apply(&common, members).map(|()| common))
            .and_then(|common| self.fill().map(|()| common));
        self.claims.loaded();
        let safe = safe.map_err(Arc::new);
        for (component, (place, instance)) in plan.sites {
            let on_host = |enforcement| self.host.tun().cloned().map(|tun| (tun, enforcement)).ok_or(Unenforced::NoTun);
            let attached = match (&safe, place) {
                (Err(why), _) => Err(Unenforced::Host(why.clone())),
                (Ok(_), Place::Claimed(_)) => match claimed.members.remove(component) {
                    Some(Ok(by)) => on_host(Enforcement::Bound(by)),
                    Some(Err(why)) => Err(why.into()),
                    None => Err(Unenforced::NoTun),
                },
                (Ok(_), Place::Host) => on_host(Enforcement::Shared),
                (Ok(common), place @ (Place::Netns(_) | Place::Container(..))) => self
                    .settle_namespace(&place, common, instance.addresses)
                    .map(|(tun, shown)| (tun, Enforcement::Isolated(shown))),
            };
            settled.insert(component.clone(), attached);
        }
        settled
    }

    /// Fills the sets of the host's base table, if it was loaded since they were filled last.
    fn fill(&mut self) -> Result<(), Unenforced> {
        if self.filled != self.host.loads() || !self.claims.are_filled() {
            self.claims.fill()?;
            self.filled = self.host.loads();
        } else {
            // The table says the same, and may be about other cgroups.
            self.claims.follow()?;
        }
        Ok(())
    }

    fn settle_namespace(&mut self, place: &Place, common: &Common, addresses: AddressPair) -> Result<(Arc<Tun>, String), Unenforced> {
        let (mut site, shown) = match self.namespaces.remove(place) {
            Some((site, shown)) if self.is_there(place, site.id()) => (site, shown),
            held => {
                let Sandbox { namespace, shown } = self.open(place)?;
                // A container that joined another's namespace comes back to the same one.
                let held = held.filter(|(site, _)| site.id() == namespace.id());
                let mut site = held.map_or_else(|| Site::new(namespace), |(site, _)| site);
                let of_it = |kept: &mut Kept| kept.namespace.id() == site.id();
                let of_it: Vec<Kept> = self.kept.extract_if(.., of_it).collect();
                of_it.into_iter().for_each(|kept| site.keep(kept.tun, &self.config.tun));
                (site, shown)
            }
        };
        if let Some((other, _)) = self.namespaces.iter().find(|(_, (other, _))| other.id() == site.id()) {
            return Err(Unenforced::SameNamespace(place.clone(), other.clone()));
        }
        site.apply(common, Some(addresses))?;
        let tun = site.tun().cloned().ok_or(Unenforced::NoTun)?;
        self.namespaces.insert(place.clone(), (site, shown.clone()));
        Ok((tun, shown))
    }

    /// The namespace of a place that has one of its own.
    fn open(&mut self, place: &Place) -> Result<Sandbox, Unenforced> {
        match place {
            Place::Host | Place::Claimed(_) => Err(Unenforced::NoTun),
            Place::Netns(path) => Ok(Sandbox {
                namespace: netns::open(path, &self.config.accepted, self.host.id())?,
                shown: path.display().to_string(),
            }),
            Place::Container(engine, which) => {
                let found = self.containers.open(*engine, which)?;
                if found.namespace.id() == self.host.id() {
                    return Err(Unenforced::OwnNamespace(place.clone()));
                }
                Ok(found)
            }
        }
    }

    /// Whether the namespace `id`, which is held, still is the one of its place.
    fn is_there(&mut self, place: &Place, id: NetNsId) -> bool {
        match place {
            Place::Host | Place::Claimed(_) => true,
            Place::Netns(path) => netns::is_at(path, &self.config.accepted, id),
            Place::Container(engine, which) => self.containers.is_there(*engine, which, id),
        }
    }

    /// Leaves namespaces in which no instance is attached any more as they were before.
    pub(super) fn forget_namespaces(&mut self, view: &View) {
        let plan = attach::plan(view, &self.config.accepted);
        let wanted = |place: &Place| plan.sites.values().any(|(wanted, _)| wanted == place);
        let unwanted: Vec<Place> = self.namespaces.keys().filter(|place| !wanted(place)).cloned().collect();
        for place in unwanted {
            let Some((mut site, _)) = self.namespaces.remove(&place) else {
                continue;
            };
            if let Err(error) = site.clear(view.config.overlay, &self.config.table) {
                tracing::warn!(%place, error = with_causes(&error), "cannot clean up a namespace");
            }
        }
    }

    pub(super) fn is_healthy(&mut self) -> bool {
        let well = |site: &mut Site| {
            site.check().unwrap_or_else(|error| {
                tracing::warn!(error = with_causes(&error), "cannot check a namespace");
                false
            })
        };
        let mut all = well(&mut self.host) && !self.claims.want_another_table() && self.claims.users_are_as_before();
        if !self.claims.are_filled() {
            self.host.forget_table();
            all = false;
        }
        if all && let Err(error) = self.fill() {
            tracing::warn!(error = with_causes(&error), "cannot fill the sets of the base table");
            all = false;
        }
        let mut namespaces = std::mem::take(&mut self.namespaces);
        for (place, (site, _)) in &mut namespaces {
            all &= self.is_there(place, site.id()) && well(site);
        }
        self.namespaces = namespaces;
        all
    }

    /// Whether the report changed because units or cgroups came or went.
    pub(super) fn show_claims(&mut self) -> bool {
        let mut changed = false;
        for (component, by) in self.claims.shown() {
            if let Some(Enforcement::Bound(shown)) = self.report.get_mut(&component) {
                changed |= *shown != by;
                *shown = by;
            }
        }
        changed
    }
}

/// Who shares the host's namespace, as far as the plan goes.
pub(super) fn wanted(plan: &attach::Plan<'_>, config: &Config) -> Wanted {
    let member = |(component, (place, instance)): (&&ComponentName, &(Place, &LocalInstance))| match place {
        Place::Claimed(claim) => Some(Member {
            component: (*component).clone(),
            claim: claim.clone(),
            addresses: instance.addresses,
        }),
        Place::Host | Place::Netns(_) | Place::Container(..) => None,
    };
    Wanted {
        members: plan.sites.iter().filter_map(member).collect(),
        rest: rest(plan),
        guard: config.loopback_guard,
    }
}

/// The component that is the rest of the host.
fn rest(plan: &attach::Plan<'_>) -> Option<(ComponentName, AddressPair)> {
    let mut all = plan.sites.iter().filter(|(_, (place, _))| *place == Place::Host);
    all.next()
        .map(|(component, (_, instance))| ((*component).clone(), instance.addresses))
}
