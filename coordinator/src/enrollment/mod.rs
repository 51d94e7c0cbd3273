//! From a token to a host with a certificate: what a token binds a joiner to (`token`), and the join itself (`redeem`).

mod redeem;
pub mod token;

pub use redeem::{Admission, Enrollment, EnrollmentError, Proven};
