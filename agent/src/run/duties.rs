//! What the loop does from time to time, and its answers to questions.

use std::time::Duration;

use cloison_proto::lease;
use cloison_proto::status::{Answer, Lease, Link as ShownLink, Names, Request, Resolved, Resolver, Status};
use cloison_proto::version::Timestamp;

use super::{Agent, blocking};
use crate::answer;
use crate::attach::site::has_ipv6;
use crate::cmd::span;
use crate::control::candidates::{self, Known};
use crate::control::link::LinkState;
use crate::denials;
use crate::enroll::CLOCK_OFF;
use crate::names;
use crate::names::block::Owner;
use crate::names::keeper::Wanted;
use crate::names::resolved::{self, Teller};
use crate::netlink::monitor::Monitor;
use crate::state::clock::{PERSIST_EVERY, wall_now};
use crate::state::incarnation;
use crate::status::{Question, problem};
use crate::sys::clock;

/// How often the machine is compared with what it should be.
const CHECK_EVERY: Duration = Duration::from_secs(3);

/// How often this host's interfaces are looked at.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(30);

/// How long after a change the machine is looked at: changes come in groups, and never is it looked at more often than this.
const SETTLE: Duration = Duration::from_millis(300);

/// How often it is looked whether peers came, went or moved, how long after a write the next one is, and after one that failed. After a
/// kill, a peer of which the disk knows nothing yet is found by its next packet or ours only.
const PEERS_CHECK: Duration = Duration::from_secs(1);
const PEERS_WRITTEN: Duration = Duration::from_secs(5);
const PEERS_FAILED: Duration = Duration::from_secs(60);

/// A wall clock that is off by more is worth a warning: certificates, logs and tokens are judged by it elsewhere.
const CLOCK_TOLERANCE_SECS: u64 = 60;

/// How often the wall clock is watched, and a refused write repeated.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// How often the coordinator is told of denials, at most.
const REPORT_EVERY: Duration = Duration::from_secs(60);

/// When each duty is due.
#[derive(Debug)]
pub(super) struct Schedule {
    check: Timestamp,
    announce: Timestamp,
    watch: Timestamp,
    peers: Timestamp,
    persist: Timestamp,
    denials: Timestamp,
    report: Timestamp,
}

impl Schedule {
    /// Everything is due once its time has passed from `now` on.
    pub(super) fn new(now: Timestamp) -> Self {
        Self {
            check: now + CHECK_EVERY,
            announce: now + ANNOUNCE_EVERY,
            watch: now + WATCH_EVERY,
            peers: now + PEERS_CHECK,
            persist: now + PERSIST_EVERY,
            denials: now + denials::EVERY,
            report: now + REPORT_EVERY,
        }
    }
}

/// Whether a duty is due; if so, it is due again later.
fn due(at: &mut Timestamp, now: Timestamp, every: Duration) -> bool {
    let is_due = *at <= now;
    if is_due {
        *at = now + every;
    }
    is_due
}

impl Schedule {
    /// Has what is watched be looked at in the next round.
    pub(super) const fn soon(&mut self) {
        self.watch = Timestamp(0);
    }
}

impl Agent {
    pub(super) async fn duties(&mut self) {
        let now = clock::now();
        self.watch_kernel(now);
        if due(&mut self.duties.watch, now, WATCH_EVERY) {
            self.watch_clock(now).await;
            self.watch_lease(now);
            self.tell_manager(now);
            self.save_again().await;
            self.rotate().await;
        }
        if due(&mut self.duties.peers, now, PEERS_CHECK) {
            self.keep_peers(now);
        }
        if due(&mut self.duties.check, now, CHECK_EVERY) {
            self.check().await;
        }
        if due(&mut self.duties.announce, now, ANNOUNCE_EVERY) {
            self.announce().await;
        }
        if due(&mut self.duties.persist, now, PERSIST_EVERY) {
            self.persist_lease();
        }
        if due(&mut self.duties.denials, now, denials::EVERY) {
            self.sample_denials(now);
        }
        if due(&mut self.duties.report, now, REPORT_EVERY) {
            self.report_denials(now).await;
        }
    }

    /// Sums up what was denied.
    pub(super) fn sample_denials(&mut self, now: Timestamp) {
        // The counters first: what is noted meanwhile is not told twice.
        let counters = self.engine.stats();
        let dataplane = self.dataplane.lock();
        let names = denials::Names {
            table: &self.table,
            report: dataplane.report(),
        };
        self.denials.sample(counters, dataplane.take_denials(), names, now);
    }

    /// Compares the machine with what it should be, and repairs it.
    pub(super) async fn check(&mut self) {
        let dataplane = self.dataplane.clone();
        if blocking(move || dataplane.lock().check()).await.unwrap_or(false) {
            let report = self.report();
            let outputs = self.link.report(report);
            self.carry_out(outputs).await;
        }
        self.name();
    }

