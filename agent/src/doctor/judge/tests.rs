//! Each finding: what it says, how bad it is, and that it says what to do.

use super::*;
use crate::control::certificate::Window;
use crate::doctor::Level;
use crate::doctor::facts::{Exposure, Foreign};
use cloison_proto::id::{HostId, MeshId};
use cloison_proto::key::WgPrivateKey;
use cloison_proto::status::{KeyStage, KeyStatus, Lease, Names, Packets, Status};
use cloison_proto::version::{MeshTime, Version};
use std::net::IpAddr;
use std::path::PathBuf;

type Outcome = Result<(), Box<dyn std::error::Error>>;

const NOW: u64 = 1_800_000_000;

fn running() -> Result<Status, Box<dyn std::error::Error>> {
    Ok(Status {
        software: "0.1.0".into(),
        host: HostId([1; 16]),
        name: "app-1".parse()?,
        mesh: MeshId([2; 16]),
        uptime_secs: 9,
        incarnation: 1,
        listen_port: 51_820,
        interface: "cloison0".into(),
        version: Some(Version {
            generation: 1,
            revision: 1,
        }),
        state_hash: None,
        lease: Lease {
            left_secs: 80_000,
            valid_for_secs: 86_400,
            mesh_time: MeshTime(NOW),
        },
        clock_offset_secs: None,
        link: Link::Linked {
            address: "192.0.2.1:7443".into(),
            for_secs: 5,
        },
        wg_key: KeyStatus {
            current: WgPrivateKey::from_bytes([7; 32]).public(),
            next: None,
            stage: KeyStage::Settled,
            changes_in_secs: None,
            refused: None,
        },
        instances: Vec::new(),
        peers: Vec::new(),
        packets: Packets::default(),
        names: Names::Off,
        resolver: cloison_proto::status::Resolver::Off,
        resolved: cloison_proto::status::Resolved::Off,
        ignored_items: 0,
        warnings: Vec::new(),
    })
}

/// A host on which all is well.
fn well() -> Result<Facts, Box<dyn std::error::Error>> {
    Ok(Facts {
        agent: Ok(Box::new(running()?)),
        tun: Ok(()),
        port: (51_820, Ok(())),
        table: Ok(Table::Whole),
        table_name: "cloison".into(),
        clock: Some((NOW, NOW + 1)),
        state_dir: ("/var/lib/cloison-agent".into(), Ok(Vec::new())),
        enrolled: Some(true),
        unusable: Vec::new(),
        damaged: Vec::new(),
        certificate: Ok(Some(Window {
            not_before: NOW - 3_600,
            not_after: NOW + 82_800,
        })),
        lease: Some((80_000, 86_400)),
        coordinators: vec![("192.0.2.1:7443".into(), Ok(()))],
        handshakes: vec![("db-1".into(), PingOutcome::Answered { round_trip_micros: 1_234 })],
        paths: vec![PeerPath {
            peer: "db-1".into(),
            endpoint: "192.0.2.2:51820".parse()?,
            found: Ok(Passes::All(1480)),
        }],
        foreign: Ok(Foreign::default()),
        kernel: Kernel::default(),
        hosts: Some(("/etc/hosts".into(), Ok(0))),
        exposure: Exposure::default(),
    })
}

/// The one finding that is no longer well, after `spoil`.
fn one(spoil: impl FnOnce(&mut Facts)) -> Result<Finding, Box<dyn std::error::Error>> {
    let mut facts = well()?;
    spoil(&mut facts);
    let mut worse = findings(&facts).findings.into_iter().filter(|f| f.level > Level::Ok);
    let found = worse.next().ok_or("nothing was found")?;
    if let Some(second) = worse.next() {
        return Err(format!("{found:?} and {second:?}").into());
    }
    assert_eq!(found.level >= Level::Warning, !found.fix.is_empty(), "{found:?}");
    Ok(found)
}

fn expect(found: &Finding, check: &str, level: Level, words: &[&str]) {
    assert_eq!((found.check, found.level), (check, level), "{found:?}");
    for word in words {
        assert!(found.what.contains(word) || found.fix.contains(word), "no `{word}` in {found:?}");
    }
}

