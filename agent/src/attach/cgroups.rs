//! The tree of cgroups (v2), read: which of them are components, and which are known to be nobody's.
//!
//! systemd keeps a service in a cgroup of the service's name, below slices. Slices are made by systemd alone; what lies below a service, a
//! scope or a user's own manager may be made by those who run there, and is never searched for a unit's name. So a scan goes down through
//! slices, and through the ancestors of cgroups that are claimed by path; what hangs below these is a leaf: claimed, or the rest's.
//!
//! A cgroup is known by its id, which the kernel does not use again, and never by its path alone.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{DirEntryExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use cloison_proto::label::ComponentName;

use super::claim::Claim;

/// Most cgroups that one scan looks at, beside those below claimed ones: what is beyond stays unknown, and is refused.
pub const MAX_CGROUPS: usize = 16_384;

/// Most cgroups below a claimed one, on whose behalf they are made: it can make itself unknown there, and nobody else.
pub const MAX_BELOW: usize = 1_024;

/// How deep a scan goes.
const MAX_DEPTH: u8 = 32;

/// The cgroups of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    root: PathBuf,
}

/// A cgroup.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cgroup {
    /// Its id.
    pub id: u64,
    /// How deep it is: 1 for a child of the root.
    pub level: u8,
    /// Its path below the root of the tree.
    pub path: String,
}

/// What a scan found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Scan {
    /// Cgroups that are claimed, and by whom.
    pub claimed: Vec<(Cgroup, ComponentName)>,
    /// Those below them.
    pub below: Vec<(u64, ComponentName)>,
    /// Leaves that nobody claims.
    pub rest: Vec<(u64, u8)>,
    /// Those with others inside that were looked at one by one: a process that is in one of these itself is nobody's.
    pub inner: Vec<(u64, u8)>,
    /// Directories in which a change may bring about or end any of these, with their ids: one that is made anew is another.
    pub watched: BTreeSet<(PathBuf, u64)>,
    /// Whether there was more than a scan looks at, or something that could not be read.
    pub is_cut: bool,
}

