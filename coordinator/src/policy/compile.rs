//! A host's view out of a plan.
//!
//! A view holds its host's own instances and, for each pair of instances that a rule opens and one of which is here: the rule, the other
//! instance, and the other instance's host. Both ends of a pair get it, so that both can check and answer. Nothing else is in there: a
//! rule with no instance at its other end, or without a grant, leaves no byte.
//!
//! The same plan gives the same bytes. Expired rules are compiled too: agents enforce `expires`, and time alone never changes a view.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use cloison_proto::control::frame::MAX_VIEW_CHUNK;
use cloison_proto::id::{HostId, RuleId};
use cloison_proto::label::{ComponentName, HostName};
use cloison_proto::net::AddressPair;
use cloison_proto::signed::Signed;
use cloison_proto::trust;
use cloison_proto::view::{
    Config, Grant, Items, LocalInstance, MAX_BYTES, MAX_ITEMS, MAX_PEERS, Peer, RemoteInstance, RuleItem, SelfHost, section,
};
use sha2::{Digest as _, Sha256};

use super::plan::{Member, MemberIndex, Plan, Resolved};

/// A mesh that would be too large for an agent or for the coordinator. What would make it so is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ViewLimit {
    /// Too many other hosts in one view.
    #[error(
        "host {host} would be paired with {peers} hosts, but a view holds at most {MAX_PEERS}: let rules that concern it name fewer components"
    )]
    Peers {
        /// Whose view.
        host: HostName,
        /// How many.
        peers: usize,
    },
    /// Too many bytes or items in one view.
    #[error(
        "the view of host {host} would have {items} items and {bytes} bytes, but at most {MAX_ITEMS} and {MAX_BYTES} are allowed: let rules that concern it name fewer components"
    )]
    Size {
        /// Whose view.
        host: HostName,
        /// Its items.
        items: usize,
        /// Their bytes.
        bytes: usize,
    },
    /// A rule that opens more between two components than a frame can carry.
    #[error("rule {rule} opens so much of {to} that no frame can carry it: let services have port ranges instead of single ports")]
    Rule {
        /// The rule.
        rule: RuleId,
        /// Whom it lets others reach.
        to: ComponentName,
    },
    /// Too much in the rules together.
    #[error(
        "the rules mean more than {limit} components, counted once for each side of each rule: join rules that differ in ports or names only"
    )]
    Ends {
        /// How many are allowed.
        limit: usize,
    },
}

impl ViewLimit {
    /// Stable code for the API.
    pub const CODE: &'static str = "view_limit";
}

/// Items that are the same in every view that has them.
#[derive(Debug)]
pub(super) struct Encoded {
    peers: HashMap<HostId, Item>,
    /// For each component: its instances with their hosts.
    remotes: Vec<Vec<(HostId, Item)>>,
}

type Item = (Vec<u8>, Arc<[u8]>);

impl Encoded {
    fn new(plan: &Plan) -> Self {
        let peer = |id: &HostId| {
            let host = plan.inventory.hosts.get(id)?;
            let peer = Peer {
                id: host.id,
                name: host.name.clone(),
                wg_keys: host.wg_keys(),
                psk_generation: 0,
            };
            Some((host.id, only(|items| peer.put_in(items))?))
        };
        let remote = |member: &Member| {
            let one = |(host, addresses): &(HostId, _)| {
                let remote = RemoteInstance {
                    component: member.name.clone(),
                    host: *host,
                    addresses: *addresses,
                };
                Some((*host, only(|items| remote.put_in(items))?))
            };
            member.instances.iter().filter_map(one).collect()
        };
        Self {
            peers: plan.local.keys().filter_map(peer).collect(),
            remotes: plan.members.iter().map(remote).collect(),
        }
    }
}

/// The one item that `put` writes.
fn only(put: impl FnOnce(&mut Items)) -> Option<Item> {
    let mut items = Items::default();
    put(&mut items);
    items.iter().next().map(|(at, bytes)| (at.key.clone(), bytes.into()))
}

impl Plan {
    /// The items of `host`'s view; `None` if the mesh has no such host. `trust` are the statements that every host gets.
    ///
    /// # Errors
    /// [`ViewLimit`].
    pub fn items(&self, host: HostId, trust: &[Signed]) -> Result<Option<Items>, ViewLimit> {
        let Some(us) = self.inventory.hosts.get(&host) else {
            return Ok(None);
        };
        let mut items = Items::default();
        self.config().put_in(&mut items);
        let own = SelfHost {
            id: us.id,
            name: us.name.clone(),
            wg_keys: us.wg_keys(),
        };
        own.put_in(&mut items);
        trust.iter().for_each(|item| trust::put_in(&mut items, item));
        let mut writer = Writer::new(self, host, items);
        for local in self.local_members(host) {
            writer.local(local);
        }
        let (items, peers) = writer.finish();
        if peers > MAX_PEERS {
            let host = us.name.clone();
            return Err(ViewLimit::Peers { host, peers });
        }
        items.check_size().map_err(|_| ViewLimit::Size {
            host: us.name.clone(),
            items: items.len(),
            bytes: items.iter().map(|(at, bytes)| at.key.len() + bytes.len()).sum(),
        })?;
        Ok(Some(items))
    }

