//! One entry of `allow`: an arrow, or a mapping with the arrow's sides and what is to be said about it.

use super::arrow::{MAX_SIDE, Reader, Side};
use super::diagnostic::{Code, Findings, Placed, Span};
use super::fields::{Fields, Keys, text, texts};
use super::model::{Note, Target};
use super::yaml::{Entry, Node, Text, Value};
use crate::id::RuleId;
use crate::label::Selector;
use crate::version::MeshTime;

const KEYS: Keys = Keys {
    of: "a rule",
    known: &["from", "to", "why", "owner", "expires", "id"],
    later: &[],
    hint: RULE_HINT,
};

const RULE_HINT: &str = "write `- n8n -> postgres:sql`, or `- {from: n8n, to: postgres:sql, why: ...}`";

const TIME_HINT: &str = "write it as RFC 3339 does, in whole seconds and with its zone: `2027-01-01T00:00:00Z`";

/// A rule as far as it could be read; a side that has errors is `None`.
#[derive(Debug)]
pub(super) struct Draft {
    pub(super) at: Span,
    pub(super) from: Side<Selector>,
    pub(super) to: Side<Target>,
    pub(super) id: Option<Placed<RuleId>>,
    pub(super) why: Option<Note>,
    pub(super) owner: Option<Note>,
    pub(super) expires: Option<Placed<MeshTime>>,
}

/// Reads one entry of `allow`. A `None` may also stand for something that is simply not there: only a text without any error
/// becomes a policy.
pub(super) fn read<'a>(node: &Node<'a>, findings: &mut Findings<'a>) -> Draft {
    let mut draft = Draft {
        at: node.at,
        from: None,
        to: None,
        id: None,
        why: None,
        owner: None,
        expires: None,
    };
    if let Value::Text(text) = &node.value {
        (draft.from, draft.to) = Reader::new(text, findings).arrow();
        return draft;
    }
    if matches!(node.value, Value::Null | Value::List(_)) {
        findings
            .error(
                Code::WrongType,
                node.at,
                format!("a rule must be an arrow or a mapping, not {}", node.kind()),
            )
            .hint(RULE_HINT);
        return draft;
    }
    if unquoted_arrow(node, findings) {
        return draft;
    }
    let Some(fields) = Fields::of(node, node.at, &KEYS, findings) else {
        return draft;
    };
    draft.from = fields
        .require("from", "say who may: `from: n8n`", findings)
        .and_then(|e| side(e, "`from`", findings, |text, findings| Reader::new(text, findings).selectors()));
    draft.to = fields
        .require("to", "say what may be reached: `to: postgres:sql`", findings)
        .and_then(|e| side(e, "`to`", findings, |text, findings| Reader::new(text, findings).targets()));
    draft.why = fields.get("why").and_then(|e| note(e, "`why`", findings));
    draft.owner = fields.get("owner").and_then(|e| note(e, "`owner`", findings));
    draft.expires = fields.get("expires").and_then(|e| expires(e, findings));
    draft.id = fields.get("id").and_then(|e| id(e, findings));
    draft
}

/// `- n8n -> postgres:` is a mapping to YAML. Says what is really missing.
fn unquoted_arrow<'a>(node: &Node<'a>, findings: &mut Findings<'a>) -> bool {
    let Value::Map(entries) = &node.value else { return false };
    let Some(Entry { key, .. }) = entries.iter().find(|e| e.key.value.contains("->")) else {
        return false;
    };
    findings
        .error(Code::MissingService, key.at, "this does not say which service")
        .hint("write it right behind the colon, without a blank: `postgres:sql`, or `postgres:*` for all its services");
    true
}

fn side<'a, T>(
    entry: &Entry<'a>,
    what: &str,
    findings: &mut Findings<'a>,
    read: impl Fn(&Text<'a>, &mut Findings<'a>) -> Side<T>,
) -> Side<T> {
    let texts = texts(&entry.value, entry.key.at, what, findings)?;
    let parts: Vec<_> = texts.into_iter().map(|t| read(t, findings)).collect();
    let all: Vec<_> = parts.into_iter().collect::<Option<Vec<_>>>()?.into_iter().flatten().collect();
    if all.len() > MAX_SIDE {
        let message = format!("{what} has {} entries; at most {MAX_SIDE} are allowed", all.len());
        findings
            .error(Code::TooLarge, entry.key.at, message)
            .hint("give the components a label, and select by it");
        return None;
    }
    Some(all)
}

fn note<'a>(entry: &Entry<'a>, what: &str, findings: &mut Findings<'a>) -> Option<Note> {
    let text = text(&entry.value, entry.key.at, what, findings)?;
    match text.value.parse() {
        Ok(note) => Some(note),
        Err(error) => {
            findings.error(Code::BadText, text.at, format!("{what}: {error}"));
            None
        }
    }
}

fn id<'a>(entry: &Entry<'a>, findings: &mut Findings<'a>) -> Option<Placed<RuleId>> {
    let text = text(&entry.value, entry.key.at, "`id`", findings)?;
    match text.value.parse() {
        Ok(value) => Some(Placed { at: text.at, value }),
        Err(error) => {
            findings
                .error(Code::BadId, text.at, format!("not a rule's id: {error}"))
                .hint("leave `id` out: a rule without one gets one from its arrow");
            None
        }
    }
}

fn expires<'a>(entry: &Entry<'a>, findings: &mut Findings<'a>) -> Option<Placed<MeshTime>> {
    let text = text(&entry.value, entry.key.at, "`expires`", findings)?;
    let Some(value) = time(&text.value) else {
        findings.error(Code::BadTime, text.at, "this is no time").hint(TIME_HINT);
        return None;
    };
    Some(Placed { at: text.at, value })
}

/// A time as RFC 3339 section 5.6 writes it, without fractions of a second and not before 1970.
fn time(text: &str) -> Option<MeshTime> {
    let date = |c: u8, want: u8| if want == b'0' { c.is_ascii_digit() } else { c == want };
    let shaped = |shape: &[u8]| text.len() == shape.len() && text.bytes().zip(shape).all(|(c, want)| date(c, *want));
    let shapes: [&[u8]; 3] = [b"0000-00-00T00:00:00Z", b"0000-00-00T00:00:00+00:00", b"0000-00-00T00:00:00-00:00"];
    if !shapes.into_iter().any(shaped) {
        return None;
    }
    let time: jiff::Timestamp = text.parse().ok()?;
    u64::try_from(time.as_second()).ok().map(MeshTime)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rfc_3339_in_whole_seconds() {
        assert_eq!(time("2027-01-01T00:00:00Z"), Some(MeshTime(1_798_761_600)));
        assert_eq!(time("2027-01-01T01:00:00+01:00"), Some(MeshTime(1_798_761_600)));
        assert_eq!(time("1970-01-01T00:00:00Z"), Some(MeshTime(0)));
        for bad in [
            "",
            "2027-01-01",
            "2027-01-01T00:00:00",
            "2027-01-01 00:00:00Z",
            "2027-01-01T00:00:00.5Z",
            "2027-13-01T00:00:00Z",
            "2027-02-29T00:00:00Z",
            "1969-12-31T23:59:59Z",
            "2027-01-01T00:00:00+0100",
            "2027-01-01T00:00:00z",
            "1798761600",
        ] {
            assert_eq!(time(bad), None, "{bad:?}");
        }
    }
}
