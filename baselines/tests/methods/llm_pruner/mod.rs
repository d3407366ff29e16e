//! LLM-Pruner from a directory to a directory.

mod bad_input;
mod block;
mod channel;

use dsmoe_core::Model;
use dsmoe_kernels::rng::Rng;
use serde_json::json;

use super::common::{VOCAB, tiny};

/// A model of four layers with random weights.
fn model(tied: bool) -> Model {
    let mut model = Model::new(tiny(&json!({
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 4, "max_position_embeddings": 32, "tie_word_embeddings": tied
    })));
    let layout = model.layout().clone();
    for (i, entry) in layout.entries().iter().enumerate() {
        let (mut rng, norm) = (Rng::new(5, i as u64), entry.spec.name.contains("norm"));
        let of = |x: f32| if norm { 1.0 + 0.2 * x } else { 0.2 * x };
        model.params_mut()[entry.range.clone()].iter_mut().for_each(|p| *p = of(rng.normal()));
    }
    model
}
