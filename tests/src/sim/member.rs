//! A host with its agent: the data plane, the link's state machine, and what the agent would have on disk.
//!
//! What `cloison-agent run` does around the two is repeated here in a few lines: views go into the data plane and then on disk, leases get
//! their end on the host's clock, hints go to the engine.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use cloison_agent::control::certificate::Window;
use cloison_agent::control::link::{self, Link};
use cloison_agent::state::clock::MeshClock;
use cloison_agent::state::identity::Membership;
use cloison_agent::state::view_cache::{Cached, HeldLease};
use cloison_agent_core::install::LeaseTerm;
use cloison_proto::control::agent::{Endpoint, Report};
use cloison_proto::control::frame::Frame;
use cloison_proto::id::HostId;
use cloison_proto::key::WgPrivateKey;
use cloison_proto::version::{MeshTime, Timestamp};
use cloison_proto::view::{Floor, VerifiedView};

use super::host::{Host, Output};

/// Certificates are not simulated: this one holds.
const CERTIFICATE: Window = Window {
    not_before: 0,
    not_after: u64::MAX,
};

/// A host with its agent.
pub struct Member {
    /// Its WireGuard key.
    pub key: WgPrivateKey,
    /// Where it is.
    pub underlay: SocketAddr,
    /// Its data plane.
    pub host: Host,
    /// Its link.
    pub link: Link,
    us: Membership,
    seed: u64,
    incarnation: u64,
    /// The view in force; on disk too, as the lease is.
    view: Option<VerifiedView>,
    lease: Option<(HeldLease, Timestamp)>,
    floor: Option<Floor>,
    term: Option<LeaseTerm>,
}

/// What an agent asks of the world around it.
#[derive(Debug)]
pub enum Deed {
    /// To be linked.
    Connect,
    /// To send this frame on its link.
    Send(Frame),
    /// To end its link.
    Close,
    /// To carry what its data plane brought forth.
    Carry(Output),
}

impl Member {
    /// A host that has joined, at its first start.
    ///
    /// # Errors
    /// If it does not trust what it was told at the join.
    pub fn new(us: Membership, key: WgPrivateKey, underlay: SocketAddr, seed: u64, now: Timestamp) -> Result<Self> {
        let cached = Cached {
            view: None,
            lease: None,
            floor: None,
            overlay: None,
            clock: MeshClock::guess(us.known_time, now),
            trust: us.trust_at(us.known_time)?,
            problems: Vec::new(),
        };
        Ok(Self {
            host: Host::new(&key, seed),
            link: Link::new(us.clone(), &cached, Some(CERTIFICATE), 1, seed, now),
            key,
            underlay,
            us,
            seed,
            incarnation: 1,
            view: None,
            lease: None,
            floor: None,
            term: None,
        })
    }

    /// The host's id.
    #[must_use]
    pub const fn id(&self) -> HostId {
        self.us.host
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.us.name.as_str()
    }

    /// The view in force.
    #[must_use]
    pub const fn view(&self) -> Option<&VerifiedView> {
        self.view.as_ref()
    }

    /// Whether the view in force may be used at `now`.
    #[must_use]
    pub fn may_use_its_view(&self, now: Timestamp) -> bool {
        self.term.is_some_and(|term| now < term.ends)
    }

    /// Mesh time, as the data plane knows it.
    #[must_use]
    pub fn mesh_time(&self, now: Timestamp) -> MeshTime {
        self.term.map_or(MeshTime(0), |term| term.mesh.plus(now.since(term.at)))
    }

    /// Begins anew with what is on disk: the data plane, the link, everything.
    ///
    /// # Errors
    /// If it does not trust what is on disk.
    pub fn restart(&mut self, now: Timestamp) -> Result<Vec<Output>> {
        self.incarnation += 1;
        self.seed = self.seed.wrapping_add(0x9e37_79b9);
        let left = self.lease.take().map(|(held, ends)| (held, ends.since(now)));
        let mesh = self.link.mesh_time(now);
        let cached = Cached {
            view: self.view.clone(),
            lease: left.clone().filter(|(_, left)| *left > Duration::ZERO),
            floor: self.floor,
            overlay: self.view.as_ref().map(|view| view.content().config.overlay),
            clock: MeshClock::guess(mesh, now),
            trust: self.us.trust_at(mesh)?,
            problems: Vec::new(),
        };
        self.host = Host::new(&self.key, self.seed);
        self.link = Link::new(self.us.clone(), &cached, Some(CERTIFICATE), self.incarnation, self.seed, now);
        self.term = None;
        let mut outputs = Vec::new();
        if let Some(view) = &self.view {
            self.lease = left.map(|(held, left)| (held, now + left));
            self.term = self.lease_term(now);
            let (_, output) = self.host.install(view.content(), self.term, now);
            for peer in view.content().peers.keys() {
                self.host.engine().want_handshake(*peer);
            }
            outputs.push(output);
        }
        Ok(outputs)
    }

