//! Containers, as a runtime tells of them that misunderstands, lags behind, hangs or babbles: a stand-in on a real socket, with real processes in
//! real namespaces. Real runtimes are in the lab.

use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use cloison_agent::attach::container::{ContainerError, Containers, Sandbox};
use cloison_agent::attach::nudge::Nudge;
use cloison_agent::attach::{Accepted, Unenforced};
use cloison_proto::policy::{ContainerMatch, Engine};
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::Outcome;
use crate::netns::Named;

const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const SOON: Duration = Duration::from_secs(5);

/// How the stand-in answers; 0 is well.
const NEVER: u8 = 1;
const WITHOUT_END: u8 = 2;
const OTHERWISE_EACH_TIME: u8 = 3;

#[derive(Default)]
struct State {
    container: Mutex<Option<Value>>,
    manner: AtomicU8,
    asked: Mutex<Vec<String>>,
    watchers: Mutex<Vec<UnixStream>>,
}

struct Runtime {
    folder: tempfile::TempDir,
    state: Arc<State>,
}

impl Runtime {
    fn start(container: Option<Value>) -> Outcome<Self> {
        let (folder, state) = (tempfile::tempdir()?, Arc::new(State::default()));
        *state.container.lock() = container;
        let listener = UnixListener::bind(folder.path().join("socket"))?;
        let serving = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = serving.clone();
                std::thread::spawn(move || drop(serve(&state, stream)));
            }
        });
        Ok(Self { folder, state })
    }

    fn containers(&self, nudge: &Nudge) -> Containers {
        let accepted = Accepted {
            docker_socket: self.folder.path().join("socket"),
            ..Accepted::default()
        };
        Containers::new(&accepted, nudge.clone())
    }

    /// How often it was asked about containers.
    fn questions(&self) -> usize {
        self.state.asked.lock().iter().filter(|path| !path.starts_with("/events")).count()
    }

    fn tells(&self, action: &str, name: &str) -> Outcome {
        let line =
            json!({ "Type": "container", "Action": action, "Actor": { "ID": ID, "Attributes": { "name": name } } }).to_string() + "\n";
        for watcher in self.state.watchers.lock().iter_mut() {
            write!(watcher, "{:x}\r\n{line}\r\n", line.len())?;
        }
        Ok(())
    }
}