    fn keep_peers(&mut self, now: Timestamp) {
        match self.persist_peers() {
            Ok(false) => {}
            Ok(true) => self.duties.peers = now + PEERS_WRITTEN,
            Err(error) => {
                tracing::warn!(%error, "cannot keep where the peers are; a restart asks the coordinator");
                self.duties.peers = now + PEERS_FAILED;
            }
        }
    }

    /// How far the wall clock is ahead of the mesh's (negative: behind), in seconds; `None` until a lease told the mesh's time.
    fn clock_offset(&self, now: Timestamp) -> Option<i64> {
        let mesh = self.link.told_time(now)?;
        i64::try_from(i128::from(wall_now().0) - i128::from(mesh.0)).ok()
    }

    /// Says once that the wall clock is off, and once that it is right again.
    fn tell_clock(&mut self, now: Timestamp) {
        let off = self.clock_offset(now).filter(|offset| offset.unsigned_abs() > CLOCK_TOLERANCE_SECS);
        let moved = |before: i64, after: i64| before.abs_diff(after) > CLOCK_TOLERANCE_SECS;
        match (self.clock_told, off) {
            (Some(before), Some(after)) if !moved(before, after) => return,
            (_, Some(offset)) => tracing::warn!(offset_secs = offset, "{}", clock_warning(offset)),
            (Some(_), None) => tracing::info!("this host's clock agrees with the mesh's again"),
            (None, None) => return,
        }
        self.clock_told = off;
    }

    /// One line for `systemctl status`, when it changed.
    fn tell_manager(&mut self, now: Timestamp) {
        let left = self.lease_left(now);
        let view = match self.link.installed_header() {
            None => "no view yet: nothing is allowed".to_owned(),
            Some(_) if left.is_zero() => "the lease has ended: nothing is allowed".to_owned(),
            Some(header) => format!(
                "view {} in force, lease ends in {}",
                header.version,
                span(left.as_secs().next_multiple_of(60))
            ),
        };
        let link = match (self.link.state(), self.session.address()) {
            (LinkState::Linked { .. }, Some(address)) => format!("linked with {address}"),
            _ => "coordinator not reached".to_owned(),
        };
        let line = format!("{view}; {link}");
        if line != self.told {
            self.manager.status(&line);
            self.told = line;
        }
    }

    /// Says which names the hosts file is to have and which are answered: those of the view in force, as far as its instances are attached
    /// and its rules last.
    pub(super) fn name(&mut self) {
        let Some(view) = self.in_force() else { return };
        let now = self.link.mesh_time(clock::now());
        let lease_ends = self.lease.as_ref().map_or(Timestamp(0), |(_, ends)| *ends);
        let dataplane = self.dataplane.lock();
        dataplane.tell_names(&view, now, lease_ends);
        let entries = names::entries(&view, dataplane.report(), now);
        if let Some(teller) = &self.resolved {
            let has_ipv6 = has_ipv6();
            let wanted = dataplane.host_resolver();
            teller.want(wanted.map(|(link, resolver)| resolved::Wanted { link, resolver, has_ipv6 }));
        }
        drop(dataplane);
        let owner = Owner {
            mesh: self.us.mesh,
            host: self.us.host,
            overlay: view.config.overlay,
        };
        self.names.want(Wanted { owner, entries });
    }

    /// A wall clock that stepped back makes handshakes that peers refuse: a raised incarnation has them begin anew.
    async fn watch_clock(&mut self, now: Timestamp) {
        self.tell_clock(now);
        if !self.steps.stepped_back(wall_now(), now) {
            return;
        }
        match incarnation::raise(&self.dir, wall_now()) {
            Ok(raised) => {
                tracing::warn!(incarnation = raised, "the wall clock stepped back: peers are told to begin anew");
                self.incarnation = raised;
                let outputs = self.link.raised(raised);
                self.carry_out(outputs).await;
            }
            Err(error) => tracing::error!(%error, "cannot raise the incarnation"),
        }
    }

    /// Says in the log, once each, that half and more of the lease is used, and that it is renewed.
    fn watch_lease(&mut self, now: Timestamp) {
        let reached = self.lease_warning(now);
        if reached == self.lease_warned {
            return;
        }
        let left = self.lease_left(now);
        match reached {
            Some(_) if left.is_zero() => tracing::error!("the lease has ended: nothing is allowed until the coordinator renews it"),
            Some(percent) if reached > self.lease_warned => {
                tracing::warn!(used_percent = percent, left = ?left, "the lease runs out: the coordinator was not reached to renew it");
            }
            Some(_) | None => tracing::info!(left = ?left, "the lease is renewed"),
        }
        self.lease_warned = reached;
    }

