//! Packets made by hand.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use cloison_agent::sys::tun::{Tun, VNET_HEADER_LEN};

use crate::Outcome;

/// An echo request or answer from `source` to `destination`.
pub(crate) fn echo(source: IpAddr, destination: IpAddr, request: bool, payload: &[u8]) -> Outcome<Vec<u8>> {
    match (source, destination) {
        (IpAddr::V4(s), IpAddr::V4(d)) => v4(s, d, if request { 8 } else { 0 }, payload),
        (IpAddr::V6(s), IpAddr::V6(d)) => v6(s, d, if request { 128 } else { 129 }, payload),
        _ => Err("two families".into()),
    }
}

/// Source, destination and ICMP type of an echo packet.
pub(crate) fn read_echo(packet: &[u8]) -> Option<(IpAddr, IpAddr, u8)> {
    let get = |at: usize, length: usize| packet.get(at..at + length);
    match packet.first()? >> 4 {
        4 => {
            let source = <[u8; 4]>::try_from(get(12, 4)?).ok()?;
            let destination = <[u8; 4]>::try_from(get(16, 4)?).ok()?;
            Some((Ipv4Addr::from(source).into(), Ipv4Addr::from(destination).into(), *packet.get(20)?))
        }
        _ => {
            let source = <[u8; 16]>::try_from(get(8, 16)?).ok()?;
            let destination = <[u8; 16]>::try_from(get(24, 16)?).ok()?;
            Some((Ipv6Addr::from(source).into(), Ipv6Addr::from(destination).into(), *packet.get(40)?))
        }
    }
}

/// Reads packets from `tun` until `wanted` accepts one, for at most two seconds.
pub(crate) fn read_until(tun: &Tun, wanted: impl Fn(&[u8]) -> bool) -> Outcome<Option<Vec<u8>>> {
    let deadline = Instant::now() + Duration::from_secs(2);
    let (mut header, mut packet) = ([0xff; VNET_HEADER_LEN], vec![0; 65_535]);
    while Instant::now() < deadline {
        match tun.read(&mut header, &mut packet) {
            Ok(length) => {
                assert_eq!(header, [0; VNET_HEADER_LEN], "no offload is on");
                let packet = packet.get(..length).unwrap_or_default();
                if wanted(packet) {
                    return Ok(Some(packet.to_vec()));
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(2)),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(None)
}

fn v4(source: Ipv4Addr, destination: Ipv4Addr, kind: u8, payload: &[u8]) -> Outcome<Vec<u8>> {
    let length = u16::try_from(28 + payload.len())?.to_be_bytes();
    let mut header = vec![0x45, 0, length[0], length[1], 0, 0, 0, 0, 64, 1, 0, 0];
    header.extend(source.octets());
    header.extend(destination.octets());
    let sum = checksum(&header).to_be_bytes();
    header[10..12].copy_from_slice(&sum);
    header.extend(icmp(kind, payload, &[]));
    Ok(header)
}

fn v6(source: Ipv6Addr, destination: Ipv6Addr, kind: u8, payload: &[u8]) -> Outcome<Vec<u8>> {
    let length = u16::try_from(8 + payload.len())?.to_be_bytes();
    let mut header = vec![0x60, 0, 0, 0, length[0], length[1], 58, 64];
    header.extend(source.octets());
    header.extend(destination.octets());
    let mut pseudo = [source.octets(), destination.octets()].concat();
    pseudo.extend([0, 0, length[0], length[1], 0, 0, 0, 58]);
    header.extend(icmp(kind, payload, &pseudo));
    Ok(header)
}

fn icmp(kind: u8, payload: &[u8], pseudo_header: &[u8]) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0x12, 0x34, 0, 1];
    message.extend(payload);
    let sum = checksum(&[pseudo_header, &message].concat()).to_be_bytes();
    message[2..4].copy_from_slice(&sum);
    message
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|c| u32::from(c[0]) << 8 | c.get(1).map_or(0, |b| u32::from(*b)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}
