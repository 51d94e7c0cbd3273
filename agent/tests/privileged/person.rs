//! A process with a user, a cgroup and a network namespace of its own that makes sockets as it is told: this test program itself, started
//! again. It is told by lines, and answers with lines.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};

use crate::claims::SILENCE;
use crate::mesh::Host;
use crate::{Outcome, inside};

mod odd;

/// Says to the test program that it is a person.
const PERSON: &str = "CLOISON_TEST_PERSON";

/// How an answer begins, among what a test program prints anyway.
const ANSWER: &str = "answer: ";

/// What came of an attempt: the local address that was used, or the error.
pub(crate) type Attempt = Result<IpAddr, String>;

/// A process that makes sockets. It ends when it is dropped.
pub(crate) struct Person {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

/// A cgroup of a test, with a name of its own; removed when dropped.
pub(crate) struct Group {
    root: PathBuf,
    path: String,
}

impl Group {
    pub(crate) fn new(name: &str) -> Outcome<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        static SWEPT: Once = Once::new();
        let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
            .into_iter()
            .find(|root| PathBuf::from(root).join("cgroup.procs").exists() && !PathBuf::from(root).join("tasks").exists())
            .ok_or("cgroups of version 2 are not mounted")?;
        SWEPT.call_once(|| sweep(Path::new(root)));
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = format!("/cloison-sh-{}/{name}-{number}", std::process::id());
        let group = Self { root: root.into(), path };
        std::fs::create_dir_all(group.place())?;
        Ok(group)
    }

    /// Another one inside of it.
    pub(crate) fn below(&self, name: &str) -> Outcome<Self> {
        let (root, path) = (self.root.clone(), format!("{}/{name}", self.path));
        let group = Self { root, path };
        std::fs::create_dir(group.place())?;
        Ok(group)
    }

    pub(crate) fn attachment(&self) -> String {
        format!("cgroup:{}", self.path)
    }

    /// Takes it away and makes it again: another cgroup of the same name.
    pub(crate) fn remake(&mut self) -> Outcome {
        self.remove();
        Ok(std::fs::create_dir_all(self.place())?)
    }

    /// Its directory.
    pub(crate) fn place(&self) -> PathBuf {
        self.root.join(self.path.trim_start_matches('/'))
    }

    fn remove(&self) {
        // A process that was just killed is there for a moment.
        for _ in 0..200 {
            if std::fs::remove_dir(self.place()).is_ok() || !self.place().exists() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Takes away what runs that were killed have left: the cgroups that have the number of a process which is gone.
fn sweep(root: &Path) {
    let is_left = |place: &Path| {
        let name = place.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let number = name.strip_prefix("cloison-sh-").or_else(|| name.strip_prefix("cloison-trial-"));
        number.is_some_and(|number| !Path::new("/proc").join(number).exists())
    };
    children(root).filter(|place| is_left(place)).for_each(|place| remove_all(&place));
}

fn children(place: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = std::fs::read_dir(place).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir())
}

fn remove_all(place: &Path) {
    children(place).for_each(|child| remove_all(&child));
    let _somebody_is_there = std::fs::remove_dir(place);
}

impl Drop for Group {
    fn drop(&mut self) {
        self.remove();
        if let Some(parent) = self.place().parent() {
            let _others_are_there = std::fs::remove_dir(parent);
        }
    }
}

impl Host {
    pub(crate) fn person(&self, user: u32) -> Outcome<Person> {
        Person::start(self, user, None)
    }

    pub(crate) fn person_in(&self, user: u32, group: &Group) -> Outcome<Person> {
        Person::start(self, user, Some(group))
    }
}

impl Person {
    fn start(host: &Host, user: u32, group: Option<&Group>) -> Outcome<Self> {
        let mut child = inside(&host.ns, || {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["--exact", "person::a_person_does_as_it_is_told", "--nocapture", "--test-threads=1"]);
            command.env(PERSON, "1").uid(user).gid(user).current_dir("/");
            Ok(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?)
        })?;
        if let Some(group) = group {
            std::fs::write(group.place().join("cgroup.procs"), child.id().to_string())?;
        }
        let (to, from) = (child.stdin.take().ok_or("no input")?, child.stdout.take().ok_or("no output")?);
        Ok(Self {
            child,
            to,
            from: BufReader::new(from),
        })
    }

    /// Goes to another cgroup; the sockets that it has made stay where they are.
    pub(crate) fn moves_to(&self, group: &Group) -> Outcome {
        Ok(std::fs::write(group.place().join("cgroup.procs"), self.child.id().to_string())?)
    }

    /// Connects to a server that greets, from an address if one is given.
    pub(crate) fn connects(&mut self, to: SocketAddr, from: Option<IpAddr>) -> Outcome<Attempt> {
        self.attempt("connect", to, from)
    }

    /// Sends a datagram and waits for its echo.
    pub(crate) fn asks(&mut self, to: SocketAddr, from: Option<IpAddr>) -> Outcome<Attempt> {
        self.attempt("ask", to, from)
    }

    /// Listens, and greets everybody.
    pub(crate) fn listens(&mut self, at: SocketAddr) -> Outcome {
        Ok(self.attempt("listen", at, None)?.map(drop)?)
    }

    /// Connects twice from one port, to a server that ends each stream first.
    pub(crate) fn comes_back(&mut self, to: SocketAddr) -> Outcome<Attempt> {
        self.attempt("twice", to, None)
    }

    /// Answers each datagram.
    pub(crate) fn answers_datagrams(&mut self, at: SocketAddr) -> Outcome {
        Ok(self.attempt("echo", at, None)?.map(drop)?)
    }

    fn attempt(&mut self, what: &str, at: SocketAddr, from: Option<IpAddr>) -> Outcome<Attempt> {
        let from = from.map_or_else(|| "-".into(), |from| from.to_string());
        writeln!(self.to, "{what} {at} {from}")?;
        let mut line = String::new();
        loop {
            line.clear();
            if self.from.read_line(&mut line)? == 0 {
                return Err("the person is gone".into());
            }
            if let Some((_, answer)) = line.split_once(ANSWER) {
                return Ok(match answer.trim().split_once(' ') {
                    Some(("ok", local)) => Ok(local.parse()?),
                    _ => Err(answer.trim().to_owned()),
                });
            }
        }
    }
}

impl Drop for Person {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _ended = self.child.wait();
    }
}

