//! Tests of the shell against the real kernel: TUNs, netlink, nftables and sockets, each test in network namespaces of its own. They need
//! root, and fail without it.

mod base_table;
mod claims;
mod containers;
mod dataplane;
mod dns;
mod guard;
mod mesh;
mod netlink;
pub(crate) mod netns;
mod person;
mod site;
mod sock_diag;
mod tun;
mod udp;
mod wire;
mod witness;

use std::error::Error;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;

use cloison_agent::sys::InterfaceName;
use cloison_agent::sys::netns::NetNs;
use cloison_proto::net::{AddressPair, OverlayRange};
use rustix::thread::{Uid, set_thread_res_uid};

type Outcome<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;

const V6: Ipv6Addr = Ipv6Addr::new(0xfd12, 0x3456, 0x789a, 0, 0, 0, 0, 0);

/// 10.77.0.0/16 and fd12:3456:789a::/48.
fn range() -> Outcome<OverlayRange> {
    Ok(OverlayRange::new(Ipv4Addr::new(10, 77, 0, 0), 16, V6)?)
}

/// Instance number `index` of the mesh.
fn addresses(index: u32) -> Outcome<AddressPair> {
    range()?.nth(index).ok_or_else(|| "beyond the range".into())
}

fn tun_name() -> Outcome<InterfaceName> {
    Ok("cloison0".parse()?)
}

/// Runs `work` inside `ns`, with one kind of error.
fn inside<T: Send>(ns: &NetNs, work: impl FnOnce() -> Outcome<T> + Send) -> Outcome<T> {
    ns.run(work)?
}

/// Runs `work` inside `ns` as another user: what it makes is that user's. One thread alone changes.
fn as_user<T: Send>(ns: &NetNs, user: u32, work: impl FnOnce() -> Outcome<T> + Send) -> Outcome<T> {
    inside(ns, || {
        let user = Uid::from_raw(user);
        set_thread_res_uid(user, user, user)?;
        work()
    })
}

/// A namespace of its own, with loopback up.
fn fresh() -> Outcome<NetNs> {
    let ns = NetNs::fresh().map_err(|e| format!("these tests need root: {e}"))?;
    ip(&ns, "link set lo up")?;
    // Addresses are usable at once: no duplicate address detection.
    inside(&ns, || {
        run("sysctl", "-qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0")
    })?;
    Ok(ns)
}

/// Runs `ip ARGUMENTS` inside `ns`.
fn ip(ns: &NetNs, arguments: &str) -> Outcome<String> {
    inside(ns, || run("ip", arguments))
}

/// Runs a program in the calling thread's namespace.
fn run(program: &str, arguments: &str) -> Outcome<String> {
    let output = Command::new(program).args(arguments.split_whitespace()).output()?;
    if !output.status.success() {
        return Err(format!("{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Two namespaces on one wire: `eth0` at both ends, 192.0.2.1 and 2001:db8::1 in the first, .2 in the second.
fn wired_pair() -> Outcome<(NetNs, NetNs)> {
    let (a, b) = (fresh()?, fresh()?);
    let other = format!("/proc/{}/fd/{}", std::process::id(), b.as_fd().as_raw_fd());
    ip(&a, &format!("link add eth0 type veth peer name eth0 netns {other}"))?;
    for (ns, number) in [(&a, 1), (&b, 2)] {
        ip(ns, &format!("addr add 192.0.2.{number}/24 dev eth0"))?;
        ip(ns, &format!("addr add 2001:db8::{number}/64 dev eth0 nodad"))?;
        ip(ns, "link set eth0 up")?;
    }
    // Both ends know the way before a test begins: the first question for a neighbour may come before the kernel is ready to answer it.
    for to in ["192.0.2.2", "2001:db8::2"] {
        inside(&a, || run("ping", &format!("-n -q -c 1 -i 0.2 -w 10 {to}")))?;
    }
    Ok((a, b))
}
