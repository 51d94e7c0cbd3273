//! `ping`: a handshake with each host of a component. It says that the hosts reach each other; echo is a matter of rules.

use cloison_proto::status::{Answer, PingOutcome, Request};

use super::{Done, Failure, asked, print_json, print_text};
use crate::args::{Format, Ping};
use crate::config::Config;

/// Asks and prints. No such component is denied (exit status 2); a host that does not answer is an error (1).
///
/// # Errors
/// [`Failure`].
pub fn run(config: &Config, args: &Ping) -> Result<Done, Failure> {
    let request = Request::Ping {
        component: args.component.clone(),
    };
    let hosts = asked(
        config,
        &request,
        |a| if let Answer::Ping { hosts } = a { Some(hosts) } else { None },
    )?;
    if args.output.output == Format::Json {
        print_json(&hosts)?;
    } else if hosts.is_empty() {
        print_text(&format!(
            "denied: no rule in this host's view pairs it with {}, or there is no such component. `cloison explain` sees the whole mesh.",
            args.component
        ))?;
    } else {
        let lines: Vec<_> = hosts.iter().map(line).collect();
        print_text(&lines.join("\n"))?;
    }
    let silent = hosts.iter().filter(|h| matches!(h.outcome, PingOutcome::Silent { .. })).count();
    match (hosts.len(), silent) {
        (0, _) => Ok(Done::Denied),
        (_, 0) => Ok(Done::Well),
        (all, silent) => Err(Failure::Other {
            what: format!("{silent} of {all} hosts did not answer"),
            hint: "is the agent running there, and does UDP reach it? `cloison-agent status` shows the endpoints that were tried".into(),
        }),
    }
}

fn line(ping: &cloison_proto::status::Ping) -> String {
    let echo = if ping.echo_allowed {
        "echo (icmp) would be allowed"
    } else {
        "echo (icmp) would be denied"
    };
    match &ping.outcome {
        PingOutcome::Answered { round_trip_micros } => {
            let endpoint = ping.endpoint.map_or_else(String::new, |e| format!(" at {e}"));
            let (millis, rest) = (round_trip_micros / 1000, round_trip_micros % 1000 / 10);
            format!("{}{endpoint}: handshake in {millis}.{rest:02} ms; {echo}", ping.host)
        }
        PingOutcome::Silent { why } => format!("{}: no handshake: {why}; {echo}", ping.host),
        PingOutcome::Local => format!("{}: this host itself; {echo}", ping.host),
    }
}
