//! The text of a hosts file with managed blocks in it: finding our own, taking it out, putting another one in.
//!
//! ```text
//! 127.0.0.1 localhost
//! # BEGIN cloison host_3f0a… mesh_91c2…: kept by cloison-agent, changes inside are lost
//! 10.77.1.1  postgres.db-1.cloison.internal postgres.cloison.internal
//! # END cloison host_3f0a…
//! ```
//!
//! The host's id tells the blocks of several agents on one machine apart. A file is bytes: what is not ours is copied as it is, whatever it
//! means. Of a damaged block (an end that is lost, a second copy, the beginning of one that was cut off) only that is taken for ours what has
//! exactly the form in which we write it; a line that somebody else put inside stays, behind the block.
//!
//! Nothing here touches a file.

use std::net::IpAddr;

use cloison_proto::id::{HostId, MeshId};
use cloison_proto::net::OverlayRange;
use serde::{Deserialize, Serialize};

use super::ZONE;

/// What every block begins with.
const BEGIN: &str = "# BEGIN cloison ";

/// What every block ends with.
const END: &str = "# END cloison ";

/// Whose block it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The mesh.
    pub mesh: MeshId,
    /// The host.
    pub host: HostId,
    /// The mesh's addresses: a line with another one is not ours.
    pub overlay: OverlayRange,
}

impl Owner {
    fn begin(&self) -> String {
        format!("{BEGIN}{} {}: kept by cloison-agent, changes inside are lost", self.host, self.mesh)
    }

    fn end(&self) -> String {
        format!("{END}{}", self.host)
    }
}

/// `content` with exactly one block of `owner` that holds `lines`, in the place of the former one or at the end; with no block, if `lines` is
/// empty. Doing it twice changes nothing.
#[must_use]
pub fn with_block(content: &[u8], owner: &Owner, lines: &str) -> Vec<u8> {
    let (mut rest, at) = without(content, owner);
    if lines.is_empty() {
        return rest;
    }
    let at = at.unwrap_or_else(|| {
        if rest.last().is_some_and(|last| *last != b'\n') {
            rest.push(b'\n');
        }
        rest.len()
    });
    let block = format!("{}\n{lines}{}\n", owner.begin(), owner.end());
    rest.splice(at..at, block.into_bytes());
    rest
}

/// The hosts that have a block in `content`, as far as its first lines can be read.
#[must_use]
pub fn owners(content: &[u8]) -> Vec<HostId> {
    let lines = content.split(|b| *b == b'\n').filter_map(|line| std::str::from_utf8(line).ok());
    let begins = lines.filter_map(|line| line.strip_prefix(BEGIN));
    begins.filter_map(|rest| rest.split(' ').next()?.parse().ok()).collect()
}

/// What a line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The first line of our block.
    Begin,
    /// Its last line.
    End,
    /// The first or last line of another agent's block.
    Other,
    /// A line of the form in which we write names.
    Name,
    /// What is left of such a line where a write was cut off: the last line of the file, without its end.
    Fragment,
    /// Everything else.
    Foreign,
}

/// `content` without anything of ours, and where it stood.
fn without(content: &[u8], owner: &Owner) -> (Vec<u8>, Option<usize>) {
    let lines: Vec<&[u8]> = content.split_inclusive(|b| *b == b'\n').collect();
    let kinds: Vec<Kind> = lines.iter().map(|line| kind(line, owner)).collect();
    let mut kept: Vec<usize> = Vec::with_capacity(lines.len());
    let mut place = None;
    let mut next = 0;
    while let Some(kind) = kinds.get(next) {
        match kind {
            Kind::Begin => {
                place.get_or_insert(kept.len());
                let inside = next + 1..end_of(&kinds, next + 1);
                next = inside.end;
                kept.extend(inside.filter(|i| kinds.get(*i).is_some_and(|k| matches!(k, Kind::Foreign | Kind::Other))));
            }
            Kind::End => {
                // Its first line is lost: the names right before it are ours.
                while kept.last().is_some_and(|i| kinds.get(*i) == Some(&Kind::Name)) {
                    kept.pop();
                }
                let here = kept.len();
                place = Some(place.map_or(here, |p: usize| p.min(here)));
                next += 1;
            }
            Kind::Other | Kind::Name | Kind::Fragment | Kind::Foreign => {
                kept.push(next);
                next += 1;
            }
        }
    }
    let bytes = |indices: &[usize]| indices.iter().filter_map(|i| lines.get(*i)).copied().collect::<Vec<_>>().concat();
    let at = place.map(|place| bytes(kept.get(..place).unwrap_or_default()).len());
    (bytes(&kept), at)
}

