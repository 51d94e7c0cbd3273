//! Whole meshes in memory: whatever happens to hosts, links, network and rules, and in whatever order, nothing that is forbidden is let go or
//! delivered, nothing goes back, and in the end everything that is allowed works.

#![forbid(unsafe_code)]

use anyhow::Result;
use cloison_tests::sim::scenario::{DrawnRule, Run, Step, Talk, What};
use cloison_tests::sim::world::Confusion;
use proptest::prelude::*;

fn cases(default: u32) -> u32 {
    std::env::var("CLOISON_SIM_CASES")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

fn run(seed: u64, hosts: usize, steps: &[Step]) -> Result<()> {
    let mut run = Run::new(seed, hosts)?;
    for step in steps {
        run.step(step)?;
    }
    run.finish()
}

fn any_rule() -> impl Strategy<Value = DrawnRule> {
    let expires = prop_oneof![4 => Just(None), 1 => (10u16..400).prop_map(Some)];
    (1u8..64, 0usize..6, 0usize..6, expires).prop_map(|(from, to, opening, expires)| DrawnRule {
        from,
        to,
        opening,
        expires,
    })
}

fn any_talk() -> impl Strategy<Value = Talk> {
    let what = prop_oneof![
        4 => (0u8..3).prop_map(What::Stream),
        1 => (0u8..3).prop_map(What::MidStream),
        1 => (0u8..3).prop_map(What::SynAck),
        3 => (0u8..3).prop_map(What::Datagram),
        1 => (0u8..3).prop_map(What::Answer),
        2 => Just(What::Echo),
        1 => Just(What::EchoReply),
    ];
    (0usize..41, 0usize..41, what, any::<bool>(), any::<bool>()).prop_map(|(from, to, what, v6, lawful)| Talk {
        from,
        to,
        what,
        v6,
        lawful,
    })
}

fn any_confusion() -> impl Strategy<Value = Confusion> {
    prop::sample::select(vec![
        Confusion::Reversed,
        Confusion::Doubled,
        Confusion::Thinned,
        Confusion::Damaged,
        Confusion::Foreign,
    ])
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => prop::collection::vec(any_rule(), 0..5).prop_map(Step::Apply),
        14 => any_talk().prop_map(Step::Begin),
        8 => (1u16..100).prop_map(Step::Pass),
        1 => (600u16..3_500).prop_map(Step::Pass),
        2 => (0u8..40, 0u8..30, 1u16..400).prop_map(|(loss, doubled, longest)| Step::Weather(loss, doubled, longest)),
        1 => (0usize..6, 0usize..6).prop_map(|(from, to)| Step::Block(from, to)),
        2 => (0usize..6).prop_map(Step::CutOff),
        1 => (0usize..6).prop_map(Step::Starve),
        1 => Just(Step::Heal),
        1 => (0usize..6).prop_map(Step::Restart),
        1 => Just(Step::RestartCoordinator),
        1 => Just(Step::Join),
        1 => (0usize..6).prop_map(Step::Revoke),
        1 => (0usize..6).prop_map(Step::Roam),
        2 => (0usize..6, prop_oneof![Just(0), 0usize..200]).prop_map(|(host, from)| Step::Replay(host, from)),
        1 => (0usize..6, 0usize..6, any_confusion(), 0usize..200).prop_map(|(host, of, how, from)| Step::Confuse(host, of, how, from)),
        4 => (0usize..6, any_talk()).prop_map(|(host, talk)| Step::Lie(host, talk)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(120), max_shrink_iters: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_nothing_forbidden_passes_and_in_the_end_what_is_allowed_works(
        seed in any::<u64>(),
        hosts in 2usize..5,
        steps in prop::collection::vec(any_step(), 1..30),
    ) {
        run(seed, hosts, &steps).map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
    }
}

/// Everybody may reach everybody, on what `opening` says.
fn all(opening: usize) -> Vec<DrawnRule> {
    (0..6)
        .map(|to| DrawnRule {
            from: 63,
            to,
            opening,
            expires: None,
        })
        .collect()
}

fn talk(from: usize, to: usize, what: What) -> Step {
    Step::Begin(Talk {
        from,
        to,
        what,
        v6: false,
        lawful: false,
    })
}

#[test]
fn one_seed_gives_one_run() -> Result<()> {
    let once = || {
        let mut run = Run::new(7, 3)?;
        run.step(&Step::Weather(20, 10, 300))?;
        run.step(&Step::Apply(all(3)))?;
        for n in 0..10 {
            run.step(&Step::Pass(20))?;
            run.step(&talk(n, n + 3, What::Stream(0)))?;
        }
        run.step(&Step::Roam(1))?;
        run.step(&Step::Pass(300))?;
        let numbers = run.world.alive();
        let stats = numbers
            .into_iter()
            .map(|number| Ok(run.world.member(number)?.host.engine().stats()));
        stats.collect::<Result<Vec<_>>>()
    };
    let (one, two) = (once()?, once()?);
    anyhow::ensure!(one == two, "{one:?}\n{two:?}");
    anyhow::ensure!(one.iter().any(|stats| stats.inbound.delivered > 10), "nothing happened: {one:?}");
    Ok(())
}

#[test]
fn a_quiet_mesh_does_all_that_is_allowed() -> Result<()> {
    for opening in 0..4 {
        run(u64::try_from(opening)?, 4, &[Step::Apply(all(opening)), Step::Pass(20)])?;
    }
    Ok(())
}

#[test]
fn a_host_that_is_cut_off_falls_silent_at_the_end_of_its_lease_and_comes_back() -> Result<()> {
    let steps = [
        Step::Apply(all(3)),
        Step::Pass(20),
        talk(0, 3, What::Stream(0)),
        Step::Pass(30),
        Step::CutOff(0),
        Step::Pass(2_800),
        talk(0, 3, What::Stream(0)),
        Step::Pass(200),
        talk(0, 3, What::Stream(0)),
        talk(3, 0, What::Stream(0)),
        Step::Pass(50),
        Step::Restart(0),
        talk(0, 3, What::Stream(0)),
        Step::Pass(20),
    ];
    run(3, 3, &steps)
}

#[test]
fn a_revoked_host_is_heard_by_nobody_who_knows() -> Result<()> {
    let steps = [
        Step::Apply(all(3)),
        Step::Pass(20),
        talk(0, 3, What::Stream(0)),
        talk(3, 0, What::Stream(0)),
        Step::Pass(20),
        Step::Revoke(0),
        Step::Pass(3),
        Step::Lie(
            0,
            Talk {
                from: 0,
                to: 3,
                what: What::Stream(0),
                v6: false,
                lawful: false,
            },
        ),
        Step::Pass(50),
        Step::Join,
        Step::Pass(50),
    ];
    run(4, 3, &steps)
}

#[test]
fn streams_go_on_through_rules_that_come_and_go_beside_them() -> Result<()> {
    let mut steps = vec![Step::Apply(all(3)), Step::Pass(20)];
    steps.extend((0..6).map(|n| talk(n, n + 3, What::Stream(0))));
    steps.push(Step::Pass(20));
    for n in 0..20 {
        let mut rules = all(3);
        rules.extend(all(n % 3).into_iter().take(n % 7));
        steps.extend([
            Step::Apply(rules),
            Step::Pass(7),
            Step::RestartCoordinator,
            Step::Restart(n),
            Step::Pass(15),
        ]);
    }
    run(5, 4, &steps)
}

#[test]
fn a_change_reaches_every_linked_host_within_half_a_second() -> Result<()> {
    let mut run = Run::new(6, 4)?;
    run.step(&Step::Pass(50))?;
    for opening in 0..4 {
        run.step(&Step::Apply(all(opening)))?;
        anyhow::ensure!(run.world.has_converged().is_err(), "before anything was sent");
        run.step(&Step::Pass(5))?;
        run.world.has_converged()?;
    }
    run.step(&Step::Revoke(1))?;
    run.step(&Step::Pass(5))?;
    run.world.has_converged()
}

#[test]
fn an_old_view_that_is_sent_again_is_not_taken() -> Result<()> {
    let mut steps = vec![Step::Apply(all(3)), Step::Pass(20), Step::Apply(Vec::new()), Step::Pass(20)];
    for host in 0..3 {
        // From the first snapshot on, and from each frame behind it.
        steps.extend((0..12).flat_map(|from| [Step::Replay(host, from), Step::Pass(15)]));
        steps.extend([Step::Restart(host), Step::Pass(30), Step::Replay(host, 0), Step::Pass(15)]);
        steps.push(talk(host, host + 3, What::Stream(0)));
    }
    run(8, 3, &steps)
}
