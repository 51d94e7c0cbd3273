//! The document as a whole: its version, `components` and `allow`, in drafts that the checks turn into a policy.
//!
//! text -> [`super::yaml`] (tree) -> this file, [`super::component`], [`super::rule`] and [`super::arrow`] (drafts with places)
//! -> [`mod@super::check`] (policy).

use super::diagnostic::{Code, Findings, Span, short};
use super::fields::{Fields, Keys, list, map, text};
use super::yaml::{Entry, Node};
use super::{component, rule};

/// Most components of one policy.
pub const MAX_COMPONENTS: usize = 10_000;
/// Most rules of one policy.
pub const MAX_RULES: usize = 50_000;

const KEYS: Keys = Keys {
    of: "a policy",
    known: &["version", "components", "allow"],
    later: &["never", "only", "tests"],
    hint: "begin with `version: 1`",
};

const COMPONENTS_HINT: &str = "write `name: {on: app-1, attach: {unit: n8n.service}}` for each; `{}` if there are none";

const ALLOW_HINT: &str = "write one rule a line, `- n8n -> postgres:sql`; `[]` if nothing is allowed";

/// What could be read of a document.
#[derive(Debug, Default)]
pub(super) struct Draft {
    pub(super) components: Vec<component::Draft>,
    pub(super) rules: Vec<rule::Draft>,
    /// Whether some components could not be read at all: then it is not known what a selector by labels matches.
    pub(super) incomplete: bool,
}

/// Reads the whole tree.
pub(super) fn read<'a>(root: Option<&Node<'a>>, findings: &mut Findings<'a>) -> Draft {
    let mut draft = Draft::default();
    let Some(root) = root else {
        findings
            .error(Code::MissingKey, Span::START, "the policy is empty; it needs at least `version`")
            .hint("a policy that allows nothing is `version: 1`");
        return draft;
    };
    let Some(fields) = Fields::of(root, Span::START, &KEYS, findings) else {
        return draft;
    };
    if let Some(entry) = fields.require("version", "begin with `version: 1`", findings) {
        version(entry, findings);
    }
    if let Some(entry) = fields.get("components") {
        draft.incomplete = components(entry, &mut draft.components, findings).is_none();
    }
    if let Some(entry) = fields.get("allow") {
        rules(entry, &mut draft.rules, findings);
    }
    draft
}

fn version<'a>(entry: &Entry<'a>, findings: &mut Findings<'a>) -> Option<()> {
    let version = text(&entry.value, entry.key.at, "`version`", findings)?;
    if version.value != "1" {
        let message = format!(
            "`{}` is no version of the policy language that this program knows",
            short(&version.value)
        );
        findings.error(Code::BadVersion, version.at, message).hint("write `version: 1`");
    }
    Some(())
}

fn components<'a>(entry: &Entry<'a>, into: &mut Vec<component::Draft>, findings: &mut Findings<'a>) -> Option<()> {
    let entries = map(&entry.value, entry.key.at, "`components`", COMPONENTS_HINT, findings)?;
    if entries.len() > MAX_COMPONENTS {
        let message = format!("there are {} components; at most {MAX_COMPONENTS} are allowed", entries.len());
        findings.error(Code::TooLarge, entry.key.at, message);
        return None;
    }
    into.extend(entries.iter().filter_map(|e| component::read(e, findings)));
    (into.len() == entries.len()).then_some(())
}

fn rules<'a>(entry: &Entry<'a>, into: &mut Vec<rule::Draft>, findings: &mut Findings<'a>) -> Option<()> {
    let items = list(&entry.value, entry.key.at, "`allow`", ALLOW_HINT, findings)?;
    if items.len() > MAX_RULES {
        let message = format!("there are {} rules; at most {MAX_RULES} are allowed", items.len());
        findings
            .error(Code::TooLarge, entry.key.at, message)
            .hint("rules that differ in a name only can be one, by a label");
        return None;
    }
    into.extend(items.iter().map(|item| rule::read(item, findings)));
    Some(())
}
