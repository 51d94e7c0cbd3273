//! `status`: what the running agent says of itself.

use std::fmt::Write as _;
use std::time::Duration;

use cloison_proto::status::{Answer, Counters, Denial, Enforcement, Link, Names, Request, Resolved, Resolver, Status};

use super::show::about;
use super::show::key_line;
use super::{Done, Failure, asked, bytes, columns, print_json, print_text, span};
use crate::args::{Format, StatusArgs};
use crate::config::Config;

/// How often `--watch` shows it again.
const WATCH_EVERY: Duration = Duration::from_secs(2);

/// Shows the status, once or again and again.
///
/// # Errors
/// [`Failure`].
pub fn run(config: &Config, args: &StatusArgs) -> Result<Done, Failure> {
    loop {
        let status = asked(config, &Request::Status, |a| if let Answer::Status(s) = a { Some(s) } else { None })?;
        if args.output.output == Format::Json {
            print_json(&status)?;
        } else {
            // Clears the screen and begins at its top (ECMA-48, ED and CUP).
            let clear = if args.watch { "\x1b[2J\x1b[H" } else { "" };
            print_text(&format!("{clear}{}", text(&status)))?;
        }
        if !args.watch {
            return Ok(Done::Well);
        }
        std::thread::sleep(WATCH_EVERY);
    }
}

fn text(status: &Status) -> String {
    let mut text = format!("{} ({}) in {}\n", status.name, status.host, status.mesh);
    let mut head = vec![
        vec![
            "view".into(),
            status.version.map_or_else(|| "none: nothing is allowed".into(), |v| v.to_string()),
        ],
        vec!["lease".into(), lease(status)],
        vec!["coordinator".into(), link(&status.link)],
        vec![
            "wireguard".into(),
            format!("port {}, interface {}", status.listen_port, status.interface),
        ],
        vec!["key".into(), key_line(&status.wg_key)],
        vec!["agent".into(), format!("{}, up {}", status.software, span(status.uptime_secs))],
    ];
    head.extend(names(&status.names).map(|text| vec!["names".into(), text]));
    head.extend(resolver(&status.resolver).map(|text| vec!["resolver".into(), text]));
    head.extend(resolved(&status.resolved).map(|text| vec!["resolved".into(), text.into()]));
    if let Some(offset) = status.clock_offset_secs.filter(|offset| offset.unsigned_abs() > 1) {
        let direction = if offset < 0 { "behind" } else { "ahead of" };
        head.push(vec![
            "clock".into(),
            format!("{} {direction} the mesh's", span(offset.unsigned_abs())),
        ]);
    }
    if status.ignored_items > 0 {
        head.push(vec![
            "ignored".into(),
            format!("{} items of the view that this agent cannot use", status.ignored_items),
        ]);
    }
    text.push_str(&columns(&head));
    section(&mut text, "components here", instances(status));
    section(&mut text, "denied last", denied(status));
    section(&mut text, "peers", peers(status));
    section(&mut text, "packets", packets(status));
    for warning in &status.warnings {
        // Writing to a string cannot fail.
        let _ = write!(text, "\nwarning: {warning}");
    }
    text
}

fn section(text: &mut String, title: &str, rows: Vec<Vec<String>>) {
    if !rows.is_empty() {
        let _ = write!(text, "\n{title}\n{}", columns(&rows));
    }
}

fn lease(status: &Status) -> String {
    match (status.version, status.lease.left_secs) {
        (None, _) => "none".into(),
        (Some(_), 0) => "ended: nothing is allowed".into(),
        (Some(_), left) => format!("{} left without the coordinator", span(left)),
    }
}

fn link(link: &Link) -> String {
    match link {
        Link::Linked { address, for_secs } => format!("linked with {address} for {}", span(*for_secs)),
        Link::Connecting => "connecting".into(),
        Link::Waiting { next_secs, why } => format!("not linked, next attempt in {}: {why}", span(*next_secs)),
    }
}

/// What is known of names; nothing, where there are to be none.
fn names(names: &Names) -> Option<String> {
    match names {
        Names::Off => None,
        Names::Waiting { file } => Some(format!("in {}, as soon as there is a view", file.display())),
        Names::Kept { file, instances, .. } => Some(format!("{instances} instances in {}", file.display())),
        Names::Failed { file, .. } => Some(format!("not in {}: see the warning", file.display())),
    }
}

/// At which address names are answered and where; nothing, where they are not to be.
fn resolver(resolver: &Resolver) -> Option<String> {
    let Resolver::On { addresses, namespaces } = resolver else {
        return None;
    };
    let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
    let (served, not): (Vec<_>, Vec<_>) = namespaces.iter().partition(|at| at.why_not.is_none());
    let served: Vec<_> = served.iter().map(|at| format!("{} ({})", at.at, at.instances)).collect();
    let mut text = match served.is_empty() {
        true => "nowhere yet".to_owned(),
        false => format!("{} in {}", addresses.join(" "), served.join(", ")),
    };
    if !not.is_empty() {
        let _ = write!(text, "; not in {} more: see the warning", not.len());
    }
    Some(text)
}

const fn resolved(resolved: &Resolved) -> Option<&'static str> {
    match resolved {
        Resolved::Off => None,
        Resolved::Waiting => Some("waits until names are answered on this host's interface"),
        Resolved::Told => Some("asks there for the mesh's names"),
        Resolved::Failed { .. } => Some("not told: see the warning"),
    }
}

fn instances(status: &Status) -> Vec<Vec<String>> {
    let row = |i: &cloison_proto::status::Instance| {
        let addresses: Vec<_> = i.addresses.iter().map(ToString::to_string).collect();
        let enforcement = match &i.enforcement {
            Enforcement::Isolated { by } => format!("isolated: {by}"),
            Enforcement::Bound { by } => format!("bound: {by}"),
            Enforcement::Shared => "shared: any process of this host can be it".into(),
            Enforcement::Unenforced { why } => format!("unenforced: {why}"),
        };
        vec![i.component.to_string(), i.attachment.clone(), addresses.join(" "), enforcement]
    };
    status.instances.iter().map(row).collect()
}

fn denied(status: &Status) -> Vec<Vec<String>> {
    let row = |d: &Denial| {
        let ago = format!("{} ago", span(d.ago_secs));
        vec![about(d), d.reason.to_string(), ago]
    };
    status.instances.iter().filter_map(|i| i.last_denial.as_ref()).map(row).collect()
}

fn peers(status: &Status) -> Vec<Vec<String>> {
    let row = |p: &cloison_proto::status::Peer| {
        let components: Vec<_> = p.components.iter().map(ToString::to_string).collect();
        vec![
            p.name.to_string(),
            components.join(","),
            p.endpoint.map_or_else(|| "no endpoint yet".into(), |e| e.to_string()),
            p.handshake_secs
                .map_or_else(|| "no session".into(), |secs| format!("handshake {} ago", span(secs))),
            format!("received {}, sent {}", bytes(p.received_bytes), bytes(p.sent_bytes)),
        ]
    };
    status.peers.iter().map(row).collect()
}

fn packets(status: &Status) -> Vec<Vec<String>> {
    let row = |name: &str, counters: &Counters| {
        let drops: Vec<_> = counters.dropped.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        let drops = if drops.is_empty() {
            "none dropped".into()
        } else {
            format!("dropped: {}", drops.join(", "))
        };
        vec![
            name.into(),
            format!("{} of {} passed", counters.delivered, counters.received),
            drops,
        ]
    };
    vec![row("outbound", &status.packets.outbound), row("inbound", &status.packets.inbound)]
}
