//! Taking a mapping of the document apart: the keys that it may and must have, and what their values are.
//!
//! Every function reports what it does not like and returns `None`; callers go on with the other keys.

use std::str::FromStr;

use super::diagnostic::{Code, Findings, Span, did_you_mean, short};
use super::yaml::{Entry, Node, Text, Value};

/// A mapping whose keys are known to the policy language.
pub(super) struct Fields<'t, 'a> {
    at: Span,
    entries: &'t [Entry<'a>],
}

/// The keys that a mapping may have.
pub(super) struct Keys {
    /// What the mapping is, for messages: "a component".
    pub(super) of: &'static str,
    /// Keys that mean something.
    pub(super) known: &'static [&'static str],
    /// Keys that will mean something.
    pub(super) later: &'static [&'static str],
    /// How it is written.
    pub(super) hint: &'static str,
}

impl<'t, 'a> Fields<'t, 'a> {
    /// Checks that `node` (the value at `at`) is a mapping, and that it has no key but these.
    pub(super) fn of(node: &'t Node<'a>, at: Span, keys: &Keys, findings: &mut Findings<'a>) -> Option<Self> {
        let entries = map(node, at, keys.of, keys.hint, findings)?;
        for Entry { key, value } in entries {
            if keys.known.contains(&&*key.value) {
                continue;
            }
            if keys.later.contains(&&*key.value) {
                findings
                    .error(
                        Code::NotSupportedYet,
                        key.at,
                        format!("this version cannot enforce `{}` yet", key.value),
                    )
                    .hint("leave it out; it is refused because ignoring it would make the policy weaker than it reads");
                continue;
            }
            let message = format!("{} has no key `{}`", keys.of, short(&key.value));
            let list = || match value.value {
                Value::Null => format!(
                    "if it belongs to the value before it, put that in quotes; the keys are {}",
                    listed(keys.known)
                ),
                Value::Text(_) | Value::List(_) | Value::Map(_) | Value::Refused => format!("the keys are {}", listed(keys.known)),
            };
            let hint = did_you_mean(&key.value, keys.known.iter().copied()).unwrap_or_else(list);
            findings.error(Code::UnknownKey, key.at, message).hint(hint);
        }
        Some(Self { at, entries })
    }

    pub(super) fn get(&self, key: &str) -> Option<&'t Entry<'a>> {
        self.entries.iter().find(|e| e.key.value == key)
    }

    /// The entry of `key`, which must be there.
    pub(super) fn require(&self, key: &str, hint: &str, findings: &mut Findings<'a>) -> Option<&'t Entry<'a>> {
        let entry = self.get(key);
        if entry.is_none() {
            findings.error(Code::MissingKey, self.at, format!("`{key}` is missing")).hint(hint);
        }
        entry
    }
}

/// The entries of a mapping. `at` is where a finding belongs if there is nothing.
pub(super) fn map<'t, 'a>(node: &'t Node<'a>, at: Span, what: &str, hint: &str, findings: &mut Findings<'a>) -> Option<&'t [Entry<'a>]> {
    match &node.value {
        Value::Map(entries) => Some(entries),
        Value::Refused => None,
        Value::Null | Value::Text(_) | Value::List(_) => {
            findings
                .error(
                    Code::WrongType,
                    place(node, at),
                    format!("{what} must be a mapping, not {}", node.kind()),
                )
                .hint(hint);
            None
        }
    }
}

/// The items of a list.
pub(super) fn list<'t, 'a>(node: &'t Node<'a>, at: Span, what: &str, hint: &str, findings: &mut Findings<'a>) -> Option<&'t [Node<'a>]> {
    match &node.value {
        Value::List(items) => Some(items),
        Value::Refused => None,
        Value::Null | Value::Text(_) | Value::Map(_) => {
            findings
                .error(
                    Code::WrongType,
                    place(node, at),
                    format!("{what} must be a list, not {}", node.kind()),
                )
                .hint(hint);
            None
        }
    }
}

/// A text.
pub(super) fn text<'t, 'a>(node: &'t Node<'a>, at: Span, what: &str, findings: &mut Findings<'a>) -> Option<&'t Text<'a>> {
    match &node.value {
        Value::Text(text) => Some(text),
        Value::Refused => None,
        Value::Null | Value::List(_) | Value::Map(_) => {
            let hint = match node.value {
                Value::Null => "write a text; the name `null` needs quotes",
                Value::Text(_) | Value::List(_) | Value::Map(_) | Value::Refused => {
                    "if a text begins with `{` or `[`, or contains `: `, put it in quotes"
                }
            };
            findings
                .error(
                    Code::WrongType,
                    place(node, at),
                    format!("{what} must be a text, not {}", node.kind()),
                )
                .hint(hint);
            None
        }
    }
}

/// One text, or a list of at least one.
pub(super) fn texts<'t, 'a>(node: &'t Node<'a>, at: Span, what: &str, findings: &mut Findings<'a>) -> Option<Vec<&'t Text<'a>>> {
    let Value::List(items) = &node.value else {
        return text(node, at, what, findings).map(|t| vec![t]);
    };
    if items.is_empty() {
        findings.error(Code::Empty, node.at, format!("{what} must have at least one entry"));
        return None;
    }
    let found: Vec<_> = items.iter().map(|item| text(item, item.at, what, findings)).collect();
    found.into_iter().collect()
}

/// The name that was probably meant by a text that is none.
pub(super) fn name_hint<T: FromStr>(text: &str) -> Option<String> {
    let guess = text.to_lowercase().replace(['_', '.', ' '], "-");
    T::from_str(&guess).is_ok().then(|| format!("`{guess}` would be one"))
}

/// Where a finding about a value belongs: nothing has no place of its own, so its key stands for it.
pub(super) const fn place(node: &Node<'_>, key: Span) -> Span {
    match node.value {
        Value::Null => key,
        Value::Text(_) | Value::List(_) | Value::Map(_) | Value::Refused => node.at,
    }
}

/// Words as a sentence lists them: "`a`, `b` and `c`".
pub(super) fn listed(words: &[&str]) -> String {
    let quoted: Vec<_> = words.iter().map(|w| format!("`{w}`")).collect();
    match quoted.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
        None => String::new(),
    }
}
