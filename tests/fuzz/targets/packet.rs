//! Inner packets: our parser and a second one see the same.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cloison_agent_core::fuzz::packet(data));
