//! Programs that the lab runs: short ones to their end, long ones with their output in files.
//!
//! Everything is bounded in time. Only processes started here are ever signalled, through their own handle.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::{Folder, wait_for};

/// How long a program has to end after it was asked to, before it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// A program that runs until stopped. Killed when dropped, unless its lab is kept.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    out: PathBuf,
    log: PathBuf,
    keep: bool,
}

/// A program that has ended.
#[derive(Debug, Clone)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to its standard output.
    pub stdout: String,
    /// What it wrote to its standard error.
    pub stderr: String,
    /// How long it ran.
    pub took: Duration,
    /// When it last wrote to its standard output: for a command that prints an answer, when the answer was there.
    pub wrote_at: SystemTime,
    line: String,
}

impl Finished {
    /// Passes it on if it succeeded.
    ///
    /// # Errors
    /// With the command line and all output, if it did not.
    pub fn ok(self) -> Result<Self> {
        ensure!(
            self.status.success(),
            "`{}` failed with {}\n{}{}",
            self.line,
            self.status,
            self.stdout,
            self.stderr
        );
        Ok(self)
    }

    /// Passes it on if it failed.
    ///
    /// # Errors
    /// With the command line and all output, if it succeeded.
    pub fn refused(self) -> Result<Self> {
        ensure!(
            !self.status.success(),
            "`{}` should have failed, and succeeded\n{}{}",
            self.line,
            self.stdout,
            self.stderr
        );
        Ok(self)
    }

    /// Its standard output as JSON.
    ///
    /// # Errors
    /// If it is not.
    pub fn json(&self) -> Result<serde_json::Value> {
        serde_json::from_str(&self.stdout).with_context(|| format!("`{}` wrote no JSON: {}", self.line, self.stdout))
    }
}

/// Runs a program to its end.
///
/// # Errors
/// If it cannot be started, or does not end within `within`: then it is killed.
pub fn run(mut command: Command, within: Duration) -> Result<Finished> {
    let line = line_of(&command);
    let (stdout, stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
    command.stdin(Stdio::null()).stdout(stdout.try_clone()?).stderr(stderr.try_clone()?);
    let start = Instant::now();
    let mut child = spawn(command).with_context(|| format!("starting `{line}` (tests/scripts/setup.sh installs what is missing)"))?;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if start.elapsed() >= within {
            child.kill()?;
            child.wait()?;
            bail!("`{line}` did not end within {within:?}\n{}{}", read_all(stdout)?, read_all(stderr)?);
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let (took, wrote_at) = (start.elapsed(), stdout.metadata()?.modified()?);
    Ok(Finished {
        status,
        took,
        wrote_at,
        stdout: read_all(stdout)?,
        stderr: read_all(stderr)?,
        line,
    })
}

impl Process {
    /// Starts a program; its output goes to `logs/NAME.out`, its standard error to `logs/NAME.log`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(name: &str, mut command: Command, folder: &Folder) -> Result<Self> {
        let (out, log) = (folder.log_path(&format!("{name}.out"))?, folder.log_path(&format!("{name}.log"))?);
        command.stdin(Stdio::null()).stdout(File::create(&out)?).stderr(File::create(&log)?);
        // A group of its own: an interrupt typed at the terminal ends the test alone, which then ends its programs in order.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let line = line_of(&command);
        let child = spawn(command).with_context(|| format!("starting `{line}`"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            out,
            log,
            keep: folder.keep(),
        })
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Everything it wrote to its standard output so far.
    #[must_use]
    pub fn output(&self) -> String {
        read_path(&self.out)
    }

    /// Everything it wrote to its standard error so far.
    #[must_use]
    pub fn log(&self) -> String {
        read_path(&self.log)
    }

    /// Waits for a line that contains `text`, in its output or its log, and gives that line.
    ///
    /// # Errors
    /// If it does not come within `within`, or the program ends first.
    pub fn wait_for_line(&mut self, text: &str, within: Duration) -> Result<String> {
        let what = format!("`{text}` from {}", self.name);
        wait_for(&what, within, || {
            let exited = self.child.try_wait()?;
            let found = [&self.out, &self.log]
                .into_iter()
                .find_map(|path| read_path(path).lines().find(|l| l.contains(text)).map(str::to_owned));
            match (found, exited) {
                (Some(line), _) => Ok(Some(line)),
                (None, Some(status)) => bail!(
                    "{} ended ({status}) before it wrote `{text}`:\n{}{}",
                    self.name,
                    self.output(),
                    self.log()
                ),
                (None, None) => Ok(None),
            }
        })
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it is still running after `within`.
    pub fn wait(&mut self, within: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.name);
        wait_for(&what, within, || Ok(self.child.try_wait()?))
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// If it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(Pid::from_raw)
            .context("no process id")?;
        kill_process(pid, signal).with_context(|| format!("signalling {}", self.name))
    }

    /// Asks it to end (SIGTERM), and kills it if it does not.
    ///
    /// # Errors
    /// If it had to be killed.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        self.stop_by(Signal::TERM)
    }

    /// Asks it to end by the signal that it understands, and kills it if it does not.
    ///
    /// # Errors
    /// If it had to be killed.
    pub fn stop_by(&mut self, signal: Signal) -> Result<ExitStatus> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        self.signal(signal)?;
        let ended = self.wait(STOP_LIMIT);
        if ended.is_err() {
            self.kill()?;
        }
        ended
    }

    /// Ends it as a power cut would.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.keep {
            let _ = self.kill();
        }
    }
}

type Order = (Command, SyncSender<io::Result<Child>>);

/// Starts a process from one thread that lives as long as this program: the parent-death signal is sent when the *thread* ends that
/// started a process, and threads of tests come and go.
pub(super) fn spawn(command: Command) -> Result<Child> {
    static SPAWNER: OnceLock<Sender<Order>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, orders) = channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, answer) in orders {
                let _ = answer.send(command.spawn());
            }
        });
        sender
    });
    let (answer, child) = sync_channel(1);
    spawner
        .send((command, answer))
        .map_err(|_| anyhow!("the thread that starts processes has ended"))?;
    Ok(child.recv().context("the thread that starts processes has ended")??)
}

fn line_of(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|w| w.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

fn read_all(mut file: File) -> Result<String> {
    io::Seek::rewind(&mut file)?;
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut file, &mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn read_path(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}
