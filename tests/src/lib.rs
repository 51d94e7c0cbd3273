//! What tests of the whole are made of: the lab (real programs in network namespaces on one wire).
//!
//! Nothing here ships. The crate depends on all others; none depends on it.

#![forbid(unsafe_code)]

pub mod lab;
pub mod model;
pub mod packets;
pub mod seeds;
pub mod sim;
