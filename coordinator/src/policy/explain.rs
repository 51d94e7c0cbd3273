//! Who may talk to whom, and whether it works right now.
//!
//! The answer is not the policy read once more: for each pair of instances, the views of both hosts are compiled as they are published, and
//! both compiled tables are asked by [`Table::check`], the function that agents ask for each packet. Beside each verdict stand the rule's
//! reasons and whether both hosts have the view in force.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use cloison_proto::control::agent::InstanceReport;
use cloison_proto::filter::{Table, Verdict};
use cloison_proto::id::{HostId, RuleId};
use cloison_proto::label::{ComponentName, HostName, ServiceName};
use cloison_proto::net::{AddressPair, PortRange, PortSpec};
use cloison_proto::policy::{Note, What};
use cloison_proto::verdict::DropReason;
use cloison_proto::version::MeshTime;
use cloison_proto::view::View;

use super::plan::{Member, MemberIndex, Plan};

/// Most pairs of instances in one answer; the rest is counted.
pub const MAX_PAIRS: usize = 64;

/// What is asked: may `from` begin a conversation with `to` on `what`?
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Who begins.
    pub from: ComponentName,
    /// With whom.
    pub to: ComponentName,
    /// On what: a service, ports, or all declared services.
    pub what: What,
}

/// A question that has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExplainError {
    /// The policy has no such component.
    #[error("there is no component {0} in the policy in force")]
    UnknownComponent(ComponentName),
    /// The component has no such service.
    #[error("{component} has no service {service}: name one of its services, or ports as in tcp/5432")]
    UnknownService {
        /// Whose.
        component: ComponentName,
        /// Which.
        service: ServiceName,
    },
    /// All services were meant, and there are none.
    #[error("{0} declares no service: name ports, as in tcp/5432")]
    NoServices(ComponentName),
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// The ports that were asked for.
    pub ports: Vec<PortSpec>,
    /// What the document says of all of these ports, wherever the components run: whether a rule in force allows them.
    pub by_document: bool,
    /// Each pair of instances, by host ids; at most [`MAX_PAIRS`]. None if one of the components runs nowhere.
    pub pairs: Vec<PairAnswer>,
    /// How many pairs are left out.
    pub unlisted: usize,
    /// The rules that the answers cite.
    pub rules: BTreeMap<RuleId, RuleNote>,
    /// The hosts that the answers name.
    pub hosts: BTreeMap<HostId, HostState>,
}

/// One pair of instances.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairAnswer {
    /// Who begins.
    pub from: InstanceRef,
    /// With whom.
    pub to: InstanceRef,
    /// What holds for which ports, in order; together they are the ports asked for.
    pub answers: Vec<PortAnswer>,
}

impl PairAnswer {
    /// Whether both ends allow every port asked for.
    #[must_use]
    pub fn is_allowed(&self) -> bool {
        self.answers.iter().all(PortAnswer::is_allowed)
    }
}

/// An instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceRef {
    /// Where it runs.
    pub host: HostId,
    /// Its addresses.
    pub addresses: AddressPair,
}

/// What both ends say about some ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortAnswer {
    /// The ports.
    pub ports: PortSpec,
    /// What the host of the beginning instance does.
    pub sender: EndVerdict,
    /// What the host of the other one does.
    pub receiver: EndVerdict,
}

impl PortAnswer {
    /// Whether both ends allow it.
    #[must_use]
    pub const fn is_allowed(&self) -> bool {
        matches!(
            (self.sender, self.receiver),
            (EndVerdict::Allowed { .. }, EndVerdict::Allowed { .. })
        )
    }
}

/// What one end says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndVerdict {
    /// A rule allows it.
    Allowed {
        /// Which rule: the first by id.
        rule: RuleId,
        /// Until when; [`MeshTime::NEVER`] if it does not end.
        until: MeshTime,
    },
    /// It drops it.
    Denied(DropReason),
}

/// What people wrote about a rule. It never leaves the coordinator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleNote {
    /// Its canonical text.
    pub arrow: String,
    /// Why it exists.
    pub why: Option<Note>,
    /// Who answers for it.
    pub owner: Option<Note>,
    /// When it ends.
    pub expires: Option<MeshTime>,
}

/// A host as an answer names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostState {
    /// Its name.
    pub name: HostName,
    /// How it does.
    pub live: HostLive,
}

/// How a host does right now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostLive {
    /// Whether its agent is linked.
    pub linked: bool,
    /// Whether it acknowledged the view in force.
    pub applied: bool,
    /// Components that it cannot enforce, with the reason: their packets do not pass.
    pub unenforced: BTreeMap<ComponentName, String>,
    /// How its agent said last that its instances are enforced.
    pub instances: Arc<BTreeMap<ComponentName, InstanceReport>>,
}

