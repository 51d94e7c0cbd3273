//! The policy language.

mod attachment;
pub use attachment::Attachment;
