//! Elements of nftables' sets, changed by netlink: a cgroup is named by its id there, which the text that `nft` reads cannot do, and a change
//! takes microseconds instead of a program's start.
//!
//! Tables, chains and the sets themselves are `nft`'s business ([`crate::attach::base_table`]).

use std::io;
use std::net::IpAddr;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::{ANSWER_WITHIN, DUMP_ATTEMPTS, NetlinkError};

/// Numbers of linux/netfilter/nfnetlink.h and nf_tables.h.
mod number {
    pub(super) const BATCH_BEGIN: u16 = 0x10;
    pub(super) const BATCH_END: u16 = 0x11;
    pub(super) const NFTABLES: u16 = 10;
    pub(super) const NEW_TABLE: u16 = NFTABLES << 8;
    pub(super) const GET_TABLE: u16 = NFTABLES << 8 | 1;
    pub(super) const NEW_CHAIN: u16 = NFTABLES << 8 | 3;
    pub(super) const GET_CHAIN: u16 = NFTABLES << 8 | 4;
    pub(super) const NEW_RULE: u16 = NFTABLES << 8 | 6;
    pub(super) const GET_RULE: u16 = NFTABLES << 8 | 7;
    pub(super) const NEW_ELEMENT: u16 = NFTABLES << 8 | 12;
    pub(super) const DELETE_ELEMENT: u16 = NFTABLES << 8 | 14;
    pub(super) const INET: u8 = 1;
    /// How often a table, and a chain, is used, and what a chain has counted.
    pub(super) const TABLE_USE: u16 = 3;
    pub(super) const CHAIN_USE: u16 = 6;
    pub(super) const CHAIN_COUNTERS: u16 = 8;
    pub(super) const RULE_EXPRESSIONS: u16 = 4;
    pub(super) const EXPRESSION_NAME: u16 = 1;
    pub(super) const TABLE: u16 = 1;
    pub(super) const SET: u16 = 2;
    pub(super) const ELEMENTS: u16 = 3;
    pub(super) const ELEMENT: u16 = 1;
    pub(super) const KEY: u16 = 1;
    pub(super) const DATA: u16 = 2;
    pub(super) const VALUE: u16 = 1;
    pub(super) const NESTED: u16 = 1 << 15;
    /// The bits of an attribute's kind that are no flags.
    pub(super) const KIND: u16 = 0x3fff;
}

/// Flags of a message (linux/netlink.h).
mod flag {
    pub(super) const REQUEST: u16 = 1;
    pub(super) const ACK: u16 = 4;
    pub(super) const DUMP: u16 = 0x300;
    pub(super) const CREATE: u16 = 0x400;
    /// In what the kernel sends: others changed something meanwhile.
    pub(super) const INTERRUPTED: u16 = 0x10;
}

/// The kernel's answer to a message: zero, or a negated error number.
const ANSWER: u16 = 2;

/// The end of a dump.
const DONE: u16 = 3;

/// Length of a netlink header, in bytes.
const HEADER: usize = 16;

/// Length of netfilter's header behind it, in bytes.
const NETFILTER_HEADER: usize = 4;

/// Elements in one message: far below the 64 KiB that an attribute can hold.
const ELEMENTS: usize = 256;

/// Changes in one transaction: what a socket sends at once is at most 208 KiB by default (`net.core.wmem_default`), and an element takes up to 40
/// bytes.
const TRANSACTION: usize = 4_000;

/// What identifies a socket in a set, or in a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// A cgroup, by its id.
    Cgroup(u64),
    /// A cgroup and an address.
    CgroupAt(u64, IpAddr),
    /// A cgroup and a mark.
    CgroupWith(u64, u32),
    /// A cgroup, in a map that leads from it to a mark.
    CgroupTo(u64, u32),
    /// A protocol of the transport layer, by its number.
    Protocol(u8),
}

/// Whether an element comes or goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    /// It comes; it may be there already.
    Add,
    /// It goes; it has to be there.
    Remove,
}

/// A change of one set.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change {
    /// What happens.
    pub operation: Operation,
    /// The set, in the table that the connection is for.
    pub set: String,
    /// The element.
    pub key: Key,
}

/// What a table says, as far as it can be compared. See [`Nftables::rules`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rules(Option<[u8; 32]>);

