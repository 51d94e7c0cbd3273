//! The kernel's edges: TUNs, epoll, network namespaces, cgroups and programs at them, processes, socket options, inherited descriptors, the clock. All of the
//! agent's unsafe code is below this module, each block with the reason why it is sound; what leaves it are owned file descriptors and typed
//! errors.
//!
//! Nothing here knows of packets, peers or views.

pub mod bpf;
pub mod cgroup;
pub mod clock;
pub mod inherited;
pub mod lease;
pub mod netns;
pub mod poll;
pub mod process;
pub mod socket;
pub mod tun;

use std::error::Error;
use std::fmt;
use std::str::FromStr;

/// Longest interface name, in bytes: IFNAMSIZ less the closing zero.
const MAX_INTERFACE_NAME: usize = 15;

/// The name of a network interface: 1 to 15 characters of `[a-zA-Z0-9_.-]`, so that it can stand in an nftables text and below
/// `/proc/sys/net` as it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InterfaceName(Box<str>);

/// A text that is no interface name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` cannot name an interface: use 1 to 15 characters of a-z, A-Z, 0-9, `_`, `-` and `.`, but neither `.` nor `..`")]
pub struct InterfaceNameError(String);

impl InterfaceName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for InterfaceName {
    type Err = InterfaceNameError;
    fn from_str(text: &str) -> Result<Self, InterfaceNameError> {
        let good = (1..=MAX_INTERFACE_NAME).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b))
            && text.bytes().any(|b| b != b'.');
        if good {
            Ok(Self(text.into()))
        } else {
            Err(InterfaceNameError(text.into()))
        }
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// An error and what caused it, in one line.
pub(crate) fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_need_quoting_are_refused() {
        for bad in [
            "",
            ".",
            "..",
            "a b",
            "a/b",
            "a\"b",
            "a;b",
            "sixteen-letters-",
            "é",
            "a\n",
            "a:1",
            "tun%d",
        ] {
            assert!(bad.parse::<InterfaceName>().is_err(), "{bad:?}");
        }
        assert_eq!(
            "cloison0".parse::<InterfaceName>().map(|n| n.to_string()),
            Ok("cloison0".to_owned())
        );
    }
}
