//! The claims in force in the host's own namespace, kept true while units, users and cgroups come and go.
//!
//! A view goes: [`Claims::set`] finds the users, looks at the cgroups and says how each component fares, and what the base table has to say
//! ([`ClaimTable`]); when that is loaded, [`Claims::fill`] puts the cgroups into its sets. From then on a thread follows the kernel's word of new
//! and gone cgroups (inotify(7)): it marks the sockets of a claimed cgroup, changes the sets and makes the [`Owners`] anew. What the thread
//! has not seen yet is in no set, and refused.
//!
//! A cgroup that is claimed is marked first and bound then, so that a socket that passes was routed as its component's.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cloison_proto::label::ComponentName;
use cloison_proto::net::AddressPair;
use parking_lot::Mutex;

use super::cgroups::{Cgroup, Scan, Tree};
use super::claim::{self, Claim, ClaimError};
use super::claim_table::{self, ClaimTable, mark};
use super::nudge::Nudge;
use super::owners::{self, Owners};
use super::selftest::Trial;
use crate::netlink::NetlinkError;
use crate::netlink::monitor::RulesMonitor;
use crate::netlink::nftables::{Change, Key, Nftables, Operation, Rules};
use crate::netlink::rule::{Route, Sender};

mod follow;
mod held;

use follow::Thread;
use held::Held;

/// How often the base table is asked for before nobody knows what it says.
const QUESTIONS: usize = 5;

/// Levels of cgroups that the base table knows in any case: `system.slice`, its services, and the instances of a template.
const MIN_LEVELS: u8 = 3;

/// A component of the host's namespace whose processes are claimed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The component.
    pub component: ComponentName,
    /// Its processes.
    pub claim: Claim,
    /// Its addresses.
    pub addresses: AddressPair,
}

/// Who shares the host's namespace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wanted {
    /// Those who claim processes.
    pub members: Vec<Member>,
    /// The component that is the rest of the host.
    pub rest: Option<(ComponentName, AddressPair)>,
    /// Whether who claims cgroups is reached on loopback by itself alone.
    pub guard: bool,
}

/// What follows from what is wanted.
#[derive(Debug, Default)]
pub struct Settled {
    /// What the base table has to say; `None` without claims.
    pub table: Option<ClaimTable>,
    /// How each claimed component's sockets are routed.
    pub routes: Vec<Route>,
    /// How each claimed component fares: by what it is bound, for people, or why not.
    pub members: BTreeMap<ComponentName, Result<String, ClaimError>>,
}

/// The kernel, as claims need it in the host's namespace.
#[derive(Debug)]
pub struct Kernel {
    /// For the base table.
    pub nftables: Nftables,
    /// Tells when somebody changed nftables.
    pub rules: RulesMonitor,
    /// Where it is tried out what holds there.
    pub trial: Trial,
    /// Where the guard of loopback is pinned ([`super::guard::place`]).
    pub guard: PathBuf,
}

/// The claims in force.
#[derive(Debug)]
pub struct Claims {
    state: Arc<Mutex<State>>,
    owners: owners::Shared,
    thread: Option<Thread>,
    /// For the thread, until it runs.
    rules: Option<RulesMonitor>,
}

#[derive(Debug)]
struct State {
    tree: Option<Tree>,
    nftables: Option<Nftables>,
    trial: Option<Trial>,
    /// Whether users, and cgroups, were tried out and can be relied on.
    tried: (bool, bool),
    nudge: Nudge,
    owners: owners::Shared,
    /// Those whose claims can be enforced.
    bound: Vec<(Member, Option<u32>)>,
    rest: Option<(ComponentName, AddressPair)>,
    /// Whether loopback is to be guarded.
    guard: bool,
    /// Whether each cgroup that nobody claims is to be let go, or may be one of a component that is just not bound.
    lets_go: bool,
    /// Of the table that is loaded, or about to be.
    levels: u8,
    /// The rules of the table that is loaded.
    rules: Rules,
    /// Whether a table is being loaded, so that what is there is not what was.
    loading: bool,
    /// What is in its sets; `None` until it is loaded.
    filled: Option<BTreeSet<(String, Key)>>,
    /// What is attached to the claimed cgroups.
    held: Held,
    scan: Scan,
}

