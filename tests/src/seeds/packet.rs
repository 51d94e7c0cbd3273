//! Inner packets of both families: good ones, and each way of which it is known that a parser took it for good, or read beyond its end.

use std::net::IpAddr;

use anyhow::Result;

use super::{Seeds, add};
use crate::packets::flags::{ACK, FIN, PSH, RST, SYN, URG};
use crate::packets::{echo, extended, fragment, icmp, ip, number, tcp, udp, unreachable, with};

const PORTS: (u16, u16) = (40_000, 5_432);

pub(super) fn seeds() -> Result<Seeds> {
    let mut seeds = Seeds::new();
    for (family, src, dst) in [
        ("v4", "10.77.1.1", "10.77.1.2"),
        ("v6", "fd12:3456:789a::1:1", "fd12:3456:789a::1:2"),
    ] {
        let (src, dst): (IpAddr, IpAddr) = (src.parse()?, dst.parse()?);
        let mut add = |name: &str, packet: Vec<u8>| add(&mut seeds, format!("{family}-{name}"), packet);
        good(&mut add, src, dst);
        bad_transports(&mut add, src, dst);
        errors(&mut add, src, dst);
        for protocol in [
            number::IP_IN_IP,
            number::GRE,
            number::SCTP,
            number::ESP,
            number::AH,
            number::NO_NEXT,
            255,
        ] {
            add(&format!("protocol-{protocol}"), ip(src, dst, protocol, &[0; 24]));
        }
        let other = if src.is_ipv4() { number::ICMPV6 } else { number::ICMP };
        add("icmp-of-the-other-family", ip(src, dst, other, &icmp(8, 0, 1, b"x")));
        for address in bad_addresses(family) {
            let address: IpAddr = address.parse()?;
            add(
                &format!("from-{address}").replace(':', "_"),
                ip(address, dst, number::UDP, &udp(PORTS, b"x")),
            );
        }
    }
    add(
        &mut seeds,
        "mixed-families",
        ip("10.77.1.1".parse()?, "fd12::1".parse()?, number::UDP, &udp(PORTS, b"x")),
    );
    bad_v4(&mut seeds)?;
    bad_v6(&mut seeds)?;
    for version in [0u8, 5, 7, 15] {
        add(&mut seeds, format!("version-{version}"), vec![version << 4 | 5; 40]);
    }
    for len in [0, 1, 19, 39] {
        add(
            &mut seeds,
            format!("only-{len}-bytes"),
            vec![if len > 20 { 0x60 } else { 0x45 }; len],
        );
    }
    Ok(seeds)
}

fn good(add: &mut impl FnMut(&str, Vec<u8>), src: IpAddr, dst: IpAddr) {
    let segment = |flags, data: &[u8]| ip(src, dst, number::TCP, &tcp(PORTS, flags, 1_000, 2_000, data));
    add("tcp-syn", segment(SYN, b""));
    add("tcp-syn-ack", segment(SYN | ACK, b""));
    add("tcp-data", segment(ACK | PSH, b"select 1"));
    add("tcp-fin", segment(FIN | ACK, b""));
    add("tcp-rst", segment(RST, b""));
    add(
        "tcp-wraps",
        ip(src, dst, number::TCP, &tcp(PORTS, SYN, u32::MAX, u32::MAX, b"data on syn")),
    );
    add("udp", ip(src, dst, number::UDP, &udp(PORTS, b"hello")));
    add("udp-empty", ip(src, dst, number::UDP, &udp(PORTS, b"")));
    add("udp-ports-zero", ip(src, dst, number::UDP, &udp((0, 0), b"x")));
    add("echo-request", echo(src, dst, true, 7));
    add("echo-reply", echo(src, dst, false, 7));
    add("padded", [ip(src, dst, number::UDP, &udp(PORTS, b"hello")), vec![0; 11]].concat());
    add(
        "ecn",
        with(
            ip(src, dst, number::UDP, &udp(PORTS, b"x")),
            usize::from(src.is_ipv4()),
            if src.is_ipv4() { &[3] } else { &[0x60, 0x30] },
        ),
    );
    add("to-itself", ip(src, src, number::UDP, &udp(PORTS, b"x")));
}

