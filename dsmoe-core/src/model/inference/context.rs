//! Scoring of tokens that do not see what the same pass makes of earlier ones: each sees the keys and values of a cache before its own
//! position, and its own.

use dsmoe_kernels::attention;
use rayon::prelude::*;

use super::Inference;
use super::cache::Cache;
use super::cpu::{CpuInference, Heads, Workspace};
use crate::config::LayerShape;
use crate::error::Result;
use crate::model::ropes::Turn;
use crate::model::tensors::{Batch, attention_dims, check_input};

/// The keys and values of earlier tokens, to which the tokens of one sequence attend.
struct Seen<'a> {
    /// Per layer: keys, values.
    layers: &'a [(Vec<f32>, Vec<f32>)],
    /// Positions of the whole text.
    positions: usize,
}

impl Inference {
    /// Does as [`Inference::score`] for tokens that see earlier ones as other passes have fed them to `caches`, one for each sequence
    /// of the batch: token t of a sequence is at position `start + t` and sees the cache's positions before that one, and itself. So
    /// every token of a text may take a route that no token before it takes ([`Inference::set_routes`]).
    ///
    /// ```
    /// use dsmoe_core::ffn::Route;
    /// use dsmoe_core::model::{Batch, Cache, Workspace};
    /// # use dsmoe_core::{Inference, Model, init::preset};
    /// # let mut model = Inference::new(&Model::new(preset("tiny")?), dsmoe_kernels::Precision::F32);
    ///
    /// let (ids, mut workspace) = ([1, 5, 9, 2], Workspace::default());
    /// let mut cache = Cache::new(&model, 3);
    /// model.decode(&ids[..3], &mut cache, None, &mut workspace)?;
    /// // What would each token lose without the first FFN, if those before it had it?
    /// let mut routes = vec![Route::Own; model.config().num_layers];
    /// routes[0] = Route::Skip;
    /// model.set_routes(&routes)?;
    /// let mut losses = [0.0; 3];
    /// let batch = Batch { inputs: &ids[..3], targets: &ids[1..], seq: 3 };
    /// model.score_after(&mut losses, batch, (&[cache], 0), &mut workspace)?;
    /// assert!(losses.iter().all(|&loss| loss > 0.0));
    /// # Ok::<(), dsmoe_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// A token id is outside the vocabulary, there are more positions than the model has, or the model runs on a GPU.
    ///
    /// # Panics
    /// There are not as many caches as sequences, or losses as inputs; a cache lacks a position before that of its last token.
    pub fn score_after(
        &self,
        losses: &mut [f32],
        batch: Batch<'_>,
        (caches, start): (&[Cache], usize),
        workspace: &mut Workspace,
    ) -> Result<()> {
        let (model, Batch { inputs, seq, .. }) = (self.on_host()?, batch);
        assert!(
            losses.len() == inputs.len() && inputs.len() == caches.len() * seq,
            "score_after: {} losses, {} inputs, {} caches, seq {seq}",
            losses.len(),
            inputs.len(),
            caches.len()
        );
        batch.check(self.config())?;
        check_input(self.config(), inputs, start, seq)?;
        let seen = caches.iter().map(|cache| {
            assert!(cache.len + 1 >= start + seq, "score_after: {} positions in a cache", cache.len);
            Seen { layers: &cache.layers, positions: cache.positions(0).max(start + seq) }
        });
        let seen: Vec<Seen<'_>> = seen.collect();
        model.score_after(losses, batch, (&seen, start), workspace)
    }
}

impl CpuInference {
    fn score_after(
        &self,
        losses: &mut [f32],
        batch: Batch<'_>,
        (seen, start): (&[Seen<'_>], usize),
        workspace: &mut Workspace,
    ) -> Result<()> {
        let Batch { inputs, targets, seq } = batch;
        self.score_pass(losses, targets, workspace, |workspace| {
            self.forward(inputs, None, workspace, |layer, heads| {
                self.attend_after(layer, heads, seen, (start, seq));
            });
        })
    }

    /// Computes the attention of `seq` tokens of every sequence, from position `start` on, each over the positions of its cache before
    /// it and over itself.
    fn attend_after(&self, layer: usize, heads: Heads<'_>, seen: &[Seen<'_>], (start, seq): (usize, usize)) {
        let Heads { a, q, k, v, .. } = heads;
        let LayerShape { num_heads, num_kv_heads: kv_heads, .. } = self.config.layer(layer);
        let (width, kv_width) = (num_heads * self.config.head_dim, kv_heads * self.config.head_dim);
        let rows = a.par_chunks_mut(seq * width).zip(q.par_chunks_mut(seq * width));
        let rows = rows.zip(k.par_chunks_mut(seq * kv_width)).zip(v.par_chunks(seq * kv_width));
        rows.zip(seen).for_each_init(
            Default::default,
            |(keys, values): &mut (Vec<f32>, Vec<f32>), ((((a, q), k), v), seen)| {
                let positions = seen.positions;
                for (x, heads, stride) in [(&mut *q, num_heads, width), (&mut *k, kv_heads, kv_width)] {
                    self.ropes.forward(layer, x, Turn { stride, heads, seq, start, positions });
                }
                let (old_keys, old_values) = &seen.layers[layer];
                for (all, old) in [(&mut *keys, old_keys), (&mut *values, old_values)] {
                    all.clear();
                    all.extend_from_slice(&old[..start * kv_width]);
                    all.resize((start + seq) * kv_width, 0.0);
                }
                for t in 0..seq {
                    let own = t * kv_width..(t + 1) * kv_width;
                    let at = (start + t) * kv_width..(start + t + 1) * kv_width;
                    keys[at.clone()].copy_from_slice(&k[own.clone()]);
                    values[at.clone()].copy_from_slice(&v[own]);
                    let of = t * width..(t + 1) * width;
                    let dims = attention_dims(&self.config, layer, 1, [1, start + t + 1]);
                    let (out, q) = (&mut a[of.clone()], &q[of]);
                    attention::Decode { out, q, k: &keys[..at.end], v: &values[..at.end], dims }.run();
                    // Later tokens see this one as the cache has it.
                    if t + 1 < seq {
                        keys[at.clone()].copy_from_slice(&old_keys[at.clone()]);
                        values[at.clone()].copy_from_slice(&old_values[at]);
                    }
                }
            },
        );
    }
}
