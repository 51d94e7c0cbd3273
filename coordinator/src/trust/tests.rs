use std::error::Error;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cloison_proto::id::{HostId, MeshId};
use cloison_proto::key::SigningKey;
use cloison_proto::trust::{COORDINATOR_DNS_NAME, Role, SpiffeId, Trust};
use rcgen::{CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, Issuer, KeyPair, PKCS_ED25519, SanType};
use rustls::crypto::aws_lc_rs;
use rustls::{ClientConfig, ClientConnection, NamedGroup, RootCertStore, ServerConnection, version};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use super::*;
use crate::inventory::CoordinatorAddress;
use crate::store::testing::{START, TestResult, environment};

const MESH: MeshId = MeshId([7; 16]);
const HOST: HostId = HostId([8; 16]);

fn host_key() -> SigningKey {
    SigningKey::from_seed(&[3; 32])
}

fn roots() -> Result<Arc<Roots>, RootsError> {
    Roots::generate(MESH, &environment().0).map(Arc::new)
}

/// A leaf that no code of ours would issue, signed by `authority`.
fn forged(
    authority: &roots::Authority,
    names: Vec<SanType>,
    usages: Vec<ExtendedKeyUsagePurpose>,
) -> Result<CertificateDer<'static>, Box<dyn Error>> {
    let pair = |key: &SigningKey| {
        let der = key.to_pkcs8();
        KeyPair::from_pkcs8_der_and_sign_algo(&PrivatePkcs8KeyDer::from(der.as_slice()), &PKCS_ED25519)
    };
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.serial_number = Some(vec![0x41; 16].into());
    params.subject_alt_names = names;
    params.extended_key_usages = usages;
    let issuer = Issuer::from_ca_cert_der(&authority.certificate, pair(&authority.key)?)?;
    Ok(params.signed_by(&pair(&host_key())?, &issuer)?.der().clone())
}

fn uri(role: Role, mesh: MeshId) -> Result<SanType, rcgen::Error> {
    Ok(SanType::URI(SpiffeId { mesh, role }.to_string().try_into()?))
}

#[test]
fn a_certificate_speaks_for_its_host_and_its_key() -> TestResult {
    let (env, roots) = (environment().0, roots()?);
    let issued = roots.issue_host(HOST, &host_key().identity(), HostLifetime::default(), &env)?;
    let linked = HostVerifier::new(roots).host_of(&[issued.certificate], START)?;
    assert_eq!(
        linked,
        LinkedHost {
            host: HOST,
            identity: host_key().identity(),
            serial: issued.serial,
            issuer: linked.issuer,
        }
    );
    assert_eq!(issued.not_after, START.plus(HostLifetime::default().get()));
    Ok(())
}

#[test]
fn a_certificate_holds_from_an_hour_before_its_issue_to_its_end() -> TestResult {
    let (env, roots) = (environment().0, roots()?);
    let chain = [roots
        .issue_host(HOST, &host_key().identity(), HostLifetime::default(), &env)?
        .certificate];
    let verifier = HostVerifier::new(roots);
    let at = |seconds: u64| verifier.host_of(&chain, cloison_proto::version::MeshTime(seconds)).is_ok();
    assert_eq!(
        [at(START.0 - 3601), at(START.0 - 3600), at(START.0 + 86_400), at(START.0 + 86_401)],
        [false, true, true, false]
    );
    Ok(())
}

