//! The table against a naive model with the same limits, its memory, and its quotas.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use cloison_proto::version::MeshTime;
use proptest::prelude::*;

use super::*;
use crate::flow::{FlowKind, Grant, Opener};
use crate::packet::build::address;
use crate::packet::{Direction, Transport};

const DATAGRAM: Transport = Transport::Udp { src_port: 0, dst_port: 0 };

fn key(n: u16) -> FlowKey {
    FlowKey {
        local: address(n.is_multiple_of(2), 1),
        remote: address(n.is_multiple_of(2), 2),
        kind: FlowKind::Udp,
        local_port: n,
        remote_port: 53,
    }
}

fn pair(local: u32, remote: u32) -> InstancePair {
    InstancePair { local, remote }
}

fn entry(n: u16, opener: Opener, pair: InstancePair, stamp: u64, now: Timestamp) -> Entry {
    let grant = Grant {
        rule: 0,
        pair,
        stamp,
        valid_until: MeshTime::NEVER,
    };
    Entry::new(key(n), opener, grant, now)
}

fn limits(total: u32, per_instance: u32, per_pair: u32) -> FlowLimits {
    FlowLimits {
        total,
        per_instance,
        per_pair,
    }
}

/// What may happen to a table; numbers of flows, instances and stamps are small so that they meet.
#[derive(Debug, Clone)]
enum Step {
    Insert {
        flow: u16,
        here: bool,
        pair: InstancePair,
        stamp: u64,
    },
    Regrant {
        flow: u16,
        pair: InstancePair,
        stamp: u64,
    },
    Note {
        flow: u16,
        outbound: bool,
    },
    Remove {
        flow: u16,
    },
    Wait {
        seconds: u64,
    },
    Sweep {
        stamp: u64,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let flow = 0u16..60;
    let pairs = (0u32..3, 0u32..5).prop_map(|(local, remote)| pair(local, remote));
    let step = prop_oneof![
        8 => (flow.clone(), any::<bool>(), pairs.clone(), 0u64..3).prop_map(|(flow, here, pair, stamp)| Step::Insert { flow, here, pair, stamp }),
        2 => (flow.clone(), pairs, 0u64..3).prop_map(|(flow, pair, stamp)| Step::Regrant { flow, pair, stamp }),
        3 => (flow.clone(), any::<bool>()).prop_map(|(flow, outbound)| Step::Note { flow, outbound }),
        2 => flow.prop_map(|flow| Step::Remove { flow }),
        1 => (1u64..40).prop_map(|seconds| Step::Wait { seconds }),
        1 => (0u64..3).prop_map(|stamp| Step::Sweep { stamp }),
    ];
    prop::collection::vec(step, 0..200)
}

/// The table as one would write it without caring for time or space.
struct Model {
    limits: FlowLimits,
    flows: BTreeMap<FlowKey, Entry>,
    now: Timestamp,
}

impl Model {
    fn count(&self, of: impl Fn(InstancePair) -> bool) -> u32 {
        u32::try_from(self.flows.values().filter(|entry| of(entry.pair())).count()).unwrap_or(u32::MAX)
    }

    fn insert(&mut self, entry: Entry) -> Result<Inserted, DropReason> {
        if let Some(old) = self.flows.get_mut(&entry.key()) {
            if old.grant().stamp > entry.grant().stamp {
                return Ok(Inserted::Outdated);
            }
            if old.opener() == entry.opener() {
                old.regrant(entry.grant())
            } else {
                *old = entry
            }
            return Ok(Inserted::Renewed);
        }
        let new = entry.pair();
        let pairs: BTreeSet<_> = self.flows.values().map(Entry::pair).collect();
        let full = self.count(|_| true) >= self.limits.total
            || self.count(|pair| pair.local == new.local) >= self.limits.per_instance
            || self.count(|pair| pair == new) >= self.limits.per_pair
            || (!pairs.contains(&new) && pairs.len() >= usize::try_from(self.limits.total / 8 * 7).unwrap_or(0));
        if full {
            return Err(DropReason::FlowQuota);
        }
        self.flows.insert(entry.key(), entry);
        Ok(Inserted::New)
    }

    /// Takes the step on both, and compares what they answer.
    fn take(&mut self, table: &FlowTable, step: &Step) -> Result<(), TestCaseError> {
        match *step {
            Step::Insert { flow, here, pair, stamp } => {
                let opener = if here { Opener::Here } else { Opener::There };
                let entry = entry(flow, opener, pair, stamp, self.now);
                prop_assert_eq!(table.insert(entry), self.insert(entry));
            }
            Step::Regrant { flow, pair, stamp } => {
                let grant = Grant {
                    rule: 9,
                    pair,
                    stamp,
                    valid_until: MeshTime::NEVER,
                };
                let old = self.flows.get_mut(&key(flow)).map(|entry| entry.regrant(grant));
                prop_assert_eq!(table.with(&key(flow), |entry| entry.regrant(grant)), old);
            }
            Step::Note { flow, outbound } => {
                let direction = if outbound { Direction::Outbound } else { Direction::Inbound };
                let old = self
                    .flows
                    .get_mut(&key(flow))
                    .map(|entry| entry.note(direction, &DATAGRAM, self.now));
                prop_assert_eq!(table.with(&key(flow), |entry| entry.note(direction, &DATAGRAM, self.now)), old);
            }
            Step::Remove { flow } => prop_assert_eq!(table.remove(&key(flow)), self.flows.remove(&key(flow))),
            Step::Wait { seconds } => self.now = self.now + Duration::from_secs(seconds),
            Step::Sweep { stamp } => self.sweep(table, stamp)?,
        }
        Ok(())
    }

