//! Flows: a cache of verdicts, not a connection tracker.
//!
//! Data passes: a parsed packet and its direction -> [`FlowKey`] -> [`FlowTable::with`] finds the [`Entry`], which says whether it covers
//! the packet and whether its verdict is still current; if there is none, or it is stale, the engine judges by the rules and inserts or
//! grants anew. [`FlowTable::sweep_step`] removes what is idle and has the rest judged again when its verdict is older than the view in
//! force or past its time. [`cut`] tells the local application of a TCP flow that is no longer allowed.
//!
//! - UDP and echo need a rule in their own direction, or a flow. A TCP SYN needs a rule in its direction, whatever flow there is.
//! - A TCP segment without SYN and without a flow may match a rule in reverse (an agent restarted): it passes, creates no flow, and is
//!   limited per instance pair ([`limit`]).
//! - Nobody evicts another's entry: a full quota refuses the newcomer ([`quota`]).
//!
//! What it does not do: follow TCP states, check sequence numbers, or survive a restart.

pub mod cut;
mod entry;
mod key;
pub mod limit;
mod quota;
mod table;

pub use entry::{Coverage, Entry, Grant, Moment, Opener};
pub use key::{FlowKey, FlowKind};
pub use quota::{FlowLimits, InstancePair};
pub use table::{FlowTable, Inserted, Kept, SHARDS, Swept};
