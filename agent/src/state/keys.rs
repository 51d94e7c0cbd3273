//! The host's two private keys: identity (Ed25519) and WireGuard (X25519). Made here, kept here, sent nowhere (I10).

use cloison_proto::key::{SigningKey, WgPrivateKey};
use zeroize::Zeroizing;

use super::{File, StateDir, StateError};

/// Both keys of a host.
#[derive(Debug)]
pub struct HostKeys {
    /// What its certificate speaks for.
    pub identity: SigningKey,
    /// What its sessions are made with.
    pub wg: WgPrivateKey,
}

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The files.
    #[error(transparent)]
    State(#[from] StateError),
    /// The kernel gave no random bytes.
    #[error("the kernel gives no random bytes: {0}")]
    Entropy(getrandom::Error),
}

impl HostKeys {
    /// The keys on disk; `None` if there are none, or only one of the two.
    ///
    /// # Errors
    /// [`StateError`]; a damaged key is never replaced silently.
    pub fn load(dir: &StateDir) -> Result<Option<Self>, StateError> {
        let (Some(identity), Some(wg)) = (load_one(dir, File::IdentityKey)?, load_one(dir, File::WgKey)?) else {
            return Ok(None);
        };
        Ok(Some(Self {
            identity: SigningKey::from_seed(&identity),
            wg: WgPrivateKey::from_bytes(*wg),
        }))
    }

    /// The keys on disk, each made if it is not there. A join that was cut off goes on with the same keys, so that its repetition is
    /// recognised.
    ///
    /// # Errors
    /// [`KeysError`].
    pub fn load_or_make(dir: &StateDir) -> Result<Self, KeysError> {
        let one = |file| match load_one(dir, file)? {
            Some(key) => Ok(key),
            None => make(dir, file),
        };
        let (identity, wg) = (one(File::IdentityKey)?, one(File::WgKey)?);
        Ok(Self {
            identity: SigningKey::from_seed(&identity),
            wg: WgPrivateKey::from_bytes(*wg),
        })
    }
}

/// One key on disk; `None` if there is none.
///
/// # Errors
/// [`StateError`].
pub(crate) fn load_one(dir: &StateDir, file: File) -> Result<Option<Zeroizing<[u8; 32]>>, StateError> {
    let Some(body) = dir.read(file)? else { return Ok(None) };
    let key = body.as_slice().try_into().map_err(|_| dir.damaged(file, "a key has 32 bytes"))?;
    Ok(Some(Zeroizing::new(key)))
}

pub(super) fn make(dir: &StateDir, file: File) -> Result<Zeroizing<[u8; 32]>, KeysError> {
    let mut key = Zeroizing::new([0; 32]);
    getrandom::fill(key.as_mut_slice()).map_err(KeysError::Entropy)?;
    dir.write(file, key.as_slice())?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    #[test]
    fn keys_are_made_once_and_differ() -> Outcome {
        let folder = tempfile::tempdir()?;
        let dir = StateDir::open(folder.path())?;
        assert!(HostKeys::load(&dir)?.is_none());
        let made = HostKeys::load_or_make(&dir)?;
        let again = HostKeys::load(&dir)?.ok_or("keys")?;
        assert_eq!(made.wg.public(), again.wg.public());
        assert_eq!(made.identity.identity(), again.identity.identity());
        assert_ne!(dir.read(File::IdentityKey)?, dir.read(File::WgKey)?);
        Ok(())
    }

    #[test]
    fn a_damaged_key_is_an_error_and_never_replaced() -> Outcome {
        let folder = tempfile::tempdir()?;
        let dir = StateDir::open(folder.path())?;
        HostKeys::load_or_make(&dir)?;
        std::fs::write(dir.path_of(File::WgKey), "nothing")?;
        assert!(HostKeys::load(&dir).is_err() && HostKeys::load_or_make(&dir).is_err());
        assert_eq!(std::fs::read_to_string(dir.path_of(File::WgKey))?, "nothing");
        Ok(())
    }
}
