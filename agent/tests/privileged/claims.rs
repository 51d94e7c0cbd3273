//! Components that share a host's namespace: real sockets of processes with users and cgroups of their own.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cloison_agent::attach::cgroups::Tree;
use cloison_agent::attach::selftest::{Trial, TrialError};
use cloison_agent::dataplane::Enforcement;
use cloison_agent::sys::netns::NetNs;
use cloison_proto::verdict::DropReason;

use crate::mesh::{Component, Host, Mesh, apply, two_hosts};
use crate::person::Group;
use crate::{Outcome, inside, ip, run};

/// `n8n` and `worker` share host 1 with the rest of it; `postgres` is on host 2. Only n8n may reach it.
pub(crate) fn shared_host(n8n: &str, worker: &str, postgres: &str) -> Mesh {
    let component = |name, host, attachment: &str| Component {
        name,
        host,
        attachment: attachment.into(),
    };
    Mesh {
        components: vec![
            component("n8n", 1, n8n),
            component("postgres", 2, postgres),
            component("rest", 1, "host"),
            component("worker", 1, worker),
        ],
        rules: vec![
            ("n8n", "postgres", "tcp/5432"),
            ("n8n", "postgres", "udp/5432"),
            ("worker", "n8n", "tcp/5678"),
        ],
    }
}

pub(crate) fn at(address: IpAddr, port: u16) -> SocketAddr {
    (address, port).into()
}

#[test]
fn a_user_s_processes_have_its_component_s_addresses_and_nobody_else_has_them() -> Outcome {
    let mesh = shared_host("user:2001", "user:2002", "host");
    let [one, two] = two_hosts(&mesh)?;
    assert_eq!(
        one.dataplane.report().get("n8n"),
        Some(&Enforcement::Bound("user:2001, number 2001".into()))
    );
    let (mut n8n, mut worker, mut other) = (one.person(2001)?, one.person(2002)?, one.person(2003)?);
    for (n8n_at, postgres) in mesh.address("n8n")?.both().into_iter().zip(mesh.address("postgres")?.both()) {
        let mut server = two.person(2003)?;
        server.listens(at(postgres, 5432))?;
        assert_eq!(n8n.connects(at(postgres, 5432), None)?, Ok(n8n_at), "its source is its component's");
        let _ = worker.connects(at(postgres, 5432), None)?.err().ok_or("worker has no rule")?;
        let _ = other.connects(at(postgres, 5432), None)?.err().ok_or("the rest has no rule")?;
        for rogue in [&mut worker, &mut other] {
            let refused = rogue
                .connects(at(postgres, 5432), Some(n8n_at))?
                .err()
                .ok_or("a foreign source passed")?;
            assert!(
                !refused.contains("Refused"),
                "the kernel refuses before anybody sees a packet: {refused}"
            );
        }
        server.answers_datagrams(at(postgres, 5432))?;
        assert_eq!(n8n.asks(at(postgres, 5432), None)?, Ok(n8n_at));
        let _ = other
            .asks(at(postgres, 5432), Some(n8n_at))?
            .err()
            .ok_or("a foreign datagram passed")?;
    }
    Ok(())
}

#[test]
fn a_cgroup_s_processes_have_its_component_s_addresses_and_nobody_else_has_them() -> Outcome {
    let (n8n_group, worker_group, other_group) = (Group::new("n8n")?, Group::new("worker")?, Group::new("other")?);
    let mesh = shared_host(&n8n_group.attachment(), &worker_group.attachment(), "host");
    let [one, two] = two_hosts(&mesh)?;
    let (mut n8n, mut worker) = (one.person_in(0, &n8n_group)?, one.person_in(0, &worker_group)?);
    let mut other = one.person_in(0, &other_group)?;
    let mut rootless = one.person(2003)?;
    for (n8n_at, postgres) in mesh.address("n8n")?.both().into_iter().zip(mesh.address("postgres")?.both()) {
        let mut server = two.person(2003)?;
        server.listens(at(postgres, 5432))?;
        assert_eq!(n8n.connects(at(postgres, 5432), None)?, Ok(n8n_at), "its source is its component's");
        let _ = worker.connects(at(postgres, 5432), None)?.err().ok_or("worker has no rule")?;
        for rogue in [&mut worker, &mut other, &mut rootless] {
            let refused = rogue
                .connects(at(postgres, 5432), Some(n8n_at))?
                .err()
                .ok_or("a foreign source passed")?;
            assert!(
                !refused.contains("Refused"),
                "the kernel refuses before anybody sees a packet: {refused}"
            );
        }
        server.answers_datagrams(at(postgres, 5432))?;
        assert_eq!(n8n.asks(at(postgres, 5432), None)?, Ok(n8n_at));
        let _ = other
            .asks(at(postgres, 5432), Some(n8n_at))?
            .err()
            .ok_or("a foreign datagram passed")?;
    }
    Ok(())
}

