use super::*;
use crate::names::ZONE;
use crate::names::memory::tests::cut_off;
use cloison_proto::id::{HostId, MeshId};
use cloison_proto::net::OverlayRange;
use std::os::unix::fs::PermissionsExt as _;

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

const FOREIGN: &str = "127.0.0.1 localhost\n192.0.2.7 printer\n";

struct Place {
    folder: tempfile::TempDir,
    dir: StateDir,
    path: PathBuf,
}

fn place(content: &str) -> Outcome<Place> {
    // Thousands of syncs, none of which needs a disk.
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())?;
    let dir = StateDir::open(folder.path().join("state"))?;
    let path = folder.path().join("hosts");
    std::fs::write(&path, content)?;
    Ok(Place { folder, dir, path })
}

fn owner(number: u8) -> Outcome<Owner> {
    Ok(Owner {
        mesh: MeshId([9; 16]),
        host: HostId([number; 16]),
        overlay: OverlayRange::new([10, 77, 0, 0].into(), 16, "fd12:3456:789a::".parse()?)?,
    })
}

fn lines(count: u8) -> String {
    (1..=count).map(|n| format!("10.77.1.{n}\tpg.db-{n}.{ZONE} pg.{ZONE}\n")).collect()
}

#[test]
fn a_block_is_written_in_place_and_inode_mode_and_owner_stay() -> Outcome {
    let at = place(FOREIGN)?;
    std::fs::set_permissions(&at.path, std::fs::Permissions::from_mode(0o640))?;
    let before = std::fs::metadata(&at.path)?;
    let seal = update(&at.dir, &at.path, &owner(1)?, &lines(3))?;
    let after = std::fs::metadata(&at.path)?;
    assert_eq!(
        (before.ino(), before.mode(), before.uid(), before.gid()),
        (after.ino(), after.mode(), after.uid(), after.gid())
    );
    assert_eq!(Seal::of(&at.path), Some(seal));
    let text = std::fs::read_to_string(&at.path)?;
    assert!(text.starts_with(FOREIGN) && text.contains("10.77.1.3\tpg.db-3"), "{text}");
    assert_eq!(
        update(&at.dir, &at.path, &owner(1)?, &lines(3))?,
        seal,
        "a second time nothing is written"
    );
    update(&at.dir, &at.path, &owner(1)?, "")?;
    assert_eq!(std::fs::read_to_string(&at.path)?, FOREIGN);
    assert!(Memory::load(&at.dir)?.is_none());
    Ok(())
}

/// Every state in which a write can be cut off, with what the agent remembers then, and what the next one makes of it.
#[test]
fn after_a_write_that_was_cut_off_at_any_byte_the_file_is_right_again() -> Outcome {
    let at = place("")?;
    let us = owner(1)?;
    let tail = "192.0.2.8 a-line-behind-the-block-that-moves-when-it-grows-or-shrinks\n";
    let file = |count| [&with_block(FOREIGN.as_bytes(), &us, &lines(count))[..], tail.as_bytes()].concat();
    for (from, to) in [(1, 4), (4, 1), (0, 2), (2, 0), (3, 3)] {
        let pending = Pending::new(file(from), with_block(&file(from), &us, &lines(to)));
        let memory = Memory {
            path: at.path.clone(),
            owner: us,
            pending: Some(pending.clone()),
        };
        for bytes in 0..=file(to).len() + 2 {
            std::fs::write(&at.path, cut_off(&pending, bytes))?;
            memory.store(&at.dir)?;
            update(&at.dir, &at.path, &us, &lines(2))?;
            let found = std::fs::read_to_string(&at.path)?;
            assert_eq!(
                found.matches("# BEGIN cloison").count(),
                1,
                "{from} -> {to}, cut at {bytes}:\n{found}"
            );
            let foreign: String = found.split_inclusive('\n').filter(|l| !l.contains("cloison")).collect();
            assert_eq!(foreign, format!("{FOREIGN}{tail}"), "{from} -> {to}, cut at {bytes}:\n{found}");
            assert!(found.contains(&lines(2)) && !found.contains("db-3"));
            assert!(Memory::load(&at.dir)?.is_some_and(|memory| memory.pending.is_none()));
        }
    }
    Ok(())
}

