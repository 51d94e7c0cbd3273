//! From a policy and an inventory to what each host must know.
//!
//! [`Plan`] joins the two and indexes them; [`compile`] writes a host's view out of a plan, [`diff`] tells what a change of policy opens and
//! closes, [`explain`] answers who may talk to whom by asking both ends' compiled tables. All of it is pure: no clock, no store, no order
//! that depends on a hash. What a policy may say is judged where it is parsed, in `cloison-proto`.

pub mod compile;
pub mod diff;
pub mod explain;
mod plan;

pub use compile::ViewLimit;
pub use plan::{Conflict, Plan};
