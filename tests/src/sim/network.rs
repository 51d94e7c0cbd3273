//! The underlay: datagrams between addresses, lost, doubled, delayed and so reordered, as the weather and chance have it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use cloison_proto::version::Timestamp;

use super::random::Random;

/// How bad the network is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Weather {
    /// Datagrams lost, of a hundred.
    pub loss: u8,
    /// Datagrams that come twice, of a hundred.
    pub doubled: u8,
    /// The longest that one is under way; what left later may come earlier.
    pub longest: Duration,
}

impl Weather {
    /// Everything comes, in order, after a millisecond.
    pub const CALM: Self = Self {
        loss: 0,
        doubled: 0,
        longest: Duration::from_millis(1),
    };
}

/// One datagram.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Datagram {
    /// Where it came from.
    pub from: SocketAddr,
    /// Where it goes.
    pub to: SocketAddr,
    /// What it holds.
    pub bytes: Vec<u8>,
}

/// All that is under way.
#[derive(Debug)]
pub struct Network {
    /// How bad it is at the moment.
    pub weather: Weather,
    random: Random,
    /// By arrival, and by number among those that arrive together.
    flying: BTreeMap<(Timestamp, u64), Datagram>,
    number: u64,
}

/// The shortest way there is.
const SHORTEST: Duration = Duration::from_millis(1);

impl Network {
    /// A calm network without any datagram.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self {
            weather: Weather::CALM,
            random: Random::new(seed),
            flying: BTreeMap::new(),
            number: 0,
        }
    }

    /// Takes a datagram; whether it will arrive.
    pub fn send(&mut self, datagram: Datagram, now: Timestamp) -> bool {
        if self.random.happens(self.weather.loss) {
            return false;
        }
        if self.random.happens(self.weather.doubled) {
            self.put(datagram.clone(), now);
        }
        self.put(datagram, now);
        true
    }

    /// When the next datagram arrives.
    #[must_use]
    pub fn next_arrival(&self) -> Option<Timestamp> {
        self.flying.first_key_value().map(|((at, _), _)| *at)
    }

    /// The next datagram, if it has arrived by `now`.
    pub fn arrive(&mut self, now: Timestamp) -> Option<Datagram> {
        let first = self.flying.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }

    fn put(&mut self, datagram: Datagram, now: Timestamp) {
        let spread = self.weather.longest.saturating_sub(SHORTEST).as_micros();
        let delay = self.random.below(u64::try_from(spread).unwrap_or(u64::MAX).saturating_add(1));
        self.number += 1;
        self.flying
            .insert((now + SHORTEST + Duration::from_micros(delay), self.number), datagram);
    }
}
