//! Between rows and types: every value is parsed when it is read, and one that does not parse is a damaged database, not a default.

use std::fmt::Display;
use std::str::FromStr;

use cloison_proto::version::MeshTime;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::StoreError;

/// A number as the database keeps it. Nothing we count comes near 2^63; what did would be kept as that.
pub(super) fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// A time as the database keeps it.
pub(super) fn time(value: MeshTime) -> i64 {
    number(value.0)
}

/// Reads one table's values.
#[derive(Clone, Copy)]
pub(super) struct Table(pub(super) &'static str);

impl Table {
    pub(super) fn corrupt(self, problem: impl Display) -> StoreError {
        StoreError::Corrupt {
            table: self.0,
            problem: problem.to_string(),
        }
    }

    /// A value from its text form.
    pub(super) fn parse<T: FromStr<Err: Display>>(self, text: &str) -> Result<T, StoreError> {
        text.parse()
            .map_err(|error| self.corrupt(format_args!("an unreadable value ({error})")))
    }

    pub(super) fn json<T: DeserializeOwned>(self, text: &str) -> Result<T, StoreError> {
        serde_json::from_str(text).map_err(|error| self.corrupt(format_args!("an unreadable value ({error})")))
    }

    pub(super) fn number<T: TryFrom<i64>>(self, value: i64) -> Result<T, StoreError> {
        T::try_from(value).map_err(|_| self.corrupt(format_args!("the number {value} out of its range")))
    }

    pub(super) fn time(self, value: i64) -> Result<MeshTime, StoreError> {
        self.number(value).map(MeshTime)
    }

    pub(super) fn hash(self, bytes: &[u8]) -> Result<[u8; 32], StoreError> {
        bytes.try_into().map_err(|_| self.corrupt("a hash of the wrong length"))
    }
}

/// A value's JSON, as the database keeps sets and lists.
pub(super) fn to_json(value: &impl Serialize) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|error| StoreError::Invalid {
        what: "value",
        why: format!("cannot be kept ({error})"),
    })
}