    /// Has the link say where this host is; what that asks for.
    ///
    /// # Errors
    /// As [`Member::carry_out`].
    pub fn announce(&mut self, now: Timestamp) -> Result<Vec<Deed>> {
        let outputs = self.link.endpoints(vec![Endpoint(self.underlay)]);
        self.carry_out(outputs, now)
    }

    /// Carries out what the link decided, and what it decides upon that.
    ///
    /// # Errors
    /// If a view goes back behind one that was in force (I12).
    pub fn carry_out(&mut self, outputs: Vec<link::Output>, now: Timestamp) -> Result<Vec<Deed>> {
        let (mut queue, mut deeds) = (VecDeque::from(outputs), Vec::new());
        while let Some(output) = queue.pop_front() {
            match output {
                link::Output::Connect { .. } => deeds.push(Deed::Connect),
                link::Output::Send(message) => deeds.push(Deed::Send(message.to_frame())),
                link::Output::Install(offer) => {
                    let (output, more) = self.install(*offer, now)?;
                    deeds.push(Deed::Carry(output));
                    queue.extend(more);
                }
                link::Output::Lease(held) => {
                    self.lease = Some(self.ending(*held, now));
                    self.term = self.lease_term(now);
                    self.term.into_iter().for_each(|term| self.host.renew(term));
                }
                link::Output::Hints(hints) => {
                    for hint in hints {
                        let endpoints: Vec<_> = hint.endpoints.iter().map(|endpoint| endpoint.0).collect();
                        self.host.hint(hint.host, &endpoints, hint.incarnation);
                    }
                }
                link::Output::Trust(items) => {
                    self.us.trust = items;
                    self.us.known_time = self.link.mesh_time(now);
                }
                link::Output::Revoked => {
                    self.lease = self.lease.take().map(|(held, _)| (held, now));
                    self.term = self.lease_term(now);
                    self.term.into_iter().for_each(|term| self.host.renew(term));
                }
                link::Output::Close(_) => deeds.push(Deed::Close),
                link::Output::Certificate(_) | link::Output::Warning(_) | link::Output::Key(_) => {}
            }
        }
        Ok(deeds)
    }

    fn install(&mut self, offer: link::Offer, now: Timestamp) -> Result<(Output, Vec<link::Output>)> {
        let (new, old) = (offer.view.floor(), self.floor);
        let header = offer.view.header();
        ensure!(header.host == self.id(), "{} was to take the view of {}", self.name(), header.host);
        if let Some(old) = old {
            let is_fork = new.version == old.version && new.state_hash != old.state_hash;
            let (new, old) = (new.version, old.version);
            ensure!(new >= old, "I12: {} went back from {old} to {new}", self.name());
            ensure!(!is_fork, "{} took a second view of version {new}", self.name());
        }
        self.lease = offer.lease.map(|held| self.ending(held, now));
        self.term = self.lease_term(now);
        let (_, output) = self.host.install(offer.view.content(), self.term, now);
        self.floor = Some(new);
        self.view = Some(offer.view);
        let unenforced = Vec::new();
        let more = self.link.applied(
            now,
            Report {
                unenforced,
                ignored_items: 0,
                instances: None,
            },
        );
        Ok((output, more))
    }

    /// A lease, and when it ends on this host's clock.
    fn ending(&self, held: HeldLease, now: Timestamp) -> (HeldLease, Timestamp) {
        let left = held.lease.ends_at().0.saturating_sub(self.link.mesh_time(now).0);
        let left = Duration::from_secs(left.min(held.lease.valid_for_secs));
        (held, now + left)
    }

    fn lease_term(&self, now: Timestamp) -> Option<LeaseTerm> {
        let (_, ends) = self.lease.as_ref()?;
        Some(LeaseTerm {
            at: now,
            mesh: self.link.mesh_time(now),
            ends: *ends,
        })
    }
}
