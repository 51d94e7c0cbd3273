//! The coordinator: keeps the mesh's state, judges who may join, compiles the policy and publishes each host's view.
//!
//! The parts, each standing on those above it:
//! - [`clock`], [`entropy`]: the only places that read the time or draw randomness, so that a simulation can drive the rest.
//! - [`audit`], [`credential`], [`inventory`]: what the store keeps and gives, as types.
//! - [`store`]: every change is one transaction: the change, its audit leaf, the mesh's revision + 1. All SQL is in there.
//! - [`policy`]: compiles policy and inventory into each host's view, compares policies, explains verdicts.
//! - [`trust`]: the roots, certificates by role, and who a certificate chain speaks for.
//! - [`enrollment`]: from a token to a host with a certificate.
//! - [`backup`], [`recover`]: everything into one file, out of one file again, and how a coordinator goes on that agents know better than.
//! - [`failpoint`]: where tests make the program die.
//! - [`args`], [`config`], [`data_dir`], [`init`], [`run`], [`systemd`]: the program.

#![forbid(unsafe_code)]

pub mod api;
pub mod args;
pub mod audit;
pub mod backup;
pub mod clock;
pub mod config;
pub mod control;
pub mod credential;
pub mod data_dir;
pub mod enrollment;
pub mod entropy;
pub mod failpoint;
pub mod init;
pub mod inventory;
pub mod policy;
pub mod publish;
pub mod recover;
pub mod rotation;
pub mod run;
pub mod store;
pub mod systemd;
pub mod trust;
