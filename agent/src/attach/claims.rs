//! The claims in force in the host's own namespace, kept true while units, users and cgroups come and go.
//!
//! A view goes: [`Claims::set`] finds the users, looks at the cgroups and says how each component fares, and what the base table has to say
//! ([`ClaimTable`]); when that is loaded, [`Claims::fill`] puts the cgroups into its sets. From then on a thread follows the kernel's word of new
//! and gone cgroups (inotify(7)): it marks the sockets of a claimed cgroup, changes the sets and makes the [`Owners`] anew. What the thread
//! has not seen yet is in no set, and refused.
//!
//! A cgroup that is claimed is marked first and bound then, so that a socket that passes was routed as its component's.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use cloison_proto::label::ComponentName;
use cloison_proto::net::AddressPair;
use parking_lot::Mutex;
use rustix::fs::inotify;

use super::cgroups::{Cgroup, Scan, Tree};
use super::claim::{self, Claim, ClaimError};
use super::claim_table::{self, ClaimTable};
use super::nudge::Nudge;
use super::owners::{self, Owners};
use super::selftest::Trial;
use crate::netlink::NetlinkError;
use crate::netlink::monitor::RulesMonitor;
use crate::netlink::nftables::{Change, Key, Nftables, Operation};
use crate::netlink::rule::{Route, Sender};
use crate::sys::cgroup;
use crate::sys::poll::{Poller, Waker};

/// How often the thread looks at the cgroups without being told of a change.
const LOOK_EVERY: Duration = Duration::from_secs(3);

/// Levels of cgroups that the base table knows in any case: `system.slice`, its services, and the instances of a template.
const MIN_LEVELS: u8 = 3;

/// The upper eight bits of our marks and of the numbers of our routing tables; the others are those of the component's IPv4 address. Both stay
/// with the component for ever: a socket keeps the mark that it was made with.
const MARK: u32 = 0xc100_0000;

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
struct Thread {
    waker: Arc<Waker>,
    stopping: Arc<AtomicBool>,
    handle: Option<JoinHandle<Option<RulesMonitor>>>,
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
    /// Of the table that is loaded, or about to be.
    levels: u8,
    /// What is in its sets; `None` until it is loaded.
    filled: Option<BTreeSet<(String, Key)>>,
    /// Cgroups whose sockets are marked, with what came of it.
    marked: BTreeMap<u64, Result<(), String>>,
    scan: Scan,
}

