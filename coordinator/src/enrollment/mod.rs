//! From a token to a host.

pub mod token;
