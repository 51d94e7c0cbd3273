//! A site: one namespace that is safe for overlay addresses, with one TUN in it if an instance is attached there. Making it and bringing it
//! up to date is the same everywhere, and so is the order: look for a conflict, load the base table, lay the `unreachable` routes, and only
//! then make the TUN and give it addresses and routes.
//!
//! The TUN of a [lasting](Site::lasting) site stays when the agent ends, with its addresses and routes: it is marked by an alias that names
//! the agent's table, and the next agent with that table takes it up, or takes it away. A TUN that somebody kept open comes back by
//! [`Site::keep`].

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cloison_proto::net::{AddressPair, OverlayRange};

use super::base_table::{self, BaseTable, TableName};
use super::claim_table::ClaimTable;
use super::{AddressConflict, Unenforced};
use crate::netlink::link::{self, Link, LinkState};
use crate::netlink::nftables::{Nftables, Rules};
use crate::netlink::route::{self, Prefix, Route};
use crate::netlink::rule;
use crate::netlink::{Netlink, NetlinkError, addr};
use crate::sys::InterfaceName;
use crate::sys::netns::{NetNs, NetNsId};
use crate::sys::tun::{Tun, TunError};

/// Length of a TUN's transmit queue in packets; a shorter one loses packets while the worker is busy with the other direction.
const QUEUE_LENGTH: u32 = 1000;

/// How the alias of a TUN begins that lasts.
const MARK: &str = "cloison ";

/// What is the same at all sites of an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Common {
    /// Name of each TUN.
    pub tun: InterfaceName,
    /// Name of each base table.
    pub table: TableName,
    /// The overlay's ranges.
    pub range: OverlayRange,
    /// MTU of each TUN in bytes.
    pub mtu: u32,
    /// Whether each TUN has the resolver's addresses, too.
    pub resolver: bool,
}

/// Whose addresses the TUN of a site has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Members {
    /// Those of the component that whoever is in the namespace is, or, beside claims, who nobody claims.
    pub rest: Option<AddressPair>,
    /// How the sockets of each claimed component are routed.
    pub routes: Vec<rule::Route>,
    /// What the base table says of claims.
    pub claims: Option<ClaimTable>,
}

impl From<Option<AddressPair>> for Members {
    fn from(rest: Option<AddressPair>) -> Self {
        Self { rest, ..Self::default() }
    }
}

impl Members {
    fn all(&self) -> impl Iterator<Item = AddressPair> {
        self.rest.into_iter().chain(self.routes.iter().map(|route| route.addresses))
    }
}

/// A namespace that is safe for overlay addresses, and our TUN in it.
#[derive(Debug)]
pub struct Site {
    namespace: NetNs,
    /// What was loaded, with the rules that the kernel has of it.
    loaded: Option<(BaseTable, Rules)>,
    /// For which range the namespace was made safe.
    safe: Option<OverlayRange>,
    /// How often a base table was loaded here: what was put into its sets is gone each time.
    loads: u64,
    tun: Option<Arc<Tun>>,
    lasting: bool,
}

impl Site {
    /// A site in which nothing has been done yet.
    #[must_use]
    pub const fn new(namespace: NetNs) -> Self {
        Self {
            namespace,
            loaded: None,
            safe: None,
            loads: 0,
            tun: None,
            lasting: false,
        }
    }

    /// A site whose TUN stays when the agent ends, and is found there by the next one.
    #[must_use]
    pub const fn lasting(namespace: NetNs) -> Self {
        Self {
            namespace,
            loaded: None,
            safe: None,
            loads: 0,
            tun: None,
            lasting: true,
        }
    }

    /// Gives the site a TUN of its namespace that was kept over a restart. One of another name, or a second one, is closed.
    pub fn keep(&mut self, tun: Tun, wanted: &InterfaceName) {
        if self.tun.is_none() && tun.name() == wanted {
            self.tun = Some(Arc::new(tun));
        }
    }

    /// Whether somebody else uses addresses of `range` in the namespace.
    ///
    /// # Errors
    /// [`Unenforced`].
    pub fn conflict(&self, range: OverlayRange, table: &TableName) -> Result<Option<AddressConflict>, Unenforced> {
        let held = self.tun.as_deref();
        self.namespace.run(|| {
            let mut netlink = Netlink::open()?;
            let links = link::list(&mut netlink)?;
            find_conflict(&mut netlink, range, &own(&links, held, table))
        })?
    }

