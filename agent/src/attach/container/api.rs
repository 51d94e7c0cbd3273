//! The API of a container runtime, which Docker defined and Podman speaks as well: HTTP over the runtime's Unix socket, `GET` alone.
//!
//! Paths have no version: Docker's newer releases refuse the old ones, and nothing is read here that changed since API 1.24. Each answer is
//! bounded in size and time, and is parsed as far as it is needed; what a view says goes into a path only as it was parsed
//! (`cloison_proto::policy`), or percent-encoded. What the answers mean is not judged here.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use cloison_proto::policy::{ContainerLabelKey, ContainerLabelValue, ContainerName};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::task::AbortHandle;
use tokio::time::timeout;

/// How long an answer may take, from the connection to its last byte; for events, to its head.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Largest answer in bytes: thousands of containers in a list.
const MAX_ANSWER: usize = 8 << 20;
/// Longest event in bytes. A longer one still says that something happened.
const MAX_EVENT: usize = 256 << 10;

/// Why a runtime gives no answer.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Nobody listens.
    #[error("cannot connect")]
    Connect(#[source] std::io::Error),
    /// The connection broke.
    #[error("the connection broke")]
    Broken(#[source] hyper::Error),
    /// It took too long.
    #[error("no answer within {} s", ANSWER_LIMIT.as_secs())]
    Slow,
    /// It refused.
    #[error("it answered with status {0}")]
    Status(StatusCode),
    /// The answer is too large, or ended early.
    #[error("its answer cannot be read")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The answer is not what it should be.
    #[error("its answer is not understood")]
    Json(#[source] serde_json::Error),
}

/// What tells a container from all others that a runtime ever makes: 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct ContainerId(Box<str>);

impl ContainerId {
    /// All of it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// As much of it as people use.
    #[must_use]
    pub fn short(&self) -> &str {
        self.0.get(..12).unwrap_or(&self.0)
    }
}

impl FromStr for ContainerId {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            Ok(Self(text.into()))
        } else {
            Err("a container's id has 64 hexadecimal digits")
        }
    }
}

impl TryFrom<String> for ContainerId {
    type Error = &'static str;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

/// A container, as `GET /containers/NAME/json` tells.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Inspected {
    /// Its id.
    pub id: ContainerId,
    /// Its name, behind a slash.
    pub name: String,
    /// How it runs.
    pub state: State,
    /// What its maker asked for.
    pub host_config: HostConfig,
    /// How it is connected.
    pub network_settings: NetworkSettings,
    /// What it was made with.
    pub config: Config,
}

/// How a container runs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct State {
    /// Whether it does.
    pub running: bool,
    /// Its first process; 0 if it does not run.
    pub pid: i32,
    /// When it was started last.
    pub started_at: String,
}

/// What a container's maker asked for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct HostConfig {
    /// `none`, `host`, `container:ID`, or a network's name.
    pub network_mode: String,
}

/// How a container is connected.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct NetworkSettings {
    /// The file that stands for its network namespace; empty if the runtime made none.
    #[serde(default)]
    pub sandbox_key: PathBuf,
    /// What of it the host listens for, by port and protocol.
    #[serde(default)]
    pub ports: Option<BTreeMap<String, Option<Vec<Binding>>>>,
}

/// An address of the host that leads to a container's port.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Binding {
    /// The address; empty for all.
    pub host_ip: String,
    /// The port.
    pub host_port: String,
}

/// What a container was made with.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Config {
    /// Its labels.
    #[serde(default)]
    pub labels: Option<BTreeMap<String, String>>,
}

/// A container, as a list tells.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Listed {
    /// Its id.
    pub id: ContainerId,
    /// Its names, each behind a slash.
    #[serde(default)]
    pub names: Vec<String>,
    /// Its labels.
    #[serde(default)]
    pub labels: Option<BTreeMap<String, String>>,
}

/// Something that happened to a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Event {
    /// What: `start`, `die`, `exec_create: sh`, ...
    pub action: String,
    /// To whom.
    pub actor: Actor,
}

/// Whom an event is about.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Actor {
    /// The container's name (`name`), image and labels.
    pub attributes: BTreeMap<String, String>,
}