#[test]
fn components_of_one_host_reach_each_other_by_their_rules_alone() -> Outcome {
    let (n8n_group, worker_group) = (Group::new("n8n")?, Group::new("worker")?);
    let mesh = shared_host(&n8n_group.attachment(), &worker_group.attachment(), "host");
    let [one, _two] = two_hosts(&mesh)?;
    let (mut n8n, mut worker, mut other) = (one.person_in(0, &n8n_group)?, one.person_in(0, &worker_group)?, one.person(2003)?);
    n8n.listens("0.0.0.0:5678".parse()?)?;
    n8n.listens("[::]:5679".parse()?)?;
    worker.listens("[::]:5680".parse()?)?;
    for (n8n_at, worker_at) in mesh.address("n8n")?.both().into_iter().zip(mesh.address("worker")?.both()) {
        let port = if n8n_at.is_ipv4() { 5678 } else { 5679 };
        if n8n_at.is_ipv4() {
            assert_eq!(worker.connects(at(n8n_at, port), None)?, Ok(worker_at));
        }
        let denied = other.connects(at(n8n_at, port), None)?.err().ok_or("no rule, and it passed")?;
        assert!(denied.contains("Refused"), "{denied}");
        let _ = n8n.connects(at(worker_at, 5680), None)?.err().ok_or("the reverse of a rule")?;
        assert_eq!(n8n.connects(at(n8n_at, port), None)?, Ok(n8n_at), "itself it always reaches");
    }
    let rest = mesh.address("rest")?.v4.into();
    let _ = worker.connects(at(rest, 5680), None)?.err().ok_or("no rule leads to the rest")?;
    Ok(())
}

#[test]
fn what_is_meant_for_the_rest_is_not_heard_by_a_user_who_listens_on_all_addresses() -> Outcome {
    let mesh = Mesh {
        components: vec![
            Component {
                name: "ops",
                host: 2,
                attachment: "host".into(),
            },
            Component {
                name: "rest",
                host: 1,
                attachment: "host".into(),
            },
            Component {
                name: "worker",
                host: 1,
                attachment: "user:2002".into(),
            },
        ],
        rules: vec![
            ("ops", "rest", "udp/5140"),
            ("ops", "rest", "tcp/5140"),
            ("ops", "worker", "udp/5140"),
        ],
    };
    let [one, two] = two_hosts(&mesh)?;
    let (mut worker, mut ops) = (one.person(2002)?, two.person(0)?);
    worker.answers_datagrams("[::]:5140".parse()?)?;
    for (rest, worker_at) in mesh.address("rest")?.both().into_iter().zip(mesh.address("worker")?.both()) {
        let heard = ops.asks(at(worker_at, 5140), None)?;
        assert!(heard.is_ok(), "its own it hears: {heard:?}");
        let heard = ops.asks(at(rest, 5140), None)?;
        assert!(heard.is_err(), "the rest's it must not: {heard:?}");
    }
    worker.listens("[::]:5140".parse()?)?;
    for rest in mesh.address("rest")?.both() {
        let _ = ops
            .connects(at(rest, 5140), None)?
            .err()
            .ok_or("the worker took the rest's stream")?;
    }
    Ok(())
}