/// Who knows how hosts do: the publisher.
pub trait LiveState {
    /// How `host` does.
    fn live(&self, host: HostId) -> HostLive;
}

/// Answers a question at mesh time `now`.
///
/// # Errors
/// [`ExplainError`].
pub fn explain(plan: &Plan, question: &Question, now: MeshTime, live: &dyn LiveState) -> Result<Explanation, ExplainError> {
    let index = |name: &ComponentName| plan.member(name).ok_or_else(|| ExplainError::UnknownComponent(name.clone()));
    let (from, to) = (index(&question.from)?, index(&question.to)?);
    let asked = ports(plan, question)?;
    let segments: Vec<_> = asked.iter().flat_map(|ports| segments(plan, from, to, *ports)).collect();
    let mut tables = Tables::new(plan);
    let by_document = segments.iter().all(|ports| is_open(plan, from, to, *ports, now));
    let mut explanation = Explanation {
        ports: asked,
        by_document,
        pairs: Vec::new(),
        unlisted: 0,
        rules: BTreeMap::new(),
        hosts: BTreeMap::new(),
    };
    for (source, destination) in pairs(&plan.members[from], &plan.members[to], from == to) {
        if explanation.pairs.len() == MAX_PAIRS {
            explanation.unlisted += 1;
            continue;
        }
        let answers = segments.iter().map(|ports| PortAnswer {
            ports: *ports,
            sender: tables.ask(source.host, &source, &destination, *ports, now),
            receiver: tables.ask(destination.host, &source, &destination, *ports, now),
        });
        let answers = answers.collect();
        explanation.cite(plan, &source, &destination, live);
        explanation.pairs.push(PairAnswer {
            from: source,
            to: destination,
            answers,
        });
    }
    explanation.note_rules(plan);
    Ok(explanation)
}

impl Explanation {
    fn cite(&mut self, plan: &Plan, source: &InstanceRef, destination: &InstanceRef, live: &dyn LiveState) {
        for id in [source.host, destination.host] {
            let Some(host) = plan.inventory.hosts.get(&id) else { continue };
            self.hosts.entry(id).or_insert_with(|| HostState {
                name: host.name.clone(),
                live: live.live(id),
            });
        }
    }

    fn note_rules(&mut self, plan: &Plan) {
        let ends = self
            .pairs
            .iter()
            .flat_map(|pair| &pair.answers)
            .flat_map(|answer| [answer.sender, answer.receiver]);
        let cited = ends.filter_map(|end| match end {
            EndVerdict::Allowed { rule, .. } => Some(rule),
            EndVerdict::Denied(_) => None,
        });
        let cited: BTreeSet<_> = cited.collect();
        let rules = plan.policy.rules().iter().filter(|rule| cited.contains(&rule.id));
        self.rules = rules
            .map(|rule| {
                let note = RuleNote {
                    arrow: rule.arrow(),
                    why: rule.why.clone(),
                    owner: rule.owner.clone(),
                    expires: rule.expires,
                };
                (rule.id, note)
            })
            .collect();
    }
}

/// What the question's `what` means on its target.
fn ports(plan: &Plan, question: &Question) -> Result<Vec<PortSpec>, ExplainError> {
    let component = question.to.clone();
    let services = plan.policy.components().get(&component).map(|c| &c.services);
    let mut found: Vec<_> = match &question.what {
        What::Ports(ports) => vec![*ports],
        What::Service(service) => match services.and_then(|s| s.get(service)) {
            Some(ports) => ports.clone(),
            None => {
                let service = service.clone();
                return Err(ExplainError::UnknownService { component, service });
            }
        },
        What::AllServices => services.into_iter().flatten().flat_map(|(_, ports)| ports.clone()).collect(),
    };
    found.sort_unstable();
    found.dedup();
    if found.is_empty() {
        return Err(ExplainError::NoServices(component));
    }
    Ok(found)
}

/// `ports` in pieces within which no rule between the two makes a difference.
fn segments(plan: &Plan, from: MemberIndex, to: MemberIndex, ports: PortSpec) -> Vec<PortSpec> {
    let (whole, make): (PortRange, fn(PortRange) -> PortSpec) = match ports {
        PortSpec::Tcp(range) => (range, PortSpec::Tcp),
        PortSpec::Udp(range) => (range, PortSpec::Udp),
        PortSpec::Icmp => return vec![PortSpec::Icmp],
    };
    let mut starts = BTreeSet::from([whole.first()]);
    for (_, grants) in plan.openings(from, to) {
        for grant in grants.iter().filter(|g| g.ports.protocol() == ports.protocol()) {
            if let PortSpec::Tcp(range) | PortSpec::Udp(range) = grant.ports {
                let cuts = [Some(range.first()), range.last().checked_add(1)];
                starts.extend(cuts.into_iter().flatten().filter(|cut| whole.contains(*cut)));
            }
        }
    }
    let ends = starts.iter().skip(1).map(|next| next - 1).chain([whole.last()]);
    let ranges = starts
        .iter()
        .zip(ends)
        .filter_map(|(first, last)| PortRange::new(*first, last).ok());
    ranges.map(make).collect()
}

