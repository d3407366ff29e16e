//! The key-value cache of a decoding sequence.

use super::Model;

/// Keys and values of all positions so far, per layer; grows as positions come.
#[derive(Clone, Debug, Default)]
pub struct Cache {
    /// Per layer: keys, values, `[len, kv_heads * head_dim]` each.
    pub(super) layers: Vec<(Vec<f32>, Vec<f32>)>,
    pub(super) len: usize,
}

impl Cache {
    /// An empty cache for `model`.
    pub fn new(model: &Model) -> Cache {
        Cache { layers: vec![(Vec::new(), Vec::new()); model.config.num_layers], len: 0 }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}
