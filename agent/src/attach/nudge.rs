//! A nudge: something on this host changed that the data plane depends on, so it is to be looked at now and not at the next time.

use std::sync::Arc;

use tokio::sync::Notify;

/// Tells the agent's loop that something changed. Nudges given before one is heard are one.
#[derive(Debug, Clone, Default)]
pub struct Nudge(Arc<Notify>);

impl Nudge {
    /// Something changed.
    pub fn give(&self) {
        self.0.notify_one();
    }

    /// Waits until something changed.
    pub async fn heard(&self) {
        self.0.notified().await;
    }
}