impl Rules {
    /// Whether there is no table.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_none()
    }
}

/// A connection to nftables in one network namespace, for one table of the family `inet`.
#[derive(Debug)]
pub struct Nftables {
    socket: Socket,
    table: String,
    sequence: u32,
}

impl Nftables {
    /// Opens a connection in the namespace of the calling thread.
    ///
    /// # Errors
    /// [`NetlinkError`].
    pub fn open(table: &str) -> Result<Self, NetlinkError> {
        let open = || {
            let mut socket = Socket::new(NETLINK_NETFILTER)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            socket.set_non_blocking(true)?;
            Ok(socket)
        };
        Ok(Self {
            socket: open().map_err(|e| NetlinkError::new("open a netlink socket", e))?,
            table: table.to_owned(),
            sequence: 0,
        })
    }

    /// The table that it is for.
    #[must_use]
    pub fn table(&self) -> &str {
        &self.table
    }

    /// Makes all `changes`: so many at a time, each time all of them or none.
    ///
    /// # Errors
    /// [`NetlinkError`]; ENOENT if the table, a set, or an element that is to go is not there.
    pub fn change(&mut self, changes: &[Change]) -> Result<(), NetlinkError> {
        changes
            .chunks(TRANSACTION)
            .try_for_each(|some| self.exchange(some))
            .map_err(|e| NetlinkError::new("change the base table's sets", e))
    }

    /// What the table says now: whoever takes a rule away, puts one in or changes one, changes the table or makes it anew, changes this. What rules
    /// have counted, and what is in sets, is not looked at.
    ///
    /// # Errors
    /// [`NetlinkError`].
    pub fn rules(&mut self) -> Result<Rules, NetlinkError> {
        let failed = |e| NetlinkError::new("read the base table", e);
        for _ in 0..DUMP_ATTEMPTS {
            if let Some(rules) = self.read().map_err(failed)? {
                return Ok(rules);
            }
        }
        Err(failed(io::Error::from_raw_os_error(libc::EINTR)))
    }

    /// The same; none if others changed nftables meanwhile.
    fn read(&mut self) -> io::Result<Option<Rules>> {
        let (mut digest, mut is_there) = (Sha256::new(), false);
        self.get(number::GET_TABLE, flag::ACK, number::NEW_TABLE, |attributes| {
            is_there = true;
            digest_but(&mut digest, attributes, &[number::TABLE_USE]);
        })?;
        if !is_there {
            return Ok(Some(Rules::default()));
        }
        let name = text_value(&self.table);
        let chains = self.get(number::GET_CHAIN, flag::DUMP, number::NEW_CHAIN, |chain| {
            // The kernel tells of those of all tables.
            if attributes(chain).any(|(kind, value)| kind == number::TABLE && value == name) {
                digest_but(&mut digest, chain, &[number::CHAIN_USE, number::CHAIN_COUNTERS]);
            }
        })?;
        let rules = self.get(number::GET_RULE, flag::DUMP, number::NEW_RULE, |rule| {
            digest_but(&mut digest, rule, &[number::RULE_EXPRESSIONS]);
            let expressions = attributes(rule).filter(|(kind, _)| *kind == number::RULE_EXPRESSIONS);
            for (_, expression) in expressions.flat_map(|(_, all)| attributes(all)) {
                let is_counter = attributes(expression).any(|(kind, name)| kind == number::EXPRESSION_NAME && name == b"counter\0");
                digest.update(if is_counter { b"counter" } else { expression });
            }
        })?;
        Ok((chains && rules).then(|| Rules(Some(digest.finalize().into()))))
    }

    /// Asks about the table, and gives the attributes of each message of the wanted kind to `each`. Says whether all of it was as of one moment.
    fn get(&mut self, question: u16, flags: u16, wanted: u16, mut each: impl FnMut(&[u8])) -> io::Result<bool> {
        let mut bytes = Vec::new();
        let table = self.table.clone();
        self.message(&mut bytes, question, flag::REQUEST | flags, (number::INET, 0), |body| {
            text(body, number::TABLE, &table);
        });
        self.socket.send(&bytes, 0)?;
        let mut interrupted = false;
        loop {
            let bytes = self.receive()?;
            for message in messages(&bytes).filter(|m| m.sequence == self.sequence) {
                interrupted |= message.flags & flag::INTERRUPTED != 0;
                match (message.kind, message.code()) {
                    (kind, _) if kind == wanted => each(message.body.get(NETFILTER_HEADER..).unwrap_or_default()),
                    (DONE, _) | (ANSWER, Some(0 | libc::ENOENT)) => return Ok(!interrupted),
                    (ANSWER, Some(code)) => return Err(io::Error::from_raw_os_error(code)),
                    _ => {}
                }
            }
        }
    }