    /// Makes the namespace safe, and no more: the base table and the `unreachable` routes. Whoever else uses addresses of the range loses
    /// them. What an agent before left there stays as it is.
    ///
    /// # Errors
    /// [`Unenforced`].
    pub fn protect(&mut self, common: &Common) -> Result<(), Unenforced> {
        let (loaded, safe) = ((&mut self.loaded, &mut self.loads), &mut self.safe);
        self.namespace.run(|| {
            // One that says more than we know yet is a running component's, whose packets wait in its TUN.
            if !base_table::has_claims(&common.table)? {
                load_base_table(loaded, common, None)?;
                *safe = Some(common.range);
            }
            let wanted = destinations(common.range)
                .into_iter()
                .map(|destination| Route::Unreachable { destination });
            Ok(route::ensure(&mut Netlink::open()?, &wanted.collect())?)
        })?
    }

    /// Brings the namespace into the state that is wanted: safe, and with a TUN that has the addresses of `members` if there are any. Applying
    /// twice changes nothing. A namespace that was made safe before is the mesh's: a conflict that comes later does not end what is there.
    ///
    /// # Errors
    /// [`Unenforced`]; there is no TUN then. The base table and the `unreachable` routes stay as far as they came.
    pub fn apply(&mut self, common: &Common, members: impl Into<Members>) -> Result<(), Unenforced> {
        let members = &members.into();
        let tun = self.tun.take();
        let (loaded, loads, safe, lasting) = (&mut self.loaded, &mut self.loads, &mut self.safe, self.lasting);
        self.tun = self.namespace.run(|| {
            let mut netlink = Netlink::open()?;
            let links = link::list(&mut netlink)?;
            let is_safe = *safe == Some(common.range);
            let own = own(&links, tun.as_deref(), &common.table);
            if !is_safe && let Some(conflict) = find_conflict(&mut netlink, common.range, &own)? {
                return Err(Unenforced::Conflict(conflict));
            }
            // Without a table that says whose sockets are whose, anybody may have sent what waits in a TUN that was kept.
            let first = members.claims.is_some() && loaded.as_ref().is_none_or(|(table, _)| table.claims.is_none());
            let was_open = first && tun.is_some() && !base_table::has_claims(&common.table)?;
            load_base_table((loaded, loads), common, members.claims.as_ref())?;
            *safe = Some(common.range);
            if was_open {
                tun.as_deref().inspect(|tun| tun.discard());
            }
            if members.all().next().is_none() {
                // Whoever still holds it may tell the ends of its flows; then it goes.
                give_up(tun.as_deref());
                remove_left(&mut netlink, &links, common, tun.as_deref().map(Tun::index))?;
                lay_routes(&mut netlink, common.range, None, members)?;
                return Ok(None);
            }
            let tun = match tun {
                Some(tun) => tun,
                None => Arc::new(find_or_make(&mut netlink, &links, common, lasting)?),
            };
            remove_left(&mut netlink, &links, common, Some(tun.index()))?;
            equip(&mut netlink, &tun, common, members)?;
            Ok(Some(tun))
        })??;
        Ok(())
    }

    /// Looks whether others took away what was made here: a base table that is gone or was changed is loaded again. Returns whether all is
    /// well; a TUN that is gone is not, and `apply` makes it again.
    ///
    /// # Errors
    /// [`Unenforced`].
    pub fn check(&mut self) -> Result<bool, Unenforced> {
        let (tun, loaded, loads) = (&self.tun, &mut self.loaded, &mut self.loads);
        let healthy = self.namespace.run(|| {
            if let Some((table, rules)) = loaded
                && rules_of(&table.name)? != *rules
            {
                tracing::warn!(table = %table.name, "somebody else changed the base table, or took it away; loading it again");
                // Whatever comes next: what was in its sets is gone.
                *loads += 1;
                table.load()?;
                *rules = rules_of(&table.name)?;
                if table.claims.is_some() {
                    tun.as_deref().inspect(|tun| tun.discard());
                }
            }
            let Some(tun) = tun else { return Ok(true) };
            let links = link::list(&mut Netlink::open()?)?;
            Ok::<_, Unenforced>(links.iter().any(|l| l.index == tun.index() && l.up))
        })??;
        if !healthy {
            give_up(self.tun.take().as_deref());
        }
        Ok(healthy)
    }

