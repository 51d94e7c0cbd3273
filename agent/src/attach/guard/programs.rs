//! What the kernel runs at a guarded cgroup: one program when a packet is about to be received, one when it was sent.
//!
//! A packet that came by loopback carries the mark of the component whose socket sent it, which the base table sees to
//! ([`crate::attach::claim_table`]). It is heard
//!
//! - by a listener if the mark is that of the deepest claimed cgroup which the socket is in;
//! - by a UDP socket if the mark is that one, or if it comes from a port that this very socket has asked something by loopback, and from which nobody of
//!   its own has asked its port ([`asking`] takes note of that): a server's answers open no port, also not from a socket for each client;
//! - by a TCP socket that is no listener in any case: who began was heard before, or it was itself;
//! - by any other socket but those for ICMP if the mark is that one.

use std::io;
use std::os::fd::AsFd;

use crate::sys::bpf::asm::Helper::{AncestorCgroup, FullSocket, LoadBytes, MapLookup, MapUpdate, SocketCookie};
use crate::sys::bpf::asm::Register::{Fp, R0, R1, R2, R3, R4, R6, R7, R8, R9};
use crate::sys::bpf::asm::Size::{Byte, Double, Half, Word};
use crate::sys::bpf::asm::{Code, Label, Register};

/// How deep a claimed cgroup may be below the root of all, that of the machine that this host is a container of.
const MAX_LEVELS: i32 = 32;

/// Offsets in `struct __sk_buff` (linux/bpf.h), in bytes.
const PACKET_TYPE: i16 = 4;
const PACKET_MARK: i16 = 8;
const PACKET_INTERFACE: i16 = 40;
const PACKET_SOCKET: i16 = 168;

/// Offsets in `struct bpf_sock`.
const SOCKET_TYPE: i16 = 8;
const SOCKET_PROTOCOL: i16 = 12;
const SOCKET_OWN_PORT: i16 = 44;
const SOCKET_PEER_PORT: i16 = 48;
const SOCKET_STATE: i16 = 72;

/// The index of `lo` in every namespace (`LOOPBACK_IFINDEX`).
const LOOPBACK: i32 = 1;

/// What is sent to a group comes back by the interface that it left by (`PACKET_LOOPBACK`, linux/if_packet.h).
const CAME_BACK: i32 = 5;

/// `TCP_LISTEN` (linux/tcp.h).
const LISTEN: i32 = 10;

/// `SOCK_RAW` (linux/net.h).
const RAW: i32 = 3;

/// Protocol numbers; the last one is no packet's.
const TCP: i32 = 6;
const UDP: i32 = 17;
const UDP_LITE: i32 = 136;
const ICMP: i32 = 1;
const ICMPV6: i32 = 58;
const NO_PROTOCOL: i32 = 255;

/// Offsets of the ports in the header of a datagram (RFC 768).
const SOURCE_PORT: i32 = 0;
const DESTINATION_PORT: i32 = 2;

/// Where on the stack a key of a map is: eight bytes.
const KEY: i16 = -8;

/// Where a value is, or a part of a packet, and the port at the other end.
const VALUE: i16 = -16;
const PORT: i16 = -24;

/// What the kernel is told.
const REFUSED: i32 = 0;
const PASSES: i32 = 1;

