//! The arrow grammar: `n8n, tier=app & env=prod -> postgres:sql, cache:tcp/6379`.
//!
//! ```text
//! arrow    = side "->" side           left: selectors; right: targets
//! side     = item *("," item)         or
//! target   = selector ":" what
//! selector = name | label *("&" label)     and
//! label    = key "=" value
//! what     = service | "*" | "icmp" | ("tcp" | "udp") "/" port ["-" port]
//! ```
//!
//! Blanks may stand around `->`, `,` and `&`, nowhere else. Every part keeps its place in the document. This file knows the shape of
//! arrows only; whether a name means something is for [`mod@super::check`].

use std::collections::BTreeMap;
use std::ops::Range;
use std::str::FromStr;

use super::diagnostic::{Code, Findings, Placed, Span, short};
use super::fields::name_hint;
use super::model::{Target, What};
use super::yaml::Text;
use crate::label::{ComponentName, LabelKey, LabelValue, MAX_LABELS, NameError, Selector, ServiceName};
use crate::net::PortSpec;

/// Most selectors or targets on one side of an arrow.
pub const MAX_SIDE: usize = 1_000;

/// How a target is written, for hints.
const TARGET_HINT: &str = "write `name:service`, `name:tcp/5432`, `name:icmp`, or `name:*` for all its services";

/// What stands between the commas on one side; `None` if there are errors in it.
pub(super) type Side<T> = Option<Vec<Placed<T>>>;

/// A stretch of a text that is being parsed, without the blanks around it.
#[derive(Clone)]
struct Piece<'t> {
    text: &'t str,
    range: Range<usize>,
}

/// One text of the document, and where findings about it go.
pub(super) struct Reader<'t, 'f, 'a> {
    text: &'t Text<'a>,
    findings: &'f mut Findings<'a>,
}

impl<'t, 'f, 'a> Reader<'t, 'f, 'a> {
    pub(super) const fn new(text: &'t Text<'a>, findings: &'f mut Findings<'a>) -> Self {
        Self { text, findings }
    }

    /// Both sides of a whole arrow; `None` for a side that has errors.
    pub(super) fn arrow(mut self) -> (Side<Selector>, Side<Target>) {
        let whole = self.whole();
        let sides = split(&whole, "->");
        let [left, right] = sides.as_slice() else {
            let (message, hint) = if sides.len() > 2 {
                (
                    "a rule has one `->`",
                    "write one rule for each arrow; `,` joins the names of one side",
                )
            } else if whole.text.contains(['→', '⇒', '>']) {
                ("a rule is an arrow: `from -> to:service`", "the arrow is written `->`")
            } else {
                let hint = "write `n8n -> postgres:sql`; in a list with brackets, put a rule that has commas in quotes";
                ("a rule is an arrow: `from -> to:service`", hint)
            };
            self.findings.error(Code::BadArrow, self.text.at, message).hint(hint);
            return (None, None);
        };
        (self.sources(left), self.destinations(right))
    }

    /// A text that is the left side of an arrow.
    pub(super) fn selectors(mut self) -> Side<Selector> {
        let whole = self.whole();
        self.no_arrow(&whole)?;
        self.sources(&whole)
    }

    /// A text that is the right side of an arrow.
    pub(super) fn targets(mut self) -> Side<Target> {
        let whole = self.whole();
        self.no_arrow(&whole)?;
        self.destinations(&whole)
    }

    fn sources(&mut self, side: &Piece<'t>) -> Side<Selector> {
        let items = self.items(side)?;
        let parsed: Vec<_> = items.iter().map(|i| self.source_item(i)).collect();
        parsed.into_iter().collect()
    }

    fn destinations(&mut self, side: &Piece<'t>) -> Side<Target> {
        let items = self.items(side)?;
        let parsed: Vec<_> = items.iter().map(|i| self.target(i)).collect();
        parsed.into_iter().collect()
    }

