//! Enrollment tokens: any text is refused, or is the one text of its token.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| assert!(cloison_proto::token::fuzz_token(data)));
