//! What is wrong with a policy text, and where: stable codes, positions, the offending text and what to write instead.
//!
//! Every stage of the parser reports into one [`Findings`] and goes on, so that an author sees all errors at once. Texts that come from
//! the document are shortened and their control characters escaped here, once: a diagnostic can be printed on a terminal as it is.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Most diagnostics that one text gets; beyond, one says that there are more.
pub const MAX_DIAGNOSTICS: usize = 100;

/// Longest excerpt of the document in a diagnostic, in characters.
const MAX_EXCERPT: usize = 60;

macro_rules! codes {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal;)*) => {
        /// What kind of mistake a diagnostic is about. The texts are stable: scripts may rely on them.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
        #[serde(rename_all = "snake_case")]
        pub enum Code {
            $($(#[doc = $doc])+ $name,)*
        }

        impl Code {
            /// Every code, in the order in which the reference lists them.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// Stable text of the code.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// What the code means, in a sentence.
            #[must_use]
            pub const fn explanation(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+).trim_ascii(),)* }
            }
        }
    };
}

codes! {
    /// The text is not YAML (or JSON).
    Syntax = "syntax";
    /// The text, or something in it, is larger than the limits allow.
    TooLarge = "too_large";
    /// Lists and mappings are nested deeper than the limits allow.
    TooDeep = "too_deep";
    /// There is more than one document in the text.
    SeveralDocuments = "several_documents";
    /// An anchor or an alias: what a line means must be readable on that line.
    Anchor = "anchor";
    /// A tag: the policy language has no types to choose from.
    Tag = "tag";
    /// A merge key (`<<`).
    MergeKey = "merge_key";
    /// A key that stands twice in one mapping.
    DuplicateKey = "duplicate_key";
    /// A key that the policy language does not have.
    UnknownKey = "unknown_key";
    /// A key that belongs to the policy language, but that this version cannot enforce.
    NotSupportedYet = "not_supported_yet";
    /// A key that must be there is not.
    MissingKey = "missing_key";
    /// A list where a text belongs, nothing where a mapping belongs, and so on.
    WrongType = "wrong_type";
    /// A list or a mapping that must have at least one entry has none.
    Empty = "empty";
    /// The version of the policy language is not 1.
    BadVersion = "bad_version";
    /// Not a name: 1 to 63 characters of `[a-z0-9-]`, no hyphen at either end.
    BadName = "bad_name";
    /// A service name that means something else in a target.
    ReservedName = "reserved_name";
    /// Not an attachment.
    BadAttachment = "bad_attachment";
    /// Not a port, a range of ports or a protocol.
    BadPort = "bad_port";
    /// Not a time as RFC 3339 writes it.
    BadTime = "bad_time";
    /// Not a rule's id.
    BadId = "bad_id";
    /// A `why` or `owner` that is empty, too long, or has characters that cannot be shown on one line.
    BadText = "bad_text";
    /// Not an arrow: `from -> to:service`.
    BadArrow = "bad_arrow";
    /// Not a selector: a component's name, or labels joined by `&`.
    BadSelector = "bad_selector";
    /// A target without `:` and what is open behind it.
    MissingService = "missing_service";
    /// A name that no component has.
    UnknownComponent = "unknown_component";
    /// A selector by labels that no component matches.
    NoMatch = "no_match";
    /// A service that none of the components meant has.
    UnknownService = "unknown_service";
    /// Two components claim the same processes of the same host.
    AttachmentConflict = "attachment_conflict";
    /// A service bears the name of a user who is another component of the same host: a warning.
    AttachmentOverlap = "attachment_overlap";
    /// The same arrow stands twice.
    DuplicateRule = "duplicate_rule";
    /// Two rules have the same id.
    DuplicateId = "duplicate_id";
    /// A rule that has expired already: a warning.
    Expired = "expired";
    /// There are more errors than are listed.
    TooManyErrors = "too_many_errors";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Whether a diagnostic refuses the policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// The policy is refused.
    Error,
    /// The policy is accepted; its author should know.
    Warning,
}

/// A place in a policy text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
pub struct Position {
    /// Line, from 1.
    pub line: u32,
    /// Column in characters, from 1.
    pub column: u32,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// One finding about a policy text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Diagnostic {
    /// What kind of mistake.
    pub code: Code,
    /// Whether it refuses the policy.
    pub severity: Severity,
    /// Line, from 1.
    pub line: u32,
    /// Column in characters, from 1.
    pub column: u32,
    /// The offending text, at most one line and 60 characters of it.
    pub text: String,
    /// What is wrong.
    pub message: String,
    /// What to do about it, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        write!(f, "{}:{}: {kind}[{}]: {}", self.line, self.column, self.code, self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "\n  hint: {hint}"),
            None => Ok(()),
        }
    }
}

