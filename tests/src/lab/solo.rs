//! A coordinator alone, on loopback, without a lab: for what concerns its process, its data directory and its API, hundreds of times over.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use serde_json::Value;

use super::process::{self, Finished};
use super::programs;
use crate::sim::random::Random;

const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// A coordinator's folder, port and owner. See the module documentation.
#[derive(Debug)]
pub struct Solo {
    folder: PathBuf,
    port: u16,
    credential: String,
}

/// A coordinator that was started. Killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    started: Instant,
    told: UnixDatagram,
    log: PathBuf,
}

impl Solo {
    /// A new mesh in `folder`, which must exist; `arguments` go to `init`. Nothing is running yet.
    ///
    /// # Errors
    /// If `init` fails.
    pub fn init(folder: &Path, arguments: &[&str]) -> Result<Self> {
        let port = free_port()?;
        let mut solo = Self {
            folder: folder.to_owned(),
            port,
            credential: String::new(),
        };
        let (address, config) = (solo.address().to_string(), folder.join("cli.toml").display().to_string());
        let own = ["init", "--address", &address, "--cli-config", &config];
        let init = solo.command(&[&own, arguments].concat())?.ok()?;
        solo.take_credential(&init)?;
        Ok(solo)
    }

    /// Takes up the owner credential that a command printed.
    ///
    /// # Errors
    /// If it printed none.
    pub fn take_credential(&mut self, printed: &Finished) -> Result<()> {
        let line = printed.stdout.lines().find_map(|line| line.trim().strip_prefix("owner credential"));
        line.context("no credential was printed")?.trim().clone_into(&mut self.credential);
        Ok(())
    }

    /// Its data directory.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// Runs a command of `cloison-coordinator` on its data directory, to its end.
    ///
    /// # Errors
    /// If it cannot be started. A failing command is no error here.
    pub fn command(&self, arguments: &[&str]) -> Result<Finished> {
        let (name, rest) = arguments.split_first().context("no command")?;
        let mut command = Command::new(programs::find("cloison-coordinator")?);
        command.arg(name).arg("--data").arg(self.data()).args(rest);
        process::run(command, COMMAND_LIMIT)
    }

    /// Starts serving; `change` may set the scene for the process.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(&self, change: impl FnOnce(&mut Command)) -> Result<Running> {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(programs::find("cloison-coordinator")?);
        command
            .arg("serve")
            .arg("--data")
            .arg(self.data())
            .arg("--listen")
            .arg(self.address().to_string());
        self.start_as(command, change)
    }

    /// Starts serving by this command, which has to end in `cloison-coordinator serve`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_as(&self, mut command: Command, change: impl FnOnce(&mut Command)) -> Result<Running> {
        let (socket, log) = (self.folder.join("notify"), self.folder.join("log"));
        let _ = std::fs::remove_file(&socket);
        let told = UnixDatagram::bind(&socket)?;
        command.env("NOTIFY_SOCKET", &socket).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(std::fs::File::options().create(true).append(true).open(&log)?);
        change(&mut command);
        let started = Instant::now();
        Ok(Running {
            child: process::spawn(command)?,
            started,
            told,
            log,
        })
    }

    /// Its API, as the owner calls it.
    ///
    /// # Errors
    /// If the caller cannot be made.
    pub fn api(&self) -> Result<Api> {
        // Which coordinator answers on this port of loopback is not the question here; the certificate is judged in other tests.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let mut bearer = HeaderValue::from_str(&format!("Bearer {}", self.credential))?;
        bearer.set_sensitive(true);
        let http = reqwest::Client::builder()
            .tls_danger_accept_invalid_certs(true)
            .no_proxy()
            .timeout(Duration::from_secs(20))
            .default_headers(HeaderMap::from_iter([(AUTHORIZATION, bearer)]))
            .build()?;
        Ok(Api {
            http,
            url: format!("https://{}/v1", self.address()),
        })
    }
}

impl Running {
    /// Waits until it tells systemd that it serves, and says how long that took; `None` if it ended before.
    ///
    /// # Errors
    /// If neither happens within `limit`.
    pub fn ready(&mut self, limit: Duration) -> Result<Option<Duration>> {
        while self.started.elapsed() < limit {
            match self.heard(Duration::from_millis(5))? {
                Some(text) if text.contains("READY=1") => return Ok(Some(self.started.elapsed())),
                Some(_) => {}
                None if self.child.try_wait()?.is_some() => return Ok(None),
                None => {}
            }
        }
        bail!("the coordinator did not get ready within {limit:?}:\n{}", self.log())
    }

    /// The next thing that it tells systemd, if one comes within `limit`.
    ///
    /// # Errors
    /// If nothing can be heard.
    pub fn heard(&self, limit: Duration) -> Result<Option<String>> {
        self.told.set_read_timeout(Some(limit))?;
        let mut buffer = [0; 4096];
        match self.told.recv(&mut buffer) {
            Ok(length) => Ok(Some(String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned())),
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
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
    /// If it is still running after `limit`.
    pub fn end(&mut self, limit: Duration) -> Result<ExitStatus> {
        super::wait_for("the coordinator to end", limit, || Ok(self.child.try_wait()?))
    }

    /// Ends it as a power cut would.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.child.kill()?;
        Ok(self.child.wait()?)
    }

    /// Asks it to end (SIGTERM).
    ///
    /// # Errors
    /// If it has ended.
    pub fn terminate(&self) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        Ok(rustix::process::kill_process(
            pid.context("no process id")?,
            rustix::process::Signal::TERM,
        )?)
    }

    /// Everything that coordinators of this folder logged.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// The REST API of one coordinator.
#[derive(Debug, Clone)]
pub struct Api {
    http: reqwest::Client,
    url: String,
}

impl Api {
    /// `GET /v1/PATH`: status and answer.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn get(&self, path: &str) -> Result<(u16, Value)> {
        answer(self.http.get(format!("{}/{path}", self.url))).await
    }

    /// `POST /v1/PATH`.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn post(&self, path: &str, body: &Value) -> Result<(u16, Value)> {
        answer(self.http.post(format!("{}/{path}", self.url)).json(body)).await
    }

    /// `DELETE /v1/PATH`.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn delete(&self, path: &str) -> Result<(u16, Value)> {
        answer(self.http.delete(format!("{}/{path}", self.url))).await
    }

    /// `PUT /v1/policy`, whatever is in force.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn put_policy(&self, text: &str) -> Result<(u16, Value)> {
        let request = self.http.put(format!("{}/policy", self.url)).header("if-match", "*");
        answer(request.json(&serde_json::json!({ "policy": text }))).await
    }
}

async fn answer(request: reqwest::RequestBuilder) -> Result<(u16, Value)> {
    let answer = request.send().await?;
    let status = answer.status().as_u16();
    let body = answer.bytes().await?;
    Ok((status, serde_json::from_slice(&body).unwrap_or(Value::Null)))
}

/// A port of loopback that nobody has, below those that the kernel gives to whoever asks for any.
fn free_port() -> Result<u16> {
    let mut seed = [0; 8];
    getrandom::fill(&mut seed).map_err(|e| anyhow::anyhow!("no randomness: {e}"))?;
    let mut random = Random::new(u64::from_ne_bytes(seed));
    for _ in 0..100 {
        let port = u16::try_from(20_000 + random.below(10_000))?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok() {
            return Ok(port);
        }
    }
    bail!("no port of loopback is free")
}
