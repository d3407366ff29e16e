//! Inference on sequences of different lengths at once: tokens lie one after the other without padding, and only
//! attention sees where a sequence begins.
//!
//! A token's results do not depend on what else is in the batch: products, norms and FFNs take rows one by one, and
//! every sequence has an attention of its own.

use dsmoe_kernels::crew::with_crew;
use dsmoe_kernels::{attention, cross_entropy};
use dsmoe_router::RoutingStats;
use rayon::prelude::*;

use super::cache::Cache;
use super::cpu::{CpuInference, Heads, Workspace};
use super::segments::{Likelihood, Place};
use crate::config::LayerShape;
use crate::model::ropes::Turn;
use crate::model::tensors::{attention_dims, in_pool};

/// Rows of logits at a time.
const LOGIT_ROWS: usize = 512;

impl CpuInference {
    pub(crate) fn likelihoods(
        &self,
        ids: &[u32],
        places: &[Place],
        targets: &[(usize, u32)],
        stats: Option<&mut RoutingStats>,
        workspace: &mut Workspace,
    ) -> Vec<Likelihood> {
        let mut found = vec![Likelihood::default(); targets.len()];
        in_pool(|| {
            self.forward(ids, stats, workspace, |layer, heads| self.attend(layer, heads, places));
            self.look_up(&mut found, targets, workspace);
        });
        found
    }

    /// Sets the workspace's logits.
    pub(crate) fn decode_each(
        &self,
        ids: &[u32],
        caches: &mut [&mut Cache],
        stats: Option<&mut RoutingStats>,
        workspace: &mut Workspace,
    ) {
        let run = || {
            self.forward(ids, stats, workspace, |layer, heads| self.attend_caches(layer, heads, caches));
            let Workspace { h, logits, .. } = &mut *workspace;
            self.head(logits, h, ids.len());
        };
        // From eight texts on every loop is long enough for the pool.
        in_pool(|| if ids.len() <= attention::DECODE_QUERIES { with_crew(run) } else { run() });
    }

    /// Computes the attention of every segment by itself.
    fn attend(&self, layer: usize, heads: Heads<'_>, places: &[Place]) {
        let Heads { a, lse, q, k, v } = heads;
        let LayerShape { num_heads, num_kv_heads: kv_heads, .. } = self.config.layer(layer);
        let (width, kv_width) = (num_heads * self.config.head_dim, kv_heads * self.config.head_dim);
        let turn = |x: &mut [f32], place: &Place, heads| {
            let (seq, start) = (place.tokens, place.before.1);
            let stride = heads * self.config.head_dim;
            self.ropes.forward(layer, x, Turn { stride, heads, seq, start, positions: place.positions });
        };
        let turned = cut(q, places, width).into_par_iter().zip(cut(k, places, kv_width)).zip(places);
        turned.filter(|(_, place)| place.tokens > 0).for_each(|((q, k), place)| {
            turn(q, place, num_heads);
            turn(k, place, kv_heads);
        });
        let (q, k, v) = (&*q, &*k, &*v);
        let outs = cut(a, places, width).into_par_iter().zip(cut(lse, places, num_heads)).zip(places);
        outs.for_each_init(
            Default::default,
            |(keys, values): &mut (Vec<f32>, Vec<f32>), ((a, lse), place)| {
                let own = |width: usize| place.first * width..(place.first + place.tokens) * width;
                let (start, before) = place.before;
                let shape = attention_dims(&self.config, layer, 1, [place.tokens, before + place.tokens]);
                let q = &q[own(width)];
                let (k_own, v_own) = (&k[own(kv_width)], &v[own(kv_width)]);
                if before == 0 {
                    attention::Forward { out: a, lse, q, k: k_own, v: v_own, dims: shape }.run();
                    return;
                }
                let shared = start * kv_width..(start + before) * kv_width;
                for (all, x, x_own) in [(&mut *keys, k, k_own), (&mut *values, v, v_own)] {
                    all.clear();
                    all.extend_from_slice(&x[shared.clone()]);
                    all.extend_from_slice(x_own);
                }
                attention::Forward { out: a, lse, q, k: keys, v: values, dims: shape }.run();
            },
        );
    }

