//! WireGuard: what a datagram is, and the seam behind which the protocol's cryptography lives.
//!
//! A datagram is classified by type and exact length ([`Datagram::parse`]), which also refuses counters at their limit. Handshake messages
//! must prove that their sender knows this host's key (mac1) and, beyond the [budget](limit), that it receives at its address (mac2);
//! both are asked of the [`LocalKey`]. Everything else is asked of the [`Session`] whose [index] the datagram names. Packets for a peer
//! without a live session wait in [`queue`], never inside the session, so that they are judged when they are sealed.
//!
//! This module sends nothing, knows no endpoints and judges no inner packet: that is the engine's.

pub mod boringtun;
pub mod classify;
pub mod index;
pub mod limit;
pub mod queue;
pub mod session;
pub mod trivial;

#[cfg(test)]
mod contract;

use std::time::Duration;

pub use classify::{Datagram, Message};
pub use index::SessionIndex;
pub use session::{Checked, LocalKey, Opened, Proof, Sealed, Session, Ticked};

/// Bytes that a data message adds to an inner packet: type 4, receiver 4, counter 8, tag 16 (WireGuard paper, section 5.4.6).
pub const OVERHEAD: usize = 32;
/// Length of a handshake initiation (section 5.4.2).
pub const INITIATION_LEN: usize = 148;
/// Length of a handshake response (section 5.4.3).
pub const RESPONSE_LEN: usize = 92;
/// Length of a cookie reply (section 5.4.7).
pub const COOKIE_REPLY_LEN: usize = 64;
/// Messages at and beyond this counter are refused: 2^64 - 2^13 - 1 (section 6.1). The margin is the kernel's replay window.
pub const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
/// Age at which keys are replaced (section 6.1).
pub const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
/// Age beyond which keys are not used (section 6.1).
pub const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);
/// How long a handshake goes unanswered before it is tried again (section 6.1).
pub const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long handshakes are tried before the session gives up (section 6.1); the engine may begin anew.
pub const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);
/// After this silence, data that was received is answered by an empty message (section 6.1).
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
