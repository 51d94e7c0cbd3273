//! `metrics`: the running agent's numbers, in the Prometheus text format (version 0.0.4). Names of hosts and components stay out of them:
//! a monitoring system is read by more people than a host is.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use cloison_proto::lease;
use cloison_proto::status::{Answer, Counters, Enforcement, Link, Request, Status};
use cloison_proto::verdict::DropReason;

use super::{Done, Failure, asked, print_text};
use crate::config::Config;

/// Prints the metrics.
///
/// # Errors
/// [`Failure`].
pub fn run(config: &Config) -> Result<Done, Failure> {
    let status = asked(config, &Request::Status, |a| if let Answer::Status(s) = a { Some(s) } else { None })?;
    print_text(&text(&status))?;
    Ok(Done::Well)
}

/// One metric, its samples as labels and value.
struct Metric {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    samples: Vec<(String, u64)>,
}

fn gauge(name: &'static str, help: &'static str, value: u64) -> Metric {
    Metric {
        name,
        kind: "gauge",
        help,
        samples: vec![(String::new(), value)],
    }
}

fn counter(name: &'static str, help: &'static str, samples: Vec<(String, u64)>) -> Metric {
    Metric {
        name,
        kind: "counter",
        help,
        samples,
    }
}

fn text(status: &Status) -> String {
    let mut text = String::new();
    for metric in metrics(status) {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "# HELP {} {}\n# TYPE {} {}",
            metric.name, metric.help, metric.name, metric.kind
        );
        for (labels, value) in metric.samples {
            let _ = writeln!(text, "{}{labels} {value}", metric.name);
        }
    }
    text
}

fn metrics(status: &Status) -> Vec<Metric> {
    let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
    let (left, valid_for) = (status.lease.left_secs, status.lease.valid_for_secs);
    let warned = lease::warned_at(Duration::from_secs(left), Duration::from_secs(valid_for)).filter(|_| status.version.is_some());
    let unenforced = |i: &&cloison_proto::status::Instance| matches!(i.enforcement, Enforcement::Unenforced { .. });
    let sessions = status.peers.iter().filter(|p| p.handshake_secs.is_some()).count();
    let both = [("outbound", &status.packets.outbound), ("inbound", &status.packets.inbound)];
    let by_direction = |value: fn(&Counters) -> u64| both.map(|(d, c)| (format!("{{direction=\"{d}\"}}"), value(c))).to_vec();
    vec![
        gauge("cloison_agent_view", "Whether a view is in force.", status.version.is_some().into()),
        gauge(
            "cloison_agent_view_revision",
            "Revision of the view in force.",
            status.version.map_or(0, |v| v.revision),
        ),
        gauge("cloison_agent_lease_left_seconds", "What is left of the lease.", left),
        gauge("cloison_agent_lease_seconds", "How long the lease was given for.", valid_for),
        gauge(
            "cloison_agent_lease_warning_percent",
            "Share of the lease that is used: 50, 80 or 95 once it is reached, else 0.",
            warned.map_or(0, u64::from),
        ),
        gauge(
            "cloison_agent_linked",
            "Whether the agent is linked with the coordinator.",
            matches!(status.link, Link::Linked { .. }).into(),
        ),
        gauge("cloison_agent_instances", "Components on this host.", count(status.instances.len())),
        gauge(
            "cloison_agent_instances_unenforced",
            "Components that cannot be enforced here.",
            count(status.instances.iter().filter(unenforced).count()),
        ),
        gauge(
            "cloison_agent_peers",
            "Hosts that a rule pairs this one with.",
            count(status.peers.len()),
        ),
        gauge("cloison_agent_sessions", "Peers with a session.", count(sessions)),
        gauge(
            "cloison_agent_warnings",
            "Warnings that `cloison-agent status` shows.",
            count(status.warnings.len()),
        ),
        gauge("cloison_agent_uptime_seconds", "Since the agent started.", status.uptime_secs),
        counter(
            "cloison_agent_packets_received_total",
            "Packets that came in.",
            by_direction(|c| c.received),
        ),
        counter(
            "cloison_agent_packets_delivered_total",
            "Packets that went on.",
            by_direction(|c| c.delivered),
        ),
        counter(
            "cloison_agent_packets_answered_total",
            "Answers made here, like resets.",
            by_direction(|c| c.answered),
        ),
        counter(
            "cloison_agent_packets_dropped_total",
            "Packets dropped, by reason.",
            both.iter().flat_map(|(d, c)| drops(d, &c.dropped)).collect(),
        ),
    ]
}

/// A sample for each reason, those without drops included: a rate needs a beginning.
fn drops(direction: &str, dropped: &BTreeMap<DropReason, u64>) -> Vec<(String, u64)> {
    let sample = |reason: &DropReason| {
        let labels = format!("{{direction=\"{direction}\",reason=\"{reason}\"}}");
        (labels, dropped.get(reason).copied().unwrap_or(0))
    };
    DropReason::ALL.iter().map(sample).collect()
}

#[cfg(test)]
mod tests {
    use cloison_proto::id::{HostId, MeshId};
    use cloison_proto::key::WgPrivateKey;
    use cloison_proto::status::{KeyStage, KeyStatus, Lease, Names, Packets};
    use cloison_proto::version::{MeshTime, Version};

    use super::*;

    fn status(left_secs: u64) -> Result<Status, Box<dyn std::error::Error>> {
        let mut packets = Packets::default();
        packets.inbound.dropped.insert(DropReason::NoRule, 3);
        Ok(Status {
            software: "test".into(),
            host: HostId([1; 16]),
            name: "secret-name".parse()?,
            mesh: MeshId([2; 16]),
            uptime_secs: 5,
            incarnation: 1,
            listen_port: 51820,
            interface: "cloison0".into(),
            version: Some(Version {
                generation: 1,
                revision: 7,
            }),
            state_hash: None,
            lease: Lease {
                left_secs,
                valid_for_secs: 1_000,
                mesh_time: MeshTime(0),
            },
            clock_offset_secs: None,
            link: Link::Connecting,
            wg_key: KeyStatus {
                current: WgPrivateKey::from_bytes([3; 32]).public(),
                next: None,
                stage: KeyStage::Settled,
                changes_in_secs: None,
                refused: None,
            },
            names: Names::Off,
            resolver: cloison_proto::status::Resolver::Off,
            resolved: cloison_proto::status::Resolved::Off,
            instances: Vec::new(),
            peers: Vec::new(),
            packets,
            ignored_items: 0,
            warnings: Vec::new(),
        })
    }

    #[test]
    fn metrics_warn_of_the_lease_count_every_reason_and_name_nobody() -> Result<(), Box<dyn std::error::Error>> {
        for (left, warned) in [(1_000, 0), (500, 50), (200, 80), (50, 95), (0, 95)] {
            let line = format!("cloison_agent_lease_warning_percent {warned}\n");
            assert!(text(&status(left)?).contains(&line), "{left}");
        }
        let text = text(&status(1_000)?);
        assert!(
            text.contains("cloison_agent_packets_dropped_total{direction=\"inbound\",reason=\"no_rule\"} 3\n"),
            "{text}"
        );
        let samples = text.lines().filter(|l| l.starts_with("cloison_agent_packets_dropped_total{"));
        assert_eq!(samples.count(), 2 * DropReason::ALL.len());
        assert!(!text.contains("secret-name"));
        for line in text.lines().filter(|l| !l.starts_with('#')) {
            let value = line.rsplit(' ').next().and_then(|v| v.parse::<u64>().ok());
            assert!(value.is_some(), "{line}");
        }
        Ok(())
    }
}
