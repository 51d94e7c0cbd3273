//! The host's WireGuard key, and the one that is to take its place. A next key is on disk before anybody is told of it, and the former one
//! goes when the mesh works with the next alone: whenever the agent ends between two writes, what is on disk and the view say how far it was.

use cloison_proto::key::{WgPrivateKey, WgPublicKey};
use cloison_proto::version::MeshTime;
use serde::{Deserialize, Serialize};

use super::keys::{KeysError, load_one, make};
use super::{File, StateDir, StateError};

/// The WireGuard keys of a running agent.
#[derive(Debug)]
pub struct WgKeys {
    current: WgPrivateKey,
    next: Option<WgPrivateKey>,
    /// Since when the present one is in use, by mesh time; `None` until that is known.
    since: Option<MeshTime>,
}

/// What is to be done with the keys, by what is on disk and what the view in force names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing: the mesh works with our key.
    Rest,
    /// Make a next key: the mesh works with one that is not here.
    Make,
    /// Offer the next key to the coordinator.
    Offer,
    /// Wait until everybody has the next key.
    Overlap,
    /// Forget the former key: the mesh works with the next one.
    Promote,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredSince {
    since: MeshTime,
}

impl WgKeys {
    /// The keys on disk; `None` if there are none.
    ///
    /// # Errors
    /// [`StateError`]; a damaged key is never replaced silently.
    pub fn load(dir: &StateDir) -> Result<Option<Self>, StateError> {
        let Some(current) = load_one(dir, File::WgKey)? else {
            return Ok(None);
        };
        let next = load_one(dir, File::NextWgKey)?;
        // A promotion that was cut off between its two writes leaves the same key under both names.
        if next.as_ref() == Some(&current) {
            dir.remove(File::NextWgKey)?;
        }
        let next = next.filter(|next| *next != current);
        let since = match dir.read(File::KeySince) {
            Ok(body) => body.and_then(|body| serde_json::from_slice::<StoredSince>(&body).ok()),
            // Only the next automatic change depends on it.
            Err(StateError::Damaged { .. } | StateError::Format { .. }) => None,
            Err(e) => return Err(e),
        };
        Ok(Some(Self {
            current: WgPrivateKey::from_bytes(*current),
            next: next.map(|key| WgPrivateKey::from_bytes(*key)),
            since: since.map(|stored| stored.since),
        }))
    }

    /// The key in use.
    #[must_use]
    pub const fn current(&self) -> &WgPrivateKey {
        &self.current
    }

    /// The one that is to take its place.
    #[must_use]
    pub const fn next(&self) -> Option<&WgPrivateKey> {
        self.next.as_ref()
    }

    /// Since when the present one is in use, by mesh time.
    #[must_use]
    pub const fn since(&self) -> Option<MeshTime> {
        self.since
    }

    /// What is to be done while the view in force names these keys of ours, the newest first; none without a view.
    #[must_use]
    pub fn step(&self, named: &[WgPublicKey]) -> Step {
        let current = self.current.public();
        match self.next.as_ref().map(WgPrivateKey::public) {
            Some(next) if named.contains(&next) && named.contains(&current) => Step::Overlap,
            Some(next) if named.contains(&next) => Step::Promote,
            Some(_) => Step::Offer,
            None if named.first().is_none_or(|newest| *newest == current) => Step::Rest,
            None => Step::Make,
        }
    }

    /// Whether a view that names these keys of ours names none that is here.
    #[must_use]
    pub fn is_alone(&self, named: &[WgPublicKey]) -> bool {
        let here = [Some(&self.current), self.next.as_ref()];
        !named.is_empty() && !here.into_iter().flatten().any(|key| named.contains(&key.public()))
    }

    /// The private keys to be used under a view that names these, the one for new handshakes first.
    #[must_use]
    pub fn in_use(&self, named: &[WgPublicKey]) -> Vec<&WgPrivateKey> {
        match (self.step(named), &self.next) {
            (Step::Promote, Some(next)) => vec![next],
            (Step::Overlap, Some(next)) => vec![next, &self.current],
            (_, Some(next)) => vec![&self.current, next],
            (_, None) => vec![&self.current],
        }
    }

    /// Makes a next key and keeps it; one that is there stays.
    ///
    /// # Errors
    /// [`KeysError`].
    pub fn make_next(&mut self, dir: &StateDir) -> Result<(), KeysError> {
        if self.next.is_none() {
            self.next = Some(WgPrivateKey::from_bytes(*make(dir, File::NextWgKey)?));
        }
        Ok(())
    }