fn bad_transports(add: &mut impl FnMut(&str, Vec<u8>), src: IpAddr, dst: IpAddr) {
    let segment = |flags| tcp(PORTS, flags, 1, 2, b"");
    for (name, flags) in [
        ("null", 0),
        ("xmas", FIN | PSH | URG),
        ("syn-fin", SYN | FIN),
        ("syn-rst", SYN | RST),
        ("all", 0xff),
        ("fin-alone", FIN),
    ] {
        add(&format!("tcp-{name}"), ip(src, dst, number::TCP, &segment(flags)));
    }
    for offset in [0u8, 4, 6, 15] {
        add(
            &format!("tcp-offset-{offset}"),
            ip(src, dst, number::TCP, &with(segment(SYN), 12, &[offset << 4])),
        );
    }
    for len in [0, 1, 4, 13, 19] {
        add(
            &format!("tcp-cut-{len}"),
            ip(src, dst, number::TCP, segment(SYN).get(..len).unwrap_or_default()),
        );
    }
    for len in [0u16, 7, 8, 12, 14, 0xffff] {
        add(
            &format!("udp-says-{len}"),
            ip(src, dst, number::UDP, &with(udp(PORTS, b"hello"), 4, &len.to_be_bytes())),
        );
    }
    add("udp-cut", ip(src, dst, number::UDP, &[1, 2, 3, 4, 0, 8, 0]));
    let icmp_number = if src.is_ipv4() { number::ICMP } else { number::ICMPV6 };
    add("icmp-cut", ip(src, dst, icmp_number, &[8, 0, 0]));
    add(
        "echo-with-code",
        ip(src, dst, icmp_number, &icmp(if src.is_ipv4() { 8 } else { 128 }, 1, 7, b"x")),
    );
    // Redirects, router and neighbour discovery, timestamps, source quench, node information, unknown.
    for kind in [4u8, 5, 9, 10, 13, 17, 130, 133, 134, 135, 136, 137, 139, 200] {
        add(
            &format!("icmp-type-{kind}"),
            ip(
                src,
                dst,
                icmp_number,
                &icmp(kind, 0, 0, &ip(dst, src, number::UDP, &udp((5_432, 40_000), b"x"))),
            ),
        );
    }
}

fn errors(add: &mut impl FnMut(&str, Vec<u8>), src: IpAddr, dst: IpAddr) {
    let back = (PORTS.1, PORTS.0);
    let udp_packet = ip(dst, src, number::UDP, &udp(back, b"hello"));
    let tcp_packet = ip(dst, src, number::TCP, &tcp(back, ACK, 5, 6, b"data"));
    add("error-udp", unreachable(src, dst, &udp_packet));
    add("error-tcp", unreachable(src, dst, &tcp_packet));
    add("error-echo", unreachable(src, dst, &echo(dst, src, true, 7)));
    add("error-about-an-error", unreachable(src, dst, &unreachable(dst, src, &udp_packet)));
    add(
        "error-about-another",
        unreachable(src, dst, &ip(src, dst, number::UDP, &udp(PORTS, b"x"))),
    );
    let head = if src.is_ipv4() { 20 } else { 40 };
    for len in [0, 1, head - 1, head, head + 7, head + 8] {
        add(
            &format!("error-cut-{len}"),
            unreachable(src, dst, tcp_packet.get(..len).unwrap_or_default()),
        );
    }
    add(
        "error-quote-says-less",
        unreachable(src, dst, &with(udp_packet.clone(), if src.is_ipv4() { 2 } else { 4 }, &[0, 7])),
    );
    add(
        "error-quote-of-the-other-version",
        unreachable(src, dst, &with(udp_packet, 0, &[if src.is_ipv4() { 0x60 } else { 0x45 }])),
    );
}

