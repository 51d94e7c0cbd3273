//! Messages from an agent on its link. None has a field for an overlay address, a name or a label: a host never claims those.

use std::net::SocketAddr;

use minicbor::{Decode, Encode};

use super::frame::{Frame, FrameError, Message};
use super::rotate::{KeyOffer, KeyProof};
use crate::label::ComponentName;
use crate::signed::Signed;
use crate::version::{MeshTime, Version};
use crate::view::StateHash;

/// Most endpoint candidates of one host.
pub const MAX_ENDPOINTS: usize = 8;

/// Longest text that an agent may send as a detail, in bytes; the rest is cut off.
pub const MAX_DETAIL: usize = 512;

/// Most instances that a report tells of one by one: a host has no more than a few.
pub const MAX_INSTANCES: usize = 256;

/// An underlay address and port, as text on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint(pub SocketAddr);

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(&self.0, f)
    }
}

impl std::str::FromStr for Endpoint {
    type Err = std::net::AddrParseError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

crate::wire::text_codec!(Endpoint);

/// The first message of a link.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Hello {
    /// The agent's software version, for people.
    #[n(0)]
    pub software: String,
    /// Version of the view in force, if there is one.
    #[n(1)]
    pub version: Option<Version>,
    /// State hash of the view in force, if there is one: the base for a delta.
    #[n(2)]
    pub state_hash: Option<StateHash>,
    /// Raised at each start and at each backward step of the wall clock.
    #[n(3)]
    pub incarnation: u64,
    /// Where peers may reach it, by its own knowledge.
    #[n(4)]
    pub endpoints: Vec<Endpoint>,
}

/// The view with this hash is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Ack {
    /// Its version.
    #[n(0)]
    pub version: Version,
    /// Its state hash.
    #[n(1)]
    pub state_hash: StateHash,
}

/// The view of this version was refused; the last good one stays in force.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Nack {
    /// Version that was refused.
    #[n(0)]
    pub version: Version,
    /// Stable code ([`crate::view::ViewError::code`], or `base_unknown`).
    #[n(1)]
    pub code: String,
    /// For people.
    #[n(2)]
    pub detail: String,
}

/// Where peers may reach this host: replaces what was said before.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Endpoints {
    /// Candidates.
    #[n(0)]
    pub endpoints: Vec<Endpoint>,
}

/// An instance that this agent cannot enforce.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Unenforced {
    /// The component.
    #[n(0)]
    pub component: ComponentName,
    /// Why, for people.
    #[n(1)]
    pub reason: String,
}

/// How an instance of this host is enforced, for people.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct InstanceReport {
    /// The component.
    #[n(0)]
    pub component: ComponentName,
    /// Stable code: `isolated`, `bound`, `shared`, `unenforced`; others may come.
    #[n(1)]
    pub state: String,
    /// By which namespace, container, unit or user, or why not.
    #[n(2)]
    pub by: String,
    /// What was denied to it or by it last, if anything was.
    #[n(3)]
    pub last_denial: Option<LastDenial>,
}

/// What was denied to a component or by it last. It says nothing about the other end.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct LastDenial {
    /// When, by the agent's mesh time.
    #[n(0)]
    pub at: MeshTime,
    /// Whether the component was the sender.
    #[n(1)]
    pub outbound: bool,
    /// Stable text of the reason ([`crate::verdict::DropReason::as_str`]).
    #[n(2)]
    pub reason: String,
}

/// How the agent does: replaces what was said before.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Report {
    /// What it cannot enforce.
    #[n(0)]
    pub unenforced: Vec<Unenforced>,
    /// Items of the view that it could not use.
    #[n(1)]
    pub ignored_items: u64,
    /// How each instance is enforced, [`MAX_INSTANCES`] at most; `None` from agents that do not tell.
    #[n(2)]
    pub instances: Option<Vec<InstanceReport>>,
}

/// The view that this host has in force, as the coordinator signed it. To a coordinator that was restored from a backup it proves what that
/// one has forgotten; nothing else follows from it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Held {
    /// The signed header.
    #[n(0)]
    pub view: Signed,
}

/// Asks for a new certificate for the identity key of this link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct RenewCertificate {}

macro_rules! messages {
    ($(#[$doc:meta])* $name:ident { $($kind:literal $message:ident,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub enum $name {
            $(#[doc = concat!("[`", stringify!($message), "`]")] $message($message),)*
        }

        $(impl Message for $message { const KIND: u16 = $kind; }

        impl From<$message> for $name {
            fn from(message: $message) -> Self {
                Self::$message(message)
            }
        })*

        impl $name {
            /// The message as a frame.
            #[must_use]
            pub fn to_frame(&self) -> Frame {
                match self { $(Self::$message(m) => m.to_frame(),)* }
            }

            /// The message in a frame; `None` for a kind that is not known.
            ///
            /// # Errors
            /// [`FrameError::Malformed`].
            pub fn from_frame(frame: &Frame) -> Result<Option<Self>, FrameError> {
                match frame.kind {
                    $($kind => $message::from_frame(frame).map(|m| Some(Self::$message(m))),)*
                    _ => Ok(None),
                }
            }
        }
    };
}
pub(super) use messages;

messages! {
    /// Any message from an agent.
    AgentMessage {
        1 Hello,
        2 Ack,
        3 Nack,
        4 Endpoints,
        5 Report,
        6 RenewCertificate,
        7 KeyOffer,
        8 Held,
        9 KeyProof,
    }
}
