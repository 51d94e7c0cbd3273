//! The agent: everything around [`cloison_agent_core`] that touches the machine. Packets go through plain threads ([`worker`]); what the
//! machine must look like for them (TUNs, addresses, routes, the base table) is made by [`dataplane`] out of a view.
//!
//! Who stands on whom: `sys` (all unsafe) <- `udp`, `netlink` <- `attach` <- `worker`, `dataplane`.

pub mod attach;
pub mod netlink;
pub mod sys;
pub mod udp;