impl Claims {
    /// No claims yet; without a kernel to speak to, nothing is ever bound.
    #[must_use]
    pub fn new(tree: Option<Tree>, kernel: Option<Kernel>, nudge: Nudge) -> Self {
        let (connections, places) = kernel
            .map(|kernel| ((kernel.nftables, kernel.rules), (kernel.trial, kernel.guard)))
            .unzip();
        let ((nftables, rules), (trial, guard_place)) = (connections.unzip(), places.unzip());
        let owners = owners::Shared::default();
        let state = State {
            tree,
            nftables,
            trial,
            tried: (false, false),
            nudge,
            owners: owners.clone(),
            bound: Vec::new(),
            rest: None,
            guard: false,
            lets_go: false,
            levels: 0,
            rules: Rules::default(),
            loading: false,
            filled: None,
            held: Held::new(guard_place),
            scan: Scan::default(),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            owners,
            thread: None,
            rules,
        }
    }

    /// What the base table would say of what is wanted; nothing is done.
    #[must_use]
    pub fn table_of(wanted: Wanted) -> Option<ClaimTable> {
        let claims = Self::new(Tree::find(), None, Nudge::default());
        let settled = claims.state.lock().set(wanted);
        settled.table
    }

    /// Whose each socket is.
    #[must_use]
    pub const fn owners(&self) -> &owners::Shared {
        &self.owners
    }

    /// Takes up what is wanted, as far as it can be enforced. The table that follows from it may be loaded from now on; its sets are filled when it
    /// is ([`Claims::fill`]), and [`Claims::loaded`] is to be said in any case.
    pub fn set(&mut self, wanted: Wanted) -> Settled {
        let mut state = self.state.lock();
        state.loading = true;
        let settled = state.set(wanted);
        let follows = !state.bound.is_empty();
        if self.thread.as_ref().is_some_and(Thread::has_ended) {
            self.thread = None;
        }
        drop(state);
        if follows && self.thread.is_none() {
            self.thread = Thread::start(&self.state, self.rules.take())
                .inspect_err(|error| tracing::warn!(%error, "units that start are found after seconds only"))
                .ok();
        } else if !follows && let Some(thread) = self.thread.take() {
            self.rules = thread.end();
        }
        if let Some(thread) = &self.thread {
            thread.wake();
        }
        settled
    }

    /// Fills the sets of the table that was just loaded.
    ///
    /// # Errors
    /// [`NetlinkError`]: nothing is bound then, and nothing passes.
    pub fn fill(&mut self) -> Result<(), NetlinkError> {
        let mut state = self.state.lock();
        state.filled = None;
        if state.bound.is_empty() {
            return Ok(());
        }
        let rules = state.nftables.as_mut().map(Nftables::rules).transpose()?;
        if rules.as_ref().is_some_and(Rules::is_empty) {
            // Somebody took the table away at once.
            return Ok(());
        }
        state.rules = rules.unwrap_or_default();
        state.filled = Some(BTreeSet::new());
        state.follow()
    }

    /// No table is being loaded any more: whatever is there now is compared with what was read when the sets were filled.
    pub fn loaded(&mut self) {
        self.state.lock().loading = false;
        if let Some(thread) = &self.thread {
            thread.look_at_rules();
        }
    }

    /// Makes sets, marks and owners what the claims say, in a table that is loaded.
    ///
    /// # Errors
    /// [`NetlinkError`].
    pub fn follow(&mut self) -> Result<(), NetlinkError> {
        self.state.lock().follow()
    }

    /// Whether the claimed users still have the numbers that the base table knows.
    #[must_use]
    pub fn users_are_as_before(&self) -> bool {
        let state = self.state.lock();
        let is_same = |(member, number): &(Member, Option<u32>)| match &member.claim {
            Claim::User(user) => claim::number_of(user).ok() == *number,
            Claim::Unit(_) | Claim::Cgroup(_) => true,
        };
        state.bound.iter().all(is_same)
    }

    /// Whether a cgroup lies deeper than the base table looks, so that [`Claims::set`] is to be called again.
    #[must_use]
    pub fn want_another_table(&self) -> bool {
        let state = self.state.lock();
        state.levels > 0 && state.wanted_levels() > state.levels
    }

    /// Whether the sets of the table hold what they should; if not, the table is to be loaded anew and filled.
    #[must_use]
    pub fn are_filled(&self) -> bool {
        let state = self.state.lock();
        state.bound.is_empty() || state.filled.is_some()
    }

