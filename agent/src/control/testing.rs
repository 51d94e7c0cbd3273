//! A small mesh for tests: keys, certificates, views and leases of a coordinator that this host trusts.

use std::error::Error;
use std::time::Duration;

use cloison_proto::id::{CoordinatorId, HostId, MeshId, RuleId};
use cloison_proto::key::{IdentityKey, SigningKey, WgPrivateKey};
use cloison_proto::lease::Lease;
use cloison_proto::net::OverlayRange;
use cloison_proto::policy::Attachment;
use cloison_proto::signed::Signed;
use cloison_proto::trust::{COORDINATOR_DNS_NAME, Role, SpiffeId, Statement, TrustKind, root_pin};
use cloison_proto::version::{MeshTime, Version};
use cloison_proto::view::{Config, Grant, Header, Items, LocalInstance, Peer, RemoteInstance, RuleItem, SelfHost, VerifiedView};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ED25519, SanType,
    SubjectPublicKeyInfo,
};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};

use crate::state::identity::Membership;
use crate::state::view_cache::HeldLease;

pub(crate) const MESH: MeshId = MeshId([1; 16]);
pub(crate) const HOST: HostId = HostId([2; 16]);
pub(crate) const PEER: HostId = HostId([3; 16]);

type Made<T> = Result<T, Box<dyn Error>>;

/// What a coordinator signs.
pub(crate) struct Mesh {
    pub(crate) root: SigningKey,
    pub(crate) signer: SigningKey,
}

impl Mesh {
    pub(crate) fn new() -> Self {
        Self {
            root: SigningKey::from_seed(&[10; 32]),
            signer: SigningKey::from_seed(&[11; 32]),
        }
    }

    pub(crate) fn statement(&self, kind: TrustKind, value: Vec<u8>) -> Signed {
        let statement = Statement {
            mesh: MESH,
            kind,
            value,
            not_before: MeshTime(0),
        };
        statement.sign(&self.root)
    }

    /// The signer, and the issuers of `pki` if there is one.
    pub(crate) fn trust_items(&self, pki: Option<&Pki>) -> Vec<Signed> {
        let mut items = vec![self.statement(TrustKind::ViewSigner, self.signer.verifying().as_bytes().to_vec())];
        if let Some(pki) = pki {
            items.push(self.statement(TrustKind::CoordinatorIssuer, pki.coordinator_issuer_der().to_vec()));
            items.push(self.statement(TrustKind::HostIssuer, pki.host_issuer_der().to_vec()));
        }
        items
    }

    pub(crate) fn membership(&self) -> Made<Membership> {
        Ok(Membership {
            mesh: MESH,
            host: HOST,
            name: "app-1".parse()?,
            root: self.root.verifying(),
            trust: self.trust_items(None),
            known_time: MeshTime(500),
            addresses: Vec::new(),
        })
    }

    /// The items of the host of `n8n`, which may reach these ports of `postgres` on another host.
    pub(crate) fn items(&self, ports: &[&str]) -> Made<Items> {
        let range = OverlayRange::new([10, 77, 0, 0].into(), 16, "fd12:3456:789a::".parse()?)?;
        let addresses = |index| range.nth(index).ok_or("outside the range");
        let mut items = Items::default();
        let config = Config {
            overlay: range,
            lease: Duration::from_secs(86_400),
        };
        config.put_in(&mut items);
        let key = |seed| WgPrivateKey::from_bytes([seed; 32]).public();
        let host = SelfHost {
            id: HOST,
            name: "app-1".parse()?,
            wg_keys: vec![key(1)],
        };
        host.put_in(&mut items);
        let local = LocalInstance {
            component: "n8n".parse()?,
            attachment: Attachment::Host,
            addresses: addresses(0)?,
        };
        local.put_in(&mut items);
        let peer = Peer {
            id: PEER,
            name: "db-1".parse()?,
            wg_keys: vec![key(2)],
            psk_generation: 0,
        };
        peer.put_in(&mut items);
        let remote = RemoteInstance {
            component: "postgres".parse()?,
            host: PEER,
            addresses: addresses(1)?,
        };
        remote.put_in(&mut items);
        let grant = |text: &&str| {
            Ok::<_, Box<dyn Error>>(Grant {
                ports: text.parse()?,
                service: Some("sql".parse()?),
            })
        };
        let rule = RuleItem {
            id: RuleId([9; 16]),
            from: "n8n".parse()?,
            to: "postgres".parse()?,
            grants: ports.iter().map(grant).collect::<Result<_, _>>()?,
            expires: MeshTime::NEVER,
        };
        rule.put_in(&mut items);
        Ok(items)
    }

    pub(crate) fn header(&self, items: &Items, revision: u64) -> Signed {
        let header = Header {
            mesh: MESH,
            host: HOST,
            version: Version { generation: 1, revision },
            state_hash: items.hash(),
        };
        header.sign(&self.signer)
    }

    pub(crate) fn view(&self, revision: u64, ports: &[&str]) -> Made<VerifiedView> {
        let items = self.items(ports)?;
        let keys = self.signer.verifying();
        Ok(VerifiedView::open(self.header(&items, revision), items, &keys, (MESH, HOST), None)?)
    }

