//! GGUF files: values of every type, models, exports, and malformed files.

mod builder;
mod export;
mod malformed;
mod models;
mod types;

use dsmoe_core::config::Config;
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

/// Checks that two configurations describe one model.
fn same(what: &str, a: &Config, b: &Config) {
    let sizes = |c: &Config| {
        [c.vocab_size, c.hidden, c.intermediate, c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim]
    };
    assert_eq!(sizes(a), sizes(b), "{what}");
    assert_eq!((a.rms_norm_eps, a.max_position), (b.rms_norm_eps, b.max_position), "{what}");
    assert_eq!(a.tie_word_embeddings, b.tie_word_embeddings, "{what}");
    assert_eq!((a.bos_token_id, &a.eos_token_ids), (b.bos_token_id, &b.eos_token_ids), "{what}");
    assert_eq!(a.architecture, b.architecture, "{what}");
}

/// Checks that two configurations describe one model, but for f32s in place of f64s.
fn close(what: &str, a: &Config, b: &Config) {
    let near = |x: f64, y: f64| (x - y).abs() <= 1e-6 * x.abs();
    let positions = a.max_position.min(64);
    assert_eq!(a.architecture.layers.len(), b.architecture.layers.len(), "{what}");
    for (a_layer, b_layer) in a.architecture.layers.iter().zip(&b.architecture.layers) {
        let limit = |window: Option<usize>| window.filter(|&window| window < a.max_position);
        assert_eq!(limit(a_layer.window), limit(b_layer.window), "{what}");
        let rope = |config: &Config, rope: Option<usize>| {
            let rope = rope.map(|rope| config.architecture.ropes[rope].clone())?;
            Some((rope.frequencies(positions), rope.frequencies(a.max_position), rope.factor()))
        };
        match (rope(a, a_layer.rope), rope(b, b_layer.rope)) {
            (None, None) => {}
            (Some((short, long, factor)), Some((b_short, b_long, b_factor))) => {
                let all = short.iter().chain(&long).zip(b_short.iter().chain(&b_long));
                assert!(short.len() == b_short.len() && all.into_iter().all(|(x, y)| near(*x, *y)), "{what}");
                assert!(near(factor, b_factor), "{what}: {factor} {b_factor}");
            }
            _ => panic!("{what}: a layer has RoPE in one of them"),
        }
    }
    let plain = |config: &Config| {
        let mut config = config.clone();
        config.architecture.ropes.clear();
        config.architecture.layers.clear();
        config
    };
    same(what, &plain(a), &plain(b));
}
