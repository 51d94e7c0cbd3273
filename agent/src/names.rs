//! Names of components: a managed block in the hosts file, so that `postgres.cloison.internal` means the instances that this host may reach.
//!
//! A view goes: [`entries`] (what may be named) -> [`render`] (lines) -> [`keeper::Keeper`], a thread of its own, which compares the file
//! with what it should be every few seconds -> [`hosts_file`], which changes it in place -> [`block`], which knows the text. What the file
//! system does, fast or slow or never, holds up neither the data plane nor the agent's loop.
//!
//! All that is written comes from the view in force, whose names are checked to be labels when it is read: no view can bring about a line of
//! another form, or a name outside of [`ZONE`]. Resolver files are never touched.

pub mod block;
pub mod dns;
pub mod hosts_file;
pub mod keeper;
pub mod memory;
pub mod resolved;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;

use cloison_proto::id::HostId;
use cloison_proto::label::{ComponentName, HostName};
use cloison_proto::net::AddressPair;
use cloison_proto::version::MeshTime;
use cloison_proto::view::View;
use sha2::{Digest as _, Sha256};

use crate::dataplane::{Enforcement, Report};

/// What all names of the mesh end in. `internal` is reserved for private use (ICANN board resolution 2024.07.29.06).
pub const ZONE: &str = "cloison.internal";

/// Longest block, in bytes: 4,000 instances and more. Every look-up of every program reads all of it.
pub const MAX_BLOCK: usize = 1024 * 1024;

/// An instance that has a name here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its component.
    pub component: ComponentName,
    /// Its host.
    pub host: HostName,
    /// Its addresses.
    pub addresses: AddressPair,
}

/// The lines of a block.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Lines {
    /// The text, each line with its end.
    pub text: String,
    /// How many instances are named in it.
    pub named: usize,
    /// How many did not fit.
    pub left_out: usize,
}

/// The instances that have a name on this host, in the order of the file: by component; of each component the local instance first, then the
/// others in an order that follows from a hash of both hosts' ids, so that each host has its own first choice and keeps it.
///
/// These are the instances that a rule lets a local one reach at `now`, and the local ones themselves as far as they are attached: a server
/// can listen on its own name.
#[must_use]
pub fn entries(view: &View, report: &Report, now: MeshTime) -> Vec<Entry> {
    let all = view.instances.keys().cloned().collect();
    entries_for(&all, view, report, now)
}

/// Of these, what may be told to some of this host's components: their own instances here, and what a rule lets them reach.
#[must_use]
pub fn entries_for(whom: &BTreeSet<ComponentName>, view: &View, report: &Report, now: MeshTime) -> Vec<Entry> {
    let opens = view
        .rules
        .iter()
        .filter(|r| whom.contains(&r.from) && view.instances.contains_key(&r.from) && !r.grants.is_empty() && now < r.expires);
    let reachable: BTreeSet<_> = opens.map(|r| &r.to).collect();
    let attached = |component| report.get(component).is_some_and(Enforcement::is_attached);
    let told = |component| whom.contains(component) || reachable.contains(component);
    let local = view.instances.values().filter(|i| attached(&i.component) && told(&i.component));
    let local = local.map(|i| (view.host.id, &view.host.name, &i.component, i.addresses));
    let remote = view.remotes.iter().filter(|r| reachable.contains(&r.component));
    let remote = remote.filter_map(|r| view.peers.get(&r.host).map(|peer| (r.host, &peer.name, &r.component, r.addresses)));
    let mut all: Vec<_> = local.chain(remote).collect();
    let us = view.host.id;
    all.sort_by_cached_key(|(host, _, component, _)| ((*component).clone(), *host != us, rank(us, *host)));
    all.into_iter()
        .map(|(_, host, component, addresses)| Entry {
            component: component.clone(),
            host: host.clone(),
            addresses,
        })
        .collect()
}

/// A host's place in another host's order.
fn rank(us: HostId, them: HostId) -> [u8; 32] {
    Sha256::new().chain_update(us.0).chain_update(them.0).finalize().into()
}

