//! Findings out of facts. Every finding that asks for something says what to do, as far as possible as a command.

mod exposure;

use std::fmt::Write as _;
use std::path::Path;

use cloison_proto::status::{Enforcement, Instance, Link, PingOutcome};

use super::facts::{Exposed, Facts, Kernel, PeerPath, Table, Unusable};
use super::path_mtu::Passes;
use super::{Finding, Report};
use crate::control::link::{REVOKED, STARTING};
use crate::enroll::{NO_CERTIFICATE, NOT_HOLDING};

/// A wall clock this far off is said; further, certificates would be judged wrongly.
const CLOCK_NOTE: u64 = 5;
const CLOCK_WARNING: u64 = 60;

/// The least MTU of a TUN (RFC 8200 section 5).
const MIN_MTU: u32 = 1280;

/// Makes findings of facts.
#[must_use]
pub fn findings(facts: &Facts) -> Report {
    let mut found = vec![agent(facts), state_dir(facts), tun(facts)];
    found.extend(unusable(facts));
    found.extend(damaged(facts));
    found.extend(udp(facts));
    found.push(table(facts));
    found.extend(clock(facts));
    found.extend(coordinators(facts));
    found.extend(no_link(facts));
    found.extend(certificate(facts));
    found.extend(lease(facts));
    found.extend(facts.handshakes.iter().map(handshake));
    found.extend(facts.paths.iter().map(path));
    found.extend(foreign(facts));
    found.extend(kernel(&facts.kernel));
    found.extend(hosts(facts));
    found.extend(attached(facts));
    found.extend(exposure::findings(&facts.exposure));
    Report {
        running: facts.agent.is_ok(),
        findings: found,
    }
}

fn agent(facts: &Facts) -> Finding {
    const CHECK: &str = "agent";
    match (&facts.agent, facts.enrolled) {
        (Ok(status), _) => Finding::ok(CHECK, format!("{} runs as {} in {}", status.software, status.name, status.mesh)),
        (Err(_), Some(false)) => Finding::problem(
            CHECK,
            "this host is not enrolled",
            "make a token with `cloison token create`, then run `cloison-agent join --token-file FILE` here",
        ),
        (Err(why), Some(true) | None) => Finding::problem(
            CHECK,
            format!("the agent does not run; what only it knows was not looked at ({why})"),
            if is_unread(facts) {
                "first mend the state (below), then `systemctl start cloison-agent`"
            } else {
                "`systemctl start cloison-agent`; if it ends again, `journalctl -u cloison-agent` says why"
            },
        ),
    }
}

fn state_dir(facts: &Facts) -> Finding {
    const CHECK: &str = "state";
    let (dir, found) = &facts.state_dir;
    match found {
        Err(why) => Finding::problem(
            CHECK,
            format!("cannot look at {}: {why}", dir.display()),
            "look at the disk, and run the command as root",
        ),
        Ok(exposed) if exposed.is_empty() => Finding::ok(CHECK, format!("{} is closed to other users", dir.display())),
        Ok(exposed) => {
            let one = |e: &Exposed| {
                let owner = e.owner.map_or_else(String::new, |owner| format!(", owner {owner}"));
                format!("{} (mode {:04o}{owner})", e.path.display(), e.mode)
            };
            let list: Vec<_> = exposed.iter().map(one).collect();
            Finding::problem(
                CHECK,
                format!("other users can get at the keys of this host: {}", list.join(", ")),
                format!(
                    "`chown -R root: {0} && chmod -R u=rwX,go= {0}`; if somebody may have read them, join again with a new token",
                    dir.display()
                ),
            )
        }
    }
}

fn unusable(facts: &Facts) -> impl Iterator<Item = Finding> {
    let what = if facts.agent.is_ok() {
        "the next start of the agent will fail"
    } else {
        "the agent cannot start"
    };
    let problem = move |Unusable { why, fix }: &Unusable| Finding::problem("state", format!("{what}: {why}"), fix);
    facts.unusable.iter().map(problem)
}