/// Whether a rule in force opens one of the [`segments`].
fn is_open(plan: &Plan, from: MemberIndex, to: MemberIndex, segment: PortSpec, now: MeshTime) -> bool {
    let port = match segment {
        PortSpec::Tcp(range) | PortSpec::Udp(range) => range.first(),
        PortSpec::Icmp => 0,
    };
    let mut in_force = plan.openings(from, to).filter(|(rule, _)| now < rule.expires);
    in_force.any(|(_, grants)| grants.iter().any(|g| g.ports.covers(segment.protocol(), port)))
}

/// Every pair of instances, but for an instance with itself: that stays in its kernel.
fn pairs<'p>(from: &'p Member, to: &'p Member, same: bool) -> impl Iterator<Item = (InstanceRef, InstanceRef)> + 'p {
    let instance = |(host, addresses): &(HostId, AddressPair)| InstanceRef {
        host: *host,
        addresses: *addresses,
    };
    let all = from
        .instances
        .iter()
        .flat_map(move |from| to.instances.iter().map(move |to| (instance(from), instance(to))));
    all.filter(move |(from, to)| !same || from.host != to.host)
}

/// The compiled tables of the hosts that were asked, each compiled once.
struct Tables<'p> {
    plan: &'p Plan,
    known: HashMap<HostId, Option<Table>>,
}

impl<'p> Tables<'p> {
    fn new(plan: &'p Plan) -> Self {
        Self {
            plan,
            known: HashMap::new(),
        }
    }

    /// What `host` does with the first packet. A view that cannot be compiled is one that the host does not have.
    fn ask(&mut self, host: HostId, from: &InstanceRef, to: &InstanceRef, ports: PortSpec, now: MeshTime) -> EndVerdict {
        let plan = self.plan;
        let table = self.known.entry(host).or_insert_with(|| compile(plan, host));
        let Some(table) = table else {
            return EndVerdict::Denied(DropReason::NoView);
        };
        let port = match ports {
            PortSpec::Tcp(range) | PortSpec::Udp(range) => range.first(),
            PortSpec::Icmp => 0,
        };
        let (source, destination) = (IpAddr::V6(from.addresses.v6), IpAddr::V6(to.addresses.v6));
        match table.check(source, destination, ports.protocol(), port, now) {
            Verdict::Denied(reason) => EndVerdict::Denied(reason),
            Verdict::Allowed { rule, until } => match table.rule(rule) {
                Some(rule) => EndVerdict::Allowed { rule, until },
                None => EndVerdict::Denied(DropReason::NoRule),
            },
        }
    }
}