    /// What stands between the commas of a side.
    fn items(&mut self, side: &Piece<'t>) -> Option<Vec<Piece<'t>>> {
        let items = split(side, ",");
        if items.len() > MAX_SIDE {
            let message = format!("one side of a rule has {} entries; at most {MAX_SIDE} are allowed", items.len());
            self.findings
                .error(Code::TooLarge, self.at(side), message)
                .hint("give the components a label, and select by it");
            return None;
        }
        Some(items)
    }

    fn source_item(&mut self, item: &Piece<'t>) -> Option<Placed<Selector>> {
        if item.text.contains(':') {
            self.findings
                .error(
                    Code::BadSelector,
                    self.at(item),
                    "the left side of a rule names components, not services",
                )
                .hint("leave out what begins with `:`: a rule says which service may be reached, not where flows come from");
            return None;
        }
        self.selector(item)
    }

    fn target(&mut self, item: &Piece<'t>) -> Option<Placed<Target>> {
        if item.text.is_empty() {
            self.findings
                .error(Code::BadSelector, self.at(item), "a target is missing here")
                .hint(TARGET_HINT);
            return None;
        }
        let sides = split_tight(item, ':');
        let (selector, what) = match sides.as_slice() {
            [selector, what] if !what.text.is_empty() => (selector, what),
            [_] | [_, _] => {
                let message = format!("`{}` does not say which service", short(item.text));
                self.findings.error(Code::MissingService, self.at(item), message).hint(TARGET_HINT);
                return None;
            }
            _ => {
                self.findings
                    .error(Code::BadSelector, self.at(item), "a target has one `:`")
                    .hint(TARGET_HINT);
                return None;
            }
        };
        let (selector, what) = (self.selector(selector), self.what(what));
        Some(Placed {
            at: self.at(item),
            value: Target {
                selector: selector?.value,
                what: what?,
            },
        })
    }

    fn what(&mut self, piece: &Piece<'t>) -> Option<What> {
        let at = self.at(piece);
        match piece.text {
            "*" => Some(What::AllServices),
            text if text == "icmp" || text.contains('/') => match text.parse::<PortSpec>() {
                Ok(ports) => Some(What::Ports(ports)),
                Err(error) => {
                    self.findings
                        .error(Code::BadPort, at, error.to_string())
                        .hint("write `tcp/5432`, `udp/8000-8100` or `icmp`");
                    None
                }
            },
            text @ ("tcp" | "udp") => {
                let message = format!("`{text}` needs its ports");
                self.findings
                    .error(Code::BadPort, at, message)
                    .hint(format!("write `{text}/5432`, or `{text}/1-65535` for all"));
                None
            }
            text => match text.parse::<ServiceName>() {
                Ok(service) => Some(What::Service(service)),
                Err(error) => {
                    self.bad_name::<ServiceName>(piece, "service's name", &error);
                    None
                }
            },
        }
    }

    fn selector(&mut self, piece: &Piece<'t>) -> Option<Placed<Selector>> {
        let at = self.at(piece);
        let value = match piece.text {
            "" => {
                let hint = "a comma too many, or a side that is empty?";
                self.findings.error(Code::BadSelector, at, "a selector is missing here").hint(hint);
                None
            }
            "*" => {
                self.findings
                    .error(Code::BadSelector, at, "there is no selector for every component")
                    .hint("give the components that you mean a label, and select by it");
                None
            }
            text if text.contains(['=', '&']) => self.labels(piece),
            text => match text.parse::<ComponentName>() {
                Ok(name) => Some(Selector::Name(name)),
                Err(error) => {
                    self.bad_name::<ComponentName>(piece, "component's name", &error);
                    None
                }
            },
        }?;
        Some(Placed { at, value })
    }

    fn labels(&mut self, piece: &Piece<'t>) -> Option<Selector> {
        let pieces = split(piece, "&");
        if pieces.len() > MAX_LABELS {
            let message = format!("a selector has at most {MAX_LABELS} labels");
            self.findings.error(Code::TooLarge, self.at(piece), message);
            return None;
        }
        let parsed: Vec<_> = pieces.iter().map(|p| self.label(p)).collect();
        let mut labels = BTreeMap::new();
        for (key, value) in parsed.into_iter().collect::<Option<Vec<_>>>()? {
            let known = labels.get(&key).unwrap_or(&value);
            if *known != value {
                let message = format!("no component has `{key}={known}` and `{key}={value}`");
                self.findings
                    .error(Code::BadSelector, self.at(piece), message)
                    .hint("`&` means and; for or, write `,`");
                return None;
            }
            labels.insert(key, value);
        }
        Some(Selector::Labels(labels.into_iter().collect()))
    }

    fn label(&mut self, piece: &Piece<'t>) -> Option<(LabelKey, LabelValue)> {
        let sides = split_tight(piece, '=');
        let [key, value] = sides.as_slice() else {
            let at = self.at(piece);
            let message = format!("`{}` is no label", short(piece.text));
            self.findings
                .error(Code::BadSelector, at, message)
                .hint("`&` joins labels, each written `key=value`; a name stands alone");
            return None;
        };
        let label_key = key
            .text
            .parse::<LabelKey>()
            .map_err(|e| self.bad_name::<LabelKey>(key, "label's key", &e));
        let label_value = value
            .text
            .parse::<LabelValue>()
            .map_err(|e| self.bad_name::<LabelValue>(value, "label's value", &e));
        Some((label_key.ok()?, label_value.ok()?))
    }

    fn bad_name<T: FromStr>(&mut self, piece: &Piece<'_>, what: &str, error: &NameError) {
        let at = self.at(piece);
        let hint = match error {
            NameError::Character('!') => "there are no negations: say what is allowed",
            NameError::Character('*' | '?') => "there are no patterns: give the components a label, and select by it",
            NameError::Character(' ') => "join selectors by `,` (or) and labels by `&` (and); `key=value` has no blanks",
            NameError::Character(_) | NameError::Length | NameError::Hyphen => {
                let hint = name_hint::<T>(piece.text).unwrap_or_else(|| "names look like `n8n` or `tier=app`".into());
                self.findings.error(Code::BadName, at, format!("not a {what}: {error}")).hint(hint);
                return;
            }
        };
        self.findings.error(Code::BadName, at, format!("not a {what}: {error}")).hint(hint);
    }

    fn no_arrow(&mut self, whole: &Piece<'t>) -> Option<()> {
        if whole.text.contains("->") {
            self.findings
                .error(
                    Code::BadArrow,
                    self.text.at,
                    "`from` and `to` are the sides of an arrow, without `->`",
                )
                .hint("write the arrow as the whole rule: `- n8n -> postgres:sql`");
            return None;
        }
        Some(())
    }

    fn whole(&self) -> Piece<'t> {
        trimmed(&self.text.value, 0)
    }

    fn at(&self, piece: &Piece<'_>) -> Span {
        self.text.part(self.findings.source, piece.range.clone())
    }
}

/// `piece` at each `separator`, without the blanks around the parts.
fn split<'t>(piece: &Piece<'t>, separator: &str) -> Vec<Piece<'t>> {
    let mut start = piece.range.start;
    let mut parts = Vec::new();
    for part in piece.text.split(separator) {
        parts.push(trimmed(part, start));
        start = start.saturating_add(part.len()).saturating_add(separator.len());
    }
    parts
}

/// `piece` at each `separator`, with the blanks: they are errors.
fn split_tight<'t>(piece: &Piece<'t>, separator: char) -> Vec<Piece<'t>> {
    let mut start = piece.range.start;
    let mut parts = Vec::new();
    for text in piece.text.split(separator) {
        let end = start.saturating_add(text.len());
        parts.push(Piece { text, range: start..end });
        start = end.saturating_add(separator.len_utf8());
    }
    parts
}

fn trimmed(text: &str, start: usize) -> Piece<'_> {
    let front = text.trim_start();
    let start = start.saturating_add(text.len().saturating_sub(front.len()));
    let text = front.trim_end();
    Piece {
        text,
        range: start..start.saturating_add(text.len()),
    }
}