#[test]
fn a_host_on_which_all_is_well_has_nothing_to_mend() -> Outcome {
    let report = findings(&well()?);
    assert!(report.running && !report.has_work(), "{report:?}");
    assert!(
        report.findings.iter().all(|f| f.level == Level::Ok && f.fix.is_empty()),
        "{report:?}"
    );
    let checks: Vec<_> = report.findings.iter().map(|f| f.check).collect();
    for check in [
        "agent",
        "state",
        "tun",
        "udp",
        "nft",
        "clock",
        "coordinator",
        "certificate",
        "lease",
        "peer",
        "mtu",
        "addresses",
        "kernel",
        "names",
    ] {
        assert!(checks.contains(&check), "{check} is not in {checks:?}");
    }
    Ok(())
}

#[test]
fn an_agent_that_does_not_run_and_a_host_that_is_not_enrolled_are_two_things() -> Outcome {
    let stopped = one(|f| f.agent = Err("nobody listens".into()))?;
    expect(&stopped, "agent", Level::Problem, &["systemctl start"]);
    let report = findings(&Facts {
        agent: Err("x".into()),
        enrolled: Some(false),
        certificate: Ok(None),
        lease: None,
        clock: None,
        table: Ok(Table::NotYet),
        coordinators: Vec::new(),
        ..well()?
    });
    let work: Vec<_> = report.findings.iter().filter(|f| f.level >= Level::Warning).collect();
    assert_eq!(work.len(), 1, "{work:?}");
    assert!(work.iter().all(|f| f.fix.contains("cloison-agent join")), "{work:?}");
    Ok(())
}

#[test]
fn a_component_that_is_not_enforced_is_a_problem_with_its_reason() -> Outcome {
    let instance = |component: &str, enforcement| -> Result<Instance, Box<dyn std::error::Error>> {
        Ok(Instance {
            component: component.parse()?,
            addresses: Vec::new(),
            attachment: format!("unit:{component}.service"),
            enforcement,
            last_denial: None,
        })
    };
    let (bound, why) = (Enforcement::Bound { by: "x".into() }, "no CAP_BPF".to_owned());
    let instances = vec![
        instance("redis", bound)?,
        instance("n8n", Enforcement::Unenforced { why })?,
        instance("rest", Enforcement::Shared)?,
    ];
    let with = |kept: &[Instance]| {
        let kept = kept.to_vec();
        move |f: &mut Facts| {
            if let Ok(status) = &mut f.agent {
                status.instances = kept;
            }
        }
    };
    let found = one(with(&instances))?;
    expect(
        &found,
        "attached",
        Level::Problem,
        &["n8n (unit:n8n.service)", "no CAP_BPF", "tries again"],
    );
    let mut facts = well()?;
    with(instances.get(..1).unwrap_or_default())(&mut facts);
    assert!(
        findings(&facts)
            .findings
            .iter()
            .any(|f| f.check == "attached" && f.level == Level::Ok)
    );
    Ok(())
}

#[test]
fn the_state_directory_open_to_others_is_a_problem() -> Outcome {
    let open = Exposed {
        path: "/var/lib/cloison-agent".into(),
        mode: 0o755,
        owner: None,
    };
    expect(
        &one(|f| f.state_dir.1 = Ok(vec![open]))?,
        "state",
        Level::Problem,
        &["0755", "chmod -R u=rwX,go="],
    );
    expect(&one(|f| f.state_dir.1 = Err("no".into()))?, "state", Level::Problem, &["root"]);
    expect(
        &one(|f| f.damaged = vec!["view is damaged".into()])?,
        "state",
        Level::Warning,
        &["view is damaged"],
    );
    Ok(())
}

/// What `doctor` finds on a host whose agent does not run because of one file of its state.
fn without(path: &str, fix: &str, spoil: impl FnOnce(&mut Facts)) -> Result<Vec<Finding>, Box<dyn std::error::Error>> {
    let mut facts = well()?;
    facts.agent = Err("nobody listens".into());
    facts.unusable = vec![Unusable {
        why: format!("{path} is damaged: its checksum does not fit its content"),
        fix: fix.into(),
    }];
    spoil(&mut facts);
    let found = findings(&facts).findings;
    let state: Vec<_> = found.iter().filter(|f| f.check == "state" && f.level == Level::Problem).collect();
    assert!(
        matches!(state.as_slice(), [one] if one.what.contains(path) && one.fix == fix),
        "{found:?}"
    );
    let agent = found.iter().find(|f| f.check == "agent").ok_or("agent")?;
    assert!(agent.fix.contains("first mend the state"), "{agent:?}");
    Ok(found)
}

