//! From text to a tree of mappings, lists and texts, each with its place; and everything that YAML allows and a policy does not.
//!
//! The events of the parser are read once, front to back, with a stack of the collections that are open. Anchors, aliases, tags, merge
//! keys, directives, duplicate keys and second documents are reported here, so that the stages behind see none of them. Scalars are
//! never typed: `no`, `1.10` and `0x1f` are the texts that stand there; only a plain `null`, `~` or nothing is [`Value::Null`].
//!
//! This file does not know the keys of the policy language.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

use granit_parser::{ErrorKind, Event, Marker, Parser, ScalarStyle, ScanError};

use super::diagnostic::{Code, Findings, Position, Span, short};

/// Longest policy text, in bytes.
pub const MAX_BYTES: usize = 4 * 1024 * 1024;

/// Deepest nesting of lists and mappings. The language itself needs 5.
pub const MAX_DEPTH: usize = 32;

/// Most texts, lists and mappings in one document. 50,000 rules with every key and 10,000 ordinary components have 900,000.
pub const MAX_NODES: usize = 1_000_000;

/// A value, and where it stands.
#[derive(Debug)]
pub(super) struct Node<'a> {
    pub(super) at: Span,
    pub(super) value: Value<'a>,
}

/// What a value is.
#[derive(Debug)]
pub(super) enum Value<'a> {
    /// Nothing, `~` or `null`.
    Null,
    Text(Text<'a>),
    List(Vec<Node<'a>>),
    Map(Vec<Entry<'a>>),
    /// Reported already: nobody should complain about it a second time.
    Refused,
}

/// One key of a mapping, and its value. Keys of one mapping differ.
#[derive(Debug)]
pub(super) struct Entry<'a> {
    pub(super) key: Text<'a>,
    pub(super) value: Node<'a>,
}

/// A scalar as text.
#[derive(Debug)]
pub(super) struct Text<'a> {
    pub(super) value: Cow<'a, str>,
    pub(super) at: Span,
    /// Offset in the document at which the text stands literally, if it does.
    verbatim: Option<usize>,
}

impl Text<'_> {
    /// Where the bytes `part` of the text stand; the whole text's place if it was written with escapes or over several lines.
    pub(super) fn part(&self, source: &str, part: Range<usize>) -> Span {
        let exact = || {
            let start = self.verbatim?.checked_add(part.start)?;
            let end = self.verbatim?.checked_add(part.end)?;
            let before = u32::try_from(source.get(self.at.start..start)?.chars().count()).ok()?;
            let column = self.at.position.column.checked_add(before)?;
            Some(Span {
                position: Position {
                    column,
                    ..self.at.position
                },
                start,
                end,
            })
        };
        exact().unwrap_or(self.at)
    }
}

impl Node<'_> {
    /// What the value is, for a message.
    pub(super) const fn kind(&self) -> &'static str {
        match self.value {
            Value::Null | Value::Refused => "nothing",
            Value::Text(_) => "a text",
            Value::List(_) => "a list",
            Value::Map(_) => "a mapping",
        }
    }
}

/// Reads `findings.source`. `None` if its structure cannot be known; everything that is wrong with it has then been reported.
pub(super) fn read<'a>(findings: &mut Findings<'a>) -> Option<Node<'a>> {
    let source = findings.source;
    if source.len() > MAX_BYTES {
        let message = format!("the policy has {} bytes; at most {MAX_BYTES} are allowed", source.len());
        findings.error(Code::TooLarge, Span::START, message);
        return None;
    }
    let mut options = granit_parser::options! { emit_unresolved_aliases: true, emit_anchor_events: true, disallow_directives: true };
    options.set_emit_comments(false);
    let mut builder = Builder {
        findings,
        stack: Vec::new(),
        root: None,
        nodes: 0,
        documents: 0,
    };
    for event in Parser::new_from_str_with_options(source, options) {
        match event {
            Ok((event, at)) => builder.event(event, &at).ok()?,
            Err(error) => {
                builder.scan_error(&error);
                return None;
            }
        }
    }
    builder.root
}

/// Reading cannot go on; the reason has been reported.
struct Stop;

/// A collection that is still open.
enum Frame<'a> {
    List {
        at: Span,
        items: Vec<Node<'a>>,
    },
    Map {
        at: Span,
        entries: Vec<Entry<'a>>,
        key: Option<Node<'a>>,
    },
}

