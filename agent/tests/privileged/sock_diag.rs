use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use cloison_agent::netlink::sock_diag::{Found, Kind, SockDiag, State};
use cloison_agent::sys::netns::NetNs;
use cloison_agent::sys::tun::{Tun, interface_index};
use socket2::{Domain, Socket, Type};

use crate::{Outcome, addresses, as_user, fresh, inside, ip, tun_name, wired_pair};

/// The user who makes the sockets of these tests.
const USER: u32 = 2002;

/// Asks inside `ns`, as seen from interface number `interface`.
fn find(ns: &NetNs, kind: Kind, local: SocketAddr, remote: SocketAddr, interface: u32) -> Outcome<Option<Found>> {
    inside(ns, || Ok(SockDiag::open()?.find(kind, local, remote, interface)?))
}

/// The user and the state of what was found.
fn seen(found: Option<Found>) -> Option<(u32, State)> {
    found.map(|found| (found.user, found.state))
}

/// The id of the cgroup that this test runs in: of version 2, wherever it is mounted.
pub(crate) fn own_cgroup() -> Outcome<u64> {
    let lines = std::fs::read_to_string("/proc/self/cgroup")?;
    let path = lines.lines().find_map(|line| line.strip_prefix("0::/")).ok_or("no cgroup")?;
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    let mount = mounts.lines().find(|line| line.contains(" cgroup2 ")).ok_or("no cgroup2 mount")?;
    let mount = mount.split(' ').nth(1).ok_or("no path")?;
    Ok(std::fs::metadata(std::path::Path::new(mount).join(path))?.ino())
}

/// Both ends of the wire, in both families.
fn ends() -> Outcome<[(IpAddr, IpAddr); 2]> {
    Ok([
        ("192.0.2.1".parse()?, "192.0.2.2".parse()?),
        ("2001:db8::1".parse()?, "2001:db8::2".parse()?),
    ])
}

#[test]
fn a_connected_socket_is_found_with_its_user_and_its_cgroup() -> Outcome {
    let (a, b) = wired_pair()?;
    for (here, there) in ends()? {
        let _listener = inside(&b, || Ok(TcpListener::bind((there, 80))?))?;
        let tcp = as_user(&a, USER, || Ok(TcpStream::connect((there, 80))?))?;
        let udp = as_user(&a, USER, || {
            let udp = UdpSocket::bind((here, 0))?;
            udp.connect((there, 53))?;
            Ok(udp)
        })?;
        let (from, to) = (tcp.local_addr()?, (there, 80).into());
        let (udp_from, udp_to) = (udp.local_addr()?, (there, 53).into());
        let tcp = find(&a, Kind::Tcp, from, to, 0)?.ok_or("no TCP socket")?;
        assert_eq!((tcp.user, tcp.state, tcp.cgroup), (USER, State::ESTABLISHED, Some(own_cgroup()?)));
        assert_ne!(tcp.inode, 0);
        let udp = find(&a, Kind::Udp, udp_from, udp_to, 0)?.ok_or("no UDP socket")?;
        assert_eq!((udp.user, udp.state, udp.cgroup), (USER, State::ESTABLISHED, Some(own_cgroup()?)));

        let other = SocketAddr::new(there, 81);
        assert_eq!(find(&a, Kind::Tcp, from, other, 0)?, None, "another remote port is another stream");
        assert_eq!(
            find(&a, Kind::Udp, udp_from, other, 0)?,
            None,
            "a connected socket hears one remote end"
        );
        assert_eq!(find(&b, Kind::Tcp, from, to, 0)?, None, "another namespace has other sockets");
    }
    Ok(())
}

#[test]
fn an_unconnected_and_a_wildcard_socket_are_found_by_whatever_they_hear() -> Outcome {
    let (a, _b) = wired_pair()?;
    for (here, there) in ends()? {
        let wildcard: IpAddr = if here.is_ipv4() {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            std::net::Ipv6Addr::UNSPECIFIED.into()
        };
        for bound in [here, wildcard] {
            let udp = as_user(&a, USER, || Ok(UdpSocket::bind((bound, 5353))?))?;
            let tcp = as_user(&a, USER, || Ok(TcpListener::bind((bound, 5432))?))?;
            let remote = SocketAddr::new(there, 4000);
            let found = find(&a, Kind::Udp, (here, 5353).into(), remote, 0)?;
            assert_eq!(seen(found), Some((USER, State::CLOSED)), "udp {bound}");
            let found = find(&a, Kind::Tcp, (here, 5432).into(), remote, 0)?;
            assert_eq!(seen(found), Some((USER, State::LISTEN)), "tcp {bound}");
            drop((udp, tcp));
            assert_eq!(find(&a, Kind::Udp, (here, 5353).into(), remote, 0)?, None);
            assert_eq!(find(&a, Kind::Tcp, (here, 5432).into(), remote, 0)?, None);
        }
    }
    Ok(())
}

