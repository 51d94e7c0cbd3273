//! The status socket: a Unix socket, one JSON object a line in either direction. Who asks must be root or the agent's own user; the kernel
//! tells who it is. [`serve`] hands questions to the agent, [`ask`] is what the commands use.

use std::io::{self, BufRead as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cloison_proto::status::{Answer, MAX_REQUEST, Problem, Request};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// Most conversations at once; more wait in the kernel's queue.
const MAX_CONVERSATIONS: usize = 16;

/// A conversation that says nothing for so long is closed.
const IDLE: Duration = Duration::from_secs(60);

/// The longest that an answer may take: a ping of a silent peer, and a margin.
const PATIENCE: Duration = Duration::from_secs(30);

/// A question, and where its answer goes.
pub type Question = (Request, oneshot::Sender<Answer>);

/// Why there is no socket, or no answer by it.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// It cannot be made.
    #[error("cannot listen on {}: {source}", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Somebody else listens there.
    #[error("another agent listens on {}", path.display())]
    Taken {
        /// The socket.
        path: PathBuf,
    },
    /// Nobody listens there.
    #[error("the agent does not run, or listens elsewhere: {}: {source}", path.display())]
    NotRunning {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// We may not ask.
    #[error("{} answers root and the agent's own user only", path.display())]
    NotAllowed {
        /// The socket.
        path: PathBuf,
    },
    /// The conversation broke off.
    #[error("the agent gave no answer: {why}")]
    NoAnswer {
        /// How.
        why: String,
    },
}

impl SocketError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::Listen { .. } => "choose another path with --socket, or make its directory".into(),
            Self::Taken { .. } => "stop the other agent, or give this one a socket of its own with --socket".into(),
            Self::NotRunning { .. } => {
                "start it with `systemctl start cloison-agent`; a socket in another place is named with --socket".into()
            }
            Self::NotAllowed { .. } => "run the command with sudo".into(),
            Self::NoAnswer { .. } => "look at the agent's log: `journalctl -u cloison-agent`".into(),
        }
    }
}

/// The listening socket; its file goes when this is dropped.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Listens at `path`, for root and this user alone. A socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// [`SocketError`].
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Listen { path: path.into(), source };
        if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty() && !dir.exists()) {
            std::fs::create_dir_all(dir).map_err(failed)?;
            std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).map_err(failed)?;
        }
        if path.exists() {
            if StdStream::connect(path).is_ok() {
                return Err(SocketError::Taken { path: path.into() });
            }
            std::fs::remove_file(path).map_err(failed)?;
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        // Between the two calls somebody might connect; SO_PEERCRED keeps them out all the same.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        Ok(Self {
            listener,
            path: path.into(),
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(socket = %self.path.display(), %error, "the socket's file stays");
        }
    }
}

