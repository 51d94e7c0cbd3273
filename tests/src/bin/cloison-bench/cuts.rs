//! How long traffic goes on after its rule is gone: from the API's answer to the last byte that the receiving application gets.
//!
//! A TCP and a UDP stream of one message a millisecond are open while the rule is removed; then it is put back, and the next run begins, by
//! turns over IPv4 and IPv6 of the overlay. The start is when `cloison policy apply` wrote the answer, by the file time of its output, which
//! lags by up to one tick of the kernel; the end is when the application read its last byte. Both make the time longer than it was.
//! A negative time says that the cut was there before the answer.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Result, ensure};
use cloison_tests::lab::mesh::Mesh;
use cloison_tests::lab::wait_for;
use serde::Serialize;

use crate::report::Times;
use crate::talk::{DATAGRAM_PORT, Pace, STREAM_PORT, Stream};
use crate::{RECEIVER, Rules, SENDER, receiver};

/// When no further run begins.
const LIMIT: Duration = Duration::from_secs(110);
/// How long a stream may take to open after its rule is in force, and to end after the rule is gone.
const STEP_LIMIT: Duration = Duration::from_secs(10);
/// Bytes of either stream before the rule is removed.
const BEFORE: u64 = 64 * 64;
/// After all agents have the view, nothing may arrive for so long.
const SILENCE: Duration = Duration::from_millis(50);

/// Times from the API's answer to the last byte received.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Cuts {
    /// Of the TCP stream.
    pub(crate) tcp: Times,
    /// Of the UDP stream.
    pub(crate) udp: Times,
    /// Of the later of the two.
    pub(crate) both: Times,
}

/// Removes the rule `runs` times; fewer, if time runs out.
pub(crate) fn measure(mesh: &Mesh, rules: &Rules, runs: usize) -> Result<Cuts> {
    let (begin, addresses) = (Instant::now(), receiver(mesh)?.addresses());
    let (mut tcp, mut udp, mut both) = (Vec::new(), Vec::new(), Vec::new());
    for address in addresses.into_iter().cycle().take(runs) {
        if begin.elapsed() > LIMIT {
            eprintln!("\nonly {} of {runs} runs in {} s", tcp.len(), LIMIT.as_secs());
            break;
        }
        let (from, to) = (mesh.host(SENDER)?.net(), mesh.host(RECEIVER)?.net());
        let mut stream = Stream::tcp(from, to, (address, STREAM_PORT).into(), Pace::Constant)?;
        let mut datagrams = Stream::udp(from, to, (address, DATAGRAM_PORT).into())?;
        let answered = cut(mesh, rules, &mut stream, &mut datagrams)?;
        let (last_byte, last_datagram) = (stream.last()?, datagrams.last()?);
        tcp.push(since(answered, last_byte));
        udp.push(since(answered, last_datagram));
        both.push(since(answered, last_byte.max(last_datagram)));
        drop((stream, datagrams));
        mesh.coordinator.apply_and_wait(&rules.all)?;
        if tcp.len().is_multiple_of(10) || tcp.len() == runs {
            eprintln!("{} of {runs} rules removed, {:.0} s", tcp.len(), begin.elapsed().as_secs_f64());
        }
    }
    Ok(Cuts {
        tcp: Times::of(tcp),
        udp: Times::of(udp),
        both: Times::of(both),
    })
}

/// Removes the rule under both streams, insists that they end, and gives the time of the answer.
fn cut(mesh: &Mesh, rules: &Rules, stream: &mut Stream, datagrams: &mut Stream) -> Result<SystemTime> {
    wait_for("both streams to flow", STEP_LIMIT, || {
        Ok((stream.bytes() > BEFORE && datagrams.bytes() > BEFORE).then_some(()))
    })?;
    let answered = mesh.coordinator.apply(&rules.without)?;
    mesh.wait_until_applied()?;
    wait_for("the receiver's TCP socket to be reset", STEP_LIMIT, || {
        Ok(stream.has_ended().then_some(()))
    })?;
    let arrived = datagrams.bytes();
    std::thread::sleep(SILENCE);
    ensure!(
        datagrams.bytes() == arrived,
        "datagrams arrive although all agents have a view without the rule"
    );
    Ok(answered)
}

/// Milliseconds from one time to another, negative if it was before.
fn since(start: SystemTime, end: SystemTime) -> f64 {
    let milliseconds = |d: Duration| d.as_secs_f64() * 1e3;
    end.duration_since(start)
        .map_or_else(|before| -milliseconds(before.duration()), milliseconds)
}
