//! Moments in which the agent, or its base table, is not there: whoever tries all the time gets nothing through.

use std::time::{Duration, Instant};

use anyhow::Result;
use cloison_tests::lab::person::Person;
use cloison_tests::lab::sockets::{By, Order, Shape};

use crate::stage::{BOTH, ECHO, Expected, Matrix, PATIENCE, STRANGER, Stage, bound, takes_the_tun, user, way};

const RESTARTS: u64 = 10;
const FLUSHES: u64 = 8;
/// Streams that one stranger tries side by side.
const STREAMS: u64 = 12;

/// Strangers who try all the time to speak as n8n and as worker. Their questions have numbers from a thousand million on.
fn strangers(stage: &Stage) -> Result<Vec<(String, u64, Person)>> {
    let mut strangers = Vec::new();
    for (name, component) in [("n8n", stage.at.n8n), ("worker", stage.at.worker)] {
        for (to, from) in stage.at.postgres.sockets(ECHO).into_iter().zip(component.addresses()) {
            for by in BOTH {
                let mut person = stage.person(&user(STRANGER))?;
                let first = 1_000_000_000 * (u64::try_from(strangers.len())? + 1);
                let shape = Shape {
                    freebind: true,
                    ..bound(from)
                };
                // Who tries a stream waits for an answer before the next attempt: many do so side by side.
                for thread in 0..if by == By::Tcp { STREAMS } else { 1 } {
                    person.order(&Order::Keep(by, to, shape.clone(), first + thread * 1_000_000))?;
                }
                strangers.push((format!("{name}: {}", way(by, from)), first, person));
            }
        }
    }
    Ok(strangers)
}

fn conclude(stage: &mut Stage, title: &str, strangers: Vec<(String, u64, Person)>) -> Result<()> {
    let mut matrix = Matrix::default();
    let seen = stage.seen()?;
    for (what, first, mut person) in strangers {
        let attempts = person.order(&Order::Stop)?.attempts;
        let passed = seen.iter().filter(|token| (first..first + 1_000_000_000).contains(*token)).count();
        let observed = format!("{attempts} attempts, {passed} passed");
        matrix.state(
            "(a) another user",
            &format!("{what}, all the time"),
            Expected::Nothing,
            observed,
            passed == 0 && attempts > 0,
        );
    }
    matrix.conclude(title, &seen)
}

#[test]
fn nothing_passes_while_the_agent_restarts() -> Result<()> {
    let mut stage = Stage::new("e2e-evade-restart")?;
    let strangers = strangers(&stage)?;
    let app = stage.app()?;
    for round in 0..RESTARTS {
        let agent = stage.mesh.agent_mut("app-1")?;
        if round % 2 == 0 {
            agent.kill()?;
        } else {
            agent.stop()?;
        }
        if round >= RESTARTS / 2 {
            // What was sent meanwhile is judged by the table that the next agent loads first.
            app.nft("flush ruleset")?;
        }
        if round < 2 {
            // A TUN that stays while nobody holds it would be anybody's without its owner.
            takes_the_tun(&app)?.refused()?;
        }
        agent.start()?;
    }
    stage.must_talk(2_000_000)?;
    conclude(&mut stage, &format!("While the agent restarts {RESTARTS} times"), strangers)?;
    stage.mesh.finish()
}

#[test]
fn nothing_passes_while_somebody_flushes_the_ruleset() -> Result<()> {
    let mut stage = Stage::new("e2e-evade-flush")?;
    let strangers = strangers(&stage)?;
    let app = stage.app()?;
    for round in 0..FLUSHES {
        app.nft("flush ruleset")?;
        let start = Instant::now();
        while !app.run(&["nft", "list", "tables"])?.stdout.contains("cloison") {
            anyhow::ensure!(start.elapsed() < PATIENCE, "the base table did not come back");
            std::thread::sleep(Duration::from_millis(20));
        }
        stage.must_talk(2_000_000 + round * 1_000)?;
    }
    conclude(
        &mut stage,
        &format!("While somebody flushes the ruleset {FLUSHES} times"),
        strangers,
    )?;
    stage.mesh.finish()
}