    /// Computes the attention of one token each over its cache.
    fn attend_caches(&self, layer: usize, heads: Heads<'_>, caches: &mut [&mut Cache]) {
        let Heads { a, q, k, v, .. } = heads;
        let LayerShape { num_heads, num_kv_heads: kv_heads, .. } = self.config.layer(layer);
        let (width, kv_width) = (num_heads * self.config.head_dim, kv_heads * self.config.head_dim);
        let rows = a.par_chunks_mut(width).zip(q.par_chunks_mut(width)).zip(k.par_chunks_mut(kv_width));
        rows.zip(v.par_chunks(kv_width)).zip(caches).for_each(|((((a, q), k), v), cache)| {
            let (start, positions) = (cache.len, cache.positions(1));
            for (x, heads, stride) in [(&mut *q, num_heads, width), (&mut *k, kv_heads, kv_width)] {
                self.ropes.forward(layer, x, Turn { stride, heads, seq: 1, start, positions });
            }
            let shape = attention_dims(&self.config, layer, 1, [1, cache.len + 1]);
            let (keys, values) = cache.push(layer, k, v);
            attention::Decode { out: a, q, k: keys, v: values, dims: shape }.run();
        });
    }

    /// Sets `found` from the hidden states in `workspace`.
    fn look_up(&self, found: &mut [Likelihood], targets: &[(usize, u32)], workspace: &mut Workspace) {
        let (hidden, vocab) = (self.config.hidden, self.config.vocab_size);
        // Targets of one place share its row of logits.
        let mut order: Vec<usize> = (0..targets.len()).collect();
        order.sort_by_key(|&i| targets[i].0);
        let rows: Vec<&[usize]> = order.chunk_by(|&i, &j| targets[i].0 == targets[j].0).collect();
        let at_once = (cross_entropy::CHUNK_BYTES / size_of::<f32>() / vocab).clamp(1, LOGIT_ROWS);
        let Workspace { h, logits, .. } = workspace;
        let mut states = vec![0.0; at_once.min(rows.len()) * hidden];
        for rows in rows.chunks(at_once) {
            for (state, row) in states.chunks_exact_mut(hidden).zip(rows) {
                state.copy_from_slice(&h[targets[row[0]].0 * hidden..][..hidden]);
            }
            self.head(logits, &states[..rows.len() * hidden], rows.len());
            let found_here: Vec<Vec<Likelihood>> = logits
                .par_chunks_mut(vocab)
                .zip(rows)
                .map(|(z, row)| {
                    let tokens = || row.iter().map(|&i| targets[i].1 as usize);
                    let greedy: Vec<bool> = tokens().map(|token| is_largest(z, token)).collect();
                    cross_entropy::LogSoftmaxRow { logits: z }.run();
                    let likelihood =
                        |(token, greedy): (usize, bool)| Likelihood { log_probability: z[token], greedy };
                    tokens().zip(greedy).map(likelihood).collect()
                })
                .collect();
            for (&i, likelihood) in rows.iter().copied().flatten().zip(found_here.into_iter().flatten()) {
                found[i] = likelihood;
            }
        }
    }
}

/// Returns the tokens of each segment in `x`, whose rows have `width` values.
fn cut<'a>(mut x: &'a mut [f32], places: &[Place], width: usize) -> Vec<&'a mut [f32]> {
    let segment = |place: &Place| {
        let (segment, rest) = std::mem::take(&mut x).split_at_mut(place.tokens * width);
        x = rest;
        segment
    };
    places.iter().map(segment).collect()
}

/// Returns whether `z[at]` is the largest value, and the first of equal ones.
fn is_largest(z: &[f32], at: usize) -> bool {
    z[..at].iter().all(|&x| x < z[at]) && z[at..].iter().all(|&x| x <= z[at])
}
