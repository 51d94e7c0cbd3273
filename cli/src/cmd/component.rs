//! `cloison component`: where each component runs, and how it is kept to its own processes there.

use std::io::{self, Write};

use cloison_proto::api::{ComponentList, ComponentSummary, EnforcementState, InstanceSummary};

use super::Context;
use crate::args::ComponentCommand;
use crate::client::percent_encoded;
use crate::error::{CliError, Exit};
use crate::render::{ago, list, print, style, table};

pub(super) async fn run(context: &Context, command: ComponentCommand) -> Result<Exit, CliError> {
    match command {
        ComponentCommand::List => {
            let components: ComponentList = context.client.get("components").await?;
            print(context.output, &components, people_list)?;
        }
        ComponentCommand::Show { component } => {
            let path = format!("components/{}", percent_encoded(&component));
            let component: ComponentSummary = context.client.get(&path).await?;
            print(context.output, &component, people_one)?;
        }
    }
    Ok(Exit::Ok)
}

fn people_list(out: &mut dyn Write, all: &ComponentList) -> io::Result<()> {
    let row = |c: &ComponentSummary| {
        let unenforced = c.instances.iter().filter(|i| i.enforcement == EnforcementState::Unenforced).count();
        vec![
            c.name.to_string(),
            c.attach.to_string(),
            list(c.instances.iter().map(|i| &i.host)),
            unenforced.to_string(),
            list(c.services.keys()),
        ]
    };
    table(
        out,
        &["name", "attachment", "hosts", "unenforced", "services"],
        all.components.iter().map(row),
    )
}

fn people_one(out: &mut dyn Write, component: &ComponentSummary) -> io::Result<()> {
    let services = component.services.iter().map(|(name, ports)| format!("{name} {}", list(ports)));
    writeln!(out, "{}", component.name)?;
    writeln!(out, "attachment  {}", component.attach)?;
    writeln!(
        out,
        "labels      {}",
        list(component.labels.iter().map(|(key, value)| format!("{key}={value}")))
    )?;
    writeln!(out, "services    {}", list(services))?;
    let row = |i: &InstanceSummary| vec![i.host.to_string(), i.v4.to_string(), i.v6.to_string(), enforced(i), denied(i)];
    table(
        out,
        &["host", "ipv4", "ipv6", "enforced", "denied last"],
        component.instances.iter().map(row),
    )
}

/// How an instance is enforced, and by whom, or why not.
pub(super) fn enforced(instance: &InstanceSummary) -> String {
    let colour = match instance.enforcement {
        EnforcementState::Isolated | EnforcementState::Bound => style::GOOD,
        EnforcementState::Shared | EnforcementState::Unknown => style::WARN,
        EnforcementState::Unenforced => style::BAD,
    };
    let detail = instance.unenforced.as_ref().or(instance.by.as_ref());
    let detail = detail.map_or_else(String::new, |detail| format!(": {detail}"));
    format!("{colour}{}{}{detail}", instance.enforcement.as_str(), style::PLAIN)
}

fn denied(instance: &InstanceSummary) -> String {
    let Some(denial) = &instance.last_denial else { return "-".into() };
    let direction = if denial.outbound { "outbound" } else { "inbound" };
    format!("{direction} {}, {}", denial.reason, ago(Some(denial.at)))
}

#[cfg(test)]
mod tests {
    use cloison_proto::api::DenialSummary;
    use cloison_proto::version::MeshTime;

    use super::*;

    fn instance(host: &str, enforcement: EnforcementState) -> Result<InstanceSummary, Box<dyn std::error::Error>> {
        Ok(InstanceSummary {
            component: "n8n".parse()?,
            host: host.parse()?,
            v4: [10, 77, 1, 0].into(),
            v6: "fd12:3456:789a::100".parse()?,
            unenforced: None,
            enforcement,
            by: None,
            last_denial: None,
        })
    }

    #[test]
    fn each_instance_tells_how_it_is_enforced_by_whom_and_what_was_denied_last() -> Result<(), Box<dyn std::error::Error>> {
        let bound = InstanceSummary {
            by: Some("unit n8n.service".into()),
            last_denial: Some(DenialSummary {
                at: MeshTime(0),
                outbound: true,
                reason: "no_rule".into(),
            }),
            ..instance("app-1", EnforcementState::Bound)?
        };
        let unenforced = InstanceSummary {
            unenforced: Some("there is no user n8n".into()),
            ..instance("app-2", EnforcementState::Unenforced)?
        };
        let component = ComponentSummary {
            name: "n8n".parse()?,
            attach: "unit:n8n.service".parse()?,
            labels: cloison_proto::label::LabelSet::default(),
            services: std::collections::BTreeMap::new(),
            instances: vec![bound, unenforced, instance("app-3", EnforcementState::Unknown)?],
        };
        let mut out = Vec::new();
        people_one(&mut out, &component)?;
        let text = String::from_utf8(out)?;
        for expected in [
            "attachment  unit:n8n.service",
            "bound",
            ": unit n8n.service",
            "outbound no_rule, ",
            ": there is no user n8n",
            "unknown",
        ] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        let mut out = Vec::new();
        people_list(
            &mut out,
            &ComponentList {
                components: vec![component],
            },
        )?;
        let text = String::from_utf8(out)?;
        assert!(text.contains("app-1,app-2,app-3  1 "), "{text}");
        Ok(())
    }
}
