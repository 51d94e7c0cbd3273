//! What becomes of a packet: allowed by a rule, or dropped for exactly one reason. One enum for agent, metrics, command line and docs.

use std::fmt;

use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $code:literal, $text:literal;)*) => {
        /// Why a packet was dropped (I8: each dropped packet has exactly one).
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize, ToSchema)]
        #[cbor(index_only)]
        pub enum DropReason {
            $($(#[doc = $doc])+ #[n($code)] #[serde(rename = $text)] $name,)*
        }

        impl DropReason {
            /// Every reason, in the order of the codes: the position is the reason's index in tables of counters.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// Stable text of the reason: a metric's label, a column in `status`, a heading in the docs.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// Position in [`DropReason::ALL`].
            #[must_use]
            pub const fn index(self) -> usize {
                match self { $(Self::$name => $code,)* }
            }

            /// What the reason means, in a sentence.
            #[must_use]
            pub const fn explanation(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+).trim_ascii(),)* }
            }
        }
    };
}

drop_reasons! {
    /// No view is in force: nothing was ever received, or it could not be read.
    NoView = 0, "no_view";
    /// The lease of the view has ended: nothing passes until the coordinator renews it.
    LeaseEnded = 1, "lease_ended";
    /// No rule in force allows this.
    NoRule = 2, "no_rule";
    /// The rule that would allow this has expired.
    RuleExpired = 3, "rule_expired";
    /// The source address is not an instance of the TUN that the packet came from.
    SourceNotLocal = 4, "source_not_local";
    /// The source address does not belong to the peer whose keys decrypted the packet.
    SourceNotPeer = 5, "source_not_peer";
    /// The destination address is no instance that this host knows.
    UnknownDestination = 6, "unknown_destination";
    /// The destination address is not an instance of this host.
    DestinationNotLocal = 7, "destination_not_local";
    /// Not IPv4 or IPv6, or a length or header that does not hold together.
    Malformed = 8, "malformed";
    /// An inner fragment: its ports cannot be known.
    Fragment = 9, "fragment";
    /// IPv4 options.
    IpOptions = 10, "ip_options";
    /// An IPv6 extension header.
    ExtensionHeader = 11, "extension_header";
    /// A multicast, broadcast, loopback, unspecified, link-local or v4-mapped address.
    BadAddress = 12, "bad_address";
    /// A protocol other than TCP, UDP and ICMP.
    Protocol = 13, "protocol";
    /// An ICMP message that is neither echo nor an error quoting a live flow.
    Icmp = 14, "icmp";
    /// A TCP segment that opens nothing and belongs to no flow.
    NoFlow = 15, "no_flow";
    /// The pair or the instance has as many flows as it may have.
    FlowQuota = 16, "flow_quota";
    /// Too many packets wait for the handshake with this peer.
    QueueFull = 17, "queue_full";
    /// The handshake with this peer did not come about in time.
    HandshakeTimeout = 18, "handshake_timeout";
    /// No endpoint of this peer is known.
    NoEndpoint = 19, "no_endpoint";
    /// A datagram that is no WireGuard message.
    NotWireGuard = 20, "not_wireguard";
    /// A handshake message with a wrong mac1: the sender does not know this host's key.
    BadMac = 21, "bad_mac";
    /// A handshake message from a key that is no peer's.
    UnknownPeer = 22, "unknown_peer";
    /// A message for a session index that does not exist.
    UnknownSession = 23, "unknown_session";
    /// More handshake messages from this source than the budget allows.
    HandshakeLimit = 24, "handshake_limit";
    /// A message that does not authenticate.
    BadAuth = 25, "bad_auth";
    /// A message that was received before, or is too old for the replay window.
    Replay = 26, "replay";
    /// A message counter at or beyond the limit of its session.
    CounterLimit = 27, "counter_limit";
    /// More segments of this pair were passed without a flow than a second allows.
    MidStreamLimit = 28, "mid_stream_limit";
    /// A packet larger than the TUN takes.
    TooBig = 29, "too_big";
    /// The session layer refused the packet for a reason of its own.
    Session = 30, "session";
    /// The kernel took no more: a socket's or a TUN's queue was full.
    Congestion = 31, "congestion";
    /// A namespace's TUN is gone.
    TunGone = 32, "tun_gone";
    /// This instance's attachment cannot be enforced on this host.
    Unenforced = 33, "unenforced";
    /// The destination was withdrawn while the packet waited for the handshake.
    Withdrawn = 34, "withdrawn";
    /// The socket that sent this, or the one that would get it, is not of the component whose address it uses.
    NotOwner = 35, "not_owner";
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_positions_and_texts_are_unique() {
        let mut texts = std::collections::BTreeSet::new();
        for (position, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(reason.index(), position, "{reason}");
            assert!(texts.insert(reason.as_str()), "{reason} twice");
            assert!(reason.explanation().ends_with('.'), "{reason}");
            assert_eq!(
                serde_json::to_value(reason).ok(),
                Some(reason.as_str().into()),
                "one text everywhere"
            );
        }
    }
}
