//! The guard of loopback: who is reached there, and by whom, against whatever else finds a way to a socket. Each attack is also made where
//! nobody is guarded, and has to come through there.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use cloison_agent::attach::claim_table::mark;
use cloison_agent::attach::guard::{Guard, GuardError};
use cloison_agent::dataplane::{self, Config, Enforcement};
use cloison_agent::sys::bpf::asm::{Code, Register};
use cloison_agent::sys::bpf::{self, Hook, Program};
use cloison_agent::sys::netns::NetNs;

use crate::claims::{SILENCE, at, shared_host};
use crate::mesh::{Component, Host, Mesh, config};
use crate::person::{Group, Person};
use crate::{Outcome, fresh, inside, ip, range, run};

const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Where programs are pinned: a file system of a test's own, that goes with it.
struct Programs(tempfile::TempDir);

impl Programs {
    fn new() -> Outcome<Self> {
        let place = tempfile::tempdir()?;
        run("mount", &format!("-t bpf bpf {}", place.path().display()))?;
        Ok(Self(place))
    }

    fn place(&self) -> &Path {
        self.0.path()
    }

    /// A host of its own, with other addresses (192.0.2.9, 2001:db8::9) on an interface that leads nowhere.
    fn host(&self, is_guarded: bool) -> Outcome<Host> {
        let ns = fresh()?;
        ip(&ns, "link add wire0 type veth peer name wire1")?;
        ip(&ns, "addr add 192.0.2.9/24 dev wire0")?;
        ip(&ns, "addr add 2001:db8::9/64 dev wire0 nodad")?;
        ip(&ns, "link set wire0 up")?;
        ip(&ns, "link set wire1 up")?;
        ip(&ns, "route add 239.0.0.0/8 dev wire0")?;
        Host::guarded(ns, is_guarded, self.place())
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        let _gone = run("umount", &self.0.path().display().to_string());
    }
}

/// `n8n` is a cgroup, the rest of the host a component, too.
fn mesh(n8n: &Group) -> Mesh {
    shared_host(&n8n.attachment(), "user:2002", "host")
}

/// Does the same on a host without and on one with a guard: n8n is in the cgroup, and somebody else is not.
fn on_both(mut act: impl FnMut(&Host, bool, &mut Person, &mut Person) -> Outcome) -> Outcome {
    let programs = Programs::new()?;
    for is_guarded in [false, true] {
        let group = Group::new("n8n")?;
        let mut host = programs.host(is_guarded)?;
        host.apply(&mesh(&group))?;
        let (mut n8n, mut rogue) = (host.person_in(0, &group)?, host.person(2003)?);
        act(&host, is_guarded, &mut n8n, &mut rogue)?;
    }
    Ok(())
}

