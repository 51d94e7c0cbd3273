//! The program `cloison-agent` as a service, on hosts in network namespaces of their own, without any coordinator: what a restart finds on
//! disk is all it has. The state is written by the same code that the agent writes it with. These tests need root, and fail without it.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use cloison_agent::state::clock::Moment;
use cloison_agent::state::identity::Membership;
use cloison_agent::state::view_cache::{self, HeldLease};
use cloison_agent::state::{File, StateDir};
use cloison_agent::sys::netns::NetNs;
use cloison_proto::id::{HostId, MeshId, RuleId};
use cloison_proto::key::{SigningKey, WgPrivateKey};
use cloison_proto::lease::Lease;
use cloison_proto::net::{AddressPair, OverlayRange};
use cloison_proto::policy::Attachment;
use cloison_proto::signed::Signed;
use cloison_proto::trust::{Statement, TrustKind};
use cloison_proto::version::{MeshTime, Version};
use cloison_proto::view::{Config, Grant, Header, Items, LocalInstance, Peer, RemoteInstance, RuleItem, SelfHost, VerifiedView};
use serde_json::Value;

type Outcome<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;

const MESH: MeshId = MeshId([7; 16]);
const PORT: u16 = 51_820;
const NAMES: [&str; 2] = ["app-1", "db-1"];
const COMPONENTS: [&str; 2] = ["n8n", "postgres"];
const ISSUED: u64 = 1_800_000_000;

fn host(number: usize) -> HostId {
    HostId([u8::try_from(number).unwrap_or(0) + 1; 16])
}

fn wg_seed(number: usize) -> [u8; 32] {
    [u8::try_from(number).unwrap_or(0) + 0x20; 32]
}

fn address(number: usize) -> Outcome<AddressPair> {
    range()?.nth(u32::try_from(number)?).ok_or_else(|| "outside the range".into())
}

fn range() -> Outcome<OverlayRange> {
    Ok(OverlayRange::new([10, 77, 0, 0].into(), 16, "fd12:3456:789a::".parse()?)?)
}

/// The view of one of the two hosts: `n8n` on the first may reach `postgres:sql` on the second.
fn view(number: usize, signer: &SigningKey) -> Outcome<VerifiedView> {
    let other = 1 - number;
    let wg_key = |n| WgPrivateKey::from_bytes(wg_seed(n)).public();
    let mut items = Items::default();
    let lease = Duration::from_secs(86_400);
    Config { overlay: range()?, lease }.put_in(&mut items);
    let us = SelfHost {
        id: host(number),
        name: NAMES[number].parse()?,
        wg_keys: vec![wg_key(number)],
    };
    us.put_in(&mut items);
    let local = LocalInstance {
        component: COMPONENTS[number].parse()?,
        attachment: Attachment::Host,
        addresses: address(number)?,
    };
    local.put_in(&mut items);
    let peer = Peer {
        id: host(other),
        name: NAMES[other].parse()?,
        wg_keys: vec![wg_key(other)],
        psk_generation: 0,
    };
    peer.put_in(&mut items);
    let remote = RemoteInstance {
        component: COMPONENTS[other].parse()?,
        host: host(other),
        addresses: address(other)?,
    };
    remote.put_in(&mut items);
    let rule = RuleItem {
        id: RuleId([9; 16]),
        from: "n8n".parse()?,
        to: "postgres".parse()?,
        grants: vec![Grant {
            ports: "tcp/5432".parse()?,
            service: Some("sql".parse()?),
        }],
        expires: MeshTime::NEVER,
    };
    rule.put_in(&mut items);
    let header = Header {
        mesh: MESH,
        host: host(number),
        version: Version {
            generation: 1,
            revision: 5,
        },
        state_hash: items.hash(),
    };
    Ok(VerifiedView::open(
        header.sign(signer),
        items,
        &signer.verifying(),
        (MESH, host(number)),
        None,
    )?)
}

