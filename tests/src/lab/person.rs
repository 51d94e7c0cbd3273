//! Processes with a user, a cgroup and capabilities of their own that make sockets as they are told: `lab-tool obey`.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::netns::Netns;
use super::sockets::{Answer, By, Order, Seen, Shape};
use super::{Lab, process, programs};

const ROOTS: [&str; 2] = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"];

/// A process that makes sockets. It ends when it is dropped.
#[derive(Debug)]
pub struct Person {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

/// Who somebody is.
#[derive(Debug, Clone, Default)]
pub struct Who {
    /// The number of the user; root by default.
    pub user: u32,
    /// The directory of the cgroup, if not that of the test.
    pub group: Option<PathBuf>,
    /// What starts it at last: `unshare` or `setpriv` with their options.
    pub through: Vec<String>,
}

/// A cgroup of a test (version 2); removed when dropped.
#[derive(Debug)]
pub struct Group {
    root: PathBuf,
    path: String,
}

impl Group {
    /// Makes it, below one that is named like the lab.
    ///
    /// # Errors
    /// If cgroups of version 2 are not mounted.
    pub fn new(lab: &Lab, name: &str) -> Result<Self> {
        let is_root = |root: &&str| PathBuf::from(*root).join("cgroup.procs").exists() && !PathBuf::from(*root).join("tasks").exists();
        let root = ROOTS.into_iter().find(is_root).context("cgroups of version 2 are not mounted")?;
        let group = Self {
            root: root.into(),
            path: format!("/{}lab/{name}", lab.prefix()),
        };
        std::fs::create_dir_all(group.place()).context("making a cgroup")?;
        Ok(group)
    }

    /// Its path below the root of the tree, as a policy names it.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Its directory.
    #[must_use]
    pub fn place(&self) -> PathBuf {
        self.root.join(self.path.trim_start_matches('/'))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // A process that was just killed is there for a moment.
        for _ in 0..200 {
            if std::fs::remove_dir(self.place()).is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        if let Some(parent) = self.place().parent() {
            let _others_are_there = std::fs::remove_dir(parent);
        }
    }
}

impl Who {
    /// The words before the program: into the cgroup first, as long as it may, then the user.
    #[must_use]
    pub fn line(&self) -> Vec<String> {
        let mut line: Vec<String> = Vec::new();
        if let Some(group) = &self.group {
            let procs = group.join("cgroup.procs").display().to_string();
            line.extend(["sh", "-c", "echo $$ > \"$0\" && exec \"$@\"", &procs].map(str::to_owned));
        }
        if self.user != 0 {
            let user = self.user.to_string();
            line.extend(["setpriv", "--reuid", &user, "--regid", &user, "--clear-groups", "--"].map(str::to_owned));
        }
        line.extend(self.through.iter().cloned());
        line
    }
}

impl Person {
    /// Starts it in a namespace.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(net: &Netns, who: &Who) -> Result<Self> {
        let mut line = who.line();
        line.extend([programs::find("lab-tool")?.display().to_string(), "obey".to_owned()]);
        let (first, rest) = line.split_first().context("an empty line")?;
        let mut command = net.command(first);
        command.args(rest).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = process::spawn(command)?;
        let (to, from) = (child.stdin.take().context("no input")?, child.stdout.take().context("no output")?);
        let mut person = Self {
            child,
            to,
            from: BufReader::new(from),
        };
        person.order(&Order::Seen).with_context(|| format!("starting {who:?}"))?;
        Ok(person)
    }

    /// Has an order carried out. What does not succeed is no error here.
    ///
    /// # Errors
    /// If it is gone.
    pub fn order(&mut self, order: &Order) -> Result<Answer> {
        writeln!(self.to, "{}", serde_json::to_string(order)?)?;
        let mut line = String::new();
        ensure!(self.from.read_line(&mut line)? > 0, "the process that was told {order:?} is gone");
        Ok(serde_json::from_str(&line)?)
    }

    /// Answers questions at an address with a name, from now on.
    ///
    /// # Errors
    /// If it cannot listen there.
    pub fn serve(&mut self, by: By, at: SocketAddr, shape: Shape, name: &str) -> Result<()> {
        let answer = self.order(&Order::Serve(by, at, shape, name.to_owned()))?;
        ensure!(answer.error.is_none(), "{name} cannot serve at {at}: {answer:?}");
        Ok(())
    }

    /// What has reached its servers.
    ///
    /// # Errors
    /// If it is gone.
    pub fn seen(&mut self) -> Result<Vec<Seen>> {
        Ok(self.order(&Order::Seen)?.seen)
    }
}

impl Drop for Person {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _ended = self.child.wait();
    }
}
