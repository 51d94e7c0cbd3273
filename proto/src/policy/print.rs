//! The canonical text of a policy: `parse(print(p)) == p`, and printing what was parsed from a canonical text changes no byte.
//!
//! Components by name, rules by arrow; comments and the author's order are not part of a policy and are lost.

use std::borrow::Cow;
use std::fmt::{self, Write as _};

use super::model::{Component, Joined, On, Policy, Rule};
use crate::net::PortSpec;

/// The canonical text of `policy`.
#[must_use]
pub fn print(policy: &Policy) -> String {
    Printed(policy).to_string()
}

struct Printed<'a>(&'a Policy);

impl fmt::Display for Printed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("version: 1\n")?;
        if !self.0.components.is_empty() {
            f.write_str("components:\n")?;
        }
        for (name, component) in &self.0.components {
            writeln!(f, "  {}:", scalar(name.as_str()))?;
            self::component(f, component)?;
        }
        if !self.0.rules.is_empty() {
            f.write_str("allow:\n")?;
        }
        self.0.rules.iter().try_for_each(|r| rule(f, r))
    }
}

fn component(f: &mut fmt::Formatter<'_>, component: &Component) -> fmt::Result {
    let Component {
        on,
        attach,
        labels,
        services,
    } = component;
    match on {
        On::Hosts(names) => writeln!(f, "    on: {}", one_or_list(names.iter().map(|n| scalar(n.as_str()))))?,
        On::Labels(pairs) => writeln!(
            f,
            "    on: {}",
            mapping(pairs.iter().map(|(k, v)| (k.as_str(), scalar(v.as_str()))))
        )?,
    }
    match attach.value() {
        None => writeln!(f, "    attach: {}", attach.kind())?,
        Some(value) => writeln!(f, "    attach: {{{}: {}}}", attach.kind(), scalar(&value))?,
    }
    if !labels.is_empty() {
        writeln!(
            f,
            "    labels: {}",
            mapping(labels.iter().map(|(k, v)| (k.as_str(), scalar(v.as_str()))))
        )?;
    }
    if !services.is_empty() {
        f.write_str("    services:\n")?;
    }
    for (name, ports) in services {
        let ports = ports.iter().map(PortSpec::to_string).map(Cow::Owned);
        writeln!(f, "      {}: {}", scalar(name.as_str()), one_or_list(ports))?;
    }
    Ok(())
}

fn rule(f: &mut fmt::Formatter<'_>, rule: &Rule) -> fmt::Result {
    let arrow = rule.arrow();
    let given = (rule.id != Rule::id_of(&arrow)).then_some(rule.id);
    if given.is_none() && rule.why.is_none() && rule.owner.is_none() && rule.expires.is_none() {
        return writeln!(f, "  - {arrow}");
    }
    writeln!(f, "  - from: {}", scalar_or_plain(&Joined(&rule.from).to_string()))?;
    writeln!(f, "    to: {}", Joined(&rule.to))?;
    if let Some(why) = &rule.why {
        writeln!(f, "    why: {}", quoted(why.as_str()))?;
    }
    if let Some(owner) = &rule.owner {
        writeln!(f, "    owner: {}", quoted(owner.as_str()))?;
    }
    if let Some(time) = rule
        .expires
        .and_then(|e| jiff::Timestamp::from_second(i64::try_from(e.0).ok()?).ok())
    {
        writeln!(f, "    expires: {time}")?;
    }
    if let Some(id) = given {
        writeln!(f, "    id: {id}")?;
    }
    Ok(())
}

/// A single value alone, several in brackets.
fn one_or_list<'a>(items: impl Iterator<Item = Cow<'a, str>>) -> String {
    let items: Vec<_> = items.collect();
    match items.as_slice() {
        [only] => only.to_string(),
        several => format!("[{}]", several.join(", ")),
    }
}

fn mapping<'a>(entries: impl Iterator<Item = (&'a str, Cow<'a, str>)>) -> String {
    let entries: Vec<_> = entries.map(|(key, value)| format!("{}: {value}", scalar(key))).collect();
    format!("{{{}}}", entries.join(", "))
}

/// `text` as a scalar that every reader of YAML takes for that text, between brackets too: quoted unless it is a plain word.
fn scalar(text: &str) -> Cow<'_, str> {
    let word = text.chars().all(|c| c.is_ascii_alphanumeric() || "_./@=:-".contains(c));
    let begins = text.starts_with(|c: char| c.is_ascii_alphanumeric() || "/_".contains(c));
    if word && begins && !text.ends_with(':') && !is_typed(text) {
        Cow::Borrowed(text)
    } else {
        Cow::Owned(quoted(text))
    }
}

/// One side of an arrow, outside brackets: plain unless it is one word that needs quotes.
fn scalar_or_plain(text: &str) -> Cow<'_, str> {
    if is_typed(text) {
        Cow::Owned(quoted(text))
    } else {
        Cow::Borrowed(text)
    }
}

/// Whether some reader of YAML takes the word for something else than a text.
fn is_typed(text: &str) -> bool {
    let word = matches!(text, "null" | "true" | "false" | "yes" | "no" | "on" | "off" | "y" | "n");
    word || text.starts_with(|c: char| c.is_ascii_digit()) && text.chars().all(|c| c.is_ascii_hexdigit() || "xo._-:".contains(c))
}

/// `text` between double quotes, as YAML and JSON write it.
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len().saturating_add(2));
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            // Notes have no control characters; were there one, it would be written as an escape. Writing to a string cannot fail.
            c if c.is_control() => drop(write!(out, "\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}