/// Where the block ends that begins before `from`: behind its last line; or, if that is lost, behind the names that follow.
fn end_of(kinds: &[Kind], from: usize) -> usize {
    let rest = kinds.get(from..).unwrap_or_default();
    let marker = rest.iter().position(|k| matches!(k, Kind::Begin | Kind::End | Kind::Other));
    match marker.and_then(|at| Some((at, rest.get(at)?))) {
        Some((at, Kind::End)) => from + at + 1,
        _ => from + rest.iter().take_while(|k| matches!(k, Kind::Name | Kind::Fragment)).count(),
    }
}

fn kind(line: &[u8], owner: &Owner) -> Kind {
    let complete = line.ends_with(b"\n");
    let Ok(text) = std::str::from_utf8(line) else {
        return Kind::Foreign;
    };
    // Cut off behind the word that tells it from any other comment, the space behind that word included.
    let cut = |whole: &str, least: &str| !complete && text.len() > least.len() && whole.starts_with(text);
    let (begin_is_cut, end_is_cut) = (cut(&owner.begin(), "# BEGIN"), cut(&owner.end(), "# END"));
    let text = text.trim_end();
    let first = |rest: &str| rest.split(' ').next().map(str::parse::<HostId>);
    if let Some(rest) = text.strip_prefix(BEGIN)
        && let Some(Ok(host)) = first(rest)
    {
        return if host == owner.host { Kind::Begin } else { Kind::Other };
    }
    if let Some(rest) = text.strip_prefix(END)
        && let Some(Ok(host)) = first(rest)
    {
        return if host == owner.host { Kind::End } else { Kind::Other };
    }
    if begin_is_cut {
        return Kind::Begin;
    }
    if end_is_cut {
        return Kind::End;
    }
    if is_name(text, owner) {
        return Kind::Name;
    }
    let is_cut = !complete && (may_be_cut(text, owner) || owner.end().starts_with(text));
    if is_cut { Kind::Fragment } else { Kind::Foreign }
}

/// Whether a line is one of names as we write it: an address of the mesh and names of the zone, nothing else.
fn is_name(text: &str, owner: &Owner) -> bool {
    let mut words = text.split_ascii_whitespace();
    let of_mesh = words
        .next()
        .and_then(|word| word.parse().ok())
        .is_some_and(|a| owner.overlay.contains(a));
    let mut names = words.peekable();
    let in_zone = |name: &str| name.strip_suffix(ZONE).is_some_and(|rest| rest.ends_with('.'));
    of_mesh && names.peek().is_some() && names.all(in_zone)
}