/// Whether what is about to be received may be.
pub(super) fn hearing(homes: impl AsFd, talks: impl AsFd) -> io::Result<Code> {
    let mut code = Code::default();
    let [local, raw, stream, judge, own, answer, heard, refused, passes] = std::array::from_fn(|_| code.label());
    code.copy(R6, R1);
    code.load(Word, R2, R6, PACKET_INTERFACE);
    code.jump_if(R2, LOOPBACK, local);
    code.load(Word, R2, R6, PACKET_TYPE);
    code.jump_unless(R2, CAME_BACK, passes);
    code.here(local);
    find_socket(&mut code, refused);
    code.jump_if(R8, ICMP, passes);
    code.jump_if(R8, ICMPV6, passes);
    code.load(Word, R2, R7, SOCKET_TYPE);
    code.jump_if(R2, RAW, raw);
    code.jump_if(R8, TCP, stream);
    code.jump(judge);
    code.here(raw);
    code.set(R8, NO_PROTOCOL);
    code.jump(judge);
    code.here(stream);
    code.load(Word, R2, R7, SOCKET_STATE);
    code.jump_unless(R2, LISTEN, passes);
    code.here(judge);
    find_home(&mut code, homes, passes)?;
    code.load(Word, R2, R6, PACKET_MARK);
    code.jump_if_same(R2, R9, own);
    code.jump_if(R8, UDP, answer);
    code.jump_unless(R8, UDP_LITE, refused);
    code.here(answer);
    find_talks(&mut code, &talks, refused)?;
    find_port(&mut code, SOURCE_PORT, refused);
    key_of_question(&mut code);
    look_up(&mut code);
    code.jump_unless(R0, 0, passes);
    code.here(refused);
    code.set(R0, REFUSED);
    code.exit();
    code.here(own);
    code.jump_if(R8, UDP, heard);
    code.jump_unless(R8, UDP_LITE, passes);
    code.here(heard);
    // What is no answer of its own to its own is a question.
    find_talks(&mut code, &talks, passes)?;
    find_port(&mut code, SOURCE_PORT, passes);
    key_of_question(&mut code);
    look_up(&mut code);
    code.jump_unless(R0, 0, passes);
    key_of_service(&mut code);
    take_note(&mut code);
    code.here(passes);
    code.set(R0, PASSES);
    code.exit();
    Ok(code)
}

/// Takes note of what was asked on loopback by a UDP socket. It refuses nothing.
pub(super) fn asking(homes: impl AsFd, talks: impl AsFd) -> io::Result<Code> {
    let mut code = Code::default();
    let [datagram, passes] = std::array::from_fn(|_| code.label());
    code.copy(R6, R1);
    code.load(Word, R2, R6, PACKET_INTERFACE);
    code.jump_unless(R2, LOOPBACK, passes);
    find_socket(&mut code, passes);
    code.load(Word, R2, R7, SOCKET_TYPE);
    code.jump_if(R2, RAW, passes);
    code.jump_if(R8, UDP, datagram);
    code.jump_unless(R8, UDP_LITE, passes);
    code.here(datagram);
    find_home(&mut code, homes, passes)?;
    find_talks(&mut code, talks, passes)?;
    find_port(&mut code, DESTINATION_PORT, passes);
    // What goes to a port from which this one was asked is an answer.
    key_of_service(&mut code);
    look_up(&mut code);
    code.jump_unless(R0, 0, passes);
    key_of_question(&mut code);
    take_note(&mut code);
    code.here(passes);
    code.set(R0, PASSES);
    code.exit();
    Ok(code)
}

/// `R9` = the mark of the deepest cgroup around the socket that is somebody's home.
fn find_home(code: &mut Code, homes: impl AsFd, none: Label) -> io::Result<()> {
    let found = code.label();
    for level in (1..=MAX_LEVELS).rev() {
        let next = code.label();
        code.copy(R1, R6);
        code.set(R2, level);
        code.call(AncestorCgroup);
        code.jump_if(R0, 0, next);
        code.store(Double, Fp, KEY, R0);
        code.set_map(R1, &homes)?;
        look_up_in(code);
        code.jump_unless(R0, 0, found);
        code.here(next);
    }
    code.jump(none);
    code.here(found);
    code.load(Word, R9, R0, 0);
    Ok(())
}

/// `R8` = the map of who talks in the home `R9`.
fn find_talks(code: &mut Code, talks: impl AsFd, none: Label) -> io::Result<()> {
    code.store(Double, Fp, KEY, R9);
    code.set_map(R1, talks)?;
    look_up_in(code);
    code.jump_if(R0, 0, none);
    code.copy(R8, R0);
    Ok(())
}

/// `R7` = the socket that the packet is sent by or for, `R8` = its protocol.
fn find_socket(code: &mut Code, none: Label) {
    code.load(Double, R1, R6, PACKET_SOCKET);
    code.jump_if(R1, 0, none);
    code.call(FullSocket);
    code.jump_if(R0, 0, none);
    code.copy(R7, R0);
    code.load(Word, R8, R7, SOCKET_PROTOCOL);
}

