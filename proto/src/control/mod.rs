//! What agents and coordinators say to each other.
//!
//! **Link** (ALPN [`crate::trust::ALPN_LINK`], mutual TLS): the agent opens one bidirectional stream; both sides send [`frame::Frame`]s on it
//! until either closes. The agent speaks first, with [`agent::Hello`].
//!
//! **Join** (ALPN [`crate::trust::ALPN_JOIN`], server certificate only): one bidirectional stream, the coordinator speaks first, with a
//! [`join::Challenge`]; the agent answers with a [`join::JoinRequest`] or a [`join::RenewRequest`]; the coordinator answers once.
//!
//! A frame is `{kind, body}`. A reader skips kinds that it does not know; numbers are never used twice.

pub mod agent;
pub mod coordinator;
pub mod frame;
pub mod join;
pub mod rotate;