    /// Gives up a next key that the mesh will never take.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn drop_next(&mut self, dir: &StateDir) -> Result<(), StateError> {
        dir.remove(File::NextWgKey)?;
        self.next = None;
        Ok(())
    }

    /// Makes the next key the only one, at mesh time `now`. The former is gone when this returns.
    ///
    /// # Errors
    /// [`StateError`]; then both are there still.
    pub fn promote(&mut self, dir: &StateDir, now: MeshTime) -> Result<(), StateError> {
        let Some(next) = &self.next else { return Ok(()) };
        dir.write(File::WgKey, next.to_secret().as_bytes())?;
        dir.remove(File::NextWgKey)?;
        if let Some(next) = self.next.take() {
            self.current = next;
        }
        self.note_since(dir, now)
    }

    /// Keeps that the present key is in use since mesh time `now`.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn note_since(&mut self, dir: &StateDir, now: MeshTime) -> Result<(), StateError> {
        self.since = Some(now);
        let body = serde_json::to_vec(&StoredSince { since: now }).map_err(|e| dir.damaged(File::KeySince, e))?;
        dir.write(File::KeySince, &body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::keys::HostKeys;

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    fn made() -> Result<(tempfile::TempDir, StateDir, WgKeys), Box<dyn std::error::Error>> {
        let folder = tempfile::tempdir()?;
        let dir = StateDir::open(folder.path())?;
        HostKeys::load_or_make(&dir)?;
        let keys = WgKeys::load(&dir)?.ok_or("keys")?;
        Ok((folder, dir, keys))
    }

    #[test]
    fn a_host_is_alone_only_under_a_view_that_names_none_of_its_keys() -> Outcome {
        let (_folder, dir, mut keys) = made()?;
        let (current, foreign) = (keys.current().public(), WgPrivateKey::from_bytes([9; 32]).public());
        assert!(keys.is_alone(&[foreign]) && !keys.is_alone(&[foreign, current]) && !keys.is_alone(&[]));
        keys.make_next(&dir)?;
        let next = keys.next().ok_or("no next key")?.public();
        assert!(keys.is_alone(&[foreign]) && !keys.is_alone(&[next]));
        Ok(())
    }

    #[test]
    fn a_change_of_keys_goes_on_from_whatever_is_on_disk_at_each_of_its_steps() -> Outcome {
        let (_folder, dir, mut keys) = made()?;
        let old = keys.current().public();
        assert_eq!(keys.step(&[old]), Step::Rest);
        keys.make_next(&dir)?;
        // Killed before anybody was told.
        let keys = WgKeys::load(&dir)?.ok_or("keys")?;
        let new = keys.next().ok_or("next")?.public();
        assert_eq!(keys.step(&[old]), Step::Offer);
        assert_eq!(keys.in_use(&[old]).iter().map(|k| k.public()).collect::<Vec<_>>(), [old, new]);
        // Killed while both are good.
        assert_eq!(keys.step(&[new, old]), Step::Overlap);
        assert_eq!(keys.in_use(&[new, old]).iter().map(|k| k.public()).collect::<Vec<_>>(), [new, old]);
        // Killed when the view with the new one alone was on disk, and nothing else.
        let mut keys = WgKeys::load(&dir)?.ok_or("keys")?;
        assert_eq!(keys.step(&[new]), Step::Promote);
        assert_eq!(keys.in_use(&[new]).iter().map(|k| k.public()).collect::<Vec<_>>(), [new]);
        // Killed between the two writes of the promotion.
        dir.write(File::WgKey, keys.next().ok_or("next")?.to_secret().as_bytes())?;
        let between = WgKeys::load(&dir)?.ok_or("keys")?;
        assert_eq!((between.current().public(), between.next().is_none()), (new, true));
        dir.write(File::NextWgKey, keys.next().ok_or("next")?.to_secret().as_bytes())?;
        keys.promote(&dir, MeshTime(9))?;
        let keys = WgKeys::load(&dir)?.ok_or("keys")?;
        assert_eq!(
            (keys.current().public(), keys.since(), keys.step(&[new])),
            (new, Some(MeshTime(9)), Step::Rest)
        );
        assert!(dir.read(File::NextWgKey)?.is_none());
        Ok(())
    }

    #[test]
    fn a_key_that_the_mesh_works_with_and_that_is_not_here_is_replaced() -> Outcome {
        let (_folder, dir, mut keys) = made()?;
        let (ours, lost) = (keys.current().public(), WgPrivateKey::from_bytes([1; 32]).public());
        assert_eq!(keys.step(&[lost, ours]), Step::Make);
        assert_eq!(keys.step(&[lost]), Step::Make);
        assert_eq!(keys.step(&[ours, lost]), Step::Rest, "the newest is ours");
        keys.make_next(&dir)?;
        let new = keys.next().ok_or("next")?.public();
        assert_eq!(keys.step(&[lost, ours]), Step::Offer);
        assert_eq!(keys.step(&[new, lost]), Step::Promote);
        Ok(())
    }
}
