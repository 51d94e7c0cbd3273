//! What the agent says: log lines, and denials summed up so that neither a port scan nor a broken application fills the disk.

use std::collections::VecDeque;
use std::io::IsTerminal as _;
use std::time::Duration;

use cloison_agent_core::packet::Direction;
use cloison_agent_core::stats::Snapshot;
use cloison_proto::status::Denial;
use cloison_proto::verdict::DropReason;
use cloison_proto::version::Timestamp;
use tracing_subscriber::EnvFilter;

use crate::config::{Config, ConfigError, LogFormat};

/// How often drops are summed up: at most one line for each reason and direction in this time.
pub const EVERY: Duration = Duration::from_secs(10);

/// How many sums are kept for `denials`.
const KEPT: usize = 256;

/// Starts logging to standard error.
///
/// # Errors
/// [`ConfigError::Value`] for a filter that cannot be read.
pub fn start(config: &Config) -> Result<(), ConfigError> {
    let wanted = std::env::var("RUST_LOG").unwrap_or_else(|_| config.log.clone());
    // A refused datagram is one more attempt that fails, and that is said once.
    let filter = EnvFilter::try_new(format!("quinn_udp=error,{wanted}")).map_err(|e| ConfigError::Value {
        key: "log",
        message: e.to_string(),
    })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    // A second start in one process keeps the first subscriber: that is what tests want.
    let _ = match config.log_format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    Ok(())
}

/// Sums of denials over short times.
#[derive(Debug, Default)]
pub struct Denials {
    last: Snapshot,
    kept: VecDeque<(Timestamp, Direction, DropReason, u64)>,
}

impl Denials {
    /// Takes the counters as they are now: what was dropped since the last time is logged, a line for each reason, and kept.
    pub fn sample(&mut self, counters: Snapshot, now: Timestamp) {
        for direction in [Direction::Outbound, Direction::Inbound] {
            let (before, after) = (*self.last.of(direction), *counters.of(direction));
            for (reason, count) in after.drops() {
                let packets = count.saturating_sub(before.dropped(reason));
                if packets > 0 {
                    self.note(now, direction, reason, packets);
                }
            }
        }
        self.last = counters;
    }

    fn note(&mut self, now: Timestamp, direction: Direction, reason: DropReason, packets: u64) {
        let direction_text = if direction == Direction::Outbound { "outbound" } else { "inbound" };
        tracing::info!(direction = direction_text, reason = reason.as_str(), packets, "dropped");
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back((now, direction, reason, packets));
    }

    /// The last sums, the newest last.
    #[must_use]
    pub fn recent(&self, now: Timestamp) -> Vec<Denial> {
        let denial = |&(at, direction, reason, packets): &(Timestamp, Direction, DropReason, u64)| Denial {
            ago_secs: now.since(at).as_secs(),
            outbound: direction == Direction::Outbound,
            reason,
            packets,
        };
        self.kept.iter().map(denial).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cloison_agent_core::stats::Stats;

    #[test]
    fn drops_are_summed_and_bounded() {
        let stats = Stats::default();
        let mut denials = Denials::default();
        for round in 0..1_000u64 {
            stats.dropped(Direction::Inbound, DropReason::NoRule, 3);
            denials.sample(stats.snapshot(), Timestamp(round * 1_000_000_000));
        }
        denials.sample(stats.snapshot(), Timestamp(1_000_000_000_000));
        let recent = denials.recent(Timestamp(1_000_000_000_000));
        assert_eq!(recent.len(), KEPT);
        assert!(
            recent
                .iter()
                .all(|d| d.packets == 3 && d.reason == DropReason::NoRule && !d.outbound)
        );
        assert_eq!(recent.last().map(|d| d.ago_secs), Some(1));
    }
}