#[test]
fn a_socket_of_both_families_is_found_by_the_packet_s_family() -> Outcome {
    let (a, b) = wired_pair()?;
    let here = SocketAddr::from(([192, 0, 2, 1], 5432));
    let _listener = as_user(&a, USER, || Ok(TcpListener::bind("[::]:5432")?))?;
    let found = find(&a, Kind::Tcp, here, ([192, 0, 2, 2], 4000).into(), 0)?;
    assert_eq!(seen(found), Some((USER, State::LISTEN)), "[::] hears IPv4");

    let _other = inside(&b, || Ok(TcpListener::bind("192.0.2.2:80")?))?;
    let mapped = as_user(&a, USER, || {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
        socket.connect(&"[::ffff:192.0.2.2]:80".parse::<SocketAddr>()?.into())?;
        Ok(TcpStream::from(socket))
    })?;
    let from = SocketAddr::from(([192, 0, 2, 1], mapped.local_addr()?.port()));
    let found = find(&a, Kind::Tcp, from, ([192, 0, 2, 2], 80).into(), 0)?;
    assert_eq!(seen(found), Some((USER, State::ESTABLISHED)), "a v4-mapped connection");
    Ok(())
}

#[test]
fn a_socket_is_found_while_it_asks_for_a_connection_and_no_longer_when_it_is_closed() -> Outcome {
    let ns = fresh()?;
    let tun = inside(&ns, || Ok(Tun::create(&tun_name()?)?))?;
    ip(&ns, "link set cloison0 up")?;
    for (local, remote) in addresses(0)?.both().into_iter().zip(addresses(9)?.both()) {
        let plain = if local.is_ipv4() { 32 } else { 128 };
        ip(&ns, &format!("addr add {local}/{plain} dev cloison0 nodad"))?;
        ip(&ns, &format!("route add {remote}/{plain} dev cloison0 src {local}"))?;
        let remote = SocketAddr::new(remote, 80);
        // Nobody reads the TUN: the SYN waits there.
        let connect = |device: Option<&'static str>| {
            as_user(&ns, USER, || {
                let socket = Socket::new(Domain::for_address(remote), Type::STREAM, None)?;
                socket.set_nonblocking(true)?;
                socket.bind_device(device.map(str::as_bytes))?;
                let _in_progress = socket.connect(&remote.into());
                Ok(socket)
            })
        };
        for device in [None, Some("cloison0")] {
            let socket = connect(device)?;
            let from = socket.local_addr()?.as_socket().ok_or("no address")?;
            let found = find(&ns, Kind::Tcp, from, remote, tun.index())?;
            assert_eq!(seen(found), Some((USER, State::SYN_SENT)), "{device:?}");
            if device.is_some() {
                let loopback = inside(&ns, || Ok(interface_index(&"lo".parse()?)?))?;
                assert_eq!(find(&ns, Kind::Tcp, from, remote, loopback)?, None, "bound to another interface");
            }
            drop(socket);
            assert_eq!(find(&ns, Kind::Tcp, from, remote, tun.index())?, None);
        }
    }
    Ok(())
}

#[test]
fn of_two_udp_sockets_the_one_that_would_hear_is_found() -> Outcome {
    let (a, _b) = wired_pair()?;
    let shared = |user: u32, bound: &'static str| {
        as_user(&a, user, || {
            let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
            socket.set_reuse_address(true)?;
            socket.bind(&bound.parse::<SocketAddr>()?.into())?;
            Ok(socket)
        })
    };
    let _server = shared(USER, "0.0.0.0:5353")?;
    let (here, remote) = ("192.0.2.1:5353".parse()?, "192.0.2.2:4000".parse()?);
    assert_eq!(seen(find(&a, Kind::Udp, here, remote, 0)?), Some((USER, State::CLOSED)));
    let _thief = shared(3009, "192.0.2.1:5353")?;
    assert_eq!(
        seen(find(&a, Kind::Udp, here, remote, 0)?),
        Some((3009, State::CLOSED)),
        "the thief would hear it"
    );
    Ok(())
}

#[test]
fn the_kernel_is_known_to_answer_and_a_lookup_takes_microseconds() -> Outcome {
    let ns = fresh()?;
    inside(&ns, || {
        let mut diag = SockDiag::open()?;
        assert!(diag.works()?);
        let listeners = (0..1_000)
            .map(|_| TcpListener::bind("127.0.0.1:0"))
            .collect::<Result<Vec<_>, _>>()?;
        let at = listeners.last().ok_or("no listener")?.local_addr()?;
        let mut ask = |local: SocketAddr| -> Outcome<Vec<Duration>> {
            let mut times = Vec::new();
            for _ in 0..10_000 {
                let begun = Instant::now();
                diag.find(Kind::Tcp, local, ([127, 0, 0, 1], 9).into(), 0)?;
                times.push(begun.elapsed());
            }
            times.sort();
            Ok(times)
        };
        let (hit, miss) = (ask(at)?, ask(([127, 0, 0, 2], 9).into())?);
        println!(
            "one lookup among 1000 listeners: p50 {:?}, p99 {:?}; of none: p50 {:?}, p99 {:?}",
            hit[5_000], hit[9_900], miss[5_000], miss[9_900]
        );
        // Milliseconds would be a walk over all sockets; a busy machine is not one.
        assert!(hit[5_000] < Duration::from_micros(200), "{:?}", hit[5_000]);
        Ok(())
    })
}