    /// Sweeps both; the judge drops flows with even ports and renews the others for another pair.
    fn sweep(&mut self, table: &FlowTable, stamp: u64) -> Result<(), TestCaseError> {
        let moment = Moment {
            now: self.now,
            mesh: MeshTime(0),
            stamp,
        };
        let judge = |entry: &mut Entry| {
            let of = entry.pair();
            entry.regrant(Grant {
                rule: 1,
                pair: pair(of.local, of.remote + 1),
                stamp,
                valid_until: MeshTime::NEVER,
            });
            if entry.key().local_port.is_multiple_of(2) {
                Kept::Drop
            } else {
                Kept::Keep
            }
        };
        let mut swept = Swept {
            seen: self.flows.len(),
            ..Swept::default()
        };
        self.flows.retain(|_, entry| {
            if entry.is_idle(self.now) {
                swept.idle += 1;
                return false;
            }
            let kept = entry.is_current(&moment) || judge(entry) == Kept::Keep;
            swept.dropped += usize::from(!kept);
            kept
        });
        prop_assert_eq!(table.sweep_all(&moment, judge), swept);
        Ok(())
    }

    fn compare(&self, table: &FlowTable) -> Result<(), TestCaseError> {
        prop_assert_eq!(table.len(), self.count(|_| true));
        for flow in 0..60 {
            prop_assert_eq!(table.get(&key(flow)), self.flows.get(&key(flow)).copied());
        }
        for of in (0..3).flat_map(|local| (0..8).map(move |remote| pair(local, remote))) {
            let expected = (self.count(|pair| pair == of), self.count(|pair| pair.local == of.local));
            prop_assert_eq!(table.counts(of), expected, "{:?}", of);
        }
        let mut shown = BTreeMap::new();
        table.for_each(self.now, |entry| {
            shown.insert(entry.key(), *entry);
        });
        prop_assert!(shown.iter().eq(self.flows.iter().filter(|(_, entry)| !entry.is_idle(self.now))));
        Ok(())
    }
}

proptest! {
    #[test]
    fn the_table_does_what_a_naive_one_would(
        steps in steps(),
        limits in (8u32..50, 1u32..30, 1u32..12).prop_map(|(total, instance, pair)| limits(total, instance, pair)),
        seed: u64,
    ) {
        let table = FlowTable::new(limits, seed);
        let mut model = Model { limits, flows: BTreeMap::new(), now: Timestamp(0) };
        for step in &steps {
            model.take(&table, step)?;
            model.compare(&table)?;
        }
    }
}

/// A flow number `n` of 2^32, between the same two addresses.
fn numbered(n: u32) -> FlowKey {
    let [a, b, c, d] = n.to_be_bytes();
    FlowKey {
        local_port: u16::from_be_bytes([a, b]),
        remote_port: u16::from_be_bytes([c, d]),
        ..key(0)
    }
}

#[test]
fn the_default_number_of_flows_fits_8_mib_even_if_each_is_of_another_pair_and_they_come_and_go() -> Result<(), DropReason> {
    let total = FlowLimits::DEFAULT_TOTAL;
    let table = FlowTable::new(limits(total, total, total), 1);
    let pairs = total / 8 * 7;
    let insert = |n: u32| {
        let grant = Grant {
            rule: 0,
            pair: pair(0, n % pairs),
            stamp: 0,
            valid_until: MeshTime::NEVER,
        };
        table.insert(Entry::new(numbered(n), Opener::Here, grant, Timestamp(0)))
    };
    for n in 0..total {
        insert(n)?;
    }
    assert_eq!(table.len(), total);
    assert_eq!(insert(total), Err(DropReason::FlowQuota));
    for n in 0..3 * total {
        assert!(table.remove(&numbered(n)).is_some(), "{n}");
        insert(n + total)?;
    }
    assert_eq!(table.len(), total);
    let bytes = table.allocated_bytes();
    assert!(bytes <= 8 << 20, "{bytes} bytes");
    Ok(())
}

#[test]
fn one_pair_cannot_take_anothers_room_nor_its_entries() -> Result<(), DropReason> {
    let limits = FlowLimits::divided(FlowLimits::DEFAULT_TOTAL, 4);
    assert_eq!(
        limits,
        FlowLimits {
            total: 65_536,
            per_instance: 16_384,
            per_pair: 4_096
        }
    );
    let table = FlowTable::new(limits, 9);
    let (quiet, greedy) = (pair(0, 1), pair(0, 2));
    let insert = |n: u32, pair| {
        let grant = Grant {
            rule: 0,
            pair,
            stamp: 0,
            valid_until: MeshTime::NEVER,
        };
        table.insert(Entry::new(numbered(n), Opener::There, grant, Timestamp(0)))
    };
    for n in 0..100 {
        insert(n, quiet)?;
    }
    let admitted = (100..20_000).filter(|n| insert(*n, greedy).is_ok()).count();
    assert_eq!(admitted, 4_096);
    assert!((0..100).all(|n| table.get(&numbered(n)).is_some()), "nothing was evicted");
    assert_eq!(insert(30_000, quiet), Ok(Inserted::New));
    assert_eq!(insert(100, greedy), Ok(Inserted::Renewed), "a flow that exists is not refused");
    table.remove(&numbered(100));
    assert_eq!(insert(30_001, greedy), Ok(Inserted::New), "room comes back");
    Ok(())
}

#[test]
fn all_remote_instances_together_cannot_take_another_local_instances_room() {
    let table = FlowTable::new(limits(1_000, 400, 300), 9);
    let insert = |n: u32, pair| {
        let grant = Grant {
            rule: 0,
            pair,
            stamp: 0,
            valid_until: MeshTime::NEVER,
        };
        table.insert(Entry::new(numbered(n), Opener::There, grant, Timestamp(0))).is_ok()
    };
    assert_eq!((0..1_000).filter(|n| insert(*n, pair(0, n % 10))).count(), 400);
    assert_eq!((1_000..1_300).filter(|n| insert(*n, pair(1, 0))).count(), 300);
    table.set_limits(limits(1_000, 500, 300));
    assert_eq!((2_000..3_000).filter(|n| insert(*n, pair(0, n % 10))).count(), 100);
}

#[test]
fn small_hosts_and_many_instances_get_at_least_the_minimum() {
    assert_eq!(
        FlowLimits::default(),
        FlowLimits {
            total: 65_536,
            per_instance: 65_536,
            per_pair: 16_384
        }
    );
    assert_eq!(
        FlowLimits::divided(65_536, 10_000),
        FlowLimits {
            total: 65_536,
            per_instance: 4_096,
            per_pair: 1_024
        }
    );
    assert_eq!(
        FlowLimits::divided(500, 0),
        FlowLimits {
            total: 500,
            per_instance: 500,
            per_pair: 500
        }
    );
}

#[test]
fn sixteen_steps_of_the_sweep_go_once_round() -> Result<(), DropReason> {
    let table = FlowTable::new(limits(1_000, 1_000, 1_000), 3);
    for n in 0..500 {
        table.insert(entry(n, Opener::Here, pair(0, 0), 0, Timestamp(0)))?;
    }
    let late = Moment {
        now: Timestamp(0) + Duration::from_secs(31),
        mesh: MeshTime(0),
        stamp: 0,
    };
    let idle: usize = (0..SHARDS).map(|_| table.sweep_step(&late, |_| Kept::Keep).idle).sum();
    assert_eq!(idle, 500);
    assert!(table.is_empty());
    assert_eq!(table.counts(pair(0, 0)), (0, 0));
    Ok(())
}

#[test]
fn a_sweep_shows_its_judge_only_what_is_not_current() -> Result<(), DropReason> {
    let table = FlowTable::new(limits(100, 100, 100), 3);
    table.insert(entry(1, Opener::Here, pair(0, 0), 1, Timestamp(0)))?;
    table.insert(entry(2, Opener::Here, pair(0, 0), 2, Timestamp(0)))?;
    let moment = Moment {
        now: Timestamp(0),
        mesh: MeshTime(0),
        stamp: 2,
    };
    let mut judged = Vec::new();
    let swept = table.sweep_all(&moment, |entry| {
        judged.push(entry.key());
        Kept::Drop
    });
    assert_eq!(
        (judged, swept),
        (
            vec![key(1)],
            Swept {
                seen: 2,
                idle: 0,
                dropped: 1
            }
        )
    );
    Ok(())
}

#[test]
fn workers_that_meet_leave_the_counts_right() {
    let table = FlowTable::new(limits(400, 300, 150), 5);
    std::thread::scope(|scope| {
        for worker in 0..4u32 {
            let table = &table;
            scope.spawn(move || {
                for round in 0..20_000u32 {
                    let n = u16::try_from((round * 7 + worker * 13) % 500).unwrap_or(0);
                    match (round + worker) % 4 {
                        0 | 1 => drop(table.insert(entry(n, Opener::Here, pair(u32::from(n) % 2, worker), 0, Timestamp(0)))),
                        2 => drop(table.remove(&key(n))),
                        _ => drop(table.with(&key(n), |entry| entry.note(Direction::Outbound, &DATAGRAM, Timestamp(0)))),
                    }
                }
            });
        }
    });
    let mut counts: BTreeMap<InstancePair, u32> = BTreeMap::new();
    table.for_each(Timestamp(0), |entry| *counts.entry(entry.pair()).or_default() += 1);
    assert_eq!(counts.values().sum::<u32>(), table.len());
    for (of, count) in counts {
        assert_eq!(table.counts(of).0, count);
        assert!(count <= 150);
    }
}
