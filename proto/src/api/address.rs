//! Where coordinators listen, as the API shows it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::version::MeshTime;

/// All addresses that hosts are told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AddressList {
    /// In the order in which they were added.
    pub addresses: Vec<AddressSummary>,
}

/// One address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AddressSummary {
    /// `host:port`.
    pub address: String,
    /// Unix second from which on hosts use it.
    #[schema(value_type = u64)]
    pub since: MeshTime,
}

/// An address to be added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddressRequest {
    /// `host:port`: a name or an address of the coordinator, as hosts reach it.
    pub address: String,
}