/// The lines for these instances: a line for each address, IPv6 first where this kernel has it; the name of the instance, which is unique
/// and which a reverse look-up finds, before that of the component.
#[must_use]
pub fn render(entries: &[Entry], has_ipv6: bool) -> Lines {
    let mut lines = Lines::default();
    for Entry {
        component,
        host,
        addresses,
    } in entries
    {
        let before = lines.text.len();
        let v6 = has_ipv6.then_some(IpAddr::V6(addresses.v6));
        for address in v6.into_iter().chain([IpAddr::V4(addresses.v4)]) {
            // Writing to a string cannot fail.
            let _ = writeln!(lines.text, "{address}\t{component}.{host}.{ZONE} {component}.{ZONE}");
        }
        if lines.text.len() > MAX_BLOCK {
            lines.text.truncate(before);
            lines.left_out = entries.len() - lines.named;
            break;
        }
        lines.named += 1;
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::testing::{HOST, Mesh, PEER};
    use cloison_proto::id::RuleId;
    use cloison_proto::view::{Grant, Peer, RemoteInstance, RuleItem};

    type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

    fn shared(components: &[&str]) -> Outcome<Report> {
        components.iter().map(|c| Ok((c.parse()?, Enforcement::Shared))).collect()
    }

    fn names(entries: &[Entry]) -> Vec<String> {
        entries.iter().map(|e| format!("{}.{}", e.component, e.host)).collect()
    }

    /// `n8n` here may reach `postgres` on db-1, and on three hosts more.
    fn view() -> Outcome<View> {
        let mut view = Mesh::new().view(1, &["tcp/5432"])?.content().as_ref().clone();
        for number in 2..5u8 {
            let id = HostId([number + 10; 16]);
            let key = view.peers.get(&PEER).ok_or("the peer")?.wg_keys.clone();
            let name = format!("db-{number}").parse()?;
            let psk_generation = 0;
            view.peers.insert(
                id,
                Peer {
                    id,
                    name,
                    wg_keys: key,
                    psk_generation,
                },
            );
            let addresses = view.config.overlay.nth(u32::from(number) + 10).ok_or("an address")?;
            view.remotes.push(RemoteInstance {
                component: "postgres".parse()?,
                host: id,
                addresses,
            });
        }
        Ok(view)
    }

    #[test]
    fn what_a_rule_lets_this_host_reach_has_a_name_and_so_has_what_runs_here() -> Outcome {
        let view = view()?;
        let entries = entries(&view, &shared(&["n8n"])?, MeshTime(1));
        assert_eq!(entries.len(), 5);
        assert_eq!(names(&entries).first().map(String::as_str), Some("n8n.app-1"));
        let text = render(&entries, true).text;
        for line in [
            "10.77.1.0\tn8n.app-1.cloison.internal n8n.cloison.internal\n",
            "fd12:3456:789a:0:0:0:1:1\tpostgres.db-1.cloison.internal postgres.cloison.internal\n",
            "10.77.1.1\tpostgres.db-1.cloison.internal postgres.cloison.internal\n",
        ] {
            assert!(text.contains(line) || line.starts_with("fd12"), "{line:?} is not in\n{text}");
        }
        assert_eq!(text.lines().count(), 10);
        assert!(!render(&entries, false).text.contains("fd12"));
        Ok(())
    }

    #[test]
    fn who_may_reach_this_host_without_being_reachable_from_it_has_no_name() -> Outcome {
        let mut view = view()?;
        let reversed = RuleItem {
            id: RuleId([1; 16]),
            from: "backup".parse()?,
            to: "n8n".parse()?,
            grants: vec![Grant {
                ports: "tcp/1".parse()?,
                service: None,
            }],
            expires: MeshTime::NEVER,
        };
        view.rules = vec![reversed];
        view.remotes
            .iter_mut()
            .try_for_each(|r| "backup".parse().map(|name| r.component = name))?;
        assert_eq!(names(&entries(&view, &shared(&["n8n"])?, MeshTime(1))), ["n8n.app-1"]);
        Ok(())
    }

    #[test]
    fn a_component_is_told_of_itself_and_of_what_it_may_reach_and_not_of_its_neighbours() -> Outcome {
        let mut view = view()?;
        let n8n = view.instances.values().next().ok_or("an instance")?.clone();
        for (number, name) in [(98, "front"), (99, "other")] {
            let component: ComponentName = name.parse()?;
            let mut instance = n8n.clone();
            instance.component = component.clone();
            instance.addresses = view.config.overlay.nth(number).ok_or("an address")?;
            view.instances.insert(component, instance);
        }
        let mut to_n8n = view.rules.first().ok_or("a rule")?.clone();
        (to_n8n.id, to_n8n.from, to_n8n.to) = (RuleId([9; 16]), "front".parse()?, "n8n".parse()?);
        view.rules.push(to_n8n);
        let report = shared(&["n8n", "front", "other"])?;
        let told = |whom: &[&str]| -> Outcome<Vec<String>> {
            let whom = whom.iter().map(|name| name.parse()).collect::<Result<_, _>>()?;
            Ok(names(&entries_for(&whom, &view, &report, MeshTime(1))))
        };
        assert_eq!(told(&["other"])?, ["other.app-1"]);
        assert_eq!(
            told(&["front"])?,
            ["front.app-1", "n8n.app-1"],
            "what n8n may reach is n8n's business"
        );
        assert_eq!(told(&["n8n"])?.len(), 5);
        assert_eq!(
            told(&["n8n", "other"])?.len(),
            6,
            "the host's namespace is told for all its components"
        );
        assert!(told(&[])?.is_empty() && told(&["postgres"])?.is_empty(), "who does not run here");
        Ok(())
    }

    #[test]
    fn a_rule_that_expired_or_opens_nothing_names_nobody_and_an_instance_that_is_not_attached_has_no_name() -> Outcome {
        let mut view = view()?;
        let mut rule = view.rules.pop().ok_or("a rule")?;
        rule.expires = MeshTime(100);
        view.rules.push(rule.clone());
        assert_eq!(entries(&view, &Report::new(), MeshTime(99)).len(), 4, "n8n is not attached");
        assert!(entries(&view, &Report::new(), MeshTime(100)).is_empty());
        rule.expires = MeshTime::NEVER;
        rule.grants.clear();
        view.rules = vec![rule];
        let unenforced = Report::from([("n8n".parse()?, Enforcement::Unenforced("why".into()))]);
        assert!(entries(&view, &unenforced, MeshTime(1)).is_empty());
        Ok(())
    }

    #[test]
    fn a_local_instance_comes_first_and_the_others_in_an_order_of_this_host_s_own() -> Outcome {
        let mut view = view()?;
        let mut local = view.instances.values().next().ok_or("an instance")?.clone();
        local.component = "postgres".parse()?;
        local.addresses = view.config.overlay.nth(99).ok_or("an address")?;
        view.instances.insert(local.component.clone(), local);
        let mut orders = BTreeSet::new();
        for number in 0..20 {
            let us = HostId([100 + number; 16]);
            view.host.id = us;
            let order = names(&entries(&view, &shared(&["n8n", "postgres"])?, MeshTime(1)));
            assert_eq!(order.get(..2), Some(&["n8n.app-1".to_owned(), "postgres.app-1".to_owned()][..]));
            orders.insert(order);
        }
        assert!(orders.len() > 5, "20 hosts share {} orders of four instances", orders.len());
        assert_ne!(HOST, PEER);
        Ok(())
    }

    #[test]
    fn a_block_has_an_end_however_long_the_view_is() -> Outcome {
        let view = view()?;
        let entry = entries(&view, &Report::new(), MeshTime(1)).pop().ok_or("an entry")?;
        let many = vec![entry; 20_000];
        let lines = render(&many, true);
        assert!(lines.text.len() <= MAX_BLOCK && lines.text.ends_with('\n'));
        assert_eq!(lines.named + lines.left_out, 20_000);
        assert!(lines.named > 4_000 && lines.left_out > 0);
        Ok(())
    }
}
