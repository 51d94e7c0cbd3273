//! The agent: everything around [`cloison_agent_core`] that touches the machine. Packets go through plain threads ([`worker`]); what the
//! machine must look like for them (TUNs, addresses, routes, the base table) is made by [`dataplane`] out of a view.
//!
//! Who stands on whom: `sys` (all unsafe) <- `udp`, `netlink`, `manager` <- `attach` <- `worker`, `dataplane`. Beside them `state` <- `control` <- `enroll`: what is on disk, and
//! the link with the coordinator.

pub mod answer;
pub mod args;
pub mod attach;
pub mod bundle;
pub mod cmd;
pub mod config;
pub mod control;
pub mod dataplane;
pub mod denials;
pub mod doctor;
pub mod enroll;
pub mod first_start;
pub mod manager;
pub mod names;
pub mod netlink;
pub mod run;
pub mod state;
pub mod status;
pub mod sys;
pub mod telemetry;
pub mod udp;
pub mod witness;
pub mod worker;
