//! Findings about ways to a component that lead past the mesh.

use std::net::IpAddr;

use cloison_proto::net::{PortSpec, Protocol};
use cloison_proto::policy::Attachment;

use super::Finding;
use crate::doctor::facts::{Exposure, Listener, Offered, Published};

const CHECK: &str = "exposure";

/// One finding for each way, or that there is none.
pub(super) fn findings(exposure: &Exposure) -> Vec<Finding> {
    let mut found = Vec::new();
    for offered in &exposure.offered {
        let ways = exposure.listeners.iter().filter(|listener| offered.may_listen(listener));
        found.extend(ways.map(|listener| way(offered, listener, &exposure.interface)));
    }
    found.extend(exposure.published.iter().map(publication));
    if found.is_empty() && !exposure.offered.is_empty() {
        found.push(Finding::ok(
            CHECK,
            "what rules open at components here is listened on at their own addresses only",
        ));
    }
    found
}

impl Offered {
    /// Whether a rule opens this port.
    pub(crate) fn is_on(&self, protocol: Protocol, port: u16) -> bool {
        self.ports.iter().any(|ports| match ports {
            PortSpec::Tcp(range) => protocol == Protocol::Tcp && (range.first()..=range.last()).contains(&port),
            PortSpec::Udp(range) => protocol == Protocol::Udp && (range.first()..=range.last()).contains(&port),
            PortSpec::Icmp => false,
        })
    }

    /// Whether the socket may be the component's, and hears more than what comes to the component's addresses.
    fn may_listen(&self, listener: &Listener) -> bool {
        let Listener {
            protocol,
            at,
            user,
            cgroup,
        } = listener;
        let segments = || cgroup.iter().flat_map(|path| path.split('/'));
        let is_its = match &self.attachment {
            Attachment::Container(..) | Attachment::Netns(_) => false,
            Attachment::Host => true,
            Attachment::User(_) => self.user.is_none_or(|own| own == *user),
            Attachment::Unit(unit) => cgroup.is_none() || segments().any(|segment| segment == unit.as_str()),
            Attachment::Cgroup(path) => cgroup.as_ref().is_none_or(|own| is_below(own, path.as_str())),
        };
        let is_closed = at.ip().is_loopback() && self.is_guarded(*protocol);
        is_its && self.is_on(*protocol, at.port()) && !self.addresses.contains(&at.ip()) && !is_closed
    }

    /// Whether the guard of loopback keeps others away there.
    const fn is_guarded(&self, protocol: Protocol) -> bool {
        self.guarded && self.may_be_guarded() && matches!(protocol, Protocol::Tcp | Protocol::Udp)
    }

    /// Of users nobody knows what they hear.
    const fn may_be_guarded(&self) -> bool {
        matches!(self.attachment, Attachment::Unit(_) | Attachment::Cgroup(_))
    }
}

