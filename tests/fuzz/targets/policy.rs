//! Policies: any text is refused with a reason, or has one canonical text that means the same.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cloison_proto::policy::testing::fuzz_policy(data));
