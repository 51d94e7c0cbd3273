//! Ways to a component that lead past the mesh: what else it listens on, and what a container runtime publishes.
//!
//! The view's rules say which ports the components of this host offer; `/proc/net` says what listens in the host's own namespace, sock_diag
//! in which cgroup; Docker says what it publishes. Only ports that some rule opens are looked at: of others, this host's view tells nothing.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use cloison_proto::label::ComponentName;
use cloison_proto::net::{PortSpec, Protocol};
use cloison_proto::policy::{Attachment, ContainerMatch, Engine};
use cloison_proto::view::View;

use super::facts::{Exposure, Listener, Offered, Published};
use crate::attach::claim::number_of;
use crate::attach::container::api::{Api, Binding};
use crate::config::Config;
use crate::denials::cgroups::Cgroups;
use crate::netlink::sock_diag::{Kind, SockDiag};

/// The states of what waits, as `/proc/net` writes them (net/tcp_states.h): LISTEN for TCP, CLOSE for UDP.
const WAITS: [(&str, Protocol, &str); 4] = [
    ("tcp", Protocol::Tcp, "0A"),
    ("tcp6", Protocol::Tcp, "0A"),
    ("udp", Protocol::Udp, "07"),
    ("udp6", Protocol::Udp, "07"),
];

/// Looks for ways to the components of `view`.
#[must_use]
pub fn look(config: &Config, view: &View) -> Exposure {
    let offered = offered(config, view);
    let mut found: Vec<Listener> = WAITS
        .into_iter()
        .flat_map(|(file, protocol, state)| {
            let text = fs::read_to_string(format!("/proc/net/{file}")).unwrap_or_default();
            listeners(&text, protocol, state)
        })
        .filter(|listener| offered.iter().any(|offered| offered.is_on(listener.protocol, listener.at.port())))
        .collect();
    name_cgroups(&mut found);
    Exposure {
        published: published(config, &offered),
        offered,
        listeners: found,
        interface: config.interface.to_string(),
    }
}

/// What rules open at components of this host.
fn offered(config: &Config, view: &View) -> Vec<Offered> {
    let of = |component: &ComponentName| -> Option<Offered> {
        let instance = view.instances.get(component)?;
        let grants = view.rules.iter().filter(|rule| rule.to == *component).flat_map(|rule| &rule.grants);
        let user = if let Attachment::User(user) = &instance.attachment {
            number_of(user).ok()
        } else {
            None
        };
        Some(Offered {
            component: component.clone(),
            attachment: instance.attachment.clone(),
            user,
            addresses: instance.addresses.both().to_vec(),
            ports: grants.map(|grant| grant.ports).filter(|ports| *ports != PortSpec::Icmp).collect(),
            guarded: config.loopback_guard,
        })
    };
    view.instances
        .keys()
        .filter_map(of)
        .filter(|offered| !offered.ports.is_empty())
        .collect()
}

/// What waits, as a file of `/proc/net` tells.
fn listeners(text: &str, protocol: Protocol, state: &str) -> Vec<Listener> {
    let listener = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (at, is, user) = (words.get(1)?, words.get(3)?, words.get(7)?);
        (*is == state).then_some(())?;
        Some(Listener {
            protocol,
            at: socket(at)?,
            user: user.parse().ok()?,
            cgroup: None,
        })
    };
    text.lines().skip(1).filter_map(listener).collect()
}

/// An address as `/proc/net` writes it: words of 32 bits in the order of the host, and the port.
fn socket(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let word = |at: usize| {
        u32::from_str_radix(address.get(at..at.checked_add(8)?)?, 16)
            .ok()
            .map(u32::to_ne_bytes)
    };
    let ip: IpAddr = match address.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let bytes = [word(0)?, word(8)?, word(16)?, word(24)?].concat();
            Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical()
        }
        _ => return None,
    };
    Some((ip, u16::from_str_radix(port, 16).ok()?).into())
}

fn name_cgroups(listeners: &mut [Listener]) {
    let Ok(mut diag) = SockDiag::open() else { return };
    let mut cgroups = Cgroups::default();
    for listener in listeners {
        let kind = if listener.protocol == Protocol::Udp { Kind::Udp } else { Kind::Tcp };
        let anybody: IpAddr = if listener.at.is_ipv4() {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        if let Ok(Some(found)) = diag.find(kind, listener.at, (anybody, 0).into(), 0)
            && let Some(id) = found.cgroup
        {
            cgroups.learn([id]);
            listener.cgroup = cgroups.name(id).map(str::to_owned);
        }
    }
}

/// What Docker publishes of the components that are its containers, by name; what it does not tell is not known.
fn published(config: &Config, offered: &[Offered]) -> Vec<Published> {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return Vec::new();
    };
    let api = Api::new(&config.accepted.docker_socket);
    let mut found = Vec::new();
    for offered in offered {
        let Attachment::Container(Engine::Docker, ContainerMatch::Name(name)) = &offered.attachment else {
            continue;
        };
        let Ok(Some(told)) = runtime.block_on(api.inspect(name)) else {
            continue;
        };
        for (port, bindings) in told.network_settings.ports.into_iter().flatten() {
            let at = |binding: Binding| -> Option<SocketAddr> {
                let everywhere = binding.host_ip.is_empty().then_some(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
                let ip = everywhere.or_else(|| binding.host_ip.parse().ok())?;
                Some(SocketAddr::new(ip, binding.host_port.parse().ok()?))
            };
            let at = bindings.into_iter().flatten().filter_map(at);
            found.extend(at.map(|at| Published {
                component: offered.component.clone(),
                container: name.to_string(),
                port: port.clone(),
                at,
            }));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_is_read_as_the_kernel_writes_it() -> Result<(), std::net::AddrParseError> {
        // From a machine whose bytes lie in the other order, the words are the other way round: so do these.
        let word = |bytes: [u8; 4]| format!("{:08X}", u32::from_ne_bytes(bytes));
        let v6 = |ip: Ipv6Addr| ip.octets().chunks(4).map(|c| word([c[0], c[1], c[2], c[3]])).collect::<String>();
        let line = |at: String, state: &str, user: u32| {
            format!("   0: {at} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000 {user:>5} 0 1")
        };
        let text = [
            "  sl  local_address rem_address st ...".to_owned(),
            line(format!("{}:1538", word([127, 0, 0, 1])), "0A", 70),
            line(format!("{}:1538", word([10, 77, 1, 0])), "01", 70),
            line(format!("{}:0050", v6(Ipv6Addr::UNSPECIFIED)), "0A", 0),
            line(format!("{}:0050", v6("::ffff:192.0.2.1".parse()?)), "0A", 0),
            line("zz:1".into(), "0A", 0),
            "cut".into(),
        ];
        let found = listeners(&text.join("\n"), Protocol::Tcp, "0A");
        let seen: Vec<_> = found.iter().map(|l| (l.at.to_string(), l.user)).collect();
        assert_eq!(
            seen,
            [
                ("127.0.0.1:5432".to_owned(), 70),
                ("[::]:80".to_owned(), 0),
                ("192.0.2.1:80".to_owned(), 0)
            ]
        );
        Ok(())
    }
}
