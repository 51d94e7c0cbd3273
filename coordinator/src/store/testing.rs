//! What the tests of this crate begin with: a mesh in memory or in a directory, a clock that they move, and hosts that ask to join.

use std::error::Error;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cloison_proto::id::{HostId, MeshId};
use cloison_proto::key::{Secret32, SigningKey, WgPrivateKey};
use cloison_proto::label::LabelSet;
use cloison_proto::net::OverlayRange;
use cloison_proto::version::MeshTime;

use super::{NewMesh, NewToken, OpenError, PolicyWrite, Redemption, Store, StoreError, TokenSpec};
use crate::audit::{Actor, Context};
use crate::clock::{ManualClock, MeshClock};
use crate::entropy::{Environment, SystemEntropy};
use crate::inventory::{CoordinatorAddress, On, Placement};

pub(crate) type TestResult = Result<(), Box<dyn Error>>;

pub(crate) const LOCAL: Context = Context::of(Actor::Local);

/// When every test begins.
pub(crate) const START: MeshTime = MeshTime(1_800_000_000);

pub(crate) fn new_mesh() -> Result<NewMesh, Box<dyn Error>> {
    Ok(NewMesh {
        mesh: MeshId([7; 16]),
        overlay: OverlayRange::new([10, 77, 0, 0].into(), 16, "fd12:3456:789a::".parse()?)?,
        lease: Duration::from_secs(86_400),
        addresses: vec![CoordinatorAddress {
            address: "192.0.2.1:7443".into(),
            not_before: START,
        }],
    })
}

pub(crate) fn environment() -> (Environment, ManualClock) {
    let clock = ManualClock::starting_at(START);
    (
        Environment {
            clock: MeshClock::over(clock.clone()),
            entropy: Arc::new(SystemEntropy),
        },
        clock,
    )
}

pub(crate) async fn in_memory() -> Result<(Store, ManualClock), Box<dyn Error>> {
    let (env, clock) = environment();
    Ok((Store::in_memory(env, new_mesh()?).await?, clock))
}

pub(crate) async fn on_disk(path: &Path) -> Result<(Store, ManualClock), Box<dyn Error>> {
    let (env, clock) = environment();
    Ok((Store::create(path, env, new_mesh()?).await?, clock))
}

pub(crate) async fn reopen(path: &Path) -> Result<Store, OpenError> {
    Store::open(path, environment().0).await
}

impl Store {
    /// Keeps the writer busy until the answer is dropped.
    pub(crate) async fn hang(&self) -> Result<impl Sized, StoreError> {
        self.begin_unjudged(LOCAL, super::change::Urgency::Always).await
    }
}

/// A token for one host, an hour long.
pub(crate) fn spec(name: &str) -> Result<TokenSpec, Box<dyn Error>> {
    Ok(TokenSpec {
        uses: 1,
        lifetime: Duration::from_secs(3600),
        name: name.parse()?,
        labels: LabelSet::new(),
        source: None,
    })
}

/// The attempt of the machine number `machine` to join by `token`.
pub(crate) fn attempt(token: &NewToken, machine: u8) -> Redemption {
    Redemption {
        token: token.id,
        secret: Secret32::from_bytes(*token.secret.expose()),
        wg_key: WgPrivateKey::from_bytes([machine; 32]).public(),
        identity: SigningKey::from_seed(&[machine; 32]).identity(),
        source: IpAddr::from([192, 0, 2, machine]),
    }
}

/// A host that joined by a token of its own.
pub(crate) async fn joined(store: &Store, name: &str, machine: u8) -> Result<HostId, Box<dyn Error>> {
    let token = store.create_token(LOCAL, spec(name)?).await?;
    Ok(store.redeem_token(&attempt(&token, machine)).await?.host.id)
}

/// A policy that puts each component on the hosts of these names.
pub(crate) fn policy(placements: &[(&str, &[&str])]) -> Result<PolicyWrite, Box<dyn Error>> {
    let placements = placements.iter().map(|(component, hosts)| {
        let on = hosts.iter().map(|host| Ok(On::Name(host.parse()?)));
        Ok::<_, Box<dyn Error>>(Placement {
            component: component.parse()?,
            on: on.collect::<Result<_, Box<dyn Error>>>()?,
        })
    });
    Ok(PolicyWrite {
        text: "version: 1".into(),
        placements: placements.collect::<Result<_, _>>()?,
    })
}