fn compile(plan: &Plan, host: HostId) -> Option<Table> {
    let items = plan.items(host, &[]).ok()??;
    View::parse(&items, host).ok().map(|view| Table::new(&view))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::inventory::{Host, Instances, Inventory};

    type TestResult = Result<(), Box<dyn std::error::Error>>;

    /// Every host is linked; h1 has applied its view.
    struct Linked;

    impl LiveState for Linked {
        fn live(&self, host: HostId) -> HostLive {
            HostLive {
                linked: true,
                applied: host == HostId([1; 16]),
                ..HostLive::default()
            }
        }
    }

    const POLICY: &str = "version: 1
components:
  a: {on: h1, attach: {user: a}}
  b: {on: [h1, h2], attach: {user: b}, services: {web: tcp/80, old: tcp/1}}
  c: {on: nowhere, attach: {user: c}}
allow:
  - {from: a, to: b:web, why: the shop, owner: web team}
  - {from: a, to: b:old, expires: 2001-01-01T00:00:00Z}
  - a -> b:tcp/100-200
  - b -> b:icmp
  - a -> c:tcp/1
";

    fn plan() -> Result<Plan, Box<dyn std::error::Error>> {
        let policy = cloison_proto::policy::parse(POLICY).map_err(|findings| format!("{findings:?}"))?;
        let overlay = cloison_proto::net::OverlayRange::new([10, 77, 0, 0].into(), 16, "fd00::".parse()?)?;
        let host = |n: u8| {
            let host = Host {
                id: HostId([n; 16]),
                name: format!("h{n}").parse()?,
                name_given: true,
                labels: BTreeMap::new(),
                wg_key: cloison_proto::key::WgPrivateKey::from_bytes([n; 32]).public(),
                next: None,
                identity: cloison_proto::key::SigningKey::from_seed(&[n; 32]).identity(),
                enrolled_at: MeshTime(0),
                contested: false,
            };
            Ok::<_, Box<dyn std::error::Error>>((host.id, Arc::new(host)))
        };
        let pair = |n| overlay.nth(n).ok_or("the range is too small");
        let (h1, h2) = (HostId([1; 16]), HostId([2; 16]));
        let instances = Instances::from([
            ("a".parse()?, [(h1, pair(0)?)].into()),
            ("b".parse()?, [(h1, pair(1)?), (h2, pair(2)?)].into()),
        ]);
        let inventory = Inventory {
            mesh: cloison_proto::id::MeshId([7; 16]),
            version: Default::default(),
            content_revision: 0,
            overlay,
            lease: std::time::Duration::from_secs(60),
            addresses: Arc::new([]),
            policy: None,
            read_only: None,
            hosts: Arc::new([host(1)?, host(2)?].into()),
            instances: Arc::new(instances),
        };
        Ok(Plan::new(Arc::new(policy), Arc::new(inventory))?)
    }

    fn ask(from: &str, to: &str, what: What) -> Result<Explanation, Box<dyn std::error::Error>> {
        let question = Question {
            from: from.parse()?,
            to: to.parse()?,
            what,
        };
        Ok(explain(&plan()?, &question, MeshTime(1_700_000_000), &Linked)?)
    }

    #[test]
    fn both_ends_are_asked_for_every_pair_and_the_rule_is_shown_with_its_reasons() -> TestResult {
        let answer = ask("a", "b", What::Service("web".parse()?))?;
        assert_eq!(answer.pairs.len(), 2);
        assert!(answer.pairs.iter().all(PairAnswer::is_allowed));
        let [(_, note)] = answer.rules.iter().collect::<Vec<_>>()[..] else {
            return Err("one rule".into());
        };
        assert_eq!(note.arrow, "a -> b:web");
        assert_eq!(note.why.as_ref().map(Note::as_str), Some("the shop"));
        let applied: Vec<_> = answer.hosts.values().map(|host| (host.name.as_str(), host.live.applied)).collect();
        assert_eq!(applied, [("h1", true), ("h2", false)]);
        Ok(())
    }

    #[test]
    fn a_range_is_answered_piece_by_piece() -> TestResult {
        let answer = ask("a", "b", What::Ports("tcp/50-300".parse()?))?;
        let shown: Vec<_> = answer.pairs[0]
            .answers
            .iter()
            .map(|a| format!("{} {}", a.ports, a.is_allowed()))
            .collect();
        assert_eq!(
            shown,
            [
                "tcp/50-79 false",
                "tcp/80 true",
                "tcp/81-99 false",
                "tcp/100-200 true",
                "tcp/201-300 false"
            ]
        );
        Ok(())
    }

    #[test]
    fn a_denial_says_why_and_the_other_way_round_is_denied() -> TestResult {
        let end = |answer: &Explanation| (answer.pairs[0].answers[0].sender, answer.pairs[0].answers[0].receiver);
        let expired = EndVerdict::Denied(DropReason::RuleExpired);
        assert_eq!(end(&ask("a", "b", What::Service("old".parse()?))?), (expired, expired));
        let none = EndVerdict::Denied(DropReason::NoRule);
        assert_eq!(end(&ask("b", "a", What::Ports("tcp/80".parse()?))?), (none, none));
        Ok(())
    }

    #[test]
    fn an_instance_is_no_pair_with_itself_and_a_component_without_hosts_has_none() -> TestResult {
        let answer = ask("b", "b", What::Ports(PortSpec::Icmp))?;
        assert!(answer.pairs.len() == 2 && answer.pairs.iter().all(|pair| pair.from.host != pair.to.host && pair.is_allowed()));
        assert!(ask("a", "c", What::Ports("tcp/1".parse()?))?.pairs.is_empty());
        Ok(())
    }

    #[test]
    fn what_is_not_in_the_policy_is_named() {
        let says = |from: &str, to: &str, what| ask(from, to, what).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(says("x", "b", What::AllServices).contains("no component x"));
        assert!(says("a", "c", What::AllServices).contains("declares no service"));
        assert!(
            "sql"
                .parse()
                .is_ok_and(|sql| says("a", "b", What::Service(sql)).contains("no service sql"))
        );
    }
}
