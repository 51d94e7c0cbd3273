//! Who is slow on purpose: headers, bodies and frames that begin and do not end cost a connection, and no longer than its limit.

#[expect(dead_code, unreachable_pub, reason = "shared with other tests")]
#[path = "common/agent.rs"]
mod agent;
#[expect(dead_code, unreachable_pub, reason = "shared with other tests")]
mod common;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::{Coordinator, Keys};
use cloison_coordinator::api::{self, ApiServer, ApiState, TokenFacts};
use cloison_coordinator::entropy::Environment;
use cloison_coordinator::trust::{ServerIdentity, server_config};
use cloison_proto::trust::{ALPN_JOIN, ALPN_LINK, COORDINATOR_DNS_NAME};
use common::Outcome;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

/// What the coordinator gives headers, bodies, and frames; and what a busy machine may add.
const HEADERS: Duration = Duration::from_secs(5);
const BODY: Duration = Duration::from_secs(10);
const FRAME: Duration = Duration::from_secs(10);
const SLACK: Duration = Duration::from_secs(15);

/// The API of `mesh` at an address of its own, and the trust that its callers have.
async fn api_of(mesh: &Coordinator) -> Outcome<(SocketAddr, Arc<ClientConfig>)> {
    let identity = ServerIdentity::new(Arc::clone(&mesh.roots), Environment::system())?;
    let server = ApiServer::bind(([127, 0, 0, 1], 0).into(), Arc::new(server_config(identity, None, &[b"http/1.1"])?))?;
    let handle = server.handle();
    let state = ApiState {
        store: mesh.store.clone(),
        live: Arc::clone(mesh.publisher.hub()) as Arc<dyn api::Live>,
        token_facts: TokenFacts {
            root_pin: mesh.roots.root_pin(),
        },
        roots: Arc::clone(&mesh.roots),
        policies: Arc::default(),
    };
    tokio::spawn(server.serve(state));
    let address = handle.listening().await.ok_or("the API does not listen")?;
    let mut anchors = RootCertStore::empty();
    anchors.add(CertificateDer::from_pem_slice(mesh.roots.root_pem().as_bytes())?)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13])?;
    Ok((address, Arc::new(builder.with_root_certificates(anchors).with_no_client_auth())))
}

/// Sends `begun`, then a byte of `more` each second, until the server has closed. Returns what it said, and how long it took.
fn dribble(address: SocketAddr, trust: Arc<ClientConfig>, begun: &str, more: &[u8]) -> Outcome<(String, Duration)> {
    let socket = TcpStream::connect(address)?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut stream = StreamOwned::new(ClientConnection::new(trust, COORDINATOR_DNS_NAME.try_into()?)?, socket);
    stream.write_all(begun.as_bytes())?;
    let (start, mut said, mut rest) = (Instant::now(), Vec::new(), more.iter().cycle());
    while start.elapsed() < BODY + SLACK {
        let mut chunk = [0; 4096];
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(len) => {
                said.extend_from_slice(&chunk[..len]);
                if said.windows(4).any(|w| w == b"\r\n\r\n") {
                    break;
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                let byte = rest.next().ok_or("nothing more to send")?;
                if stream.write_all(&[*byte]).and_then(|()| stream.flush()).is_err() {
                    break;
                }
            }
            Err(_) => break,
        }
    }
    Ok((String::from_utf8_lossy(&said).into_owned(), start.elapsed()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_and_bodies_that_dribble_end_at_their_limits() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mesh = Coordinator::create(dir.path()).await?;
    let (address, trust) = api_of(&mesh).await?;
    let (for_headers, for_body) = (Arc::clone(&trust), trust);
    let headers = tokio::task::spawn_blocking(move || dribble(address, for_headers, "GET /v1/healthz HTTP/1.1\r\nHost: c\r\nX-", b"a"));
    let authorised = format!(
        "POST /v1/policy/check HTTP/1.1\r\nHost: c\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\nContent-Length: 60000\r\n\r\n{{",
        owner(&mesh).await?
    );
    let body = tokio::task::spawn_blocking(move || dribble(address, for_body, &authorised, b" "));
    let ((said, took), (answer, body_took)) = (headers.await??, body.await??);
    assert!(said.is_empty() || said.starts_with("HTTP/1.1 408"), "{said}");
    assert!(
        took >= HEADERS - Duration::from_secs(1) && took < HEADERS + SLACK,
        "headers: {took:?}"
    );
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(
        body_took >= BODY - Duration::from_secs(1) && body_took < BODY + SLACK,
        "body: {body_took:?}"
    );
    Ok(())
}

async fn owner(mesh: &Coordinator) -> Outcome<String> {
    use cloison_coordinator::credential::Scope;
    use cloison_coordinator::store::CredentialSpec;
    let spec = CredentialSpec {
        name: "slow".into(),
        scopes: [Scope::Owner].into(),
        lifetime: Duration::from_secs(3600),
    };
    Ok(mesh.store.create_credential(agent::LOCAL, spec).await?.text.reveal().to_string())
}

/// A stranger at a join, and a host on its link, that send half a frame and no more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_that_do_not_end_cost_the_connection() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mesh = Coordinator::create(dir.path()).await?;
    let host = mesh.enroll("app-1", 1).await?;
    let begun = Instant::now();
    let stranger = mesh.connect(ALPN_JOIN, None).await?;
    let (mut half, _challenge) = stranger.accept_bi().await?;
    half.write_all(&[0, 0]).await?;
    let known = mesh.connect(ALPN_LINK, Some((&Keys::of(1).identity, &host.certificate))).await?;
    let (mut greeting, _answers) = known.open_bi().await?;
    greeting.write_all(&[0, 0]).await?;
    for connection in [stranger, known] {
        tokio::time::timeout(FRAME + SLACK, connection.closed()).await?;
    }
    assert!(begun.elapsed() >= Duration::from_secs(1), "they had their time");
    Ok(())
}