#[test]
fn who_takes_a_component_s_port_first_gets_nothing() -> Outcome {
    let (n8n_group, postgres_group) = (Group::new("n8n")?, Group::new("postgres")?);
    let mesh = shared_host(&n8n_group.attachment(), "user:2002", &postgres_group.attachment());
    let [one, two] = two_hosts(&mesh)?;
    let mut n8n = one.person_in(0, &n8n_group)?;
    for postgres in mesh.address("postgres")?.both() {
        let mut rogue = two.person(2009)?;
        rogue.listens(at(postgres, 5432))?;
        rogue.answers_datagrams(at(postgres, 5432))?;
        let _ = n8n.connects(at(postgres, 5432), None)?.err().ok_or("the rogue was reached")?;
        let _ = n8n.asks(at(postgres, 5432), None)?.err().ok_or("the rogue answered")?;
        drop(rogue);
        let mut server = two.person_in(0, &postgres_group)?;
        server.listens(at(postgres, 5432))?;
        assert!(n8n.connects(at(postgres, 5432), None)?.is_ok());
    }
    Ok(())
}

#[test]
fn a_cgroup_that_is_made_anew_is_bound_again_and_one_that_is_unknown_is_nobody() -> Outcome {
    let mut group = Group::new("n8n")?;
    let mesh = shared_host(&group.attachment(), "user:2002", "host");
    let mut hosts = two_hosts(&mesh)?;
    let postgres = mesh.address("postgres")?.v4.into();
    let n8n_at = mesh.address("n8n")?.v4.into();
    let mut server = hosts[1].person(0)?;
    server.listens(at(postgres, 5432))?;
    for round in 0..3 {
        let mut n8n = hosts[0].person_in(0, &group)?;
        // A socket that is made before the agent has seen the cgroup is nobody's for ever; the next one is bound.
        let mut attempts = Vec::new();
        while attempts.len() < 5 && attempts.last() != Some(&Ok(n8n_at)) {
            attempts.push(n8n.connects(at(postgres, 5432), None)?);
        }
        let is_closed = hosts[0].dataplane.owners().load().closed;
        assert_eq!(
            attempts.last(),
            Some(&Ok(n8n_at)),
            "round {round}, closed: {is_closed}: {attempts:?}"
        );
        drop(n8n);
        group.remake()?;
    }
    // Applying the same view again changes nothing for those who run.
    let mut n8n = hosts[0].person_in(0, &group)?;
    apply(&mut hosts, &mesh)?;
    assert_eq!(n8n.connects(at(postgres, 5432), None)?, Ok(n8n_at));
    Ok(())
}

#[test]
fn who_is_in_a_cgroup_around_a_claimed_one_is_of_the_rest() -> Outcome {
    let around = Group::new("around")?;
    let inner = around.below("n8n")?;
    let mut mesh = shared_host(&inner.attachment(), "user:2002", "host");
    mesh.rules
        .extend([("rest", "postgres", "tcp/5432"), ("postgres", "rest", "tcp/5140")]);
    let [one, two] = two_hosts(&mesh)?;
    let (mut nobody, mut n8n, mut postgres) = (one.person_in(2004, &around)?, one.person_in(0, &inner)?, two.person(0)?);
    let n8n_at = mesh.address("n8n")?.both();
    for (n, (rest, at_postgres)) in mesh
        .address("rest")?
        .both()
        .into_iter()
        .zip(mesh.address("postgres")?.both())
        .enumerate()
    {
        postgres.listens(at(at_postgres, 5432))?;
        assert_eq!(nobody.connects(at(at_postgres, 5432), None)?, Ok(rest));
        assert_eq!(n8n.connects(at(at_postgres, 5432), None)?, Ok(n8n_at[n]));
        let refused = nobody.connects(at(at_postgres, 5432), Some(n8n_at[n]))?;
        assert!(refused.is_err(), "with the address of the one inside: {refused:?}");
        nobody.listens(at(rest, 5140))?;
        assert!(postgres.connects(at(rest, 5140), None)?.is_ok(), "what is meant for the rest");
    }
    Ok(())
}