/// Writes the state of an enrolled host that had its view in force, with this much of its lease left.
fn prepare(dir: &Path, number: usize, left: Duration) -> Outcome {
    let dir = StateDir::open(dir)?;
    let (root, signer) = (SigningKey::from_seed(&[0x50; 32]), SigningKey::from_seed(&[0x51; 32]));
    dir.write(File::IdentityKey, &[u8::try_from(number)? + 0x30; 32])?;
    dir.write(File::WgKey, &wg_seed(number))?;
    let statement = |kind, value: Vec<u8>| -> Signed {
        let not_before = MeshTime(0);
        let statement = Statement {
            mesh: MESH,
            kind,
            value,
            not_before,
        };
        statement.sign(&root)
    };
    let membership = Membership {
        mesh: MESH,
        host: host(number),
        name: NAMES[number].parse()?,
        root: root.verifying(),
        trust: vec![statement(TrustKind::ViewSigner, signer.verifying().as_bytes().to_vec())],
        known_time: MeshTime(ISSUED),
        addresses: vec!["192.0.2.99:7443".into()],
    };
    membership.store(&dir)?;
    let view = view(number, &signer)?;
    view_cache::store_view(&dir, &view)?;
    let lease = Lease {
        mesh: MESH,
        host: host(number),
        version: view.header().version,
        state_hash: view.header().state_hash,
        issued_at: MeshTime(ISSUED),
        valid_for_secs: 86_400,
    };
    let held = HeldLease {
        signed: lease.sign(&signer),
        lease,
    };
    view_cache::store_lease(&dir, &held, left, (MeshTime(ISSUED), true), &Moment::now())?;
    let endpoint = SocketAddr::from(([192, 0, 2, u8::try_from(2 - number)?], PORT));
    view_cache::store_endpoints(&dir, &BTreeMap::from([(host(1 - number), endpoint)]))?;
    Ok(())
}

/// Two hosts on one wire, each with a named namespace and a folder; all of it goes when this is dropped.
struct Lab {
    prefix: String,
    folder: tempfile::TempDir,
}

impl Lab {
    fn new() -> Outcome<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let lab = Self {
            prefix: format!("svc-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)),
            folder: tempfile::tempdir()?,
        };
        let (a, b) = (lab.name(0), lab.name(1));
        for name in [&a, &b] {
            ip(&format!("netns add {name}")).map_err(|e| format!("these tests need root: {e}"))?;
        }
        ip(&format!("-n {a} link add eth0 type veth peer name eth0 netns {b}"))?;
        for (name, number) in [(&a, 1), (&b, 2)] {
            ip(&format!("-n {name} addr add 192.0.2.{number}/24 dev eth0"))?;
            ip(&format!("-n {name} link set lo up"))?;
            ip(&format!("-n {name} link set eth0 up"))?;
        }
        for number in 0..2 {
            prepare(&lab.state(number), number, Duration::from_secs(3_600))?;
        }
        Ok(lab)
    }

    fn name(&self, number: usize) -> String {
        format!("{}-{number}", self.prefix)
    }

    fn state(&self, number: usize) -> PathBuf {
        self.folder.path().join(format!("state-{number}"))
    }

    fn namespace(&self, number: usize) -> Outcome<NetNs> {
        let dir = PathBuf::from("/run/netns");
        Ok(NetNs::open(&dir.join(self.name(number)), &[dir])?)
    }