struct Builder<'a, 'f> {
    findings: &'f mut Findings<'a>,
    stack: Vec<Frame<'a>>,
    root: Option<Node<'a>>,
    nodes: usize,
    documents: usize,
}

impl<'a> Builder<'a, '_> {
    fn event(&mut self, event: Event<'a>, at: &granit_parser::Span) -> Result<(), Stop> {
        if let Some(tag) = at.tag_span().filter(|_| event.is_node()) {
            let message = "tags have no meaning in a policy";
            self.findings
                .error(Code::Tag, span(&tag), message)
                .hint("leave it out: every value is read as the text that stands there");
        }
        let at = span(at);
        match event {
            Event::StreamStart | Event::StreamEnd | Event::DocumentEnd | Event::Comment(..) => {}
            Event::DocumentStart(..) => self.document(at)?,
            Event::Anchor(..) => {
                self.findings
                    .error(Code::Anchor, at, "anchors have no meaning in a policy")
                    .hint("leave it out, and write values where they are used");
            }
            Event::Alias(_) | Event::UnresolvedAlias(_) => {
                self.findings
                    .error(Code::Anchor, at, "a policy has no aliases")
                    .hint("write the value itself; if a text begins with `*`, put it in quotes");
                self.node(Node { at, value: Value::Refused })?;
            }
            Event::Scalar(value, style, ..) => {
                let value = scalar(self.findings.source, value, style, at);
                self.node(Node { at, value })?;
            }
            Event::SequenceStart(..) => self.open(Frame::List { at, items: Vec::new() }, at)?,
            Event::MappingStart(..) => self.open(
                Frame::Map {
                    at,
                    entries: Vec::new(),
                    key: None,
                },
                at,
            )?,
            Event::SequenceEnd | Event::MappingEnd => self.close(at.end)?,
            _ => {
                self.findings.error(Code::Syntax, at, "this has no meaning in a policy");
                return Err(Stop);
            }
        }
        Ok(())
    }

    fn document(&mut self, at: Span) -> Result<(), Stop> {
        if self.documents > 0 {
            self.findings
                .error(Code::SeveralDocuments, at, "a policy is one document; a second one begins here")
                .hint("remove the line `---`, or what stands behind it");
            return Err(Stop);
        }
        self.documents = 1;
        Ok(())
    }

    fn open(&mut self, frame: Frame<'a>, at: Span) -> Result<(), Stop> {
        if self.stack.len() >= MAX_DEPTH {
            self.findings.error(
                Code::TooDeep,
                at,
                format!("lists and mappings are nested more than {MAX_DEPTH} deep"),
            );
            return Err(Stop);
        }
        self.stack.push(frame);
        Ok(())
    }

    fn close(&mut self, end: usize) -> Result<(), Stop> {
        match self.stack.pop() {
            Some(Frame::List { at, items }) => self.node(Node {
                at: Span { end, ..at },
                value: Value::List(items),
            }),
            Some(Frame::Map { at, entries, .. }) => {
                let entries = self.without_duplicates(entries);
                self.node(Node {
                    at: Span { end, ..at },
                    value: Value::Map(entries),
                })
            }
            None => Err(Stop),
        }
    }

    /// Puts a finished node where it belongs: into the innermost open collection, or at the root.
    fn node(&mut self, node: Node<'a>) -> Result<(), Stop> {
        self.nodes = self.nodes.saturating_add(1);
        if self.nodes > MAX_NODES {
            self.findings
                .error(Code::TooLarge, node.at, format!("the policy has more than {MAX_NODES} values"));
            return Err(Stop);
        }
        match self.stack.last_mut() {
            None => self.root = Some(node),
            Some(Frame::List { items, .. }) => items.push(node),
            Some(Frame::Map { entries, key, .. }) => match key.take() {
                None => *key = Some(node),
                Some(Node {
                    value: Value::Text(key), ..
                }) if &*key.value == "<<" => {
                    self.findings
                        .error(Code::MergeKey, key.at, "merge keys have no meaning in a policy")
                        .hint("write the keys where they are used");
                }
                Some(Node {
                    value: Value::Text(key), ..
                }) => entries.push(Entry { key, value: node }),
                Some(Node { value: Value::Refused, .. }) => {}
                Some(other) => {
                    self.findings
                        .error(Code::WrongType, other.at, format!("a key must be a text, not {}", other.kind()))
                        .hint("a text that begins with `?`, `{` or `[`, or a name like `null`, needs quotes");
                }
            },
        }
        Ok(())
    }

    /// Reports and drops all but the first of keys that are alike.
    fn without_duplicates(&mut self, entries: Vec<Entry<'a>>) -> Vec<Entry<'a>> {
        let mut seen: BTreeMap<Cow<'a, str>, u32> = BTreeMap::new();
        let mut kept = Vec::with_capacity(entries.len());
        for entry in entries {
            if let Some(line) = seen.get(&entry.key.value) {
                let message = format!("`{}` stands twice in this mapping", short(&entry.key.value));
                self.findings
                    .error(Code::DuplicateKey, entry.key.at, message)
                    .hint(format!("the first one is on line {line}"));
                continue;
            }
            seen.insert(entry.key.value.clone(), entry.key.at.position.line);
            kept.push(entry);
        }
        kept
    }

    fn scan_error(&mut self, error: &ScanError) {
        let at = span(&granit_parser::Span::empty(*error.marker()));
        let kind = error.kind();
        if matches!(
            kind,
            ErrorKind::UndeclaredTagHandle | ErrorKind::ExpectedTagBang | ErrorKind::InvalidTagTerminator
        ) {
            self.findings
                .error(Code::Tag, at, "tags have no meaning in a policy")
                .hint("a text that begins with `!` needs quotes");
            return;
        }
        if matches!(kind, ErrorKind::RecursionLimitExceeded) {
            self.findings.error(
                Code::TooDeep,
                at,
                format!("lists and mappings are nested more than {MAX_DEPTH} deep"),
            );
            return;
        }
        self.findings
            .error(Code::Syntax, at, format!("this is not YAML: {}", error.info()))
            .hint_if(syntax_hint(kind));
    }
}