#[test]
fn a_cgroup_that_becomes_another_component_speaks_from_its_address() -> Outcome {
    let (group, other) = (Group::new("n8n")?, Group::new("other")?);
    let mut mesh = shared_host(&group.attachment(), "user:2002", "host");
    let mut hosts = two_hosts(&mesh)?;
    let mut n8n = hosts[0].person_in(0, &group)?;
    let mut servers = Vec::new();
    let mut speaks_from = |hosts: &[Host; 2], mesh: &Mesh| -> Outcome<IpAddr> {
        let postgres = mesh.address("postgres")?.v4.into();
        let mut server = hosts[1].person(0)?;
        server.listens(at(postgres, 5432))?;
        servers.push(server);
        Ok(n8n.connects(at(postgres, 5432), None)??)
    };
    let before = mesh.address("n8n")?.v4;
    assert_eq!(speaks_from(&hosts, &mesh)?, before);
    // One more component, and all others have other addresses: as if each had become another.
    mesh.components.insert(
        0,
        Component {
            name: "a",
            host: 1,
            attachment: other.attachment(),
        },
    );
    let after = mesh.address("n8n")?.v4;
    assert_ne!(after, before);
    apply(&mut hosts, &mesh)?;
    assert_eq!(speaks_from(&hosts, &mesh)?, after);
    Ok(())
}

#[test]
fn a_server_that_closes_first_is_reached_again_from_the_same_port() -> Outcome {
    let (n8n_group, postgres_group) = (Group::new("n8n")?, Group::new("postgres")?);
    let mesh = shared_host(&n8n_group.attachment(), "user:2002", &postgres_group.attachment());
    let [one, two] = two_hosts(&mesh)?;
    let (mut n8n, mut server) = (one.person_in(0, &n8n_group)?, two.person_in(0, &postgres_group)?);
    for (n8n_at, postgres) in mesh.address("n8n")?.both().into_iter().zip(mesh.address("postgres")?.both()) {
        server.dismisses("plain", at(postgres, 5432))?;
        assert_eq!(n8n.comes_back(at(postgres, 5432))?, Ok(n8n_at));
    }
    Ok(())
}

#[test]
fn what_others_do_to_the_base_table_is_mended_with_everything_that_was_bound() -> Outcome {
    let group = Group::new("n8n")?;
    let mesh = shared_host(&group.attachment(), "user:2002", "host");
    let [mut one, two] = two_hosts(&mesh)?;
    let (postgres, n8n_at) = (mesh.address("postgres")?.v4.into(), mesh.address("n8n")?.v4.into());
    let mut server = two.person(0)?;
    server.listens(at(postgres, 5432))?;
    server.answers_datagrams(at(postgres, 5432))?;
    let (mut n8n, mut rogue) = (one.person_in(0, &group)?, one.person(2003)?);
    for change in [
        "flush ruleset",
        "flush table inet cloison_test",
        "insert rule inet cloison_test speaking accept",
        "add table inet cloison_test { flags dormant; }",
    ] {
        inside(&one.ns, || run("nft", change))?;
        // Until somebody looks, nothing passes: neither whose address it is nor anybody else.
        wait_until(|| one.dataplane.owners().load().closed)?;
        let _ = n8n
            .asks(at(postgres, 5432), None)?
            .err()
            .ok_or("it passed without the base table")?;
        let _ = rogue
            .asks(at(postgres, 5432), Some(n8n_at))?
            .err()
            .ok_or("it passed without the base table")?;
        assert!(one.engine.stats().outbound.dropped(DropReason::Unenforced) > 0);
        one.dataplane.check();
        assert_eq!(n8n.connects(at(postgres, 5432), None)?, Ok(n8n_at), "{change}");
        let _ = rogue
            .connects(at(postgres, 5432), Some(n8n_at))?
            .err()
            .ok_or("a foreign source passed")?;
    }
    Ok(())
}