    fn command(&self, number: usize, arguments: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.name(number)))
            .arg(env!("CARGO_BIN_EXE_cloison-agent"));
        command.args(arguments).arg("--state-dir").arg(self.state(number));
        command.arg("--socket").arg(self.folder.path().join(format!("{number}.sock")));
        command.args(["--hosts-file", "off"]).stdin(Stdio::null());
        command
    }

    fn ask(&self, number: usize, arguments: &[&str]) -> Outcome<Output> {
        Ok(self.command(number, arguments).output()?)
    }

    fn status(&self, number: usize) -> Outcome<Value> {
        let output = self.ask(number, &["status", "-o", "json"])?;
        serde_json::from_slice(&output.stdout).map_err(|_| String::from_utf8_lossy(&output.stderr).into_owned().into())
    }

    /// Starts the agent, and waits until it answers.
    fn start(&self, number: usize) -> Outcome<Service> {
        let log = std::fs::File::create(self.folder.path().join(format!("{number}.log")))?;
        let child = self.command(number, &["run"]).stderr(log).spawn()?;
        let service = Service(child);
        wait("the agent to answer", || Ok(self.status(number).is_ok())).map_err(|e| format!("{e}\n{}", self.log(number)))?;
        Ok(service)
    }

    fn log(&self, number: usize) -> String {
        std::fs::read_to_string(self.folder.path().join(format!("{number}.log"))).unwrap_or_default()
    }

    /// Whether `n8n` gets an echo from a server that listens as `postgres`.
    fn talk(&self, port: u16) -> Outcome<bool> {
        let to: IpAddr = address(1)?.v4.into();
        let listener = self.namespace(1)?.run(|| TcpListener::bind((to, port)))??;
        let server = std::thread::spawn(move || -> std::io::Result<()> {
            let (mut stream, _) = listener.accept()?;
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            stream.write_all(&byte)
        });
        let talked = self.namespace(0)?.run(|| -> std::io::Result<()> {
            let mut stream = TcpStream::connect_timeout(&(to, port).into(), Duration::from_secs(8))?;
            stream.set_read_timeout(Some(Duration::from_secs(8)))?;
            stream.write_all(b"x")?;
            stream.read_exact(&mut [0])
        })?;
        if talked.is_err() {
            // Nobody came: the server is let go by a connection from its own host, which stays in that kernel.
            drop(self.namespace(1)?.run(|| TcpStream::connect((to, port)))?);
        }
        let served = server.join().map_err(|_| "the server panicked")?;
        Ok(talked.is_ok() && served.is_ok())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for number in 0..2 {
            let _ = ip(&format!("netns del {}", self.name(number)));
        }
    }
}

/// A running agent; killed when dropped.
struct Service(Child);

impl Service {
    /// Asks it to end, and gives whether it ended well.
    fn stop(mut self) -> Outcome<bool> {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let mut ended = None;
        wait("the agent to end", || {
            ended = self.0.try_wait()?;
            Ok(ended.is_some())
        })?;
        Ok(ended.is_some_and(|status| status.success()))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ip(arguments: &str) -> Outcome<String> {
    let output = Command::new("ip").args(arguments.split_whitespace()).output()?;
    if output.status.success() {
        Ok(String::from_utf8(output.stdout)?)
    } else {
        Err(format!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr)).into())
    }
}