/// Accepts conversations and hands their questions to `questions`, until the receiver is gone.
pub async fn serve(listener: Listener, questions: mpsc::Sender<Question>) {
    let places = std::sync::Arc::new(tokio::sync::Semaphore::new(MAX_CONVERSATIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let stream = tokio::select! {
            accepted = listener.listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a conversation on the status socket");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            () = questions.closed() => return,
        };
        let questions = questions.clone();
        tokio::spawn(async move {
            // The other side may go at any time: that is its right.
            let _ = converse(stream, questions).await;
            drop(place);
        });
    }
}

async fn converse(stream: UnixStream, questions: mpsc::Sender<Question>) -> io::Result<()> {
    let us = rustix::process::geteuid().as_raw();
    let them = stream.peer_cred()?.uid();
    let (reading, mut writing) = stream.into_split();
    if them != 0 && them != us {
        tracing::warn!(uid = them, "somebody else's question was refused");
        return reply(
            &mut writing,
            &problem(
                "not_allowed",
                "only root and the agent's own user may ask",
                "run the command with sudo",
            ),
        )
        .await;
    }
    let mut lines = BufReader::new(reading);
    loop {
        let mut line = String::new();
        let limit = u64::try_from(MAX_REQUEST).unwrap_or(u64::MAX);
        let read = timeout(IDLE, (&mut lines).take(limit).read_line(&mut line)).await??;
        if read == 0 {
            return Ok(());
        }
        let request = if line.ends_with('\n') {
            serde_json::from_str::<Request>(&line).ok()
        } else {
            None
        };
        let Some(request) = request else {
            return reply(
                &mut writing,
                &problem(
                    "bad_request",
                    "this is no request",
                    "compare the versions of the command and the agent",
                ),
            )
            .await;
        };
        let (sender, receiver) = oneshot::channel();
        let asked = questions.send((request, sender)).await;
        let answer = match (asked, timeout(PATIENCE, receiver).await) {
            (Ok(()), Ok(Ok(answer))) => answer,
            _ => problem("stopping", "the agent is stopping", "ask again when it runs"),
        };
        reply(&mut writing, &answer).await?;
    }
}

/// An answer that says why there is none.
#[must_use]
pub fn problem(code: &str, what: &str, hint: &str) -> Answer {
    Answer::Error(Problem {
        code: code.into(),
        what: what.into(),
        hint: hint.into(),
    })
}

async fn reply(writing: &mut (impl tokio::io::AsyncWrite + Unpin), answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    timeout(IDLE, writing.write_all(&line)).await?
}

/// Asks the agent that listens at `path`.
///
/// # Errors
/// [`SocketError`].
pub fn ask(path: &Path, request: &Request) -> Result<Answer, SocketError> {
    let no_answer = |e: &dyn std::fmt::Display| SocketError::NoAnswer { why: e.to_string() };
    let mut stream = StdStream::connect(path).map_err(|source| {
        if source.kind() == io::ErrorKind::PermissionDenied {
            SocketError::NotAllowed { path: path.into() }
        } else {
            SocketError::NotRunning { path: path.into(), source }
        }
    })?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(|e| no_answer(&e))?;
    let mut line = serde_json::to_vec(request).map_err(|e| no_answer(&e))?;
    line.push(b'\n');
    stream.write_all(&line).map_err(|e| no_answer(&e))?;
    let mut answer = String::new();
    io::BufReader::new(stream).read_line(&mut answer).map_err(|e| no_answer(&e))?;
    match serde_json::from_str(&answer) {
        Ok(Answer::Error(p)) if p.code == "not_allowed" => Err(SocketError::NotAllowed { path: path.into() }),
        Ok(answer) => Ok(answer),
        Err(e) => Err(no_answer(&e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    async fn asked(path: PathBuf, request: Request) -> Result<Result<Answer, SocketError>, tokio::task::JoinError> {
        tokio::task::spawn_blocking(move || ask(&path, &request)).await
    }

    #[tokio::test]
    async fn a_question_gets_its_answer_and_nonsense_a_problem() -> Outcome {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("run").join("agent.sock");
        let (sender, mut receiver) = mpsc::channel::<Question>(4);
        tokio::spawn(serve(Listener::bind(&path)?, sender));
        tokio::spawn(async move {
            while let Some((request, answer)) = receiver.recv().await {
                let denials = Answer::Denials { denials: Vec::new() };
                let _ = answer.send(if request == Request::Denials {
                    denials
                } else {
                    problem("x", "y", "z")
                });
            }
        });
        assert_eq!(
            asked(path.clone(), Request::Denials).await??,
            Answer::Denials { denials: Vec::new() }
        );
        assert_eq!(std::fs::metadata(&path)?.permissions().mode() & 0o777, 0o600);
        for nonsense in ["{}\n".to_owned(), "x".repeat(2 * MAX_REQUEST) + "\n"] {
            let path = path.clone();
            let line = tokio::task::spawn_blocking(move || {
                let mut stream = StdStream::connect(path)?;
                // The agent may close before it read all of it.
                let _ = stream.write_all(nonsense.as_bytes());
                let mut line = String::new();
                io::BufReader::new(stream).read_line(&mut line).map(|_| line)
            })
            .await??;
            assert!(line.contains("bad_request"), "{line}");
        }
        Ok(())
    }

    #[tokio::test]
    async fn a_second_agent_on_a_socket_is_refused_and_a_dead_one_s_is_replaced() -> Outcome {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("agent.sock");
        let first = Listener::bind(&path)?;
        assert!(matches!(Listener::bind(&path), Err(SocketError::Taken { .. })));
        drop(first);
        drop(std::os::unix::net::UnixListener::bind(&path)?);
        assert!(path.exists(), "a socket file without a listener");
        Listener::bind(&path)?;
        assert!(matches!(asked(path, Request::Status).await?, Err(SocketError::NotRunning { .. })));
        Ok(())
    }
}