    pub(crate) fn lease(&self, view: &VerifiedView, issued_at: u64, valid_for_secs: u64) -> HeldLease {
        let header = view.header();
        let lease = Lease {
            mesh: MESH,
            host: HOST,
            version: header.version,
            state_hash: header.state_hash,
            issued_at: MeshTime(issued_at),
            valid_for_secs,
        };
        HeldLease {
            signed: lease.sign(&self.signer),
            lease,
        }
    }
}

/// The certificate authorities of a mesh, and leaves of theirs.
pub(crate) struct Pki {
    seed: u8,
    root_der: CertificateDer<'static>,
    coordinators: Issuer<'static, KeyPair>,
    coordinators_der: CertificateDer<'static>,
    hosts: Issuer<'static, KeyPair>,
    hosts_der: CertificateDer<'static>,
}

impl Pki {
    pub(crate) fn new() -> Made<Self> {
        Self::with_seed(10)
    }

    /// Keys are made of `seed` and the numbers after it: the root's is [`Mesh::new`]'s for seed 10.
    pub(crate) fn with_seed(seed: u8) -> Made<Self> {
        let params = authority("root")?;
        let key = key_pair(seed)?;
        let root_der = params.self_signed(&key)?.der().clone();
        let root = Issuer::new(params, key);
        let issuer = |number: u8, name: &str| {
            let (params, key) = (authority(name)?, key_pair(number)?);
            let der = params.signed_by(&key, &root)?.der().clone();
            Ok::<_, Box<dyn Error>>((Issuer::new(params, key), der))
        };
        let (coordinators, coordinators_der) = issuer(seed + 2, "coordinators")?;
        let (hosts, hosts_der) = issuer(seed + 3, "hosts")?;
        Ok(Self {
            seed,
            root_der,
            coordinators,
            coordinators_der,
            hosts,
            hosts_der,
        })
    }

    /// A second inside the validity of every certificate.
    pub(crate) fn now(&self) -> u64 {
        1_800_000_000
    }

    pub(crate) fn pin(&self) -> [u8; 32] {
        root_pin(&SigningKey::from_seed(&[self.seed; 32]).verifying())
    }

    pub(crate) fn root_der(&self) -> CertificateDer<'static> {
        self.root_der.clone()
    }

    pub(crate) fn coordinator_issuer_der(&self) -> CertificateDer<'static> {
        self.coordinators_der.clone()
    }

    pub(crate) fn host_issuer_der(&self) -> CertificateDer<'static> {
        self.hosts_der.clone()
    }

    /// The coordinator's leaf, its issuer, the root.
    pub(crate) fn coordinator_chain(&self) -> Made<Vec<CertificateDer<'static>>> {
        let id = SpiffeId {
            mesh: MESH,
            role: Role::Coordinator(CoordinatorId([4; 16])),
        };
        let leaf = leaf(&id.to_string(), &[ExtendedKeyUsagePurpose::ServerAuth])?;
        let der = leaf.signed_by(&key_pair(self.seed + 4)?, &self.coordinators)?.der().clone();
        Ok(vec![der, self.coordinators_der.clone(), self.root_der.clone()])
    }

    /// The private key of the coordinator's leaf.
    pub(crate) fn coordinator_key(&self) -> PrivatePkcs8KeyDer<'static> {
        PrivatePkcs8KeyDer::from(SigningKey::from_seed(&[self.seed + 4; 32]).to_pkcs8().to_vec())
    }

    /// The identity key that [`Pki::host_leaf`] certifies.
    pub(crate) fn host_key(&self) -> SigningKey {
        SigningKey::from_seed(&[self.seed + 5; 32])
    }

    pub(crate) fn host_leaf(&self, uri: &str, usages: &[ExtendedKeyUsagePurpose]) -> Made<Vec<u8>> {
        self.host_leaf_of(uri, usages, &self.host_key().identity())
    }

    /// A leaf for a key of which only the public half is known.
    pub(crate) fn host_leaf_of(&self, uri: &str, usages: &[ExtendedKeyUsagePurpose], key: &IdentityKey) -> Made<Vec<u8>> {
        // SEQUENCE { SEQUENCE { OID 1.3.101.112 }, BIT STRING } and the key: RFC 8410 section 4.
        let head = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
        let key = SubjectPublicKeyInfo::from_der(&[&head[..], key.as_bytes()].concat())?;
        Ok(leaf(uri, usages)?.signed_by(&key, &self.hosts)?.der().to_vec())
    }
}

fn key_pair(seed: u8) -> Made<KeyPair> {
    let pkcs8 = SigningKey::from_seed(&[seed; 32]).to_pkcs8();
    Ok(KeyPair::from_pkcs8_der_and_sign_algo(
        &PrivatePkcs8KeyDer::from(pkcs8.as_slice()),
        &PKCS_ED25519,
    )?)
}

fn authority(name: &str) -> Made<CertificateParams> {
    let mut params = leaf_params()?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    Ok(params)
}

fn leaf(uri: &str, usages: &[ExtendedKeyUsagePurpose]) -> Made<CertificateParams> {
    let mut params = leaf_params()?;
    params.subject_alt_names = vec![SanType::URI(uri.try_into()?), SanType::DnsName(COORDINATOR_DNS_NAME.try_into()?)];
    params.extended_key_usages = usages.to_vec();
    Ok(params)
}

fn leaf_params() -> Made<CertificateParams> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.not_before = rcgen::date_time_ymd(2026, 1, 1);
    params.not_after = rcgen::date_time_ymd(2027, 12, 1);
    Ok(params)
}