/// Keeps the port at the other end: that which the socket is connected to, whatever nftables makes of it on the way, or one of the ports of the packet,
/// which begins at the IP header (RFC 791 section 3.1, RFC 8200 section 3). The addresses say nothing: whoever has a port of one local address may
/// write any other on what it sends.
fn find_port(code: &mut Code, port: i32, none: Label) {
    let [version_4, ports, found] = std::array::from_fn(|_| code.label());
    code.load(Half, R2, R7, SOCKET_PEER_PORT);
    code.store(Double, Fp, PORT, R2);
    code.jump_unless(R2, 0, found);
    load_bytes(code, 0, 1, none);
    code.load(Byte, R2, Fp, VALUE);
    code.copy(R3, R2);
    code.shift_right(R3, 4);
    code.jump_if(R3, 4, version_4);
    load_bytes(code, 6, 1, none);
    code.load(Byte, R3, Fp, VALUE);
    code.set(R2, 40);
    code.jump_if(R3, UDP, ports);
    code.jump_unless(R3, UDP_LITE, none);
    code.jump(ports);
    code.here(version_4);
    code.and(R2, 0xf);
    code.shift_left(R2, 2);
    code.here(ports);
    code.add(R2, port);
    load_bytes_at(code, 2, none);
    code.load(Half, R2, Fp, VALUE);
    code.store(Double, Fp, PORT, R2);
    code.here(found);
}

/// Key = that this very socket has asked the port.
fn key_of_question(code: &mut Code) {
    code.copy(R1, R6);
    code.call(SocketCookie);
    code.shift_left(R0, 16);
    code.load(Double, R1, Fp, PORT);
    code.add_register(R0, R1);
    code.store(Double, Fp, KEY, R0);
}

/// Key = that the socket's own port was asked from the port, by its own. No socket has a number with this upper bit.
fn key_of_service(code: &mut Code) {
    code.set(R0, 1);
    code.shift_left(R0, 63);
    code.load(Word, R1, R7, SOCKET_OWN_PORT);
    code.shift_left(R1, 16);
    code.add_register(R0, R1);
    code.load(Double, R1, Fp, PORT);
    code.add_register(R0, R1);
    code.store(Double, Fp, KEY, R0);
}

/// Writes down the key.
fn take_note(code: &mut Code) {
    code.set(R1, 1);
    code.store(Double, Fp, VALUE, R1);
    code.copy(R1, R8);
    point_to(code, R2, KEY);
    point_to(code, R3, VALUE);
    code.set(R4, 0);
    code.call(MapUpdate);
}

/// Loads so many bytes of the packet, from `offset` on, into the place of the value.
fn load_bytes(code: &mut Code, offset: i32, length: i32, none: Label) {
    code.set(R2, offset);
    load_bytes_at(code, length, none);
}

/// The same, from R2 on.
fn load_bytes_at(code: &mut Code, length: i32, none: Label) {
    code.copy(R1, R6);
    point_to(code, R3, VALUE);
    code.set(R4, length);
    code.call(LoadBytes);
    code.jump_unless(R0, 0, none);
}

/// `R0` = what the map of who talks says of the key, or null.
fn look_up(code: &mut Code) {
    code.copy(R1, R8);
    look_up_in(code);
}

/// The same of the map in `R1`.
fn look_up_in(code: &mut Code) {
    point_to(code, R2, KEY);
    code.call(MapLookup);
}

/// A pointer to a place on the stack.
fn point_to(code: &mut Code, to: Register, place: i16) {
    code.copy(to, Fp);
    code.add(to, place.into());
}

#[cfg(test)]
mod tests {
    use sha2::{Digest as _, Sha256};

    use super::super::FOLDER;
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn programs_that_changed_have_another_folder() -> Result<(), Box<dyn std::error::Error>> {
        // Any descriptor with the number 0.
        let map = io::stdin();
        let code = [hearing(&map, &map)?.instructions()?, asking(&map, &map)?.instructions()?].concat();
        let digest = Sha256::digest(code.concat());
        let known = (
            "cloison/guard-1",
            "692a8b33abb4c10bb2e96e00bf77f7b2e2017e1c16b4c4b5c7c5f75346176d0d",
        );
        assert_eq!(
            (FOLDER, format!("{digest:x}").as_str()),
            known,
            "an agent must not take the programs of another version for its own: raise the number of the folder, then change this"
        );
        Ok(())
    }
}
