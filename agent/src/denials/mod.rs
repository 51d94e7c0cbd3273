//! What was denied lately: who, whom, on what and why, summed up so that neither a port scan nor a broken application fills the disk.
//!
//! The workers' [notebook] tells of denials one by one, as far as they fit; the engine's counters tell of all. A sample makes a line of each
//! kind in the notebook, the most frequent first, and one for each reason of what is left. Names come from this host's own view, and
//! processes from this host alone: where a component has a namespace of its own, that is what is known of its processes; on the host's TUN
//! it is the user and the [cgroup](cgroups) of the socket, if the kernel could be asked in time.

pub mod cgroups;
pub mod notebook;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use cloison_agent_core::packet::Direction;
use cloison_agent_core::stats::Snapshot;
use cloison_proto::filter::Table;
use cloison_proto::label::ComponentName;
use cloison_proto::status::{Denial, Process};
use cloison_proto::verdict::DropReason;
use cloison_proto::version::Timestamp;

use crate::dataplane::{Enforcement, Report};
use cgroups::Cgroups;
use notebook::Kept;

/// How often drops are summed up.
pub const EVERY: Duration = Duration::from_secs(10);

/// How many sums are kept for `denials`.
const KEPT: usize = 256;

/// Most lines with names in one sample; what is beyond has a line for each reason and direction.
const LINES: usize = 32;

/// Sums of denials over short times.
#[derive(Debug, Default)]
pub struct Denials {
    /// Packets that lines were made of.
    told: HashMap<(Direction, DropReason), u64>,
    kept: VecDeque<(Timestamp, Denial)>,
    /// The last of each component of this host.
    last: BTreeMap<ComponentName, (Timestamp, Denial)>,
    cgroups: Cgroups,
}

/// By what names are given.
#[derive(Debug, Clone, Copy)]
pub struct Names<'a> {
    /// The view in force.
    pub table: &'a Table,
    /// How each instance is enforced.
    pub report: &'a Report,
}

impl Denials {
    /// Takes the counters and what was noted since the last time: it is logged and kept.
    pub fn sample(&mut self, counters: Snapshot, noted: HashMap<Kept, u64>, names: Names<'_>, now: Timestamp) {
        let mut noted: Vec<(Kept, u64)> = noted.into_iter().collect();
        noted.sort_by_key(|(_, packets)| std::cmp::Reverse(*packets));
        noted.truncate(LINES);
        self.cgroups.learn(noted.iter().filter_map(|(kept, _)| kept.process?.1));
        self.last.retain(|component, _| names.report.contains_key(component));
        for (kept, packets) in noted {
            let denial = self.named(&kept, packets, names);
            self.note(now, kept.direction, denial);
        }
        for direction in [Direction::Outbound, Direction::Inbound] {
            for (reason, count) in counters.of(direction).drops() {
                let told = self.told.get(&(direction, reason)).copied().unwrap_or(0);
                let packets = count.saturating_sub(told);
                if packets > 0 {
                    self.note(now, direction, nameless(direction, reason, packets));
                }
            }
        }
    }

    /// The last sums, the newest last.
    #[must_use]
    pub fn recent(&self, now: Timestamp) -> Vec<Denial> {
        self.kept.iter().map(|kept| aged(kept, now)).collect()
    }

    /// The last of a component of this host.
    #[must_use]
    pub fn last_of(&self, component: &ComponentName, now: Timestamp) -> Option<Denial> {
        self.last.get(component).map(|kept| aged(kept, now))
    }

    /// The last of each component, with when it was.
    pub fn last(&self, now: Timestamp) -> impl Iterator<Item = (&ComponentName, Timestamp, Denial)> {
        self.last.iter().map(move |(component, kept)| (component, kept.0, aged(kept, now)))
    }

