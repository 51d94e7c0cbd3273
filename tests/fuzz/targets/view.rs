//! Stored views: any bytes are refused, or give a table that opens nothing between others.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| assert!(cloison_proto::view::fuzz_view(data)));
