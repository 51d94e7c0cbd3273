//! Joins against a coordinator in this process: a quinn server with the certificates of [`Pki`] that checks both proofs.

use std::net::SocketAddr;
use std::sync::Arc;

use cloison_proto::control::frame::{Frame, FrameBuffer, Message as _};
use cloison_proto::control::join::{Challenge, Denied, EXPORTER_LABEL, verify, verify_renewal};
use cloison_proto::key::{Secret32, WgPrivateKey};
use cloison_proto::trust::ALPN_JOIN;
use rcgen::ExtendedKeyUsagePurpose::ClientAuth;

use super::*;
use crate::control::testing::{HOST, MESH, Mesh, Pki};
use crate::state::identity::load_certificate;

type Outcome = Result<(), Box<dyn std::error::Error>>;
type Made<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// What the server says to a request whose proofs hold.
#[derive(Clone, Copy, PartialEq)]
enum Answer {
    Yes,
    No,
    OtherRoot,
    OtherKey,
}

fn text(error: impl std::fmt::Display) -> Box<dyn std::error::Error + Send + Sync> {
    error.to_string().into()
}

fn serve(pki_seed: u8, answer: Answer) -> Made<SocketAddr> {
    let pki = Pki::with_seed(pki_seed).map_err(text)?;
    let chain = pki.coordinator_chain().map_err(text)?;
    let mut tls = rustls::ServerConfig::builder_with_provider(connection::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(chain, pki.coordinator_key().into())?;
    tls.alpn_protocols = vec![ALPN_JOIN.to_vec()];
    let config = quinn::ServerConfig::with_crypto(Arc::new(quinn::crypto::rustls::QuicServerConfig::try_from(tls)?));
    let endpoint = quinn::Endpoint::server(config, (std::net::Ipv4Addr::LOCALHOST, 0).into())?;
    let address = endpoint.local_addr()?;
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            // A refused handshake is what some tests are about.
            let _ = one(incoming, &pki, answer).await;
        }
    });
    Ok(address)
}

async fn one(incoming: quinn::Incoming, pki: &Pki, answer: Answer) -> Made<()> {
    let connection = incoming.await?;
    let (mut send, mut receive) = connection.open_bi().await?;
    let ephemeral = WgPrivateKey::from_bytes([42; 32]);
    let challenge = Challenge {
        ephemeral: *ephemeral.public().as_bytes(),
    };
    send.write_all(&challenge.to_frame().to_bytes()?).await?;
    let mut buffer = FrameBuffer::default();
    let frame = loop {
        if let Some(frame) = buffer.next_frame()? {
            break frame;
        }
        let chunk = receive.read_chunk(65_536, true).await?.ok_or("closed")?;
        buffer.push(&chunk.bytes);
    };
    let mut exporter = [0; 32];
    connection
        .export_keying_material(&mut exporter, EXPORTER_LABEL, &[])
        .map_err(|_| "no exporter")?;
    let reply = reply(&frame, &exporter, &ephemeral, pki, answer)?;
    send.write_all(&reply.to_bytes()?).await?;
    connection.closed().await;
    Ok(())
}

fn reply(frame: &Frame, exporter: &[u8; 32], ephemeral: &WgPrivateKey, pki: &Pki, answer: Answer) -> Made<Frame> {
    let identity = match JoinMessage::from_frame(frame)?.ok_or("unknown kind")? {
        JoinMessage::JoinRequest(request) => {
            verify(exporter, &request, &ephemeral.to_secret())?;
            if request.secret != [6; 32] || answer == Answer::No {
                return Ok(Denied {}.to_frame());
            }
            request.identity
        }
        JoinMessage::RenewRequest(request) => {
            verify_renewal(exporter, &request)?;
            request.identity
        }
        JoinMessage::Challenge(_) | JoinMessage::Joined(_) | JoinMessage::Denied(_) => return Err("not a request".into()),
    };
    let mesh = Mesh::new();
    let uri = format!("spiffe://{MESH}/host/{HOST}");
    let certificate = if answer == Answer::OtherKey {
        pki.host_leaf(&uri, &[ClientAuth])
    } else {
        pki.host_leaf_of(&uri, &[ClientAuth], &identity)
    };
    let root = if answer == Answer::OtherRoot { &mesh.signer } else { &mesh.root };
    Ok(Joined {
        mesh: MESH,
        host: HOST,
        name: "db-1".parse()?,
        certificate: certificate.map_err(text)?,
        root: *root.verifying().as_bytes(),
        trust: mesh.trust_items(Some(pki)),
        components: vec!["postgres".parse()?],
    }
    .to_frame())
}

fn token(address: SocketAddr, secret: u8) -> Result<String, Box<dyn std::error::Error>> {
    let token = EnrollmentToken {
        id: cloison_proto::id::TokenId([5; 8]),
        secret: Secret32::from_bytes([secret; 32]),
        mesh: MESH,
        root_pin: Pki::new()?.pin(),
        expires: MeshTime(Pki::new()?.now() + 3_600),
        addresses: vec![address.to_string()],
    };
    Ok(token.to_text()?.to_string())
}

fn served(answer: Answer) -> Result<SocketAddr, Box<dyn std::error::Error>> {
    serve(10, answer).map_err(|e| e.to_string().into())
}

fn now() -> Result<WallTime, Box<dyn std::error::Error>> {
    Ok(WallTime(Pki::new()?.now()))
}