/// Whether something is unknown because the state cannot be read: then nothing is made of its being missing.
fn is_unread(facts: &Facts) -> bool {
    !facts.unusable.is_empty()
}

fn damaged(facts: &Facts) -> impl Iterator<Item = Finding> {
    let warning = |what: &String| {
        let fix = "nothing, while the coordinator can be reached: the agent fetches it again; otherwise restore the file from a backup";
        Finding::warning("state", what, fix)
    };
    facts.damaged.iter().map(warning)
}

fn tun(facts: &Facts) -> Finding {
    match &facts.tun {
        Ok(()) => Finding::ok("tun", "/dev/net/tun can be opened"),
        Err(why) => Finding::problem(
            "tun",
            format!("cannot open /dev/net/tun: {why}"),
            "`modprobe tun`, or pass the device to the container that the agent runs in",
        ),
    }
}

fn udp(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "udp";
    let Ok(status) = &facts.agent else {
        let (port, free) = &facts.port;
        return vec![match free {
            Ok(()) => Finding::ok(CHECK, format!("port {port} is free for the agent")),
            Err(why) => Finding::problem(
                CHECK,
                why,
                format!("`ss -lunp 'sport = :{port}'` shows who has it: stop that, or set another `listen_port`"),
            ),
        }];
    };
    let port = status.listen_port;
    let silent = facts
        .handshakes
        .iter()
        .filter(|(_, outcome)| matches!(outcome, PingOutcome::Silent { .. }))
        .count();
    let mut found = vec![match (facts.handshakes.len(), silent) {
        (0, _) => Finding::ok(CHECK, format!("the agent listens on port {port}; there is no peer to try it with")),
        (all, silent) if all == silent => Finding::problem(
            CHECK,
            format!("the agent listens on port {port}, and none of its {all} peers answers"),
            format!(
                "let UDP port {port} through, in and out: look for it in this host's firewall (`nft list ruleset`, `iptables-save`), in the \
                 provider's, and at the peers"
            ),
        ),
        (all, silent) => Finding::ok(
            CHECK,
            format!("the agent listens on port {port}, and {} of {all} peers answer", all - silent),
        ),
    }];
    if let Some(refused) = status.packets.kernel.get("udp_refused").filter(|count| **count > 0) {
        found.push(Finding::note(
            CHECK,
            format!("the kernel refused to send {refused} datagrams since the start: no route at that moment, or a rule on the way out"),
        ));
    }
    found
}

fn table(facts: &Facts) -> Finding {
    const CHECK: &str = "nft";
    let name = &facts.table_name;
    let reload = if facts.agent.is_ok() {
        "the agent loads it again within three seconds; "
    } else {
        "`cloison-agent prepare` (or the start of the agent) loads it again; "
    };
    let culprit = "find out who flushes the ruleset (`systemctl status nftables firewalld`, `flush ruleset` in /etc/nftables.conf), and have it \
                   flush its own tables only";
    match &facts.table {
        Ok(Table::Whole) => Finding::ok(CHECK, format!("the table `inet {name}` is loaded and as it should be")),
        Ok(Table::NotYet) if is_unread(facts) => Finding::note(
            CHECK,
            format!("the table `inet {name}` could not be looked at: the state says what is in it"),
        ),
        Ok(Table::NotYet) => Finding::note(CHECK, format!("no view was here yet, so that there is no table `inet {name}`")),
        Ok(Table::Missing) => Finding::problem(
            CHECK,
            format!("the table `inet {name}` is gone: nothing keeps the mesh's addresses from leaving in clear"),
            format!("{reload}{culprit}"),
        ),
        Ok(Table::Altered) => Finding::problem(
            CHECK,
            format!("the table `inet {name}` was changed by somebody else"),
            format!("`systemctl restart cloison-agent` loads it anew; see what was changed with `nft list table inet {name}`"),
        ),
        Err(why) => Finding::problem(
            CHECK,
            format!("cannot look at the table `inet {name}`: {why}"),
            "install `nftables`, load the kernel's nf_tables (`modprobe nf_tables`), and run the command as root",
        ),
    }
}