/// Not a test of anything unless it was started to be a person.
#[test]
fn a_person_does_as_it_is_told() -> Outcome {
    if std::env::var_os(PERSON).is_none() {
        return Ok(());
    }
    let mut held = Vec::new();
    for line in std::io::stdin().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        let [what, at, from] = words[..] else {
            return Err("three words".into());
        };
        let (at, from): (SocketAddr, Option<IpAddr>) = (at.parse()?, from.parse().ok());
        let came = match what {
            "connect" => connect(at, from).map(|(socket, local)| {
                held.push(socket);
                local
            }),
            "ask" => ask(at, from),
            "twice" => twice(at),
            "listen" => listen(at),
            "echo" => echo(at),
            _ => odd::act(what, at, from),
        };
        match came {
            Ok(local) => println!("{ANSWER}ok {local}"),
            Err(error) => println!("{ANSWER}error {:?} {error}", error.kind()),
        }
    }
    std::process::exit(0)
}

fn connect(to: SocketAddr, from: Option<IpAddr>) -> std::io::Result<(Socket, IpAddr)> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    if let Some(from) = from {
        socket.bind(&SockAddr::from(SocketAddr::from((from, 0))))?;
    }
    socket.connect_timeout(&to.into(), Duration::from_secs(2))?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    (&socket).read_exact(&mut [0; 5])?;
    let local = socket.local_addr()?.as_socket().ok_or(std::io::ErrorKind::Other)?;
    Ok((socket, local.ip()))
}

fn ask(to: SocketAddr, from: Option<IpAddr>) -> std::io::Result<IpAddr> {
    let any = if to.is_ipv4() {
        IpAddr::from([0; 4])
    } else {
        IpAddr::from([0; 16])
    };
    let socket = UdpSocket::bind((from.unwrap_or(any), 0))?;
    socket.set_read_timeout(Some(SILENCE))?;
    socket.connect(to)?;
    socket.send(b"question")?;
    socket.recv(&mut [0; 64])?;
    Ok(socket.local_addr()?.ip())
}

fn twice(to: SocketAddr) -> std::io::Result<IpAddr> {
    let mut from: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0; 16], 0).into() };
    for _ in 0..2 {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&from.into())?;
        socket.connect_timeout(&to.into(), Duration::from_secs(2))?;
        socket.set_read_timeout(Some(Duration::from_secs(2)))?;
        from = socket.local_addr()?.as_socket().ok_or(std::io::ErrorKind::Other)?;
        (&socket).read_to_end(&mut Vec::new())?;
        drop(socket);
        // Until the last segments are exchanged, the port is still ours.
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(from.ip())
}

fn listen(at: SocketAddr) -> std::io::Result<IpAddr> {
    let listener = TcpListener::bind(at)?;
    std::thread::spawn(move || {
        let mut held = Vec::new();
        for mut stream in listener.incoming().flatten() {
            let _gone = stream.write_all(b"hello");
            held.push(stream);
        }
    });
    Ok(at.ip())
}

fn echo(at: SocketAddr) -> std::io::Result<IpAddr> {
    let socket = UdpSocket::bind(at)?;
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        loop {
            // An error is what became of an answer.
            if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let _gone = socket.send_to(&buffer[..length], from);
            }
        }
    });
    Ok(at.ip())
}
