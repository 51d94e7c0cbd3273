//! The state machine of Cloison's data plane: bytes and `now` come in, bytes go out. No IO, no clock, no entropy, no threads.

#![forbid(unsafe_code)]
#![warn(missing_docs, clippy::indexing_slicing, clippy::as_conversions, clippy::expect_used)]

pub mod engine;
pub mod flow;
#[cfg(any(test, feature = "fuzz"))]
#[doc(hidden)]
pub mod fuzz;
pub mod install;
pub mod offload;
pub mod packet;
pub mod path_policy;
pub mod peer;
pub mod stats;
pub mod timer;
pub mod wg;
pub mod witness;
pub mod worker;

/// A TUN of this host, by a number that the shell gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TunId(pub u32);
