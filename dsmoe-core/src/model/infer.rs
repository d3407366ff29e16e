//! Inference: scoring windows of text, and decoding with a cache.

use dsmoe_kernels::Precision;
use dsmoe_kernels::buf::Buf;
use dsmoe_kernels::{add, attention, cross_entropy, embedding, linear, rms_norm, rope};
use dsmoe_router::RoutingStats;

use super::{Cache, Model};
use crate::error::Result;
use crate::ffn::{FfnScratch, Record};

/// Activations of one forward pass; reused from call to call.
#[derive(Debug, Default)]
pub struct Workspace {
    x: Buf,
    h: Buf,
    q: Buf,
    k: Buf,
    v: Buf,
    a: Buf,
    y: Buf,
    lse: Buf,
    rstd: Buf,
    logits: Buf,
    ffn: FfnScratch,
}

impl Model {
    /// Empty routing statistics for this model; none without routers.
    pub fn new_stats(&self) -> Option<RoutingStats> {
        self.num_experts().map(|n| RoutingStats::new(self.config.num_layers, n))
    }

    /// Sets `losses[t]` to the negative log-likelihood (nats) of `targets[t]` after `inputs` up to t, for
    /// `inputs.len() / seq` sequences of `seq` tokens each. A target of [`cross_entropy::IGNORE`] scores 0. Adds
    /// the routing of all inputs to `stats` (from [`Model::new_stats`]).
    ///
    /// # Errors
    /// A token id outside the vocabulary, or more positions than the model has.
    ///
    /// # Panics
    /// The slices' lengths differ, or are no multiple of `seq`.
    pub fn score(
        &self,
        losses: &mut [f32],
        inputs: &[u32],
        targets: &[u32],
        seq: usize,
        stats: Option<&mut RoutingStats>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        assert!(
            losses.len() == inputs.len() && targets.len() == inputs.len() && inputs.len().is_multiple_of(seq),
            "score: {} losses, {} inputs, {} targets, seq {seq}",
            losses.len(),
            inputs.len(),
            targets.len()
        );
        self.check_input(inputs, 0, seq)?;
        self.hidden_states(inputs, seq, None, stats, workspace);
        let dims = cross_entropy::Dims {
            tokens: inputs.len(),
            hidden: self.config.hidden,
            vocab: self.config.vocab_size,
        };
        cross_entropy::forward(losses, &workspace.h, self.param(&self.ranges.head), targets, dims);
        Ok(())
    }

    /// Feeds `ids` at the cache's next positions; returns the logits `[vocab]` after the last one.
    ///
    /// # Errors
    /// No ids, a token id outside the vocabulary, or more positions than the model has.
    pub fn decode<'w>(
        &self,
        ids: &[u32],
        cache: &mut Cache,
        stats: Option<&mut RoutingStats>,
        workspace: &'w mut Workspace,
    ) -> Result<&'w [f32]> {
        self.logits(ids, 1, cache, stats, workspace)
    }

    /// Feeds `ids` at the cache's next positions; returns the logits `[last, vocab]` after the last `last` of them.
    ///
    /// # Errors
    /// Fewer ids than `last`, a token id outside the vocabulary, or more positions than the model has.
    pub fn logits<'w>(
        &self,
        ids: &[u32],
        last: usize,
        cache: &mut Cache,
        stats: Option<&mut RoutingStats>,
        workspace: &'w mut Workspace,
    ) -> Result<&'w [f32]> {
        if ids.len() < last || ids.is_empty() {
            return Err(crate::error::Error::Argument(format!(
                "{} tokens to read logits of {last}; give at least one token",
                ids.len()
            )));
        }
        self.check_input(ids, cache.len, ids.len())?;
        self.hidden_states(ids, ids.len(), Some(cache), stats, workspace);
        let (hidden, vocab) = (self.config.hidden, self.config.vocab_size);
        let Workspace { h, logits, .. } = workspace;
        logits.resize(last * vocab);
        let dims = linear::Dims { rows: last, inputs: hidden, outputs: vocab, precision: Precision::F32 };
        linear::forward(logits, &h[(ids.len() - last) * hidden..], self.param(&self.ranges.head), dims);
        Ok(&workspace.logits)
    }

    /// Sets `workspace.h` to the normed hidden states `[ids.len(), hidden]` of sequences of `seq` tokens. With a
    /// cache there is one sequence, continuing it.
    fn hidden_states(
        &self,
        ids: &[u32],
        seq: usize,
        mut cache: Option<&mut Cache>,
        mut stats: Option<&mut RoutingStats>,
        workspace: &mut Workspace,
    ) {
        let config = &self.config;
        let (tokens, hidden, eps) = (ids.len(), config.hidden, config.rms_norm_eps as f32);
        let (q_width, kv_width) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        let start = cache.as_ref().map_or(0, |cache| cache.len);
        let Workspace { x, h, q, k, v, a, y, lse, rstd, ffn: scratch, .. } = workspace;
        x.resize(tokens * hidden);
        h.resize(tokens * hidden);
        q.resize(tokens * q_width);
        k.resize(tokens * kv_width);
        v.resize(tokens * kv_width);
        a.resize(tokens * q_width);
        y.resize(tokens * hidden);
        lse.resize(tokens * config.num_heads);
        rstd.resize(tokens);
        let dims = |inputs, outputs| linear::Dims { rows: tokens, inputs, outputs, precision: Precision::F32 };
        embedding::forward(x, self.param(&self.ranges.embed), ids, hidden);
        for (i, layer) in self.ranges.layers.iter().enumerate() {
            rms_norm::forward(h, rstd, x, self.param(&layer.input_norm), eps, hidden);
            linear::forward(q, h, self.param(&layer.q), dims(hidden, q_width));
            linear::forward(k, h, self.param(&layer.k), dims(hidden, kv_width));
            linear::forward(v, h, self.param(&layer.v), dims(hidden, kv_width));
            let at = |heads| rope::Args { table: &self.rope, seq, start, heads };
            rope::forward(q, at(config.num_heads));
            rope::forward(k, at(config.num_kv_heads));
            let mut shape = attention::Dims {
                batch: tokens / seq,
                queries: seq,
                keys: start + seq,
                heads: config.num_heads,
                kv_heads: config.num_kv_heads,
                head_dim: config.head_dim,
            };
            match cache.as_deref_mut() {
                Some(cache) => {
                    let (keys, values) = &mut cache.layers[i];
                    keys.extend_from_slice(k);
                    values.extend_from_slice(v);
                    shape.batch = 1;
                    if seq <= attention::DECODE_QUERIES {
                        attention::decode(a, q, keys, values, shape);
                    } else {
                        attention::forward(a, lse, q, keys, values, shape);
                    }
                }
                None => attention::forward(a, lse, q, k, v, shape),
            }
            linear::forward(y, a, self.param(&layer.o), dims(q_width, hidden));
            add::add(x, y);
            rms_norm::forward(h, rstd, x, self.param(&layer.post_norm), eps, hidden);
            let record = stats.as_deref_mut().map(|stats| Record { stats, layer: i });
            self.ffns[i].forward(y, h, self.param(&layer.ffn), record, scratch);
            add::add(x, y);
        }
        rms_norm::forward(h, rstd, x, self.param(&self.ranges.norm), eps, hidden);
        if let Some(cache) = cache {
            cache.len += seq;
        }
    }
}