    /// How each claimed component is bound now, for people.
    #[must_use]
    pub fn shown(&self) -> BTreeMap<ComponentName, String> {
        self.state.lock().shown()
    }

    /// Takes marks and guard away from the cgroups of these members, whoever set them; for `leave`.
    pub fn unmark(tree: Option<&Tree>, members: &[Member], guard: &Path) {
        if let Some(tree) = tree {
            let claimed = tree.scan(&claims_of(members)).claimed;
            Held::end(tree, claimed.iter().map(|(cgroup, _)| cgroup), guard);
        }
    }
}

fn claims_of(members: &[Member]) -> Vec<(ComponentName, Claim)> {
    members.iter().map(|m| (m.component.clone(), m.claim.clone())).collect()
}

impl State {
    fn set(&mut self, wanted: Wanted) -> Settled {
        let mut settled = Settled::default();
        self.guard = wanted.guard;
        self.held
            .take_up_guard(self.guard && wanted.members.iter().any(|member| member.claim.is_by_cgroup()));
        let mut bound: Vec<(Member, Option<u32>)> = Vec::new();
        self.lets_go = true;
        for member in wanted.members {
            match self.resolve(&member, &bound) {
                Ok(user) => bound.push((member, user)),
                Err(why) => {
                    self.lets_go &= !member.claim.is_by_cgroup();
                    settled.members.insert(member.component, Err(why));
                }
            }
        }
        (self.bound, self.rest) = (bound, wanted.rest);
        self.look();
        self.levels = self.wanted_levels();
        settled
            .members
            .extend(self.shown().into_iter().map(|(component, by)| (component, Ok(by))));
        if self.bound.is_empty() {
            // Nobody follows the cgroups any more.
            self.mark();
            self.store_owners(false);
            return settled;
        }
        let of_cgroups = self.bound.iter().filter(|(m, _)| m.claim.is_by_cgroup());
        let of_users = self.bound.iter().filter_map(|(m, user)| Some(((*user)?, m.addresses)));
        settled.table = Some(ClaimTable {
            levels: self.levels,
            of_cgroups: of_cgroups.map(|(m, _)| m.addresses).collect(),
            of_users: of_users.collect(),
            rest: self.rest.as_ref().map(|(_, addresses)| *addresses),
            guard: self.guard,
        });
        let route = |(member, user): &(Member, Option<u32>)| Route {
            sender: user.map_or(Sender::Mark(mark(member.addresses)), Sender::User),
            addresses: member.addresses,
            table: mark(member.addresses),
        };
        settled.routes = self.bound.iter().map(route).collect();
        settled
    }

    /// Whether a claim can be enforced beside those before it; the number of its user, if it is one.
    fn resolve(&mut self, member: &Member, before: &[(Member, Option<u32>)]) -> Result<Option<u32>, ClaimError> {
        let user = match &member.claim {
            Claim::User(user) => Some(claim::number_of(user)?),
            Claim::Unit(_) | Claim::Cgroup(_) => None,
        };
        self.try_out(&member.claim)?;
        if let Some(why) = self.held.guard_error().filter(|_| member.claim.is_by_cgroup()) {
            return Err(ClaimError::Guard(why));
        }
        let same = |(other, number): &&(Member, Option<u32>)| other.claim == member.claim || user.is_some() && *number == user;
        match before.iter().find(same) {
            Some((other, _)) => Err(ClaimError::Shared(other.component.clone())),
            None => Ok(user),
        }
    }

    /// Tries out, once, whether the kernel does what a claim relies on.
    fn try_out(&mut self, claim: &Claim) -> Result<(), ClaimError> {
        let Some(trial) = &self.trial else { return Ok(()) };
        if !claim.is_by_cgroup() {
            if !self.tried.0 {
                trial.of_users().map_err(ClaimError::Users)?;
                self.tried.0 = true;
            }
        } else if !self.tried.1 {
            let tree = self.tree.as_ref().ok_or(ClaimError::NoCgroups)?;
            trial.of_cgroups(tree).map_err(ClaimError::Cgroups)?;
            self.tried.1 = true;
        }
        Ok(())
    }

