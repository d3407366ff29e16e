//! GGUF files: values of every type, models, exports, and malformed files.

mod builder;
mod export;
mod malformed;
mod models;
mod types;

use sha2::{Digest, Sha256};

/// Returns the SHA-256 of f32s in hexadecimal.
fn sha256(values: &[f32]) -> String {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns a tensor in f32.
fn read(checkpoint: &dsmoe_core::checkpoint::Checkpoint, name: &str) -> Vec<f32> {
    let mut values = vec![0.0; checkpoint.tensor(name).unwrap().numel()];
    checkpoint.read_f32(name, &mut values).unwrap();
    values
}
