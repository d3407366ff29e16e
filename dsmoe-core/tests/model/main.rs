//! Models: their layers, gradients, inference and variants against oracles and golden numbers.

mod calibrate;
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/golden.rs"]
mod golden;
mod golden_layer;
mod golden_model;
mod inference;
mod model_oracle;
mod ragged;
mod variants;

use std::path::{Path, PathBuf};

use dsmoe_core::checkpoint::Dtype;
use dsmoe_core::config::Config;
use dsmoe_core::init::{InitOptions, init, preset};

/// Writes a random dense model with the given sizes to a new directory in `dir`.
fn dense(dir: &Path, sizes: &[(&str, usize)], dtype: Dtype, tied: bool) -> PathBuf {
    let mut json: serde_json::Value = serde_json::from_str(&preset("tiny").unwrap().to_json()).unwrap();
    for &(key, value) in sizes {
        json[key] = value.into();
    }
    json["tie_word_embeddings"] = tied.into();
    // Activations of the order of 1, and logits that tell tokens apart.
    json["initializer_range"] = 0.1.into();
    let config = Config::from_json(Path::new("config.json"), &json.to_string()).unwrap();
    let out = dir.join(format!("dense-{dtype}-{tied}"));
    init(&config, &out, &InitOptions { dtype, seed: 3, ..InitOptions::default() }, &mut |_| {}).unwrap();
    out
}