/// Whether the last line of a file may be what is left of one of names.
fn may_be_cut(text: &str, owner: &Owner) -> bool {
    match text.split_ascii_whitespace().next().map(|word| (word, word.parse::<IpAddr>())) {
        None => true,
        Some((_, Ok(address))) => owner.overlay.contains(address),
        Some((word, Err(_))) => word.len() == text.len() && word.bytes().all(|b| b.is_ascii_hexdigit() || b".:".contains(&b)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FOREIGN: &str = "127.0.0.1 localhost\n\n# a comment\n192.0.2.7 printer\n";

    fn owner(number: u8) -> Owner {
        Owner {
            mesh: MeshId([9; 16]),
            host: HostId([number; 16]),
            overlay: range(),
        }
    }

    fn range() -> OverlayRange {
        let made = OverlayRange::new([10, 77, 0, 0].into(), 16, [0xfd12, 0x3456, 0x789a, 0, 0, 0, 0, 0].into());
        made.unwrap_or_else(|e| unreachable!("{e}"))
    }

    fn names(number: u8) -> String {
        format!("fd12:3456:789a::1:{number}\tpg.db-{number}.{ZONE} pg.{ZONE}\n10.77.1.{number}\tpg.db-{number}.{ZONE} pg.{ZONE}\n")
    }

    fn text(bytes: &[u8]) -> String {
        String::from_utf8_lossy(bytes).into_owned()
    }

    #[test]
    fn a_block_comes_changes_in_place_and_goes_without_a_trace() {
        let one = with_block(FOREIGN.as_bytes(), &owner(1), &names(1));
        assert!(text(&one).starts_with(FOREIGN) && text(&one).contains("10.77.1.1\tpg.db-1"));
        let followed = [&one[..], b"192.0.2.8 later\n"].concat();
        let two = with_block(&followed, &owner(1), &names(2));
        assert!(text(&two).ends_with("# END cloison host_01010101010101010101010101010101\n192.0.2.8 later\n"));
        assert!(!text(&two).contains("db-1."));
        assert_eq!(text(&with_block(&two, &owner(1), "")), format!("{FOREIGN}192.0.2.8 later\n"));
    }

    #[test]
    fn blocks_of_other_agents_stay_as_they_are() {
        let one = with_block(FOREIGN.as_bytes(), &owner(1), &names(1));
        let both = with_block(&one, &owner(2), &names(2));
        assert_eq!(owners(&both), [owner(1).host, owner(2).host]);
        assert_eq!(with_block(&both, &owner(2), ""), one);
        let without_one = with_block(&both, &owner(1), "");
        assert_eq!(without_one, with_block(FOREIGN.as_bytes(), &owner(2), &names(2)));
    }

    #[test]
    fn two_blocks_become_one() {
        let one = with_block(FOREIGN.as_bytes(), &owner(1), &names(1));
        let twice = [
            &one[..],
            b"192.0.2.8 later\n",
            one.strip_prefix(FOREIGN.as_bytes()).unwrap_or_default(),
        ]
        .concat();
        let expected = with_block(&[&one[..], b"192.0.2.8 later\n"].concat(), &owner(1), &names(2));
        assert_eq!(text(&with_block(&twice, &owner(1), &names(2))), text(&expected));
    }

    #[test]
    fn a_lost_end_or_beginning_costs_nobody_else_a_line() {
        let one = text(&with_block(FOREIGN.as_bytes(), &owner(1), &names(1))) + "192.0.2.8 later\n";
        let expected = with_block(one.as_bytes(), &owner(1), &names(2));
        for marker in [BEGIN, END] {
            let lost: String = one.split_inclusive('\n').filter(|l| !l.starts_with(marker)).collect();
            assert_eq!(
                text(&with_block(lost.as_bytes(), &owner(1), &names(2))),
                text(&expected),
                "without {marker}"
            );
        }
    }

    #[test]
    fn what_somebody_wrote_into_the_block_moves_behind_it() {
        let one = text(&with_block(FOREIGN.as_bytes(), &owner(1), &names(1)));
        let edited = one.replace("10.77.1.1\t", "192.0.2.9 mine\n192.0.2.10 own.cloison.internal\n10.77.1.1\t");
        let mended = text(&with_block(edited.as_bytes(), &owner(1), &names(1)));
        assert_eq!(mended, format!("{one}192.0.2.9 mine\n192.0.2.10 own.cloison.internal\n"));
    }

    #[test]
    fn a_last_line_without_its_end_gets_one_and_bytes_that_are_no_text_stay() {
        let odd = b"\xff\xfe not text\n127.0.0.1 localhost";
        let with = with_block(odd, &owner(1), &names(1));
        assert!(with.starts_with(b"\xff\xfe not text\n127.0.0.1 localhost\n# BEGIN"));
        assert_eq!(with_block(&with, &owner(1), ""), [&odd[..], b"\n"].concat());
    }

    /// A line of a hosts file that nobody takes for ours.
    fn foreign() -> impl Strategy<Value = String> {
        prop_oneof![
            "[0-9a-f.:]{1,12}[ \t][a-z.]{1,12}",
            "#[ a-zA-Z]{0,20}",
            Just(String::new()),
            Just("# BEGIN cloison something else".to_owned()),
            Just("192.0.2.1 own.cloison.internal".to_owned()),
        ]
    }

    proptest! {
        #[test]
        fn every_foreign_line_outlives_any_damage_to_our_block(
            before in proptest::collection::vec(foreign(), 0..6),
            after in proptest::collection::vec(foreign(), 0..6),
            count in 1u8..5,
            drop in 0usize..12,
            twice: bool,
        ) {
            let lines = |list: &[String]| list.iter().map(|l| format!("{l}\n")).collect::<String>();
            let ours: String = (1..=count).map(names).collect();
            let (before, after) = (lines(&before), lines(&after));
            let block = text(&with_block(b"", &owner(1), &ours));
            let mut damaged: Vec<&str> = block.split_inclusive('\n').collect();
            if drop < damaged.len() {
                damaged.remove(drop);
            }
            let damaged = damaged.concat().repeat(if twice { 2 } else { 1 });
            let file = format!("{before}{damaged}{after}");
            let mended = with_block(file.as_bytes(), &owner(1), "");
            prop_assert_eq!(text(&mended), format!("{before}{after}"));
            let full = with_block(file.as_bytes(), &owner(1), &ours);
            prop_assert_eq!(text(&with_block(&full, &owner(1), &ours)), text(&full));
        }

        #[test]
        fn a_block_cut_off_behind_its_first_word_is_mended(count in 1u8..4, cut in 8usize..600) {
            let ours: String = (1..=count).map(names).collect();
            let whole = with_block(FOREIGN.as_bytes(), &owner(1), &ours);
            let cut = whole.get(..FOREIGN.len() + cut).unwrap_or(&whole);
            prop_assert_eq!(text(&with_block(cut, &owner(1), &ours)), text(&whole));
        }

        #[test]
        fn any_bytes_are_taken(content in proptest::collection::vec(any::<u8>(), 0..300)) {
            let with = with_block(&content, &owner(1), &names(1));
            prop_assert_eq!(with_block(&with, &owner(1), &names(1)), with.clone());
        }
    }
}
