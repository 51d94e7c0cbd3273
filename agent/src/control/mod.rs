//! The agent's side of the link with a coordinator. [`link`] decides (pure: frames and times in, frames and views out), [`connection`]
//! moves bytes (the only folder that names quinn), [`verifier`] and [`certificate`] say which certificates are whose.
//!
//! A view on its way: frames -> [`assembly`] (items onto a copy of the base) -> `VerifiedView::open` -> held for its lease -> `Install` ->
//! the caller puts it in force and on disk -> `Ack`. Nothing unverified leaves this module.

pub mod assembly;
pub mod backoff;
pub mod candidates;
pub mod certificate;
pub mod connection;
pub mod link;
pub mod verifier;

#[cfg(test)]
pub(crate) mod testing;