fn wait(what: &str, mut done: impl FnMut() -> Outcome<bool>) -> Outcome {
    let begun = Instant::now();
    while !done()? {
        if begun.elapsed() > Duration::from_secs(20) {
            return Err(format!("waited 20 s for {what}").into());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

fn warned(status: &Value, of: &str) -> bool {
    status["warnings"]
        .as_array()
        .is_some_and(|all| all.iter().any(|w| w.as_str().is_some_and(|w| w.contains(of))))
}

#[test]
fn agents_go_on_from_their_state_without_a_coordinator_and_restart_so() -> Outcome {
    let lab = Lab::new()?;
    let (one, two) = (lab.start(0)?, lab.start(1)?);
    assert!(lab.talk(5432)?, "{}\n{}", lab.log(0), lab.log(1));
    assert!(!lab.talk(5433)?, "no rule allows this port");

    let ping = lab.ask(0, &["ping", "postgres"])?;
    assert!(
        ping.status.success() && text(&ping).contains("handshake in") && text(&ping).contains("denied"),
        "{}",
        text(&ping)
    );
    for (arguments, code, says) in [
        (&["explain", "postgres:sql"][..], 0, "allowed"),
        (&["explain", "postgres:tcp/22"], 2, "denied"),
        (&["explain", "nobody"], 2, "denied"),
        (&["ping", "nobody"], 2, "denied"),
        (&["flows"], 0, "postgres:5432"),
        (&["denials"], 0, "no_rule"),
        (&["status"], 0, "shared"),
    ] {
        let output = lab.ask(0, arguments)?;
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", text(&output));
        assert!(text(&output).contains(says), "{arguments:?}: {}", text(&output));
    }
    let status = lab.status(0)?;
    assert_eq!(status["version"]["revision"], 5);
    assert_eq!(status["peers"][0]["name"], "db-1");
    assert!(
        status["lease"]["left_secs"]
            .as_u64()
            .is_some_and(|left| (3_000..3_600).contains(&left)),
        "{status}"
    );
    assert_eq!(status["link"]["state"].as_str().map(|s| s != "linked"), Some(true));

    let incarnation = status["incarnation"].as_u64();
    assert!(one.stop()?, "{}", lab.log(0));
    let _one = lab.start(0)?;
    assert!(lab.talk(5432)?, "{}", lab.log(0));
    assert!(lab.status(0)?["incarnation"].as_u64() > incarnation);
    assert!(two.stop()?);
    Ok(())
}

#[test]
fn a_damaged_view_or_an_ended_lease_allows_nothing_and_is_shown() -> Outcome {
    let lab = Lab::new()?;
    let _two = lab.start(1)?;
    let view = lab.state(0).join("view");
    let good = std::fs::read(&view)?;
    std::fs::write(&view, good.get(..good.len() / 2).unwrap_or_default())?;
    let one = lab.start(0)?;
    let status = lab.status(0)?;
    assert!(
        status["version"].is_null() && warned(&status, "damaged") && warned(&status, "nothing is allowed"),
        "{status}"
    );
    assert!(!lab.talk(5432)?);
    assert_eq!(lab.ask(0, &["explain", "postgres:sql"])?.status.code(), Some(1));
    assert!(one.stop()?);

    std::fs::write(&view, good)?;
    let one = lab.start(0)?;
    assert!(
        lab.talk(5432)?,
        "what is known of peers outlives a run without a view\n{}",
        lab.log(0)
    );
    assert!(one.stop()?);

    prepare(&lab.state(0), 0, Duration::ZERO)?;
    let one = lab.start(0)?;
    assert!(warned(&lab.status(0)?, "lease has ended"));
    assert!(!lab.talk(5432)?);
    assert!(text(&lab.ask(0, &["explain", "postgres:sql"])?).contains("but right now: the lease"));
    assert!(one.stop()?);
    Ok(())
}

#[test]
fn a_damaged_view_lets_nothing_out_in_clear() -> Outcome {
    let lab = Lab::new()?;
    ip(&format!("-n {} route add default via 192.0.2.2", lab.name(0)))?;
    std::fs::write(lab.state(0).join("view"), "damaged")?;
    let _one = lab.start(0)?;
    assert!(lab.status(0)?["version"].is_null());
    let to = (IpAddr::from(address(1)?.v4), 5432).into();
    let refused = lab.namespace(0)?.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(8)))?;
    assert_eq!(refused.err().map(|e| e.kind()), Some(std::io::ErrorKind::HostUnreachable));
    Ok(())
}

#[test]
fn a_second_agent_a_taken_port_and_a_host_that_is_not_enrolled_are_told_apart() -> Outcome {
    let lab = Lab::new()?;
    let _one = lab.start(0)?;
    let second = lab.ask(0, &["run"])?;
    assert!(
        second.status.code() == Some(1) && text(&second).contains("another cloison-agent uses"),
        "{}",
        text(&second)
    );
    let leaving = lab.ask(0, &["leave"])?;
    assert!(
        leaving.status.code() == Some(1) && text(&leaving).contains("stop it first"),
        "{}",
        text(&leaving)
    );

    let _taken = lab.namespace(1)?.run(|| std::net::UdpSocket::bind(("0.0.0.0", PORT)))??;
    let taken = lab.ask(1, &["run"])?;
    assert!(
        taken.status.code() == Some(1) && text(&taken).contains("--listen-port"),
        "{}",
        text(&taken)
    );
    std::fs::remove_file(lab.state(1).join("membership"))?;
    let stranger = lab.ask(1, &["run"])?;
    assert!(
        stranger.status.code() == Some(78) && text(&stranger).contains("not enrolled") && text(&stranger).contains("join"),
        "{}",
        text(&stranger)
    );
    Ok(())
}

#[test]
fn a_machine_is_made_safe_while_it_boots_if_it_is_of_a_mesh() -> Outcome {
    let lab = Lab::new()?;
    let made = || -> Outcome<String> {
        let tables = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", lab.name(0)))
            .args(["nft", "list", "tables"])
            .output()?;
        let routes = |family| ip(&format!("-n {} {family} route show table all", lab.name(0)));
        Ok(text(&tables) + &routes("-4")? + &routes("-6")?)
    };
    // Before networking: nothing is up, not even the loopback interface.
    ip(&format!("-n {} link set lo down", lab.name(0)))?;
    let prepared = lab.ask(0, &["prepare"])?;
    assert!(
        prepared.status.success() && text(&prepared).contains("lead nowhere"),
        "{}",
        text(&prepared)
    );
    let safe = made()?;
    assert!(
        safe.contains("table inet cloison")
            && safe.contains("unreachable 10.77.0.0/16")
            && safe.contains("unreachable fd12:3456:789a::/48"),
        "{safe}"
    );
    let again = lab.ask(0, &["prepare"])?;
    assert!(again.status.success() && made()? == safe, "{}", text(&again));
    ip(&format!("-n {} link set lo up", lab.name(0)))?;
    let (_one, _two) = (lab.start(0)?, lab.start(1)?);
    assert!(lab.ask(0, &["prepare"])?.status.success(), "also beside an agent that runs");
    assert!(lab.talk(5432)?, "{}", lab.log(0));

    for (missing, says) in [
        ("floor", "nothing to prepare"),
        ("view", "nothing to prepare"),
        ("membership", "not enrolled"),
    ] {
        std::fs::remove_file(lab.state(1).join(missing))?;
        if missing == "floor" {
            // The view says the same.
            assert!(text(&lab.ask(1, &["prepare"])?).contains("lead nowhere"));
            continue;
        }
        let nothing = lab.ask(1, &["prepare"])?;
        assert!(nothing.status.success() && text(&nothing).contains(says), "{}", text(&nothing));
    }
    Ok(())
}

#[test]
fn leaving_takes_away_what_the_agent_made_and_its_keys() -> Outcome {
    let lab = Lab::new()?;
    let one = lab.start(0)?;
    let tables = || -> Outcome<String> {
        let output = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", lab.name(0)))
            .args(["nft", "list", "tables"])
            .output()?;
        Ok(text(&output))
    };
    assert!(tables()?.contains("cloison"));
    assert!(one.stop()?);
    assert!(tables()?.contains("cloison"), "the base table outlives the agent");
    let left = lab.ask(0, &["leave"])?;
    assert!(left.status.success() && text(&left).contains("has left"), "{}", text(&left));
    assert!(!tables()?.contains("cloison"));
    for file in File::ALL {
        assert!(!lab.state(0).join(file.name()).exists(), "{file:?}");
    }
    assert!(!ip(&format!("-n {} route show table all", lab.name(0)))?.contains("10.77."));
    assert!(!ip(&format!("-n {} link show", lab.name(0)))?.contains("cloison0"));
    Ok(())
}