#[test]
fn a_key_that_cannot_be_read_is_a_problem_with_the_fix_of_its_own_file_and_not_one_of_the_certificate() -> Outcome {
    for name in ["identity-key", "wireguard-key", "wireguard-key-next"] {
        let found = without(name, "the fix of this file", |f| f.certificate = Ok(None))?;
        assert!(!found.iter().any(|f| f.check == "certificate"), "{found:?}");
        assert!(found.iter().any(|f| f.check == "lease" && f.level == Level::Ok), "{found:?}");
    }
    Ok(())
}

#[test]
fn a_file_is_a_problem_while_the_agent_runs_on_too() -> Outcome {
    let file = Unusable {
        why: "membership is damaged".into(),
        fix: "restore it".into(),
    };
    expect(&one(|f| f.unusable = vec![file])?, "state", Level::Problem, &["restore it"]);
    Ok(())
}

#[test]
fn nothing_is_made_of_a_state_that_cannot_be_read() -> Outcome {
    let unread = |f: &mut Facts| {
        f.certificate = Ok(None);
        f.lease = None;
        f.coordinators.clear();
        f.table = Ok(Table::NotYet);
        f.clock = None;
    };
    let floor = without("floor", "trust the coordinator", |f| {
        unread(f);
        f.enrolled = Some(true);
    })?;
    let membership = without("membership", "leave --force", |f| {
        unread(f);
        f.enrolled = None;
    })?;
    for found in [floor, membership] {
        for check in ["certificate", "lease", "coordinator"] {
            assert!(!found.iter().any(|f| f.check == check), "{check}: {found:?}");
        }
        assert!(!found.iter().any(|f| f.what.contains("not enrolled")), "{found:?}");
        let table = found.iter().find(|f| f.check == "nft").ok_or("nft")?;
        assert!(
            table.level == Level::Note && table.what.contains("could not be looked at"),
            "{table:?}"
        );
    }
    Ok(())
}

#[test]
fn a_driver_a_port_and_a_table_that_are_missing_are_problems() -> Outcome {
    expect(
        &one(|f| f.tun = Err("no such file".into()))?,
        "tun",
        Level::Problem,
        &["modprobe tun"],
    );
    let taken = findings(&Facts {
        agent: Err("stopped".into()),
        port: (51_820, Err("port 51820 cannot be had: in use".into())),
        ..well()?
    });
    assert!(
        taken
            .findings
            .iter()
            .any(|f| f.check == "udp" && f.level == Level::Problem && f.fix.contains("ss -lunp"))
    );
    expect(
        &one(|f| f.table = Ok(Table::Missing))?,
        "nft",
        Level::Problem,
        &["flush ruleset", "inet cloison"],
    );
    expect(
        &one(|f| f.table = Ok(Table::Altered))?,
        "nft",
        Level::Problem,
        &["restart cloison-agent"],
    );
    expect(
        &one(|f| f.table = Err("nft is missing".into()))?,
        "nft",
        Level::Problem,
        &["install `nftables`"],
    );
    Ok(())
}

#[test]
fn a_wrong_clock_is_a_warning_and_a_lagging_mesh_time_without_a_link_is_none() -> Outcome {
    for wall in [0, NOW - 3_600, NOW + 3_600, 4_070_908_800] {
        expect(
            &one(|f| f.clock = Some((NOW, wall)))?,
            "clock",
            Level::Warning,
            &["timedatectl", "the mesh goes on"],
        );
    }
    expect(&one(|f| f.clock = Some((NOW, NOW + 10)))?, "clock", Level::Note, &["10 s ahead of"]);
    let lagging = findings(&Facts {
        agent: Err("stopped".into()),
        clock: Some((NOW, NOW + 900_000)),
        ..well()?
    });
    assert!(
        lagging.findings.iter().any(|f| f.check == "clock" && f.level == Level::Ok),
        "{lagging:?}"
    );
    Ok(())
}

