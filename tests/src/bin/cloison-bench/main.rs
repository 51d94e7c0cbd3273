//! `make bench`: the figures that the project states about itself, measured on the lab with the real programs.
//!
//! Lays out a coordinator and three hosts, and measures in this order: memory at rest; how long a removed rule's traffic goes on ([`cuts`]);
//! throughput and its cost beside `wireguard-go` ([`bulk`]); how long a join takes ([`joins`]); sizes. Progress goes to the standard error,
//! one table (or with `-o json` one object) to the standard output. It ends within four minutes, and leaves nothing behind. With `--restarts`
//! it measures the stall of open streams over restarts of an agent, and nothing else ([`restarts`]); that takes up to a quarter of an hour.
//! With `--components` it measures what it costs that components share a host ([`components`], [`attached`]), and nothing else.
//!
//! It insists on outcomes (a stream that is not cut is an error) but not on speed: what is fast enough is for the reader to say. The programs
//! are taken from `CLOISON_PROGRAMS`, the absolute path of a folder; without it, from beside this program. Figures of debug builds are worth nothing.

#![forbid(unsafe_code)]

mod attached;
mod bulk;
mod components;
mod cuts;
mod joins;
mod machine;
mod report;
mod restarts;
mod talk;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use cloison_tests::lab::mesh::{Instance, Mesh};
use cloison_tests::lab::{Underlay, cleanup};

use report::Report;

const NAME: &str = "bench";
/// The hosts that are there from the start: the one that receives, the one that sends, and one whose rule is never touched.
const RECEIVER: &str = "db-1";
const SENDER: &str = "app-1";
const BYSTANDER: &str = "app-2";
/// The coordinator counts as one of the 250 hosts of a lab.
const MAX_JOINS: u8 = 200;
/// After this long everything is removed, whatever is still being measured.
const LIMIT: Duration = Duration::from_secs(235);
const RESTARTS_LIMIT: Duration = Duration::from_secs(900);
/// How long the mesh is left alone before its memory is read.
const REST: Duration = Duration::from_secs(2);