    fn exchange(&mut self, changes: &[Change]) -> io::Result<()> {
        let mut batch = Vec::new();
        self.message(&mut batch, number::BATCH_BEGIN, flag::REQUEST, (0, number::NFTABLES), |_| {});
        let first = self.sequence;
        let mut awaited = 0u32;
        let alike = |a: &Change, b: &Change| (a.operation, &a.set) == (b.operation, &b.set);
        for of_set in changes.chunk_by(alike).flat_map(|of_set| of_set.chunks(ELEMENTS)) {
            self.elements(&mut batch, of_set);
            awaited += 1;
        }
        self.message(&mut batch, number::BATCH_END, flag::REQUEST, (0, number::NFTABLES), |_| {});
        self.socket.send(&batch, 0)?;
        let mut result = Ok(());
        while awaited > 0 {
            for (sequence, error) in answers(&self.receive()?) {
                // An error of the whole batch is told once, with the number of its beginning.
                if sequence == first && error != 0 {
                    return Err(io::Error::from_raw_os_error(error));
                }
                if sequence > first && sequence < self.sequence {
                    awaited = awaited.saturating_sub(1);
                    if error != 0 && result.is_ok() {
                        result = Err(io::Error::from_raw_os_error(error));
                    }
                }
            }
        }
        result
    }

    fn elements(&mut self, batch: &mut Vec<u8>, changes: &[Change]) {
        let Some(Change { operation, set, .. }) = changes.first() else {
            return;
        };
        let (kind, flags) = match operation {
            Operation::Add => (number::NEW_ELEMENT, flag::REQUEST | flag::ACK | flag::CREATE),
            Operation::Remove => (number::DELETE_ELEMENT, flag::REQUEST | flag::ACK),
        };
        let table = self.table.clone();
        self.message(batch, kind, flags, (number::INET, 0), |body| {
            text(body, number::TABLE, &table);
            text(body, number::SET, set);
            nested(body, number::ELEMENTS, |list| {
                for change in changes {
                    nested(list, number::ELEMENT, |element| {
                        nested(element, number::KEY, |key| attribute(key, number::VALUE, &change.key.bytes()));
                        if let Key::CgroupTo(_, mark) = change.key {
                            nested(element, number::DATA, |data| attribute(data, number::VALUE, &mark.to_ne_bytes()));
                        }
                    });
                }
            });
        });
    }

    /// Appends a message: netlink's header, netfilter's, and what `body` writes.
    fn message(&mut self, to: &mut Vec<u8>, kind: u16, flags: u16, (family, resource): (u8, u16), body: impl FnOnce(&mut Vec<u8>)) {
        self.sequence = self.sequence.wrapping_add(1);
        let begin = to.len();
        to.extend([0; 4]);
        to.extend(kind.to_ne_bytes());
        to.extend(flags.to_ne_bytes());
        to.extend(self.sequence.to_ne_bytes());
        to.extend([0; 4]);
        to.extend([family, 0]);
        to.extend(resource.to_be_bytes());
        body(to);
        let length = u32::try_from(to.len() - begin).unwrap_or(u32::MAX);
        if let Some(place) = to.get_mut(begin..begin + 4) {
            place.copy_from_slice(&length.to_ne_bytes());
        }
    }

    fn receive(&self) -> io::Result<Vec<u8>> {
        let timeout = Timespec::try_from(ANSWER_WITHIN).map_err(io::Error::other)?;
        loop {
            match poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&timeout)) {
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.socket.recv_from_full().map(|(bytes, _)| bytes)
    }
}

