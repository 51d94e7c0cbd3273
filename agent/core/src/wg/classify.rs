//! What a datagram claims to be: decided by its first four bytes and its exact length alone. Nothing here is authenticated.

use cloison_proto::verdict::DropReason;

use super::{COOKIE_REPLY_LEN, INITIATION_LEN, OVERHEAD, REJECT_AFTER_MESSAGES, RESPONSE_LEN};

/// A datagram that has the form of a WireGuard message. Only such a one can be given to a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Datagram<'a> {
    bytes: &'a [u8],
    message: Message,
}

/// The four messages (WireGuard paper, section 5.4), with what routes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// A handshake initiation: its sender is known only after decryption.
    Initiation,
    /// The answer to an initiation of ours.
    Response {
        /// The index that our initiation named.
        receiver: u32,
    },
    /// A demand to prove the source address.
    Cookie {
        /// The index that our handshake message named.
        receiver: u32,
    },
    /// An encrypted packet, or an empty one that keeps the session alive.
    Data {
        /// The index of the session it is for.
        receiver: u32,
        /// The message's number, below [`REJECT_AFTER_MESSAGES`].
        counter: u64,
    },
}

impl<'a> Datagram<'a> {
    /// Reads type, receiver and counter.
    ///
    /// # Errors
    /// [`DropReason::NotWireGuard`] for other types, non-zero reserved bytes and other lengths; [`DropReason::CounterLimit`] for a counter
    /// that no session may reach. The library behind the session does not check it.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, DropReason> {
        let kind = word(bytes, 0).ok_or(DropReason::NotWireGuard)?;
        let message = match (kind, bytes.len()) {
            (1, INITIATION_LEN) => Some(Message::Initiation),
            (2, RESPONSE_LEN) => word(bytes, 8).map(|receiver| Message::Response { receiver }),
            (3, COOKIE_REPLY_LEN) => word(bytes, 4).map(|receiver| Message::Cookie { receiver }),
            (4, OVERHEAD..) => word(bytes, 4)
                .zip(counter(bytes))
                .map(|(receiver, counter)| Message::Data { receiver, counter }),
            _ => None,
        };
        match message {
            Some(Message::Data { counter, .. }) if counter >= REJECT_AFTER_MESSAGES => Err(DropReason::CounterLimit),
            Some(message) => Ok(Self { bytes, message }),
            None => Err(DropReason::NotWireGuard),
        }
    }

    /// All bytes of the datagram.
    #[must_use]
    pub const fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// What the datagram claims to be.
    #[must_use]
    pub const fn message(&self) -> Message {
        self.message
    }

    /// Whether the datagram is an initiation or a response: those carry mac1 and are limited.
    #[must_use]
    pub const fn is_handshake(&self) -> bool {
        matches!(self.message, Message::Initiation | Message::Response { .. })
    }
}

/// The little-endian word at `offset`.
pub(crate) fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    let bytes = bytes.get(offset..)?.first_chunk::<4>()?;
    Some(u32::from_le_bytes(*bytes))
}

fn counter(bytes: &[u8]) -> Option<u64> {
    let bytes = bytes.get(8..)?.first_chunk::<8>()?;
    Some(u64::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn data(counter: u64) -> Vec<u8> {
        let mut bytes = vec![4, 0, 0, 0, 7, 0, 0, 0];
        bytes.extend_from_slice(&counter.to_le_bytes());
        bytes.resize(OVERHEAD, 0);
        bytes
    }

    #[test]
    fn lengths_are_exact() {
        for (kind, len) in [(1, INITIATION_LEN), (2, RESPONSE_LEN), (3, COOKIE_REPLY_LEN)] {
            for actual in 0..=200 {
                let mut bytes = vec![0; actual];
                if let Some(first) = bytes.first_mut() {
                    *first = kind;
                }
                assert_eq!(Datagram::parse(&bytes).is_ok(), actual == len, "type {kind}, {actual} bytes");
            }
        }
        assert!(Datagram::parse(&data(0)).is_ok());
        assert_eq!(
            Datagram::parse(data(0).get(..31).unwrap_or_default()),
            Err(DropReason::NotWireGuard)
        );
    }

    #[test]
    fn counters_at_the_limit_are_refused() {
        assert!(Datagram::parse(&data(REJECT_AFTER_MESSAGES - 1)).is_ok());
        for counter in [REJECT_AFTER_MESSAGES, REJECT_AFTER_MESSAGES + 1, u64::MAX - 1, u64::MAX] {
            assert_eq!(Datagram::parse(&data(counter)), Err(DropReason::CounterLimit));
        }
    }

    proptest! {
        #[test]
        fn anything_is_classified_without_panic(mut bytes: Vec<u8>, kind in 0u8..6) {
            if let Some(first) = bytes.first_mut() {
                *first = kind;
            }
            if let Ok(datagram) = Datagram::parse(&bytes) {
                prop_assert_eq!(datagram.bytes(), &*bytes);
            }
        }
    }
}
