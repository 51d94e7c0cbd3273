//! The view that was in force, its lease, the floor below which no view is accepted, and where peers were last heard.
//!
//! At a start the view is verified again like one that just came: signature, addressee, version against the floor, hash, content. A view
//! that does not hold is treated as none: nothing is allowed, `status` says why, and the coordinator sends it again. The floor has a file
//! of its own, so that a lost view does not open the way to an older one (I12), and with it the mesh's ranges, so that it does not let
//! anything out in clear either (I14).

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cloison_proto::id::HostId;
use cloison_proto::lease::Lease;
use cloison_proto::net::OverlayRange;
use cloison_proto::signed::Signed;
use cloison_proto::trust::Trust;
use cloison_proto::version::{MeshTime, Version};
use cloison_proto::view::{Floor, VerifiedView};
use serde::{Deserialize, Serialize};

use super::clock::{MeshClock, Moment, Remainder};
use super::identity::Membership;
use super::{File, StateDir, StateError};

/// A verified lease, and the signed bytes to keep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldLease {
    /// As it was received.
    pub signed: Signed,
    /// What it says.
    pub lease: Lease,
}

impl HeldLease {
    /// Whether it is a lease for exactly this view.
    #[must_use]
    pub fn covers(&self, view: &VerifiedView) -> bool {
        let header = view.header();
        self.lease.covers(header.mesh, header.host, header.version, header.state_hash)
    }
}

