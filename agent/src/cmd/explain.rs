//! `explain`: whether this host's view allows something, and whether it works right now.

use std::fmt::Write as _;

use cloison_proto::label::ComponentName;
use cloison_proto::status::{Answer, Explanation, Port, Request};

use super::{Done, Failure, asked, columns, print_json, print_text};
use crate::args::{Explain, Format};
use crate::config::Config;

/// Asks and prints; denied is exit status 2.
///
/// # Errors
/// [`Failure`].
pub fn run(config: &Config, args: &Explain) -> Result<Done, Failure> {
    let (to, on) = target(&args.to)?;
    let request = Request::Explain {
        from: args.from.clone(),
        to,
        on,
    };
    let explanation = asked(config, &request, |a| if let Answer::Explain(e) = a { Some(e) } else { None })?;
    if args.output.output == Format::Json {
        print_json(&explanation)?;
    } else {
        print_text(&text(args, &explanation))?;
    }
    Ok(if explanation.allowed.is_empty() { Done::Denied } else { Done::Well })
}

/// `postgres`, `postgres:sql`, `postgres:tcp/5432`, `postgres:icmp`.
fn target(text: &str) -> Result<(ComponentName, Port), Failure> {
    let bad = |why: String| Failure::Other {
        what: format!("`{text}` is no target: {why}"),
        hint: "write a component, and behind a colon a service or ports: postgres, postgres:sql, postgres:tcp/5432, postgres:icmp".into(),
    };
    let (name, port) = text.split_once(':').map_or((text, None), |(name, port)| (name, Some(port)));
    let component = name.parse().map_err(|e| bad(format!("{e}")))?;
    let on = match port {
        None | Some("*") => Port::Any,
        Some(ports) if ports.contains('/') || ports == "icmp" => Port::Ports(ports.parse().map_err(|e| bad(format!("{e}")))?),
        Some(service) => Port::Service(service.parse().map_err(|e| bad(format!("{e}")))?),
    };
    Ok((component, on))
}

fn text(args: &Explain, explanation: &Explanation) -> String {
    let who = args
        .from
        .as_ref()
        .map_or_else(|| "any component of this host".to_owned(), ToString::to_string);
    if explanation.allowed.is_empty() {
        return format!(
            "denied: no rule in this host's view lets {who} reach {}.\nThis host knows only what concerns it: that the target does not exist looks the same from here. \
             `cloison explain` sees the whole mesh.",
            args.to
        );
    }
    let row = |a: &cloison_proto::status::Allowed| {
        let addresses: Vec<_> = a.to_addresses.iter().map(ToString::to_string).collect();
        vec![
            format!("{} on {}", a.from, a.from_host),
            "->".into(),
            format!("{} on {}", a.to, a.to_host),
            a.ports.to_string(),
            addresses.join(" "),
            a.rule.to_string(),
            a.until.map_or_else(String::new, |until| format!("until {} (Unix time)", until.0)),
        ]
    };
    let rows: Vec<_> = explanation.allowed.iter().map(row).collect();
    let mut text = format!("allowed\n{}", columns(&rows));
    // Writing to a string cannot fail.
    for obstacle in &explanation.obstacles {
        let _ = writeln!(text, "but right now: {obstacle}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_components_services_and_ports() -> Result<(), Box<dyn std::error::Error>> {
        assert_eq!(target("postgres")?, ("postgres".parse()?, Port::Any));
        assert_eq!(target("postgres:*")?.1, Port::Any);
        assert_eq!(target("postgres:sql")?.1, Port::Service("sql".parse()?));
        assert_eq!(target("postgres:tcp/1-2")?.1, Port::Ports("tcp/1-2".parse()?));
        assert_eq!(target("postgres:icmp")?.1, Port::Ports("icmp".parse()?));
        for bad in ["", ":sql", "postgres:", "Postgres", "postgres:tcp/0", "postgres:5432/tcp", "a:b:c"] {
            assert!(target(bad).is_err(), "{bad}");
        }
        Ok(())
    }
}
