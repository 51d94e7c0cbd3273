use std::net::{IpAddr, UdpSocket};
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use cloison_agent::netlink::{Netlink, addr, link, route};
use cloison_agent::sys::poll::{Poller, Ready};
use cloison_agent::sys::tun::{Tun, TunError, VNET_HEADER_LEN};

use crate::{Outcome, addresses, fresh, inside, ip, range, tun_name, wire};

const STATE: link::LinkState = link::LinkState {
    mtu: 1420,
    queue_length: 1000,
};

fn ready_tun() -> Outcome<Tun> {
    let tun = Tun::create(&tun_name()?)?;
    let mut netlink = Netlink::open()?;
    let ours = addresses(0)?;
    link::apply(&mut netlink, tun.index(), STATE)?;
    addr::apply(&mut netlink, tun.index(), &ours.both())?;
    let to = route::destinations(range()?);
    let wanted = to.map(|destination| route::Route::Tun {
        destination,
        index: tun.index(),
        source: ours.of_family(destination.0),
        table: route::MAIN,
    });
    route::apply(&mut netlink, &to, &wanted.into())?;
    Ok(tun)
}

#[test]
fn the_kernel_answers_an_echo_written_to_the_tun() -> Outcome {
    let ns = fresh()?;
    let tun = inside(&ns, ready_tun)?;
    let (ours, theirs) = (addresses(0)?, addresses(1)?);
    for ours in ours.both() {
        let theirs = theirs.of_family(ours);
        let request = wire::echo(theirs, ours, true, b"how do you do")?;
        let expected = wire::read_echo(&wire::echo(ours, theirs, false, b"")?);
        // The kernel takes a moment after an IPv6 address was added.
        let mut answer = None;
        for _ in 0..5 {
            tun.write(&[0; VNET_HEADER_LEN], &request)?;
            answer = wire::read_until(&tun, |p| wire::read_echo(p) == expected)?;
            if answer.is_some() {
                break;
            }
        }
        assert!(answer.is_some_and(|a| a.ends_with(b"how do you do")), "{ours}");
    }
    Ok(())
}

#[test]
fn what_is_sent_to_the_overlay_leaves_by_the_tun_from_the_component_s_address() -> Outcome {
    let ns = fresh()?;
    let (ours, theirs) = (addresses(0)?, addresses(1)?);
    let tun = inside(&ns, ready_tun)?;
    inside(&ns, || {
        for theirs in theirs.both() {
            let any: IpAddr = if theirs.is_ipv4() { "0.0.0.0".parse()? } else { "::".parse()? };
            UdpSocket::bind((any, 0))?.send_to(b"hello", (theirs, 9))?;
        }
        Ok(())
    })?;
    for ours in ours.both() {
        let from_us = |p: &[u8]| wire::read_echo(p).is_some_and(|(s, d, _)| (s, d) == (ours, theirs.of_family(ours)));
        assert!(wire::read_until(&tun, from_us)?.is_some_and(|p| p.ends_with(b"hello")), "{ours}");
    }
    Ok(())
}

#[test]
fn a_name_that_is_taken_is_reported_as_that() -> Outcome {
    let ns = fresh()?;
    let first = inside(&ns, || Ok(Tun::create(&tun_name()?)?))?;
    let again = inside(&ns, || Ok(Tun::create(&tun_name()?)))?;
    assert!(matches!(again, Err(TunError::NameTaken(..))), "{again:?}");
    drop(first);
    inside(&ns, || Ok(Tun::create(&tun_name()?)?))?;
    Ok(())
}

#[test]
fn a_tun_that_was_deleted_reads_as_an_error_not_as_silence() -> Outcome {
    let ns = fresh()?;
    let tun = inside(&ns, ready_tun)?;
    ip(&ns, "link delete cloison0")?;
    let error = tun.read(&mut [0; VNET_HEADER_LEN], &mut [0; 1500]).err().ok_or("it was read")?;
    assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock);
    let (poller, mut ready) = (Poller::new()?, Vec::new());
    poller.add(&tun, 1)?;
    poller.wait(&mut ready, Duration::from_secs(1))?;
    assert_eq!(ready, [Ready { token: 1, broken: true }]);
    Ok(())
}

#[test]
fn a_tun_that_was_kept_open_is_adopted_with_what_waits_in_it() -> Outcome {
    let ns = fresh()?;
    let tun = inside(&ns, ready_tun)?;
    let kept = tun.as_fd().try_clone_to_owned()?;
    let (index, theirs) = (tun.index(), addresses(1)?);
    drop(tun);
    inside(&ns, || {
        UdpSocket::bind("0.0.0.0:0")?.send_to(b"meanwhile", (theirs.v4, 9))?;
        Ok(())
    })?;
    let (tun, namespace) = Tun::adopt(kept)?;
    assert_eq!((tun.name(), tun.index(), namespace.id()), (&tun_name()?, index, ns.id()));
    assert!(wire::read_until(&tun, |p| p.ends_with(b"meanwhile"))?.is_some());
    Ok(())
}

#[test]
fn what_is_no_live_tun_of_our_kind_is_not_adopted() -> Outcome {
    let ns = fresh()?;
    let tun = inside(&ns, ready_tun)?;
    let gone = tun.as_fd().try_clone_to_owned()?;
    ip(&ns, "link delete cloison0")?;
    let strange: [OwnedFd; 3] = [
        gone,
        std::fs::File::open("/dev/null")?.into(),
        std::fs::File::options().read(true).write(true).open("/dev/net/tun")?.into(),
    ];
    for fd in strange {
        let refused = Tun::adopt(fd);
        assert!(matches!(refused, Err(TunError::NotOurs(..))), "{refused:?}");
    }
    Ok(())
}