    /// Whether every view would be within its limits. An upper bound is enough for nearly all hosts; the rest are compiled.
    ///
    /// # Errors
    /// [`ViewLimit`] of the first host that would not be.
    pub fn check_limits(&self, trust: &[Signed]) -> Result<(), ViewLimit> {
        let bounds = Bounds::of(self)?;
        let fixed = 1024 + trust.iter().map(|item| item.to_bytes().len() + 32).sum::<usize>();
        for (host, local) in &self.local {
            if !bounds.fits(local, fixed, self.local.len()) {
                self.items(*host, trust)?;
            }
        }
        Ok(())
    }

    /// A hash over all that `host`'s view depends on, and a little more: if it is the same, so is the view.
    #[must_use]
    pub fn fingerprints(&self, trust: &[Signed]) -> HashMap<HostId, [u8; 32]> {
        let trust: Vec<_> = trust.iter().map(Signed::to_bytes).collect();
        let common = digest(|h| {
            h.update(format!("{:?}", self.config()));
            trust.iter().for_each(|item| field(h, item));
        });
        let rules = self.rule_fingerprints();
        let of_host = |id: &HostId| {
            digest(|h| {
                h.update(common);
                h.update(self.host_fingerprint(*id));
                for index in self.local_members(*id) {
                    let member = &self.members[index];
                    field(h, member.name.as_str().as_bytes());
                    field(h, member.attachment.to_string().as_bytes());
                    let touching = member.outgoing.iter().chain(member.incoming.iter().map(|(rule, _)| rule));
                    touching.for_each(|rule| h.update(rules[*rule]));
                    // Its own addresses: a component without rules is in no rule's hash.
                    member.on(*id).into_iter().for_each(|pair| addresses(h, pair));
                }
            })
        };
        self.inventory.hosts.keys().map(|id| (*id, of_host(id))).collect()
    }

    /// For each rule, a hash over it and all its ends' instances and their hosts.
    fn rule_fingerprints(&self) -> Vec<[u8; 32]> {
        let hosts: HashMap<_, _> = self.inventory.hosts.keys().map(|id| (*id, self.host_fingerprint(*id))).collect();
        let member = |member: &Member| {
            digest(|h| {
                field(h, member.name.as_str().as_bytes());
                for (on, pair) in &member.instances {
                    addresses(h, *pair);
                    h.update(hosts.get(on).copied().unwrap_or_default());
                }
            })
        };
        let members: Vec<_> = self.members.iter().map(member).collect();
        let rule = |rule: &Resolved| {
            digest(|h| {
                h.update(rule.id.0);
                h.update(rule.expires.0.to_be_bytes());
                h.update(rule.from.len().to_be_bytes());
                rule.from.iter().for_each(|from| h.update(members[*from]));
                for (to, grants) in &rule.to {
                    h.update(members[*to]);
                    field(h, format!("{grants:?}").as_bytes());
                }
            })
        };
        self.rules.iter().map(rule).collect()
    }

    fn host_fingerprint(&self, id: HostId) -> [u8; 32] {
        digest(|h| {
            h.update(id.0);
            if let Some(host) = self.inventory.hosts.get(&id) {
                field(h, host.name.as_str().as_bytes());
                host.wg_keys().iter().for_each(|key| field(h, key.as_bytes()));
            }
        })
    }

    fn config(&self) -> Config {
        Config {
            overlay: self.inventory.overlay,
            lease: self.inventory.lease,
        }
    }

    pub(super) fn local_members(&self, host: HostId) -> impl Iterator<Item = MemberIndex> + '_ {
        self.local.get(&host).into_iter().flatten().copied()
    }
}

fn digest(write: impl FnOnce(&mut Sha256)) -> [u8; 32] {
    let mut hash = Sha256::new();
    write(&mut hash);
    hash.finalize().into()
}

/// Bytes of varying length, so that no two lists run together.
fn field(hash: &mut Sha256, bytes: &[u8]) {
    hash.update(bytes.len().to_be_bytes());
    hash.update(bytes);
}

fn addresses(hash: &mut Sha256, pair: AddressPair) {
    hash.update(pair.v4.octets());
    hash.update(pair.v6.octets());
}

/// One host's view while it is written.
struct Writer<'p> {
    plan: &'p Plan,
    encoded: &'p Encoded,
    host: HostId,
    items: Items,
    peers: BTreeSet<HostId>,
    /// Components whose instances elsewhere stand in the view already.
    shown: BTreeSet<MemberIndex>,
}

impl<'p> Writer<'p> {
    fn new(plan: &'p Plan, host: HostId, items: Items) -> Self {
        let encoded = plan.encoded.get_or_init(|| Encoded::new(plan));
        Self {
            plan,
            encoded,
            host,
            items,
            peers: BTreeSet::new(),
            shown: BTreeSet::new(),
        }
    }

