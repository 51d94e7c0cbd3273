//! The contract between Cloison's parts: identifiers, keys, the policy language, views, the compiled table, and the frames that carry
//! them. No IO, no clock, no entropy: every function here is total over its input.
//!
//! Compatibility rules:
//! - What is signed or hashed is kept as the exact bytes received; nothing is re-encoded to be verified.
//! - Wire maps have numbered fields. A number is never used twice. An unknown *kind* of item or frame is ignored; an unknown *field* inside
//!   an item that grants makes that item grant nothing. Nothing unknown ever widens.
//! - Names, ids and addresses are parsed once, at the edge, into the types below; no bare `String` identifies anything.

#![forbid(unsafe_code)]
#![warn(missing_docs, clippy::indexing_slicing, clippy::as_conversions, clippy::expect_used)]

pub mod api;
pub mod control;
pub mod filter;
pub mod id;
pub mod key;
pub mod label;
pub mod lease;
pub mod net;
pub mod policy;
pub mod signed;
pub mod status;
pub mod token;
pub mod trust;
pub mod verdict;
pub mod version;
pub mod view;
mod wire;
