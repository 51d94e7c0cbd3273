//! The simulation: hosts in memory, on virtual time, over simulated wires.
//!
//! What runs here is what ships: the agent's engine and the coordinator's compiler. Simulated are the cryptography
//! ([`cloison_agent_core::wg::trivial`]), the time and the wires. One seed gives one run, to the bit.
//!
//! - [`host`]: a data plane with its TUNs. [`hostile`]: a host whose agent is not ours, and what it may try.
//! - [`network`]: the underlay. [`random`]: where chance comes from. [`clock`]: what time it is.
//! - [`inventory`]: views by the real compiler without a store, for tests of two or three hosts.

pub mod clock;
pub mod host;
pub mod hostile;
pub mod inventory;
pub mod network;
pub mod random;