/// What usually lies behind the commoner syntax errors.
fn syntax_hint(kind: &ErrorKind) -> Option<&'static str> {
    if matches!(
        kind,
        ErrorKind::TabInIndentation | ErrorKind::TabInBlockIndentation | ErrorKind::TabNotAllowed | ErrorKind::TabInPlainScalar
    ) {
        Some("indent with spaces")
    } else if matches!(
        kind,
        ErrorKind::MappingValueNotAllowed | ErrorKind::SimpleKeyExpected | ErrorKind::InvalidSimpleKey
    ) {
        Some("a text that contains `: ` or ends with `:` needs quotes")
    } else if matches!(
        kind,
        ErrorKind::ExpectedBlockMappingKey | ErrorKind::InvalidIndentation | ErrorKind::ExpectedBlockSequenceEntry
    ) {
        Some("look at the indentation of this line and of the one before")
    } else if matches!(kind, ErrorKind::DirectiveDisallowed) {
        Some("remove the line that begins with `%`")
    } else if matches!(kind, ErrorKind::UnexpectedCharacter { .. }) {
        Some("a text that begins with this character needs quotes")
    } else {
        None
    }
}

fn scalar<'a>(source: &str, value: Cow<'a, str>, style: ScalarStyle, at: Span) -> Value<'a> {
    if style == ScalarStyle::Plain && matches!(&*value, "" | "~" | "null" | "Null" | "NULL") {
        return Value::Null;
    }
    let offset = match style {
        ScalarStyle::Plain => Some(at.start),
        ScalarStyle::SingleQuoted | ScalarStyle::DoubleQuoted => at.start.checked_add(1),
        ScalarStyle::Literal | ScalarStyle::Folded => None,
    };
    let stands_there = |start: &usize| {
        let end = start.checked_add(value.len());
        end.and_then(|end| source.get(*start..end)) == Some(&*value) && !value.contains(['\n', '\r'])
    };
    Value::Text(Text {
        verbatim: offset.filter(stands_there),
        value,
        at,
    })
}

