//! A host whose state is written by hand, and its view signed by hand: no coordinator ever saw it. The agent starts from it through the
//! same loader as from a view that it was sent.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use cloison_agent::state::clock::Moment;
use cloison_agent::state::identity::Membership;
use cloison_agent::state::view_cache::{self, HeldLease};
use cloison_agent::state::{File, StateDir};
use cloison_proto::id::{HostId, MeshId, RuleId};
use cloison_proto::key::{SigningKey, WgPrivateKey};
use cloison_proto::lease::Lease;
use cloison_proto::net::{AddressPair, OverlayRange, PortSpec};
use cloison_proto::policy::Attachment;
use cloison_proto::trust::{Statement, TrustKind};
use cloison_proto::version::{MeshTime, Version};
use cloison_proto::view::{Config, Grant, Header, Items, LocalInstance, Peer, RemoteInstance, RuleItem, SelfHost, VerifiedView};

const MESH: MeshId = MeshId([7; 16]);
const ISSUED: MeshTime = MeshTime(1_800_000_000);
const LEASE: Duration = Duration::from_secs(86_400);

/// One of the two hosts of a mesh that is made by hand. Its name is its component's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByHand {
    /// Host and component.
    pub name: &'static str,
    /// All its keys and addresses follow from this number.
    pub number: u8,
}

impl ByHand {
    /// Its WireGuard key.
    #[must_use]
    pub fn wg_key(self) -> WgPrivateKey {
        WgPrivateKey::from_bytes([0x20 + self.number; 32])
    }

    /// Its overlay addresses.
    ///
    /// # Errors
    /// If the range is too small for its number.
    pub fn addresses(self) -> Result<AddressPair> {
        range()?.nth(self.number.into()).context("the range is too small")
    }

    fn host(self) -> HostId {
        HostId([self.number; 16])
    }

    /// Writes the state of this host into `dir`: enrolled, with a view in force that lets it and `other` reach each other on `ports`.
    ///
    /// # Errors
    /// If something cannot be written.
    pub fn write(self, dir: &Path, other: Self, endpoint: Option<SocketAddr>, ports: &[PortSpec]) -> Result<()> {
        let dir = StateDir::open(dir)?;
        let (root, signer) = (SigningKey::from_seed(&[0x50; 32]), SigningKey::from_seed(&[0x51; 32]));
        dir.write(File::IdentityKey, &[0x30 + self.number; 32])?;
        dir.write(File::WgKey, &[0x20 + self.number; 32])?;
        let statement = Statement {
            mesh: MESH,
            kind: TrustKind::ViewSigner,
            value: signer.verifying().as_bytes().to_vec(),
            not_before: MeshTime(0),
        };
        let membership = Membership {
            mesh: MESH,
            host: self.host(),
            name: self.name.parse()?,
            root: root.verifying(),
            trust: vec![statement.sign(&root)],
            known_time: ISSUED,
            addresses: vec!["192.0.2.99:7443".into()],
        };
        membership.store(&dir)?;
        let view = self.view(other, ports, &signer)?;
        view_cache::store_view(&dir, &view)?;
        let lease = Lease {
            mesh: MESH,
            host: self.host(),
            version: view.header().version,
            state_hash: view.header().state_hash,
            issued_at: ISSUED,
            valid_for_secs: LEASE.as_secs(),
        };
        let held = HeldLease {
            signed: lease.sign(&signer),
            lease,
        };
        view_cache::store_lease(&dir, &held, LEASE, (ISSUED, true), &Moment::now())?;
        view_cache::store_endpoints(&dir, &endpoint.map(|at| (other.host(), at)).into_iter().collect::<BTreeMap<_, _>>())?;
        Ok(())
    }

    fn view(self, other: Self, ports: &[PortSpec], signer: &SigningKey) -> Result<VerifiedView> {
        let mut items = Items::default();
        Config {
            overlay: range()?,
            lease: LEASE,
        }
        .put_in(&mut items);
        SelfHost {
            id: self.host(),
            name: self.name.parse()?,
            wg_keys: vec![self.wg_key().public()],
        }
        .put_in(&mut items);
        LocalInstance {
            component: self.name.parse()?,
            attachment: Attachment::Host,
            addresses: self.addresses()?,
        }
        .put_in(&mut items);
        Peer {
            id: other.host(),
            name: other.name.parse()?,
            wg_keys: vec![other.wg_key().public()],
            psk_generation: 0,
        }
        .put_in(&mut items);
        RemoteInstance {
            component: other.name.parse()?,
            host: other.host(),
            addresses: other.addresses()?,
        }
        .put_in(&mut items);
        for (id, from, to) in [(1, self, other), (2, other, self)] {
            RuleItem {
                id: RuleId([id; 16]),
                from: from.name.parse()?,
                to: to.name.parse()?,
                grants: ports
                    .iter()
                    .map(|ports| Grant {
                        ports: *ports,
                        service: None,
                    })
                    .collect(),
                expires: MeshTime::NEVER,
            }
            .put_in(&mut items);
        }
        let header = Header {
            mesh: MESH,
            host: self.host(),
            version: Version {
                generation: 1,
                revision: 1,
            },
            state_hash: items.hash(),
        };
        Ok(VerifiedView::open(
            header.sign(signer),
            items,
            &signer.verifying(),
            (MESH, self.host()),
            None,
        )?)
    }
}

fn range() -> Result<OverlayRange> {
    Ok(OverlayRange::new([10, 77, 0, 0].into(), 16, "fd12:3456:789a::".parse()?)?)
}
