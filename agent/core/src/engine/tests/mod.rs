//! Whole walks: hosts in memory, each with an engine of its own, on an underlay that is a list of datagrams. Every test runs with
//! boringtun's sessions and with the simulated ones.

mod flows;
mod installs;
mod lab;
mod plain;
mod strangers;
mod walks;
mod witnesses;

/// Runs a test with both kinds of sessions.
macro_rules! with_both_sessions {
    ($($name:ident)*) => {
        mod boringtun {
            $(#[test]
            fn $name() -> crate::engine::tests::lab::Outcome {
                super::$name::<crate::wg::boringtun::BoringKey>()
            })*
        }
        mod simulated {
            $(#[test]
            fn $name() -> crate::engine::tests::lab::Outcome {
                super::$name::<crate::wg::trivial::SimulatedKey>()
            })*
        }
    };
}

use with_both_sessions;
