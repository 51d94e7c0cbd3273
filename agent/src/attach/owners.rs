//! Whose a socket of the host's own namespace is: by its cgroup, then by its user, then the host's. Made anew whenever a claim's processes
//! change, and read by the packet workers for the second check of a new flow, and by whoever names the process behind a denial.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use cloison_proto::label::ComponentName;

use crate::netlink::nftables::Rules;

/// Whose each socket and each address is.
#[derive(Debug, Clone, Default)]
pub struct Owners {
    /// The components on the host's TUN, by their addresses.
    pub addresses: HashMap<IpAddr, ComponentName>,
    /// By the id of a cgroup: those that are claimed, and all below them.
    pub cgroups: HashMap<u64, ComponentName>,
    /// By the number of a user.
    pub users: HashMap<u32, ComponentName>,
    /// The component that is the rest of the host.
    pub host: Option<ComponentName>,
    /// The base table, which says the same to the kernel: its name, and the rules that it has.
    pub table: Option<(Box<str>, Rules)>,
    /// The base table is gone: until it is loaded again nothing passes the host's TUN.
    pub closed: bool,
}

/// The owners in force.
pub type Shared = Arc<ArcSwap<Owners>>;

impl Owners {
    /// Whose a socket is that this user made in this cgroup; `None` if it is nobody's.
    #[must_use]
    pub fn of_socket(&self, user: u32, cgroup: Option<u64>) -> Option<&ComponentName> {
        let by_cgroup = cgroup.and_then(|id| self.cgroups.get(&id));
        by_cgroup.or_else(|| self.users.get(&user)).or(self.host.as_ref())
    }

    /// Whose an address is.
    #[must_use]
    pub fn of_address(&self, address: IpAddr) -> Option<&ComponentName> {
        self.addresses.get(&address)
    }

    /// Whether anything is claimed: without claims, every socket of the host is its one component's.
    #[must_use]
    pub fn has_claims(&self) -> bool {
        self.addresses.values().any(|component| self.host.as_ref() != Some(component))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_comes_before_a_user_and_a_user_before_the_host() -> Result<(), Box<dyn std::error::Error>> {
        let (n8n, postgres, rest): (ComponentName, ComponentName, ComponentName) = ("n8n".parse()?, "postgres".parse()?, "rest".parse()?);
        let mut owners = Owners {
            cgroups: HashMap::from([(7, n8n.clone())]),
            users: HashMap::from([(70, postgres.clone())]),
            ..Owners::default()
        };
        assert_eq!(owners.of_socket(70, Some(7)), Some(&n8n));
        assert_eq!(owners.of_socket(70, Some(8)), Some(&postgres));
        assert_eq!(owners.of_socket(71, None), None, "nobody's");
        owners.host = Some(rest.clone());
        assert_eq!(owners.of_socket(71, None), Some(&rest));
        Ok(())
    }
}
