//! What tests of the whole are made of: the lab (real programs in network namespaces on one wire), machines that boot a real systemd, an
//! in-memory simulation and a naive model.
//!
//! Nothing here ships. The crate depends on all others; none depends on it.

#![forbid(unsafe_code)]

pub mod lab;
pub mod machines;
pub mod model;
pub mod packets;
pub mod seeds;
pub mod sim;
