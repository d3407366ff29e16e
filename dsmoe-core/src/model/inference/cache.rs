//! The key-value cache of a decoding sequence.

use crate::config::{Config, RopeScaling};

/// Keys and values of all positions so far, per layer.
///
/// ```
/// use dsmoe_core::model::{Cache, Workspace};
/// # use dsmoe_core::{Inference, Model, init::preset};
/// # let model = Inference::new(&Model::new(preset("tiny")?), dsmoe_kernels::Precision::F32);
///
/// let (mut cache, mut workspace) = (Cache::new(&model, 16), Workspace::default());
/// model.decode(&[1, 5, 9], &mut cache, None, &mut workspace)?; // the prompt
/// model.decode(&[2], &mut cache, None, &mut workspace)?; // one token more
/// assert_eq!(cache.len(), 4);
/// cache.clear(); // for another text
/// assert!(cache.is_empty());
/// # Ok::<(), dsmoe_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Cache {
    /// Per layer: keys, values, `[len, kv_heads * head_dim]` each; of a model that runs on the host.
    pub(crate) layers: Vec<(Vec<f32>, Vec<f32>)>,
    /// Cache of a model on a GPU; made when it is first used.
    #[cfg(feature = "cuda")]
    pub(crate) cuda: Option<Box<super::cuda::cache::CudaCache>>,
    /// Positions to have room for.
    #[cfg(feature = "cuda")]
    pub(crate) room: usize,
    pub(crate) len: usize,
    /// Positions of the text that is being fed, where it is known to be longer than what was fed so far.
    pub(crate) expected: usize,
}

impl Cache {
    /// Adds the newest positions of a layer; returns its keys and values.
    pub(crate) fn push(&mut self, layer: usize, k: &[f32], v: &[f32]) -> (&[f32], &[f32]) {
        let (keys, values) = &mut self.layers[layer];
        keys.extend_from_slice(k);
        values.extend_from_slice(v);
        (keys, values)
    }

    /// States that the next calls feed a text up to `positions` positions: a rotation that depends on their number is then
    /// that of the whole text, in whatever pieces it is fed.
    pub fn expect(&mut self, positions: usize) {
        self.expected = positions;
    }

    /// Returns whether a text of `positions` positions has to be fed from its start again, as it outgrows the rotation of
    /// what is in the cache.
    pub fn is_outgrown(&self, config: &Config, positions: usize) -> bool {
        config.architecture.ropes.iter().any(|rope| match rope.scaling {
            RopeScaling::LongRope { original_max_position: original, restart, .. } => {
                restart && self.len > 0 && self.len <= original && positions > original
            }
            _ => false,
        })
    }

    /// Returns the positions of a pass that feeds `tokens` more.
    pub(crate) fn positions(&self, tokens: usize) -> usize {
        self.expected.max(self.len + tokens)
    }

    /// Forgets all positions and keeps the room.
    pub fn clear(&mut self) {
        for (keys, values) in &mut self.layers {
            keys.clear();
            values.clear();
        }
        (self.len, self.expected) = (0, 0);
    }

    /// Returns the number of positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}
