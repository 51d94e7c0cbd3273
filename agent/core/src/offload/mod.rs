//! Segmentation offload: what a TUN says about a packet beside its bytes.

pub mod vnet;

pub use vnet::VnetHeader;