    /// How often a base table was loaded here.
    #[must_use]
    pub const fn loads(&self) -> u64 {
        self.loads
    }

    /// Has the base table loaded anew by the next [`Site::apply`], whatever is there.
    pub fn forget_table(&mut self) {
        self.loaded = None;
    }

    /// Takes away everything that was made here, a TUN that lasts included; for `leave`.
    ///
    /// # Errors
    /// [`Unenforced`], after having tried all of it.
    pub fn clear(&mut self, range: OverlayRange, table: &TableName) -> Result<(), Unenforced> {
        give_up(self.tun.take().as_deref());
        (self.loaded, self.safe) = (None, None);
        self.namespace.run(|| {
            let mut netlink = Netlink::open()?;
            let links = link::list(&mut netlink)?;
            for link in links.iter().filter(|l| l.alias == mark(table)) {
                link::delete(&mut netlink, link.index)?;
            }
            let routes = Netlink::open().and_then(|mut n| {
                rule::apply(&mut n, range, &[], None)?;
                route::apply(&mut n, &route::destinations(range), &BTreeSet::new())
            });
            // Last, so that nothing leaves in clear while there are addresses.
            base_table::remove(table)?;
            Ok(routes?)
        })?
    }

    /// The TUN, if an instance is attached.
    #[must_use]
    pub const fn tun(&self) -> Option<&Arc<Tun>> {
        self.tun.as_ref()
    }

    /// Which namespace it is.
    #[must_use]
    pub const fn id(&self) -> NetNsId {
        self.namespace.id()
    }

    /// The namespace.
    #[must_use]
    pub const fn namespace(&self) -> &NetNs {
        &self.namespace
    }
}

/// What marks a TUN that lasts as that of the agent with this table.
fn mark(table: &TableName) -> String {
    format!("{MARK}{table}")
}

/// Whether an interface is the TUN of some agent that stayed.
pub(super) fn is_marked(link: &Link) -> bool {
    link.alias.starts_with(MARK)
}

/// The interfaces that are ours: the TUN that we hold, and those that an agent with our table left.
fn own(links: &[Link], held: Option<&Tun>, table: &TableName) -> Vec<u32> {
    let left = links.iter().filter(|l| l.alias == mark(table)).map(|l| l.index);
    left.chain(held.map(Tun::index)).collect()
}

/// Has a TUN go as soon as nobody holds it any more.
fn give_up(tun: Option<&Tun>) {
    if let Some(Err(error)) = tun.map(Tun::let_go) {
        // It was deleted by somebody else.
        tracing::debug!(%error, ?tun, "a TUN is gone already");
    }
}

/// The TUN that an agent before us left, with everything that hangs on it; or a new one, over `unreachable` routes.
fn find_or_make(netlink: &mut Netlink, links: &[Link], common: &Common, lasting: bool) -> Result<Tun, Unenforced> {
    let left = links
        .iter()
        .any(|l| l.name == common.tun.as_str() && l.alias == mark(&common.table));
    let tun = if left {
        Tun::attach(&common.tun)?
    } else {
        lay_routes(netlink, common.range, None, &Members::default())?;
        Tun::create(&common.tun)?
    };
    if lasting {
        link::set_alias(netlink, tun.index(), &mark(&common.table))?;
        tun.persist().map_err(|e| TunError::Other(common.tun.clone(), e))?;
    } else {
        give_up(Some(&tun));
    }
    Ok(tun)
}

/// Takes away the TUNs that an agent with our table left and nobody wants: its configuration named another interface, or its view had an
/// instance here.
fn remove_left(netlink: &mut Netlink, links: &[Link], common: &Common, wanted: Option<u32>) -> Result<(), Unenforced> {
    for link in links.iter().filter(|l| l.alias == mark(&common.table) && Some(l.index) != wanted) {
        tracing::info!(interface = link.name, "removing a TUN that has no instance any more");
        link::delete(netlink, link.index)?;
    }
    Ok(())
}

