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

/// Somebody with a network namespace of its own, as a container's first process is.
fn contained() -> Outcome<std::process::Child> {
    let child = std::process::Command::new("unshare").args(["--net", "sleep", "60"]).spawn()?;
    let own = std::fs::read_link("/proc/self/ns/net")?;
    for _ in 0..500 {
        if std::fs::read_link(format!("/proc/{}/ns/net", child.id())).is_ok_and(|theirs| theirs != own) {
            return Ok(child);
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    Err("it has no namespace of its own".into())
}

#[test]
fn a_pid_file_leads_to_the_namespace_of_its_process_and_of_no_other() -> Outcome {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("n8n.pid");
    let accepted = cloison_agent::attach::Accepted {
        netns_dirs: vec![dir.path().to_owned()],
        ..Default::default()
    };
    let home = NetNs::current()?.id();
    let open = || cloison_agent::attach::netns::open(&file, &accepted, home);
    let is_at = |id| cloison_agent::attach::netns::is_at(&file, &accepted, id);
    let why = || open().err().map(|why| why.to_string()).unwrap_or_default();
    let mut first = contained()?;
    std::fs::write(&file, format!("{}\n", first.id()))?;
    let id = open()?.id();
    assert!(id != home && is_at(id));

    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o664))?;
    assert!(why().contains("may be written by others than root") && !is_at(id), "{}", why());
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644))?;
    std::os::unix::fs::chown(&file, Some(65_534), None)?;
    assert!(why().contains("may be written by others than root"), "{}", why());
    std::os::unix::fs::chown(&file, Some(0), None)?;
    assert!(is_at(id));

    // The container starts again, and whoever writes the file has not done so yet.
    first.kill()?;
    first.wait()?;
    assert!(why().contains("names a process that has ended") && !is_at(id), "{}", why());
    let mut second = contained()?;
    std::fs::write(&file, second.id().to_string())?;
    let next = open()?.id();
    assert!(is_at(next) && !is_at(home));
    // A number that was given to another process behind the file's time.
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
    std::fs::File::options().write(true).open(&file)?.set_modified(old)?;
    assert!(why().contains("is older than the process of that number"), "{}", why());

    for text in ["1", "0", "-5", "", "n8n", "99999999999", "12 34"] {
        std::fs::write(&file, text)?;
        assert!(why().contains("neither a network namespace nor"), "{text:?}: {}", why());
    }
    std::fs::write(&file, std::process::id().to_string())?;
    assert!(open().is_err(), "the host's own namespace");
    std::fs::remove_file(&file)?;
    assert!(why().contains("does not exist"), "{}", why());
    second.kill()?;
    second.wait()?;
    Ok(())
}
