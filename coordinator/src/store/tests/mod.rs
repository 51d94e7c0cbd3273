//! The store as its callers see it, on the engine that ships.

mod addresses;
mod audit;
mod contact;
mod credentials;
mod disk;
mod hosts;
mod policy;
mod redeem;
mod schema;
mod told;
