//! Randomness: the only file that draws it. Ids, secrets, keys and the overlay ranges come from here.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};

use crate::clock::{MeshClock, SystemClock};

/// The system could not give random bytes. Nothing that needs them may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the system gave no random bytes ({0}): nothing secret can be made until it does")]
pub struct EntropyError(getrandom::Error);

/// Where randomness comes from: the system, or a test's seed.
pub trait Entropy: fmt::Debug + Send + Sync {
    /// Fills `buffer`.
    ///
    /// # Errors
    /// [`EntropyError`] if there is none to be had.
    fn fill(&self, buffer: &mut [u8]) -> Result<(), EntropyError>;
}

/// The kernel's generator.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemEntropy;

impl Entropy for SystemEntropy {
    fn fill(&self, buffer: &mut [u8]) -> Result<(), EntropyError> {
        getrandom::fill(buffer).map_err(EntropyError)
    }
}

/// A reproducible stream out of a seed, for the simulation. Never for anything that must stay secret.
#[derive(Debug)]
pub struct SeededEntropy(Mutex<(u64, u64)>);

impl SeededEntropy {
    /// The stream of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(Mutex::new((seed, 0)))
    }
}

impl Entropy for SeededEntropy {
    fn fill(&self, buffer: &mut [u8]) -> Result<(), EntropyError> {
        let mut state = self.0.lock();
        for chunk in buffer.chunks_mut(32) {
            let block = Sha256::digest([state.0.to_be_bytes(), state.1.to_be_bytes()].concat());
            state.1 = state.1.wrapping_add(1);
            chunk.iter_mut().zip(block).for_each(|(to, from)| *to = from);
        }
        Ok(())
    }
}

/// The two outer things that the coordinator's state depends on.
#[derive(Debug, Clone)]
pub struct Environment {
    /// What time it is in the mesh.
    pub clock: MeshClock,
    /// Where ids and secrets come from.
    pub entropy: Arc<dyn Entropy>,
}

impl Environment {
    /// The machine's own clocks and generator.
    #[must_use]
    pub fn system() -> Self {
        Self {
            clock: MeshClock::over(SystemClock),
            entropy: Arc::new(SystemEntropy),
        }
    }

    /// `N` random bytes.
    ///
    /// # Errors
    /// [`EntropyError`] if there are none to be had.
    pub fn random<const N: usize>(&self) -> Result<[u8; N], EntropyError> {
        let mut bytes = [0; N];
        self.entropy.fill(&mut bytes)?;
        Ok(bytes)
    }
}
