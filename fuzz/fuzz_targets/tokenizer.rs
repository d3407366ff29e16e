//! tokenizer.json and token caches.
#![no_main]

#[expect(dead_code, reason = "other targets use the rest")]
#[path = "../../datasets/tests/fuzz/bodies.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    bodies::tokenizer(bytes);
    bodies::token_cache(bytes);
});
