//! GGUF files: header, configuration, tensors and tokenizer.
#![no_main]

#[expect(dead_code, reason = "other targets use the rest")]
#[path = "../../dsmoe-core/tests/files/bodies.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| bodies::gguf(bytes));