    /// The highest share of the lease in use, in percent, that is reached and worth a warning.
    fn lease_warning(&self, now: Timestamp) -> Option<u8> {
        let (held, _) = self.lease.as_ref()?;
        lease::warned_at(self.lease_left(now), Duration::from_secs(held.lease.valid_for_secs))
    }

    /// Tells the coordinator where peers may reach this host, if that changed.
    pub(super) async fn announce(&mut self) {
        let configured = self.config.endpoints.clone();
        let port = self.dataplane.lock().port();
        let towards_coordinator = self.session.frames().and_then(crate::control::connection::Frames::local);
        let overlay = self.link.installed_content().map(|view| view.config.overlay);
        let listed = blocking(move || {
            candidates::list(Known {
                port,
                configured: &configured,
                towards_coordinator,
                overlay,
            })
        });
        match listed.await {
            Ok(Ok(listed)) => {
                if listed.lost_coordinator {
                    // The link's own address is gone: nothing comes by it any more.
                    self.session.close("moved").await;
                    self.link.disconnected(clock::now(), "this host's address changed");
                }
                let before = self.reachable_at.replace(listed.addresses.clone());
                if before.is_some_and(|before| before != listed.addresses) {
                    self.tell_peers();
                }
                let outputs = self.link.endpoints(listed.endpoints);
                // What is sent here causes no further announcement: the box only tells the compiler that this ends.
                Box::pin(self.carry_out(outputs)).await;
            }
            Ok(Err(error)) => tracing::warn!(%error, "cannot list this host's addresses"),
            Err(error) => tracing::warn!(%error, "cannot list this host's addresses"),
        }
    }

    /// This host's addresses changed: whoever sends to the former ones learns the new one by a handshake, coordinator or not.
    fn tell_peers(&self) {
        let peers = self.engine.peers(clock::now());
        let talking = peers.iter().filter(|peer| peer.session_age.is_some());
        let asked = talking.filter(|peer| self.engine.want_handshake(peer.host)).count();
        tracing::info!(peers = asked, "this host's addresses changed");
    }

    /// What the kernel tells of changes brings forward what would be looked at anyway.
    fn watch_kernel(&mut self, now: Timestamp) {
        let Some(changes) = self.monitor.as_mut().map(Monitor::look) else {
            return;
        };
        if changes.addresses {
            self.duties.announce = self.duties.announce.min(now + SETTLE);
        }
        if changes.rules {
            self.duties.check = self.duties.check.min(now + SETTLE);
        }
    }

    /// Answers a question; the one who asked may have gone.
    pub(super) fn answer(&mut self, (request, to): Question) {
        let Some(view) = self.in_force() else {
            let answer = match request {
                Request::Status => Answer::Status(Box::new(self.status())),
                Request::Denials => self.recent_denials(),
                Request::RotateKey => self.rotate_by_command(),
                Request::Flows | Request::Explain { .. } | Request::Ping { .. } => problem(
                    "no_view",
                    "this host has no view yet: nothing is allowed",
                    "`cloison-agent status` shows the link with the coordinator",
                ),
            };
            let _ = to.send(answer);
            return;
        };
        let now = clock::now();
        let mesh = self.link.mesh_time(now);
        let answer = match request {
            Request::Status => Answer::Status(Box::new(self.status())),
            Request::RotateKey => self.rotate_by_command(),
            Request::Flows => answer::flows(&self.table, &self.engine),
            Request::Denials => self.recent_denials(),
            Request::Explain { from, to, on } => {
                let question = answer::Question { from, to, on };
                let allowed = answer::explain(&view, &self.table, &question, mesh);
                let dataplane = self.dataplane.lock();
                let explanation = answer::obstacles(&view, dataplane.report(), &self.engine, &allowed, self.lease_left(now));
                Answer::Explain(explanation)
            }
            Request::Ping { component } => {
                let ping = answer::ping(view, self.table.clone(), self.engine.clone(), component, mesh);
                tokio::spawn(async move {
                    let _ = to.send(ping.await);
                });
                return;
            }
        };
        let _ = to.send(answer);
    }

    /// What the view in the data plane says.
    fn in_force(&self) -> Option<std::sync::Arc<cloison_proto::view::View>> {
        self.link.installed_content().cloned()
    }

    fn recent_denials(&mut self) -> Answer {
        let now = clock::now();
        self.sample_denials(now);
        Answer::Denials {
            denials: self.denials.recent(now),
        }
    }