/// What a start finds.
#[derive(Debug)]
pub struct Cached {
    /// The view, if it holds.
    pub view: Option<VerifiedView>,
    /// Its lease and what is left of it, if that holds and is for this view.
    pub lease: Option<(HeldLease, Duration)>,
    /// What a later view must not fall behind.
    pub floor: Option<Floor>,
    /// The mesh's ranges, as the newest view said.
    pub overlay: Option<OverlayRange>,
    /// Mesh time, as well as it is known.
    pub clock: MeshClock,
    /// Whom to trust.
    pub trust: Trust,
    /// What was on disk and cannot be used, for `status` and the log.
    pub problems: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredFloor {
    version: Version,
    state_hash: String,
    overlay: OverlayRange,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredLease {
    lease: String,
    left: Remainder,
    mesh_time: MeshTime,
    /// Whether leases had told it, or it was a guess.
    told: bool,
}

/// Reads and verifies what is kept.
///
/// # Errors
/// [`StateError`] for a floor that cannot be read, for trust that does not hold, and for a disk that fails; a damaged view or lease is no
/// error but a problem of [`Cached::problems`].
pub fn load(dir: &StateDir, us: &Membership, now: &Moment) -> Result<Cached, StateError> {
    let mut problems = Vec::new();
    let mut note = |error: StateError| match error {
        damaged @ (StateError::Damaged { .. } | StateError::Format { .. }) => {
            problems.push(damaged.to_string());
            Ok(())
        }
        fatal @ (StateError::Io { .. } | StateError::Owner { .. } | StateError::Locked { .. }) => Err(fatal),
    };
    let stored_lease = match read_lease(dir) {
        Ok(stored) => stored,
        Err(e) => note(e).map(|()| None)?,
    };
    let known = stored_lease.as_ref().map_or(us.known_time, |s| s.mesh_time.max(us.known_time));
    let trust = us.trust_at(known).map_err(|e| dir.damaged(File::Membership, e))?;
    let (floor, overlay) = load_floor(dir)?.unzip();
    let view = match read_view(dir, us, &trust, floor) {
        Ok(view) => view,
        Err(e) => note(e).map(|()| None)?,
    };
    let floor = view.as_ref().map(VerifiedView::floor).or(floor);
    let overlay = view.as_ref().map(|v| v.content().config.overlay).or(overlay);
    let mut clock = MeshClock::guess(known, now.boottime);
    let mut lease = None;
    if let Some(stored) = stored_lease {
        match open_lease(dir, &stored, &trust) {
            Ok(held) => {
                let left = stored.left.left_at(now).min(Duration::from_secs(held.lease.valid_for_secs));
                let mesh = MeshTime(held.lease.ends_at().0.saturating_sub(left.as_secs())).max(known);
                clock = match (stored.told, stored.left.same_boot(now)) {
                    // Whole seconds are kept: rounded up, or restarts one after the other would hold the time back.
                    (true, Some(since)) => MeshClock::resumed(stored.mesh_time.plus(Duration::from_secs(1)), since),
                    (true, None) => MeshClock::guess(mesh, now.boottime).not_before(stored.mesh_time),
                    (false, _) => MeshClock::guess(mesh, now.boottime),
                };
                lease = Some((held, left)).filter(|(held, _)| view.as_ref().is_some_and(|v| held.covers(v)));
            }
            Err(e) => note(e)?,
        }
    }
    Ok(Cached {
        view,
        lease,
        floor,
        overlay,
        clock,
        trust,
        problems,
    })
}

/// The mesh's ranges, for a machine that is just starting: as the newest view said that was in force. `None` if there was none yet. A floor
/// that is damaged is no reason to let anything out in clear: the view, if it holds, says the same.
///
/// # Errors
/// [`StateError`] if neither can be read.
pub fn overlay(dir: &StateDir, us: &Membership) -> Result<Option<OverlayRange>, StateError> {
    let error = match load_floor(dir) {
        Ok(Some((_, overlay))) => return Ok(Some(overlay)),
        Ok(None) => None,
        Err(error @ StateError::Damaged { .. }) => Some(error),
        Err(error) => return Err(error),
    };
    let trust = us.trust_at(us.known_time).map_err(|e| dir.damaged(File::Membership, e))?;
    match (read_view(dir, us, &trust, None), error) {
        (Ok(Some(view)), _) => Ok(Some(view.content().config.overlay)),
        (_, Some(error)) => Err(error),
        (Ok(None), None) => Ok(None),
        (Err(error), None) => Err(error),
    }
}

/// Keeps a view that is about to be in force, and raises the floor to it. The view goes first: a floor above the view kept would refuse it.
///
/// # Errors
/// [`StateError`].
pub fn store_view(dir: &StateDir, view: &VerifiedView) -> Result<(), StateError> {
    dir.write(File::View, &view.to_bytes())?;
    let floor = view.floor();
    let stored = StoredFloor {
        version: floor.version,
        state_hash: floor.state_hash.to_string(),
        overlay: view.content().config.overlay,
    };
    write_json(dir, File::Floor, &stored)
}

/// Keeps a lease and what is left of it at `now`.
///
/// # Errors
/// [`StateError`].
pub fn store_lease(
    dir: &StateDir,
    lease: &HeldLease,
    left: Duration,
    (mesh_time, told): (MeshTime, bool),
    now: &Moment,
) -> Result<(), StateError> {
    let stored = StoredLease {
        lease: STANDARD.encode(lease.signed.to_bytes()),
        left: Remainder::new(left, now),
        mesh_time,
        told,
    };
    write_json(dir, File::Lease, &stored)
}

/// Keeps where peers were last heard.
///
/// # Errors
/// [`StateError`].
pub fn store_endpoints(dir: &StateDir, endpoints: &BTreeMap<HostId, SocketAddr>) -> Result<(), StateError> {
    write_json(dir, File::Endpoints, endpoints)
}

/// Where peers were last heard; nothing if that is not known.
///
/// # Errors
/// [`StateError::Io`].
pub fn load_endpoints(dir: &StateDir) -> Result<BTreeMap<HostId, SocketAddr>, StateError> {
    match dir.read(File::Endpoints) {
        Ok(body) => Ok(body.and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default()),
        Err(StateError::Damaged { path, why, .. }) => {
            tracing::warn!(path = %path.display(), why, "the peers' last endpoints are lost; the coordinator's hints take their place");
            Ok(BTreeMap::new())
        }
        Err(e) => Err(e),
    }
}

/// Keeps with whom there are sessions.
///
/// # Errors
/// [`StateError`].
pub fn store_live(dir: &StateDir, live: &BTreeSet<HostId>) -> Result<(), StateError> {
    write_json(dir, File::Live, live)
}

/// With whom there were sessions; `None` if that is not known.
///
/// # Errors
/// [`StateError::Io`].
pub fn load_live(dir: &StateDir) -> Result<Option<BTreeSet<HostId>>, StateError> {
    match dir.read(File::Live) {
        Ok(body) => Ok(body.and_then(|b| serde_json::from_slice(&b).ok())),
        Err(StateError::Damaged { path, why, .. }) => {
            tracing::warn!(path = %path.display(), why, "with whom there were sessions is lost; beginning one with every peer");
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

fn write_json<T: Serialize>(dir: &StateDir, file: File, value: &T) -> Result<(), StateError> {
    let body = serde_json::to_vec(value).map_err(|e| dir.damaged(file, e))?;
    dir.write(file, &body)
}

fn load_floor(dir: &StateDir) -> Result<Option<(Floor, OverlayRange)>, StateError> {
    let Some(body) = dir.read(File::Floor)? else { return Ok(None) };
    let stored: StoredFloor = serde_json::from_slice(&body).map_err(|e| dir.damaged(File::Floor, e))?;
    let state_hash = stored.state_hash.parse().map_err(|e| dir.damaged(File::Floor, e))?;
    let floor = Floor {
        version: stored.version,
        state_hash,
    };
    Ok(Some((floor, stored.overlay)))
}

fn read_view(dir: &StateDir, us: &Membership, trust: &Trust, floor: Option<Floor>) -> Result<Option<VerifiedView>, StateError> {
    let Some(body) = dir.read(File::View)? else { return Ok(None) };
    let (signed, items) = VerifiedView::parts_from_bytes(&body).map_err(|e| dir.damaged(File::View, e))?;
    let view = VerifiedView::open(signed, items, trust, (us.mesh, us.host), floor);
    view.map(Some).map_err(|e| dir.damaged(File::View, e))
}

fn read_lease(dir: &StateDir) -> Result<Option<StoredLease>, StateError> {
    let Some(body) = dir.read(File::Lease)? else { return Ok(None) };
    serde_json::from_slice(&body).map(Some).map_err(|e| dir.damaged(File::Lease, e))
}

fn open_lease(dir: &StateDir, stored: &StoredLease, trust: &Trust) -> Result<HeldLease, StateError> {
    let bytes = STANDARD.decode(&stored.lease).map_err(|e| dir.damaged(File::Lease, e))?;
    let signed = Signed::from_bytes(&bytes).map_err(|e| dir.damaged(File::Lease, e))?;
    let lease = Lease::open(&signed, trust).map_err(|e| dir.damaged(File::Lease, e))?;
    Ok(HeldLease { signed, lease })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::testing::{HOST, MESH, Mesh};
    use crate::state::clock::{BootId, WallTime};
    use cloison_proto::version::Timestamp;

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    fn at(seconds: u64) -> Moment {
        Moment {
            boot: BootId("a".into()),
            boottime: Timestamp(seconds * 1_000_000_000),
            wall: WallTime(seconds),
        }
    }

    fn kept(dir: &StateDir) -> Result<(Membership, VerifiedView), Box<dyn std::error::Error>> {
        let mesh = Mesh::new();
        let view = mesh.view(5, &["tcp/5432"])?;
        store_view(dir, &view)?;
        let lease = mesh.lease(&view, 1_000, 600);
        store_lease(dir, &lease, Duration::from_secs(600), (MeshTime(1_000), true), &at(50))?;
        Ok((mesh.membership()?, view))
    }

    #[test]
    fn what_was_in_force_comes_back_with_what_is_left() -> Outcome {
        let folder = tempfile::tempdir()?;
        let dir = StateDir::open(folder.path())?;
        let (us, view) = kept(&dir)?;
        let cached = load(&dir, &us, &at(150))?;
        assert_eq!(cached.view.as_ref().map(|v| v.header()), Some(view.header()));
        assert_eq!(cached.lease.map(|(_, left)| left), Some(Duration::from_secs(499)));
        assert_eq!(cached.clock.at(at(150).boottime), MeshTime(1_101));
        assert!(cached.problems.is_empty() && cached.floor == Some(view.floor()));
        assert_eq!((us.mesh, us.host), (MESH, HOST));
        Ok(())
    }

    #[test]
    fn a_cut_view_or_lease_is_none_and_said_so_at_every_length() -> Outcome {
        let folder = tempfile::tempdir()?;
        let dir = StateDir::open(folder.path())?;
        let (us, view) = kept(&dir)?;
        for file in [File::View, File::Lease] {
            let good = std::fs::read(dir.path_of(file))?;
            for length in 0..good.len() {
                std::fs::write(dir.path_of(file), good.get(..length).unwrap_or_default())?;
                let cached = load(&dir, &us, &at(150))?;
                assert!(cached.lease.is_none(), "no lease without its view");
                assert_eq!(cached.view.is_none(), file == File::View, "{file:?} cut at {length}");
                assert_eq!(cached.problems.len(), 1, "{file:?} cut at {length}");
                assert_eq!(cached.floor, Some(view.floor()), "the floor outlives the view");
                assert_eq!(cached.overlay, Some(view.content().config.overlay), "and so do the mesh's ranges");
            }
            std::fs::write(dir.path_of(file), good)?;
        }
        Ok(())
    }

    #[test]
    fn a_damaged_floor_stops_the_start_and_says_what_to_do() -> Outcome {
        let folder = tempfile::tempdir()?;
        let dir = StateDir::open(folder.path())?;
        let (us, _) = kept(&dir)?;
        std::fs::write(dir.path_of(File::Floor), "")?;
        let error = load(&dir, &us, &at(150)).err().ok_or("loaded in spite of a damaged floor")?;
        assert!(error.hint().contains("older policy"), "{}", error.hint());
        Ok(())
    }

    #[test]
    fn the_mesh_s_ranges_are_known_from_the_floor_or_else_from_the_view() -> Outcome {
        let folder = tempfile::tempdir()?;
        let dir = StateDir::open(folder.path())?;
        let us = Mesh::new().membership()?;
        assert_eq!(overlay(&dir, &us)?, None, "nothing was in force yet");
        let (us, view) = kept(&dir)?;
        let range = view.content().config.overlay;
        assert_eq!(overlay(&dir, &us)?, Some(range));
        let good = std::fs::read(dir.path_of(File::Floor))?;
        for length in 0..good.len() {
            std::fs::write(dir.path_of(File::Floor), good.get(..length).unwrap_or_default())?;
            assert_eq!(overlay(&dir, &us)?, Some(range), "floor cut at {length}");
        }
        std::fs::write(dir.path_of(File::View), "x")?;
        assert!(overlay(&dir, &us).is_err(), "neither holds");
        Ok(())
    }

    #[test]
    fn an_older_view_put_back_in_its_place_is_not_taken() -> Outcome {
        let folder = tempfile::tempdir()?;
        let dir = StateDir::open(folder.path())?;
        let (us, view) = kept(&dir)?;
        let older = std::fs::read(dir.path_of(File::View))?;
        store_view(&dir, &Mesh::new().view(6, &["tcp/1"])?)?;
        std::fs::write(dir.path_of(File::View), older)?;
        let cached = load(&dir, &us, &at(150))?;
        assert!(cached.view.is_none());
        assert!(cached.floor.is_some_and(|floor| floor.version > view.header().version));
        Ok(())
    }

    #[test]
    fn endpoints_are_kept_and_their_loss_is_no_error() -> Outcome {
        let folder = tempfile::tempdir()?;
        let dir = StateDir::open(folder.path())?;
        let endpoints = BTreeMap::from([(HOST, "192.0.2.1:51820".parse()?)]);
        store_endpoints(&dir, &endpoints)?;
        assert_eq!(load_endpoints(&dir)?, endpoints);
        std::fs::write(dir.path_of(File::Endpoints), "x")?;
        assert!(load_endpoints(&dir)?.is_empty());
        Ok(())
    }

    #[test]
    fn with_whom_there_were_sessions_is_kept_and_unknown_if_damaged_anywhere() -> Outcome {
        let folder = tempfile::tempdir()?;
        let dir = StateDir::open(folder.path())?;
        assert_eq!(load_live(&dir)?, None);
        let live = BTreeSet::from([HOST, HostId([9; 16])]);
        store_live(&dir, &live)?;
        assert_eq!(load_live(&dir)?, Some(live));
        let good = std::fs::read(dir.path_of(File::Live))?;
        for length in 0..good.len() {
            std::fs::write(dir.path_of(File::Live), good.get(..length).unwrap_or_default())?;
            assert_eq!(load_live(&dir)?, None, "cut at {length}");
        }
        let most: BTreeSet<_> = (0..16_384_u32).map(|n| HostId(u128::from(n).to_be_bytes())).collect();
        store_live(&dir, &most)?;
        assert_eq!(
            load_live(&dir)?.map(|read| read.len()),
            Some(most.len()),
            "as many as a view can name"
        );
        Ok(())
    }
}
