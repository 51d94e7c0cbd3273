//! `flows`, `denials`: lists from the running agent; and `rotate-key`.

use cloison_proto::status::{Answer, Denial, KeyStage, KeyStatus, Request};

use super::{Done, Failure, asked, columns, print_json, print_text, span};
use crate::args::Format;
use crate::config::Config;

/// Lists the conversations that pass right now.
///
/// # Errors
/// [`Failure`].
pub fn flows(config: &Config, format: Format) -> Result<Done, Failure> {
    let (flows, total) = asked(config, &Request::Flows, |a| {
        if let Answer::Flows { flows, total } = a {
            Some((flows, total))
        } else {
            None
        }
    })?;
    if format == Format::Json {
        print_json(&flows)?;
        return Ok(Done::Well);
    }
    let name = |component: &Option<cloison_proto::label::ComponentName>, address: std::net::IpAddr, port: u16| {
        let who = component.as_ref().map_or_else(|| address.to_string(), ToString::to_string);
        format!("{who}:{port}")
    };
    let row = |f: &cloison_proto::status::Flow| {
        let local = name(&f.local_component, f.local, f.local_port);
        let remote = name(&f.remote_component, f.remote, f.remote_port);
        let (from, to) = if f.outbound { (local, remote) } else { (remote, local) };
        vec![f.protocol.to_string(), from, "->".into(), to, format!("idle {}", span(f.idle_secs))]
    };
    let rows: Vec<_> = flows.iter().map(row).collect();
    print_text(&format!("{}{total} flows", columns(&rows)))?;
    Ok(Done::Well)
}

/// Lists the last denials, summed over ten seconds each.
///
/// # Errors
/// [`Failure`].
pub fn denials(config: &Config, format: Format) -> Result<Done, Failure> {
    let denials = asked(config, &Request::Denials, |a| {
        if let Answer::Denials { denials } = a { Some(denials) } else { None }
    })?;
    if format == Format::Json {
        print_json(&denials)?;
        return Ok(Done::Well);
    }
    let row = |d: &Denial| {
        let direction = if d.outbound { "outbound" } else { "inbound" };
        vec![
            format!("{} ago", span(d.ago_secs)),
            direction.into(),
            format!("{} packets", d.packets),
            d.reason.to_string(),
            about(d),
            d.reason.explanation().into(),
        ]
    };
    let rows: Vec<_> = denials.iter().map(row).collect();
    print_text(&if rows.is_empty() {
        "Nothing was dropped since the agent started.".into()
    } else {
        columns(&rows)
    })?;
    Ok(Done::Well)
}

/// Who, whom, on what and by which process, as far as it is known.
pub(super) fn about(denial: &Denial) -> String {
    let here = denial.component.as_ref().map(ToString::to_string);
    let (Some(remote), Some(on)) = (denial.remote_shown(), denial.on_shown()) else {
        return here.unwrap_or_default();
    };
    let here = here.unwrap_or_else(|| "?".into());
    let (from, to) = if denial.outbound { (here, remote) } else { (remote, here) };
    let process = denial.process.as_ref().map_or_else(String::new, |process| format!(" ({process})"));
    format!("{from} -> {to} {on}{process}")
}

/// Has the agent change its WireGuard key, and says how far that is.
///
/// # Errors
/// [`Failure`].
pub fn rotate_key(config: &Config, format: Format) -> Result<Done, Failure> {
    let key = asked(config, &Request::RotateKey, |a| {
        if let Answer::RotateKey(key) = a { Some(key) } else { None }
    })?;
    if format == Format::Json {
        print_json(&key)?;
    } else {
        print_text(&format!(
            "{}\nNothing stops meanwhile; `cloison-agent status` shows how far it is.",
            key_line(&key)
        ))?;
    }
    Ok(Done::Well)
}

/// The WireGuard key and how far a change of it is, in one line.
pub(super) fn key_line(key: &KeyStatus) -> String {
    let next = key.next.map_or_else(|| "the next one".into(), |next| next.to_string());
    let refused = key
        .refused
        .as_ref()
        .map_or_else(String::new, |code| format!(" (refused: {code}; it is offered again)"));
    match (key.stage, key.changes_in_secs) {
        (KeyStage::Settled, Some(secs)) => format!("{}, changes in {}", key.current, span(secs)),
        (KeyStage::Settled, None) => key.current.to_string(),
        (KeyStage::Offered, _) => format!("{}, to be followed by {next} once the coordinator takes it{refused}", key.current),
        (KeyStage::Overlap, _) => format!("{next}, and {} until all peers have the new one", key.current),
    }
}
