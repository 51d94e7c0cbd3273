//! API credentials: bearer texts `cloison_<id>_<secret>`, their scopes, and who a request comes from. At rest there is a hash only.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use cloison_proto::id::CredentialId;
use cloison_proto::key::Secret32;
use cloison_proto::version::MeshTime;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// What a credential allows. Each scope includes reading; only `owner` may manage credentials, and it includes every other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Everything, credentials and mesh settings included.
    Owner,
    /// Change the policy.
    Policy,
    /// Create and revoke enrollment tokens.
    Enroll,
    /// Name, label and revoke hosts.
    Operate,
    /// See everything but secrets.
    Read,
}

impl Scope {
    /// Every scope, widest first.
    pub const ALL: [Self; 5] = [Self::Owner, Self::Policy, Self::Enroll, Self::Operate, Self::Read];

    /// The scope's word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Owner => "owner",
            Self::Policy => "policy",
            Self::Enroll => "enroll",
            Self::Operate => "operate",
            Self::Read => "read",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Not one of the scopes' words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no scope: write owner, policy, enroll, operate or read")]
pub struct UnknownScope(String);

impl FromStr for Scope {
    type Err = UnknownScope;
    fn from_str(text: &str) -> Result<Self, UnknownScope> {
        Self::ALL
            .into_iter()
            .find(|scope| scope.as_str() == text)
            .ok_or_else(|| UnknownScope(text.into()))
    }
}

/// Whoever showed a valid credential.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    /// The credential.
    pub id: CredentialId,
    /// What its maker called it.
    pub name: String,
    /// What it allows.
    pub scopes: BTreeSet<Scope>,
    /// When it runs out.
    pub expires: MeshTime,
}

impl Principal {
    /// Whether the credential allows what `scope` stands for.
    #[must_use]
    pub fn may(&self, scope: Scope) -> bool {
        includes(&self.scopes, scope)
    }
}

/// Whether `held` includes `wanted`: `owner` includes all, and every scope includes `read`.
#[must_use]
pub fn includes(held: &BTreeSet<Scope>, wanted: Scope) -> bool {
    held.contains(&wanted) || held.contains(&Scope::Owner) || (wanted == Scope::Read && !held.is_empty())
}

/// A credential's text, taken apart.
#[derive(Debug, Clone)]
pub struct CredentialText {
    /// The public part.
    pub id: CredentialId,
    /// The secret part.
    pub secret: Secret32,
}

/// Not a credential's text. It does not say in which way: the text may hold a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this is no credential: it reads `cloison_`, an id, `_` and a secret")]
pub struct MalformedCredential;

impl CredentialText {
    /// The text to be shown once, to be kept by its holder.
    #[must_use]
    pub fn reveal(&self) -> Zeroizing<String> {
        let id = self.id.to_string();
        let digits = id.strip_prefix("cred_").unwrap_or(&id);
        Zeroizing::new(format!("cloison_{digits}_{}", URL_SAFE_NO_PAD.encode(self.secret.expose())))
    }
}

impl FromStr for CredentialText {
    type Err = MalformedCredential;
    fn from_str(text: &str) -> Result<Self, MalformedCredential> {
        let (digits, secret) = text
            .strip_prefix("cloison_")
            .and_then(|rest| rest.split_once('_'))
            .ok_or(MalformedCredential)?;
        let id = format!("cred_{digits}").parse().map_err(|_| MalformedCredential)?;
        let bytes = Zeroizing::new(URL_SAFE_NO_PAD.decode(secret).map_err(|_| MalformedCredential)?);
        let bytes = bytes.as_slice().try_into().map_err(|_| MalformedCredential)?;
        Ok(Self {
            id,
            secret: Secret32::from_bytes(bytes),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credential_round_trips_through_its_text_and_hides_in_debug() -> Result<(), MalformedCredential> {
        let made = CredentialText {
            id: CredentialId([7; 8]),
            secret: Secret32::from_bytes([0xf8; 32]),
        };
        let read: CredentialText = made.reveal().parse()?;
        assert_eq!((read.id, read.secret.expose()), (made.id, made.secret.expose()));
        let secret = URL_SAFE_NO_PAD.encode([0xf8; 32]);
        assert!(!format!("{made:?}").contains(&secret));
        Ok(())
    }

    #[test]
    fn other_texts_are_no_credentials() {
        for bad in [
            "",
            "cloison_",
            "cloison_00",
            "cloison_0707070707070707_",
            "cloison_0707070707070707_AAAA",
            "Bearer x",
            "cloison1_abc",
        ] {
            assert!(bad.parse::<CredentialText>().is_err(), "{bad}");
        }
    }

    #[test]
    fn owner_includes_everything_and_nothing_includes_nothing() {
        let held = |scopes: &[Scope]| scopes.iter().copied().collect::<BTreeSet<_>>();
        assert!(Scope::ALL.iter().all(|s| includes(&held(&[Scope::Owner]), *s)));
        assert!(Scope::ALL.iter().all(|s| !includes(&held(&[]), *s)));
        assert!(includes(&held(&[Scope::Enroll]), Scope::Read) && !includes(&held(&[Scope::Enroll]), Scope::Policy));
        assert!(!includes(&held(&[Scope::Read]), Scope::Operate));
    }
}
