//! One link as the hub holds it: a bell without a message, and the reason for which the link has to end.

use std::sync::OnceLock;
use std::time::Duration;

use tokio::sync::Notify;

/// Why a link ends from this side. The codes are those of [`cloison_proto::control::coordinator::Goodbye`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Farewell {
    /// The host was revoked.
    Revoked,
    /// The host has a newer link.
    Replaced,
    /// The agent sent more frames than it may.
    Rate,
    /// The certificate that the link was opened with ran out.
    Expired,
    /// The coordinator stops.
    Shutdown,
}

impl Farewell {
    /// Stable code.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Revoked => "revoked",
            Self::Replaced => "replaced",
            Self::Rate => "rate",
            Self::Expired => "expired",
            Self::Shutdown => "shutdown",
        }
    }

    /// How long the agent shall wait before it links again.
    #[must_use]
    pub const fn retry_after(self) -> Duration {
        match self {
            Self::Revoked => Duration::from_secs(3600),
            Self::Replaced | Self::Rate => Duration::from_secs(60),
            Self::Expired => Duration::ZERO,
            Self::Shutdown => Duration::from_secs(5),
        }
    }
}

/// One link as the hub knows it.
#[derive(Debug, Default)]
pub struct Slot {
    wake: Notify,
    farewell: OnceLock<Farewell>,
}

impl Slot {
    /// Waits until there may be something new for this link. News that came before the call are not missed.
    pub async fn woken(&self) {
        self.wake.notified().await;
    }

    /// Why the link has to end, if it has to.
    #[must_use]
    pub fn farewell(&self) -> Option<Farewell> {
        self.farewell.get().copied()
    }

    pub(super) fn wake(&self) {
        self.wake.notify_one();
    }

    pub(super) fn dismiss(&self, farewell: Farewell) {
        // The first reason stands.
        let _ = self.farewell.set(farewell);
        self.wake();
    }
}
