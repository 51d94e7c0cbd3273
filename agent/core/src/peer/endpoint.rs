//! Where a peer is on the underlay.
//!
//! The *current* endpoint is where the last authenticated message came from that cannot be a recording: data, or the answer to an
//! initiation of ours. An accepted initiation is answered to where it came from but moves nothing, as anybody can send an old one again
//! from elsewhere; the initiator's first message moves the endpoint a round trip later. Cookie replies never do. *Candidates* are hints:
//! initiations try the current endpoint and them in turn; data goes to the current one alone.

use std::net::{IpAddr, SocketAddr};

/// Most candidates of one peer (DESIGN: hints).
pub const MAX_CANDIDATES: usize = 8;

/// Where to send, and from which of our addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endpoint {
    /// The peer's address and port.
    pub remote: SocketAddr,
    /// The address of ours that the peer knows, if it is known.
    pub local: Option<IpAddr>,
}

/// The endpoints of one peer.
#[derive(Debug, Default)]
pub struct Endpoints {
    current: Option<Endpoint>,
    candidates: Vec<SocketAddr>,
    /// Which one the next initiation goes to.
    turn: usize,
}

impl Endpoints {
    /// The endpoint that data is sent to.
    #[must_use]
    pub const fn current(&self) -> Option<Endpoint> {
        self.current
    }

    /// Takes note of where an authentic, fresh message came from; whether that is news.
    pub fn roam(&mut self, remote: SocketAddr, local: Option<IpAddr>) -> bool {
        let seen = Endpoint { remote, local };
        self.turn = 0;
        self.current.replace(seen).is_none_or(|before| before.remote != remote)
    }

    /// Takes the last authenticated endpoint from before a restart, unless a newer one is known.
    pub fn remember(&mut self, remote: SocketAddr) {
        if self.current.is_none() && is_usable(remote) {
            self.current = Some(Endpoint { remote, local: None });
        }
    }

    /// Replaces the candidates; unusable ones and those beyond [`MAX_CANDIDATES`] are ignored.
    pub fn set_candidates(&mut self, candidates: impl IntoIterator<Item = SocketAddr>) {
        let mut usable: Vec<_> = candidates
            .into_iter()
            .filter(|candidate| is_usable(*candidate))
            .take(MAX_CANDIDATES)
            .collect();
        usable.dedup();
        if self.candidates != usable {
            (self.candidates, self.turn) = (usable, 0);
        }
    }

    /// How many different ones there are to try.
    #[must_use]
    pub fn known(&self) -> usize {
        usize::from(self.current.is_some()).saturating_add(self.others().count())
    }

    /// Where the next initiation goes: the current endpoint, then the candidates, and round again.
    pub fn next_target(&mut self) -> Option<Endpoint> {
        let turn = self.turn.checked_rem(self.known())?;
        self.turn = turn.saturating_add(1);
        let candidate = |remote| Endpoint { remote, local: None };
        self.current.into_iter().chain(self.others().map(candidate)).nth(turn)
    }

    fn others(&self) -> impl Iterator<Item = SocketAddr> {
        let current = self.current.map(|endpoint| endpoint.remote);
        self.candidates.iter().copied().filter(move |candidate| Some(*candidate) != current)
    }
}

/// Never loopback, link-local, multicast, unspecified or broadcast, and a port.
fn is_usable(candidate: SocketAddr) -> bool {
    let address = candidate.ip().to_canonical();
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    candidate.port() != 0 && !(link_local || address.is_loopback() || address.is_multicast() || address.is_unspecified())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(last: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, last], 51_820))
    }

    fn remotes(endpoints: &mut Endpoints, n: usize) -> Vec<SocketAddr> {
        (0..n)
            .filter_map(|_| endpoints.next_target())
            .map(|endpoint| endpoint.remote)
            .collect()
    }

    #[test]
    fn initiations_try_each_in_turn_the_current_one_first() {
        let mut endpoints = Endpoints::default();
        assert_eq!(endpoints.next_target(), None);
        endpoints.set_candidates([at(1), at(2), at(3)]);
        assert_eq!(remotes(&mut endpoints, 4), [at(1), at(2), at(3), at(1)]);
        assert!(endpoints.roam(at(2), None));
        assert_eq!(remotes(&mut endpoints, 4), [at(2), at(1), at(3), at(2)]);
        assert!(!endpoints.roam(at(2), None));
    }

    #[test]
    fn hints_that_cannot_be_anybody_are_ignored() {
        let mut endpoints = Endpoints::default();
        let bad = [
            "127.0.0.1:1",
            "169.254.1.1:1",
            "224.0.0.1:1",
            "0.0.0.0:1",
            "[::1]:1",
            "[fe80::1]:1",
            "[ff02::1]:1",
            "192.0.2.1:0",
        ];
        endpoints.set_candidates(bad.into_iter().filter_map(|text| text.parse().ok()));
        assert_eq!(endpoints.known(), 0);
        endpoints.set_candidates((0..20).map(at));
        assert_eq!(endpoints.known(), MAX_CANDIDATES);
    }

    #[test]
    fn what_was_remembered_never_replaces_what_was_seen() {
        let mut endpoints = Endpoints::default();
        endpoints.roam(at(1), None);
        endpoints.remember(at(2));
        assert_eq!(endpoints.current().map(|endpoint| endpoint.remote), Some(at(1)));
    }
}