    fn named(&self, kept: &Kept, packets: u64, names: Names<'_>) -> Denial {
        let instance = |address| names.table.lookup(address).and_then(|index| names.table.instance(index));
        let component = instance(kept.local)
            .filter(|instance| instance.local)
            .map(|instance| &instance.component);
        let place = component.and_then(|component| match names.report.get(component)? {
            Enforcement::Isolated(place) => Some(place.clone()),
            Enforcement::Bound(_) | Enforcement::Shared | Enforcement::Unenforced(_) => None,
        });
        let process = kept.process.map(|(user, cgroup)| Process {
            user: Some(user),
            cgroup: cgroup.and_then(|id| self.cgroups.name(id)).map(str::to_owned),
            place: None,
        });
        let of_place = |place| Process {
            place: Some(place),
            ..Process::default()
        };
        Denial {
            component: component.cloned(),
            remote: Some(kept.remote),
            remote_component: instance(kept.remote).map(|instance| instance.component.clone()),
            protocol: kept.protocol,
            port: (kept.port > 0).then_some(kept.port),
            process: process.or_else(|| place.map(of_place)),
            ..nameless(kept.direction, kept.reason, packets)
        }
    }

    fn note(&mut self, now: Timestamp, direction: Direction, denial: Denial) {
        let text = |value: Option<String>| value.unwrap_or_default();
        tracing::info!(
            direction = if denial.outbound { "outbound" } else { "inbound" },
            reason = denial.reason.as_str(),
            packets = denial.packets,
            component = text(denial.component.as_ref().map(ToString::to_string)),
            remote = text(denial.remote_shown()),
            on = text(denial.on_shown()),
            process = text(denial.process.as_ref().map(ToString::to_string)),
            "dropped"
        );
        let told = self.told.entry((direction, denial.reason)).or_default();
        *told = told.saturating_add(denial.packets);
        if let Some(component) = &denial.component {
            self.last.insert(component.clone(), (now, denial.clone()));
        }
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back((now, denial));
    }
}

/// What a counter says.
fn nameless(direction: Direction, reason: DropReason, packets: u64) -> Denial {
    Denial {
        ago_secs: 0,
        outbound: direction == Direction::Outbound,
        reason,
        packets,
        component: None,
        remote: None,
        remote_component: None,
        protocol: None,
        port: None,
        process: None,
    }
}

