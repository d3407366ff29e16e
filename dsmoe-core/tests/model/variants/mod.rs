//! Models that are no even LLaMA: layers of different shapes, masked linears, FFNs of other crates.

mod ffn_spec;
mod masks;
mod parts;
mod shapes;

use std::path::Path;

use dsmoe_core::{Config, Model, Result};
use dsmoe_kernels::rng::Rng;

const HIDDEN: usize = 16;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 6;
const INTERMEDIATE: usize = 20;
const LAYERS: usize = 3;
const VOCAB: usize = 29;

/// A LLaMA with `head_dim` left to its default where `explicit` is false.
fn config_json(explicit: bool) -> String {
    let head_dim = if explicit { format!(r#""head_dim": {HEAD_DIM},"#) } else { String::new() };
    format!(
        r#"{{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": {VOCAB}, "hidden_size": {HIDDEN}, "intermediate_size": {INTERMEDIATE}, {head_dim}
        "num_hidden_layers": {LAYERS}, "num_attention_heads": {HEADS}, "num_key_value_heads": {KV_HEADS},
        "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_theta": 100.0, "bos_token_id": 1,
        "eos_token_id": 2, "tie_word_embeddings": false, "torch_dtype": "float32"}}"#
    )
}

fn config() -> Config {
    read(&config_json(true)).expect("configuration")
}

fn read(text: &str) -> Result<Config> {
    Config::from_json(Path::new("dir/config.json"), text)
}

fn fill(model: &mut Model, seed: u64) {
    for (i, entry) in model.layout().clone().entries().iter().enumerate() {
        let mut rng = Rng::new(seed, i as u64);
        let norm = entry.spec.name.contains("norm");
        for p in &mut model.params_mut()[entry.range.clone()] {
            *p = if norm { 1.0 + 0.2 * rng.normal() } else { 0.3 * rng.normal() };
        }
    }
}

fn tokens(len: usize, seed: u64) -> Vec<u32> {
    let mut rng = Rng::new(seed, 7);
    (0..len).map(|_| rng.below(VOCAB as u64) as u32).collect()
}