/// A stretch of the document: where it begins, and its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    /// Where it begins, for people.
    pub(super) position: Position,
    /// Offset of its first byte.
    pub(super) start: usize,
    /// Offset behind its last byte.
    pub(super) end: usize,
}

impl Span {
    /// The beginning of the document.
    pub(super) const START: Self = Self {
        position: Position { line: 1, column: 1 },
        start: 0,
        end: 0,
    };
}

/// A value, and where it stands.
#[derive(Debug, Clone)]
pub(super) struct Placed<T> {
    pub(super) at: Span,
    pub(super) value: T,
}

/// All that was found in one text so far. Warnings never take the place of errors.
#[derive(Debug)]
pub(super) struct Findings<'a> {
    pub(super) source: &'a str,
    errors: Kept,
    warnings: Kept,
}

/// The first [`MAX_DIAGNOSTICS`] of one severity, and whether there were more.
#[derive(Debug, Default)]
struct Kept {
    found: Vec<Diagnostic>,
    more: bool,
}

/// A finding just reported, to which a hint can be added.
pub(super) struct Reported<'f>(Option<&'f mut Diagnostic>);

impl Reported<'_> {
    pub(super) fn hint(self, hint: impl AsRef<str>) {
        if let Some(diagnostic) = self.0 {
            diagnostic.hint = Some(printable(hint.as_ref()));
        }
    }

    pub(super) fn hint_if(self, hint: Option<impl AsRef<str>>) {
        if let Some(hint) = hint {
            self.hint(hint);
        }
    }
}

impl<'a> Findings<'a> {
    pub(super) fn new(source: &'a str) -> Self {
        Self {
            source,
            errors: Kept::default(),
            warnings: Kept::default(),
        }
    }

    pub(super) fn error(&mut self, code: Code, at: Span, message: impl AsRef<str>) -> Reported<'_> {
        self.report(Severity::Error, code, at, message.as_ref())
    }

    pub(super) fn warning(&mut self, code: Code, at: Span, message: impl AsRef<str>) -> Reported<'_> {
        self.report(Severity::Warning, code, at, message.as_ref())
    }

    /// Whether the text is refused.
    pub(super) const fn has_errors(&self) -> bool {
        !self.errors.found.is_empty()
    }

    /// Whether no further error will be listed: checks may stop here, as the text is refused anyway.
    pub(super) const fn is_full(&self) -> bool {
        self.errors.more
    }

    /// Everything found, by position; a last one says so if there were more errors.
    pub(super) fn finish(self) -> Vec<Diagnostic> {
        let mut found = self.errors.found;
        found.extend(self.warnings.found);
        found.sort_by_key(|d| (d.line, d.column, d.code));
        if let (true, Some(last)) = (self.errors.more, found.last()) {
            let more = Diagnostic {
                code: Code::TooManyErrors,
                severity: Severity::Error,
                text: String::new(),
                message: format!("there are more than {MAX_DIAGNOSTICS} errors"),
                hint: Some("correct these first".into()),
                ..*last
            };
            found.push(more);
        }
        found
    }

    fn report(&mut self, severity: Severity, code: Code, at: Span, message: &str) -> Reported<'_> {
        let source = self.source;
        let kept = match severity {
            Severity::Error => &mut self.errors,
            Severity::Warning => &mut self.warnings,
        };
        if kept.found.len() >= MAX_DIAGNOSTICS {
            kept.more = true;
            return Reported(None);
        }
        let text = excerpt(source, at);
        let Position { line, column } = at.position;
        kept.found.push(Diagnostic {
            code,
            severity,
            line,
            column,
            text,
            message: printable(message),
            hint: None,
        });
        Reported(kept.found.last_mut())
    }
}

/// The first line of `at`; of an empty stretch, the rest of its line, or else the line.
fn excerpt(source: &str, at: Span) -> String {
    let line_start = source
        .get(..at.start)
        .and_then(|s| s.rfind('\n'))
        .map_or(0, |n| n.saturating_add(1));
    [at.start..at.end, at.start..source.len(), line_start..source.len()]
        .into_iter()
        .filter_map(|stretch| source.get(stretch)?.lines().next())
        .map(str::trim)
        .find(|line| !line.is_empty())
        .map(short)
        .unwrap_or_default()
}

/// `text`, printable and cut to [`MAX_EXCERPT`] characters.
pub(super) fn short(text: &str) -> String {
    match text.char_indices().nth(MAX_EXCERPT) {
        None => printable(text),
        Some((end, _)) => printable(text.get(..end).unwrap_or_default()) + "…",
    }
}

/// `text` with everything that a terminal might obey or hide written as an escape.
fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '"' | '\'' | '\\' => out.push(c),
            _ => out.extend(c.escape_debug()),
        }
    }
    out
}

