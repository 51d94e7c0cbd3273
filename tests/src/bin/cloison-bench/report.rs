//! The figures, as one object and as one table.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use crate::bulk::Bulk;
use crate::cuts::Cuts;
use crate::joins::Joins;
use crate::machine::{Machine, Memory};

const NOT_MEASURED: &str = "not measured";

/// Everything that was measured.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) revocation: Cuts,
    pub(crate) joins: Joins,
    /// `None` if no round was asked for.
    pub(crate) throughput: Option<Bulk>,
    pub(crate) memory: Memory,
    /// Bytes of each release program; `None` if there are none.
    pub(crate) sizes: Option<BTreeMap<String, u64>>,
    /// Seconds that all of this took.
    pub(crate) took_s: f64,
}

/// Times of one kind, in milliseconds.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Times {
    pub(crate) runs: usize,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) max_ms: f64,
    /// All of them, the shortest first.
    pub(crate) all_ms: Vec<f64>,
}

impl Times {
    /// Sums up these times.
    pub(crate) fn of(mut all: Vec<f64>) -> Self {
        all.sort_by(f64::total_cmp);
        Self {
            runs: all.len(),
            p50_ms: at_share(&all, 50),
            p99_ms: at_share(&all, 99),
            max_ms: at_share(&all, 100),
            all_ms: all,
        }
    }

    fn p50_only(&self) -> String {
        if self.runs == 0 {
            return NOT_MEASURED.to_owned();
        }
        format!("p50 {:.1} ms, max {:.1} ms ({} runs)", self.p50_ms, self.max_ms, self.runs)
    }

    pub(crate) fn p50_and_p99(&self) -> String {
        if self.runs == 0 {
            return NOT_MEASURED.to_owned();
        }
        format!(
            "p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms ({} runs)",
            self.p50_ms, self.p99_ms, self.max_ms, self.runs
        )
    }
}

/// The middle one; of an even number, the lower of the two in the middle.
pub(crate) fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    at_share(&all, 50)
}

/// The smallest value that at least this share of the sorted values does not exceed (nearest rank); 0 without values.
fn at_share(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

impl Report {
    /// One line a figure.
    pub(crate) fn table(&self) -> String {
        let rows = self.rows();
        let width = rows.iter().map(|(what, _)| what.chars().count()).max().unwrap_or(0);
        rows.iter().fold(String::new(), |mut text, (what, figure)| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{what:width$}  {figure}");
            text
        })
    }

    fn rows(&self) -> Vec<(String, String)> {
        let machine = &self.machine;
        let row = |what: &str, figure: String| (what.to_owned(), figure);
        let mut rows = vec![
            row("programs", format!("{} build, {}", machine.profile, machine.programs)),
            row(
                "machine",
                format!(
                    "{} x {}, Linux {}, load {:.2} before",
                    machine.cpus, machine.cpu, machine.kernel, machine.load
                ),
            ),
            row("rule removed, answer to last byte: TCP", self.revocation.tcp.p50_and_p99()),
            row("rule removed, answer to last byte: UDP", self.revocation.udp.p50_and_p99()),
            row("rule removed, answer to last byte: both", self.revocation.both.p50_and_p99()),
            row("join: token to enrolled", self.joins.enrolled.p50_only()),
            row("join: enrolled to first view in force", self.joins.first_view.p50_only()),
        ];
        if let Some(bulk) = &self.throughput {
            let compared = |ours: f64, theirs: f64, ratio: f64, unit: &str| {
                format!(
                    "{ours:.2} {unit}, wireguard-go {theirs:.2}, ratio {ratio:.2} ({} rounds)",
                    bulk.rounds.len()
                )
            };
            rows.push(row(
                "one TCP stream: throughput",
                compared(
                    bulk.mesh_mbit_s / 1e3,
                    bulk.wireguard_go_mbit_s / 1e3,
                    bulk.throughput_ratio,
                    "Gbit/s",
                ),
            ));
            rows.push(row(
                "one TCP stream: CPU of both ends",
                compared(bulk.mesh_cpu_s_per_gb, bulk.wireguard_go_cpu_s_per_gb, bulk.cpu_ratio, "s/GB"),
            ));
        }
        rows.push(row("memory of an idle agent", mebibytes(self.memory.agent_kib * 1024)));
        rows.push(row("memory of an idle coordinator", mebibytes(self.memory.coordinator_kib * 1024)));
        match &self.sizes {
            Some(sizes) => rows.extend(sizes.iter().map(|(name, size)| (format!("size of {name}"), mebibytes(*size)))),
            None => rows.push(row("sizes", "no release programs here: `cargo build --release` first".to_owned())),
        }
        rows.push(row("all of this took", format!("{:.0} s", self.took_s)));
        rows
    }
}

fn mebibytes(bytes: u64) -> String {
    let tenths = bytes.saturating_mul(10) / (1024 * 1024);
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_the_smallest_value_that_covers_it() {
        let hundred = Times::of((1..=100).rev().map(f64::from).collect());
        assert_eq!((hundred.p50_ms, hundred.p99_ms, hundred.max_ms), (50.0, 99.0, 100.0));
        let three = Times::of(vec![3.0, -1.0, 2.0]);
        assert_eq!((three.p50_ms, three.p99_ms, three.runs), (2.0, 3.0, 3));
        assert_eq!(Times::of(Vec::new()).p99_ms, 0.0);
        assert_eq!(mebibytes(1024 * 1024 * 3 / 2), "1.5 MiB");
    }
}
