//! Chat templates, the settings beside a tokenizer, and conversations: three parts with a zero byte between them.
#![no_main]

#[expect(dead_code, reason = "other targets use the rest")]
#[path = "../../datasets/tests/fuzz/bodies.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut parts = bytes.splitn(3, |&byte| byte == 0);
    let mut next = || parts.next().unwrap_or_default();
    bodies::chat(next(), next(), next());
});
