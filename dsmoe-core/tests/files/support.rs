//! A model small enough for files of errors, and reading it.

use std::path::Path;

use dsmoe_core::checkpoint::Checkpoint;
use dsmoe_core::config::Config;
use dsmoe_core::init::preset;

pub(crate) fn small_config() -> Config {
    let text = preset("tiny").unwrap().to_json();
    let text = text
        .replace("\"intermediate_size\": 512", "\"intermediate_size\": 12")
        .replace("\"hidden_size\": 128", "\"hidden_size\": 16")
        .replace("\"head_dim\": 32", "\"head_dim\": 4")
        .replace("\"num_hidden_layers\": 4", "\"num_hidden_layers\": 2")
        .replace("\"vocab_size\": 2048", "\"vocab_size\": 20");
    Config::from_json(Path::new("config.json"), &text).unwrap()
}

/// Progress that nobody hears of.
pub(crate) fn quiet<T>(_: T) {}

/// Returns the `n` values of a tensor.
pub(crate) fn read(checkpoint: &Checkpoint, name: &str, n: usize) -> Vec<f32> {
    let mut found = vec![0.0; n];
    checkpoint.read_f32(name, &mut found).unwrap();
    found
}
