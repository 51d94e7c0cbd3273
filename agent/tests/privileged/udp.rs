use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use cloison_agent::sys::netns::NetNs;
use cloison_agent::udp::{Family, Path, Receiver, SendCounts, Sender, Udp, UdpError};

use crate::{Outcome, fresh, inside, ip, wired_pair};

fn listen(ns: &NetNs, port: u16) -> Outcome<Udp> {
    inside(ns, || Ok(Udp::listen(port, 1)?.remove(0)))
}

/// Receives until `count` datagrams are there, for at most two seconds: their lengths, and the last path.
fn receive(udp: &Udp, family: Family, count: usize) -> Outcome<(Vec<usize>, Option<Path>)> {
    let (mut receiver, mut lengths, mut last) = (Receiver::default(), Vec::new(), None);
    let deadline = Instant::now() + Duration::from_secs(2);
    while lengths.len() < count && Instant::now() < deadline {
        receiver.receive(udp, family)?;
        let before = lengths.len();
        for (bytes, segment, path) in receiver.received() {
            lengths.extend(bytes.chunks(segment).map(<[u8]>::len));
            last = Some(path);
        }
        if lengths.len() == before {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    Ok((lengths, last))
}

fn ends(family: Family, port: u16) -> Outcome<(IpAddr, SocketAddr)> {
    Ok(match family {
        Family::V4 => ("192.0.2.1".parse()?, SocketAddr::new("192.0.2.2".parse()?, port)),
        Family::V6 => ("2001:db8::1".parse()?, SocketAddr::new("2001:db8::2".parse()?, port)),
    })
}

#[test]
fn trains_arrive_whole_and_tell_at_which_address() -> Outcome {
    let (a, b) = wired_pair()?;
    let (from, to) = (listen(&a, 0)?, listen(&b, 51_820)?);
    for family in [Family::V4, Family::V6] {
        let (local, remote) = ends(family, to.port())?;
        let path = Path {
            remote,
            local: Some(local),
            ecn: 1,
        };
        let mut sender = Sender::default();
        sender.set_underlay_mtu(1500);
        let lengths: Vec<usize> = std::iter::repeat_n(1300, 100).chain([70, 1300, 200, 200]).collect();
        for length in &lengths {
            sender.push(&from, &vec![7; *length], path);
        }
        sender.flush(&from);
        assert_eq!(
            sender.take_counts(),
            SendCounts {
                sent: 104,
                refused: 0,
                fragmented: 0
            }
        );
        let (arrived, last) = receive(&to, family, lengths.len())?;
        assert_eq!(arrived, lengths);
        assert_eq!(
            last,
            Some(Path {
                remote: (local, from.port()).into(),
                local: Some(remote.ip()),
                ecn: 1
            })
        );
    }
    Ok(())
}

#[test]
fn what_exceeds_the_underlay_is_fragmented_and_counted() -> Outcome {
    let (a, b) = wired_pair()?;
    for ns in [&a, &b] {
        ip(ns, "link set eth0 mtu 1300")?;
    }
    let (from, to) = (listen(&a, 0)?, listen(&b, 0)?);
    for family in [Family::V4, Family::V6] {
        let (_, remote) = ends(family, to.port())?;
        let mut sender = Sender::default();
        sender.set_underlay_mtu(1300);
        for _ in 0..5 {
            sender.push(
                &from,
                &[7; 1400],
                Path {
                    remote,
                    local: None,
                    ecn: 0,
                },
            );
        }
        sender.flush(&from);
        let counts = sender.take_counts();
        assert_eq!((counts.sent, counts.refused, counts.fragmented), (5, 0, 5), "{family:?}");
        assert_eq!(receive(&to, family, 5)?.0, [1400; 5], "{family:?}");
    }
    Ok(())
}

#[test]
fn a_local_address_that_is_gone_does_not_stop_a_reply() -> Outcome {
    let (a, b) = wired_pair()?;
    let (from, to) = (listen(&a, 0)?, listen(&b, 0)?);
    for family in [Family::V4, Family::V6] {
        let (_, remote) = ends(family, to.port())?;
        let gone = if family == Family::V4 {
            "192.0.2.77".parse()?
        } else {
            "2001:db8::77".parse()?
        };
        let mut sender = Sender::default();
        sender.set_underlay_mtu(1500);
        sender.push(
            &from,
            b"still here",
            Path {
                remote,
                local: Some(gone),
                ecn: 0,
            },
        );
        sender.flush(&from);
        assert_eq!(sender.take_counts().sent, 1, "{family:?}");
        assert_eq!(receive(&to, family, 1)?.0, [10]);
    }
    Ok(())
}

#[test]
fn a_port_that_another_has_is_reported_as_taken_even_if_it_is_shared() -> Outcome {
    let ns = fresh()?;
    let first = inside(&ns, || Ok(Udp::listen(51_820, 3)?))?;
    assert!(first.len() == 3 && first.iter().all(|u| u.port() == 51_820 && u.sockets().count() == 2));
    for workers in [1, 2] {
        let second = inside(&ns, || Ok(Udp::listen(51_820, workers)))?;
        assert!(matches!(second, Err(UdpError::PortTaken(51_820, _))), "{second:?}");
    }
    Ok(())
}

#[test]
fn a_host_without_ipv6_listens_on_ipv4() -> Outcome {
    let ns = fresh()?;
    inside(&ns, || crate::run("sysctl", "-qw net.ipv6.conf.all.disable_ipv6=1"))?;
    let udp = listen(&ns, 0)?;
    assert_ne!(udp.port(), 0);
    Ok(())
}
