//! The enrollment token's text: `cloison1_` and base64url of a fixed layout, at most 512 characters.
//!
//! It bootstraps trust in both directions: its secret proves to the coordinator that the bearer may enroll one host; its pin of the trust
//! root proves to the bearer that it talks to the right coordinator. Typing errors are found without a network, by the checksum.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use crate::id::{MeshId, TokenId};
use crate::key::Secret32;
use crate::version::MeshTime;

/// What every token's text starts with; the digit is the layout's version.
pub const PREFIX: &str = "cloison1_";

/// Longest text, in characters.
pub const MAX_LEN: usize = 512;

/// Most coordinator addresses in one token.
pub const MAX_ADDRESSES: usize = 3;

/// Longest coordinator address, in characters of `host:port`.
pub const MAX_ADDRESS_LEN: usize = 72;

/// An enrollment token as its bearer holds it.
#[derive(Clone)]
pub struct EnrollmentToken {
    /// Which token; not secret.
    pub id: TokenId,
    /// What proves it.
    pub secret: Secret32,
    /// The mesh that it is for.
    pub mesh: MeshId,
    /// SHA-256 of the trust root's key ([`crate::trust::root_pin`]).
    pub root_pin: [u8; 32],
    /// When it ends, by the coordinator's clock.
    pub expires: MeshTime,
    /// Where the coordinator listens, as `host:port`; 1 to 3.
    pub addresses: Vec<String>,
}

impl fmt::Debug for EnrollmentToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EnrollmentToken({}, hidden)", self.id)
    }
}

/// Why a text is no token. Nothing of the text is repeated: it may hold a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// The prefix is missing or of a later version.
    #[error("an enrollment token starts with `{PREFIX}`; this does not")]
    Prefix,
    /// Too long, or with characters that no token has.
    #[error("the token has characters that no token has, or more than 512 of them: was it cut or wrapped when it was copied?")]
    Text,
    /// The checksum is wrong.
    #[error("the token's checksum is wrong: a character is missing or was changed when it was copied")]
    Checksum,
    /// The checksum is right, but the content is not a token's.
    #[error("the token was made by a version of Cloison that this one does not understand")]
    Layout,
    /// An address that cannot stand in a token.
    #[error("a token holds 1 to 3 coordinator addresses of at most 72 characters")]
    Addresses,
}

impl EnrollmentToken {
    /// The text form, which holds the secret.
    ///
    /// # Errors
    /// [`TokenError::Addresses`].
    pub fn to_text(&self) -> Result<Zeroizing<String>, TokenError> {
        if self.addresses.is_empty() || self.addresses.len() > MAX_ADDRESSES {
            return Err(TokenError::Addresses);
        }
        let mut bytes = Zeroizing::new(Vec::with_capacity(256));
        bytes.extend_from_slice(&self.id.0);
        bytes.extend_from_slice(self.secret.expose());
        bytes.extend_from_slice(&self.mesh.0);
        bytes.extend_from_slice(&self.root_pin);
        bytes.extend_from_slice(&self.expires.0.to_be_bytes());
        for address in &self.addresses {
            let len = u8::try_from(address.len())
                .ok()
                .filter(|len| (1..=MAX_ADDRESS_LEN).contains(&usize::from(*len)));
            bytes.push(len.ok_or(TokenError::Addresses)?);
            bytes.extend_from_slice(address.as_bytes());
        }
        let sum = checksum(&bytes);
        bytes.extend_from_slice(&sum);
        let mut text = Zeroizing::new(String::with_capacity(MAX_LEN));
        text.push_str(PREFIX);
        URL_SAFE_NO_PAD.encode_string(bytes.as_slice(), &mut text);
        Ok(text)
    }
}

/// The first four bytes of the SHA-256: an error in copying passes unnoticed once in four thousand million times.
fn checksum(bytes: &[u8]) -> [u8; 4] {
    let digest: [u8; 32] = Sha256::digest(bytes).into();
    let [a, b, c, d, ..] = digest;
    [a, b, c, d]
}

/// Takes bytes off the front of a slice.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], TokenError> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(TokenError::Layout)?;
        self.0 = rest;
        Ok(*head)
    }

    fn take_text(&mut self) -> Result<String, TokenError> {
        let [len] = self.take::<1>()?;
        let (text, rest) = self.0.split_at_checked(usize::from(len)).ok_or(TokenError::Layout)?;
        self.0 = rest;
        let text = std::str::from_utf8(text).map_err(|_| TokenError::Layout)?;
        let plain = !text.is_empty() && text.len() <= MAX_ADDRESS_LEN && text.chars().all(|c| c.is_ascii_graphic());
        if plain { Ok(text.into()) } else { Err(TokenError::Layout) }
    }
}