/// A runtime's API, by its socket. A connection lasts for one answer.
#[derive(Debug)]
pub struct Api {
    socket: PathBuf,
}

/// Ends a connection with what it was for.
#[derive(Debug)]
struct Connection(AbortHandle);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Api {
    /// The API behind this socket. Nothing is connected yet.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.into() }
    }

    /// The container that the runtime finds by this name, by which it takes an id, or the beginning of one, as well.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn inspect(&self, name: &ContainerName) -> Result<Option<Inspected>, ApiError> {
        self.get(&format!("/containers/{name}/json")).await
    }

    /// The container with this id.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn inspect_id(&self, id: &ContainerId) -> Result<Option<Inspected>, ApiError> {
        self.get(&format!("/containers/{}/json", id.0)).await
    }

    /// The containers that run and that the runtime finds by this label.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn list(&self, key: &ContainerLabelKey, value: &ContainerLabelValue) -> Result<Vec<Listed>, ApiError> {
        let filters = serde_json::json!({ "label": [format!("{key}={value}")], "status": ["running"] });
        let found = self
            .get(&format!("/containers/json?filters={}", encoded(&filters.to_string())))
            .await?;
        Ok(found.unwrap_or_default())
    }

    /// Everything that happens to containers from now on.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn events(&self) -> Result<Events, ApiError> {
        let filters = encoded(r#"{"type":["container"]}"#);
        let (response, connection) = within(self.ask(&format!("/events?filters={filters}"))).await?;
        if !response.status().is_success() {
            return Err(ApiError::Status(response.status()));
        }
        Ok(Events {
            body: response.into_body(),
            _connection: connection,
            buffer: Vec::new(),
        })
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>, ApiError> {
        within(async {
            let (response, _connection) = self.ask(path).await?;
            match response.status() {
                StatusCode::NOT_FOUND => Ok(None),
                status if status.is_success() => {
                    let body = Limited::new(response.into_body(), MAX_ANSWER)
                        .collect()
                        .await
                        .map_err(ApiError::Body)?;
                    serde_json::from_slice(&body.to_bytes()).map(Some).map_err(ApiError::Json)
                }
                status => Err(ApiError::Status(status)),
            }
        })
        .await
    }

    async fn ask(&self, path: &str) -> Result<(Response<Incoming>, Connection), ApiError> {
        let stream = UnixStream::connect(&self.socket).await.map_err(ApiError::Connect)?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(ApiError::Broken)?;
        // What it ends with is told by the answer as well.
        let connection = Connection(tokio::spawn(async { drop(connection.await) }).abort_handle());
        let mut request = Request::new(Empty::<Bytes>::new());
        *request.uri_mut() = path.parse().map_err(|_| ApiError::Status(StatusCode::URI_TOO_LONG))?;
        let host = header::HeaderValue::from_static("localhost");
        request.headers_mut().insert(header::HOST, host);
        let response = sender.send_request(request).await.map_err(ApiError::Broken)?;
        Ok((response, connection))
    }
}

/// What happens to containers, as it happens.
#[derive(Debug)]
pub struct Events {
    body: Incoming,
    _connection: Connection,
    buffer: Vec<u8>,
}

impl Events {
    /// The next event; `None` when there will be no more. One that is not understood is one of which nothing is known. Nothing is lost if
    /// this is given up before it is done.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Some(serde_json::from_slice(&line).unwrap_or_default());
            }
            if self.buffer.len() > MAX_EVENT {
                return None;
            }
            match self.body.frame().await? {
                Ok(frame) => self.buffer.extend_from_slice(&frame.into_data().unwrap_or_default()),
                Err(_) => return None,
            }
        }
    }
}

async fn within<T>(work: impl Future<Output = Result<T, ApiError>>) -> Result<T, ApiError> {
    timeout(ANSWER_LIMIT, work).await.unwrap_or(Err(ApiError::Slow))
}

/// A text as part of a query (RFC 3986): whatever could mean anything there is encoded.
fn encoded(text: &str) -> String {
    text.bytes().fold(String::new(), |mut all, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            all.push(char::from(byte));
        } else {
            // Writing into a text does not fail.
            let _ = write!(all, "%{byte:02X}");
        }
        all
    })
}