impl Tree {
    /// Where this host has its cgroups; `None` if version 2 is not mounted.
    #[must_use]
    pub fn find() -> Option<Self> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
        mounts.lines().find_map(mount_point).map(|root| Self { root })
    }

    /// The tree below this directory.
    #[must_use]
    pub const fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// Opens a cgroup for the kernel's sake, if it is the one of this id.
    ///
    /// # Errors
    /// The kernel's; `NotFound` if another one is there now.
    pub fn open(&self, cgroup: &Cgroup) -> io::Result<File> {
        let directory = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
            .open(self.place(&cgroup.path))?;
        if directory.metadata()?.ino() == cgroup.id {
            Ok(directory)
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }

    /// The cgroup of this process.
    ///
    /// # Errors
    /// The kernel's; `NotFound` if it is not in the tree.
    pub fn own(&self) -> io::Result<Cgroup> {
        let lines = std::fs::read_to_string("/proc/self/cgroup")?;
        let path = lines
            .lines()
            .find_map(|line| line.strip_prefix("0::"))
            .ok_or(io::ErrorKind::NotFound)?;
        let path = path.trim_end_matches('/');
        Ok(Cgroup {
            id: std::fs::metadata(self.place(path))?.ino(),
            level: u8::try_from(path.matches('/').count()).map_err(io::Error::other)?,
            path: path.to_owned(),
        })
    }

    /// Those of these ids that are still cgroups, wherever; as far as they can be found.
    #[must_use]
    pub fn there(&self, ids: &BTreeSet<u64>) -> Vec<Cgroup> {
        let (mut found, mut open, mut left) = (Vec::new(), vec![(String::new(), 1)], MAX_CGROUPS);
        while let Some((parent, level)) = open.pop() {
            // What is somebody else's may be shut to us.
            let entries = std::fs::read_dir(self.place(&parent)).into_iter().flatten().flatten();
            let children = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            for child in children.take(left) {
                left -= 1;
                let (id, Ok(name)) = (child.ino(), child.file_name().into_string()) else {
                    continue;
                };
                let path = format!("{parent}/{name}");
                if ids.contains(&id) {
                    let path = path.clone();
                    found.push(Cgroup { id, level, path });
                }
                open.push((path, level.saturating_add(1)));
            }
        }
        found
    }

    /// Looks for the cgroups of these claims.
    #[must_use]
    pub fn scan(&self, claims: &[(ComponentName, Claim)]) -> Scan {
        let mut scan = Scan::default();
        let root = std::fs::metadata(&self.root).map_or(0, |metadata| metadata.ino());
        let root = Cgroup {
            id: root,
            level: 0,
            path: String::new(),
        };
        self.descend(&mut scan, claims, &root, true, &mut MAX_CGROUPS.clone());
        scan
    }

    /// The cgroup of this name in a directory that a scan has watched, if it is claimed; the parent still has to be the one of that id.
    pub(super) fn claimed_child(
        &self,
        claims: &[(ComponentName, Claim)],
        parent: &Path,
        parent_id: u64,
        name: &OsStr,
    ) -> Option<(Cgroup, ComponentName)> {
        let (name, above) = (name.to_str()?, parent.strip_prefix(&self.root).ok()?.to_str()?);
        let is_slice = |directory: &Path| std::fs::metadata(directory).is_ok_and(|metadata| is_roots(&metadata));
        let mut between = parent.ancestors().take_while(|directory| *directory != self.root);
        let below_slices = between.all(|directory| directory.to_str().is_some_and(|d| d.ends_with(".slice")) && is_slice(directory));
        let path = if above.is_empty() {
            format!("/{name}")
        } else {
            format!("/{above}/{name}")
        };
        let (component, _) = claims.iter().find(|(_, claim)| claims_leaf(claim, &path, name, below_slices))?;
        let metadata = std::fs::symlink_metadata(self.place(&path)).ok().filter(Metadata::is_dir)?;
        let is_same = std::fs::metadata(parent).is_ok_and(|now| now.ino() == parent_id);
        let level = u8::try_from(path.matches('/').count()).ok()?;
        let cgroup = Cgroup {
            id: metadata.ino(),
            level,
            path,
        };
        is_same.then(|| (cgroup, component.clone()))
    }

    pub(super) fn place(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// Looks at the children of a slice, or of an ancestor of a claimed cgroup.
    fn descend(&self, scan: &mut Scan, claims: &[(ComponentName, Claim)], parent: &Cgroup, below_slices: bool, left: &mut usize) {
        for (name, cgroup, metadata) in self.children(scan, parent, left) {
            let owner = claims
                .iter()
                .find(|(_, claim)| claims_leaf(claim, &cgroup.path, &name, below_slices));
            let is_slice = below_slices && name.ends_with(".slice") && is_roots(&metadata);
            let leads_on = claims.iter().any(|(_, claim)| is_ancestor(&cgroup.path, claim));
            if let Some((component, _)) = owner {
                self.claim(scan, claims, &cgroup, component, &mut MAX_BELOW.clone());
                scan.claimed.push((cgroup, component.clone()));
            } else if is_slice {
                scan.inner.push((cgroup.id, cgroup.level));
                self.descend(scan, claims, &cgroup, true, left);
            } else if leads_on {
                scan.inner.push((cgroup.id, cgroup.level));
                // Who may make cgroups here takes nobody else's turn.
                self.descend(scan, claims, &cgroup, false, &mut MAX_BELOW.clone());
            } else {
                scan.rest.push((cgroup.id, cgroup.level));
            }
        }
    }

    /// All below a claimed cgroup is its component's, but for what others claim there.
    fn claim(&self, scan: &mut Scan, claims: &[(ComponentName, Claim)], cgroup: &Cgroup, component: &ComponentName, left: &mut usize) {
        for (name, child, _) in self.children(scan, cgroup, left) {
            let other = claims.iter().find(|(_, claim)| claims_leaf(claim, &child.path, &name, false));
            if let Some((component, _)) = other {
                self.claim(scan, claims, &child, component, &mut MAX_BELOW.clone());
                scan.claimed.push((child, component.clone()));
            } else {
                scan.below.push((child.id, component.clone()));
                self.claim(scan, claims, &child, component, left);
            }
        }
    }

    /// The cgroups in another, as far as there are any `left` to look at. It is watched from then on; one that goes while it is looked at is not
    /// there.
    fn children(&self, scan: &mut Scan, parent: &Cgroup, left: &mut usize) -> Vec<(String, Cgroup, Metadata)> {
        let directory = self.place(&parent.path);
        scan.watched.insert((directory.clone(), parent.id));
        if parent.level >= MAX_DEPTH {
            return Vec::new();
        }
        let entries = std::fs::read_dir(directory);
        // What its owner has shut to us is unknown, and no more than that.
        let is_known = |error: &io::Error| matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied);
        scan.is_cut |= entries.as_ref().is_err_and(|error| !is_known(error));
        let entries = entries.into_iter().flatten().flatten();
        let found = entries.filter_map(|entry| {
            let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let name = entry.file_name().into_string().ok().filter(|_| is_directory)?;
            let metadata = entry.metadata().ok()?;
            let child = Cgroup {
                id: metadata.ino(),
                level: parent.level + 1,
                path: format!("{}/{name}", parent.path),
            };
            Some((name, child, metadata))
        });
        let found: Vec<_> = found.take(*left).collect();
        *left -= found.len();
        scan.is_cut |= *left == 0;
        found
    }
}

