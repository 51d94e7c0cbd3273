//! Where packets may go: the one trait in which a mesh differs from plain WireGuard, chosen at compile time.
//!
//! [`Mesh`] knows exact addresses and a filter, both of the same view (I4). [`PlainWireguard`] routes by longest prefix and filters
//! nothing: it speaks with other WireGuard implementations in tests and benchmarks. What the daemon runs is `Engine<Mesh, _>`.

use std::net::IpAddr;

use cloison_proto::filter::{InstanceIndex, Table};
use cloison_proto::id::HostId;
use cloison_proto::label::ComponentName;
use cloison_proto::verdict::DropReason;
use cloison_proto::view::{LocalInstance, View};

use crate::TunId;
use crate::packet::Parsed;
use crate::peer::PeerIndex;

/// The way of one packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Path {
    /// The instance that it comes from.
    pub from: InstanceIndex,
    /// The instance that it goes to.
    pub to: InstanceIndex,
    /// How it gets there.
    pub route: Route,
}

/// How a packet gets to its destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// To an instance of this host, by its TUN.
    Here(TunId),
    /// To another host, by a session.
    Peer(PeerIndex),
}

/// Decides where a packet may come from and where it goes.
pub trait PathPolicy: Send + Sync + 'static {
    /// The way of a packet that `tun` gave us: its source must be an instance of that TUN.
    ///
    /// # Errors
    /// `SourceNotLocal`, `UnknownDestination`, `Unenforced`.
    fn outbound(&self, tun: TunId, packet: &Parsed) -> Result<Path, DropReason>;

    /// The way of a packet that the keys of `peer` decrypted: its source must be that peer's (I3), its destination ours.
    ///
    /// # Errors
    /// `SourceNotPeer`, `DestinationNotLocal`, `Unenforced`.
    fn inbound(&self, peer: PeerIndex, packet: &Parsed) -> Result<Path, DropReason>;

    /// The filter that every packet must pass beside; `None` lets everything pass.
    fn filter(&self) -> Option<&Table>;

    /// The TUN on which an address of this host hangs.
    fn tun_of(&self, local: IpAddr) -> Option<TunId>;

    /// How many instances this host has.
    fn local_instances(&self) -> u32;
}

/// The paths of one view: addresses exactly as it says, everything else is unknown.
#[derive(Debug, Default)]
pub struct Mesh {
    table: Table,
    /// By position in the table.
    places: Vec<Place>,
}

/// Where an instance is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// On this host, on this TUN.
    Tun(TunId),
    /// On this host, but its attachment cannot be enforced: nothing passes.
    Unenforced,
    /// On that host.
    Peer(PeerIndex),
    /// On a host that is no peer.
    Nowhere,
}

impl Mesh {
    /// The paths of `view`. `tun` names the TUN of each instance of this host, or `None` if it cannot be enforced; `peer` tells where in
    /// the plan a host stands.
    #[must_use]
    pub fn new(view: &View, tun: impl Fn(&LocalInstance) -> Option<TunId>, peer: impl Fn(HostId) -> Option<PeerIndex>) -> Self {
        let table = Table::new(view);
        let local = |component: &ComponentName| view.instances.get(component).and_then(&tun).map_or(Place::Unenforced, Place::Tun);
        let places = table.instances().iter().map(|instance| match instance.local {
            true => local(&instance.component),
            false => peer(instance.host).map_or(Place::Nowhere, Place::Peer),
        });
        let places = places.collect();
        Self { table, places }
    }

    fn place(&self, instance: InstanceIndex) -> Place {
        let position = usize::try_from(instance.0).unwrap_or(usize::MAX);
        self.places.get(position).copied().unwrap_or(Place::Nowhere)
    }

    fn find(&self, address: IpAddr) -> Option<(InstanceIndex, Place)> {
        let instance = self.table.lookup(address)?;
        Some((instance, self.place(instance)))
    }
}

impl PathPolicy for Mesh {
    fn outbound(&self, tun: TunId, packet: &Parsed) -> Result<Path, DropReason> {
        let from = match self.find(packet.src) {
            Some((from, Place::Tun(own))) if own == tun => from,
            Some((_, Place::Unenforced)) => return Err(DropReason::Unenforced),
            _ => return Err(DropReason::SourceNotLocal),
        };
        let (to, place) = self.find(packet.dst).ok_or(DropReason::UnknownDestination)?;
        let route = match place {
            Place::Tun(tun) => Route::Here(tun),
            Place::Peer(peer) => Route::Peer(peer),
            Place::Unenforced => return Err(DropReason::Unenforced),
            Place::Nowhere => return Err(DropReason::UnknownDestination),
        };
        Ok(Path { from, to, route })
    }

    fn inbound(&self, peer: PeerIndex, packet: &Parsed) -> Result<Path, DropReason> {
        let from = match self.find(packet.src) {
            Some((from, Place::Peer(owner))) if owner == peer => from,
            _ => return Err(DropReason::SourceNotPeer),
        };
        match self.find(packet.dst) {
            Some((to, Place::Tun(tun))) => Ok(Path {
                from,
                to,
                route: Route::Here(tun),
            }),
            Some((_, Place::Unenforced)) => Err(DropReason::Unenforced),
            _ => Err(DropReason::DestinationNotLocal),
        }
    }