fn serve(state: &State, mut stream: UnixStream) -> Outcome {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().ok_or("no question")??;
    let path = first.split(' ').nth(1).ok_or("no path")?.to_owned();
    while lines.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
    state.asked.lock().push(path.clone());
    let manner = state.manner.load(Ordering::SeqCst);
    if manner == NEVER {
        std::thread::sleep(Duration::from_secs(60));
        return Ok(());
    }
    if path.starts_with("/events") {
        write!(stream, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
        state.watchers.lock().push(stream);
        return Ok(());
    }
    if manner == WITHOUT_END {
        write!(stream, "HTTP/1.1 200 OK\r\n\r\n")?;
        loop {
            stream.write_all(&[b' '; 65_536])?;
        }
    }
    let mut container = state.container.lock();
    if let Some(container) = container.as_mut().filter(|_| manner == OTHERWISE_EACH_TIME) {
        container["State"]["StartedAt"] = json!(state.asked.lock().len().to_string());
    }
    let body = match container.as_ref() {
        Some(container) if path.starts_with("/containers/json") => {
            json!([{ "Id": ID, "Names": ["/n8n"], "Labels": container["Config"]["Labels"] }])
        }
        Some(container) => container.clone(),
        None => {
            write!(stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{{}}")?;
            return Ok(());
        }
    };
    let body = body.to_string();
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
    Ok(())
}

/// A process that is ended when dropped.
struct Sleeper(Child);

impl Sleeper {
    fn inside(namespace: &Named) -> Outcome<Self> {
        let net = format!("--net={}", namespace.path().display());
        let child = std::process::Command::new("nsenter").args([&net, "--", "sleep", "60"]).spawn()?;
        let sleeper = Self(child);
        // It is there when it has become `sleep`.
        let start = Instant::now();
        while std::fs::read_to_string(format!("/proc/{}/comm", sleeper.0.id()))?.trim() != "sleep" {
            if start.elapsed() > SOON {
                return Err("no sleeper".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(sleeper)
    }

    fn told(&self, sandbox: PathBuf) -> Value {
        json!({
            "Id": ID, "Name": "/n8n", "Config": { "Labels": { "role": "web" } },
            "State": { "Running": true, "Pid": self.0.id(), "StartedAt": "2026-11-28T10:42:58.046560888Z" },
            "HostConfig": { "NetworkMode": "none" }, "NetworkSettings": { "SandboxKey": sandbox },
        })
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _gone = self.0.wait();
    }
}

fn which(text: &str) -> Outcome<ContainerMatch> {
    Ok(match text.split_once('=') {
        None => ContainerMatch::Name(text.parse()?),
        Some((key, value)) => ContainerMatch::Label(key.parse()?, value.parse()?),
    })
}

fn open(containers: &mut Containers, text: &str) -> Outcome<Result<Sandbox, String>> {
    Ok(containers.open(Engine::Docker, &which(text)?).map_err(|e| e.to_string()))
}

/// Why there is none.
fn refused(containers: &mut Containers, text: &str) -> Outcome<String> {
    Ok(open(containers, text)?.err().ok_or("it was opened")?)
}

/// Waits for a nudge.
fn heard(nudge: &Nudge, within: Duration) -> Outcome<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(async { tokio::time::timeout(within, nudge.heard()).await.is_ok() }))
}

fn until(what: &str, mut is_so: impl FnMut() -> Outcome<bool>) -> Outcome {
    let start = Instant::now();
    while !is_so()? {
        if start.elapsed() > SOON {
            return Err(format!("waited in vain for: {what}").into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

#[test]
fn no_runtime_is_spoken_to_before_a_container_is_wanted_nor_behind_it() -> Outcome {
    let (runtime, nudge) = (Runtime::start(None)?, Nudge::default());
    let mut containers = runtime.containers(&nudge);
    let wanted = which("n8n")?;
    containers.watch_only(&[].into());
    std::thread::sleep(Duration::from_millis(200));
    assert!(runtime.state.asked.lock().is_empty());
    containers.watch_only(&[(Engine::Docker, &wanted)].into());
    until("questions", || Ok(runtime.questions() > 0))?;
    containers.watch_only(&[].into());
    until("the end of the connection", || Ok(runtime.tells("start", "n8n").is_err()))?;
    let before = runtime.questions();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(runtime.questions(), before);
    Ok(())
}

#[test]
fn a_container_is_gone_with_its_process_whatever_its_runtime_says() -> Outcome {
    let (named, nudge) = (Named::new("gone")?, Nudge::default());
    let sleeper = Sleeper::inside(&named)?;
    let runtime = Runtime::start(Some(sleeper.told(named.path())))?;
    let mut containers = runtime.containers(&nudge);
    let wanted = which("n8n")?;
    let sandbox = open(&mut containers, "n8n")??;
    let id = sandbox.namespace.id();
    assert!(
        sandbox.shown.starts_with("docker container n8n (0123456789ab), pid "),
        "{}",
        sandbox.shown
    );
    assert!(containers.is_there(Engine::Docker, &wanted, id));
    assert!(heard(&nudge, SOON)?);
    let (rounds, began) = (100_000_u32, Instant::now());
    for _ in 0..rounds {
        assert!(containers.is_there(Engine::Docker, &wanted, id));
    }
    eprintln!("one look whether a container is there: {:?}", began.elapsed() / rounds);
    let asked = runtime.questions();

    // The runtime tells nothing, and goes on saying that it runs.
    drop(sleeper);
    assert!(heard(&nudge, Duration::from_secs(1))?, "no nudge");
    assert!(!containers.is_there(Engine::Docker, &wanted, id));
    let why = refused(&mut containers, "n8n")?;
    assert!(why.contains("no running container n8n"), "{why}");
    until("another question", || Ok(runtime.questions() > asked))?;

    // Another process in the same namespace is another run.
    let next = Sleeper::inside(&named)?;
    *runtime.state.container.lock() = Some(next.told(named.path()));
    runtime.tells("start", "n8n")?;
    assert!(heard(&nudge, SOON)?);
    assert!(!containers.is_there(Engine::Docker, &wanted, id));
    let again = open(&mut containers, "n8n")??;
    assert_eq!(again.namespace.id(), id);
    assert!(containers.is_there(Engine::Docker, &wanted, id));
    Ok(())
}

#[test]
fn what_a_runtime_finds_for_another_question_is_no_answer() -> Outcome {
    let (named, nudge) = (Named::new("other")?, Nudge::default());
    let sleeper = Sleeper::inside(&named)?;
    let runtime = Runtime::start(Some(sleeper.told(named.path())))?;
    let mut containers = runtime.containers(&nudge);
    let _opened = open(&mut containers, "n8n")??;
    let _opened = open(&mut containers, "role=web")??;
    for other in ["0123456789ab", "n8", "role=we", "rol=web"] {
        let why = refused(&mut containers, other)?;
        assert!(why.contains("has no running container"), "{other}: {why}");
    }
    Ok(())
}

#[test]
fn a_namespace_is_taken_only_if_it_is_that_of_the_container_s_first_process() -> Outcome {
    let (named, other, nudge) = (Named::new("its")?, Named::new("not-its")?, Nudge::default());
    let sleeper = Sleeper::inside(&named)?;
    let runtime = Runtime::start(Some(sleeper.told(other.path())))?;
    let why = refused(&mut runtime.containers(&nudge), "n8n")?;
    assert!(why.contains("is not the network namespace of its first process"), "{why}");
    // Without a file there is the process alone, which nothing ties to the container but its cgroup.
    *runtime.state.container.lock() = Some(sleeper.told(PathBuf::new()));
    let why = refused(&mut runtime.containers(&nudge), "n8n")?;
    assert!(why.contains("is in no cgroup of it"), "{why}");
    // A file on which nothing is mounted here is as good as none.
    *runtime.state.container.lock() = Some(sleeper.told("/etc/passwd".into()));
    let why = refused(&mut runtime.containers(&nudge), "n8n")?;
    assert!(why.contains("is in no cgroup of it"), "{why}");
    *runtime.state.container.lock() = Some(sleeper.told("/proc/self/ns/net".into()));
    let why = refused(&mut runtime.containers(&nudge), "n8n")?;
    assert!(why.contains("reached through a link"), "{why}");
    *runtime.state.container.lock() = Some(sleeper.told(named.path()));
    let _opened = open(&mut runtime.containers(&nudge), "n8n")??;
    Ok(())
}

#[test]
fn a_process_that_is_another_run_s_by_the_time_it_is_held_is_not_taken() -> Outcome {
    let (named, nudge) = (Named::new("lags")?, Nudge::default());
    let sleeper = Sleeper::inside(&named)?;
    let runtime = Runtime::start(Some(sleeper.told(named.path())))?;
    runtime.state.manner.store(OTHERWISE_EACH_TIME, Ordering::SeqCst);
    let opened = runtime.containers(&nudge).open(Engine::Docker, &which("n8n")?);
    assert!(
        matches!(opened, Err(Unenforced::Container(ContainerError::Process(_)))),
        "{opened:?}"
    );
    Ok(())
}

#[test]
fn a_runtime_that_hangs_is_waited_for_once_and_one_that_babbles_is_cut_short() -> Outcome {
    let nudge = Nudge::default();
    let runtime = Runtime::start(None)?;
    runtime.state.manner.store(NEVER, Ordering::SeqCst);
    let mut containers = runtime.containers(&nudge);
    let began = Instant::now();
    containers.watch_only(&[(Engine::Docker, &which("a")?), (Engine::Docker, &which("b")?)].into());
    for name in ["a", "b", "a", "b"] {
        let why = refused(&mut containers, name)?;
        assert!(why.contains("docker does not answer at"), "{why}");
    }
    let took = began.elapsed();
    assert!(took > Duration::from_millis(1900) && took < Duration::from_secs(3), "{took:?}");
    runtime.state.manner.store(WITHOUT_END, Ordering::SeqCst);
    let why = refused(&mut runtime.containers(&nudge), "n8n")?;
    assert!(why.contains("its answer cannot be read"), "{why}");
    Ok(())
}

#[test]
fn events_that_change_nothing_cause_no_questions() -> Outcome {
    let (runtime, nudge) = (Runtime::start(None)?, Nudge::default());
    let mut containers = runtime.containers(&nudge);
    let _why = refused(&mut containers, "n8n")?;
    until("the events", || Ok(!runtime.state.watchers.lock().is_empty()))?;
    std::thread::sleep(Duration::from_millis(100));
    let before = runtime.questions();
    for (action, name) in [
        ("exec_create: pg_isready", "n8n"),
        ("exec_start: pg_isready", "n8n"),
        ("exec_die", "n8n"),
        ("health_status: healthy", "n8n"),
        ("start", "another"),
        ("die", "another"),
    ] {
        runtime.tells(action, name)?;
    }
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(runtime.questions(), before);
    for _ in 0..50 {
        runtime.tells("start", "n8n")?;
    }
    until("a question", || Ok(runtime.questions() > before))?;
    std::thread::sleep(Duration::from_millis(300));
    let asked = runtime.questions() - before;
    assert!(asked <= 10, "{asked} questions about fifty events at once");
    Ok(())
}
