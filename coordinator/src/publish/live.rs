//! What the API asks about hosts, answered by the hub.

use cloison_proto::id::HostId;
use cloison_proto::version::Version;

use super::Hub;
use crate::api::Live;

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
}