    /// An instance of this host, with every rule that it takes part in.
    fn local(&mut self, local: MemberIndex) {
        let member = &self.plan.members[local];
        if let Some(addresses) = member.on(self.host) {
            let instance = LocalInstance {
                component: member.name.clone(),
                attachment: member.attachment.clone(),
                addresses,
            };
            instance.put_in(&mut self.items);
        }
        for rule in member.outgoing.iter().map(|r| &self.plan.rules[*r]) {
            for (to, grants) in &rule.to {
                self.pair(rule, local, *to, grants, *to);
            }
        }
        for (rule, place) in &member.incoming {
            let rule = &self.plan.rules[*rule];
            for from in &rule.from {
                self.pair(rule, *from, local, &rule.to[*place].1, *from);
            }
        }
    }

    /// One rule between two components, `other` being the one to be shown.
    fn pair(&mut self, rule: &Resolved, from: MemberIndex, to: MemberIndex, grants: &[Grant], other: MemberIndex) {
        let (members, host) = (&self.plan.members, self.host);
        // An instance towards itself stays in its kernel: a component's rule with itself needs another host.
        let here = from != to && members[other].on(host).is_some();
        if !here && !members[other].runs_elsewhere(host) {
            return;
        }
        let item = RuleItem {
            id: rule.id,
            from: members[from].name.clone(),
            to: members[to].name.clone(),
            grants: grants.to_vec(),
            expires: rule.expires,
        };
        item.put_in(&mut self.items);
        if self.shown.insert(other) {
            for (on, (key, bytes)) in self.encoded.remotes[other].iter().filter(|(on, _)| *on != host) {
                self.items.put(section::REMOTE, key.clone(), Arc::clone(bytes));
                self.peers.insert(*on);
            }
        }
    }

    fn finish(mut self) -> (Items, usize) {
        for (key, bytes) in self.peers.iter().filter_map(|peer| self.encoded.peers.get(peer)) {
            self.items.put(section::PEER, key.clone(), Arc::clone(bytes));
        }
        (self.items, self.peers.len())
    }
}

/// Upper bounds of what each component brings into the view of a host that it runs on.
struct Bounds {
    /// For each component: items, and their bytes.
    members: Vec<(usize, usize)>,
}

impl Bounds {
    /// No peer or instance takes more, key and item together: ids, two keys and addresses make 160 bytes, two names 63 each.
    const INSTANCE: usize = 2 * (16 + 64 + 160);
    /// A rule's item without its grants: two ids, two names twice, numbers.
    const RULE: usize = 2 * (16 + 64 + 64) + 64;
    /// A grant: `udp/65535-65535`, a service's name, and their heads.
    const GRANT: usize = 24 + 66;
    /// An instance of the host: its attachment can hold a path of 4096 bytes.
    const LOCAL: usize = 8192;

    fn of(plan: &Plan) -> Result<Self, ViewLimit> {
        let instances = |m: MemberIndex| plan.members[m].instances.len();
        let mut members = vec![(0_usize, 0_usize); plan.members.len()];
        for rule in plan.rules.iter().filter(|rule| !rule.to.is_empty()) {
            let grants: usize = rule.to.iter().map(|(_, grants)| grants.len()).sum();
            let to: usize = rule.to.iter().map(|(to, _)| instances(*to)).sum();
            let outgoing = (
                rule.to.len() + 2 * to,
                rule.to.len() * Self::RULE + grants * Self::GRANT + to * Self::INSTANCE,
            );
            let from: usize = rule.from.iter().map(|from| instances(*from)).sum();
            for member in &rule.from {
                add(&mut members[*member], outgoing);
            }
            for (member, grants) in &rule.to {
                let item = Self::RULE + grants.len() * Self::GRANT;
                if item > MAX_VIEW_CHUNK && Self::RULE + encoded_len(grants) > MAX_VIEW_CHUNK {
                    let (rule, to) = (rule.id, plan.members[*member].name.clone());
                    return Err(ViewLimit::Rule { rule, to });
                }
                add(
                    &mut members[*member],
                    (rule.from.len() + 2 * from, rule.from.len() * item + from * Self::INSTANCE),
                );
            }
        }
        Ok(Self { members })
    }

    /// Whether a view with these components cannot be beyond a limit, in a mesh of `hosts`.
    fn fits(&self, local: &[MemberIndex], fixed: usize, hosts: usize) -> bool {
        let mut sum = (local.len() + fixed / 32 + 2, fixed + local.len() * Self::LOCAL);
        local.iter().for_each(|member| add(&mut sum, self.members[*member]));
        // Each peer is an item, so that few items are few peers.
        hosts.min(sum.0) <= MAX_PEERS && sum.0 <= MAX_ITEMS && sum.1 <= MAX_BYTES
    }
}

/// How many bytes grants take in an item: two texts with their heads each.
fn encoded_len(grants: &[Grant]) -> usize {
    let text = |grant: &Grant| grant.ports.to_string().len() + grant.service.as_ref().map_or(0, |s| s.as_str().len());
    grants.iter().map(|grant| text(grant) + 6).sum()
}

fn add(sum: &mut (usize, usize), more: (usize, usize)) {
    *sum = (sum.0.saturating_add(more.0), sum.1.saturating_add(more.1));
}
