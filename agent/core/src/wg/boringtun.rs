//! The seam's implementation with boringtun 0.7.1. No other file names that crate, so that another one can replace it.
//!
//! What this file makes up for, each found in its source:
//! - Buffers that are too small are a panic there and a refusal here. Counters at their limit never reach it ([`Datagram::parse`]).
//! - `encapsulate` without keys queues the packet inside and begins a handshake; here it is never called without keys. Whether there are
//!   any changes only when a datagram is opened and when time passes, so it is asked then, not per packet.
//! - Its clock is read by `update_timers` alone. New keys are dated by the last call: after a long gap they would expire at once, and two
//!   handshakes between two calls look equally new. So the timers are brought up to date before each handshake message.
//! - Its limiter has one count for all senders. Here it only checks mac1 (one that never limits) or mac1 and mac2 (one that always does);
//!   whom to ask for which is decided outside ([`super::limit`]).
//! - The `Debug` of its internals prints pre-shared keys: nothing of it is ever formatted.
//!
//! What stays as it is there: a replay window of 1,024 messages, cookies bound to the address without the port, no padding to 16 bytes.
//! This is the only place of the core that reads a clock and draws randomness (I7).

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use cloison_proto::key::{Secret32, WgPrivateKey, WgPublicKey};
use cloison_proto::verdict::DropReason;
use cloison_proto::version::Timestamp;

use super::classify::word;
use super::{Checked, Datagram, LocalKey, Message, Opened, Proof, Sealed, Session, SessionIndex, Ticked};
use super::{INITIATION_LEN, OVERHEAD, REJECT_AFTER_TIME};

/// A local key for WireGuard as the world speaks it.
pub struct BoringKey {
    secret: StaticSecret,
    public: WgPublicKey,
    /// Checks mac1 and nothing else; also given to each session, which checks again.
    open: Arc<RateLimiter>,
    /// Demands mac2 of every message.
    strict: RateLimiter,
}

impl LocalKey for BoringKey {
    type Session = BoringSession;

    fn new(key: &WgPrivateKey) -> Self {
        let secret = key.to_secret();
        let public = PublicKey::from(&secret);
        Self {
            secret,
            public: key.public(),
            open: Arc::new(RateLimiter::new(&public, u64::MAX)),
            strict: RateLimiter::new(&public, 0),
        }
    }

    fn public(&self) -> &WgPublicKey {
        &self.public
    }

    fn session(&self, peer: &WgPublicKey, psk: Option<&Secret32>, index: SessionIndex) -> BoringSession {
        let (secret, peer) = (self.secret.clone(), PublicKey::from(*peer.as_bytes()));
        let psk = psk.map(|secret| *secret.expose());
        BoringSession {
            tunn: Tunn::new(secret, peer, psk, None, index.get(), Some(self.open.clone())),
            initiated: None,
            pending: None,
            established: None,
            has_keys: false,
            round_trip: None,
        }
    }

    fn check(&self, datagram: &Datagram<'_>, from: IpAddr, proof: Proof, reply: &mut [u8]) -> Checked {
        let limiter = match proof {
            Proof::Key => &*self.open,
            Proof::Address => &self.strict,
        };
        match limiter.verify_packet(Some(from), datagram.bytes(), reply) {
            Ok(_) => Checked::Passed,
            Err(TunnResult::WriteToNetwork(cookie)) => Checked::Cookie(cookie.len()),
            Err(_) => Checked::BadMac,
        }
    }

    fn initiator(&self, datagram: &Datagram<'_>) -> Option<WgPublicKey> {
        let Ok(Packet::HandshakeInit(initiation)) = Tunn::parse_incoming_packet(datagram.bytes()) else {
            return None;
        };
        let public = PublicKey::from(*self.public.as_bytes());
        let half = parse_handshake_anon(&self.secret, &public, &initiation).ok()?;
        WgPublicKey::from_bytes(half.peer_static_public).ok()
    }
}

/// A session of WireGuard as the world speaks it.
pub struct BoringSession {
    tunn: Tunn,
    /// When the initiation went out that awaits its response.
    initiated: Option<Timestamp>,
    /// The keys of our last response: their receiver field, and when they were agreed. They are used once the initiator has shown that it
    /// has them.
    pending: Option<(u32, Timestamp)>,
    /// When the keys in use were agreed.
    established: Option<Timestamp>,
    /// Whether the library would seal rather than queue.
    has_keys: bool,
    round_trip: Option<Duration>,
}

impl Session for BoringSession {
    fn seal(&mut self, inner: &[u8], out: &mut [u8], now: Timestamp) -> Sealed {
        if !fits(out, inner.len().saturating_add(OVERHEAD)) {
            return Sealed::Refused(DropReason::TooBig);
        }
        if self.established(now).is_none() {
            return Sealed::NoSession;
        }
        match self.tunn.encapsulate(inner, out) {
            TunnResult::WriteToNetwork(datagram) => Sealed::Datagram(datagram.len()),
            TunnResult::Done | TunnResult::Err(_) | TunnResult::WriteToTunnelV4(..) | TunnResult::WriteToTunnelV6(..) => {
                Sealed::Refused(DropReason::Session)
            }
        }
    }