fn bad_addresses(family: &str) -> &'static [&'static str] {
    match family {
        "v4" => &[
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "169.254.1.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
        ],
        _ => &[
            "::",
            "::1",
            "fe80::1",
            "ff02::1",
            "::ffff:10.77.1.1",
            "::10.77.1.1",
            "64:ff9b::a4d:101",
            "2002:a4d:101::1",
        ],
    }
}

fn bad_v4(seeds: &mut Seeds) -> Result<()> {
    let (src, dst): (IpAddr, IpAddr) = ("10.77.1.1".parse()?, "10.77.1.2".parse()?);
    let whole = || ip(src, dst, number::TCP, &tcp(PORTS, SYN, 1, 2, &[0; 24]));
    for ihl in [0u8, 4, 6, 15] {
        add(seeds, format!("v4-ihl-{ihl}"), with(whole(), 0, &[0x40 | ihl]));
    }
    for len in [0u16, 19, 20, 63, 65, 0xffff] {
        add(seeds, format!("v4-says-{len}"), with(whole(), 2, &len.to_be_bytes()));
    }
    // RFC 1858: a first fragment too small for the flags, and one that lies over them.
    add(
        seeds,
        "v4-tiny-first-fragment",
        fragment(ip(src, dst, number::TCP, &tcp(PORTS, SYN, 1, 2, b"")[..8]), 0, true),
    );
    add(seeds, "v4-overlapping-fragment", fragment(whole(), 1, false));
    add(seeds, "v4-last-fragment", fragment(whole(), 0x1fff, false));
    add(seeds, "v4-first-fragment", fragment(whole(), 0, true));
    add(seeds, "v4-df-and-mf", with(whole(), 6, &[0x60, 0]));
    add(seeds, "v4-reserved-flag", with(whole(), 6, &[0x80, 0]));
    Ok(())
}

fn bad_v6(seeds: &mut Seeds) -> Result<()> {
    let (src, dst): (IpAddr, IpAddr) = ("fd12:3456:789a::1:1".parse()?, "fd12:3456:789a::1:2".parse()?);
    let whole = ip(src, dst, number::TCP, &tcp(PORTS, SYN, 1, 2, b"data"));
    let (empty, long): (&[u8], &[u8]) = (&[0, 0, 1, 4, 0, 0, 0, 0], &[0, 0xff, 1, 4, 0, 0, 0, 0]);
    let kinds = [
        number::HOP_BY_HOP,
        number::ROUTING,
        number::FRAGMENT,
        number::DESTINATION,
        number::AH,
        number::ESP,
        135,
        139,
        140,
        253,
    ];
    for kind in kinds {
        add(seeds, format!("v6-extension-{kind}"), extended(&whole, &[(kind, empty)]));
        add(seeds, format!("v6-extension-{kind}-overlong"), extended(&whole, &[(kind, long)]));
        add(
            seeds,
            format!("v6-extension-{kind}-cut"),
            extended(&whole, &[(kind, empty)]).get(..43).unwrap_or_default(),
        );
    }
    let all: Vec<(u8, &[u8])> = kinds.iter().take(4).map(|kind| (*kind, empty)).collect();
    add(seeds, "v6-chain", extended(&whole, &all));
    add(seeds, "v6-chain-of-one-kind", extended(&whole, &[(number::DESTINATION, empty); 12]));
    add(
        seeds,
        "v6-hop-by-hop-late",
        extended(&whole, &[(number::DESTINATION, empty), (number::HOP_BY_HOP, empty)]),
    );
    add(
        seeds,
        "v6-fragment-later",
        extended(&whole, &[(number::FRAGMENT, &[0, 0, 0, 9, 0, 0, 0, 1])]),
    );
    add(
        seeds,
        "v6-jumbo",
        with(extended(&whole, &[(number::HOP_BY_HOP, &[0, 0, 0xc2, 4, 0, 1, 0, 0])]), 4, &[0, 0]),
    );
    for len in [0u16, 1, 19, 23, 25, 0xffff] {
        add(seeds, format!("v6-says-{len}"), with(whole.clone(), 4, &len.to_be_bytes()));
    }
    add(seeds, "v6-flow-label", with(whole, 1, &[0x0f, 0xff, 0xff]));
    Ok(())
}