fn clock(facts: &Facts) -> Option<Finding> {
    const CHECK: &str = "clock";
    let (mesh, wall) = facts.clock?;
    let is_exact = facts.agent.as_ref().is_ok_and(|status| matches!(status.link, Link::Linked { .. }));
    // Without a link, mesh time may lag behind: only a wall clock behind it is certainly wrong.
    let off = if is_exact { mesh.abs_diff(wall) } else { mesh.saturating_sub(wall) };
    let direction = if wall < mesh { "behind" } else { "ahead of" };
    let text = format!("the wall clock is {} {direction} mesh time", crate::cmd::span(off));
    Some(match off {
        0..CLOCK_NOTE => Finding::ok(CHECK, "the wall clock agrees with mesh time"),
        CLOCK_NOTE..CLOCK_WARNING => Finding::note(CHECK, text),
        _ => Finding::warning(
            CHECK,
            format!("{text}: the mesh goes on, other programs may not"),
            "`timedatectl set-ntp true`, or another source of time; check with `timedatectl`",
        ),
    })
}

fn coordinators(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "coordinator";
    if facts.enrolled != Some(true) {
        return Vec::new();
    }
    let reached = facts.coordinators.iter().filter(|(_, outcome)| outcome.is_ok()).count();
    let one = |(address, outcome): &(String, Result<(), String>)| match outcome {
        Ok(()) => Finding::ok(CHECK, format!("{address} answers, and is a coordinator of this mesh")),
        Err(why) => {
            let fix = format!(
                "is it running there (`systemctl status cloison-coordinator`), and does UDP and TCP to {address} reach it? A firewall that lets \
                 only TCP through is enough to stop the link"
            );
            if reached > 0 {
                Finding::warning(CHECK, why, fix)
            } else {
                Finding::problem(CHECK, why, fix)
            }
        }
    };
    if facts.coordinators.is_empty() && is_unread(facts) {
        return Vec::new();
    }
    if facts.coordinators.is_empty() {
        let fix = "name one with `coordinators` in the agent's configuration";
        return vec![Finding::problem(CHECK, "no coordinator's address is known", fix)];
    }
    facts.coordinators.iter().map(one).collect()
}

/// Why the agent has no link, unless that is said of the coordinator's address already.
fn no_link(facts: &Facts) -> Option<Finding> {
    const CHECK: &str = "coordinator";
    let status = facts.agent.as_ref().ok()?;
    let Link::Waiting { why, .. } = &status.link else { return None };
    let is_said = facts
        .coordinators
        .iter()
        .any(|(_, outcome)| outcome.as_ref().is_err_and(|said| why.contains(said)));
    if is_said || why == STARTING {
        return None;
    }
    let what = format!("there is no link: {why}");
    let name = &status.name;
    Some(if why.contains(NOT_HOLDING) {
        let fix = "most likely the clock of the coordinator is wrong: look at it there (`timedatectl`); do not `leave`, the link comes back by itself";
        Finding::problem(CHECK, what, fix)
    } else if why.contains(NO_CERTIFICATE) || why.ends_with(&format!(": {REVOKED}")) {
        let fix = format!(
            "`cloison host show {name}` at the coordinator says whether it is revoked. To join again: here `systemctl stop cloison-agent` and \
             `cloison-agent leave`; there `cloison host revoke {name}`, unless it is, and `cloison token create --host {name}`; here \
             `cloison-agent join --token-file FILE`"
        );
        Finding::problem(CHECK, what, fix)
    } else {
        let fix = "the agent tries again after a minute at the latest, `systemctl restart cloison-agent` at once; if it stays, look at the log of \
                   the coordinator (`journalctl -u cloison-coordinator`)";
        Finding::warning(CHECK, what, fix)
    })
}

