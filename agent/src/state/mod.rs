//! What the agent keeps: keys, membership, the view in force with its lease, and small counters. Every file is verified when it is read
//! ([`files`]); a damaged one is an error that names the file and the remedy, never a panic and never an empty policy.
//!
//! Nothing here speaks to the coordinator or to the kernel's network.

pub mod clock;
pub mod files;
pub mod identity;
pub mod incarnation;
pub mod keys;
pub mod view_cache;
pub mod wg_keys;

pub use files::{File, StateDir, StateError};