#[test]
fn no_other_certificate_speaks_for_a_host() -> TestResult {
    let (env, ours, others) = (environment().0, roots()?, roots()?);
    let client = || vec![ExtendedKeyUsagePurpose::ClientAuth];
    let host = || uri(Role::Host(HOST), MESH);
    let coordinator = uri(Role::Coordinator(ours.coordinator()), MESH)?;
    let dns = SanType::DnsName("a.example".try_into()?);
    let cases = [
        (
            "of another root",
            others
                .issue_host(HOST, &host_key().identity(), HostLifetime::default(), &env)?
                .certificate,
        ),
        ("a coordinator's own", ours.issue_coordinator(&host_key(), &env)?.swap_remove(0)),
        ("an authority's own", ours.host_issuer().certificate.clone()),
        ("the root", ours.root.certificate.clone()),
        (
            "a host's, from the coordinators' authority",
            forged(&ours.coordinator_issuer(), vec![host()?], client())?,
        ),
        ("a host's, straight from the root", forged(&ours.root, vec![host()?], client())?),
        (
            "a coordinator's name from the hosts' authority",
            forged(&ours.host_issuer(), vec![coordinator.clone()], client())?,
        ),
        ("two names", forged(&ours.host_issuer(), vec![host()?, coordinator], client())?),
        (
            "the same name twice",
            forged(&ours.host_issuer(), vec![host()?, host()?], client())?,
        ),
        ("a DNS name besides", forged(&ours.host_issuer(), vec![host()?, dns], client())?),
        ("no name", forged(&ours.host_issuer(), vec![], client())?),
        (
            "a host of another mesh",
            forged(&ours.host_issuer(), vec![uri(Role::Host(HOST), MeshId([9; 16]))?], client())?,
        ),
        ("no usage", forged(&ours.host_issuer(), vec![host()?], vec![])?),
        (
            "a server's usage",
            forged(&ours.host_issuer(), vec![host()?], vec![ExtendedKeyUsagePurpose::ServerAuth])?,
        ),
        ("no certificate", CertificateDer::from(vec![0x30, 0x00])),
    ];
    let good = forged(&ours.host_issuer(), vec![host()?], client())?;
    let verifier = HostVerifier::new(ours);
    assert!(
        verifier.host_of(std::slice::from_ref(&good), START).is_ok(),
        "the forger itself works"
    );
    for (what, certificate) in cases {
        assert!(verifier.host_of(std::slice::from_ref(&certificate), START).is_err(), "{what}");
        assert!(
            verifier.host_of(&[certificate, good.clone()], START).is_err(),
            "{what}, with a good one behind it"
        );
    }
    assert_eq!(verifier.host_of(&[], START), Err(VerifyError::None));
    Ok(())
}

/// Carries bytes between both ends until neither has more to say.
fn handshake(client: &mut ClientConnection, server: &mut ServerConnection) -> Result<(), Box<dyn Error>> {
    for _ in 0..10 {
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes)?;
        }
        server.read_tls(&mut bytes.as_slice())?;
        server.process_new_packets()?;
        bytes.clear();
        while server.wants_write() {
            server.write_tls(&mut bytes)?;
        }
        client.read_tls(&mut bytes.as_slice())?;
        client.process_new_packets()?;
    }
    Ok(())
}

fn pair(roots: &Arc<Roots>, shown: Option<CertificateDer<'static>>) -> Result<(ClientConnection, ServerConnection), Box<dyn Error>> {
    let (env, _) = environment();
    let env = crate::entropy::Environment {
        clock: crate::clock::MeshClock::over(crate::clock::SystemClock),
        ..env
    };
    let identity = ServerIdentity::new(Arc::clone(roots), env)?;
    let server = server_config(identity, Some(Arc::new(HostVerifier::new(Arc::clone(roots)))), &[b"x"])?;
    let mut trusted = RootCertStore::empty();
    trusted.add(roots.root_certificate().clone())?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&version::TLS13])?
        .with_root_certificates(trusted);
    let mut client = match shown {
        Some(certificate) => {
            let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(host_key().to_pkcs8().to_vec()));
            builder.with_client_auth_cert(vec![certificate], key)?
        }
        None => builder.with_no_client_auth(),
    };
    client.alpn_protocols = vec![b"x".to_vec()];
    let client = ClientConnection::new(Arc::new(client), COORDINATOR_DNS_NAME.try_into()?)?;
    Ok((client, ServerConnection::new(Arc::new(server))?))
}

#[test]
fn both_ends_meet_over_tls_with_a_post_quantum_exchange() -> TestResult {
    let system = crate::entropy::Environment::system();
    let roots = Arc::new(Roots::generate(MESH, &system)?);
    let issued = roots.issue_host(HOST, &host_key().identity(), HostLifetime::default(), &system)?;
    let (mut client, mut server) = pair(&roots, Some(issued.certificate.clone()))?;
    handshake(&mut client, &mut server)?;
    assert_eq!(
        server.negotiated_key_exchange_group().map(|g| g.name()),
        Some(NamedGroup::X25519MLKEM768)
    );
    assert_eq!(server.peer_certificates(), Some(&[issued.certificate][..]));
    let chain = client.peer_certificates().ok_or("no chain")?;
    assert_eq!(
        chain.last(),
        Some(roots.root_certificate()),
        "a joiner finds the root that its token pins"
    );
    Ok(())
}