/// Measures the mesh on this machine with the real programs. Needs root, and a machine that does nothing else.
#[derive(Debug, Clone, Copy, Parser)]
#[command(name = "cloison-bench", version)]
struct Arguments {
    /// How often a rule is removed under open streams
    #[arg(long, default_value_t = 100)]
    runs: usize,
    /// How many hosts join
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u8).range(0..=i64::from(MAX_JOINS)))]
    joins: u8,
    /// How many rounds of throughput, each of the mesh and of wireguard-go
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// How many seconds each stream of a round is measured
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Measures, instead of all that, how long open streams stand still over so many restarts of an agent (SIGTERM) and as many kills
    #[arg(long, value_name = "RUNS")]
    restarts: Option<usize>,
    /// Measures, instead of all that, the cost of components that are a part of their host, in `--rounds` of `--seconds`
    #[arg(long, conflicts_with = "restarts")]
    components: bool,
    /// How to print the figures
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Table,
    /// One object, times in milliseconds.
    Json,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let limit = if arguments.restarts.is_some() { RESTARTS_LIMIT } else { LIMIT };
    remove_everything_when_interrupted(limit);
    let span = Duration::from_secs(arguments.seconds);
    let outcome = match arguments.restarts {
        None if arguments.components => {
            components::measure(arguments.rounds, span).and_then(|report| show(arguments.output, &report, report.table()))
        }
        Some(runs) => restarts::measure(runs).and_then(|report| show(arguments.output, &report, report.table())),
        None => measure(arguments).and_then(|report| show(arguments.output, &report, report.table())),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the measurement failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn show(output: Output, report: &impl serde::Serialize, table: String) -> Result<()> {
    match output {
        Output::Table => print!("{table}"),
        Output::Json => println!("{}", serde_json::to_string_pretty(report)?),
    }
    Ok(())
}

fn measure(arguments: Arguments) -> Result<Report> {
    let start = Instant::now();
    let machine = machine::describe()?;
    eprintln!("{} programs of {}", machine.profile, machine.programs);
    if machine.is_busy() {
        eprintln!(
            "this machine is busy (load {:.1}): the figures will be worse than they should be",
            machine.load
        );
    }
    let newcomers: Vec<String> = (1..=arguments.joins).map(|number| format!("join-{number}")).collect();
    let mut mesh = lay_out(&newcomers)?;
    let rules = rules(&newcomers);
    mesh.coordinator.apply_and_wait(&rules.all)?;
    eprintln!("a mesh of three hosts is up after {:.1} s", start.elapsed().as_secs_f64());
    std::thread::sleep(REST);
    let memory = machine::memory(&mut mesh)?;
    let cuts = cuts::measure(&mesh, &rules, arguments.runs).context("measuring how long a removed rule's traffic goes on")?;
    let span = Duration::from_secs(arguments.seconds);
    let bulk = bulk::measure(&mut mesh, arguments.rounds, span).context("measuring throughput")?;
    let joins = joins::measure(&mesh, &newcomers).context("measuring joins")?;
    mesh.finish()?;
    Ok(Report {
        sizes: machine::sizes()?,
        machine,
        revocation: cuts,
        joins,
        throughput: bulk,
        memory,
        took_s: start.elapsed().as_secs_f64(),
    })
}

/// The policy with the rule that is measured, and without it.
struct Rules {
    all: String,
    without: String,
}

fn rules(newcomers: &[String]) -> Rules {
    let newcomer = if newcomers.is_empty() {
        String::new()
    } else {
        format!("  newcomer:  {{on: [{}], attach: host}}\n", newcomers.join(", "))
    };
    let rule = if newcomers.is_empty() {
        ""
    } else {
        "  - newcomer -> receiver:stream\n"
    };
    let (tcp, udp) = (talk::STREAM_PORT, talk::DATAGRAM_PORT);
    let without = format!(
        "version: 1\n\
         components:\n  \
           receiver:  {{on: {RECEIVER}, attach: host, services: {{stream: [tcp/{tcp}, udp/{udp}]}}}}\n  \
           sender:    {{on: {SENDER}, attach: host}}\n  \
           bystander: {{on: {BYSTANDER}, attach: host}}\n\
         {newcomer}\
         allow:\n  - bystander -> receiver:stream\n{rule}"
    );
    Rules {
        all: format!("{without}  - sender -> receiver:stream\n"),
        without,
    }
}

/// The coordinator and the first three hosts, running; the others wait to join. The wire carries IPv4, as `wireguard-go` beside it will use.
fn lay_out(newcomers: &[String]) -> Result<Mesh> {
    let first = [RECEIVER, SENDER, BYSTANDER];
    let hosts: Vec<&str> = first.into_iter().chain(newcomers.iter().map(String::as_str)).collect();
    let mut mesh = Mesh::builder(NAME, &hosts).lab(|lab| lab.underlay(Underlay::V4)).start()?;
    for host in first {
        let token = mesh.coordinator.token(host)?;
        mesh.agent(host)?.join(&token)?.ok()?;
        mesh.agent_mut(host)?.start()?;
    }
    mesh.wait_until_applied()?;
    Ok(mesh)
}

fn receiver(mesh: &Mesh) -> Result<Instance> {
    mesh.instance("receiver", RECEIVER)
}

/// Programs of the lab are in groups of their own, so this one must end them; also when the time is over.
fn remove_everything_when_interrupted(limit: Duration) {
    std::thread::spawn(move || -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let status = runtime.block_on(async {
            let mut end = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
            Ok::<i32, std::io::Error>(tokio::select! {
                outcome = tokio::signal::ctrl_c() => outcome.map(|()| 130)?,
                _ = end.recv() => 130,
                () = tokio::time::sleep(limit) => {
                    eprintln!("not done after {} s", limit.as_secs());
                    1
                }
            })
        })?;
        eprintln!("ended before its time: removing what was made");
        let outcome = cleanup::remove_lab(&cleanup::prefix_of(NAME));
        std::process::exit(if outcome.is_ok() { status } else { 1 });
    });
}
