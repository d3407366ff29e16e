//! Benchmark files, mixtures and manifests.
#![no_main]

#[expect(dead_code, reason = "other targets use the rest")]
#[path = "../../datasets/tests/fuzz/bodies.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    bodies::task("piqa", "a.jsonl", bytes);
    bodies::task("piqa", "a.json", bytes);
    bodies::task("piqa", "a.csv", bytes);
    bodies::definition(bytes);
    bodies::mixture(bytes);
    bodies::manifest(bytes);
});
