//! What the API asks of the publisher: how hosts do right now.

use std::sync::Arc;

use cloison_proto::id::HostId;
use cloison_proto::version::Version;
use cloison_proto::view::Items;

use crate::policy::explain::LiveState;
use crate::publish::Hub;

/// Who knows how hosts do.
pub trait Live: LiveState + Send + Sync {
    /// The state that was compiled and offered last: what `applied` is measured against.
    fn published(&self) -> Version;

    /// Why the host refused the view offered last, if it did.
    fn refusal(&self, host: HostId) -> Option<String>;

    /// Where the host may be reached, in the order of trying.
    fn endpoints(&self, host: HostId) -> Vec<String>;

    /// Whether two machines use the host's keys.
    fn is_cloned(&self, host: HostId) -> bool;

    /// The items of the view that each host has in force, as far as they are known.
    fn in_force(&self) -> Vec<(HostId, Option<Arc<Items>>)>;

    /// Has the host's agent be asked for a new WireGuard key; whether it is linked, so that it can be.
    fn wish_for_key(&self, host: HostId) -> bool;
}

impl Live for Hub {
    fn published(&self) -> Version {
        self.progress().version
    }

    fn refusal(&self, host: HostId) -> Option<String> {
        Self::refusal(self, host).map(|refusal| format!("{}: {}", refusal.code, refusal.detail))
    }

    fn endpoints(&self, host: HostId) -> Vec<String> {
        Self::endpoints(self, host).iter().map(ToString::to_string).collect()
    }

    fn is_cloned(&self, host: HostId) -> bool {
        Self::is_cloned(self, host)
    }

    fn in_force(&self) -> Vec<(HostId, Option<Arc<Items>>)> {
        Self::in_force(self)
    }

    fn wish_for_key(&self, host: HostId) -> bool {
        Self::wish_for_key(self, host)
    }
}
