//! `flows` and `denials`: lists from the running agent.

use cloison_proto::status::{Answer, Request};

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
    let row = |d: &cloison_proto::status::Denial| {
        let direction = if d.outbound { "outbound" } else { "inbound" };
        vec![
            format!("{} ago", span(d.ago_secs)),
            direction.into(),
            format!("{} packets", d.packets),
            d.reason.to_string(),
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
