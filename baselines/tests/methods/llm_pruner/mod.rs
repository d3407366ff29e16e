//! LLM-Pruner from a directory to a directory.

mod bad_input;
mod block;
mod channel;

use dsmoe_core::{Config, Model};
use dsmoe_kernels::rng::Rng;

use super::common::VOCAB;

/// A model of four layers with random weights.
fn model(tied: bool) -> Model {
    let config = format!(
        r#"{{"model_type": "llama", "hidden_act": "silu", "vocab_size": {VOCAB}, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": {tied}}}"#
    );
    let mut model = Model::new(Config::from_json("config.json".as_ref(), &config).unwrap());
    let layout = model.layout().clone();
    for (i, entry) in layout.entries().iter().enumerate() {
        let (mut rng, norm) = (Rng::new(5, i as u64), entry.spec.name.contains("norm"));
        let of = |x: f32| if norm { 1.0 + 0.2 * x } else { 0.2 * x };
        model.params_mut()[entry.range.clone()].iter_mut().for_each(|p| *p = of(rng.normal()));
    }
    model
}
