//! The simulation: hosts and a coordinator in memory, one virtual clock, a network that loses, doubles, delays, reorders and partitions.
//!
//! What runs here is what ships: the agent's engine and link, the coordinator's store (in memory), compiler, publisher and sessions. Simulated
//! are the cryptography ([`cloison_agent_core::wg::trivial`]), the time and the wires. One seed gives one run, to the bit.
//!
//! - [`host`]: a data plane with its TUNs. [`hostile`]: a host whose agent is not ours, and what it may try.
//! - [`network`]: the underlay. [`random`]: where chance comes from. [`clock`]: what time it is.
//! - [`inventory`]: views by the real compiler without a store, for tests of two or three hosts.
//! - [`coordinator`], [`member`]: both ends of a link. [`world`]: all of it together.
//! - [`history`]: what was allowed when, by the naive evaluator. [`invariant`]: what must hold of every packet.
//! - [`scenario`]: things that happen, drawn by chance, and what must be true in the end.

pub mod clock;
pub mod coordinator;
pub mod history;
pub mod host;
pub mod hostile;
pub mod invariant;
pub mod inventory;
pub mod member;
pub mod network;
pub mod random;
pub mod scenario;
pub mod world;
