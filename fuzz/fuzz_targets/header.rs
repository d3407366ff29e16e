//! Headers and whole files of safetensors, indexes of shards, and manifests.
#![no_main]

#[expect(dead_code, reason = "other targets use the rest")]
#[path = "../../dsmoe-core/tests/files/bodies.rs"]
mod bodies;

/// A shard of one value.
const SHARD: &[u8] = b"\x40\0\0\0\0\0\0\0{\"w\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}          \0\0\0\0";

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    bodies::header(bytes, 32);
    bodies::file(bytes);
    if bytes.first() == Some(&b'{') {
        bodies::index(SHARD, bytes);
        bodies::manifest(bytes);
    }
});