impl Key {
    /// As nftables has it in its registers: an id and a mark in this machine's byte order, an address as on the wire.
    fn bytes(self) -> Vec<u8> {
        match self {
            Self::Cgroup(id) | Self::CgroupTo(id, _) => id.to_ne_bytes().to_vec(),
            Self::CgroupAt(id, IpAddr::V4(address)) => [&id.to_ne_bytes()[..], &address.octets()].concat(),
            Self::CgroupAt(id, IpAddr::V6(address)) => [&id.to_ne_bytes()[..], &address.octets()].concat(),
            Self::Protocol(number) => vec![number],
            Self::CgroupWith(id, mark) => [&id.to_ne_bytes()[..], &mark.to_ne_bytes()].concat(),
        }
    }
}

fn attribute(to: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    to.extend(length.to_ne_bytes());
    to.extend(kind.to_ne_bytes());
    to.extend(value);
    to.resize(to.len().next_multiple_of(4), 0);
}

fn text(to: &mut Vec<u8>, kind: u16, value: &str) {
    attribute(to, kind, &text_value(value));
}

fn nested(to: &mut Vec<u8>, kind: u16, body: impl FnOnce(&mut Vec<u8>)) {
    let mut inner = Vec::new();
    body(&mut inner);
    attribute(to, kind | number::NESTED, &inner);
}

/// A message of the kernel.
struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    body: &'a [u8],
}

impl Message<'_> {
    /// The kernel's error number, or zero, if this is an answer.
    fn code(&self) -> Option<i32> {
        let code = self.body.first_chunk::<4>().filter(|_| self.kind == ANSWER)?;
        Some(i32::from_ne_bytes(*code).wrapping_neg())
    }
}

/// The attributes in a message or in another attribute, by their kinds without flags; what is cut off is none.
fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let [l0, l1, k0, k1] = *rest.first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([k0, k1]) & number::KIND, value))
    })
}

/// Takes up all attributes but those of some kinds, each with its kind and length.
fn digest_but(digest: &mut Sha256, bytes: &[u8], but: &[u16]) {
    for (kind, value) in attributes(bytes).filter(|(kind, _)| !but.contains(kind)) {
        digest.update(kind.to_ne_bytes());
        digest.update(value.len().to_ne_bytes());
        digest.update(value);
    }
}

/// A text as the kernel writes it.
fn text_value(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

/// The messages in a buffer; what is cut off is none.
fn messages(bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let [l0, l1, l2, l3, k0, k1, f0, f1, s0, s1, s2, s3, ..] = *rest.first_chunk::<HEADER>()?;
        let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).ok()?;
        let message = Message {
            kind: u16::from_ne_bytes([k0, k1]),
            flags: u16::from_ne_bytes([f0, f1]),
            sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
            body: rest.get(HEADER..length)?,
        };
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The answers in a buffer: the number of the message, and the kernel's error number or zero.
fn answers(bytes: &[u8]) -> Vec<(u32, i32)> {
    messages(bytes).filter_map(|m| Some((m.sequence, m.code()?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_an_id_and_an_address_one_behind_the_other() {
        let v4 = Key::CgroupAt(0x0102, [10, 77, 1, 0].into());
        assert_eq!(v4.bytes(), [&0x0102u64.to_ne_bytes()[..], &[10, 77, 1, 0]].concat());
        assert_eq!(Key::CgroupAt(1, std::net::Ipv6Addr::LOCALHOST.into()).bytes().len(), 24);
        assert_eq!(Key::Cgroup(7).bytes().len(), 8);
    }

    #[test]
    fn answers_are_found_and_what_is_cut_off_is_none() {
        let answer = |sequence: u32, code: i32| {
            let mut bytes = 36u32.to_ne_bytes().to_vec();
            bytes.extend(ANSWER.to_ne_bytes());
            bytes.extend([0; 2]);
            bytes.extend(sequence.to_ne_bytes());
            bytes.extend([0; 4]);
            bytes.extend(code.to_ne_bytes());
            bytes.extend([0; 16]);
            bytes
        };
        let both = [answer(3, 0), answer(4, -2)].concat();
        assert_eq!(answers(&both), [(3, 0), (4, 2)]);
        for length in 0..both.len() {
            assert!(answers(both.get(..length).unwrap_or_default()).len() <= 1);
        }
    }
}
