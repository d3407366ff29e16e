//! The key-value cache of a decoding sequence.

use super::Inference;

/// Keys and values of all positions so far, per layer.
#[derive(Debug)]
pub struct Cache {
    /// Per layer: keys, values, `[len, kv_heads * head_dim]` each; of a model that runs on the processor.
    pub(crate) layers: Vec<(Vec<f32>, Vec<f32>)>,
    /// Of a model on a GPU: made when it is first used.
    #[cfg(feature = "cuda")]
    pub(crate) cuda: Option<Box<super::cuda::cache::CudaCache>>,
    /// Positions to have room for.
    #[cfg(feature = "cuda")]
    pub(crate) room: usize,
    pub(crate) len: usize,
}

impl Cache {
    /// An empty cache for `model` with room for `positions`: until they are used up, decoding allocates nothing for
    /// them; after that the room doubles.
    pub fn new(model: &Inference, positions: usize) -> Cache {
        let positions = positions.min(model.config().max_position);
        let config = model.config();
        let host = if model.device().is_gpu() { 0 } else { positions };
        let room = |heads: usize| Vec::with_capacity(host * heads * config.head_dim);
        let layers = config.layers().map(|shape| (room(shape.num_kv_heads), room(shape.num_kv_heads)));
        model.prepare(positions);
        Cache {
            layers: layers.collect(),
            #[cfg(feature = "cuda")]
            cuda: None,
            #[cfg(feature = "cuda")]
            room: positions,
            len: 0,
        }
    }

    /// Adds the newest positions of a layer; returns its keys and values.
    pub(crate) fn push(&mut self, layer: usize, k: &[f32], v: &[f32]) -> (&[f32], &[f32]) {
        let (keys, values) = &mut self.layers[layer];
        keys.extend_from_slice(k);
        values.extend_from_slice(v);
        (keys, values)
    }

    /// Forgets all positions and keeps the room.
    pub fn clear(&mut self) {
        for (keys, values) in &mut self.layers {
            keys.clear();
            values.clear();
        }
        self.len = 0;
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