impl Claims {
    /// No claims yet; without a kernel to speak to, nothing is ever bound.
    #[must_use]
    pub fn new(tree: Option<Tree>, kernel: Option<Kernel>, nudge: Nudge) -> Self {
        let (connections, trial) = kernel.map(|kernel| ((kernel.nftables, kernel.rules), kernel.trial)).unzip();
        let (nftables, rules) = connections.unzip();
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
            levels: 0,
            filled: None,
            marked: BTreeMap::new(),
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

    /// Takes up what is wanted, as far as it can be enforced. The sets are filled when the table that follows from it is loaded.
    pub fn set(&mut self, wanted: Wanted) -> Settled {
        let mut state = self.state.lock();
        let settled = state.set(wanted);
        let follows = !state.bound.is_empty();
        drop(state);
        if follows && self.thread.is_none() {
            self.thread = Thread::start(&self.state, self.rules.take())
                .inspect_err(|error| tracing::warn!(%error, "units that start are found after seconds only"))
                .ok();
        } else if !follows && let Some(thread) = self.thread.take() {
            self.rules = thread.end();
        }
        if let Some(thread) = &self.thread {
            thread.waker.wake();
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
        state.filled = Some(BTreeSet::new());
        state.follow()
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

    /// Takes the marks away from the cgroups of these members, whoever set them; for `leave`.
    pub fn unmark(tree: Option<&Tree>, members: &[Member]) {
        let Some(tree) = tree else { return };
        for (cgroup, _) in tree.scan(&claims_of(members)).claimed {
            if let Err(error) = tree.open(&cgroup).and_then(cgroup::unmark_sockets)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(cgroup = cgroup.path, %error, "cannot take the mark of a cgroup's sockets away");
            }
        }
    }
}

fn claims_of(members: &[Member]) -> Vec<(ComponentName, Claim)> {
    members.iter().map(|m| (m.component.clone(), m.claim.clone())).collect()
}

/// The mark of a component's sockets, and the number of its routing table.
fn mark(addresses: AddressPair) -> u32 {
    MARK | u32::from(addresses.v4) & 0x00ff_ffff
}

impl State {
    fn set(&mut self, wanted: Wanted) -> Settled {
        let mut settled = Settled::default();
        let mut bound: Vec<(Member, Option<u32>)> = Vec::new();
        for member in wanted.members {
            match self.resolve(&member, &bound) {
                Ok(user) => bound.push((member, user)),
                Err(why) => {
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
        let rest = self.scan.rest.iter().map(|(_, level)| *level);
        claimed.chain(rest).max().unwrap_or(0).max(MIN_LEVELS)
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

    fn mark(&mut self) {
        let marks: HashMap<&ComponentName, u32> = self.bound.iter().map(|(m, _)| (&m.component, mark(m.addresses))).collect();
        let mut marked = BTreeMap::new();
        for (found, component) in &self.scan.claimed {
            let (Some(mark), Some(tree)) = (marks.get(component), &self.tree) else {
                continue;
            };
            let known = self.marked.remove(&found.id).filter(Result::is_ok);
            let outcome = known.unwrap_or_else(|| {
                let marked = tree.open(found).and_then(|directory| cgroup::mark_sockets(directory, *mark));
                marked.map_err(|error| error.to_string())
            });
            marked.insert(found.id, outcome);
        }
        self.marked = marked;
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
        let mut elements = BTreeSet::new();
        for (Cgroup { id, level, .. }, component) in self.scan.claimed.iter().filter(|(c, _)| c.level <= self.levels) {
            elements.insert((claim_table::claimed(*level), Key::Cgroup(*id)));
            for address in addresses.get(component).into_iter().flat_map(|pair| pair.both()) {
                elements.insert((claim_table::own(*level, address), Key::CgroupAt(*id, address)));
            }
        }
        for (id, level) in self
            .scan
            .rest
            .iter()
            .filter(|(_, level)| self.rest.is_some() && *level <= self.levels)
        {
            elements.insert((claim_table::rest(*level), Key::Cgroup(*id)));
        }
        elements
    }

    /// Lets nothing pass if the base table is gone, and has it loaded again.
    fn close_without_table(&mut self) {
        let Some(nftables) = &mut self.nftables else { return };
        if self.filled.is_some() && !nftables.has_table().unwrap_or(false) {
            tracing::warn!("the base table was removed by somebody else: nothing passes this host's TUN until it is loaded again");
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
            table: self.nftables.as_ref().map(|nftables| nftables.table().into()),
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
        let mut of_member = self.scan.claimed.iter().filter(|(_, component)| *component == member.component);
        let Some((cgroup, _)) = of_member.next() else {
            return format!("{}, which is not running", member.claim);
        };
        match self.marked.get(&cgroup.id) {
            Some(Err(why)) => format!(
                "{} in {}; its programs have to bind to its address themselves, because its sockets cannot be marked: {why}",
                member.claim, cgroup.path
            ),
            Some(Ok(())) | None => format!("{} in {}", member.claim, cgroup.path),
        }
    }
}

impl Thread {
    fn start(state: &Arc<Mutex<State>>, mut rules: Option<RulesMonitor>) -> io::Result<Self> {
        let (waker, stopping) = (Arc::new(Waker::new()?), Arc::new(AtomicBool::new(false)));
        let watch = Watch::new()?;
        let (poller, state) = (Poller::new()?, Arc::downgrade(state));
        poller.add(&waker, 0)?;
        poller.add(&watch.inotify, 1)?;
        if let Some(rules) = &rules {
            poller.add(rules, 2)?;
        }
        let (woken, stop) = (waker.clone(), stopping.clone());
        let run = move || {
            let (mut watch, mut ready) = (watch, Vec::new());
            while poller.wait(&mut ready, LOOK_EVERY).is_ok() && !stop.load(Ordering::Acquire) {
                woken.clear();
                watch.clear();
                let Some(state) = state.upgrade() else { break };
                let mut state = state.lock();
                if rules.as_mut().is_some_and(RulesMonitor::look) {
                    state.close_without_table();
                }
                if let Err(error) = state.follow() {
                    tracing::warn!(
                        error = crate::dataplane::with_causes(&error),
                        "cannot follow the cgroups of this host"
                    );
                    // Whatever is in the sets now: the table is loaded and filled anew.
                    state.filled = None;
                    state.nudge.give();
                }
                // What came while a directory was not watched yet is found by looking once more.
                while watch.follow(&state.scan.watched) {
                    let _ = state.follow();
                }
            }
            rules
        };
        let handle = std::thread::Builder::new().name("cgroups".into()).spawn(run)?;
        Ok(Self {
            waker,
            stopping,
            handle: Some(handle),
        })
    }
}

impl Thread {
    /// Ends it, and gives back what it listened to.
    fn end(mut self) -> Option<RulesMonitor> {
        self.join()
    }

    fn join(&mut self) -> Option<RulesMonitor> {
        self.stopping.store(true, Ordering::Release);
        self.waker.wake();
        let ended = self.handle.take()?.join();
        ended.unwrap_or_else(|_| {
            tracing::error!("the thread that follows cgroups panicked");
            None
        })
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        let _rules = self.join();
    }
}

/// The directories that the kernel tells about.
#[derive(Debug)]
struct Watch {
    inotify: OwnedFd,
    watched: BTreeSet<(PathBuf, u64)>,
}

impl Watch {
    fn new() -> io::Result<Self> {
        Ok(Self {
            inotify: inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?,
            watched: BTreeSet::new(),
        })
    }

    /// Watches these directories; whether one of them is new. One that went takes its watch along.
    fn follow(&mut self, wanted: &BTreeSet<(PathBuf, u64)>) -> bool {
        self.watched.retain(|one| wanted.contains(one));
        let mut is_new = false;
        for one in wanted {
            let flags = inotify::WatchFlags::CREATE | inotify::WatchFlags::DELETE | inotify::WatchFlags::ONLYDIR;
            if !self.watched.contains(one) && inotify::add_watch(&self.inotify, &one.0, flags).is_ok() {
                is_new |= self.watched.insert(one.clone());
            }
        }
        is_new
    }

    fn clear(&self) {
        let mut buffer = [0u8; 16 * 1024];
        while rustix::io::read(&self.inotify, &mut buffer).is_ok_and(|length| length > 0) {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_the_component_s_for_ever_and_never_zero() -> Result<(), Box<dyn std::error::Error>> {
        let range = cloison_proto::net::OverlayRange::new([10, 77, 0, 0].into(), 16, "fd12:3456:789a::".parse()?)?;
        let marks: BTreeSet<u32> = (0..1_000).filter_map(|n| range.nth(n)).map(mark).collect();
        assert_eq!(marks.len(), 1_000);
        assert!(marks.iter().all(|mark| mark >> 24 == 0xc1));
        Ok(())
    }
}