#[test]
fn a_joiner_shows_no_certificate_and_a_stranger_s_is_refused() -> TestResult {
    let system = crate::entropy::Environment::system();
    let (roots, others) = (Arc::new(Roots::generate(MESH, &system)?), Roots::generate(MESH, &system)?);
    let (mut client, mut server) = pair(&roots, None)?;
    handshake(&mut client, &mut server)?;
    assert!(!server.is_handshaking() && server.peer_certificates().is_none());
    let foreign = others.issue_host(HOST, &host_key().identity(), HostLifetime::default(), &system)?;
    let (mut client, mut server) = pair(&roots, Some(foreign.certificate))?;
    assert!(handshake(&mut client, &mut server).is_err());
    Ok(())
}

#[test]
fn what_hosts_are_told_to_trust_holds_and_is_the_same_each_time() -> TestResult {
    let roots = roots()?;
    let addresses = [CoordinatorAddress {
        address: "192.0.2.1:7443".into(),
        not_before: START.plus(Duration::from_secs(9)),
    }];
    let statements = roots.statements(&addresses);
    let bytes = |all: &[cloison_proto::signed::Signed]| all.iter().map(|s| s.to_bytes()).collect::<Vec<_>>();
    assert_eq!(bytes(&statements), bytes(&roots.statements(&addresses)));
    let trust = Trust::with_items(MESH, roots.root_key(), &statements, START)?;
    assert_eq!(trust.host_issuers(), [roots.host_issuer().certificate.to_vec()]);
    assert_eq!(trust.coordinator_issuers(), [roots.coordinator_issuer().certificate.to_vec()]);
    assert!(trust.addresses().is_empty(), "not before its time");
    Ok(())
}

#[test]
fn keys_are_read_back_as_they_were_written() -> TestResult {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("trust");
    let made = Roots::create(&path, MESH, &environment().0)?;
    let read = Roots::load(&path)?;
    assert_eq!(
        (read.mesh(), read.coordinator(), read.root_pin()),
        (made.mesh(), made.coordinator(), made.root_pin())
    );
    assert_eq!(read.view_key().verifying(), made.view_key().verifying());
    assert_eq!(read.statements(&[])[0].to_bytes(), made.statements(&[])[0].to_bytes());
    assert!(matches!(
        Roots::create(&path, MESH, &environment().0),
        Err(RootsError::Exists { .. })
    ));
    for entry in fs::read_dir(&path)? {
        assert_eq!(entry?.metadata()?.permissions().mode() & 0o777, 0o600);
    }
    Ok(())
}

fn refusal(path: &Path) -> String {
    Roots::load(path).map_err(|error| error.to_string()).err().unwrap_or_default()
}

#[test]
fn missing_cut_mixed_and_open_files_are_refused_by_name() -> TestResult {
    let dir = tempfile::tempdir()?;
    let (path, other) = (dir.path().join("trust"), dir.path().join("other"));
    assert!(refusal(&path).contains("init"));
    Roots::create(&path, MESH, &environment().0)?;
    Roots::create(&other, MESH, &environment().0)?;
    let names: Vec<_> = fs::read_dir(&path)?
        .map(|entry| entry.map(|e| e.file_name()))
        .collect::<Result<_, _>>()?;
    assert_eq!(names.len(), 8);
    for name in names {
        let file = path.join(&name);
        let whole = fs::read(&file)?;
        let name = name.to_string_lossy().into_owned();
        for cut in [0, 10, whole.len() / 2, whole.len() - 30] {
            fs::write(&file, &whole[..cut])?;
            assert!(refusal(&path).contains(&name), "{name} cut to {cut}: {}", refusal(&path));
        }
        fs::remove_file(&file)?;
        assert!(refusal(&path).contains("missing"), "{name}");
        fs::write(&file, &whole)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640))?;
        assert!(refusal(&path).contains("mode 640"), "{name}: {}", refusal(&path));
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
        assert_eq!(refusal(&path), "");
    }
    for stem in ["host-issuer.key", "host-issuer.pem", "root.pem"] {
        let whole = fs::read(path.join(stem))?;
        fs::copy(other.join(stem), path.join(stem))?;
        assert!(refusal(&path).contains("beside it"), "{stem}");
        fs::write(path.join(stem), whole)?;
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    assert!(refusal(&path).contains("mode 755"));
    Ok(())
}

#[test]
fn no_private_key_is_shown() -> TestResult {
    let roots = roots()?;
    let shown = format!("{roots:?}");
    let seed = roots.view_key().seed();
    assert!(
        !shown.contains(&format!("{:?}", &seed[..8]).trim_matches(['[', ']']).to_owned()),
        "{shown}"
    );
    Ok(())
}
