//! How a host knows which processes are a component, and what the machine must look like for them.

pub mod base_table;
