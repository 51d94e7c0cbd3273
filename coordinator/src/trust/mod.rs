//! The trust roots, certificates by role, and who a chain speaks for.
//!
//! Interface (files follow): `Trust::load(dir)`, `trust.root_pin() -> [u8; 32]`, `trust.view_key() -> &SigningKey`,
//! `trust.issue_host(host, &IdentityKey, now) -> HostCertificate { chain, serial, not_after }`,
//! `trust.issue_coordinator(now) -> CertifiedKey`, `verify::PeerVerifier` (rustls `ClientCertVerifier`: chains of the host issuer, and
//! self-signed identity keys for joins and renewals) and `verify::peer(chain, &trust, now) -> Peer::{Host { id, serial, key }, Key(IdentityKey)}`.
