use std::path::{Path, PathBuf};

use cloison_agent::sys::netns::{NetNs, NetNsError};
use cloison_agent::sys::tun::{Tun, interface_index};

use crate::{Outcome, fresh, inside, run, tun_name};

/// A namespace with a name, as an operator makes one; removed when dropped.
pub(crate) struct Named(String);

impl Named {
    pub(crate) fn new(what: &str) -> Outcome<Self> {
        let name = format!("cloison-sh-{what}-{}", std::process::id());
        run("ip", &format!("netns add {name}"))?;
        Ok(Self(name))
    }

    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.0)
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        let _gone = run("ip", &format!("netns delete {}", self.0));
    }
}

#[test]
fn a_tun_is_made_inside_a_named_namespace_and_nowhere_else() -> Outcome {
    let named = Named::new("tun")?;
    let ns = NetNs::open(&named.path(), &["/run/netns".into()])?;
    let name = tun_name()?;
    let tun = inside(&ns, || Ok(Tun::create(&name)?))?;
    assert_eq!(inside(&ns, || Ok(interface_index(&name)?))?, tun.index());
    assert!(interface_index(&name).is_err());
    assert_eq!(NetNs::open(&named.path(), &["/run/netns".into()])?.id(), ns.id());
    assert_ne!(NetNs::current()?.id(), ns.id());
    Ok(())
}

#[test]
fn only_network_namespaces_below_accepted_directories_are_opened() -> Outcome {
    fresh()?;
    let dir = tempfile::tempdir()?;
    let allowed = ["/run/netns".into(), dir.path().to_owned()];
    let open = |path: &Path| NetNs::open(path, &allowed);
    let named = Named::new("paths")?;
    let refused = open(Path::new("/proc/self/ns/net"));
    assert!(matches!(refused, Err(NetNsError::NotAllowed(_))), "{refused:?}");
    let refused = open(&dir.path().join("../etc"));
    assert!(matches!(refused, Err(NetNsError::NotAllowed(_))), "{refused:?}");
    let refused = open(dir.path());
    assert!(matches!(refused, Err(NetNsError::NotAllowed(_))), "{refused:?}");
    let refused = open(&dir.path().join("none"));
    assert!(matches!(refused, Err(NetNsError::Missing(_))), "{refused:?}");

    let file = dir.path().join("file");
    std::fs::write(&file, "not a namespace")?;
    let refused = open(&file);
    assert!(matches!(refused, Err(NetNsError::NotNamespace(_))), "{refused:?}");
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(named.path(), &link)?;
    let refused = open(&link);
    assert!(matches!(refused, Err(NetNsError::Link(_))), "{refused:?}");
    std::os::unix::fs::symlink("/run/netns", dir.path().join("dir"))?;
    let refused = open(&dir.path().join("dir").join(&named.0));
    assert!(matches!(refused, Err(NetNsError::Link(_))), "{refused:?}");
    Ok(())
}

#[test]
fn a_namespace_of_another_kind_is_refused() -> Outcome {
    let dir = tempfile::tempdir()?;
    let place = dir.path().join("uts");
    std::fs::write(&place, "")?;
    run("mount", &format!("--bind /proc/self/ns/uts {}", place.display()))?;
    let refused = NetNs::open(&place, &[dir.path().to_owned()]);
    run("umount", &place.display().to_string())?;
    assert!(matches!(refused, Err(NetNsError::NotNamespace(_))), "{refused:?}");
    Ok(())
}