#[test]
fn a_coordinator_that_does_not_answer_is_a_problem_unless_another_does() -> Outcome {
    let down = || {
        (
            "192.0.2.1:7443".to_owned(),
            Err("192.0.2.1:7443 does not answer: no answer".to_owned()),
        )
    };
    let up = || ("192.0.2.9:7443".to_owned(), Ok(()));
    expect(
        &one(|f| f.coordinators = vec![down()])?,
        "coordinator",
        Level::Problem,
        &["does not answer", "systemctl status cloison-coordinator"],
    );
    expect(
        &one(|f| f.coordinators = vec![down(), up()])?,
        "coordinator",
        Level::Warning,
        &["192.0.2.1:7443"],
    );
    expect(
        &one(|f| f.coordinators.clear())?,
        "coordinator",
        Level::Problem,
        &["`coordinators`"],
    );
    Ok(())
}

#[test]
fn why_there_is_no_link_is_said_although_a_coordinator_answers() -> Outcome {
    let waiting = |why: &str| {
        let link = Link::Waiting {
            next_secs: 8,
            why: why.into(),
        };
        move |f: &mut Facts| {
            if let Ok(status) = &mut f.agent {
                status.link = link;
            }
        }
    };
    let answer = "no new certificate: the coordinator's answer does not hold: not valid yet";
    expect(
        &one(waiting(answer))?,
        "coordinator",
        Level::Problem,
        &["no link", answer, "clock of the coordinator", "do not `leave`"],
    );
    let denied = "the coordinator gives this host no new certificate: it is revoked";
    expect(
        &one(waiting(denied))?,
        "coordinator",
        Level::Problem,
        &[denied, "cloison host show app-1", "cloison token create --host app-1"],
    );
    expect(
        &one(waiting("the connection with 192.0.2.1:7443 ended: revoked"))?,
        "coordinator",
        Level::Problem,
        &["ended: revoked", "cloison token create --host app-1"],
    );
    expect(
        &one(waiting("shutdown"))?,
        "coordinator",
        Level::Warning,
        &["no link", "shutdown", "systemctl restart cloison-agent"],
    );
    // What is said of the address already is not said twice; an agent that just starts has not tried.
    let down = "192.0.2.1:7443 does not answer: no answer";
    let silent = one(|f| {
        f.coordinators = vec![("192.0.2.1:7443".into(), Err(down.into()))];
        waiting(&format!("no new certificate: {down}"))(f);
    })?;
    expect(&silent, "coordinator", Level::Problem, &["does not answer"]);
    let mut starting = well()?;
    waiting("starting")(&mut starting);
    assert!(!findings(&starting).has_work());
    Ok(())
}

#[test]
fn what_ends_soon_is_a_warning_and_what_has_ended_says_what_that_means() -> Outcome {
    let ends = |left: u64| {
        Ok(Some(Window {
            not_before: NOW + left - 90_000,
            not_after: NOW + left,
        }))
    };
    expect(
        &one(|f| f.certificate = ends(10_000))?,
        "certificate",
        Level::Warning,
        &["not renewed"],
    );
    expect(
        &one(|f| f.certificate = ends(0))?,
        "certificate",
        Level::Warning,
        &["no link does without", "30 days"],
    );
    expect(
        &one(|f| f.certificate = Ok(None))?,
        "certificate",
        Level::Warning,
        &["no certificate"],
    );
    expect(
        &one(|f| f.certificate = Err("damaged".into()))?,
        "certificate",
        Level::Warning,
        &["damaged"],
    );
    expect(
        &one(|f| f.lease = Some((1_000, 86_400)))?,
        "lease",
        Level::Warning,
        &["16 min left"],
    );
    expect(
        &one(|f| f.lease = Some((0, 86_400)))?,
        "lease",
        Level::Problem,
        &["nothing is allowed"],
    );
    expect(&one(|f| f.lease = None)?, "lease", Level::Problem, &["nothing is allowed"]);
    Ok(())
}

