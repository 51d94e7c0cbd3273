//! The policy language: who may talk to whom, in one YAML or JSON document. `docs/policy.md` is its reference.
//!
//! A text passes through `yaml` (a tree with places), `document`, `component`, `rule` and `arrow` (drafts with places) and `check` (a
//! [`Policy`], or diagnostics); [`print()`] writes a policy back in its one canonical form; [`Policy::grants`] says what it means. Nothing
//! that this language does not know is ever ignored, and an empty policy allows nothing.
//!
//! No clock: whoever wants to hear about expired rules passes in the time. No inventory: which hosts exist, and which labels they
//! have, is the coordinator's knowledge.

mod arrow;
mod attachment;
mod check;
mod component;
mod diagnostic;
mod document;
mod fields;
mod grants;
mod index;
mod model;
mod print;
mod rule;
#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod testing;
mod yaml;

pub use arrow::MAX_SIDE;
pub use attachment::{
    Attachment, AttachmentError, AttachmentKind, CgroupPath, ContainerLabelKey, ContainerLabelValue, ContainerMatch, ContainerName, Engine,
    NetnsPath, UnitName, User, UserName,
};
pub use check::Positions;
pub use component::{MAX_HOSTS, MAX_PORTS, MAX_SERVICES};
pub use diagnostic::{Code, Diagnostic, MAX_DIAGNOSTICS, Position, Severity};
pub use document::{MAX_COMPONENTS, MAX_RULES};
pub use grants::{Expansion, Grant, Opening, Resolver};
pub use model::{Component, MAX_NOTE, Note, NoteError, On, Policy, Rule, Services, Target, What};
pub use print::print;
pub use yaml::{MAX_BYTES, MAX_DEPTH, MAX_NODES};

use crate::version::MeshTime;
use diagnostic::Findings;

/// A policy, and what its author should know about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// The policy.
    pub policy: Policy,
    /// Diagnostics that do not refuse it.
    pub warnings: Vec<Diagnostic>,
    /// Where its parts stand in the text.
    pub positions: Positions,
}

/// Reads a policy.
///
/// # Errors
/// Everything that is wrong with the text, by position. Never empty.
pub fn parse(text: &str) -> Result<Policy, Vec<Diagnostic>> {
    read(text, None).map(|checked| checked.policy)
}

/// Reads a policy as [`parse`] does, and warns of what has expired at `now`.
///
/// # Errors
/// Everything that is wrong with the text, warnings included, by position. At least one is an error.
pub fn check(text: &str, now: MeshTime) -> Result<Checked, Vec<Diagnostic>> {
    read(text, Some(now))
}

fn read(text: &str, now: Option<MeshTime>) -> Result<Checked, Vec<Diagnostic>> {
    let mut findings = Findings::new(text);
    let tree = yaml::read(&mut findings);
    if tree.is_none() && findings.has_errors() {
        return Err(findings.finish());
    }
    let draft = document::read(tree.as_ref(), &mut findings);
    let (policy, positions) = check::check(draft, now, &mut findings);
    if findings.has_errors() {
        return Err(findings.finish());
    }
    Ok(Checked {
        policy,
        warnings: findings.finish(),
        positions,
    })
}

#[cfg(test)]
mod tests;