/// Whether a cgroup is what a claim is about. A unit's name counts where systemd keeps its units; the sockets that systemd opens for a service
/// beforehand are in the cgroup of the `.socket` unit.
fn claims_leaf(claim: &Claim, path: &str, name: &str, below_slices: bool) -> bool {
    match claim {
        Claim::User(_) => false,
        Claim::Cgroup(claimed) => claimed.as_str() == path,
        Claim::Unit(unit) => {
            let stem = unit.as_str().strip_suffix(".service");
            below_slices && (name == unit.as_str() || stem.is_some() && name.strip_suffix(".socket") == stem)
        }
    }
}

/// Whether a directory is root's, and nobody else makes anything in it.
fn is_roots(metadata: &Metadata) -> bool {
    metadata.uid() == 0 && metadata.mode() & 0o022 == 0
}

fn is_ancestor(path: &str, claim: &Claim) -> bool {
    match claim {
        Claim::Cgroup(claimed) => claimed.as_str().strip_prefix(path).is_some_and(|rest| rest.starts_with('/')),
        Claim::User(_) | Claim::Unit(_) => false,
    }
}

/// Where a line of `/proc/self/mountinfo` (proc(5)) mounts cgroups of version 2.
fn mount_point(line: &str) -> Option<PathBuf> {
    let (mount, kind) = line.split_once(" - ")?;
    kind.starts_with("cgroup2 ").then_some(())?;
    let place = mount.split_ascii_whitespace().nth(4)?;
    Some(PathBuf::from(place.replace("\\040", " ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    fn tree(cgroups: &[&str]) -> Result<(tempfile::TempDir, Tree), Box<dyn std::error::Error>> {
        let root = tempfile::tempdir()?;
        for path in cgroups {
            std::fs::create_dir_all(root.path().join(path))?;
        }
        let tree = Tree::at(root.path().to_owned());
        Ok((root, tree))
    }

    fn claims(claims: &[(&str, &str)]) -> Result<Vec<(ComponentName, Claim)>, Box<dyn std::error::Error>> {
        let claim = |text: &str| -> Result<Claim, Box<dyn std::error::Error>> {
            Ok(match text.strip_prefix('/') {
                Some(_) => Claim::Cgroup(text.parse()?),
                None => Claim::Unit(text.parse()?),
            })
        };
        claims.iter().map(|(name, text)| Ok((name.parse()?, claim(text)?))).collect()
    }

    fn claimed(scan: &Scan) -> Vec<(&str, &str, u8)> {
        let mut found: Vec<_> = scan
            .claimed
            .iter()
            .map(|(c, name)| (c.path.as_str(), name.as_str(), c.level))
            .collect();
        found.sort_unstable();
        found
    }

    #[test]
    fn a_unit_is_found_below_slices_with_the_sockets_opened_for_it() -> Outcome {
        let (_root, tree) = tree(&[
            "init.scope",
            "system.slice/n8n.service/worker",
            "system.slice/n8n.socket",
            "system.slice/other.service",
            "system.slice/system-postgresql.slice/postgresql@15-main.service",
        ])?;
        let scan = tree.scan(&claims(&[("n8n", "n8n.service"), ("postgres", "postgresql@15-main.service")])?);
        assert_eq!(
            claimed(&scan),
            [
                ("/system.slice/n8n.service", "n8n", 2),
                ("/system.slice/n8n.socket", "n8n", 2),
                ("/system.slice/system-postgresql.slice/postgresql@15-main.service", "postgres", 3),
            ]
        );
        assert_eq!(scan.below.len(), 1, "what a service makes below itself is the service's");
        let levels: BTreeSet<u8> = scan.rest.iter().map(|(_, level)| *level).collect();
        assert_eq!(
            (scan.rest.len(), levels),
            (2, BTreeSet::from([1, 2])),
            "init.scope and other.service"
        );
        Ok(())
    }

    #[test]
    fn a_name_that_somebody_makes_below_a_service_or_in_a_home_of_its_own_is_no_unit() -> Outcome {
        let (_root, tree) = tree(&[
            "user.slice/user-1000.slice/user@1000.service/app.slice/n8n.service",
            "user.slice/user-1000.slice/session-1.scope/system.slice/n8n.service",
            "system.slice/other.service/n8n.service",
            "docker/abc/system.slice/n8n.service",
        ])?;
        let scan = tree.scan(&claims(&[("n8n", "n8n.service")])?);
        assert_eq!(claimed(&scan), []);
        assert_eq!(scan.rest.len(), 4, "user@1000.service, session-1.scope, other.service, docker");
        Ok(())
    }

    #[test]
    fn a_cgroup_by_path_is_found_anywhere_and_its_siblings_are_looked_at_too() -> Outcome {
        let (_root, tree) = tree(&["jobs/batch/inner", "jobs/other", "elsewhere"])?;
        let scan = tree.scan(&claims(&[("batch", "/jobs/batch"), ("none", "/jobs/none/x")])?);
        assert_eq!(claimed(&scan), [("/jobs/batch", "batch", 2)]);
        assert_eq!((scan.below.len(), scan.rest.len(), scan.inner.len()), (1, 2, 1));
        assert_eq!(scan.watched.len(), 4, "the root, jobs, batch and inner");
        Ok(())
    }

    #[test]
    fn a_claim_inside_of_another_is_its_own() -> Outcome {
        let (_root, tree) = tree(&["system.slice/app.service/plugin/deep", "system.slice/app.service/main"])?;
        let scan = tree.scan(&claims(&[("app", "app.service"), ("plugin", "/system.slice/app.service/plugin")])?);
        assert_eq!(
            claimed(&scan),
            [
                ("/system.slice/app.service", "app", 2),
                ("/system.slice/app.service/plugin", "plugin", 3)
            ]
        );
        let mut below: Vec<&str> = scan.below.iter().map(|(_, component)| component.as_str()).collect();
        below.sort_unstable();
        assert_eq!(below, ["app", "plugin"]);
        Ok(())
    }

    #[test]
    fn who_makes_cgroups_without_end_makes_itself_unknown_and_nobody_else() -> Outcome {
        let (root, tree) = tree(&["system.slice/a.service", "system.slice/z.service/inner"])?;
        for n in 0..MAX_BELOW + 10 {
            std::fs::create_dir(root.path().join(format!("system.slice/a.service/{n}")))?;
        }
        let scan = tree.scan(&claims(&[("a", "a.service"), ("z", "z.service")])?);
        let of = |who: &str| scan.below.iter().filter(|(_, component)| component.as_str() == who).count();
        assert_eq!((scan.claimed.len(), of("a"), of("z")), (2, MAX_BELOW, 1));
        assert!(scan.is_cut);
        Ok(())
    }

    #[test]
    fn a_cgroup_that_is_still_there_is_found_wherever_it_is() -> Outcome {
        let (root, tree) = tree(&["system.slice/a.service/inner", "elsewhere/deep"])?;
        let id = |path: &str| std::fs::metadata(root.path().join(path)).map(|metadata| metadata.ino());
        let ids = BTreeSet::from([id("system.slice/a.service/inner")?, id("elsewhere/deep")?]);
        let with_others = ids.iter().copied().chain([1]).collect();
        let mut found = tree.there(&with_others);
        found.sort_unstable_by_key(|cgroup| cgroup.level);
        let found: Vec<_> = found.iter().map(|c| (c.path.as_str(), c.level, ids.contains(&c.id))).collect();
        assert_eq!(found, [("/elsewhere/deep", 2, true), ("/system.slice/a.service/inner", 3, true)]);
        assert_eq!(Tree::at(root.path().join("none")).there(&with_others), []);
        Ok(())
    }

    #[test]
    fn a_slice_of_somebody_else_is_none_even_on_the_way_to_a_claimed_cgroup() -> Outcome {
        let (root, tree) = tree(&["mine.slice/jobs", "mine.slice/n8n.service"])?;
        let claims = claims(&[("n8n", "n8n.service"), ("jobs", "/mine.slice/jobs")])?;
        assert_eq!(tree.scan(&claims).claimed.len(), 2, "root's");
        std::os::unix::fs::chown(root.path().join("mine.slice"), Some(65_534), None)?;
        assert_eq!(claimed(&tree.scan(&claims)), [("/mine.slice/jobs", "jobs", 2)]);
        let parent = tree.place("/mine.slice");
        let id = std::fs::metadata(&parent)?.ino();
        assert_eq!(tree.claimed_child(&claims, &parent, id, OsStr::new("n8n.service")), None);
        Ok(())
    }

    #[test]
    fn the_mount_of_version_2_is_found_among_others() {
        assert_eq!(
            mount_point("31 24 0:26 / /sys/fs/cgroup/unified rw,nosuid shared:5 - cgroup2 cgroup2 rw"),
            Some("/sys/fs/cgroup/unified".into())
        );
        assert_eq!(mount_point("32 24 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"), None);
    }

    #[test]
    fn a_new_cgroup_is_claimed_by_the_same_rules_as_in_a_scan() -> Outcome {
        let (_root, tree) = tree(&["system.slice/n8n.service", "user.slice/user@1.service/n8n.service"])?;
        let claims = claims(&[("n8n", "n8n.service")])?;
        let claimed = |parent: &str, id: Option<u64>| -> Result<_, Box<dyn std::error::Error>> {
            let parent = tree.place(parent);
            let id = id.map_or_else(|| std::fs::metadata(&parent).map(|m| m.ino()), Ok)?;
            Ok(tree.claimed_child(&claims, &parent, id, OsStr::new("n8n.service")))
        };
        let found = claimed("/system.slice", None)?.map(|(cgroup, _)| cgroup);
        let scanned = tree.scan(&claims).claimed.pop().map(|(cgroup, _)| cgroup);
        assert!(found.is_some() && found == scanned, "{found:?} {scanned:?}");
        assert_eq!(claimed("/user.slice/user@1.service", None)?, None, "not below slices");
        assert_eq!(claimed("/system.slice", Some(1))?, None, "another parent is there now");
        assert_eq!(claimed("/user.slice", None)?, None, "gone already");
        Ok(())
    }
}
