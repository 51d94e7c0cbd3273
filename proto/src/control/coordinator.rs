//! Messages from a coordinator on a link.
//!
//! A view goes as one [`ViewStart`], any number of [`ViewItems`] and one [`ViewEnd`]; nothing of it counts before the end came and the whole
//! was verified. Hints are unsigned and stand outside the view: they help to find peers, and permit nothing.

use minicbor::{Decode, Encode};

use super::agent::{Endpoint, messages};
use super::frame::{Frame, FrameError, Message};
use super::rotate::{KeyChallenge, KeyDenied, RotateKey};
use crate::id::HostId;
use crate::signed::Signed;
use crate::view::{Op, StateHash};

/// A view begins.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ViewStart {
    /// The signed header.
    #[n(0)]
    pub header: Signed,
    /// For a delta, the state hash of the view that the changes are for; `None` for a snapshot, which starts from nothing.
    #[n(1)]
    pub base: Option<StateHash>,
}

/// Items of a view: changes to the base.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ViewItems {
    /// In order.
    #[n(0)]
    pub ops: Vec<Op>,
}

/// The view is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ViewEnd {}

/// A lease for the view that was sent last.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct LeaseGrant {
    /// The signed lease ([`crate::lease::Lease`]).
    #[n(0)]
    pub lease: Signed,
}

/// Where a peer may be.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct PeerHint {
    /// The peer.
    #[n(0)]
    pub host: HostId,
    /// Candidates, in the order in which to try them.
    #[n(1)]
    pub endpoints: Vec<Endpoint>,
    /// The peer's incarnation; a raised one means that its sessions must be made anew.
    #[n(2)]
    pub incarnation: u64,
}

/// Hints for peers of the view: replaces what was said before about these peers.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Hints {
    /// One for each peer that something is known of.
    #[n(0)]
    pub peers: Vec<PeerHint>,
}

/// A new certificate for the link's identity key.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Certificate {
    /// DER of the leaf.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub der: Vec<u8>,
}

/// The link ends.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Goodbye {
    /// Stable code: `revoked`, `replaced`, `rate`, `shutdown`.
    #[n(0)]
    pub code: String,
    /// How long to wait before linking again, in seconds.
    #[n(1)]
    pub retry_after_secs: u64,
}

messages! {
    /// Any message from a coordinator.
    CoordinatorMessage {
        101 ViewStart,
        102 ViewItems,
        103 ViewEnd,
        104 LeaseGrant,
        105 Hints,
        106 Certificate,
        107 Goodbye,
        108 KeyChallenge,
        109 KeyDenied,
        110 RotateKey,
    }
}
