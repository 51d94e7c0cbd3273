//! File leases (fcntl(2)): as long as one is held, nobody else opens the file; who tries waits until it is given back.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// The signal of a lease (`F_SETSIG` in linux/fcntl.h), which the libc crate lacks for glibc.
const F_SETSIG: libc::c_int = 10;

/// A write lease, given back when dropped.
#[derive(Debug)]
pub struct Lease<'f> {
    file: BorrowedFd<'f>,
}

impl<'f> Lease<'f> {
    /// Takes the lease of a file that only this process has open. Whoever opens it from now on waits, for as long as
    /// `/proc/sys/fs/lease-break-time` says at most.
    ///
    /// # Errors
    /// `WouldBlock` while somebody else has the file open; EINVAL where the file system knows no leases.
    pub fn take(file: &'f impl AsFd) -> io::Result<Self> {
        let file = file.as_fd();
        // Somebody who waits makes the kernel send a signal: the one set here is ignored by default, SIGIO would end the process.
        fcntl(file, F_SETSIG, libc::SIGURG)?;
        fcntl(file, libc::F_SETLEASE, libc::F_WRLCK)?;
        Ok(Self { file })
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        // It ends with the file descriptor in any case.
        let _ = fcntl(self.file, libc::F_SETLEASE, libc::F_UNLCK);
    }
}

fn fcntl(file: BorrowedFd<'_>, command: libc::c_int, argument: libc::c_int) -> io::Result<()> {
    #[expect(unsafe_code, reason = "no safe crate has leases")]
    // SAFETY: the descriptor is open for the length of the borrow, and both commands take an int by value.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::time::{Duration, Instant};

    #[test]
    fn who_opens_a_leased_file_waits_until_it_is_given_back() -> Result<(), Box<dyn std::error::Error>> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("file");
        std::fs::write(&path, "one\n")?;
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&path)?;
        let lease = Lease::take(&file)?;
        let began = Instant::now();
        let other = std::thread::spawn(move || {
            let mut file = std::fs::OpenOptions::new().append(true).open(path)?;
            file.write_all(b"two\n").map(|()| Instant::now())
        });
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(file.metadata()?.len(), 4);
        drop(lease);
        let opened = other.join().map_err(|_| "panicked")??;
        assert!(opened - began >= Duration::from_millis(100));
        assert_eq!(file.metadata()?.len(), 8);
        Ok(())
    }

    #[test]
    fn a_file_that_is_open_elsewhere_gives_no_lease() -> Result<(), Box<dyn std::error::Error>> {
        let file = tempfile::NamedTempFile::new()?;
        let again = file.reopen()?;
        let refused = Lease::take(&again).err().ok_or("a lease")?;
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
        Ok(())
    }
}
