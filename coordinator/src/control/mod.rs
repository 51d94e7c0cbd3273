//! The control listener: hosts' links and enrollments, over QUIC.
//!
//! [`listener`] accepts, knows who is at the other end by its certificate, and hands the connection on; [`join`] makes a host out of a token;
//! [`link`] is the state machine of one link, without IO or clock; [`session`] stands between a link and the publisher's
//! [`Hub`](crate::publish::Hub), equally without IO, so that the simulation drives what ships; [`serve`] moves its bytes.

pub mod join;
pub mod limit;
pub mod link;
pub mod listener;
mod serve;
pub mod session;
