//! The seam: all that the engine asks of WireGuard's cryptography, in two traits. One file implements them with boringtun, another one
//! without any secrecy for simulations; both pass the same contract suite (`contract.rs`).
//!
//! A session is one pair of static keys and one pre-shared key. It never queues packets, never learns addresses and never decides by
//! itself to begin a handshake where none was begun: pace, endpoints and queues are the engine's. Buffers that are too small are refused,
//! never a panic.

use std::net::IpAddr;
use std::time::Duration;

use cloison_proto::key::{Secret32, WgPrivateKey, WgPublicKey};
use cloison_proto::verdict::DropReason;
use cloison_proto::version::Timestamp;

use super::{Datagram, SessionIndex};

/// A local WireGuard key: makes sessions, and stands guard before them.
pub trait LocalKey: Send + Sync + Sized + 'static {
    /// The sessions of this key.
    type Session: Session;

    /// Takes the private key into use.
    fn new(key: &WgPrivateKey) -> Self;

    /// The public half.
    fn public(&self) -> &WgPublicKey;

    /// A session with `peer`, without any keys yet. The peer finds it by `index`.
    fn session(&self, peer: &WgPublicKey, psk: Option<&Secret32>, index: SessionIndex) -> Self::Session;

    /// Whether a handshake message brings `proof`. A cookie for a sender that lacks [`Proof::Address`] is written to `reply`, which
    /// should hold [`super::COOKIE_REPLY_LEN`] bytes; without that room the message is refused.
    fn check(&self, datagram: &Datagram<'_>, from: IpAddr, proof: Proof, reply: &mut [u8]) -> Checked;

    /// The static key that an initiation names, if it was encrypted to this key. Costs one agreement: ask [`LocalKey::check`] first. What
    /// the answer says is not authenticated yet.
    fn initiator(&self, datagram: &Datagram<'_>) -> Option<WgPublicKey>;
}

/// What a handshake message must prove before work is spent on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// That its sender knows this host's public key: mac1 (WireGuard paper, section 5.4.4).
    Key,
    /// Also that its sender receives at its source address: mac2 (section 5.3).
    Address,
}

/// What became of a handshake message's proof.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checked {
    /// It is there.
    Passed,
    /// mac1 is wrong for this key: to be answered with silence.
    BadMac,
    /// mac1 is right and mac2 is not: a cookie of that many bytes is in the reply buffer.
    Cookie(usize),
}

/// One session with one peer.
pub trait Session: Send + 'static {
    /// Encrypts `inner` (empty: a keepalive) into `out`, which must hold [`super::INITIATION_LEN`] bytes and [`super::OVERHEAD`] more than
    /// `inner`.
    fn seal(&mut self, inner: &[u8], out: &mut [u8], now: Timestamp) -> Sealed;

    /// Takes a datagram that names this session. Inner packets and answers are written to `out`, which must be as long as the datagram and
    /// hold [`super::INITIATION_LEN`] bytes.
    fn open(&mut self, datagram: &Datagram<'_>, out: &mut [u8], now: Timestamp) -> Opened;

    /// Writes an initiation to `out`, whether or not another one is under way; its length, or `None` without room for it.
    fn initiate(&mut self, out: &mut [u8], now: Timestamp) -> Option<usize>;

    /// Lets time pass: to be called several times a second while the session exists. `out` must hold [`super::INITIATION_LEN`] bytes.
    fn tick(&mut self, out: &mut [u8], now: Timestamp) -> Ticked;

    /// When the keys in use for sending were agreed; `None` if there are none, or if they are too old to be used.
    fn established(&self, now: Timestamp) -> Option<Timestamp>;

    /// How long the last answered initiation took.
    fn round_trip(&self) -> Option<Duration>;
}

/// What became of a packet to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sealed {
    /// A datagram of that many bytes is in the buffer.
    Datagram(usize),
    /// There are no keys to send with: the packet was not taken.
    NoSession,
    /// The packet cannot be sent.
    Refused(DropReason),
}

/// What became of a datagram. All but `Cookie` and `Refused` are authenticated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opened {
    /// An inner packet of that many bytes is in the buffer. It begins like IPv4 or IPv6 and is as long as its header says; nothing else
    /// about it is known.
    Packet(usize),
    /// An empty message: the peer is there.
    Keepalive,
    /// An initiation was accepted; a response of that many bytes is in the buffer. It may be a recording of an old one, so nothing but the
    /// response may be sent to where it came from.
    Accepted(usize),
    /// Our initiation was answered and the session has new keys; a first message of that many bytes is in the buffer.
    Established(usize),
    /// A cookie for the next handshake message was noted.
    Cookie,
    /// The datagram changed nothing.
    Refused(DropReason),
}

/// What the passing of time asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ticked {
    /// Nothing.
    Quiet,
    /// A keepalive of that many bytes is in the buffer.
    Keepalive(usize),
    /// An initiation of that many bytes is in the buffer.
    Initiation(usize),
    /// There are no keys, and handshakes have been given up: the session does nothing until it is told to initiate.
    Expired,
}