#[tokio::test]
async fn a_join_stores_who_we_are_and_a_second_one_is_refused_locally() -> Outcome {
    let folder = tempfile::tempdir()?;
    let dir = StateDir::open(folder.path())?;
    let text = token(served(Answer::Yes)?, 6)?;
    let enrolled = join(&dir, &text, &[], now()?).await?;
    assert_eq!((enrolled.host, enrolled.name.as_str(), enrolled.warnings.len()), (HOST, "db-1", 0));
    let us = Membership::load(&dir)?.ok_or("no membership")?;
    assert_eq!((us.mesh, us.host), (MESH, HOST));
    assert!(!us.trust_at(us.known_time)?.coordinator_issuers().is_empty());
    assert!(load_certificate(&dir)?.is_some());
    let again = join(&dir, &text, &[], now()?).await.err().ok_or("joined twice")?;
    assert!(matches!(again, EnrollError::AlreadyEnrolled { .. }), "{again}");
    Ok(())
}

#[tokio::test]
async fn a_wrong_clock_stops_no_join_and_is_said() -> Outcome {
    for wall in [0, 4_000_000_000] {
        let folder = tempfile::tempdir()?;
        let dir = StateDir::open(folder.path())?;
        let enrolled = join(&dir, &token(served(Answer::Yes)?, 6)?, &[], WallTime(wall)).await?;
        assert_eq!(enrolled.warnings, [CLOCK_OFF], "{wall}");
    }
    Ok(())
}

#[tokio::test]
async fn a_refusal_stores_nothing_and_names_an_expiry_that_this_host_can_see() -> Outcome {
    let folder = tempfile::tempdir()?;
    let dir = StateDir::open(folder.path())?;
    let address = served(Answer::Yes)?;
    let refused = join(&dir, &token(address, 7)?, &[], now()?)
        .await
        .err()
        .ok_or("joined with a wrong secret")?;
    assert!(
        matches!(refused, EnrollError::Denied) && refused.hint().contains("audit"),
        "{refused}"
    );
    let late = WallTime(now()?.0 + 4_000);
    let refused = join(&dir, &token(address, 7)?, &[], late).await.err().ok_or("joined")?;
    assert!(matches!(refused, EnrollError::Expired { ago: 400 }), "{refused}");
    assert!(Membership::load(&dir)?.is_none() && load_certificate(&dir)?.is_none());
    let refused = join(&dir, &token(served(Answer::No)?, 6)?, &[], now()?)
        .await
        .err()
        .ok_or("joined")?;
    assert!(refused.is_denied());
    Ok(())
}

#[tokio::test]
async fn a_server_of_another_root_gets_no_secret_and_an_answer_that_does_not_hold_is_not_stored() -> Outcome {
    let folder = tempfile::tempdir()?;
    let dir = StateDir::open(folder.path())?;
    let stranger = serve(60, Answer::Yes).map_err(|e| e.to_string())?;
    let refused = join(&dir, &token(stranger, 6)?, &[], now()?)
        .await
        .err()
        .ok_or("joined a stranger")?;
    assert!(
        matches!(&refused, EnrollError::Unreachable { tried } if matches!(tried.as_slice(), [ConnectionError::Untrusted { .. }])),
        "{refused}"
    );
    for answer in [Answer::OtherRoot, Answer::OtherKey] {
        let refused = join(&dir, &token(served(answer)?, 6)?, &[], now()?)
            .await
            .err()
            .ok_or("took a bad answer")?;
        assert!(matches!(refused, EnrollError::Answer(_) | EnrollError::Certificate(_)), "{refused}");
    }
    assert!(Membership::load(&dir)?.is_none());
    Ok(())
}

#[tokio::test]
async fn no_coordinator_and_no_token_are_told_apart() -> Outcome {
    let folder = tempfile::tempdir()?;
    let dir = StateDir::open(folder.path())?;
    let closed = std::net::UdpSocket::bind("127.0.0.1:0")?.local_addr()?;
    let refused = join(&dir, &token(closed, 6)?, &[], now()?).await.err().ok_or("joined nobody")?;
    assert!(matches!(refused, EnrollError::Unreachable { .. }), "{refused}");
    let refused = join(&dir, "cloison1_abc", &[], now()?).await.err().ok_or("joined by nonsense")?;
    assert!(matches!(refused, EnrollError::Token(_)), "{refused}");
    Ok(())
}

#[tokio::test]
async fn an_enrolled_host_renews_its_certificate_by_its_identity_key() -> Outcome {
    let folder = tempfile::tempdir()?;
    let dir = StateDir::open(folder.path())?;
    let address = served(Answer::Yes)?;
    join(&dir, &token(address, 6)?, &[], now()?).await?;
    dir.remove(crate::state::File::Certificate)?;
    let us = Membership::load(&dir)?.ok_or("no membership")?;
    let keys = HostKeys::load(&dir)?.ok_or("no keys")?;
    let attempt = Attempt {
        mesh: MESH,
        anchors: Anchors::of(&us.trust_at(us.known_time)?),
        wall: now()?,
        past: us.known_time,
    };
    let window = renew(&dir, &us, &address.to_string(), attempt, &keys.identity).await?.window;
    assert!(!window.ended_at(MeshTime(now()?.0)) && load_certificate(&dir)?.is_some());
    Ok(())
}