#[test]
fn what_somebody_else_wrote_after_a_write_was_cut_off_stays() -> Outcome {
    let at = place("127.0.0.1 localhost\n192.0.2.9 new-line-of-an-editor-that-was-faster\n")?;
    let us = owner(1)?;
    let pending = Pending::new(FOREIGN.into(), with_block(FOREIGN.as_bytes(), &us, &lines(1)));
    let memory = Memory {
        path: at.path.clone(),
        owner: us,
        pending: Some(pending),
    };
    memory.store(&at.dir)?;
    update(&at.dir, &at.path, &us, &lines(1))?;
    let found = std::fs::read_to_string(&at.path)?;
    assert!(found.contains("new-line-of-an-editor") && found.contains("pg.db-1") && !found.contains("printer"));
    Ok(())
}

#[test]
fn two_agents_and_an_editor_that_adds_lines_lose_nothing_of_each_other() -> Outcome {
    const ROUNDS: u8 = 40;
    let at = place(FOREIGN)?;
    std::thread::scope(|scope| {
        let agents: Vec<_> = [1, 2]
            .map(|number| {
                let dir = StateDir::open(at.folder.path().join(format!("state-{number}")));
                let path = &at.path;
                scope.spawn(move || -> Result<(), String> {
                    let (dir, owner) = (dir.map_err(|e| e.to_string())?, owner(number).map_err(|e| e.to_string())?);
                    // As the keeper does: what was in the way is tried again.
                    let insist = |lines: String| loop {
                        match update(&dir, path, &owner, &lines) {
                            Ok(_) => return Ok(()),
                            Err(HostsError::Changing { .. } | HostsError::Locked { .. }) => {}
                            Err(error) => return Err(error.to_string()),
                        }
                    };
                    (0..ROUNDS).try_for_each(|round| insist(lines(round % 7 + 1)))?;
                    insist(lines(number))
                })
            })
            .into_iter()
            .collect();
        for round in 0..200 {
            let mut file = OpenOptions::new().append(true).open(&at.path)?;
            io::Write::write_all(&mut file, format!("192.0.2.8 line-{round}\n").as_bytes())?;
            drop(file);
            std::thread::yield_now();
        }
        for agent in agents {
            agent.join().map_err(|_| "panicked")??;
        }
        Ok::<_, Box<dyn std::error::Error>>(())
    })?;
    let found = std::fs::read_to_string(&at.path)?;
    for round in 0..200 {
        assert_eq!(
            found.matches(&format!("192.0.2.8 line-{round}\n")).count(),
            1,
            "line {round} in\n{found}"
        );
    }
    assert!(
        found.starts_with(FOREIGN) && found.matches("# BEGIN cloison").count() == 2,
        "{found}"
    );
    Ok(())
}

#[test]
fn what_is_no_plain_file_of_ours_is_refused_with_what_to_do() -> Outcome {
    let at = place(FOREIGN)?;
    let path = |name: &str| at.folder.path().join(name);
    std::os::unix::fs::symlink(&at.path, path("link"))?;
    std::fs::create_dir(path("folder"))?;
    File::create(path("huge"))?.set_len(MAX_FILE as u64 + 1)?;
    let pipe = path("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)?;
    let refused = |name: &str| {
        let error = update(&at.dir, &path(name), &owner(1)?, &lines(1)).err().ok_or("written")?;
        assert!(!error.hint().is_empty());
        Ok::<_, Box<dyn std::error::Error>>(error)
    };
    assert!(matches!(refused("link")?, HostsError::Link { .. }));
    assert!(matches!(refused("folder")?, HostsError::NotPlain { .. }));
    assert!(matches!(refused("pipe")?, HostsError::NotPlain { .. }));
    assert!(matches!(refused("huge")?, HostsError::TooLong { .. }));
    assert!(matches!(refused("missing")?, HostsError::Missing { .. }));
    assert_eq!(std::fs::read_to_string(&at.path)?, FOREIGN);
    let full = "192.0.2.1 a-name\n".repeat(MAX_FILE / 17);
    std::fs::write(&at.path, &full)?;
    assert!(
        matches!(refused("hosts")?, HostsError::TooLong { .. }),
        "with the block it would be too long"
    );
    assert_eq!(std::fs::read_to_string(&at.path)?, full);
    Ok(())
}

#[test]
fn a_host_that_enrolled_again_has_one_block() -> Outcome {
    let at = place(FOREIGN)?;
    update(&at.dir, &at.path, &owner(1)?, &lines(1))?;
    update(&at.dir, &at.path, &owner(2)?, &lines(2))?;
    let found = std::fs::read_to_string(&at.path)?;
    assert_eq!(crate::names::block::owners(found.as_bytes()), [owner(2)?.host]);
    Ok(())
}