impl FromStr for EnrollmentToken {
    type Err = TokenError;
    fn from_str(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        let encoded = text.strip_prefix(PREFIX).ok_or(TokenError::Prefix)?;
        if text.len() > MAX_LEN {
            return Err(TokenError::Text);
        }
        let bytes = Zeroizing::new(URL_SAFE_NO_PAD.decode(encoded).map_err(|_| TokenError::Text)?);
        let (content, sum) = bytes.split_last_chunk::<4>().ok_or(TokenError::Text)?;
        if checksum(content) != *sum {
            return Err(TokenError::Checksum);
        }
        let mut reader = Reader(content);
        let mut token = Self {
            id: TokenId(reader.take()?),
            secret: Secret32::from_bytes(reader.take()?),
            mesh: MeshId(reader.take()?),
            root_pin: reader.take()?,
            expires: MeshTime(u64::from_be_bytes(reader.take()?)),
            addresses: Vec::new(),
        };
        while !reader.0.is_empty() {
            token.addresses.push(reader.take_text()?);
        }
        if matches!(token.addresses.len(), 1..=MAX_ADDRESSES) {
            Ok(token)
        } else {
            Err(TokenError::Layout)
        }
    }
}

/// The body of the fuzz target: any text is refused, or is exactly the text of the token that it reads as.
#[doc(hidden)]
#[must_use]
pub fn fuzz_token(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return true };
    match text.parse::<EnrollmentToken>() {
        Ok(token) => token.to_text().is_ok_and(|again| again.as_str() == text.trim()),
        Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(addresses: &[&str]) -> EnrollmentToken {
        EnrollmentToken {
            id: TokenId([1; 8]),
            secret: Secret32::from_bytes([0xab; 32]),
            mesh: MeshId([2; 16]),
            root_pin: [3; 32],
            expires: MeshTime(1_800_000_000),
            addresses: addresses.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn the_longest_token_fits_and_reads_back() -> Result<(), TokenError> {
        let address = format!("{}:7443", "a".repeat(MAX_ADDRESS_LEN - 5));
        let text = token(&[&address, &address, &address]).to_text()?;
        assert!(text.len() <= MAX_LEN, "{}", text.len());
        let back: EnrollmentToken = text.parse()?;
        assert_eq!(
            (back.id, back.mesh, back.root_pin, back.expires),
            (TokenId([1; 8]), MeshId([2; 16]), [3; 32], MeshTime(1_800_000_000))
        );
        assert_eq!(back.addresses, [address.as_str(), &address, &address]);
        assert!(back.secret.matches(&token(&[]).secret.hash()));
        Ok(())
    }

    #[test]
    fn every_changed_or_missing_character_is_noticed() -> Result<(), TokenError> {
        let text = token(&["10.0.0.1:7443"]).to_text()?;
        for position in 0..text.len() {
            let mut changed: Vec<char> = text.chars().collect();
            if let Some(c) = changed.get_mut(position) {
                *c = if *c == 'A' { 'B' } else { 'A' };
            }
            assert!(changed.iter().collect::<String>().parse::<EnrollmentToken>().is_err(), "{position}");
            assert!(
                text.get(..position).is_none_or(|cut| cut.parse::<EnrollmentToken>().is_err()),
                "{position}"
            );
        }
        Ok(())
    }

    #[test]
    fn an_error_repeats_nothing_of_the_token() -> Result<(), TokenError> {
        let text = token(&["10.0.0.1:7443"]).to_text()?;
        let cut = text.get(..60).unwrap_or_default();
        let shown = cut
            .parse::<EnrollmentToken>()
            .map_err(|e| format!("{e} {e:?}"))
            .err()
            .unwrap_or_default();
        assert!(!shown.is_empty() && !shown.contains(cut.get(10..20).unwrap_or("?")));
        assert!(!format!("{:?}", token(&[])).contains("abab"));
        Ok(())
    }

    #[test]
    fn addresses_are_needed_and_bounded() {
        assert_eq!(token(&[]).to_text().err(), Some(TokenError::Addresses));
        assert_eq!(token(&["a:1"; 4]).to_text().err(), Some(TokenError::Addresses));
        assert_eq!(token(&[&"a".repeat(73)]).to_text().err(), Some(TokenError::Addresses));
        assert_eq!(token(&[""]).to_text().err(), Some(TokenError::Addresses));
    }
}
