use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use cloison_agent::names::Entry;
use cloison_agent::names::dns::serve::{ServeError, Server};
use cloison_agent::names::dns::zone::Zone;
use cloison_agent::sys::netns::NetNs;
use cloison_proto::version::Timestamp;

use crate::{Outcome, addresses, fresh, inside, ip, range, run};

/// A zone with `postgres` on so many hosts.
fn zone(instances: u32) -> Outcome<Zone> {
    let entry = |number| -> Outcome<Entry> {
        Ok(Entry {
            component: "postgres".parse()?,
            host: format!("db-{number}").parse()?,
            addresses: addresses(number)?,
        })
    };
    let entries = (0..instances).map(entry).collect::<Outcome<Vec<_>>>()?;
    Ok(Zone::new(range()?, &entries, Timestamp(u64::MAX), true))
}

/// A namespace with the resolver's addresses.
fn place() -> Outcome<(NetNs, [IpAddr; 2])> {
    let ns = fresh()?;
    let resolver = range()?.resolver().both();
    for address in resolver {
        let nodad = if address.is_ipv6() { "nodad" } else { "" };
        ip(&ns, &format!("address add {address} dev lo {nodad}"))?;
    }
    Ok((ns, resolver))
}

fn runtime() -> Outcome<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?)
}

fn kdig(ns: &NetNs, server: IpAddr, line: &str) -> Outcome<String> {
    inside(ns, || run("kdig", &format!("@{server} +timeout=2 +retry=0 {line}")))
}

#[test]
fn an_answer_that_is_too_long_for_a_datagram_says_so_and_is_whole_over_a_stream() -> Outcome {
    let (ns, resolver) = place()?;
    let runtime = runtime()?;
    let _server = Server::start(&ns, zone(300)?, runtime.handle())?;
    let records = |text: &str| {
        text.lines()
            .filter(|line| line.starts_with("postgres.") && line.contains("\tA\t"))
            .count()
    };
    for server in resolver {
        let cut = kdig(&ns, server, "postgres.cloison.internal A +noedns +notcp +ignore")?;
        assert!(cut.contains(" tc") && (20..40).contains(&records(&cut)), "{cut}");
        let longer = kdig(&ns, server, "postgres.cloison.internal A +bufsize=1232 +notcp +ignore")?;
        assert!(longer.contains(" tc") && records(&longer) > 60, "{longer}");
        // As every client does, the same question again over TCP.
        let whole = kdig(&ns, server, "postgres.cloison.internal A")?;
        assert!(!whole.contains(" tc") && records(&whole) == 300, "{whole}");
    }
    Ok(())
}

#[test]
fn streams_are_few_and_short_and_nobody_waits_for_good_behind_those_who_hold_them() -> Outcome {
    let (ns, [v4, _]) = place()?;
    let runtime = runtime()?;
    let _server = Server::start(&ns, zone(3)?, runtime.handle())?;
    let at = SocketAddr::new(v4, 53);
    inside(&ns, || {
        let begun = Instant::now();
        let mut idle = Vec::new();
        for _ in 0..24 {
            idle.push(TcpStream::connect_timeout(&at, Duration::from_secs(5))?);
        }
        // One that says half a question and no more.
        idle.iter_mut().take(1).try_for_each(|stream| stream.write_all(&[0, 44, 0, 7, 1]))?;
        let asked = run("kdig", &format!("@{v4} +tcp +timeout=10 +retry=0 postgres.cloison.internal A"))?;
        assert!(asked.contains("NOERROR"), "{asked}");
        assert!(begun.elapsed() > Duration::from_secs(1), "no more than so many at once");
        let mut rest = [0; 16];
        for stream in &mut idle {
            stream.set_read_timeout(Some(Duration::from_secs(10)))?;
            assert_eq!(stream.read(&mut rest)?, 0, "closed");
        }
        // A question that is longer than any ends the stream at once.
        let (mut long, begun) = (TcpStream::connect(at)?, Instant::now());
        long.write_all(&[0xff, 0xff])?;
        assert_eq!(long.read(&mut rest)?, 0);
        assert!(
            begun.elapsed() < Duration::from_secs(2),
            "not for having been idle: {:?}",
            begun.elapsed()
        );
        Ok(())
    })
}

#[test]
fn the_sockets_go_with_their_server_and_a_taken_port_is_named() -> Outcome {
    let (ns, [v4, v6]) = place()?;
    let runtime = runtime()?;
    let listed = || inside(&ns, || run("ss", "-Hltun"));
    let server = Server::start(&ns, zone(3)?, runtime.handle())?;
    let open = listed()?;
    assert_eq!(open.lines().count(), 4, "{open}");
    assert!(open.contains(&format!("{v4}:53")) && open.contains(&format!("[{v6}]:53")), "{open}");
    let again = Server::start(&ns, zone(3)?, runtime.handle());
    assert!(matches!(again, Err(ServeError::Taken(address)) if address == v4), "{again:?}");
    drop(server);
    let begun = Instant::now();
    while !listed()?.is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(5), "the sockets stay: {}", listed()?);
    }
    let bare = fresh()?;
    let missing = Server::start(&bare, zone(3)?, runtime.handle());
    assert!(
        matches!(missing, Err(ServeError::Socket(..))),
        "an address that is not there: {missing:?}"
    );
    Ok(())
}

#[test]
fn who_asks_from_an_address_outside_the_mesh_gets_nothing() -> Outcome {
    let (ns, [v4, _]) = place()?;
    let runtime = runtime()?;
    let _server = Server::start(&ns, zone(3)?, runtime.handle())?;
    ip(&ns, "address add 192.0.2.1/32 dev lo")?;
    inside(&ns, || {
        let question = b"\0\x07\x01\0\0\x01\0\0\0\0\0\0\x08postgres\x07cloison\x08internal\0\0\x01\0\x01";
        let ask = |from: IpAddr| -> Outcome<bool> {
            let socket = UdpSocket::bind((from, 0))?;
            socket.set_read_timeout(Some(Duration::from_millis(300)))?;
            socket.send_to(question, (v4, 53))?;
            Ok(socket.recv(&mut [0; 512]).is_ok())
        };
        assert!(ask(v4)? && ask([127, 0, 0, 1].into())?);
        assert!(!ask([192, 0, 2, 1].into())?);
        Ok(())
    })
}

#[test]
fn an_answer_takes_less_than_a_millisecond() -> Outcome {
    let (ns, [v4, _]) = place()?;
    let runtime = runtime()?;
    let _server = Server::start(&ns, zone(3)?, runtime.handle())?;
    let mut spans = inside(&ns, || {
        let socket = UdpSocket::bind((v4, 0))?;
        socket.connect((v4, 53))?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        let question = b"\0\x07\x01\0\0\x01\0\0\0\0\0\0\x08postgres\x07cloison\x08internal\0\0\x01\0\x01";
        let mut spans = Vec::new();
        for _ in 0..400 {
            let begun = Instant::now();
            socket.send(question)?;
            socket.recv(&mut [0; 512])?;
            spans.push(begun.elapsed());
        }
        Ok(spans)
    })?;
    spans.sort();
    let median = *spans.get(200).ok_or("no answers")?;
    println!("median {median:?}, 99 of 100 {:?}", spans.get(396));
    assert!(median < Duration::from_millis(1), "{median:?}");
    Ok(())
}
