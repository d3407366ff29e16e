//! Logits that transformers computed.

use std::path::Path;

/// The ids of a text and their logits `[ids, vocabulary]`, beside the checkpoint in `dir`.
pub(crate) fn logits(dir: &Path) -> (Vec<u32>, Vec<f32>) {
    let bytes = std::fs::read(dir.join("golden_logits.safetensors")).expect("golden logits");
    let golden = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let ids = golden.tensor("input_ids").expect("input_ids").data().chunks_exact(8);
    let logits = golden.tensor("logits").expect("logits").data().chunks_exact(4);
    (
        ids.map(|b| i64::from_le_bytes(b.try_into().expect("8 bytes")) as u32).collect(),
        logits.map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes"))).collect(),
    )
}
