//! Text files, plain and compressed.
#![no_main]

#[expect(dead_code, reason = "other targets use the rest")]
#[path = "../../datasets/tests/fuzz/bodies.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    for name in ["a.jsonl", "a.json", "a.jsonl.gz", "a.txt.zst"] {
        bodies::corpus(name, bytes);
    }
});