    fn open(&mut self, datagram: &Datagram<'_>, out: &mut [u8], now: Timestamp) -> Opened {
        if !fits(out, datagram.bytes().len()) {
            return Opened::Refused(DropReason::TooBig);
        }
        if datagram.is_handshake() {
            self.catch_up();
        }
        let opened = match (self.tunn.decapsulate(None, datagram.bytes(), out), datagram.message()) {
            (TunnResult::WriteToTunnelV4(inner, _) | TunnResult::WriteToTunnelV6(inner, _), _) => Opened::Packet(inner.len()),
            (TunnResult::WriteToNetwork(message), Message::Initiation) => {
                self.pending = word(message, 4).map(|receiver| (receiver, now));
                Opened::Accepted(message.len())
            }
            (TunnResult::WriteToNetwork(message), Message::Response { .. }) => Opened::Established(message.len()),
            (TunnResult::Done, Message::Data { .. }) => Opened::Keepalive,
            (TunnResult::Done, Message::Cookie { .. }) => Opened::Cookie,
            (TunnResult::Err(error), _) => Opened::Refused(reason(&error)),
            (TunnResult::Done | TunnResult::WriteToNetwork(_), _) => Opened::Refused(DropReason::Session),
        };
        self.note_keys(&opened, datagram.message(), now);
        opened
    }

    fn initiate(&mut self, out: &mut [u8], now: Timestamp) -> Option<usize> {
        if !fits(out, INITIATION_LEN) {
            return None;
        }
        self.catch_up();
        match self.tunn.format_handshake_initiation(out, true) {
            TunnResult::WriteToNetwork(initiation) => {
                self.initiated = Some(now);
                Some(initiation.len())
            }
            TunnResult::Done | TunnResult::Err(_) | TunnResult::WriteToTunnelV4(..) | TunnResult::WriteToTunnelV6(..) => None,
        }
    }

    fn tick(&mut self, out: &mut [u8], now: Timestamp) -> Ticked {
        if !fits(out, INITIATION_LEN) {
            return Ticked::Quiet;
        }
        let ticked = match self.tunn.update_timers(out) {
            TunnResult::WriteToNetwork(message) => match message.len() {
                INITIATION_LEN => Ticked::Initiation(INITIATION_LEN),
                len => Ticked::Keepalive(len),
            },
            TunnResult::Err(WireGuardError::ConnectionExpired) => Ticked::Expired,
            TunnResult::Done | TunnResult::Err(_) | TunnResult::WriteToTunnelV4(..) | TunnResult::WriteToTunnelV6(..) => Ticked::Quiet,
        };
        self.has_keys = self.tunn.time_since_last_handshake().is_some();
        if matches!(ticked, Ticked::Initiation(_)) {
            self.initiated = Some(now);
        }
        ticked
    }

    fn established(&self, now: Timestamp) -> Option<Timestamp> {
        self.established
            .filter(|agreed| self.has_keys && now.since(*agreed) < REJECT_AFTER_TIME)
    }

    fn round_trip(&self) -> Option<Duration> {
        self.round_trip
    }
}

impl BoringSession {
    /// Notes which keys are in use after a datagram was opened.
    fn note_keys(&mut self, opened: &Opened, message: Message, now: Timestamp) {
        match (opened, message) {
            (Opened::Established(_), _) => {
                self.round_trip = self.initiated.take().map(|sent| now.since(sent));
                self.established = Some(now);
            }
            (Opened::Packet(_) | Opened::Keepalive, Message::Data { receiver, .. }) => {
                let Some((_, agreed)) = self.pending.take_if(|(pending, _)| *pending == receiver) else {
                    return;
                };
                self.established = self.established.max(Some(agreed));
            }
            _ => return,
        }
        self.has_keys = self.tunn.time_since_last_handshake().is_some();
    }

    /// Brings the timers up to date before a handshake message. What they ask for meanwhile is lost, and made up for by the handshake.
    fn catch_up(&mut self) {
        let mut lost = [0; INITIATION_LEN];
        self.tunn.update_timers(&mut lost);
        self.has_keys = self.tunn.time_since_last_handshake().is_some();
    }
}

/// Whether `out` has room for `len` bytes, and for the longest handshake message, which the library asks for at any time.
fn fits(out: &[u8], len: usize) -> bool {
    out.len() >= len.max(INITIATION_LEN)
}

fn reason(error: &WireGuardError) -> DropReason {
    match error {
        WireGuardError::InvalidCounter | WireGuardError::DuplicateCounter | WireGuardError::WrongTai64nTimestamp => DropReason::Replay,
        WireGuardError::InvalidAeadTag | WireGuardError::WrongKey | WireGuardError::InvalidTai64nTimestamp => DropReason::BadAuth,
        WireGuardError::InvalidMac => DropReason::BadMac,
        WireGuardError::UnderLoad => DropReason::HandshakeLimit,
        WireGuardError::NoCurrentSession | WireGuardError::WrongIndex | WireGuardError::UnexpectedPacket => DropReason::UnknownSession,
        // The form of the message was checked before; what is left is an inner packet that does not hold together.
        WireGuardError::InvalidPacket => DropReason::Malformed,
        WireGuardError::DestinationBufferTooSmall
        | WireGuardError::IncorrectPacketLength
        | WireGuardError::WrongPacketType
        | WireGuardError::LockFailed
        | WireGuardError::ConnectionExpired => DropReason::Session,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wg::contract::{contract, keys};

    #[test]
    fn boringtun_keeps_the_contract() -> Result<(), String> {
        contract::<BoringKey>()
    }

    #[test]
    fn a_packet_without_keys_is_not_taken_into_the_library() {
        let (one, two) = keys();
        let mut session = BoringKey::new(&one).session(&two.public(), None, SessionIndex::of_receiver(0x100));
        let mut out = [0; 2_048];
        for _ in 0..300 {
            assert_eq!(session.seal(&[0x45; 40], &mut out, Timestamp(1)), Sealed::NoSession);
        }
        assert!(matches!(session.tunn.decapsulate(None, &[], &mut out), TunnResult::Done));
    }
}