fn certificate(facts: &Facts) -> Option<Finding> {
    const CHECK: &str = "certificate";
    let renewal = "it is renewed by itself as soon as the coordinator is reached, up to 30 days after the last contact; then `cloison-agent \
                   leave` and join again";
    let now = facts.clock.map_or(0, |(mesh, _)| mesh);
    Some(match &facts.certificate {
        Ok(None) if is_unread(facts) => return None,
        Err(why) => Finding::warning(CHECK, why, renewal),
        Ok(None) if facts.enrolled == Some(true) => Finding::warning(CHECK, "there is no certificate on disk", renewal),
        Ok(None) => Finding::note(CHECK, "there is none: the host is not enrolled"),
        Ok(Some(window)) => {
            let left = window.not_after.saturating_sub(now);
            let life = window.life();
            let text = format!("{} left of {}", crate::cmd::span(left), crate::cmd::span(life));
            match left {
                0 => Finding::warning(
                    CHECK,
                    "it has ended; what passes does not depend on it, but no link does without",
                    renewal,
                ),
                // It is renewed at half of its life: below a quarter, that fails.
                left if left < life / 4 => Finding::warning(CHECK, format!("{text}, and it was not renewed at half of it"), renewal),
                _ => Finding::ok(CHECK, text),
            }
        }
    })
}

fn lease(facts: &Facts) -> Option<Finding> {
    const CHECK: &str = "lease";
    let fix = "reach the coordinator (see above): it is renewed within a second of the link";
    Some(match facts.lease {
        None if is_unread(facts) => return None,
        None if facts.enrolled == Some(true) => Finding::problem(CHECK, "there is none: nothing is allowed", fix),
        None => Finding::note(CHECK, "there is none: the host is not enrolled"),
        Some((0, _)) => Finding::problem(CHECK, "it has ended: nothing is allowed", fix),
        Some((left, whole)) => {
            let text = format!("{} left of {}", crate::cmd::span(left), crate::cmd::span(whole));
            if left < whole / 2 {
                Finding::warning(CHECK, format!("{text}: the coordinator did not renew it for long"), fix)
            } else {
                Finding::ok(CHECK, text)
            }
        }
    })
}

fn handshake((peer, outcome): &(String, PingOutcome)) -> Finding {
    const CHECK: &str = "peer";
    match outcome {
        PingOutcome::Answered { round_trip_micros } => Finding::ok(
            CHECK,
            format!(
                "{peer} answers in {}.{:02} ms",
                round_trip_micros / 1000,
                round_trip_micros % 1000 / 10
            ),
        ),
        PingOutcome::Local => Finding::ok(CHECK, format!("{peer} is this host")),
        PingOutcome::Silent { why } => Finding::warning(
            CHECK,
            format!("{peer} does not answer a handshake: {why}"),
            format!("does the agent run on {peer}, and does UDP pass between the two? `cloison-agent doctor` there sees the other side"),
        ),
    }
}

fn path(path: &PeerPath) -> Finding {
    const CHECK: &str = "mtu";
    let PeerPath { peer, endpoint, found } = path;
    let to = format!("to {peer} ({})", endpoint.ip());
    match found {
        Err(why) => Finding::note(CHECK, format!("sizes {to} could not be tried: {why}")),
        Ok(Passes::Unanswered) => Finding::note(CHECK, format!("{to}, echoes are not answered, so that sizes cannot be tried")),
        Ok(Passes::All(size)) => Finding::ok(CHECK, format!("packets of {size} bytes pass {to}")),
        Ok(Passes::UpTo { largest, wanted }) => {
            // Headers of IP and UDP, and what WireGuard adds (WireGuard paper section 5.4.6).
            let overhead = if endpoint.is_ipv4() { 60 } else { 80 };
            let inner = largest.saturating_sub(overhead);
            let fix = if inner >= MIN_MTU {
                format!("set `mtu = {inner}` in the agent's configuration here and on {peer}, and restart both agents; or mend the path")
            } else {
                format!(
                    "the mesh needs {} bytes there: mend the path, or have the kernel send fragments by an interface MTU of {largest} (`ip link \
                     set dev INTERFACE mtu {largest}`) on both hosts",
                    MIN_MTU + overhead
                )
            };
            Finding::problem(
                CHECK,
                format!("packets of more than {largest} bytes get lost {to}, and up to {wanted} are sent"),
                fix,
            )
        }
    }
}

