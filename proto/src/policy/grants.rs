//! What a policy means: its rules, spelled out as pairs of components.
//!
//! This is where selectors end: everything behind it (compiler, explain) sees component names and ports only. Grants say nothing
//! about hosts, addresses or whether a rule has expired.

use std::collections::{BTreeMap, BTreeSet};

use super::index::{Index, Member};
use super::model::{Component, Policy, Rule, Services, What};
use crate::label::{ComponentName, Selector, ServiceName};
use crate::net::PortSpec;
use crate::version::MeshTime;

/// What one rule opens between one pair of components, in the direction of its arrow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant<'p> {
    /// Position of the rule in [`Policy::rules`].
    pub index: usize,
    /// The rule.
    pub rule: &'p Rule,
    /// Who may open flows.
    pub from: &'p ComponentName,
    /// To whom. The same component as `from` if both sides of the arrow mean it.
    pub to: &'p ComponentName,
    /// What is open, sorted; never empty.
    pub opens: Vec<Opening<'p>>,
    /// When the rule ends; [`MeshTime::NEVER`] if it does not.
    pub expires: MeshTime,
}

/// Ports that a rule opens, and the service by which it does so, if it names one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Opening<'p> {
    /// The ports.
    pub ports: PortSpec,
    /// The service that they belong to; `None` for ports that the rule gives itself.
    pub service: Option<&'p ServiceName>,
}

/// The components on both sides of one rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expansion<'p> {
    /// Who may open flows.
    pub from: BTreeSet<&'p ComponentName>,
    /// To whom, and what is open there, sorted; components with nothing open are left out.
    pub to: BTreeMap<&'p ComponentName, Vec<Opening<'p>>>,
}

/// Spells out the rules of one policy.
#[derive(Debug)]
pub struct Resolver<'p> {
    index: Index<'p, &'p Services>,
}

impl<'p> Resolver<'p> {
    /// Indexes the components of `policy`.
    #[must_use]
    pub fn new(policy: &'p Policy) -> Self {
        let member = |(name, c): (&'p ComponentName, &'p Component)| Member {
            name,
            labels: &c.labels,
            extra: &c.services,
        };
        Self {
            index: Index::new(policy.components.iter().map(member)),
        }
    }

    /// The components that `selector` means, by name.
    pub fn members<'s>(&'s self, selector: &'s Selector) -> impl Iterator<Item = &'p ComponentName> + use<'s, 'p> {
        self.index.members(selector).map(|m| m.name)
    }

    /// Both sides of `rule`.
    #[must_use]
    pub fn expand(&self, rule: &'p Rule) -> Expansion<'p> {
        let from = rule.from.iter().flat_map(|s| self.members(s)).collect();
        let mut to: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        for target in &rule.to {
            for member in self.index.members(&target.selector) {
                to.entry(member.name).or_default().extend(openings(&target.what, member.extra));
            }
        }
        let to = to
            .into_iter()
            .filter(|(_, opens)| !opens.is_empty())
            .map(|(name, opens)| (name, opens.into_iter().collect()));
        Expansion { from, to: to.collect() }
    }
}

impl Policy {
    /// Every pair of components that a rule names, and what it opens: by rule, then by `from`, then by `to`. The number of grants can
    /// be the square of the number of components for each rule: callers that do not need pairs use [`Resolver::expand`].
    pub fn grants(&self) -> impl Iterator<Item = Grant<'_>> {
        let resolver = Resolver::new(self);
        self.rules.iter().enumerate().flat_map(move |(index, rule)| {
            let Expansion { from, to } = resolver.expand(rule);
            from.into_iter().flat_map(move |from| {
                let pair = move |(to, opens)| Grant {
                    index,
                    rule,
                    from,
                    to,
                    opens,
                    expires: rule.ends(),
                };
                to.clone().into_iter().map(pair)
            })
        })
    }
}

fn openings<'p>(what: &What, services: &'p Services) -> Vec<Opening<'p>> {
    let of_service = |(name, ports): (&'p ServiceName, &'p Vec<PortSpec>)| {
        ports
            .iter()
            .map(move |ports| Opening {
                ports: *ports,
                service: Some(name),
            })
            .collect::<Vec<_>>()
    };
    match what {
        What::Ports(ports) => vec![Opening {
            ports: *ports,
            service: None,
        }],
        What::AllServices => services.iter().flat_map(of_service).collect(),
        What::Service(name) => services.get_key_value(name).into_iter().flat_map(of_service).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spelled_out(text: &str) -> Result<Vec<String>, String> {
        let policy = crate::policy::parse(text).map_err(|e| format!("{e:?}"))?;
        let line = |g: Grant<'_>| {
            let opens: Vec<_> = g
                .opens
                .iter()
                .map(|o| format!("{}{}", o.ports, o.service.map_or(String::new(), |s| format!("={s}"))))
                .collect();
            format!("{} -> {}: {}", g.from, g.to, opens.join(" "))
        };
        Ok(policy.grants().map(line).collect())
    }

    const COMPONENTS: &str = "version: 1
components:
  a: {on: h1, attach: host, labels: {tier: app}, services: {web: [tcp/80, tcp/443], ping: icmp}}
  b: {on: h2, attach: host, labels: {tier: app}, services: {web: tcp/8080}}
  c: {on: h3, attach: host, labels: {tier: app}}
  d: {on: h4, attach: host}
";

    #[test]
    fn a_service_is_open_on_the_members_that_have_it() -> Result<(), String> {
        let got = spelled_out(&format!("{COMPONENTS}allow: [d -> tier=app:web]"))?;
        assert_eq!(got, ["d -> a: tcp/80=web tcp/443=web", "d -> b: tcp/8080=web"]);
        Ok(())
    }

    #[test]
    fn a_star_opens_declared_services_and_ports_are_open_on_all() -> Result<(), String> {
        let got = spelled_out(&format!("{COMPONENTS}allow:\n- d -> tier=app:*, c:udp/53, a:tcp/80"))?;
        assert_eq!(
            got,
            [
                "d -> a: tcp/80 tcp/80=web tcp/443=web icmp=ping",
                "d -> b: tcp/8080=web",
                "d -> c: udp/53"
            ]
        );
        Ok(())
    }

    #[test]
    fn a_component_reaches_itself_only_if_both_sides_of_a_rule_mean_it() -> Result<(), String> {
        let got = spelled_out(&format!("{COMPONENTS}allow: [tier=app -> b:web, d -> a:ping]"))?;
        assert_eq!(
            got,
            [
                "d -> a: icmp=ping",
                "a -> b: tcp/8080=web",
                "b -> b: tcp/8080=web",
                "c -> b: tcp/8080=web"
            ]
        );
        Ok(())
    }

    #[test]
    fn nothing_is_allowed_without_a_rule() -> Result<(), String> {
        assert_eq!(spelled_out(COMPONENTS)?, Vec::<String>::new());
        assert_eq!(spelled_out("version: 1")?, Vec::<String>::new());
        assert_eq!(Policy::default().grants().count(), 0);
        Ok(())
    }
}