fn find_conflict(netlink: &mut Netlink, range: OverlayRange, own: &[u32]) -> Result<Option<AddressConflict>, Unenforced> {
    let found = route::conflict(netlink, range, own)?;
    Ok(found.map(|(address, length)| AddressConflict { address, length }))
}

fn load_base_table(
    (loaded, loads): (&mut Option<(BaseTable, Rules)>, &mut u64),
    common: &Common,
    claims: Option<&ClaimTable>,
) -> Result<(), Unenforced> {
    let wanted = BaseTable {
        name: common.table.clone(),
        range: common.range,
        tun: common.tun.clone(),
        claims: claims.cloned(),
    };
    if loaded.as_ref().is_none_or(|(table, _)| *table != wanted) {
        *loads += 1;
        *loaded = None;
        wanted.load()?;
        let rules = rules_of(&wanted.name)?;
        *loaded = Some((wanted, rules));
    }
    Ok(())
}

/// The rules of a base table in the namespace of the calling thread.
fn rules_of(table: &TableName) -> Result<Rules, NetlinkError> {
    Nftables::open(&table.to_string())?.rules()
}

fn equip(netlink: &mut Netlink, tun: &Tun, common: &Common, members: &Members) -> Result<(), Unenforced> {
    write_settings(tun.name())?;
    let state = LinkState {
        mtu: common.mtu,
        queue_length: QUEUE_LENGTH,
    };
    link::apply(netlink, tun.index(), state)?;
    let resolver = common.resolver.then(|| common.range.resolver());
    let usable = members.all().chain(resolver).flat_map(AddressPair::both);
    let usable: Vec<_> = usable.filter(|a| a.is_ipv4() || has_ipv6()).collect();
    addr::apply(netlink, tun.index(), &usable)?;
    Ok(lay_routes(netlink, common.range, Some(tun.index()), members)?)
}

/// `unreachable` under everything, and above it the routes to the TUN, if there is one: in the main table for the rest of the namespace, in a
/// table of its own for each claimed component. Rules lead there once there are routes, and no longer than there are.
fn lay_routes(netlink: &mut Netlink, range: OverlayRange, tun: Option<u32>, members: &Members) -> Result<(), NetlinkError> {
    let destinations = destinations(range);
    let rest = members.rest.map(|addresses| (addresses, route::MAIN));
    let tables = rest
        .into_iter()
        .chain(members.routes.iter().map(|route| (route.addresses, route.table)));
    let to_tun = tables.flat_map(|(addresses, table)| destinations.iter().map(move |destination| (*destination, addresses, table)));
    let to_tun = to_tun.filter_map(|(destination, addresses, table)| {
        Some(Route::Tun {
            destination,
            index: tun?,
            source: addresses.of_family(destination.0),
            table,
        })
    });
    let unreachable = destinations.iter().map(|d| Route::Unreachable { destination: *d });
    let claimed = if tun.is_some() { members.routes.as_slice() } else { &[] };
    if claimed.is_empty() {
        rule::apply(netlink, range, claimed, members.rest)?;
    }
    route::apply(netlink, &destinations, &to_tun.chain(unreachable).collect())?;
    if !claimed.is_empty() {
        rule::apply(netlink, range, claimed, members.rest)?;
    }
    Ok(())
}

/// The overlay ranges of the families that the kernel has.
fn destinations(range: OverlayRange) -> Vec<Prefix> {
    let all = route::destinations(range).into_iter();
    all.filter(|(a, _)| a.is_ipv4() || has_ipv6()).collect()
}

/// Whether the kernel has IPv6 at all; without, the mesh is IPv4 only here.
#[must_use]
pub fn has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

/// IPv6 is on, addresses are usable at once, and there are none but ours: container runtimes switch IPv6 off in their namespaces, and the
/// kernel would give the TUN a link-local address and ask for routers through it.
fn write_settings(tun: &InterfaceName) -> Result<(), Unenforced> {
    if !has_ipv6() {
        return Ok(());
    }
    for (setting, value) in [
        ("addr_gen_mode", "1"),
        ("accept_ra", "0"),
        ("accept_dad", "0"),
        ("disable_ipv6", "0"),
    ] {
        let path = PathBuf::from(format!("/proc/sys/net/ipv6/conf/{tun}/{setting}"));
        std::fs::write(&path, value).map_err(|e| Unenforced::Setting(path, e))?;
    }
    Ok(())
}