#[test]
fn a_unit_that_makes_cgroups_without_end_holds_nobody_up() -> Outcome {
    let (n8n_group, busy_group) = (Group::new("n8n")?, Group::new("busy")?);
    let mesh = shared_host(&n8n_group.attachment(), &busy_group.attachment(), "host");
    let mut hosts = two_hosts(&mesh)?;
    let (postgres, n8n_at) = (mesh.address("postgres")?.v4.into(), mesh.address("n8n")?.v4.into());
    let mut server = hosts[1].person(0)?;
    server.listens(at(postgres, 5432))?;
    let mut n8n = hosts[0].person_in(0, &n8n_group)?;
    let (stop, made) = (AtomicBool::new(false), AtomicU64::new(0));
    let below = busy_group.place();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let name = below.join(made.fetch_add(1, Ordering::Relaxed).to_string());
                let _made = std::fs::create_dir(&name).and_then(|()| std::fs::remove_dir(&name));
            }
        });
        let mut bound = || -> Outcome {
            for _ in 0..20 {
                let start = Instant::now();
                apply(&mut hosts, &mesh)?;
                assert!(start.elapsed() < Duration::from_secs(5), "a view waited {:?}", start.elapsed());
            }
            assert_eq!(n8n.connects(at(postgres, 5432), None)?, Ok(n8n_at));
            let mut without = shared_host(&n8n_group.attachment(), &busy_group.attachment(), "host");
            without.rules.clear();
            apply(&mut hosts, &without)?;
            let _ = n8n.connects(at(postgres, 5432), None)?.err().ok_or("revoked, and it passed")?;
            Ok(())
        };
        let outcome = bound();
        stop.store(true, Ordering::Relaxed);
        outcome
    })?;
    assert!(made.load(Ordering::Relaxed) > 1_000, "nobody was busy: {made:?}");
    Ok(())
}

#[test]
fn without_claims_the_host_is_left_as_it_was_found() -> Outcome {
    let group = Group::new("n8n")?;
    let mut mesh = shared_host(&group.attachment(), "user:2002", "host");
    let mut one = Host::alone(1)?;
    let rules = |host: &Host| -> Outcome<String> { Ok(ip(&host.ns, "-4 rule")? + &ip(&host.ns, "-6 rule")?) };
    let before = rules(&one)?;
    one.apply(&mesh)?;
    let with = rules(&one)?;
    assert!(
        with.contains("100:\tfrom all lookup local") && with.contains("uidrange 2002-2002"),
        "{with}"
    );
    assert!(!with.contains("\n0:") && !with.starts_with("0:"), "{with}");
    mesh.components.retain(|c| c.name == "rest");
    mesh.rules.clear();
    one.apply(&mesh)?;
    assert_eq!(rules(&one)?, before);
    assert!(
        !ip(&one.ns, "route show table all")?.contains("table 3238"),
        "no table of a component is left"
    );
    Ok(())
}

fn wait_until(done: impl Fn() -> bool) -> Outcome {
    for _ in 0..500 {
        if done() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Err("it did not come about".into())
}

/// How long what must not arrive is waited for.
pub(crate) const SILENCE: Duration = Duration::from_millis(700);

#[test]
fn what_this_kernel_can_do_is_tried_out_and_leaves_nothing_behind() -> Outcome {
    let ns = crate::fresh()?;
    let table: cloison_agent::attach::base_table::TableName = "cloison_test".parse()?;
    let trial = Trial::new(inside(&ns, || Ok(NetNs::current()?))?, table.clone());
    trial.of_users()?;
    trial.of_cgroups(&Tree::find().ok_or("no cgroups of version 2")?)?;
    assert_eq!(inside(&ns, || run("nft", "list tables"))?, "");
    // Somebody else's rules can make the owner's datagram disappear: then nothing is relied on.
    inside(&ns, || {
        run("nft", "add table inet other")?;
        run(
            "nft",
            "add chain inet other input { type filter hook input priority 5; policy drop; }",
        )
    })?;
    let refused = trial.of_users();
    assert!(matches!(refused, Err(TrialError::OwnerRefused)), "{refused:?}");
    ip(&ns, "link set lo down")?;
    assert!(trial.of_users().is_err());
    Ok(())
}