    /// Looks at the cgroups.
    fn look(&mut self) {
        let members: Vec<Member> = self.bound.iter().map(|(m, _)| m.clone()).collect();
        let by_cgroup = members.iter().any(|m| m.claim.is_by_cgroup());
        let scan = self.tree.as_ref().filter(|_| by_cgroup).map(|tree| tree.scan(&claims_of(&members)));
        let before = std::mem::replace(&mut self.scan, scan.unwrap_or_default());
        if self.scan.is_cut && !before.is_cut {
            tracing::warn!("this host has more cgroups than are looked at; sockets of the others are refused");
        }
    }

    /// How deep the table has to look at cgroups.
    fn wanted_levels(&self) -> u8 {
        if !self.bound.iter().any(|(m, _)| m.claim.is_by_cgroup()) {
            return 0;
        }
        let claimed = self.scan.claimed.iter().map(|(cgroup, _)| cgroup.level);
        let others = self.scan.rest.iter().chain(&self.scan.inner).map(|(_, level)| *level);
        claimed.chain(others).max().unwrap_or(0).max(MIN_LEVELS)
    }

    /// Takes up claimed cgroups that the kernel has just told of, before anything else is looked at: their first packets are on the way.
    /// What it cannot do is left to [`State::follow`], which comes behind it and looks at everything.
    fn greet(&mut self, new: &[(PathBuf, u64, OsString)]) {
        let Some(tree) = &self.tree else { return };
        let claims = claims_of(&self.bound.iter().map(|(m, _)| m.clone()).collect::<Vec<_>>());
        let found: Vec<_> = new
            .iter()
            .filter_map(|(parent, id, name)| tree.claimed_child(&claims, parent, *id, name))
            .filter(|(cgroup, _)| self.scan.claimed.iter().all(|(known, _)| known.id != cgroup.id))
            .collect();
        if found.is_empty() || self.filled.is_none() {
            return;
        }
        self.scan.claimed.extend(found);
        self.mark();
        self.store_owners(false);
        if let Err(error) = self.fill() {
            tracing::debug!(%error, "a new cgroup is not taken up at once");
            self.filled = None;
            self.nudge.give();
        }
    }

    /// Makes sets, marks and owners what the cgroups now say.
    fn follow(&mut self) -> Result<(), NetlinkError> {
        let before = self.shown();
        self.look();
        self.mark();
        let filled = self.fill();
        self.store_owners(self.filled.is_none());
        if self.shown() != before || self.wanted_levels() > self.levels {
            self.nudge.give();
        }
        filled
    }

    /// Marks and guards the sockets of the claimed cgroups.
    fn mark(&mut self) {
        let marks: HashMap<&ComponentName, u32> = self.bound.iter().map(|(m, _)| (&m.component, mark(m.addresses))).collect();
        let claimed = self.scan.claimed.iter();
        let claimed = claimed.filter_map(|(cgroup, component)| Some((cgroup, *marks.get(component)?)));
        if let Some(tree) = &self.tree {
            // Who just was not found, or not bound, stays as he is.
            self.held.hold(tree, claimed, self.lets_go && !self.scan.is_cut);
        }
    }

    fn fill(&mut self) -> Result<(), NetlinkError> {
        let wanted = self.elements();
        let Some(filled) = &mut self.filled else { return Ok(()) };
        let change = |operation| {
            move |(set, key): &(String, Key)| Change {
                operation,
                set: set.clone(),
                key: *key,
            }
        };
        let gone = filled.difference(&wanted).map(change(Operation::Remove));
        let new = wanted.difference(filled).map(change(Operation::Add));
        let changes: Vec<Change> = gone.chain(new).collect();
        if changes.is_empty() {
            return Ok(());
        }
        if let Some(nftables) = &mut self.nftables {
            nftables.change(&changes)?;
        }
        *filled = wanted;
        Ok(())
    }