#[test]
fn on_guarded_loopback_a_cgroup_is_reached_by_itself_alone() -> Outcome {
    let (n8n_group, db_group) = (Group::new("n8n")?, Group::new("db")?);
    let mesh = shared_host(&n8n_group.attachment(), &db_group.attachment(), "host");
    let programs = Programs::new()?;
    for guarded in [false, true] {
        let mut one = programs.host(guarded)?;
        one.apply(&mesh)?;
        let (mut n8n, mut db) = (one.person_in(0, &n8n_group)?, one.person_in(2002, &db_group)?);
        let (mut other, mut root) = (one.person(2003)?, one.person(0)?);
        n8n.listens("[::]:5678".parse()?)?;
        db.listens("[::]:5680".parse()?)?;
        other.listens("[::]:5690".parse()?)?;
        n8n.answers_datagrams("[::]:5678".parse()?)?;
        other.answers_datagrams("[::]:5690".parse()?)?;
        for local in [IpAddr::from([127, 0, 0, 1]), "::1".parse()?] {
            let to = |port| at(local, port);
            // Itself, and those whom nobody claims, everybody reaches as ever; what is asked is answered.
            assert_eq!(n8n.connects(to(5678), None)?, Ok(local), "n8n itself");
            assert_eq!(n8n.asks(to(5678), None)?, Ok(local), "n8n itself, by datagram");
            assert_eq!(db.connects(to(5680), None)?, Ok(local), "the database itself");
            for person in [&mut n8n, &mut db, &mut root] {
                assert_eq!(person.connects(to(5690), None)?, Ok(local), "who is nobody's");
                assert_eq!(person.asks(to(5690), None)?, Ok(local), "who is nobody's, by datagram");
            }
            for (who, reached) in [
                ("the database, n8n", db.connects(to(5678), None)?),
                ("the rest, n8n", other.connects(to(5678), None)?),
                ("root, n8n", root.connects(to(5678), None)?),
                ("the rest, n8n by datagram", other.asks(to(5678), None)?),
                ("n8n, the database", n8n.connects(to(5680), None)?),
                ("root, the database", root.connects(to(5680), None)?),
            ] {
                assert_eq!(reached.is_err(), guarded, "{who}: {reached:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn the_rest_of_an_older_stream_leads_to_no_listener() -> Outcome {
    on_both(|host, is_guarded, n8n, rogue| {
        // Words in the first segment are taken by all listeners, from everybody.
        inside(&host.ns, || run("sysctl", "-qw net.ipv4.tcp_fastopen=1543"))?;
        for (how, port) in [("plain", 5678), ("mptcp", 5679)] {
            let server = at(LOCAL, port);
            n8n.dismisses(how, server)?;
            for (hurry, own) in [(false, 40_123), (true, 40_124)] {
                let own = at(LOCAL, own);
                assert_eq!(n8n.greeted_from(server, own)?, Ok(LOCAL), "{how}: n8n itself");
                let before = n8n.taken()?;
                let greeted = if hurry {
                    rogue.hurries_from(server, own)?
                } else {
                    rogue.greeted_from(server, own)?
                };
                assert_eq!(greeted.is_err(), is_guarded, "{how}, {hurry}: {greeted:?}");
                assert_eq!(n8n.taken()? == before, is_guarded, "{how}, {hurry}: a stream was taken");
            }
        }
        Ok(())
    })
}

#[test]
fn a_listener_that_keeps_no_state_hears_its_own_alone() -> Outcome {
    on_both(|host, is_guarded, n8n, rogue| {
        // Cookies for each SYN (RFC 4987 section 3.6): the listener gets no more than the last segment of a handshake.
        inside(&host.ns, || run("sysctl", "-qw net.ipv4.tcp_syncookies=2"))?;
        for how in ["plain", "mptcp"] {
            let server = at(LOCAL, if how == "plain" { 5678 } else { 5679 });
            n8n.dismisses(how, server)?;
            assert_eq!(n8n.greeted_from(server, at(LOCAL, 0))?, Ok(LOCAL), "{how}: n8n itself");
            let greeted = rogue.greeted_from(server, at(LOCAL, 0))?;
            assert_eq!(greeted.is_err(), is_guarded, "{how}: {greeted:?}");
        }
        Ok(())
    })
}

#[test]
fn a_datagram_gets_to_no_socket_by_an_interface_a_shared_port_a_group_or_another_protocol() -> Outcome {
    on_both(|_, is_guarded, n8n, rogue| {
        let (other, group): (IpAddr, IpAddr) = ([192, 0, 2, 9].into(), [239, 1, 1, 1].into());
        let any = IpAddr::from([0; 4]);
        for (server, bound_to, asks, to, port) in [
            ("plain", any, "plain", LOCAL, 6001),
            ("plain", any, "plain", other, 6002),
            ("lite", any, "lite", LOCAL, 6003),
            ("bound:wire0", any, "bound:wire0", other, 6004),
            ("shared", any, "shadowed:bound:wire0", other, 6005),
            ("joined:192.0.2.9", group, "bound:wire0", group, 6006),
        ] {
            n8n.answers_by(server, at(bound_to, port))?;
            let own = asks.trim_start_matches("shadowed:");
            let itself = n8n.asks_by(own, at(to, port), None)?;
            assert!(itself.is_ok(), "{server} by {own}: n8n itself: {itself:?}");
            let answered = rogue.asks_by(asks, at(to, port), None)?;
            assert_eq!(answered.is_err(), is_guarded, "{server} by {asks}: {answered:?}");
        }
        Ok(())
    })
}

#[test]
fn a_datagram_is_an_answer_only_to_the_socket_that_asked() -> Outcome {
    on_both(|host, is_guarded, n8n, rogue| {
        let mut root = host.person(0)?;
        // Whom n8n asks answers, whatever the socket.
        for local in [LOCAL, "::1".parse()?] {
            for (how, port) in [("plain", 5300), ("lite", 5301)] {
                rogue.answers_by(how, at(local, port))?;
                assert_eq!(n8n.asks_by(how, at(local, port), None)?, Ok(local), "{how}");
            }
        }
        // But it is none of n8n's other sockets' business: they are not reached from the port that was asked, nor from that of a name server, nor
        // with n8n's mark, which is taken from whoever is not n8n.
        let mark = mark(shared_host("host", "host", "host").address("n8n")?);
        let server = at(LOCAL, 5678);
        n8n.answers_by("plain", server)?;
        for from in ["plain@5302", "plain@53", &format!("marked:{mark}")] {
            let answered = root.asks_by(from, server, None)?;
            assert_eq!(answered.is_err(), is_guarded, "{from}: {answered:?}");
        }
        rogue.answers_by("plain", at(Ipv4Addr::new(127, 0, 0, 2).into(), 5303))?;
        let _answer = n8n.asks_by("plain", at(Ipv4Addr::new(127, 0, 0, 2).into(), 5303), None)?;
        let answered = rogue.asks_by("plain@5303", server, Some(LOCAL))?;
        assert_eq!(answered.is_err(), is_guarded, "{answered:?}");
        // A datagram that seems to answer one of n8n's, whose address the rogue wrote on the first of the two.
        let answered = rogue.forges_a_question_and_answers(server)?;
        assert_eq!(answered.is_err(), is_guarded, "by a forged question: {answered:?}");
        Ok(())
    })
}

#[test]
fn the_answers_of_a_server_open_no_port_to_it() -> Outcome {
    on_both(|_, is_guarded, n8n, rogue| {
        for (how, port) in [("plain", 5678), ("lite", 5679)] {
            let server = at(LOCAL, port);
            n8n.answers_by(how, server)?;
            assert!(n8n.asks_by(&format!("{how}@7001"), server, None)?.is_ok(), "{how}: n8n itself");
            let answered = rogue.asks_by(&format!("{how}@7001"), server, None)?;
            assert_eq!(answered.is_err(), is_guarded, "{how}: {answered:?}");
        }
        Ok(())
    })
}

#[test]
fn a_socket_for_each_client_is_reached_by_that_client_alone() -> Outcome {
    on_both(|_, is_guarded, n8n, rogue| {
        let server = at(LOCAL, 5678);
        n8n.answers_by("child", server)?;
        assert!(n8n.asks_by("plain@7003", server, None)?.is_ok(), "n8n itself");
        // The client is gone, and its port is somebody else's.
        let _no_answer = rogue.asks_by("plain@7003", server, None)?;
        assert_eq!(n8n.taken()?, u32::from(!is_guarded), "by the port of a client that is gone");
        Ok(())
    })
}

#[test]
fn a_component_cannot_have_the_questions_of_another_forgotten() -> Outcome {
    let programs = Programs::new()?;
    let (group, other) = (Group::new("n8n")?, Group::new("other")?);
    let mut host = programs.host(true)?;
    host.apply(&shared_host(&group.attachment(), &other.attachment(), "host"))?;
    let (mut n8n, mut flooder, mut resolver) = (host.person_in(0, &group)?, host.person_in(2003, &other)?, host.person(2004)?);
    resolver.answers_by("late", at(LOCAL, 5300))?;
    let answered = std::thread::scope(|scope| {
        let asking = scope.spawn(|| n8n.asks_by("plain", at(LOCAL, 5300), None));
        // The question is out.
        std::thread::sleep(SILENCE / 10);
        flooder.floods(at(LOCAL, 20_000))?;
        asking.join().map_err(|_| "the question panicked")?
    });
    assert_eq!(answered?, Ok(LOCAL));
    Ok(())
}

#[test]
fn who_was_a_component_is_it_no_longer() -> Outcome {
    let programs = Programs::new()?;
    for is_guarded in [false, true] {
        let (former, now) = (Group::new("former")?, Group::new("now")?);
        let mut host = programs.host(is_guarded)?;
        host.apply(&mesh(&former))?;
        let (mut rogue, mut n8n, mut root) = (host.person_in(2003, &former)?, host.person_in(0, &now)?, host.person(0)?);
        host.apply(&mesh(&now))?;
        let (group, server) = (at([239, 1, 1, 1].into(), 6006), at(LOCAL, 5678));
        n8n.answers_by("joined:192.0.2.9", group)?;
        n8n.listens(server)?;
        assert!(n8n.asks_by("plain", group, None)?.is_ok(), "n8n itself");
        let answered = rogue.asks_by("plain", group, None)?;
        assert_eq!(answered.is_err(), is_guarded, "by a group: {answered:?}");
        // What was made before keeps its mark, which is nobody's word any more.
        let mark = mark(mesh(&now).address("n8n")?);
        let answered = root.asks_by(&format!("marked:{mark}"), group, None)?;
        assert_eq!(answered.is_err(), is_guarded, "by a group with a mark: {answered:?}");
        let ns = open(&host.ns)?;
        drop(host);
        inside(&ns, || run("nft", "delete table inet cloison_test"))?;
        let reached = rogue.connects(server, None)?;
        assert_eq!(reached.is_err(), is_guarded, "without agent and base table: {reached:?}");
    }
    Ok(())
}

#[test]
fn what_an_agent_of_another_version_has_left_is_ended() -> Outcome {
    let programs = Programs::new()?;
    let (group, other) = (Group::new("n8n")?, Group::new("other")?);
    for is_guarded in [true, false] {
        let mut host = programs.host(true)?;
        host.apply(&mesh(&group))?;
        let ns = open(&host.ns)?;
        let (mut n8n, mut rogue) = (host.person_in(0, &group)?, host.person(2003)?);
        n8n.listens(at(LOCAL, 5678))?;
        drop(host);
        let folder = programs.place().join("cloison");
        std::fs::rename(folder.join("guard-1"), folder.join("guard-0"))?;
        let mut host = Host::guarded(ns, is_guarded, programs.place())?;
        host.apply(&mesh(&other))?;
        assert_eq!(
            reached(&mut n8n, &mut rogue)?,
            (true, true),
            "as no component, guarded: {is_guarded}"
        );
        assert_eq!(
            folder.join("guard-0").exists(),
            !is_guarded,
            "emptied at once, and taken away by the next"
        );
    }
    Ok(())
}

#[test]
fn a_host_that_leaves_guards_nobody_and_leaves_nothing_behind() -> Outcome {
    let programs = Programs::new()?;
    let group = Group::new("n8n")?;
    let mut host = programs.host(true)?;
    host.apply(&mesh(&group))?;
    let ns = open(&host.ns)?;
    let (mut n8n, mut rogue) = (host.person_in(0, &group)?, host.person(2003)?);
    n8n.listens(at(LOCAL, 5678))?;
    assert_eq!(reached(&mut n8n, &mut rogue)?, (false, true));
    drop(host);
    let config = Config {
        loopback_guard: true,
        guard_place: programs.place().to_owned(),
        ..config()?
    };
    inside(&ns, || Ok(dataplane::leave(&config, range()?, Some(&mesh(&group).view(1)?))?))?;
    assert_eq!(reached(&mut n8n, &mut rogue)?, (true, true));
    assert!(!programs.place().join("cloison").exists(), "programs are left");
    Ok(())
}

#[test]
fn nobody_is_taken_for_a_peer_on_another_host() -> Outcome {
    on_both(|_, is_guarded, n8n, rogue| {
        let (peer, own): (IpAddr, IpAddr) = ("2001:db8::53".parse()?, "2001:db8::9".parse()?);
        n8n.waits_for(7002, at(peer, 3478))?;
        let _no_answer = rogue.asks_by("foreign@3478", at(own, 7002), Some(peer))?;
        assert_eq!(n8n.taken()?, u32::from(!is_guarded), "a forged datagram");
        Ok(())
    })
}

#[test]
fn a_raw_socket_overhears_nobody_else() -> Outcome {
    on_both(|_, is_guarded, n8n, rogue| {
        rogue.answers_by("plain", at(LOCAL, 5300))?;
        rogue.listens(at(LOCAL, 5301))?;
        for protocol in [6, 17] {
            n8n.overhears(protocol, LOCAL)?;
        }
        assert_eq!(rogue.asks_by("plain", at(LOCAL, 5300), None)?, Ok(LOCAL));
        assert_eq!(rogue.connects(at(LOCAL, 5301), None)?, Ok(LOCAL));
        assert_eq!(n8n.taken()? == 0, is_guarded, "what others say was overheard");
        Ok(())
    })
}

#[test]
fn a_listener_that_outlives_its_cgroup_is_reached_by_nobody_else() -> Outcome {
    let programs = Programs::new()?;
    for is_guarded in [false, true] {
        let (mut group, elsewhere) = (Group::new("n8n")?, Group::new("elsewhere")?);
        let mut host = programs.host(is_guarded)?;
        host.apply(&mesh(&group))?;
        let (mut n8n, mut rogue) = (host.person_in(0, &group)?, host.person(2003)?);
        // One that nftables does not find.
        let server = at([192, 0, 2, 9].into(), 5678);
        n8n.dismisses("bound:wire0", server)?;
        n8n.moves_to(&elsewhere)?;
        group.remake()?;
        host.dataplane.check();
        let greeted = rogue.greeted_by("wire0", server)?;
        assert_eq!(greeted.is_err(), is_guarded, "{greeted:?}");
    }
    Ok(())
}

#[test]
fn programs_are_pinned_as_a_whole_and_where_nobody_else_writes() -> Outcome {
    let programs = Programs::new()?;
    let mut group = Group::new("n8n")?;
    let mut host = programs.host(true)?;
    host.apply(&mesh(&group))?;
    for pin in ["homes", "talks", "asks", "hears"] {
        std::fs::remove_file(programs.place().join("cloison/guard-1").join(pin))?;
        let ns = open(&host.ns)?;
        drop(host);
        group.remake()?;
        host = Host::guarded(ns, true, programs.place())?;
        host.apply(&mesh(&group))?;
        let (mut n8n, mut rogue) = (host.person_in(0, &group)?, host.person(2003)?);
        n8n.listens(at(LOCAL, 5678))?;
        assert_eq!(reached(&mut n8n, &mut rogue)?, (false, true), "without {pin}");
    }
    drop(host);
    for (owner, mode) in [(2003, 0o700), (0, 0o777)] {
        let programs = Programs::new()?;
        let folder = programs.place().join("cloison");
        std::fs::create_dir(&folder)?;
        std::os::unix::fs::chown(&folder, Some(owner), None)?;
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(mode))?;
        let mut host = programs.host(true)?;
        host.apply(&mesh(&group))?;
        let report = host.dataplane.report().get("n8n").cloned();
        let said = format!("{} is not root's alone", folder.display());
        assert!(
            matches!(&report, Some(Enforcement::Unenforced(why)) if why.contains(&said)),
            "{owner} {mode:o}: {report:?}"
        );
    }
    Ok(())
}

#[test]
fn where_listeners_leave_their_streams_to_each_other_nobody_is_guarded() -> Outcome {
    let programs = Programs::new()?;
    let ns = fresh()?;
    let opens = |migrates: u8| {
        inside(&ns, || {
            run("sysctl", &format!("-qw net.ipv4.tcp_migrate_req={migrates}"))?;
            Ok(Guard::open(programs.place()).map(drop))
        })
    };
    assert!(matches!(opens(1)?, Err(GuardError::Migrates)));
    assert!(opens(0)?.is_ok());
    Ok(())
}

#[test]
fn who_is_in_a_cgroup_around_a_claimed_one_is_nobody_s() -> Outcome {
    let programs = Programs::new()?;
    let around = Group::new("around")?;
    let inner = around.below("n8n")?;
    let mut host = programs.host(true)?;
    host.apply(&mesh(&inner))?;
    let (mut n8n, mut nobody, mut rogue) = (host.person_in(0, &inner)?, host.person_in(2004, &around)?, host.person(2003)?);
    serves(&mut n8n, 5678)?;
    serves(&mut nobody, 5679)?;
    for (port, is_reached) in [(5678, false), (5679, true)] {
        assert_eq!(reaches(&mut rogue, port)?, [is_reached; 2], "{port}");
    }
    Ok(())
}

/// Serves at a port, by stream and by datagram.
fn serves(person: &mut Person, port: u16) -> Outcome {
    person.listens(at(LOCAL, port))?;
    person.answers_datagrams(at(LOCAL, port))
}

/// Whether somebody is served at a port, by stream and by datagram.
fn reaches(person: &mut Person, port: u16) -> Outcome<[bool; 2]> {
    let to = at(LOCAL, port);
    Ok([person.connects(to, None)?.is_ok(), person.asks(to, None)?.is_ok()])
}

/// Whether the rogue is greeted by n8n at port 5678, and n8n by itself.
fn reached(n8n: &mut Person, rogue: &mut Person) -> Outcome<(bool, bool)> {
    let server = at(LOCAL, 5678);
    Ok((rogue.connects(server, None)?.is_ok(), n8n.connects(server, None)?.is_ok()))
}

fn open(ns: &NetNs) -> Outcome<NetNs> {
    inside(ns, || Ok(NetNs::current()?))
}

#[test]
fn who_is_guarded_stays_so_without_an_agent_and_with_the_next_one_until_it_is_told_otherwise() -> Outcome {
    let programs = Programs::new()?;
    let (group, other) = (Group::new("n8n")?, Group::new("other")?);
    let mut host = programs.host(true)?;
    host.apply(&mesh(&group))?;
    let ns = open(&host.ns)?;
    let (mut n8n, mut rogue) = (host.person_in(0, &group)?, host.person(2003)?);
    n8n.listens(at(LOCAL, 5678))?;
    assert_eq!(reached(&mut n8n, &mut rogue)?, (false, true));
    for round in 0..70 {
        // One after the other, as often as there is no room for programs that pile up (64).
        drop(host);
        if round == 0 {
            // Also without the base table: what the programs know is theirs, and the marks are the sockets'.
            inside(&ns, || run("nft", "delete table inet cloison_test"))?;
            assert_eq!(reached(&mut n8n, &mut rogue)?, (false, true), "without an agent");
        }
        host = Host::guarded(open(&ns)?, true, programs.place())?;
        host.apply(&mesh(&group))?;
        let report = host.dataplane.report().get("n8n");
        assert!(matches!(report, Some(Enforcement::Bound(_))), "{report:?}");
    }
    assert_eq!(reached(&mut n8n, &mut rogue)?, (false, true), "with the next agent");
    // It is another component now, and still reaches itself.
    let mut renamed = mesh(&group);
    let n8n_at = renamed.address("n8n")?;
    renamed.components.insert(
        0,
        Component {
            name: "a",
            host: 1,
            attachment: other.attachment(),
        },
    );
    assert_ne!(renamed.address("n8n")?, n8n_at, "its address is to change, and its mark");
    host.apply(&renamed)?;
    assert_eq!(reached(&mut n8n, &mut rogue)?, (false, true), "as another component");
    // It is nobody's.
    host.apply(&mesh(&other))?;
    assert_eq!(reached(&mut n8n, &mut rogue)?, (true, true), "as no component");
    host.apply(&mesh(&group))?;
    assert_eq!(reached(&mut n8n, &mut rogue)?, (false, true), "as a component again");
    // Nobody is to be guarded.
    drop(host);
    let mut host = Host::guarded(open(&ns)?, false, programs.place())?;
    host.apply(&mesh(&group))?;
    assert_eq!(reached(&mut n8n, &mut rogue)?, (true, true), "unguarded");
    drop(host);
    let mut host = Host::guarded(open(&ns)?, true, programs.place())?;
    host.apply(&mesh(&group))?;
    assert_eq!(reached(&mut n8n, &mut rogue)?, (false, true), "guarded again");
    Ok(())
}

#[test]
fn who_starts_while_there_is_no_agent_is_reached_by_nobody_until_there_is_one() -> Outcome {
    let programs = Programs::new()?;
    let mut group = Group::new("n8n")?;
    let mut host = programs.host(true)?;
    host.apply(&mesh(&group))?;
    let ns = open(&host.ns)?;
    drop(host);
    group.remake()?;
    let late = Group::new("late")?;
    // Without a view, a data plane does nothing.
    let mut host = Host::guarded(ns, true, programs.place())?;
    let (mut n8n, mut nobody, mut rogue) = (host.person_in(0, &group)?, host.person_in(2004, &late)?, host.person(2003)?);
    serves(&mut n8n, 5678)?;
    serves(&mut nobody, 5679)?;
    let mut all =
        |n8n: &mut Person| -> Outcome<[[bool; 2]; 3]> { Ok([reaches(&mut rogue, 5678)?, reaches(n8n, 5678)?, reaches(&mut rogue, 5679)?]) };
    assert_eq!(all(&mut n8n)?, [[false; 2]; 3], "nobody is known");
    host.apply(&mesh(&group))?;
    assert_eq!(all(&mut n8n)?, [[false; 2], [true; 2], [true; 2]], "n8n is, and who is nobody's");
    Ok(())
}

#[test]
fn a_cgroup_that_the_programs_do_not_get_to_is_refused_and_says_why() -> Outcome {
    let programs = Programs::new()?;
    let group = Group::new("n8n")?;
    // A program that stands no other beside it, and lets everything pass.
    let mut code = Code::default();
    code.set(Register::R0, 1);
    code.exit();
    let directory = std::fs::File::open(group.place())?;
    Program::load("alone", Hook::Received, &code)?.attach_alone(directory.as_fd())?;
    let mut host = programs.host(true)?;
    host.apply(&mesh(&group))?;
    let (mut n8n, mut rogue) = (host.person_in(0, &group)?, host.person(2003)?);
    serves(&mut n8n, 5678)?;
    assert_eq!(reaches(&mut rogue, 5678)?, [false; 2]);
    assert_eq!(reaches(&mut n8n, 5678)?, [false; 2], "nobody knows who it is");
    host.dataplane.check();
    let report = host.dataplane.report().get("n8n");
    assert!(
        matches!(report, Some(Enforcement::Bound(by)) if by.contains("which is refused, because its loopback cannot be guarded")),
        "{report:?}"
    );
    // As soon as they get there, it is guarded like any other.
    bpf::detach_any(Hook::Received, directory.as_fd())?;
    host.dataplane.check();
    assert_eq!(reaches(&mut rogue, 5678)?, [false; 2]);
    assert_eq!(reaches(&mut n8n, 5678)?, [true; 2]);
    Ok(())
}

#[test]
fn who_is_guarded_stays_so_while_the_kernel_fails_the_trial() -> Outcome {
    let programs = Programs::new()?;
    let group = Group::new("n8n")?;
    let mut host = programs.host(true)?;
    host.apply(&mesh(&group))?;
    let ns = open(&host.ns)?;
    let (mut n8n, mut rogue) = (host.person_in(0, &group)?, host.person(2003)?);
    n8n.listens(at(LOCAL, 5678))?;
    drop(host);
    // The next agent cannot tell cgroups from each other, as far as it can see.
    let refuses = "table inet other { chain output { type filter hook output priority 0; oifname lo udp dport != 0 drop; }; }";
    inside(&ns, || run("nft", &format!("add {refuses}")))?;
    let mut host = Host::guarded(ns, true, programs.place())?;
    host.apply(&mesh(&group))?;
    let report = host.dataplane.report().get("n8n");
    assert!(matches!(report, Some(Enforcement::Unenforced(_))), "{report:?}");
    assert_eq!(reached(&mut n8n, &mut rogue)?, (false, true));
    inside(&host.ns, || run("nft", "delete table inet other"))?;
    host.dataplane.check();
    let report = host.dataplane.report().get("n8n");
    assert!(matches!(report, Some(Enforcement::Bound(_))), "{report:?}");
    assert_eq!(reached(&mut n8n, &mut rogue)?, (false, true));
    Ok(())
}

#[test]
fn a_claim_inside_of_another_is_reached_by_itself_alone() -> Outcome {
    let programs = Programs::new()?;
    let outer = Group::new("outer")?;
    let inner = outer.below("inner")?;
    let mut host = programs.host(true)?;
    host.apply(&shared_host(&outer.attachment(), &inner.attachment(), "host"))?;
    let (mut within, mut around, mut rogue) = (host.person_in(0, &inner)?, host.person_in(0, &outer)?, host.person(2003)?);
    serves(&mut within, 5678)?;
    serves(&mut around, 5679)?;
    for (who, all) in [
        (&mut within, [true, false]),
        (&mut around, [false, true]),
        (&mut rogue, [false, false]),
    ] {
        for (port, reached) in [5678, 5679].into_iter().zip(all) {
            assert_eq!(reaches(who, port)?, [reached; 2], "{port}");
        }
    }
    Ok(())
}

#[test]
fn who_cannot_be_guarded_is_not_enforced_and_says_why() -> Outcome {
    let group = Group::new("n8n")?;
    let nowhere = tempfile::tempdir()?;
    let mut host = Host::guarded(fresh()?, true, nowhere.path())?;
    host.apply(&mesh(&group))?;
    let Some(Enforcement::Unenforced(why)) = host.dataplane.report().get("n8n").cloned() else {
        return Err("enforced without a guard".into());
    };
    assert!(
        why.contains("loopback cannot be guarded") && why.contains(&nowhere.path().display().to_string()),
        "{why}"
    );
    // As soon as there is a place for it, it is.
    run("mount", &format!("-t bpf bpf {}", nowhere.path().display()))?;
    host.dataplane.check();
    run("umount", &nowhere.path().display().to_string())?;
    assert!(matches!(host.dataplane.report().get("n8n"), Some(Enforcement::Bound(_))));
    Ok(())
}