    fn status(&mut self) -> Status {
        let now = clock::now();
        self.sample_denials(now);
        let header = self.link.installed_header();
        let dataplane = self.dataplane.lock();
        let view = self.in_force();
        let mut instances = view.as_ref().map_or_else(Vec::new, |v| answer::instances(v, dataplane.report()));
        for instance in &mut instances {
            instance.last_denial = self.denials.last_of(&instance.component, now);
        }
        Status {
            software: env!("CARGO_PKG_VERSION").into(),
            host: self.us.host,
            name: self.us.name.clone(),
            mesh: self.us.mesh,
            uptime_secs: now.since(self.started).as_secs(),
            incarnation: self.incarnation,
            listen_port: dataplane.port(),
            interface: self.config.interface.to_string(),
            version: header.map(|h| h.version),
            state_hash: header.map(|h| h.state_hash.to_string()),
            lease: Lease {
                left_secs: self.lease_left(now).as_secs(),
                valid_for_secs: self.lease.as_ref().map_or(0, |(held, _)| held.lease.valid_for_secs),
                mesh_time: self.link.mesh_time(now),
            },
            clock_offset_secs: self.clock_offset(now),
            link: self.shown_link(now),
            wg_key: self.key_status(),
            peers: view.as_ref().map_or_else(Vec::new, |v| answer::peers(v, &self.engine)),
            packets: answer::packets(&self.engine, dataplane.counts()),
            names: self.names.state(),
            resolver: dataplane.resolver_status(),
            resolved: self.resolved.as_ref().map_or(Resolved::Off, Teller::state),
            ignored_items: view.as_ref().map_or(0, |v| v.ignored as u64),
            warnings: self.warnings(now, view.is_some(), dataplane.is_blind(), &dataplane.resolver_status()),
            instances,
        }
    }

    fn shown_link(&self, now: Timestamp) -> ShownLink {
        match self.link.state() {
            LinkState::Connecting => ShownLink::Connecting,
            LinkState::Linked { since } => ShownLink::Linked {
                address: self.session.address().unwrap_or_default().to_owned(),
                for_secs: now.since(*since).as_secs(),
            },
            LinkState::Waiting { until, why } => ShownLink::Waiting {
                next_secs: until.since(now).as_secs(),
                why: why.clone(),
            },
        }
    }

    fn warnings(&self, now: Timestamp, has_view: bool, is_blind: bool, resolver: &Resolver) -> Vec<String> {
        let mut warnings = self.problems.clone();
        let left = self.lease_left(now);
        if !has_view {
            warnings.push("no view is in force: nothing is allowed until the coordinator sends one".into());
        } else if left.is_zero() {
            warnings.push("the lease has ended: nothing is allowed until the coordinator renews it".into());
        } else if let Some(percent) = self.lease_warning(now) {
            warnings.push(format!(
                "{percent} % of the lease is used: it ends in {} min, and the coordinator was not reached to renew it",
                left.as_secs().div_ceil(60)
            ));
        }
        match self.clock_offset(now) {
            Some(offset) if offset.unsigned_abs() > CLOCK_TOLERANCE_SECS => warnings.push(clock_warning(offset)),
            None if self.clock_off => warnings.push(CLOCK_OFF.into()),
            Some(_) | None => {}
        }
        if self.unsaved {
            warnings.push("the view in force could not be written to disk: a restart would begin with an older one or none".into());
        }
        if self.trust_unsaved {
            warnings.push("whom to trust could not be written to disk: a restart would begin with former keys".into());
        }
        match self.names.state() {
            Names::Failed { why, hint, .. } => warnings.push(format!("components cannot be reached by name: {why}; {hint}")),
            Names::Kept { left_out, file, .. } if left_out > 0 => {
                warnings.push(format!(
                    "{left_out} instances have no name: the block in {} would be too long",
                    file.display()
                ));
            }
            Names::Off | Names::Waiting { .. } | Names::Kept { .. } => {}
        }
        if is_blind {
            warnings
                .push("this kernel does not tell whose sockets are (no sock_diag): components that are a user's receive nothing, nor does a `host` component beside them by UDP".into());
        }
        if let Resolver::On { namespaces, .. } = resolver {
            let refused = namespaces.iter().filter_map(|at| at.why_not.as_ref().map(|why| (&at.at, why)));
            warnings.extend(refused.map(|(at, why)| format!("names are not answered by DNS in {at}: {why}")));
        }
        if let Some(Resolved::Failed { why }) = self.resolved.as_ref().map(Teller::state) {
            warnings.push(why);
        }
        warnings.extend(self.link_warning.clone());
        warnings
    }
}

/// What is said of a wall clock that is off by so many seconds.
fn clock_warning(offset: i64) -> String {
    let direction = if offset < 0 { "behind" } else { "ahead of" };
    format!(
        "this host's clock is {} {direction} the mesh's: set it (`timedatectl`); nothing stops because of it",
        // Leases tell whole seconds: the nearest minute is what can be said.
        span((offset.unsigned_abs() + 30) / 60 * 60)
    )
}
