//! Names of cgroups by their ids, for people: the id is the inode of the cgroup's folder. Nothing is decided by them.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{DirEntryExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

/// Most names that are remembered; beyond, all are forgotten.
const MOST: usize = 1_024;

/// Most folders that one walk looks into.
const MOST_FOLDERS: usize = 16_384;

/// The names that were found so far.
#[derive(Debug)]
pub struct Cgroups {
    root: Option<PathBuf>,
    known: HashMap<u64, Option<String>>,
}

impl Default for Cgroups {
    /// Those of the host.
    fn default() -> Self {
        Self::below(mount(&fs::read_to_string("/proc/self/mounts").unwrap_or_default()))
    }
}

impl Cgroups {
    /// Those below `root`.
    #[must_use]
    pub fn below(root: Option<PathBuf>) -> Self {
        Self {
            root,
            known: HashMap::new(),
        }
    }

    /// Looks for the names of `ids`, in one walk through the tree at most, and only if one of them is new.
    pub fn learn(&mut self, ids: impl IntoIterator<Item = u64>) {
        let mut wanted: Vec<u64> = ids.into_iter().filter(|id| !self.known.contains_key(id)).collect();
        wanted.sort_unstable();
        wanted.dedup();
        let Some(root) = self.root.clone().filter(|_| !wanted.is_empty()) else {
            return;
        };
        if self.known.len() + wanted.len() > MOST {
            self.known.clear();
        }
        let found = walk(&root, &wanted);
        for id in wanted.into_iter().take(MOST) {
            self.known.insert(id, found.get(&id).cloned());
        }
    }

    /// The path of a cgroup from the tree's root, if it was learnt and is there.
    #[must_use]
    pub fn name(&self, id: u64) -> Option<&str> {
        self.known.get(&id)?.as_deref()
    }
}

/// Where the tree of cgroups of version 2 is.
fn mount(mounts: &str) -> Option<PathBuf> {
    let cgroup2 = |line: &str| {
        let mut words = line.split(' ').skip(1);
        let (at, kind) = (words.next()?, words.next()?);
        (kind == "cgroup2").then(|| at.into())
    };
    mounts.lines().find_map(cgroup2)
}

fn walk(root: &Path, wanted: &[u64]) -> HashMap<u64, String> {
    let mut found = HashMap::new();
    if fs::metadata(root).is_ok_and(|root| wanted.contains(&root.ino())) {
        found.extend(fs::metadata(root).map(|root| (root.ino(), "/".to_owned())));
    }
    let (mut folders, mut seen) = (vec![root.to_owned()], 0);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            if wanted.contains(&entry.ino())
                && let Ok(name) = entry.path().strip_prefix(root)
            {
                found.insert(entry.ino(), format!("/{}", name.display()));
            }
            seen += 1;
            if seen > MOST_FOLDERS || found.len() == wanted.len() {
                return found;
            }
            folders.push(entry.path());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_is_named_by_its_folder_s_number() -> Result<(), Box<dyn std::error::Error>> {
        let tree = tempfile::tempdir()?;
        let unit = tree.path().join("system.slice/n8n.service");
        fs::create_dir_all(&unit)?;
        let (id, root) = (fs::metadata(&unit)?.ino(), fs::metadata(tree.path())?.ino());
        let mut cgroups = Cgroups::below(Some(tree.path().into()));
        cgroups.learn([id, root, 1]);
        assert_eq!(cgroups.name(id), Some("/system.slice/n8n.service"));
        assert_eq!(cgroups.name(root), Some("/"));
        assert_eq!(cgroups.name(1), None, "nobody's");
        fs::remove_dir(&unit)?;
        cgroups.learn([id]);
        assert_eq!(cgroups.name(id), Some("/system.slice/n8n.service"), "its name outlives it");
        cgroups.learn(2..2_000);
        assert!(cgroups.known.len() <= MOST);
        Ok(())
    }

    #[test]
    fn the_tree_of_version_2_is_found_beside_others() {
        let mounts =
            "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(mount(mounts), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mount("tmpfs / tmpfs rw 0 0\n"), None);
    }
}
