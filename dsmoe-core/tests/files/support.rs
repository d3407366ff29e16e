//! Asserting on refusals, and a model small enough for it.

use std::path::Path;

use dsmoe_core::Result;
use dsmoe_core::config::Config;
use dsmoe_core::init::preset;

/// Asserts that the result is an error of one line with all of `parts`.
pub(crate) fn refused<T>(result: Result<T>, parts: &[&str]) {
    let message = match result {
        Ok(_) => panic!("accepted, without an error about {parts:?}"),
        Err(error) => error.to_string(),
    };
    assert!(!message.contains('\n'), "{message}");
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

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
