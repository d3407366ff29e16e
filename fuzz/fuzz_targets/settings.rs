//! Settings of a training.
#![no_main]

#[expect(dead_code, reason = "other targets use the rest")]
#[path = "../../dsmoe-train/tests/tasks/bodies.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    bodies::settings(bytes);
});