    /// What is to be in the sets.
    fn elements(&self) -> BTreeSet<(String, Key)> {
        let addresses: HashMap<&ComponentName, AddressPair> = self.bound.iter().map(|(m, _)| (&m.component, m.addresses)).collect();
        let mut elements: BTreeSet<_> = claim_table::PROTOCOLS
            .map(|protocol| (claim_table::FILLED.to_owned(), Key::Protocol(protocol)))
            .into();
        for (Cgroup { id, level, .. }, component) in self.scan.claimed.iter().filter(|(c, _)| c.level <= self.levels) {
            elements.insert((claim_table::claimed(*level), Key::Cgroup(*id)));
            let Some(pair) = addresses.get(component).filter(|_| self.held.unguarded(*id).is_none()) else {
                continue;
            };
            for address in pair.both() {
                elements.insert((claim_table::own(*level, address), Key::CgroupAt(*id, address)));
            }
            if self.guard {
                elements.insert((claim_table::signs(*level), Key::CgroupTo(*id, mark(*pair))));
                elements.insert((claim_table::home(*level), Key::CgroupWith(*id, mark(*pair))));
                elements.insert((claim_table::held(*level), Key::Cgroup(*id)));
            }
        }
        let rest = self.scan.rest.iter().map(|place| (claim_table::rest as fn(u8) -> String, place));
        let inner = self.scan.inner.iter().map(|place| (claim_table::inner as fn(u8) -> String, place));
        if self.rest.is_some() || self.guard {
            let known = rest.chain(inner).filter(|(_, (_, level))| *level <= self.levels);
            elements.extend(known.map(|(set, (id, level))| (set(*level), Key::Cgroup(*id))));
        }
        elements
    }

    /// Lets nothing pass if the base table is not as it was loaded, and has it loaded again.
    fn close_without_table(&mut self) {
        let Some(nftables) = self.nftables.as_mut().filter(|_| self.filled.is_some() && !self.loading) else {
            return;
        };
        // Who changes nftables without a pause keeps it from being read as of one moment: then it is not known, and it is asked again.
        let answers = (0..QUESTIONS).map(|_| nftables.rules());
        let rules = answers.filter_map(Result::ok).next();
        if rules.as_ref() != Some(&self.rules) {
            tracing::warn!(
                "somebody else changed the base table, or took it away: nothing passes this host's TUN until it is loaded again"
            );
            self.filled = None;
            self.store_owners(true);
            self.nudge.give();
        }
    }

    fn store_owners(&self, closed: bool) {
        let claimed = self.scan.claimed.iter().map(|(cgroup, component)| (cgroup.id, component.clone()));
        let bound = self.bound.iter().map(|(m, _)| (&m.component, m.addresses));
        let rest = self.rest.iter().map(|(component, addresses)| (component, *addresses));
        let owners = Owners {
            addresses: bound
                .chain(rest)
                .flat_map(|(component, pair)| pair.both().map(|address| (address, component.clone())))
                .collect(),
            cgroups: claimed.chain(self.scan.below.iter().cloned()).collect(),
            users: self
                .bound
                .iter()
                .filter_map(|(m, user)| Some(((*user)?, m.component.clone())))
                .collect(),
            host: self.rest.as_ref().map(|(component, _)| component.clone()),
            table: self.nftables.as_ref().map(|nftables| (nftables.table().into(), self.rules.clone())),
            closed,
        };
        self.owners.store(Arc::new(owners));
    }

    fn shown(&self) -> BTreeMap<ComponentName, String> {
        let one = |(member, user): &(Member, Option<u32>)| (member.component.clone(), self.shown_of(member, *user));
        self.bound.iter().map(one).collect()
    }

    fn shown_of(&self, member: &Member, user: Option<u32>) -> String {
        if let (Claim::User(_), Some(number)) = (&member.claim, user) {
            return format!("{}, number {number}", member.claim);
        }
        let of_member = self.scan.claimed.iter().filter(|(_, component)| *component == member.component);
        // Of several, one with which something is wrong.
        let of_member =
            of_member.min_by_key(|(cgroup, _)| (self.held.unguarded(cgroup.id).is_none(), self.held.unmarked(cgroup.id).is_none()));
        let Some((cgroup, _)) = of_member else {
            return format!("{}, which is not running", member.claim);
        };
        if let Some(why) = self.held.unguarded(cgroup.id) {
            return format!(
                "{} in {}, which is refused, because its loopback cannot be guarded: {why}",
                member.claim, cgroup.path
            );
        }
        match self.held.unmarked(cgroup.id) {
            Some(why) => format!(
                "{} in {}; its programs have to bind to its address themselves, because its sockets cannot be marked: {why}",
                member.claim, cgroup.path
            ),
            None => format!("{} in {}", member.claim, cgroup.path),
        }
    }
}
