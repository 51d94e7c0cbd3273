//! Places at which a test can make the program die as by `kill -9`: in the middle of a change, around its commit, before anybody hears of it.
//!
//! `failpoint!(Name)` marks a place. It is nothing at all unless the crate was built with the feature `failpoints`, which no shipped program
//! has. Built with it, the program dies at the place that `CLOISON_FAILPOINT=NAME[:N]` names, when it comes there for the Nth time.

/// Marks the place of `Point`'s name.
macro_rules! failpoint {
    ($point:ident) => {
        #[cfg(feature = "failpoints")]
        crate::failpoint::reach(crate::failpoint::Point::$point);
    };
}
pub(crate) use failpoint;

#[cfg(feature = "failpoints")]
pub use armed::{Point, VARIABLE, reach};

#[cfg(feature = "failpoints")]
mod armed {
    use std::fmt;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// Names the place to die at, and, behind a colon, how often it is passed before.
    pub const VARIABLE: &str = "CLOISON_FAILPOINT";

    macro_rules! points {
        ($($(#[$doc:meta])* $name:ident,)*) => {
            /// A place.
            #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
            pub enum Point { $($(#[$doc])* $name,)* }

            impl Point {
                /// Every place.
                pub const ALL: &[Self] = &[$(Self::$name,)*];
            }
        };
    }

    points! {
        /// It is this change's turn; the transaction is not begun.
        BeforeBegin,
        /// The transaction is begun.
        Begun,
        /// A policy's row is written.
        PolicyWritten,
        /// A token's row is written.
        TokenWritten,
        /// A token is revoked.
        TokenRevoked,
        /// A token has a use less; its host is not there yet.
        TokenConsumed,
        /// A host's row is there, without its keys.
        HostWritten,
        /// A host's labels are written.
        LabelsWritten,
        /// A host is marked as revoked.
        HostRevoked,
        /// A certificate is noted.
        CertificateWritten,
        /// The addresses are in line with policy and hosts.
        AddressesGiven,
        /// The revision is raised.
        RevisionRaised,
        /// The audit's leaf is written.
        LeafWritten,
        /// Everything is written; the commit is next.
        BeforeCommit,
        /// It is committed; nobody knows.
        Committed,
        /// Everybody in this process knows; the caller has no answer yet.
        Unanswered,
        /// A note is committed.
        NoteCommitted,
        /// Views are compiled from what was committed, and neither kept nor sent.
        Compiled,
        /// Views are kept, and not sent.
        ViewsKept,
        /// A migration is written; its commit is next.
        Migrating,
    }

    impl fmt::Display for Point {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            fmt::Debug::fmt(self, f)
        }
    }

    /// Where to die: the name, and how often the place is still passed.
    static ARMED: OnceLock<Option<(String, AtomicU32)>> = OnceLock::new();

    /// Ends the process at once if this is the place to die at.
    pub fn reach(point: Point) {
        let armed = ARMED.get_or_init(|| {
            let wanted = std::env::var(VARIABLE).ok()?;
            let (name, count) = wanted.split_once(':').unwrap_or((&wanted, "1"));
            Some((name.to_owned(), AtomicU32::new(count.parse().unwrap_or(1))))
        });
        if let Some((name, left)) = armed
            && *name == point.to_string()
            && left.fetch_sub(1, Ordering::SeqCst) == 1
        {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
            loop {
                std::thread::park();
            }
        }
    }
}
