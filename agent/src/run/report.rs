//! What the coordinator is told of this host's instances, for people: how each is enforced, and what was denied last. Of a denial it is told the
//! time, the direction and the reason, and nothing about the other end or the process.

use cloison_proto::control::agent::{InstanceReport, LastDenial, MAX_DETAIL, MAX_INSTANCES, Report, Unenforced};
use cloison_proto::label::ComponentName;
use cloison_proto::status::Denial;
use cloison_proto::version::{MeshTime, Timestamp};

use super::Agent;
use crate::dataplane::{Enforcement, Report as Enforced};

/// The denials that the coordinator was told of, by component, and when each was, by the host's clock.
pub(super) type Told = std::collections::BTreeMap<ComponentName, (Timestamp, LastDenial)>;

impl Agent {
    /// How the host does with its view.
    pub(super) fn report(&self) -> Report {
        let dataplane = self.dataplane.lock();
        Report {
            unenforced: unenforced(dataplane.report()),
            ignored_items: self.link.installed_content().map_or(0, |view| view.ignored as u64),
            instances: Some(instances(dataplane.report(), &self.denials_told)),
        }
    }

    /// Tells the coordinator of components that were denied something since it was told last.
    pub(super) async fn report_denials(&mut self, now: Timestamp) {
        let told = std::mem::take(&mut self.denials_told);
        let last = self.denials.last(now);
        let mesh = self.link.mesh_time(now);
        let kept = |(component, at, denial): (&ComponentName, Timestamp, Denial)| {
            let before = told.get(component).filter(|(told, _)| *told == at);
            let denial = before.cloned().unwrap_or_else(|| (at, shown(&denial, mesh)));
            (component.clone(), denial)
        };
        self.denials_told = last.map(kept).collect();
        if self.denials_told != told {
            let report = self.report();
            let outputs = self.link.report(report);
            self.carry_out(outputs).await;
        }
    }
}

fn shown(denial: &Denial, now: MeshTime) -> LastDenial {
    LastDenial {
        at: MeshTime(now.0.saturating_sub(denial.ago_secs)),
        outbound: denial.outbound,
        reason: denial.reason.as_str().into(),
    }
}

fn unenforced(report: &Enforced) -> Vec<Unenforced> {
    let unenforced = report.iter().filter_map(|(component, enforcement)| match enforcement {
        Enforcement::Unenforced(reason) => Some(Unenforced {
            component: component.clone(),
            reason: reason.clone(),
        }),
        Enforcement::Isolated(_) | Enforcement::Bound(_) | Enforcement::Shared => None,
    });
    unenforced.collect()
}

fn instances(report: &Enforced, denials: &Told) -> Vec<InstanceReport> {
    let one = |(component, enforcement): (&ComponentName, &Enforcement)| {
        let (state, by) = match enforcement {
            Enforcement::Isolated(by) => ("isolated", by.as_str()),
            Enforcement::Bound(by) => ("bound", by.as_str()),
            Enforcement::Shared => ("shared", ""),
            // Why is said beside.
            Enforcement::Unenforced(_) => ("unenforced", ""),
        };
        InstanceReport {
            component: component.clone(),
            state: state.into(),
            by: by.get(..by.floor_char_boundary(MAX_DETAIL)).unwrap_or_default().into(),
            last_denial: denials.get(component).map(|(_, denial)| denial.clone()),
        }
    };
    report.iter().take(MAX_INSTANCES).map(one).collect()
}

#[cfg(test)]
mod tests {
    use cloison_proto::control::frame::{MAX_FRAME, Message as _};
    use cloison_proto::verdict::DropReason;

    use super::*;

    #[test]
    fn a_report_of_as_many_instances_as_it_tells_of_fits_a_frame() -> Result<(), Box<dyn std::error::Error>> {
        let mut report = Enforced::new();
        for n in 0..2 * MAX_INSTANCES {
            report.insert(
                format!("{}{n}", "c".repeat(50)).parse()?,
                Enforcement::Bound("\u{e9}".repeat(MAX_DETAIL)),
            );
        }
        let denial = LastDenial {
            at: MeshTime(u64::MAX),
            outbound: true,
            reason: DropReason::HandshakeTimeout.as_str().into(),
        };
        let denials = report
            .keys()
            .map(|component| (component.clone(), (Timestamp(0), denial.clone())))
            .collect();
        let frame = Report {
            unenforced: unenforced(&report),
            ignored_items: u64::MAX,
            instances: Some(instances(&report, &denials)),
        }
        .to_frame();
        assert!(frame.body.len() < MAX_FRAME, "{} bytes", frame.body.len());
        Ok(())
    }
}
