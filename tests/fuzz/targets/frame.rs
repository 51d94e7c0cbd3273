//! Frames of a link: any bytes, in any pieces, give the same frames or the same refusal.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| assert!(cloison_proto::control::frame::fuzz_frames(data)));