fn span(at: &granit_parser::Span) -> Span {
    let offset = |m: &Marker| m.byte_offset().unwrap_or_default();
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let position = Position {
        line: number(at.start.line()).max(1),
        column: number(at.start.col()).saturating_add(1),
    };
    Span {
        position,
        start: offset(&at.start),
        end: offset(&at.end),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tree as JSON-like text, and the codes found with their positions.
    fn outline(source: &str) -> (String, Vec<String>) {
        let mut findings = Findings::new(source);
        let tree = read(&mut findings).map_or_else(|| "-".to_owned(), |n| show(&n));
        (
            tree,
            findings
                .finish()
                .iter()
                .map(|d| format!("{}:{} {} {}", d.line, d.column, d.code, d.text))
                .collect(),
        )
    }

    fn show(node: &Node<'_>) -> String {
        match &node.value {
            Value::Null => "~".into(),
            Value::Refused => "!".into(),
            Value::Text(t) => t.value.to_string(),
            Value::List(items) => format!("[{}]", items.iter().map(show).collect::<Vec<_>>().join(",")),
            Value::Map(entries) => {
                let entries: Vec<_> = entries.iter().map(|e| format!("{}:{}", e.key.value, show(&e.value))).collect();
                format!("{{{}}}", entries.join(","))
            }
        }
    }

    #[test]
    fn scalars_are_the_texts_that_stand_there() {
        let (tree, found) = outline("a: no\nb: 1.10\nc: 0x1f\nd: \"~\"\ne: ~\nf:\ng: 'it''s'\nh: \"\\u00e9\"\n");
        assert_eq!(tree, "{a:no,b:1.10,c:0x1f,d:~,e:~,f:~,g:it's,h:é}");
        assert_eq!(found, Vec::<String>::new());
    }

    #[test]
    fn what_a_policy_does_not_have_is_reported_at_its_place_and_all_at_once() {
        let (tree, found) = outline("a: &x 1\nb: *x\nc: !!str d\n<<: {e: f}\nb: 2\n? [g]\n: h\nz: *nope\n");
        assert_eq!(tree, "{a:1,b:!,c:d,z:!}");
        let want = [
            "1:4 anchor &x",
            "2:4 anchor *x",
            "3:4 tag !!str",
            "4:1 merge_key <<",
            "5:1 duplicate_key b",
            "6:3 wrong_type [g]",
            "8:4 anchor *nope",
        ];
        assert_eq!(found, want);
    }

    #[test]
    fn a_second_document_and_directives_are_refused() {
        assert_eq!(outline("a: b\n---\nc: d\n").1, ["2:1 several_documents ---"]);
        assert_eq!(outline("%YAML 1.2\n---\nc: d\n").1, ["1:1 syntax %YAML 1.2"]);
        assert_eq!(outline("---\nc: d\n...\n").1, Vec::<String>::new());
    }

    #[test]
    fn nesting_and_size_have_limits() {
        for (open, close) in [("[", "]"), ("{a: ", "}")] {
            let nested = |n: usize| open.repeat(n) + &close.repeat(n);
            assert!(outline(&nested(MAX_DEPTH)).1.is_empty());
            let found = outline(&nested(MAX_DEPTH + 1)).1;
            assert!(found.first().is_some_and(|f| f.contains("too_deep")), "{found:?}");
            let found = outline(&nested(100_000)).1;
            assert!(found.first().is_some_and(|f| f.contains("too_deep")), "{found:?}");
        }
        let found = outline(&"- ".repeat(10_000)).1;
        assert!(found.first().is_some_and(|f| f.contains("too_deep")), "{found:?}");
        assert!(
            outline(&" ".repeat(MAX_BYTES + 1))
                .1
                .first()
                .is_some_and(|f| f.contains("too_large"))
        );
        assert!(outline(&"-\n".repeat(MAX_NODES)).1.first().is_some_and(|f| f.contains("too_large")));
    }

    #[test]
    fn json_is_read_too_however_long_its_line() {
        let rules = vec![r#""a -> b:c""#; 5000].join(",");
        let (tree, found) = outline(&format!(
            r#"{{"version":1,"allow":[{rules}],"x":{{"y":["\u00e9\ud83d\ude00\/"]}}}}"#
        ));
        assert_eq!(found, Vec::<String>::new());
        assert!(
            tree.ends_with("x:{y:[é😀/]}}") && tree.starts_with("{version:1,allow:[a -> b:c,a -> b:c,"),
            "{}",
            short(&tree)
        );
    }

    #[test]
    fn the_place_of_a_part_is_exact_where_the_text_stands_literally() {
        let source = "é: [\"x é y\", 'a''b', p  q]\n";
        let mut findings = Findings::new(source);
        let Some(Node {
            value: Value::Map(entries),
            ..
        }) = read(&mut findings)
        else {
            panic!("no mapping")
        };
        let Some(Value::List(items)) = entries.first().map(|e| &e.value.value) else {
            panic!("no list")
        };
        let columns: Vec<_> = items
            .iter()
            .filter_map(|i| match &i.value {
                Value::Text(t) => Some(t.part(source, t.value.len() - 1..t.value.len()).position.column),
                Value::Null | Value::List(_) | Value::Map(_) | Value::Refused => None,
            })
            .collect();
        assert_eq!(columns, [10, 14, 25]);
    }
}