fn aged((at, denial): &(Timestamp, Denial), now: Timestamp) -> Denial {
    Denial {
        ago_secs: now.since(*at).as_secs(),
        ..denial.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cloison_agent_core::stats::Stats;
    use cloison_proto::net::Protocol;

    fn kept(local: [u8; 4], port: u16, process: Option<(u32, Option<u64>)>) -> Kept {
        Kept {
            direction: Direction::Inbound,
            reason: DropReason::NoRule,
            local: local.into(),
            remote: [10, 77, 1, 9].into(),
            protocol: Some(Protocol::Tcp),
            port,
            process,
        }
    }

    #[test]
    fn drops_are_summed_and_bounded() {
        let (stats, table, report) = (Stats::default(), Table::default(), Report::new());
        let names = Names {
            table: &table,
            report: &report,
        };
        let mut denials = Denials::default();
        for round in 0..1_000u64 {
            stats.dropped(Direction::Inbound, DropReason::NoRule, 3);
            denials.sample(stats.snapshot(), HashMap::new(), names, Timestamp(round * 1_000_000_000));
        }
        denials.sample(stats.snapshot(), HashMap::new(), names, Timestamp(1_000_000_000_000));
        let recent = denials.recent(Timestamp(1_000_000_000_000));
        assert_eq!(recent.len(), KEPT);
        assert!(
            recent
                .iter()
                .all(|d| d.packets == 3 && d.reason == DropReason::NoRule && !d.outbound)
        );
        assert_eq!(recent.last().map(|d| d.ago_secs), Some(1));
    }

    #[test]
    fn what_was_noted_has_a_line_of_its_own_and_the_rest_one_in_all() {
        let (stats, table, report) = (Stats::default(), Table::default(), Report::new());
        let names = Names {
            table: &table,
            report: &report,
        };
        let mut denials = Denials::default();
        stats.dropped(Direction::Inbound, DropReason::NoRule, 20_000);
        let noted = (0..200).map(|port| (kept([10, 77, 1, 0], port, None), u64::from(port))).collect();
        denials.sample(stats.snapshot(), noted, names, Timestamp(0));
        let lines = denials.recent(Timestamp(0));
        assert_eq!(lines.len(), LINES + 1);
        assert_eq!(
            lines.first().map(|d| (d.port, d.packets)),
            Some((Some(199), 199)),
            "the most frequent first"
        );
        let named: u64 = lines.iter().take(LINES).map(|d| d.packets).sum();
        let rest = lines.last().map(|d| (d.remote, d.packets));
        assert_eq!(rest, Some((None, 20_000u64.saturating_sub(named))), "{named} of 20000 were named");
        denials.sample(stats.snapshot(), HashMap::new(), names, Timestamp(0));
        assert_eq!(denials.recent(Timestamp(0)).len(), lines.len(), "nothing is told twice");
    }

    #[test]
    fn a_component_s_last_denial_names_its_process_and_is_forgotten_with_it() -> Result<(), Box<dyn std::error::Error>> {
        let (view, web) = view()?;
        let table = Table::new(&view);
        fn names<'a>(table: &'a Table, report: &'a Report) -> Names<'a> {
            Names { table, report }
        }
        let report = Report::from([(web.clone(), Enforcement::Isolated("container web".into()))]);
        let address = view.instances.get(&web).ok_or("no instance")?.addresses.v4.octets();
        let mut denials = Denials::default();
        let noted = HashMap::from([(kept(address, 22, None), 5)]);
        denials.sample(Snapshot::default(), noted, names(&table, &report), Timestamp(0));
        let last = denials.last_of(&web, Timestamp(3_000_000_000)).ok_or("no denial")?;
        assert_eq!((last.ago_secs, last.packets, last.on_shown().as_deref()), (3, 5, Some("tcp/22")));
        assert_eq!(last.process.map(|p| p.to_string()).as_deref(), Some("container web"));

        let report = Report::from([(web.clone(), Enforcement::Shared)]);
        let noted = HashMap::from([(kept(address, 22, Some((3009, None))), 1)]);
        denials.sample(Snapshot::default(), noted, names(&table, &report), Timestamp(0));
        let last = denials.last_of(&web, Timestamp(0)).ok_or("no denial")?;
        assert_eq!(last.process.map(|p| p.to_string()).as_deref(), Some("user 3009"));

        denials.sample(Snapshot::default(), HashMap::new(), names(&table, &Report::new()), Timestamp(0));
        assert_eq!(denials.last_of(&web, Timestamp(0)), None);
        Ok(())
    }

    /// A view with one component of this host.
    fn view() -> Result<(cloison_proto::view::View, ComponentName), Box<dyn std::error::Error>> {
        use cloison_proto::view::{Config, LocalInstance, SelfHost, View};
        let overlay = cloison_proto::net::OverlayRange::new([10, 77, 0, 0].into(), 16, "fd12:3456:789a::".parse()?)?;
        let web: ComponentName = "web".parse()?;
        let instance = LocalInstance {
            component: web.clone(),
            attachment: cloison_proto::policy::Attachment::Host,
            addresses: overlay.nth(0).ok_or("no address")?,
        };
        let view = View {
            config: Config {
                overlay,
                lease: Duration::from_secs(60),
            },
            host: SelfHost {
                id: cloison_proto::id::HostId([1; 16]),
                name: "a".parse()?,
                wg_keys: Vec::new(),
            },
            instances: BTreeMap::from([(web.clone(), instance)]),
            peers: BTreeMap::new(),
            remotes: Vec::new(),
            rules: Vec::new(),
            trust: Vec::new(),
            ignored: 0,
        };
        Ok((view, web))
    }
}