    fn filter(&self) -> Option<&Table> {
        Some(&self.table)
    }

    fn tun_of(&self, local: IpAddr) -> Option<TunId> {
        match self.find(local)? {
            (_, Place::Tun(tun)) => Some(tun),
            (_, Place::Unenforced | Place::Peer(_) | Place::Nowhere) => None,
        }
    }

    fn local_instances(&self) -> u32 {
        let local = self
            .places
            .iter()
            .filter(|place| matches!(place, Place::Tun(_) | Place::Unenforced))
            .count();
        u32::try_from(local).unwrap_or(u32::MAX)
    }
}

/// WireGuard's own cryptokey routing (paper, section 2): prefixes belong to peers, the longest one counts, nothing is filtered. For
/// interoperability tests and benchmarks; never for a mesh.
#[derive(Debug)]
pub struct PlainWireguard {
    tun: TunId,
    /// Longest prefix first.
    allowed_ips: Vec<(IpAddr, u8, PeerIndex)>,
}

impl PlainWireguard {
    /// One TUN, and for each peer the prefixes that are its own.
    #[must_use]
    pub fn unfiltered_for_interop(tun: TunId, allowed_ips: impl IntoIterator<Item = (IpAddr, u8, PeerIndex)>) -> Self {
        let mut allowed_ips: Vec<_> = allowed_ips.into_iter().collect();
        allowed_ips.sort_by_key(|(_, len, _)| std::cmp::Reverse(*len));
        Self { tun, allowed_ips }
    }

    fn owner(&self, address: IpAddr) -> Option<PeerIndex> {
        self.allowed_ips
            .iter()
            .find(|(prefix, len, _)| covers(*prefix, *len, address))
            .map(|(_, _, peer)| *peer)
    }

    const fn path(route: Route) -> Path {
        Path {
            from: InstanceIndex(0),
            to: InstanceIndex(0),
            route,
        }
    }
}

impl PathPolicy for PlainWireguard {
    fn outbound(&self, _: TunId, packet: &Parsed) -> Result<Path, DropReason> {
        self.owner(packet.dst)
            .map(|peer| Self::path(Route::Peer(peer)))
            .ok_or(DropReason::UnknownDestination)
    }

    fn inbound(&self, peer: PeerIndex, packet: &Parsed) -> Result<Path, DropReason> {
        match self.owner(packet.src) {
            Some(owner) if owner == peer => Ok(Self::path(Route::Here(self.tun))),
            _ => Err(DropReason::SourceNotPeer),
        }
    }

    fn filter(&self) -> Option<&Table> {
        None
    }

    fn tun_of(&self, _: IpAddr) -> Option<TunId> {
        Some(self.tun)
    }

    fn local_instances(&self) -> u32 {
        1
    }
}

fn covers(prefix: IpAddr, len: u8, address: IpAddr) -> bool {
    let differ = match (prefix, address) {
        (IpAddr::V4(prefix), IpAddr::V4(address)) => (u32::from(prefix) ^ u32::from(address)).leading_zeros(),
        (IpAddr::V6(prefix), IpAddr::V6(address)) => (u128::from(prefix) ^ u128::from(address)).leading_zeros(),
        _ => return false,
    };
    differ >= u32::from(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::build::{ip, udp};
    use crate::packet::parse;

    #[test]
    fn the_longest_prefix_counts_and_a_source_belongs_to_one_peer() -> Result<(), DropReason> {
        let near = PeerIndex(1);
        let prefixes = [([10, 0, 0, 0].into(), 8, PeerIndex(0)), ([10, 0, 7, 0].into(), 24, near)];
        let plain = PlainWireguard::unfiltered_for_interop(TunId(3), prefixes);
        let bytes = ip([10, 0, 7, 1].into(), [10, 0, 7, 9].into(), 17, &udp((1, 2), &[]));
        let packet = parse(&bytes)?;
        assert_eq!(plain.outbound(TunId(3), &packet)?.route, Route::Peer(near));
        assert_eq!(plain.inbound(near, &packet)?.route, Route::Here(TunId(3)));
        assert_eq!(plain.inbound(PeerIndex(0), &packet), Err(DropReason::SourceNotPeer));
        Ok(())
    }

    #[test]
    fn an_empty_mesh_knows_nobody() -> Result<(), DropReason> {
        let bytes = ip([10, 0, 7, 1].into(), [10, 0, 7, 9].into(), 17, &udp((1, 2), &[]));
        let packet = parse(&bytes)?;
        assert_eq!(Mesh::default().outbound(TunId(0), &packet), Err(DropReason::SourceNotLocal));
        assert_eq!(Mesh::default().inbound(PeerIndex(0), &packet), Err(DropReason::SourceNotPeer));
        Ok(())
    }
}