/// The candidate most like `word`, if one is close enough to be what was meant: at most a third of its letters apart, and at most 3.
pub(super) fn nearest<'c>(word: &str, candidates: impl IntoIterator<Item = &'c str>) -> Option<&'c str> {
    let word: Vec<char> = word.chars().flat_map(char::to_lowercase).take(64).collect();
    let limit = (word.len() / 3).clamp(1, 3);
    candidates
        .into_iter()
        .filter_map(|c| distance(&word, c, limit).map(|d| (d, c)))
        .min()
        .map(|(_, candidate)| candidate)
}

/// [`nearest`] as a hint.
pub(super) fn did_you_mean<'c>(word: &str, candidates: impl IntoIterator<Item = &'c str>) -> Option<String> {
    nearest(word, candidates).map(|c| format!("did you mean `{c}`?"))
}

/// How many letters must be put in, left out, changed or swapped with their neighbour to come from one word to the other (optimal
/// string alignment); `None` beyond `limit`.
fn distance(from: &[char], to: &str, limit: usize) -> Option<usize> {
    let to: Vec<char> = to.chars().collect();
    if from.len().abs_diff(to.len()) > limit {
        return None;
    }
    let at = |row: &[usize], i: usize| row.get(i).copied().unwrap_or(usize::MAX);
    let (mut before, mut last) = (Vec::new(), (0..=from.len()).collect::<Vec<_>>());
    for (y, c) in to.iter().enumerate() {
        let mut row = Vec::with_capacity(last.len());
        row.push(y.saturating_add(1));
        for (x, have) in from.iter().enumerate() {
            let change = at(&last, x).saturating_add(usize::from(have != c));
            let put = at(&last, x.saturating_add(1)).saturating_add(1);
            let leave = at(&row, x).saturating_add(1);
            let (x_before, y_before) = (x.checked_sub(1), y.checked_sub(1));
            let swapped = x_before.and_then(|x| from.get(x)) == Some(c) && y_before.and_then(|y| to.get(y)) == Some(have);
            let swap = x_before
                .filter(|_| swapped)
                .map_or(usize::MAX, |x| at(&before, x).saturating_add(1));
            row.push(change.min(put).min(leave).min(swap));
        }
        if row.iter().min().is_none_or(|best| *best > limit) {
            return None;
        }
        before = std::mem::replace(&mut last, row);
    }
    last.last().copied().filter(|d| *d <= limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_the_texts_that_serde_gives_them() -> Result<(), serde_json::Error> {
        for code in Code::ALL {
            assert_eq!(serde_json::to_value(code)?, code.as_str());
            assert!(code.explanation().ends_with(['.', ')']), "{code}");
        }
        Ok(())
    }

    #[test]
    fn the_nearest_word_is_suggested_only_if_it_is_near() {
        let words = ["postgres", "n8n", "backup"];
        assert_eq!(nearest("postgras", words), Some("postgres"));
        assert_eq!(nearest("Postgres", words), Some("postgres"));
        assert_eq!(nearest("postgre", words), Some("postgres"));
        assert_eq!(nearest("n8", words), Some("n8n"));
        assert_eq!(nearest("n8n8", words), Some("n8n"));
        assert_eq!(nearest("bakcup", words), Some("backup"));
        assert_eq!(nearest("form", ["from", "to"]), Some("from"));
        assert_eq!(nearest("redis", words), None);
        assert_eq!(nearest("", words), None);
    }

    #[test]
    fn what_a_terminal_might_obey_is_escaped() {
        assert_eq!(printable("a\u{1b}[31m \"b\" \u{202e}é"), "a\\u{1b}[31m \"b\" \\u{202e}é");
        assert_eq!(short(&"x".repeat(61)), "x".repeat(60) + "…");
    }

    #[test]
    fn an_excerpt_is_never_empty_where_the_line_is_not() {
        let at = |start, end| Span { start, end, ..Span::START };
        assert_eq!(excerpt("ab: cd\nef", at(4, 9)), "cd");
        assert_eq!(excerpt("ab: cd\nef", at(4, 4)), "cd");
        assert_eq!(excerpt("ab: cd\nef", at(9, 9)), "ef");
        assert_eq!(excerpt("", at(0, 0)), "");
    }

    #[test]
    fn beyond_the_limit_one_diagnostic_says_that_there_are_more() {
        let mut findings = Findings::new("x");
        for _ in 0..MAX_DIAGNOSTICS {
            findings.error(Code::Syntax, Span::START, "no");
        }
        assert!(!findings.is_full());
        findings.error(Code::Syntax, Span::START, "no").hint("not kept");
        assert!(findings.is_full());
        let found = findings.finish();
        assert_eq!(found.len(), MAX_DIAGNOSTICS + 1);
        assert_eq!(found.last().map(|d| d.code), Some(Code::TooManyErrors));
    }
}