fn foreign(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "addresses";
    let foreign = match &facts.foreign {
        Ok(foreign) => foreign,
        Err(why) => return vec![Finding::note(CHECK, format!("could not be looked at: {why}"))],
    };
    let mut found = Vec::new();
    for (address, interface) in &foreign.addresses {
        found.push(Finding::problem(
            CHECK,
            format!("{address}, an address of the mesh, is also on {interface}"),
            format!("`ip address delete {address} dev {interface}`, and take it out of what configures that interface"),
        ));
    }
    if let Some((address, length)) = foreign.route {
        found.push(Finding::problem(
            CHECK,
            format!("there is a route to {address}/{length}, which is in the mesh's address range; what follows it is dropped"),
            format!("`ip route delete {address}/{length}`, or give the mesh another range"),
        ));
    }
    if found.is_empty() {
        found.push(Finding::ok(CHECK, "nobody else on this host uses the mesh's addresses"));
    }
    found
}

fn kernel(kernel: &Kernel) -> Vec<Finding> {
    const CHECK: &str = "kernel";
    let mut found = Vec::new();
    if !kernel.strict.is_empty() && kernel.ways_out > 1 {
        let mut fix = String::new();
        for interface in &kernel.strict {
            // Writing to a string cannot fail.
            let _ = write!(fix, "`sysctl net.ipv4.conf.{interface}.rp_filter=2`; ");
        }
        found.push(Finding::warning(
            CHECK,
            format!(
                "{} ways lead out of this host, and on {} the kernel drops what comes by another one than the answer would take",
                kernel.ways_out,
                kernel.strict.join(", ")
            ),
            format!("{fix}and the same in /etc/sysctl.d"),
        ));
    }
    if kernel.forwards {
        let text = "this host forwards packets; the base table drops those from or to the mesh, so that it is no way into it";
        found.push(Finding::note(CHECK, text));
    }
    if kernel.no_ipv6 {
        found.push(Finding::note(
            CHECK,
            "the kernel has no IPv6: components here have their IPv4 addresses only",
        ));
    }
    if found.is_empty() {
        found.push(Finding::ok(CHECK, "no setting is in the way"));
    }
    found
}

/// Components of this host that are not attached; nothing to say while the agent does not run.
fn attached(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "attached";
    let instances = facts.agent.as_ref().map_or([].as_slice(), |status| &status.instances);
    let unenforced = |instance: &Instance| match &instance.enforcement {
        Enforcement::Unenforced { why } => Some(Finding::problem(
            CHECK,
            format!(
                "{} ({}) is unenforced, so that nothing reaches it and it reaches nothing: {why}",
                instance.component, instance.attachment
            ),
            "mend what the reason names; the agent tries again every few seconds",
        )),
        Enforcement::Isolated { .. } | Enforcement::Bound { .. } | Enforcement::Shared => None,
    };
    let mut found: Vec<Finding> = instances.iter().filter_map(unenforced).collect();
    if found.is_empty() && !instances.is_empty() {
        found.push(Finding::ok(CHECK, "what is claimed as a component here is enforced"));
    }
    found
}

fn hosts(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "names";
    let Some((path, found)) = &facts.hosts else {
        return vec![Finding::note(CHECK, "components have no names here: `hosts_file` is off")];
    };
    match found {
        Err(Unusable { why, fix }) => vec![Finding::warning(CHECK, why, fix)],
        Ok(0) => vec![Finding::ok(CHECK, format!("{} can be read and written", path.display()))],
        Ok(others) => vec![Finding::note(CHECK, others_text(path, *others))],
    }
}

fn others_text(path: &Path, others: usize) -> String {
    format!(
        "{} has blocks of {others} other hosts: right, if as many agents more run on this machine; otherwise remove them",
        path.display()
    )
}

#[cfg(test)]
mod tests;
