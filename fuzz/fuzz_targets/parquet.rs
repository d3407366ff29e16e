//! Parquet files.
#![no_main]

#[expect(dead_code, reason = "other targets use the rest")]
#[path = "../../datasets/tests/fuzz/bodies.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    bodies::corpus("a.parquet", bytes);
    bodies::task("piqa", "a.parquet", bytes);
});