#[test]
fn peers_that_do_not_answer_are_named_and_all_of_them_together_are_this_host_s_firewall() -> Outcome {
    let silent = |name: &str| (name.to_owned(), PingOutcome::Silent { why: "no answer".into() });
    let some = one(|f| f.handshakes.push(silent("db-2")))?;
    expect(&some, "peer", Level::Warning, &["db-2 does not answer", "doctor` there"]);
    let report = findings(&Facts {
        handshakes: vec![silent("db-1"), silent("db-2")],
        ..well()?
    });
    let udp = report.findings.iter().find(|f| f.check == "udp").ok_or("udp")?;
    expect(
        udp,
        "udp",
        Level::Problem,
        &["none of its 2 peers", "UDP port 51820", "nft list ruleset"],
    );
    let mut refused = well()?;
    if let Ok(status) = &mut refused.agent {
        status.packets.kernel.insert("udp_refused".into(), 7);
    }
    assert!(
        findings(&refused)
            .findings
            .iter()
            .any(|f| f.check == "udp" && f.what.contains("refused to send 7"))
    );
    Ok(())
}

#[test]
fn a_path_that_loses_long_packets_comes_with_the_mtu_that_fits() -> Outcome {
    let found = |largest| {
        move |f: &mut Facts| {
            f.paths
                .iter_mut()
                .for_each(|p| p.found = Ok(Passes::UpTo { largest, wanted: 1480 }))
        }
    };
    expect(
        &one(found(1400))?,
        "mtu",
        Level::Problem,
        &["more than 1400 bytes", "mtu = 1340", "db-1"],
    );
    expect(
        &one(found(1300))?,
        "mtu",
        Level::Problem,
        &["1340 bytes", "ip link set dev INTERFACE mtu 1300"],
    );
    let unanswered = one(|f| f.paths.iter_mut().for_each(|p| p.found = Ok(Passes::Unanswered)))?;
    expect(&unanswered, "mtu", Level::Note, &["cannot be tried"]);
    let failed = one(|f| f.paths.iter_mut().for_each(|p| p.found = Err("no route".into())))?;
    expect(&failed, "mtu", Level::Note, &["no route"]);
    Ok(())
}

#[test]
fn addresses_and_routes_of_others_and_traps_of_the_kernel_are_found() -> Outcome {
    let address: IpAddr = "10.77.1.1".parse()?;
    let twice = one(|f| {
        f.foreign = Ok(Foreign {
            addresses: vec![(address, "eth1".into())],
            route: None,
        });
    })?;
    expect(&twice, "addresses", Level::Problem, &["ip address delete 10.77.1.1 dev eth1"]);
    let route = one(|f| {
        f.foreign = Ok(Foreign {
            addresses: Vec::new(),
            route: Some((address, 24)),
        });
    })?;
    expect(&route, "addresses", Level::Problem, &["ip route delete 10.77.1.1/24"]);
    let strict = one(|f| {
        f.kernel.strict = vec!["eth0".into()];
        f.kernel.ways_out = 2;
    })?;
    expect(&strict, "kernel", Level::Warning, &["net.ipv4.conf.eth0.rp_filter=2"]);
    expect(&one(|f| f.kernel.forwards = true)?, "kernel", Level::Note, &["forwards"]);
    expect(&one(|f| f.kernel.no_ipv6 = true)?, "kernel", Level::Note, &["IPv4 addresses only"]);
    Ok(())
}

#[test]
fn a_hosts_file_that_cannot_be_used_and_blocks_that_are_left_over_are_found() -> Outcome {
    let hosts = |found| Some((PathBuf::from("/etc/hosts"), found));
    let missing = Unusable {
        why: "there is no /etc/hosts".into(),
        fix: "make it".into(),
    };
    let failed = one(|f| f.hosts = hosts(Err(missing)))?;
    expect(&failed, "names", Level::Warning, &["there is no /etc/hosts"]);
    expect(&one(|f| f.hosts = hosts(Ok(2)))?, "names", Level::Note, &["2 other hosts"]);
    expect(&one(|f| f.hosts = None)?, "names", Level::Note, &["off"]);
    Ok(())
}