fn is_below(path: &str, parent: &str) -> bool {
    path.strip_prefix(parent)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn way(offered: &Offered, listener: &Listener, interface: &str) -> Finding {
    let Offered { component, addresses, .. } = offered;
    let Listener {
        protocol,
        at,
        user,
        cgroup,
    } = listener;
    let by = cgroup
        .as_ref()
        .map_or_else(|| format!("user {user}"), |cgroup| format!("user {user} in {cgroup}"));
    let who = match at.ip() {
        ip if ip.is_unspecified() && offered.is_guarded(*protocol) => "whoever reaches this host from elsewhere",
        ip if ip.is_unspecified() => "whoever reaches any address of this host",
        ip if ip.is_loopback() => "every program of this host",
        _ => "whoever reaches that address",
    };
    let of_family = |address: &&IpAddr| at.ip().is_unspecified() || address.is_ipv4() == at.is_ipv4();
    let own: Vec<String> = addresses.iter().filter(of_family).map(ToString::to_string).collect();
    let closed = if let Attachment::Unit(unit) = &offered.attachment {
        format!(
            "; or close everything else to `{unit}` by `RestrictNetworkInterfaces={interface}`, or by `IPAddressDeny=any` and `IPAddressAllow=` with \
             the mesh's ranges, in the unit"
        )
    } else {
        "; or run it in a container with `network_mode: none`, or in a namespace of its own".to_owned()
    };
    let closed = if offered.may_be_guarded() && at.ip().is_loopback() && !offered.guarded {
        format!("{closed}; or set `loopback_guard = true` in this host's agent.toml")
    } else {
        closed
    };
    Finding::warning(
        CHECK,
        format!("{component} also listens on {protocol}/{at} ({by}): {who} gets there without a rule"),
        format!("have it listen on {} only{closed}", own.join(" and ")),
    )
}

fn publication(published: &Published) -> Finding {
    let Published {
        component,
        container,
        port,
        at,
    } = published;
    Finding::warning(
        CHECK,
        format!(
            "Docker publishes {port} of {component} (container {container}) on {at}: whoever reaches that address gets there without a rule"
        ),
        "take its `ports:` (or `-p`) away; with `network_mode: none` it has no way but the mesh's",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    fn exposure(attachment: &str, listeners: &[(&str, u32, Option<&str>)]) -> Result<Exposure, Box<dyn std::error::Error>> {
        let listener = |(at, user, cgroup): &(&str, u32, Option<&str>)| -> Result<Listener, std::net::AddrParseError> {
            Ok(Listener {
                protocol: Protocol::Tcp,
                at: at.parse()?,
                user: *user,
                cgroup: cgroup.map(str::to_owned),
            })
        };
        Ok(Exposure {
            offered: vec![Offered {
                component: "postgres".parse()?,
                attachment: attachment.parse()?,
                user: Some(70),
                addresses: vec!["10.77.1.0".parse()?, "fd12:3456:789a::100".parse()?],
                ports: vec!["tcp/5432-5433".parse()?],
                guarded: false,
            }],
            listeners: listeners.iter().map(listener).collect::<Result<_, _>>()?,
            published: Vec::new(),
            interface: "cloison0".into(),
        })
    }

    fn texts(exposure: &Exposure) -> Vec<(Level, String)> {
        findings(exposure)
            .into_iter()
            .map(|f| (f.level, format!("{} FIX {}", f.what, f.fix)))
            .collect()
    }

    #[test]
    fn a_service_at_its_own_addresses_is_well() -> Outcome {
        let well = exposure(
            "user:70",
            &[
                ("10.77.1.0:5432", 70, None),
                ("[fd12:3456:789a::100]:5432", 70, None),
                ("0.0.0.0:22", 0, None),
            ],
        )?;
        assert!(matches!(&*texts(&well), [(Level::Ok, _)]));
        assert!(
            findings(&Exposure::default()).is_empty(),
            "where nothing is offered there is nothing to say"
        );
        Ok(())
    }

    #[test]
    fn each_other_way_is_found_with_the_address_to_listen_on() -> Outcome {
        for (at, who, own) in [
            ("0.0.0.0:5432", "any address of this host", "10.77.1.0 and fd12:3456:789a::100"),
            ("[::]:5433", "any address of this host", "10.77.1.0 and fd12:3456:789a::100"),
            ("127.0.0.1:5432", "every program of this host", "listen on 10.77.1.0 only"),
            ("[::1]:5432", "every program of this host", "listen on fd12:3456:789a::100 only"),
            ("192.0.2.1:5432", "reaches that address", "listen on 10.77.1.0 only"),
        ] {
            let found = texts(&exposure("user:70", &[(at, 70, None)])?);
            let [(Level::Warning, text)] = &*found else {
                return Err(format!("{at}: {found:?}").into());
            };
            assert!(text.contains(at) && text.contains(who) && text.contains(own), "{text}");
        }
        Ok(())
    }

    #[test]
    fn what_the_guard_closes_is_no_way_and_what_it_leaves_open_is_one() -> Outcome {
        for (attachment, at, closed) in [
            ("unit:postgres.service", "127.0.0.1:5432", true),
            ("cgroup:/system.slice/pg", "[::1]:5432", true),
            ("user:70", "[::1]:5432", false),
            ("host", "127.0.0.1:5432", false),
            ("unit:postgres.service", "0.0.0.0:5432", false),
        ] {
            let mut guarded = exposure(attachment, &[(at, 70, None)])?;
            let open = texts(&guarded);
            assert!(open.iter().all(|(level, _)| *level == Level::Warning), "{open:?}");
            assert_eq!(
                open.iter().any(|(_, text)| text.contains("loopback_guard = true")),
                closed,
                "{open:?}"
            );
            guarded.offered.iter_mut().for_each(|offered| offered.guarded = true);
            let found = texts(&guarded);
            assert_eq!(
                found.iter().all(|(level, _)| *level == Level::Ok),
                closed,
                "{attachment} {at}: {found:?}"
            );
        }
        let mut elsewhere = exposure("unit:postgres.service", &[("0.0.0.0:5432", 70, None)])?;
        elsewhere.offered.iter_mut().for_each(|offered| offered.guarded = true);
        assert!(texts(&elsewhere).iter().all(|(_, text)| text.contains("from elsewhere")));
        Ok(())
    }

    #[test]
    fn only_the_component_s_own_sockets_count_where_they_can_be_told() -> Outcome {
        let unit = "/system.slice/postgres.service";
        for (attachment, user, cgroup, counts) in [
            ("user:70", 71, None, false),
            ("unit:postgres.service", 0, Some(unit), true),
            ("unit:postgres.service", 0, Some("/system.slice/other.service"), false),
            ("unit:postgres.service", 0, None, true),
            ("cgroup:/system.slice", 0, Some(unit), true),
            ("cgroup:/system", 0, Some(unit), false),
            ("host", 0, Some(unit), true),
            ("netns:/run/netns/x", 70, None, false),
        ] {
            let found = texts(&exposure(attachment, &[("0.0.0.0:5432", user, cgroup)])?);
            assert_eq!(
                found.iter().any(|(level, _)| *level == Level::Warning),
                counts,
                "{attachment} {user} {cgroup:?}"
            );
        }
        let text = texts(&exposure("unit:postgres.service", &[("0.0.0.0:5432", 0, Some(unit))])?);
        assert!(
            text.iter()
                .all(|(_, t)| t.contains("RestrictNetworkInterfaces=cloison0") && t.contains(unit)),
            "{text:?}"
        );
        Ok(())
    }

    #[test]
    fn what_docker_publishes_is_found() -> Outcome {
        let mut published = exposure("container:docker:pg", &[])?;
        published.published.push(Published {
            component: "postgres".parse()?,
            container: "pg".into(),
            port: "5432/tcp".into(),
            at: "0.0.0.0:15432".parse()?,
        });
        let found = texts(&published);
        assert!(
            matches!(&*found, [(Level::Warning, text)] if text.contains("0.0.0.0:15432") && text.contains("network_mode: none")),
            "{found:?}"
        );
        Ok(())
    }
}
