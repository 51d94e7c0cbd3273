//! Takes secrets out of texts: this host's private keys, as bytes, hexadecimal or base64 wherever they stand, and whatever looks like a
//! token or a credential.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use cloison_proto::token;

/// What stands in place of a secret.
const GONE: &str = "[redacted]";

/// What tokens and credentials begin with, and the shortest rest that makes one.
const WORDS: [(&str, usize); 2] = [(token::PREFIX, 8), ("cloison_", 24)];

/// Knows what to take out.
#[derive(Default)]
pub struct Redactor {
    needles: Vec<String>,
}

impl Redactor {
    /// Takes out these secrets, and all that looks like one.
    pub fn new<'s>(secrets: impl IntoIterator<Item = &'s [u8]>) -> Self {
        let secrets = secrets.into_iter().filter(|secret| secret.len() >= 16);
        Self {
            needles: secrets.flat_map(needles).collect(),
        }
    }

    /// The text without secrets, and how many there were.
    #[must_use]
    pub fn clean(&self, text: &str) -> (String, usize) {
        let mut text = text.to_owned();
        let mut count = 0;
        for needle in &self.needles {
            count += text.matches(needle.as_str()).count();
            text = text.replace(needle.as_str(), GONE);
        }
        for (word, least) in WORDS {
            let (cleaned, found) = without_words(&text, word, least);
            (text, count) = (cleaned, count + found);
        }
        (text, count)
    }
}

/// A secret in all forms that a text can hold it in: inside a longer base64 text it can begin at three places of a group, and its first and
/// last characters then depend on what stands around it.
fn needles(secret: &[u8]) -> Vec<String> {
    let hex: String = secret.iter().map(|b| format!("{b:02x}")).collect();
    let mut found = vec![hex.to_uppercase(), hex];
    found.extend(std::str::from_utf8(secret).ok().map(str::to_owned));
    for shift in 0..3 {
        let padded = [&vec![0; shift], secret].concat();
        for engine in [&STANDARD_NO_PAD, &URL_SAFE_NO_PAD] {
            let whole = engine.encode(&padded);
            // Characters with bits of the padding, and those with bits of what would follow.
            let first = (shift * 8).div_ceil(6);
            let last = padded.len() * 8 / 6;
            found.extend(whole.get(first..last).map(str::to_owned));
        }
    }
    found
}

/// The text without the words that begin with `prefix` and go on for `least` characters of base64url or more.
fn without_words(text: &str, prefix: &str, least: usize) -> (String, usize) {
    let (mut cleaned, mut count) = (String::with_capacity(text.len()), 0);
    let mut rest = text;
    while let Some(at) = rest.find(prefix) {
        let (before, word) = rest.split_at(at);
        let body = word.get(prefix.len()..).unwrap_or_default();
        let length = body.bytes().take_while(|b| b.is_ascii_alphanumeric() || b"_-".contains(b)).count();
        cleaned.push_str(before);
        if length >= least {
            cleaned.push_str(GONE);
            count += 1;
        } else {
            cleaned.push_str(word.get(..prefix.len() + length).unwrap_or_default());
        }
        rest = body.get(length..).unwrap_or_default();
    }
    cleaned.push_str(rest);
    (cleaned, count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_secret_is_found_in_every_form_and_inside_longer_texts(
            secret in proptest::collection::vec(any::<u8>(), 32),
            before in proptest::collection::vec(any::<u8>(), 0..7),
            after in proptest::collection::vec(any::<u8>(), 0..7),
        ) {
            let redactor = Redactor::new([secret.as_slice()]);
            let inside = [&before[..], &secret, &after].concat();
            let hex: String = inside.iter().map(|b| format!("{b:02x}")).collect();
            for text in [hex.to_uppercase(), hex, STANDARD_NO_PAD.encode(&inside), URL_SAFE_NO_PAD.encode(&inside)] {
                let (cleaned, count) = redactor.clean(&format!("key={text};"));
                prop_assert!(count >= 1 && cleaned.contains(GONE), "{} in {}", cleaned, text);
            }
        }
    }

    #[test]
    fn tokens_and_credentials_are_taken_out_and_other_words_stay() {
        let token = format!("{}{}", token::PREFIX, "A".repeat(100));
        let text = format!("join {token}, cloison_0707070707070707_QUJDREVGRw then cloison_agent and cloison1_ alone");
        let (cleaned, count) = Redactor::default().clean(&text);
        assert_eq!(cleaned, format!("join {GONE}, {GONE} then cloison_agent and cloison1_ alone"));
        assert_eq!(count, 2);
    }
}
